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
// bytes. `from` may be written again once the peer has said that it has consumed them: this call may return before they have been read
// (not where stores reach the peer: then its lanes have read them, and a warp barrier has joined them).
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

// By a whole warp, to a peer that is reached by stores (Domain::has_stores_to): they are the calling threads' own, so `from` may be whatever memory those can
// load from, shared memory too. An SM's loads from device memory wait behind its own stores to other GPUs, so puts out of shared memory are up to twice as
// fast. Copies bytes to the same address at `pe`; `from` may be written again when it returns. The signal of a put_chunk
// to the same `pe` that this warp makes later comes behind them: that function fences for the whole system in between, behind a warp barrier.
__device__ __forceinline__ void put_part(void* to, const void* from, int64_t num_bytes, int pe) {
#if DEEPEP_COUNT_PUTS
    if (threadIdx.x % 32 == 0) atomicAdd(&put_counts.num_bytes, static_cast<unsigned long long>(num_bytes));
#endif
    nvshmemx_putmem_nbi_warp(to, from, static_cast<size_t>(num_bytes), pe);
}

// By one thread: stores `value` to `word` at `pe`. It orders nothing: accesses that have to come before it need a fence before it.
__device__ __forceinline__ void set_word(uint64_t* word, uint64_t value, int pe) {
#if DEEPEP_COUNT_PUTS
    atomicAdd(&put_counts.num_words, 1ull);
#endif
    nvshmemx_signal_op(word, value, NVSHMEM_SIGNAL_SET, pe);
}

}  // namespace deepep::internode::network
