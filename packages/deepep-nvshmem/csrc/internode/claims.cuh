#pragma once
// Work that the warps of a role share out among themselves within a block, in shared memory: whoever swaps a context's word has the work that
// the word names.
#include <cstdint>

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

}  // namespace
}  // namespace deepep::internode
