#pragma once
// Barriers among some warps of a block. PTX ISA: barrier. Number 0 is __syncthreads. Not `bar`, which is short for `barrier.aligned` and promises that all
// threads are at the same instruction: warps of different roles meet from different ones.
namespace deepep::ptx {

// num_threads: a multiple of 32, the same in every warp that takes part.
__device__ __forceinline__ void named_barrier(int number, int num_threads) {
    asm volatile("barrier.sync %0, %1;" ::"r"(number), "r"(num_threads) : "memory");
}
// Counts as having come and goes on: what this thread has stored before is there for those that wait at the barrier.
__device__ __forceinline__ void named_barrier_arrive(int number, int num_threads) {
    asm volatile("barrier.arrive %0, %1;" ::"r"(number), "r"(num_threads) : "memory");
}
// The same answer in all threads: whether any of them said yes.
__device__ __forceinline__ bool named_barrier_or(int number, int num_threads, bool value) {
    unsigned any;
    asm volatile(
        "{\n"
        ".reg .pred mine, all;\n"
        "setp.ne.u32 mine, %3, 0;\n"
        "barrier.red.or.pred all, %1, %2, mine;\n"
        "selp.u32 %0, 1, 0, all;\n"
        "}\n"
        : "=r"(any)
        : "r"(number), "r"(num_threads), "r"(static_cast<unsigned>(value))
        : "memory");
    return any != 0;
}

}  // namespace deepep::ptx
