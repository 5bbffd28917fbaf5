#pragma once
// Loads, stores and read-modify-write operations of one GPU's own counters, and what it shares with a device outside: 32-bit words that
// the other one writes, 64-bit words that both add to.
// Each names its scope and order. Addresses are global.
#include <cstdint>

namespace deepep::ptx {

__device__ __forceinline__ uint64_t load_relaxed_gpu(const uint64_t* address) {
    uint64_t value;
    asm volatile("ld.relaxed.gpu.global.u64 %0, [%1];" : "=l"(value) : "l"(address) : "memory");
    return value;
}
__device__ __forceinline__ uint64_t load_acquire_gpu(const uint64_t* address) {
    uint64_t value;
    asm volatile("ld.acquire.gpu.global.u64 %0, [%1];" : "=l"(value) : "l"(address) : "memory");
    return value;
}
__device__ __forceinline__ uint32_t load_acquire_sys(const uint32_t* address) {
    uint32_t value;
    asm volatile("ld.acquire.sys.global.u32 %0, [%1];" : "=r"(value) : "l"(address) : "memory");
    return value;
}
__device__ __forceinline__ void store_relaxed_gpu(uint64_t* address, uint64_t value) {
    asm volatile("st.relaxed.gpu.global.u64 [%0], %1;" ::"l"(address), "l"(value) : "memory");
}
__device__ __forceinline__ void store_release_gpu(uint64_t* address, uint64_t value) {
    asm volatile("st.release.gpu.global.u64 [%0], %1;" ::"l"(address), "l"(value) : "memory");
}
__device__ __forceinline__ void store_release_gpu(uint32_t* address, uint32_t value) {
    asm volatile("st.release.gpu.global.u32 [%0], %1;" ::"l"(address), "r"(value) : "memory");
}
__device__ __forceinline__ uint64_t compare_exchange_acq_rel_gpu(uint64_t* address, uint64_t expected, uint64_t desired) {
    uint64_t before;
    asm volatile("atom.cas.acq_rel.gpu.global.b64 %0, [%1], %2, %3;"
                 : "=l"(before)
                 : "l"(address), "l"(expected), "l"(desired)
                 : "memory");
    return before;
}
__device__ __forceinline__ uint32_t exchange_acquire_gpu(uint32_t* address, uint32_t value) {
    uint32_t before;
    asm volatile("atom.exch.acquire.gpu.global.b32 %0, [%1], %2;" : "=r"(before) : "l"(address), "r"(value) : "memory");
    return before;
}
__device__ __forceinline__ uint64_t add_relaxed_sys(uint64_t* address, uint64_t value) {
    uint64_t before;
    asm volatile("atom.add.relaxed.sys.global.u64 %0, [%1], %2;" : "=l"(before) : "l"(address), "l"(value) : "memory");
    return before;
}
__device__ __forceinline__ void max_release_gpu(uint64_t* address, uint64_t value) {
    asm volatile("red.release.gpu.global.max.u64 [%0], %1;" ::"l"(address), "l"(value) : "memory");
}

}  // namespace deepep::ptx
