#pragma once
// The FP8 cast of low-latency dispatch (docs/numerical-contract.md): e4m3 with one scale for each block of 128 columns.
//
// The parts are functions of one value, so that the threads that share a block on a GPU combine their maxima as they like: a maximum has no
// rounding and no order. Blocks that hold NaN or infinity decode to NaN.
#include <cstdint>

#include "bits.hpp"

namespace deepep::codec {

constexpr int kFp8Block = 128;
constexpr float kMaxE4m3 = 448.0f;
constexpr float kInverseMaxE4m3 = static_cast<float>(1.0 / 448.0);
constexpr float kMinAmax = 1e-4f;

// A maximum that keeps NaN, for magnitudes.
DEEPEP_HOST_DEVICE float max_magnitude(float a, float b) { return is_nan(a) || a > b ? a : b; }
DEEPEP_HOST_DEVICE float magnitude(float value) { return float_of(bits_of(value) & ~kFloatSign); }

// What a block's values are multiplied with (`factor`), and what multiplies them back (`scale`).
struct Fp8Scale {
    float scale;
    float factor;
};

// 2^exponent, exact for exponents from -126 to 127; 0 below, infinity above.
DEEPEP_HOST_DEVICE float power_of_two(int32_t exponent) {
    const int32_t biased = exponent + 127;
    return float_of(static_cast<uint32_t>(biased < 0 ? 0 : biased > 255 ? 255 : biased) << 23);
}
// The least e with 2^e >= value; value positive and normal.
DEEPEP_HOST_DEVICE int32_t exponent_not_below(float value) {
    const uint32_t bits = bits_of(value);
    return static_cast<int32_t>(bits >> 23) - 127 + ((bits & 0x7fffff) != 0 ? 1 : 0);
}

// `amax`: the block's largest magnitude, as it is. round_scale: the scale becomes the least power of two not below it.
DEEPEP_HOST_DEVICE Fp8Scale fp8_scale(float amax, bool round_scale) {
    const float bounded = max_magnitude(amax, kMinAmax);
    const float scale = multiply_rn(bounded, kInverseMaxE4m3);
    if (!round_scale) return {scale, divide_rn(kMaxE4m3, bounded)};
    const int32_t exponent = exponent_not_below(scale);
    return {power_of_two(exponent), power_of_two(-exponent)};
}

// Rounding may put a product a little above 448; the conversion saturates.
DEEPEP_HOST_DEVICE uint8_t fp8_value(float value, float factor) { return float_to_e4m3(multiply_rn(value, factor)); }

// UE8M0: the exponent byte (bias 127) of a scale that is a power of two. Four to a word, the first in the lowest byte.
DEEPEP_HOST_DEVICE uint8_t ue8m0(float scale) { return static_cast<uint8_t>(bits_of(scale) >> 23); }
DEEPEP_HOST_DEVICE uint32_t pack_ue8m0(const float (&scales)[4]) {
    return static_cast<uint32_t>(ue8m0(scales[0])) | static_cast<uint32_t>(ue8m0(scales[1])) << 8 |
           static_cast<uint32_t>(ue8m0(scales[2])) << 16 | static_cast<uint32_t>(ue8m0(scales[3])) << 24;
}

// A whole block by one thread: `x` bf16 [128] to `q` e4m3 [128]; returns the scale.
DEEPEP_HOST_DEVICE float cast_block(const uint16_t* x, bool round_scale, uint8_t* q) {
    float amax = 0;
    for (int i = 0; i < kFp8Block; ++i) amax = max_magnitude(magnitude(bf16_to_float(x[i])), amax);
    const Fp8Scale scale = fp8_scale(amax, round_scale);
    for (int i = 0; i < kFp8Block; ++i) q[i] = fp8_value(bf16_to_float(x[i]), scale.factor);
    return scale.scale;
}

}  // namespace deepep::codec
