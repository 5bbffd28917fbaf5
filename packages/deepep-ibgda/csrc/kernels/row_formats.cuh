#pragma once
// How rows of combine travel: as bf16, or in LogFMT (docs/logfmt.md). A lane holds some neighbouring columns; a warp holds a part of a row.
#include <cuda_bf16.h>

#include "deepep/codec/logfmt.hpp"
#include "waits.cuh"

namespace deepep::ibgda {

// Columns of a lane in float32, and the sums over them. Each product and each sum rounds by itself.
template <int kColumns>
struct Sum {
    float value[kColumns];

    __device__ static Sum zero() {
        Sum sum;
#pragma unroll
        for (float& value : sum.value) value = 0;
        return sum;
    }
    __device__ void add(const float (&row)[kColumns]) {
#pragma unroll
        for (int i = 0; i < kColumns; ++i) value[i] = __fadd_rn(value[i], row[i]);
    }
    __device__ void add_product(float weight, const float (&row)[kColumns]) {
#pragma unroll
        for (int i = 0; i < kColumns; ++i) value[i] = __fadd_rn(value[i], __fmul_rn(weight, row[i]));
    }
    // Two neighbouring columns as bf16. NaN becomes 0x7fff, so no word of a rounded row looks empty.
    __device__ uint32_t rounded(int pair) const {
        const __nv_bfloat162 both = __floats2bfloat162_rn(value[2 * pair], value[2 * pair + 1]);
        return static_cast<uint32_t>(__bfloat16_as_ushort(both.x)) | static_cast<uint32_t>(__bfloat16_as_ushort(both.y)) << 16;
    }
};

__device__ __forceinline__ float low_column(uint32_t pair) { return __uint_as_float(pair << 16); }
__device__ __forceinline__ float high_column(uint32_t pair) { return __uint_as_float(pair & 0xffff0000u); }

struct PlainFormat {
    static constexpr int kColumns = 8;  // of a lane
    static constexpr int kPartBytes = 512;  // of a warp's part of a row in a slot
    static constexpr bool kSendsSingleRows = true;  // a sum of one row travels as the row: the source multiplies and rounds
    using Row = uint4;   // a lane's columns as they lie in memory
    using Wire = uint4;  // the same in a slot

    __device__ static Row load_row(const Row* address) { return ptx::load_streaming(address); }
    __device__ static Row rounded(const Sum<kColumns>& sum) { return make_uint4(sum.rounded(0), sum.rounded(1), sum.rounded(2), sum.rounded(3)); }
    __device__ static void columns(Row row, float (&out)[kColumns]) {
        const uint32_t pairs[4] = {row.x, row.y, row.z, row.w};
#pragma unroll
        for (int i = 0; i < 4; ++i) {
            out[2 * i] = low_column(pairs[i]);
            out[2 * i + 1] = high_column(pairs[i]);
        }
    }
    // Rows of experts may hold two NaN of all ones side by side; another NaN gives the same sum.
    __device__ static uint32_t without_empty(uint32_t pair) { return pair == kEmptyWord ? 0x7fff7fffu : pair; }
    __device__ static Wire encode(Row row) { return make_uint4(without_empty(row.x), without_empty(row.y), without_empty(row.z), without_empty(row.w)); }
    __device__ static void decode(Wire wire, float (&out)[kColumns]) { columns(wire, out); }

    // `part`: where the warp's part begins in the slot.
    __device__ static Wire* place(uint8_t* part) { return reinterpret_cast<Wire*>(part) + threadIdx.x % 32; }
    __device__ static void store(uint8_t* part, Wire wire) { ptx::store_relaxed_sys(place(part), wire); }
    __device__ static Wire nothing() { return make_uint4(0, 0, 0, 0); }
    __device__ static Wire empty() { return empty_vector(); }
    __device__ static bool is_full(Wire wire) { return ibgda::is_full(wire); }
    __device__ static Wire load(uint8_t* part) { return ptx::load_relaxed_sys(place(part)); }
    __device__ static void clear(uint8_t* part) { *place(part) = empty_vector(); }
};

// A warp takes a block of 128 columns. Words 0 to 31: the codes of a lane's first three columns; 32 to 42: of three lanes' fourth ones;
// 43: low and high. Two bits of the words of codes are zero, and NaN is canonical in the last, so no word looks empty.
struct LogfmtFormat {
    static constexpr int kColumns = 4;
    static constexpr int kPartBytes = kLogfmtWords * 4;
    static constexpr bool kSendsSingleRows = false;  // codes of the row would not be codes of the product
    static constexpr int kNumSecondWords = kLogfmtWords - 32;
    using Row = uint2;
    using Wire = uint2;  // word `lane` and, of the first lanes, word 32 + lane

