#pragma once
// Float32, bf16 and e4m3 as bits: conversions that round to the nearest, ties to even, alike on host and device and without CUDA's headers.
#include <cstdint>
#include <cstring>

#include "../common/macros.hpp"

namespace deepep::codec {

constexpr uint32_t kFloatSign = 0x80000000u;
constexpr uint32_t kFloatInfinity = 0x7f800000u;
constexpr uint16_t kBf16Nan = 0x7fff;  // the only NaNs that our conversions make, as CUDA's do
constexpr uint8_t kE4m3Nan = 0x7f;

DEEPEP_HOST_DEVICE uint32_t bits_of(float value) {
#if defined(__CUDA_ARCH__)
    return __float_as_uint(value);
#else
    uint32_t bits;
    memcpy(&bits, &value, sizeof(bits));
    return bits;
#endif
}
DEEPEP_HOST_DEVICE float float_of(uint32_t bits) {
#if defined(__CUDA_ARCH__)
    return __uint_as_float(bits);
#else
    float value;
    memcpy(&value, &bits, sizeof(value));
    return value;
#endif
}
DEEPEP_HOST_DEVICE bool is_nan(float value) { return (bits_of(value) & ~kFloatSign) > kFloatInfinity; }
DEEPEP_HOST_DEVICE bool is_finite(float value) { return (bits_of(value) & ~kFloatSign) < kFloatInfinity; }

// One rounding each, whatever the compiler's flags for fast or contracted arithmetic on the device say.
DEEPEP_HOST_DEVICE float multiply_rn(float a, float b) {
#if defined(__CUDA_ARCH__)
    return __fmul_rn(a, b);
#else
    return a * b;
#endif
}
DEEPEP_HOST_DEVICE float subtract_rn(float a, float b) {
#if defined(__CUDA_ARCH__)
    return __fsub_rn(a, b);
#else
    return a - b;
#endif
}
DEEPEP_HOST_DEVICE float divide_rn(float a, float b) {
#if defined(__CUDA_ARCH__)
    return __fdiv_rn(a, b);
#else
    return a / b;
#endif
}

DEEPEP_HOST_DEVICE float bf16_to_float(uint16_t bits) { return float_of(static_cast<uint32_t>(bits) << 16); }

DEEPEP_HOST_DEVICE uint16_t float_to_bf16(float value) {
    if (is_nan(value)) return kBf16Nan;
    const uint32_t bits = bits_of(value);
    // Half of the last kept bit, less one when that bit is even; a carry out of the mantissa raises the exponent, up to infinity.
    return static_cast<uint16_t>((bits + 0x7fffu + (bits >> 16 & 1)) >> 16);
}

// e4m3 (fn): 4 bits of exponent with bias 7, 3 of mantissa, no infinities; magnitudes to 448.
DEEPEP_HOST_DEVICE float e4m3_to_float(uint8_t bits) {
    const uint32_t sign = static_cast<uint32_t>(bits & 0x80) << 24;
    const uint32_t exponent = bits >> 3 & 0xf;
    const uint32_t mantissa = bits & 7;
    if ((bits & 0x7f) == 0x7f) return float_of(sign | 0x7fc00000u);
    if (exponent == 0) return float_of(sign | bits_of(static_cast<float>(mantissa) * (1.0f / 512)));  // multiples of 2^-9
    return float_of(sign | (exponent + 120) << 23 | mantissa << 20);
}

// Saturates: magnitudes above 448, infinity too, become 448.
DEEPEP_HOST_DEVICE uint8_t float_to_e4m3(float value) {
    if (is_nan(value)) return kE4m3Nan;
    const uint32_t bits = bits_of(value);
    const uint8_t sign = static_cast<uint8_t>(bits >> 24 & 0x80);
    const uint32_t magnitude = bits & ~kFloatSign;
    constexpr uint32_t kLeastNormal = (127 - 6) << 23;
    constexpr uint32_t kLargest = (127 + 8) << 23 | 6u << 20;  // 448
    if (magnitude >= kLargest) return sign | 0x7e;
    if (magnitude < kLeastNormal) {
        // Adding 2^14, whose last bit is worth 2^-9, rounds to a multiple of 2^-9, ties to even.
        const float sum = float_of(magnitude) + 16384.0f;
        return static_cast<uint8_t>(sign | (bits_of(sum) & 0xff));
    }
    const uint32_t rounded = magnitude + 0x7ffffu + (magnitude >> 20 & 1);
    return static_cast<uint8_t>(sign | ((rounded >> 20) - (120u << 3)));
}

}  // namespace deepep::codec
