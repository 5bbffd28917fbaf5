// Layout: from the experts that each token chose, how many tokens go to each rank and each expert, and which token goes where.
//
// Local to the rank. Each block counts its tokens in shared memory, adds its sums to the window's histogram, and the block that arrives
// last moves the histogram to the outputs and leaves it zero for the next call.
#include "deepep/ptx/memory.cuh"
#include "kernels.hpp"

namespace deepep::nvlink {
namespace {

constexpr int kNumThreads = 256;
constexpr int kMaxBlocks = 64;
constexpr int kMaxSharedExperts = 4096;  // more experts than that are counted in global memory directly

__global__ void __launch_bounds__(kNumThreads) count_routes_kernel(const __grid_constant__ LayoutArgs args) {
    __shared__ int32_t shared_counts[kMaxSharedExperts + kMaxRanks];
    __shared__ bool is_last;
    const int num_ranks = args.domain.num_ranks;
    const int num_experts = args.num_experts;
    const int num_counts = num_experts + num_ranks;
    const int num_local_experts = num_experts / num_ranks;
    DeviceState* state = args.domain.state();
    int32_t* histogram = args.domain.window.histogram(args.domain.arenas[args.domain.rank]);
    const bool counts_shared = num_experts <= kMaxSharedExperts;
    int32_t* counts = counts_shared ? shared_counts : histogram;

    if (counts_shared) {
        for (int i = threadIdx.x; i < num_counts; i += kNumThreads) shared_counts[i] = 0;
        __syncthreads();
    }
    int num_bad = 0;
    for (int64_t token = blockIdx.x * static_cast<int64_t>(kNumThreads) + threadIdx.x; token < args.num_tokens;
         token += static_cast<int64_t>(gridDim.x) * kNumThreads) {
        uint32_t rank_mask = 0;
        for (int k = 0; k < args.num_topk; ++k) {
            const int64_t expert = args.topk_idx[token * args.num_topk + k];
            const int rank = rank_of_expert(expert, num_experts, num_local_experts);
            if (rank < 0) {
                num_bad += expert != -1;
                continue;
            }
            rank_mask |= 1u << rank;
            atomicAdd(&counts[expert], 1);
        }
        for (int rank = 0; rank < num_ranks; ++rank) {
            const bool is_in = rank_mask >> rank & 1;
            args.is_token_in_rank[token * num_ranks + rank] = is_in;
            if (is_in) atomicAdd(&counts[num_experts + rank], 1);
        }
    }
    if (num_bad > 0) ptx::add_relaxed_gpu(&state->layout_bad_indices, num_bad);
    if (counts_shared) {
        __syncthreads();
        for (int i = threadIdx.x; i < num_counts; i += kNumThreads)
            if (shared_counts[i] != 0) atomicAdd(&histogram[i], shared_counts[i]);
    }
    // The barrier joins the block's sums to thread 0, whose release passes them on; the last arrival acquires everybody's.
    __syncthreads();
    if (threadIdx.x == 0) is_last = ptx::add_acq_rel_gpu(&state->layout_arrivals, 1) == gridDim.x - 1;
    __syncthreads();
    if (!is_last) return;
    for (int i = threadIdx.x; i < num_counts; i += kNumThreads) {
        const int32_t count = atomicExch(&histogram[i], 0);
        if (i < num_experts)
            args.num_tokens_per_expert[i] = count;
        else
            args.num_tokens_per_rank[i - num_experts] = count;
    }
    if (threadIdx.x == 0) {
        const uint32_t bad = ptx::exchange_relaxed_gpu(&state->layout_bad_indices, 0);
        if (args.num_bad_indices != nullptr) *args.num_bad_indices = static_cast<int32_t>(bad);
        ptx::exchange_relaxed_gpu(&state->layout_arrivals, 0);
    }
}

}  // namespace

cudaError_t launch_layout(const LayoutArgs& args, cudaStream_t stream) {
    const int64_t num_blocks = max_of(1, min_of(kMaxBlocks, ceil_div(args.num_tokens, kNumThreads / 2)));
    count_routes_kernel<<<static_cast<int>(num_blocks), kNumThreads, 0, stream>>>(args);
    return cudaGetLastError();
}

cudaError_t prepare_layout() {
    cudaFuncAttributes attributes;
    return cudaFuncGetAttributes(&attributes, count_routes_kernel);
}

}  // namespace deepep::nvlink
