#pragma once
// What the compiler keeps in registers.

namespace deepep::ptx {

// Zero, of which the compiler does not know that: what is worked out with it is worked out anew behind this point, instead of being kept in registers until then.
__device__ __forceinline__ int unknown_zero() {
    int zero = 0;
    asm volatile("" : "+r"(zero));
    return zero;
}

}  // namespace deepep::ptx
