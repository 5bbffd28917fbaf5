#pragma once
#include "cuda_runtime_api.h"
#include "deepep/codec/bits.hpp"

enum __nv_saturation_t { __NV_NOSAT, __NV_SATFINITE };
enum __nv_fp8_interpretation_t { __NV_E4M3, __NV_E5M2 };
using __nv_fp8x2_storage_t = unsigned short;
inline __nv_fp8x2_storage_t __nv_cvt_float2_to_fp8x2(float2 v, __nv_saturation_t, __nv_fp8_interpretation_t) {
    return static_cast<unsigned short>(deepep::codec::float_to_e4m3(v.x) | deepep::codec::float_to_e4m3(v.y) << 8);
}
