#pragma once
// Memory accesses of the queue-pair code, one name for the GPU (PTX) and for the host (compiler builtins, which ThreadSanitizer knows).
// `gpu`: the other party is a thread of the same GPU. `sys`: the other party is the NIC.
#include <cstdint>

#include "../common/macros.hpp"

#if defined(__CUDACC__)
#include "../ptx/atomics.cuh"
#include "../ptx/memory.cuh"
#endif

#if defined(__CUDA_ARCH__)
#define DEEPEP_ATOMIC(on_gpu, on_host) on_gpu
#else
#define DEEPEP_ATOMIC(on_gpu, on_host) on_host
#endif

namespace deepep::rdma {

DEEPEP_HOST_DEVICE uint64_t load_relaxed_gpu(const uint64_t* address) {
    return DEEPEP_ATOMIC(ptx::load_relaxed_gpu(address), __atomic_load_n(address, __ATOMIC_RELAXED));
}
DEEPEP_HOST_DEVICE uint64_t load_acquire_gpu(const uint64_t* address) {
    return DEEPEP_ATOMIC(ptx::load_acquire_gpu(address), __atomic_load_n(address, __ATOMIC_ACQUIRE));
}
DEEPEP_HOST_DEVICE void store_relaxed_gpu(uint64_t* address, uint64_t value) {
    DEEPEP_ATOMIC(ptx::store_relaxed_gpu(address, value), __atomic_store_n(address, value, __ATOMIC_RELAXED));
}
DEEPEP_HOST_DEVICE void store_release_gpu(uint64_t* address, uint64_t value) {
    DEEPEP_ATOMIC(ptx::store_release_gpu(address, value), __atomic_store_n(address, value, __ATOMIC_RELEASE));
}
DEEPEP_HOST_DEVICE void store_release_gpu(uint32_t* address, uint32_t value) {
    DEEPEP_ATOMIC(ptx::store_release_gpu(address, value), __atomic_store_n(address, value, __ATOMIC_RELEASE));
}
DEEPEP_HOST_DEVICE uint32_t exchange_acquire_gpu(uint32_t* address, uint32_t value) {
    return DEEPEP_ATOMIC(ptx::exchange_acquire_gpu(address, value), __atomic_exchange_n(address, value, __ATOMIC_ACQUIRE));
}

// Returns what was there: `expected` when the exchange took place.
DEEPEP_HOST_DEVICE uint64_t compare_exchange_acq_rel_gpu(uint64_t* address, uint64_t expected, uint64_t desired) {
#if defined(__CUDA_ARCH__)
    return ptx::compare_exchange_acq_rel_gpu(address, expected, desired);
#else
    __atomic_compare_exchange_n(address, &expected, desired, false, __ATOMIC_ACQ_REL, __ATOMIC_ACQUIRE);
    return expected;
#endif
}

DEEPEP_HOST_DEVICE void max_release_gpu(uint64_t* address, uint64_t value) {
#if defined(__CUDA_ARCH__)
    ptx::max_release_gpu(address, value);
#else
    uint64_t seen = __atomic_load_n(address, __ATOMIC_RELAXED);
    while (seen < value && !__atomic_compare_exchange_n(address, &seen, value, true, __ATOMIC_ACQ_REL, __ATOMIC_RELAXED)) {}
#endif
}

DEEPEP_HOST_DEVICE uint32_t load_relaxed_sys(const uint32_t* address) {
    return DEEPEP_ATOMIC(ptx::load_relaxed_sys(address), __atomic_load_n(address, __ATOMIC_RELAXED));
}
DEEPEP_HOST_DEVICE uint32_t load_acquire_sys(const uint32_t* address) {
    return DEEPEP_ATOMIC(ptx::load_acquire_sys(address), __atomic_load_n(address, __ATOMIC_ACQUIRE));
}
DEEPEP_HOST_DEVICE void store_release_sys(uint32_t* address, uint32_t value) {
    DEEPEP_ATOMIC(ptx::store_release_sys(address, value), __atomic_store_n(address, value, __ATOMIC_RELEASE));
}
DEEPEP_HOST_DEVICE void store_release_sys(uint64_t* address, uint64_t value) {
    DEEPEP_ATOMIC(ptx::store_release_sys(address, value), __atomic_store_n(address, value, __ATOMIC_RELEASE));
}

}  // namespace deepep::rdma

#undef DEEPEP_ATOMIC
