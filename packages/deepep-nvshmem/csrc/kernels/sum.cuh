#pragma once
// The arithmetic of combine: bfloat16 rows added in float32, one element after the other, rounded once.
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

}  // namespace deepep::nvlink
