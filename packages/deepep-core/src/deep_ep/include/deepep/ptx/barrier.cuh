#pragma once
// Barriers among some warps of a block. PTX ISA: bar. Number 0 is __syncthreads.
namespace deepep::ptx {

// num_threads: a multiple of 32, the same in every warp that takes part.
__device__ __forceinline__ void named_barrier(int number, int num_threads) {
    asm volatile("bar.sync %0, %1;" ::"r"(number), "r"(num_threads) : "memory");
}

}  // namespace deepep::ptx
