#pragma once
// Asynchronous copies of single vectors from global to shared memory (from SM80). They belong to the thread that issues them: it waits for them,
// and reads what it has copied itself without any barrier. PTX ISA: cp.async.
#include <cstdint>

namespace deepep::ptx {

// Both addresses are multiples of 16.
__device__ __forceinline__ void async_copy_16(void* shared, const void* global) {
    asm volatile("cp.async.cg.shared.global [%0], [%1], 16;" ::"r"(static_cast<uint32_t>(__cvta_generic_to_shared(shared))), "l"(global) : "memory");
}
// Both addresses are multiples of kNumBytes: 4, 8 or 16.
template <int kNumBytes>
__device__ __forceinline__ void async_copy(void* shared, const void* global) {
    asm volatile("cp.async.ca.shared.global [%0], [%1], %2;" ::"r"(static_cast<uint32_t>(__cvta_generic_to_shared(shared))), "l"(global), "n"(kNumBytes)
                 : "memory");
}
__device__ __forceinline__ void async_commit() { asm volatile("cp.async.commit_group;" ::: "memory"); }
// All but the newest kPending groups of this thread have landed.
template <int kPending>
__device__ __forceinline__ void async_wait() {
    asm volatile("cp.async.wait_group %0;" ::"n"(kPending) : "memory");
}

}  // namespace deepep::ptx
