#pragma once
// LogFMT (docs/logfmt.md): blocks of 128 bf16 values as sign and 9-bit level on a logarithmic scale between the block's own extremes.
//
// Everything but the logarithms is exact, so what is decided without them (zeros, signs, `low`, `high`, blocks of equal magnitudes) equals
// the model bit for bit; a level may differ by one where a value lies nearly half-way between two.
#include <cmath>
#include <cstdint>

#include "bits.hpp"

namespace deepep::codec {

constexpr int kLogfmtBlock = 128;
constexpr int kTopLevel = 511;
constexpr int kNumCodeBits = 10;                                // sign (bit 9), level (bits 0 to 8)
constexpr int kNumCodeBytes = kLogfmtBlock * kNumCodeBits / 8;  // 160
constexpr float kInverseSpan = 1.0f / 4294967296.0f;            // 2^-32: levels reach that far below `high`

// The scale of a block. Magnitudes of levels 1 and 511; values of the block or a power of two below one, so bf16 holds them.
struct LogScale {
    float low;
    float high;
    float log_low;
    float step;  // octaves between two levels; 0 where all magnitudes are equal

    // From `low` and `high` as they travel.
    DEEPEP_HOST_DEVICE static LogScale of(float low, float high) {
        if (!(low > 0) || !is_finite(high)) return {low, high, 0, 0};
        const float log_low = log2f(low);
        return {low, high, log_low, divide_rn(subtract_rn(log2f(high), log_low), kTopLevel - 1)};
    }
    // From the block's largest magnitude and its smallest that is not zero (infinity if there is none). NaN counts as largest.
    DEEPEP_HOST_DEVICE static LogScale of_extremes(float high, float smallest) {
        const float floor = bf16_to_float(float_to_bf16(multiply_rn(high, kInverseSpan)));
        return of(high > 0 ? (smallest > floor ? smallest : floor) : 0.0f, high);
    }
};

// The code of one value of a block.
DEEPEP_HOST_DEVICE uint16_t logfmt_code(float value, const LogScale& scale) {
    const float size = float_of(bits_of(value) & ~kFloatSign);
    const uint16_t sign = value < 0 ? 1 << 9 : 0;
    if (size == 0 || !is_finite(scale.high) || size < scale.low / 2) return sign;
    if (!(scale.step > 0)) return sign | 1;
    const float level = rintf(divide_rn(subtract_rn(log2f(size), scale.log_low), scale.step));
    return static_cast<uint16_t>(sign | (1 + static_cast<int>(level < 0 ? 0 : level > kTopLevel - 1 ? kTopLevel - 1 : level)));
}

// Float32, not rounded to bf16.
DEEPEP_HOST_DEVICE float logfmt_value(uint16_t code, const LogScale& scale) {
    if (!is_finite(scale.high)) return float_of(0x7fffffffu);
    const int level = code & kTopLevel;
    if (level == 0) return 0.0f;
    const float size = multiply_rn(scale.low, exp2f(multiply_rn(static_cast<float>(level - 1), scale.step)));
    return (code >> 9 & 1) != 0 ? -size : size;
}

// Sixteen codes in five words, the first code in the lowest bits.
DEEPEP_HOST_DEVICE void pack_codes(const uint16_t (&codes)[16], uint32_t (&words)[5]) {
    for (int w = 0; w < 5; ++w) words[w] = 0;
    for (int i = 0; i < 16; ++i) {
        const int bit = kNumCodeBits * i;
        words[bit / 32] |= static_cast<uint32_t>(codes[i]) << bit % 32;
        if (bit % 32 > 32 - kNumCodeBits) words[bit / 32 + 1] |= static_cast<uint32_t>(codes[i]) >> (32 - bit % 32);
    }
}
DEEPEP_HOST_DEVICE uint16_t unpack_code(const uint32_t (&words)[5], int i) {
    const int bit = kNumCodeBits * i;
    uint32_t code = words[bit / 32] >> bit % 32;
    if (bit % 32 > 32 - kNumCodeBits) code |= words[bit / 32 + 1] << (32 - bit % 32);
    return static_cast<uint16_t>(code & ((1 << kNumCodeBits) - 1));
}

// A whole block by one thread: `x` bf16 [128] to codes [128]; returns the scale.
DEEPEP_HOST_DEVICE LogScale encode_block(const uint16_t* x, uint16_t* codes) {
    float high = 0;
    float smallest = float_of(kFloatInfinity);
    for (int i = 0; i < kLogfmtBlock; ++i) {
        const float size = float_of(static_cast<uint32_t>(x[i] & 0x7fff) << 16);
        if (is_nan(size) || size > high) high = size;
        if (size > 0 && size < smallest) smallest = size;
    }
    const LogScale scale = LogScale::of_extremes(high, smallest);
    for (int i = 0; i < kLogfmtBlock; ++i) codes[i] = logfmt_code(bf16_to_float(x[i]), scale);
    return scale;
}

}  // namespace deepep::codec
