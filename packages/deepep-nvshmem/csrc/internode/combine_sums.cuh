#pragma once
// The arithmetic of combine across nodes. Everything that is added up here is the same thing: a list of rows (and of top-k weights that go
// with them), added in order from +0 in float32. A node's partial sum lists the rows of its ranks; a token's result lists its biases and the
// partial sums of its nodes.
#include <type_traits>

#include "deepep/ptx/vector.cuh"
#include "kernels/sum.cuh"

namespace deepep::internode {
namespace {

using nvlink::Accumulator;
using nvlink::load_vector;

// The number of rows is a template argument so that all reads of several vectors are in flight before the first addition.
template <int kNumRows>
__device__ __forceinline__ void sum_listed_rows(const uint8_t* const* list, int num_bytes, uint8_t* out) {
    constexpr int kUnroll = kNumRows <= 1 ? 14 : kNumRows == 2 ? 7 : kNumRows == 3 ? 4 : kNumRows == 4 ? 3 : kNumRows <= 6 ? 2 : 1;
    const uint8_t* rows[kNumRows == 0 ? 1 : kNumRows];
#pragma unroll
    for (int i = 0; i < kNumRows; ++i) rows[i] = list[i];
    for (int first = threadIdx.x % 32 * 16; first < num_bytes; first += kUnroll * 32 * 16) {
        int4 vectors[kUnroll][kNumRows == 0 ? 1 : kNumRows];
#pragma unroll
        for (int u = 0; u < kUnroll; ++u)
#pragma unroll
            for (int i = 0; i < kNumRows; ++i)
                if (first + u * 32 * 16 < num_bytes) vectors[u][i] = load_vector(rows[i] + first + u * 32 * 16);
#pragma unroll
        for (int u = 0; u < kUnroll; ++u) {
            Accumulator sum;
#pragma unroll
            for (int i = 0; i < kNumRows; ++i) sum.add(vectors[u][i]);
            if (first + u * 32 * 16 < num_bytes) *reinterpret_cast<int4*>(out + first + u * 32 * 16) = sum.rounded();
        }
    }
}

__device__ __forceinline__ void sum_many_rows(const uint8_t* const* list, int num_rows, int num_bytes, uint8_t* out) {
    constexpr int kBatch = 4;
    for (int byte = threadIdx.x % 32 * 16; byte < num_bytes; byte += 32 * 16) {
        Accumulator sum;
        for (int first = 0; first < num_rows; first += kBatch) {
            int4 vectors[kBatch];
#pragma unroll
            for (int i = 0; i < kBatch; ++i)
                if (first + i < num_rows) vectors[i] = load_vector(list[first + i] + byte);
#pragma unroll
            for (int i = 0; i < kBatch; ++i)
                if (first + i < num_rows) sum.add(vectors[i]);
        }
        *reinterpret_cast<int4*>(out + byte) = sum.rounded();
    }
}

// Called by a whole warp, behind a warp barrier after which the list is complete. `out` may be one of the rows.
__device__ __noinline__ void sum_rows(const uint8_t* const* list, int num_rows, int num_bytes, uint8_t* out) {
    switch (num_rows) {
        case 0: return sum_listed_rows<0>(list, num_bytes, out);
        case 1: return sum_listed_rows<1>(list, num_bytes, out);
        case 2: return sum_listed_rows<2>(list, num_bytes, out);
        case 3: return sum_listed_rows<3>(list, num_bytes, out);
        case 4: return sum_listed_rows<4>(list, num_bytes, out);
        case 5: return sum_listed_rows<5>(list, num_bytes, out);
        case 6: return sum_listed_rows<6>(list, num_bytes, out);
        case 7: return sum_listed_rows<7>(list, num_bytes, out);
        case 8: return sum_listed_rows<8>(list, num_bytes, out);
        default: return sum_many_rows(list, num_rows, num_bytes, out);
    }
}

// Eight bfloat16 more, as words: a value's bits are the upper half of a float's.
__device__ __forceinline__ void add_words(Accumulator& sum, const uint4& vector) {
    const uint32_t words[4] = {vector.x, vector.y, vector.z, vector.w};
#pragma unroll
    for (int i = 0; i < 4; ++i) {
        sum.values[2 * i] = __fadd_rn(sum.values[2 * i], __uint_as_float(words[i] << 16));
        sum.values[2 * i + 1] = __fadd_rn(sum.values[2 * i + 1], __uint_as_float(words[i] & 0xFFFF0000u));
    }
}

// The same of rows in shared memory, into shared or device memory. Made of what was found to be quick: loads of several vectors that the compiler does not mix with the additions,
// and two instructions to widen two values. Four rows, by 7 warps of 4 stages on 12 SMs of one H200: 4096 tokens of 7168 in 277 us, loads included; with the loads mixed in 471, without
// adding up 148 (benchmarks/results/2026-11-22-h200-x4). Combine as a whole gained little by it.
template <bool kIsOutShared, int kNumRows>
__device__ __forceinline__ void sum_staged_rows(const uint8_t* const* list, int num_bytes, uint8_t* out) {
    constexpr int kUnroll = kNumRows <= 2 ? 7 : kNumRows <= 4 ? 4 : kNumRows == 5 ? 3 : 2, kStride = 32 * 16;
    const uint8_t* rows[kNumRows];
#pragma unroll
    for (int i = 0; i < kNumRows; ++i) rows[i] = list[i];
    if constexpr (kIsOutShared)
        __builtin_assume(__isShared(out));
    else
        __builtin_assume(__isGlobal(out));
    const auto sum_at = [&](int byte, auto num_vectors) {
        constexpr int kNumVectors = decltype(num_vectors)::value;
        uint4 vectors[kNumVectors][kNumRows];
#pragma unroll
        for (int u = 0; u < kNumVectors; ++u)
#pragma unroll
            for (int i = 0; i < kNumRows; ++i) vectors[u][i] = ptx::load_shared(reinterpret_cast<const uint4*>(rows[i] + byte + u * kStride));
#pragma unroll
        for (int u = 0; u < kNumVectors; ++u) {
            Accumulator sum;
#pragma unroll
            for (int i = 0; i < kNumRows; ++i) add_words(sum, vectors[u][i]);
            *reinterpret_cast<int4*>(out + byte + u * kStride) = sum.rounded();
        }
    };
    int byte = threadIdx.x % 32 * 16;
    for (; byte + (kUnroll - 1) * kStride < num_bytes; byte += kUnroll * kStride) sum_at(byte, std::integral_constant<int, kUnroll>{});
    for (; byte < num_bytes; byte += kStride) sum_at(byte, std::integral_constant<int, 1>{});
}

// Called by a whole warp, behind a warp barrier after which the list is complete. `out` may be one of the rows.
template <bool kIsOutShared>
__device__ __noinline__ void sum_staged(const uint8_t* const* list, int num_rows, int num_bytes, uint8_t* out) {
    switch (num_rows) {
        case 1: return sum_staged_rows<kIsOutShared, 1>(list, num_bytes, out);
        case 2: return sum_staged_rows<kIsOutShared, 2>(list, num_bytes, out);
        case 3: return sum_staged_rows<kIsOutShared, 3>(list, num_bytes, out);
        case 4: return sum_staged_rows<kIsOutShared, 4>(list, num_bytes, out);
        case 5: return sum_staged_rows<kIsOutShared, 5>(list, num_bytes, out);
        case 6: return sum_staged_rows<kIsOutShared, 6>(list, num_bytes, out);
        default: return sum_rows(list, num_rows, num_bytes, out);
    }
}

// Lane k sums choice k.
__device__ __forceinline__ void sum_weights(const float* const* list, int num_rows, int num_topk, float* out) {
    const int lane = threadIdx.x % 32;
    if (lane >= num_topk) return;
    float sum = 0.0f;
#pragma unroll 4
    for (int i = 0; i < num_rows; ++i) sum = __fadd_rn(sum, list[i][lane]);
    out[lane] = sum;
}

}  // namespace
}  // namespace deepep::internode
