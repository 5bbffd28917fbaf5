#pragma once
// What both forms of combine (bulk copies, ordinary loads) share.
#include "deepep/ptx/bulk.cuh"
#include "handshake.cuh"
#include "staging.cuh"
#include "sum.cuh"

namespace deepep::nvlink {
namespace {

constexpr int kCombineOp = static_cast<int>(Op::kCombine);
constexpr int kNumSumWarps = 16;
// Behind the sum warps: load warps, then weights warps, together always as many.
constexpr int kNumReaderWarps = 5;
constexpr int kFirstPushWarp = kNumSumWarps + kNumReaderWarps;
static_assert(kMaxLoadWarps < kNumReaderWarps, "at least one warp sums weights");

// First row at `owner` that came from this rank; rows of one source lie together.
__device__ __forceinline__ int64_t first_row_of(const CombineArgs& args, int owner) {
    return args.domain.rank == 0 || owner >= args.domain.num_ranks ? 0 : args.rank_prefix[(args.domain.rank - 1) * args.domain.num_ranks + owner];
}

// Units of a row in the staging window: its parts, then its weights.
__device__ __forceinline__ int units_per_row(const CombineArgs& args) { return args.parts.num_parts + (args.num_topk > 0 ? 1 : 0); }

__device__ __noinline__ void report_row(const WaitContext& context, const Handshake& handshake, int rank, int64_t row, int64_t num_rows) {
    if (!handshake.is_failed) report_error(context, ErrorKind::kOverflow, Phase::kRows, rank, row, num_rows, 0);
}

// One of this block's readers of peers' memory is through; the last reader of the rank tells the owners. Called by one thread.
__device__ __forceinline__ void end_reading(const CombineArgs& args, const WaitContext& context) {
    const Domain& domain = args.domain;
    if (ptx::add_acq_rel_gpu(&context.state->readers[kCombineOp], 1) != gridDim.x * kNumReaderWarps - 1) return;
    ptx::store_relaxed_gpu(&context.state->readers[kCombineOp], 0);
    ptx::fence_acq_rel_sys();  // loads that ended before the arrivals stay before the words below
    for (int peer = 0; peer < domain.num_ranks; ++peer)
        ptx::store_relaxed_sys(domain.window.done(domain.arenas[peer], Op::kCombine, domain.rank), signal_word(context.epoch, 1));
}

// Top-k weights with ordinary loads, for owners whose memory is in reach. Under the load of the rows a read takes several microseconds, so each
// lane has two elements' reads from all ranks in flight.
__device__ __forceinline__ void sum_weights(const CombineArgs& args, const Handshake& handshake, int warp, int num_warps) {
    constexpr int kUnroll = 2;
    const int num_ranks = args.domain.num_ranks;
    const int64_t num_elements = args.num_tokens * args.num_topk;
    const int64_t stride = static_cast<int64_t>(gridDim.x) * num_warps * 32;
    for (int64_t i = (static_cast<int64_t>(blockIdx.x) * num_warps + warp) * 32 + threadIdx.x % 32; i < num_elements; i += stride * kUnroll) {
        float values[kUnroll][kMaxRanks];
#pragma unroll
        for (int u = 0; u < kUnroll; ++u) {
            const int64_t element = i + u * stride;
            const int64_t token = element / args.num_topk;
#pragma unroll
            for (int rank = 0; rank < kMaxRanks; ++rank) {
                values[u][rank] = 0.0f;
                if (rank >= num_ranks || element >= num_elements) continue;
                const Grant& grant = handshake.grants[rank];
                const int64_t row = args.send_head[token * num_ranks + rank];
                if (row < 0 || row >= grant.num_rows) continue;
                const int64_t k = element - token * args.num_topk;
                values[u][rank] = reinterpret_cast<const float*>(grant.weights)[row * args.num_topk + k];
            }
        }
        // A rank that does not hold the token contributes +0, which changes no sum that starts from +0.
#pragma unroll
        for (int u = 0; u < kUnroll; ++u) {
            float sum = 0.0f;
#pragma unroll
            for (int rank = 0; rank < kMaxRanks; ++rank) sum = __fadd_rn(sum, values[u][rank]);
            if (i + u * stride < num_elements) args.out_topk_weights[i + u * stride] = sum;
        }
    }
}

// This rank's rows that came from dst_rank, for its window.
struct OwnRows {
    const CombineArgs& args;
    int64_t first_row, count;

    __device__ OwnRows(const CombineArgs& a, int dst_rank) : args(a) {
        const int num_ranks = a.domain.num_ranks, rank = a.domain.rank;
        first_row = dst_rank == 0 ? 0 : a.rank_prefix[(dst_rank - 1) * num_ranks + rank];
        count = max_of(0, min_of(a.rank_prefix[dst_rank * num_ranks + rank], a.num_recv_tokens) - first_row);
    }
    __device__ int64_t num_candidates() const { return count; }
    __device__ int64_t row(int64_t candidate) const { return candidate; }
    __device__ int num_units() const { return units_per_row(args); }
    __device__ bool is_built(int unit) const { return unit == args.parts.num_parts; }
    __device__ int num_bytes(int unit) const { return is_built(unit) ? static_cast<int>(align_up(args.num_topk * 4, 16)) : args.parts.num_bytes(unit); }
    __device__ const uint8_t* address(int64_t row, int unit) const { return args.y + (first_row + row) * args.parts.num_row_bytes + args.parts.begin(unit); }
    __device__ void build(int64_t row, uint8_t* to) const {
        const int lane = threadIdx.x % 32;
        if (lane < args.num_topk) reinterpret_cast<float*>(to)[lane] = args.topk_weights[(first_row + row) * args.num_topk + lane];
    }
};

__device__ __forceinline__ void push_own_rows(const CombineArgs& args, const WaitContext& context, const Handshake& handshake, int pusher, uint8_t* dynamic,
                                              uint64_t* barriers) {
    if (handshake.is_failed) return;
    const int dst_rank = (args.domain.rank + 1 + pusher) % args.domain.num_ranks;
    const StagingLanes lanes{dynamic + pusher * args.num_staging_lanes * args.num_lane_bytes, barriers, args.num_staging_lanes, args.num_lane_bytes};
    init_lanes(lanes);
#if DEEPEP_HAS_BULK
    if (args.use_bulk) push_staged<true>(args.domain, context, OwnRows(args, dst_rank), dst_rank, lanes);
#endif
    if (!args.use_bulk) push_staged<false>(args.domain, context, OwnRows(args, dst_rank), dst_rank, lanes);
}

}  // namespace
}  // namespace deepep::nvlink
