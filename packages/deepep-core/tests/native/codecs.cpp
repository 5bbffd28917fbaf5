// Runs a codec over raw bytes: codecs NAME INPUT OUTPUT. Tensors are little-endian and contiguous; the Python side knows the shapes.
//
//   bf16_to_float    uint16 [n]          -> float32 [n]
//   float_to_bf16    float32 [n]         -> uint16 [n]
//   e4m3_to_float    uint8 [n]           -> float32 [n]
//   float_to_e4m3    float32 [n]         -> uint8 [n]
//   fp8, fp8_rounded bf16 [blocks][128]  -> e4m3 [blocks][128], then scales float32 [blocks], then (rounded) UE8M0 words [blocks / 4]
//   logfmt           bf16 [blocks][128]  -> codes uint16 [blocks][128], low and high bf16 [blocks][2], decoded float32 [blocks][128]
//
// The last one goes through packed codes and through the extremes as they travel, bf16, as a sender and a receiver would.
#include <cstdint>
#include <cstdio>
#include <cstring>
#include <string>
#include <vector>

#include "check.hpp"
#include "deepep/codec/fp8.hpp"
#include "deepep/codec/logfmt.hpp"

namespace codec = deepep::codec;

namespace {

template <class T>
std::vector<T> read(const char* path) {
    std::FILE* file = std::fopen(path, "rb");
    CHECK(file != nullptr, "%s", path);
    std::fseek(file, 0, SEEK_END);
    std::vector<T> values(static_cast<size_t>(std::ftell(file)) / sizeof(T));
    std::rewind(file);
    CHECK(std::fread(values.data(), sizeof(T), values.size(), file) == values.size(), "%s", path);
    std::fclose(file);
    return values;
}

struct Output {
    std::FILE* file;
    template <class T>
    void put(const std::vector<T>& values) const {
        CHECK(std::fwrite(values.data(), sizeof(T), values.size(), file) == values.size(), "write");
    }
};

template <class To, class From, class Convert>
void convert(const char* input, const Output& output, Convert function) {
    std::vector<To> results;
    for (const From value : read<From>(input)) results.push_back(function(value));
    output.put(results);
}

void fp8(const char* input, const Output& output, bool round_scale) {
    const std::vector<uint16_t> x = read<uint16_t>(input);
    const size_t num_blocks = x.size() / codec::kFp8Block;
    std::vector<uint8_t> q(x.size());
    std::vector<float> scales(num_blocks);
    for (size_t b = 0; b < num_blocks; ++b) scales[b] = codec::cast_block(&x[b * codec::kFp8Block], round_scale, &q[b * codec::kFp8Block]);
    output.put(q);
    output.put(scales);
    if (!round_scale) return;
    std::vector<uint32_t> words;
    for (size_t b = 0; b + 4 <= num_blocks; b += 4) {
        const float four[4] = {scales[b], scales[b + 1], scales[b + 2], scales[b + 3]};
        words.push_back(codec::pack_ue8m0(four));
    }
    output.put(words);
}

void logfmt(const char* input, const Output& output) {
    constexpr int kBlock = codec::kLogfmtBlock;
    const std::vector<uint16_t> x = read<uint16_t>(input);
    std::vector<uint16_t> codes(x.size()), extremes;
    std::vector<float> decoded(x.size());
    for (size_t begin = 0; begin < x.size(); begin += kBlock) {
        const codec::LogScale scale = codec::encode_block(&x[begin], &codes[begin]);
        extremes.push_back(codec::float_to_bf16(scale.low));
        extremes.push_back(codec::float_to_bf16(scale.high));
        const codec::LogScale received =
            codec::LogScale::of(codec::bf16_to_float(extremes[extremes.size() - 2]), codec::bf16_to_float(extremes.back()));
        for (int group = 0; group < kBlock; group += 16) {
            uint16_t sixteen[16];
            uint32_t words[5];
            memcpy(sixteen, &codes[begin + group], sizeof(sixteen));
            codec::pack_codes(sixteen, words);
            for (int i = 0; i < 16; ++i) {
                const uint16_t code = codec::unpack_code(words, i);
                CHECK(code == sixteen[i], "code %d of a packed group is %d, was %d", i, code, sixteen[i]);
                decoded[begin + group + i] = codec::logfmt_value(code, received);
            }
        }
    }
    output.put(codes);
    output.put(extremes);
    output.put(decoded);
}

}  // namespace

int main(int num_arguments, char** arguments) {
    CHECK(num_arguments == 4, "usage: codecs NAME INPUT OUTPUT");
    const std::string name = arguments[1];
    const char* input = arguments[2];
    const Output output = {std::fopen(arguments[3], "wb")};
    CHECK(output.file != nullptr, "%s", arguments[3]);
    if (name == "bf16_to_float")
        convert<float, uint16_t>(input, output, codec::bf16_to_float);
    else if (name == "float_to_bf16")
        convert<uint16_t, float>(input, output, codec::float_to_bf16);
    else if (name == "e4m3_to_float")
        convert<float, uint8_t>(input, output, codec::e4m3_to_float);
    else if (name == "float_to_e4m3")
        convert<uint8_t, float>(input, output, codec::float_to_e4m3);
    else if (name == "fp8" || name == "fp8_rounded")
        fp8(input, output, name == "fp8_rounded");
    else if (name == "logfmt")
        logfmt(input, output);
    else
        CHECK(false, "no codec %s", name.c_str());
    CHECK(std::fclose(output.file) == 0, "close");
}
