// Plan: which token goes where, once the counts of all ranks are known.
//
//   block r < N       numbers the tokens that go to rank r: their rows there (dst_rows)
//   block N + d       numbers the tokens that go to node d: their rows at the rank that forwards them there (send_rdma_head), and the list of
//                     them in order (tokens_to_node)
// In a cached dispatch only the list is made, from send_rdma_head. Runs behind notify's exchange on the same stream and reads its table.
#include "deepep/ptx/memory.cuh"
#include "deepep/sync/wait.cuh"
#include "internode/kernels.hpp"
#include "kernels/token_tile.cuh"

namespace deepep::internode {
namespace {

constexpr int kNumThreads = 512;
using Tile = nvlink::TokenTile<kNumThreads>;

// Calls put(token, goes, number) for every token, numbered among those that go; returns their number.
template <class Goes, class Put>
__device__ int32_t number_tokens(int64_t num_tokens, Goes goes, Put put) {
    __shared__ int32_t warp_sums[Tile::kNumWarps];
    int32_t num_before = 0;
    for (int64_t begin = 0; begin < num_tokens; begin += Tile::kNumTokens) {
        const int64_t first = begin + static_cast<int64_t>(threadIdx.x) * Tile::kTokensPerThread;
        const Tile tile = Tile::scan(warp_sums, first, num_tokens, goes);
        int32_t number = num_before + tile.before;
#pragma unroll
        for (int i = 0; i < Tile::kTokensPerThread; ++i) {
            const bool is_in = tile.mask >> i & 1;
            if (first + i < num_tokens) put(first + i, is_in, number);
            number += is_in;
        }
        num_before += tile.total;
    }
    return num_before;
}

// How many rows the ranks before this one put at a place, and this one's share: the sums that every rank computes alike.
struct Share {
    int32_t first;
    int32_t count;
};
template <class Count>
__device__ Share share_of(int num_sources, int source, bool is_good, Count count) {
    __shared__ Share share;
    if (threadIdx.x == 0) share = {0, is_good ? count(source) : 0};
    __syncthreads();
    int32_t sum = 0;
    for (int i = threadIdx.x; is_good && i < source && i < num_sources; i += kNumThreads) sum += count(i);
    if (sum != 0) atomicAdd(&share.first, sum);
    __syncthreads();
    return share;
}

__device__ void report_difference(const PlanArgs& args, const WaitContext& context, int peer, int32_t seen, int32_t expected, bool is_good) {
    if (threadIdx.x == 0 && is_good && seen != expected) report_error(context, ErrorKind::kLayoutMismatch, Phase::kRows, peer, seen, expected, 0);
}

__global__ void __launch_bounds__(kNumThreads) plan_rows_kernel(const __grid_constant__ PlanArgs args) {
    const Domain& domain = args.domain;
    const Group& group = domain.group;
    const int num_ranks = group.num_ranks, num_nodes = group.num_nodes();
    const bool is_cached = args.is_token_in_rank == nullptr;
    DeviceState* state = domain.local.state();
    const WaitContext context{domain.local.host, state, Op::kNotify, group.rank, ptx::load_relaxed_gpu(&state->epochs[static_cast<int>(Op::kNotify)])};
    const bool is_good = domain.state->are_counts_good != 0;
    const auto word = [&](int rank, int index) { return domain.window.record(domain.network, context.epoch, rank)[index]; };

    if (!is_cached && static_cast<int>(blockIdx.x) < num_ranks) {
        const int dst_rank = blockIdx.x;
        const Share share = share_of(num_ranks, group.rank, is_good, [&](int rank) { return word(rank, CountsRecord::kRankCounts + dst_rank); });
        const int32_t found = number_tokens(
            args.num_tokens, [&](int64_t token) { return args.is_token_in_rank[token * num_ranks + dst_rank]; },
            [&](int64_t token, bool is_in, int32_t number) {
                // Rows beyond the announced number belong to somebody else; they are never used.
                args.dst_rows[token * num_ranks + dst_rank] = is_in && number < share.count ? share.first + number : -1;
            });
        report_difference(args, context, dst_rank, found, share.count, is_good);
        return;
    }
    const int node = is_cached ? blockIdx.x : blockIdx.x - num_ranks;
    int32_t* tokens = args.tokens_to_node + node * args.num_tokens;
    int32_t found;
    if (is_cached) {
        found = number_tokens(
            args.num_tokens, [&](int64_t token) { return args.send_rdma_head[token * num_nodes + node] >= 0; },
            [&](int64_t token, bool is_in, int32_t number) {
                if (is_in) tokens[number] = static_cast<int32_t>(token);
            });
    } else {
        const int index = domain.window.record().node_counts() + node;
        const Share share = share_of(num_nodes, group.node(), is_good, [&](int source) { return word(group.peer_of(source), index); });
        found = number_tokens(
            args.num_tokens,
            [&](int64_t token) {
                bool goes = false;
                for (int i = 0; i < group.ranks_per_node; ++i) goes = goes || args.is_token_in_rank[token * num_ranks + node * group.ranks_per_node + i];
                return goes;
            },
            [&](int64_t token, bool is_in, int32_t number) {
                const bool is_sent = is_in && number < share.count;
                args.send_rdma_head[token * num_nodes + node] = is_sent ? share.first + number : -1;
                if (is_sent) tokens[number] = static_cast<int32_t>(token);
            });
        report_difference(args, context, group.peer_of(node), found, share.count, is_good);
        found = static_cast<int32_t>(min_of(found, share.count));
    }
    // A handle that promises more rows than it lists meets these.
    for (int64_t i = found + static_cast<int64_t>(threadIdx.x); i < args.num_tokens; i += kNumThreads) tokens[i] = -1;
}

}  // namespace

cudaError_t launch_plan(const PlanArgs& args, cudaStream_t stream) {
    const int num_nodes = args.domain.group.num_nodes();
    const int num_blocks = args.is_token_in_rank == nullptr ? num_nodes : args.domain.group.num_ranks + num_nodes;
    plan_rows_kernel<<<num_blocks, kNumThreads, 0, stream>>>(args);
    return cudaGetLastError();
}

cudaError_t prepare_plan() {
    cudaFuncAttributes attributes;
    return cudaFuncGetAttributes(&attributes, plan_rows_kernel);
}

}  // namespace deepep::internode