    __device__ static int lane() { return static_cast<int>(threadIdx.x) % 32; }
    __device__ static Row load_row(const Row* address) { return *address; }
    __device__ static Row rounded(const Sum<kColumns>& sum) { return make_uint2(sum.rounded(0), sum.rounded(1)); }
    __device__ static void columns(Row row, float (&out)[kColumns]) {
        out[0] = low_column(row.x);
        out[1] = high_column(row.x);
        out[2] = low_column(row.y);
        out[3] = high_column(row.y);
    }
    __device__ static Wire encode(Row row) {
        const uint32_t sizes = __vmaxu2(row.x & 0x7fff7fffu, row.y & 0x7fff7fffu);
        const uint32_t high = __reduce_max_sync(kAllLanes, max(sizes & 0xffffu, sizes >> 16));
        uint32_t smallest = 0x7f80;  // infinity: none
        const uint32_t pairs[2] = {row.x, row.y};
#pragma unroll
        for (const uint32_t pair : pairs) {
            if ((pair & 0x7fff) != 0) smallest = min(smallest, pair & 0x7fff);
            if ((pair >> 16 & 0x7fff) != 0) smallest = min(smallest, pair >> 16 & 0x7fff);
        }
        smallest = __reduce_min_sync(kAllLanes, smallest);
        const codec::LogScale scale = codec::LogScale::of_extremes(low_column(high), low_column(smallest));
        float values[kColumns];
        columns(row, values);
        uint32_t code[kColumns];
#pragma unroll
        for (int i = 0; i < kColumns; ++i) code[i] = codec::logfmt_code(values[i], scale);
        Wire wire = make_uint2(code[0] | code[1] << 10 | code[2] << 20, 0);
        const int first = 3 * lane();
        const uint32_t a = __shfl_sync(kAllLanes, code[3], first), b = __shfl_sync(kAllLanes, code[3], first + 1), c = __shfl_sync(kAllLanes, code[3], first + 2);
        wire.y = lane() < kLogfmtCodeWords - 32 ? a | b << 10 | (first + 2 < 32 ? c << 20 : 0)
                                               : static_cast<uint32_t>(codec::float_to_bf16(scale.low)) | static_cast<uint32_t>(codec::float_to_bf16(scale.high)) << 16;
        return wire;
    }
    __device__ static void decode(Wire wire, float (&out)[kColumns]) {
        const uint32_t extremes = __shfl_sync(kAllLanes, wire.y, kNumSecondWords - 1);
        const codec::LogScale scale = codec::LogScale::of(low_column(extremes), high_column(extremes));
        const uint32_t fourth = __shfl_sync(kAllLanes, wire.y, lane() / 3) >> (10 * (lane() % 3));
#pragma unroll
        for (int i = 0; i < kColumns; ++i) out[i] = codec::logfmt_value(static_cast<uint16_t>((i < 3 ? wire.x >> (10 * i) : fourth) & 0x3ff), scale);
    }

    __device__ static uint32_t* place(uint8_t* part) { return reinterpret_cast<uint32_t*>(part) + lane(); }
    __device__ static bool has_second() { return lane() < kNumSecondWords; }
    __device__ static void store(uint8_t* part, Wire wire) {
        ptx::store_relaxed_sys(place(part), wire.x);
        if (has_second()) ptx::store_relaxed_sys(place(part) + 32, wire.y);
    }
    __device__ static Wire nothing() { return make_uint2(0, 0); }
    __device__ static Wire empty() { return make_uint2(kEmptyWord, kEmptyWord); }
    __device__ static bool is_full(Wire wire) { return wire.x != kEmptyWord && wire.y != kEmptyWord; }
    __device__ static Wire load(uint8_t* part) {
        return make_uint2(ptx::load_relaxed_sys(place(part)), has_second() ? ptx::load_relaxed_sys(place(part) + 32) : 0);
    }
    __device__ static void clear(uint8_t* part) {
        place(part)[0] = kEmptyWord;
        if (has_second()) place(part)[32] = kEmptyWord;
    }
};

}  // namespace deepep::ibgda
