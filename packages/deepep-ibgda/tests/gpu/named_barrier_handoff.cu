// Textbook handoffs within a block: one warp writes a shared-memory word, all warps meet at a named barrier, the others read the word; words alternate from
// meeting to meeting.
// There is no race in them. What racecheck says of them tells what its findings in kernels that hand shared memory over at named barriers are worth.
// In the second one the readers have arrived before at another barrier, at which the writer alone waits, as the workers of low-latency dispatch do.
//   nvcc -arch=sm_90 -lineinfo -I ../../../deepep-core/src/deep_ep/include -o named_barrier_handoff named_barrier_handoff.cu
//   compute-sanitizer --tool racecheck ./named_barrier_handoff 0    (and 1: with the arrivals)
#include <cuda_runtime.h>

#include <cstdlib>

#include "deepep/ptx/barrier.cuh"

constexpr int kRounds = 8, kMeet = 1, kCounted = 2, kNumThreads = 256, kWriter = kNumThreads / 32 - 1;

template <bool kWithArrivals>
__global__ void handoff(int* sums) {
    __shared__ int items[2];
    if (threadIdx.x / 32 == kWriter) {
        for (int round = 0; round < kRounds; ++round) {
            if (kWithArrivals && round == 0) deepep::ptx::named_barrier(kCounted, kNumThreads);
            if (threadIdx.x % 32 == 0) items[round & 1] = round;
            deepep::ptx::named_barrier(kMeet, kNumThreads);
        }
    } else {
        int sum = 0;
        for (int round = 0; round < kRounds; ++round) {
            if (kWithArrivals && round == 0) deepep::ptx::named_barrier_arrive(kCounted, kNumThreads);
            deepep::ptx::named_barrier(kMeet, kNumThreads);
            sum += items[round & 1];
        }
        sums[threadIdx.x] = sum;
    }
}

int main(int count, char** given) {
    constexpr int kReaders = kNumThreads - 32;
    int* sums = nullptr;
    int host[kReaders] = {};
    if (cudaMalloc(&sums, sizeof host) != cudaSuccess) return 1;
    if (count > 1 && std::atoi(given[1]) != 0)
        handoff<true><<<1, kNumThreads>>>(sums);
    else
        handoff<false><<<1, kNumThreads>>>(sums);
    if (cudaMemcpy(host, sums, sizeof host, cudaMemcpyDeviceToHost) != cudaSuccess) return 1;
    for (int sum : host)
        if (sum != kRounds * (kRounds - 1) / 2) return 1;
    return 0;
}
