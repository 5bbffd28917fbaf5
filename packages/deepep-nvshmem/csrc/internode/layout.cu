// Layout across nodes: from the experts that each token chose, how many tokens go to each rank, node and expert, and which token goes where.
//
// Local to the rank. Each block counts its tokens in shared memory, adds its sums to the histogram, and the block that arrives last moves the
// histogram to the outputs and leaves it zero for the next call.
#include "deepep/ptx/memory.cuh"
#include "internode/kernels.hpp"

namespace deepep::internode {
namespace {

constexpr int kNumThreads = 256;
constexpr int kMaxBlocks = 64;
constexpr int kMaxSharedCounts = 4608;  // with more experts, ranks and nodes than that, global memory counts directly

__global__ void __launch_bounds__(kNumThreads) count_routes_kernel(const __grid_constant__ LayoutArgs args) {
    __shared__ int32_t shared_counts[kMaxSharedCounts];
    __shared__ bool is_last;
    const Group& group = args.domain.group;
    const int num_ranks = group.num_ranks, num_nodes = group.num_nodes(), num_experts = args.num_experts;
    const int num_counts = num_experts + num_ranks + num_nodes;
    const int num_local_experts = num_experts / num_ranks;
    DeviceState* state = args.domain.local.state();
    int32_t* histogram = args.domain.histogram;
    const bool counts_shared = num_counts <= kMaxSharedCounts;
    int32_t* counts = counts_shared ? shared_counts : histogram;

    if (counts_shared) {
        for (int i = threadIdx.x; i < num_counts; i += kNumThreads) shared_counts[i] = 0;
    }
    int num_bad = 0;
    for (int64_t first = blockIdx.x * static_cast<int64_t>(kNumThreads); first < args.num_tokens; first += static_cast<int64_t>(gridDim.x) * kNumThreads) {
        const int64_t end = min_of(first + kNumThreads, args.num_tokens);
        for (int64_t i = first * num_ranks + threadIdx.x; i < end * num_ranks; i += kNumThreads) args.is_token_in_rank[i] = false;
        __syncthreads();  // the flags are clear before they are set, and so are the counts
        const int64_t token = first + threadIdx.x;
        for (int k = 0; token < end && k < args.num_topk; ++k) {
            const int64_t expert = args.topk_idx[token * args.num_topk + k];
            const int rank = rank_of_expert(expert, num_experts, num_local_experts);
            if (rank < 0) {
                num_bad += expert != -1;
                continue;
            }
            atomicAdd(&counts[expert], 1);
            bool is_new_rank = true, is_new_node = true;
            for (int earlier = 0; earlier < k; ++earlier) {
                const int other = rank_of_expert(args.topk_idx[token * args.num_topk + earlier], num_experts, num_local_experts);
                is_new_rank = is_new_rank && other != rank;
                is_new_node = is_new_node && (other < 0 || other / group.ranks_per_node != rank / group.ranks_per_node);
            }
            if (is_new_rank) {
                args.is_token_in_rank[token * num_ranks + rank] = true;
                atomicAdd(&counts[num_experts + rank], 1);
            }
            if (is_new_node) atomicAdd(&counts[num_experts + num_ranks + rank / group.ranks_per_node], 1);
        }
    }
    if (num_bad > 0) ptx::add_relaxed_gpu(&state->layout_bad_indices, num_bad);
    // The barrier joins the block's sums to each other; below, to thread 0, whose release passes them on.
    __syncthreads();
    if (counts_shared) {
        for (int i = threadIdx.x; i < num_counts; i += kNumThreads)
            if (shared_counts[i] != 0) atomicAdd(&histogram[i], shared_counts[i]);
        __syncthreads();
    }
    if (threadIdx.x == 0) is_last = ptx::add_acq_rel_gpu(&state->layout_arrivals, 1) == gridDim.x - 1;
    __syncthreads();
    if (!is_last) return;
    for (int i = threadIdx.x; i < num_counts; i += kNumThreads) {
        const int32_t count = atomicExch(&histogram[i], 0);
        if (i < num_experts)
            args.num_tokens_per_expert[i] = count;
        else if (i < num_experts + num_ranks)
            args.num_tokens_per_rank[i - num_experts] = count;
        else
            args.num_tokens_per_node[i - num_experts - num_ranks] = count;
    }
    if (threadIdx.x == 0) {
        const uint32_t bad = ptx::exchange_relaxed_gpu(&state->layout_bad_indices, 0);
        if (args.num_bad_indices != nullptr) *args.num_bad_indices = static_cast<int32_t>(bad);
        ptx::exchange_relaxed_gpu(&state->layout_arrivals, 0);
    }
}

}  // namespace

cudaError_t launch_layout(const LayoutArgs& args, cudaStream_t stream) {
    const int64_t num_blocks = max_of(1, min_of(kMaxBlocks, ceil_div(args.num_tokens, kNumThreads)));
    count_routes_kernel<<<static_cast<int>(num_blocks), kNumThreads, 0, stream>>>(args);
    return cudaGetLastError();
}

cudaError_t prepare_layout() {
    cudaFuncAttributes attributes;
    return cudaFuncGetAttributes(&attributes, count_routes_kernel);
}

}  // namespace deepep::internode
