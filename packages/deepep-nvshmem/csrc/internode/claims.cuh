#pragma once
// Work that the warps of a role share out among themselves within a block, in shared memory: whoever swaps a context's word has the work that
// the word names.
#include <cstdint>

#include "deepep/ptx/memory.cuh"

namespace deepep::internode {
namespace {

template <class T>
__device__ __forceinline__ T peek(const T* shared) {
    return *reinterpret_cast<const volatile T*>(shared);
}
template <class T>
__device__ __forceinline__ void poke(T* shared, T value) {
    *reinterpret_cast<volatile T*>(shared) = value;
}

// The same value in all lanes of a warp in step.
template <class T>
__device__ __forceinline__ T peek_as_warp(const T* shared) {
    return __shfl_sync(~0u, peek(shared), 0);
}

// Which of the lanes in `mask` (not 0) is served: warps begin at different ones.
__device__ __forceinline__ int choose_lane(uint32_t mask, int warp) {
    const int shift = warp * 7 % 32;
    return (__ffs(static_cast<int>(__funnelshift_r(mask, mask, shift))) - 1 + shift) % 32;
}

// Work in the order in which one warp posts it; the other warps of its block take the oldest. All in shared memory, the counters zero at the start.
struct WorkQueue {
    int32_t* order;  // [capacity]
    int capacity;    // at least as many as there can be at a time, posted and not yet done
    uint32_t* num_posted;
    uint32_t* num_taken;
    int32_t* is_over;

    // By the posting warp: lanes that have work post its number. What they have acquired, and stored, is there for whoever takes it.
    __device__ void post(bool has_work, int number) const {
        const uint32_t mask = __ballot_sync(~0u, has_work), lane = threadIdx.x % 32;
        if (mask == 0) return;
        const uint32_t before = *num_posted;  // this warp's own
        if (has_work) poke(order + (before + __popc(mask & ((1u << lane) - 1))) % capacity, number);
        __threadfence_block();
        __syncwarp();
        if (lane == 0) poke(num_posted, before + __popc(mask));
        __syncwarp();
    }
    // By the posting warp: no more will come. `why`: not 0, for those who take.
    __device__ void end(int32_t why = 1) const {
        __syncwarp();
        if (threadIdx.x % 32 == 0) {
            __threadfence_block();
            poke(is_over, why);
        }
    }
    // By a whole warp: why the queue has ended, or 0. Read before a look for work: if that finds nothing, there is no more.
    __device__ int32_t has_ended() const { return static_cast<int32_t>(__shfl_sync(~0u, ptx::load_acquire_cta_shared(reinterpret_cast<const uint32_t*>(is_over)), 0)); }
    // By a whole warp: the oldest work that nobody has taken; -1: there is none.
    __device__ int take() const {
        int number = -1;
        if (threadIdx.x % 32 == 0) {
            uint32_t taken = peek(num_taken);
            // An acquire is enough; a fence would also order what the warp has stored.
            while (taken != ptx::load_acquire_cta_shared(num_posted)) {
                // Read before the swap: once it is taken, what stands there may be done by others and its place be used again.
                const int next = peek(order + taken % capacity);
                const uint32_t seen = atomicCAS(num_taken, taken, taken + 1);
                if (seen == taken) {
                    number = next;
                    break;
                }
                taken = seen;
            }
        }
        __syncwarp();  // joins what this thread has learned to the other lanes
        return __shfl_sync(~0u, number, 0);
    }
};

}  // namespace
}  // namespace deepep::internode
