#pragma once
// What a kernel does on the network. The only file that includes NVSHMEM's headers, and only its public device functions are used: over
// NVLink they are stores by the calling threads, over a NIC work requests that the GPU or a host thread posts.
#include <nvshmem.h>
#include <nvshmemx.h>

#include <cstdint>

#include "internode/kernels.hpp"

namespace deepep::internode::network {

#if DEEPEP_COUNT_PUTS
extern __device__ PutCounts put_counts;
#endif

// By a whole warp: copies bytes to the same address at `pe`, then stores `value` to `word` there. Whoever acquires the word at `pe` finds the
// bytes. `from` may be written again once the peer has said that it has consumed them: this call may return before they have been read.
// What the lanes stored to `from` is joined by the function's own warp barrier.
__device__ __forceinline__ void put_chunk(void* to, const void* from, int64_t num_bytes, uint64_t* word, uint64_t value, int pe) {
#if DEEPEP_COUNT_PUTS
    if (threadIdx.x % 32 == 0) {
        atomicAdd(&put_counts.num_puts, 1ull);
        atomicAdd(&put_counts.num_bytes, static_cast<unsigned long long>(num_bytes));
    }
#endif
    nvshmemx_putmem_signal_nbi_warp(to, from, static_cast<size_t>(num_bytes), word, value, NVSHMEM_SIGNAL_SET, pe);
}

// By one thread: stores `value` to `word` at `pe`. It orders nothing: accesses that have to come before it need a fence before it.
__device__ __forceinline__ void set_word(uint64_t* word, uint64_t value, int pe) {
#if DEEPEP_COUNT_PUTS
    atomicAdd(&put_counts.num_words, 1ull);
#endif
    nvshmemx_signal_op(word, value, NVSHMEM_SIGNAL_SET, pe);
}

}  // namespace deepep::internode::network
