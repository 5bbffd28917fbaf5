#pragma once
// The arithmetic of combine: bfloat16 rows added in float32, one after the other from +0, rounded once.
#include <cuda_bf16.h>

#include <cstdint>

namespace deepep::nvlink {

// Eight bfloat16 in one 16-byte access.
struct Accumulator {
    float values[8] = {};

    __device__ __forceinline__ void add(const int4& vector) {
        const __nv_bfloat162* pairs = reinterpret_cast<const __nv_bfloat162*>(&vector);
#pragma unroll
        for (int i = 0; i < 4; ++i) {
            const float2 pair = __bfloat1622float2(pairs[i]);
            values[2 * i] = __fadd_rn(values[2 * i], pair.x);
            values[2 * i + 1] = __fadd_rn(values[2 * i + 1], pair.y);
        }
    }

    __device__ __forceinline__ int4 rounded() const {
        int4 vector;
        __nv_bfloat162* pairs = reinterpret_cast<__nv_bfloat162*>(&vector);
#pragma unroll
        for (int i = 0; i < 4; ++i) pairs[i] = __float22bfloat162_rn(make_float2(values[2 * i], values[2 * i + 1]));
        return vector;
    }
};

__device__ __forceinline__ int4 load_vector(const uint8_t* address) { return *reinterpret_cast<const int4*>(address); }

// out = bias_0 + bias_1 + rows in order, for the vectors at first_byte, first_byte + stride, ...; the biases may be absent. The number of rows
// is a template argument so that all reads of a vector are in flight before its first addition.
template <int kNumRows>
__device__ __forceinline__ void sum_rows_of(const uint8_t* rows, int num_row_stride, const uint8_t* bias_0, const uint8_t* bias_1, uint8_t* out,
                                            int first_byte, int stride, int num_bytes) {
#pragma unroll(kNumRows <= 4 ? 2 : 1)
    for (int byte = first_byte; byte < num_bytes; byte += stride) {
        int4 vectors[kNumRows == 0 ? 1 : kNumRows];
#pragma unroll
        for (int i = 0; i < kNumRows; ++i) vectors[i] = load_vector(rows + i * num_row_stride + byte);
        Accumulator sum;
        if (bias_0 != nullptr) sum.add(load_vector(bias_0 + byte));
        if (bias_1 != nullptr) sum.add(load_vector(bias_1 + byte));
#pragma unroll
        for (int i = 0; i < kNumRows; ++i) sum.add(vectors[i]);
        *reinterpret_cast<int4*>(out + byte) = sum.rounded();
    }
}

template <class... Args>
__device__ __forceinline__ void sum_some_rows(int num_rows, Args... args) {
    switch (num_rows) {
        case 0: return sum_rows_of<0>(args...);
        case 1: return sum_rows_of<1>(args...);
        case 2: return sum_rows_of<2>(args...);
        case 3: return sum_rows_of<3>(args...);
        case 4: return sum_rows_of<4>(args...);
        case 5: return sum_rows_of<5>(args...);
        case 6: return sum_rows_of<6>(args...);
        case 7: return sum_rows_of<7>(args...);
        default: return sum_rows_of<8>(args...);
    }
}

}  // namespace deepep::nvlink
