#pragma once
// bf16 as the kernels use it; the roundings are those of deepep/codec/bits.hpp.
#include "cuda_runtime_api.h"
#include "deepep/codec/bits.hpp"

struct __nv_bfloat16 {
    unsigned short bits;
};
struct alignas(4) __nv_bfloat162 {
    __nv_bfloat16 x, y;
};
inline unsigned short __bfloat16_as_ushort(__nv_bfloat16 value) { return value.bits; }
inline __nv_bfloat162 __floats2bfloat162_rn(float x, float y) { return {{deepep::codec::float_to_bf16(x)}, {deepep::codec::float_to_bf16(y)}}; }
inline __nv_bfloat162 __float22bfloat162_rn(float2 v) { return __floats2bfloat162_rn(v.x, v.y); }
inline float2 __bfloat1622float2(__nv_bfloat162 v) { return {deepep::codec::bf16_to_float(v.x.bits), deepep::codec::bf16_to_float(v.y.bits)}; }
