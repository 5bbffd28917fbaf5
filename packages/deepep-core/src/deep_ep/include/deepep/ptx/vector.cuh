#pragma once
// 16-byte accesses to memory that peers read and write. Each of the four words is single-copy atomic; the vector as a whole is not, so
// a reader looks at every word. Addresses are global, unless said otherwise, and aligned to 16 bytes.
#include <cstdint>

namespace deepep::ptx {

__device__ __forceinline__ uint4 load_relaxed_sys(const uint4* address) {
    uint4 value;
    asm volatile("ld.relaxed.sys.global.v4.u32 {%0, %1, %2, %3}, [%4];"
                 : "=r"(value.x), "=r"(value.y), "=r"(value.z), "=r"(value.w)
                 : "l"(address)
                 : "memory");
    return value;
}
__device__ __forceinline__ void store_relaxed_sys(uint4* address, uint4 value) {
    asm volatile("st.relaxed.sys.global.v4.u32 [%0], {%1, %2, %3, %4};" ::"l"(address), "r"(value.x), "r"(value.y), "r"(value.z), "r"(value.w)
                 : "memory");
}
// Memory that this operation only reads, and reads once: it need not stay in the L1 cache.
__device__ __forceinline__ uint4 load_streaming(const uint4* address) {
    uint4 value;
    asm volatile("ld.global.L1::no_allocate.v4.u32 {%0, %1, %2, %3}, [%4];"
                 : "=r"(value.x), "=r"(value.y), "=r"(value.z), "=r"(value.w)
                 : "l"(address));
    return value;
}
// Of shared memory. Loads stay in the order of the program, so that several are under way before the first is used.
__device__ __forceinline__ uint4 load_shared(const uint4* address) {
    uint4 value;
    asm volatile("ld.shared.v4.u32 {%0, %1, %2, %3}, [%4];"
                 : "=r"(value.x), "=r"(value.y), "=r"(value.z), "=r"(value.w)
                 : "r"(static_cast<uint32_t>(__cvta_generic_to_shared(address)))
                 : "memory");
    return value;
}
// Brings a line into the L2 cache; holds no register.
__device__ __forceinline__ void prefetch_l2(const void* address) { asm volatile("prefetch.global.L2 [%0];" ::"l"(address)); }

}  // namespace deepep::ptx
