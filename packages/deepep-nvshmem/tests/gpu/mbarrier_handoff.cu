// A textbook handoff: one thread writes a shared-memory word and arrives on an mbarrier (release), a warp waits for the phase (acquire) and reads
// the word, then hands it back the same way. There is no race in it. What racecheck says of this program tells what its findings in kernels
// that hand shared memory over by mbarriers are worth:
//   nvcc -arch=sm_90 -lineinfo -I ../../../deepep-core/src/deep_ep/include -o mbarrier_handoff mbarrier_handoff.cu
//   compute-sanitizer --tool racecheck ./mbarrier_handoff
#include <cuda_runtime.h>

#include "deepep/ptx/bulk.cuh"

constexpr int kRounds = 8;

__global__ void handoff(int* sums) {
#if DEEPEP_HAS_BULK
    __shared__ int item;
    __shared__ uint64_t full, empty;
    if (threadIdx.x == 0) {
        deepep::ptx::mbarrier_init(&full, 1);
        deepep::ptx::mbarrier_init(&empty, 1);
    }
    __syncthreads();
    if (threadIdx.x == 0) {
        for (int round = 0; round < kRounds; ++round) {
            deepep::ptx::mbarrier_wait(&empty, (round + 1) & 1);
            item = round;
            deepep::ptx::mbarrier_arrive(&full);
        }
    } else if (threadIdx.x >= 32) {
        int sum = 0;
        for (int round = 0; round < kRounds; ++round) {
            deepep::ptx::mbarrier_wait(&full, round & 1);
            sum += item;
            __syncwarp();
            if (threadIdx.x == 32) deepep::ptx::mbarrier_arrive(&empty);
        }
        sums[threadIdx.x - 32] = sum;
    }
#endif
}

int main() {
    int* sums = nullptr;
    int host[32] = {};
    if (cudaMalloc(&sums, sizeof host) != cudaSuccess) return 1;
    handoff<<<1, 64>>>(sums);
    if (cudaMemcpy(host, sums, sizeof host, cudaMemcpyDeviceToHost) != cudaSuccess) return 1;
    for (int sum : host)
        if (sum != kRounds * (kRounds - 1) / 2) return 1;
    return 0;
}
