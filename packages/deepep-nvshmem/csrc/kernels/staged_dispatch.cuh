#pragma once
// Dispatch to and from ranks whose outputs lie out of their peers' reach: rows and side data travel through the staging window, and the receiver
// puts them in place.
#include "handshake.cuh"
#include "staging.cuh"

namespace deepep::nvlink {
namespace {

// Destination ranks in the order in which this rank serves them: the next one first, itself last, so that not all ranks push to the same one.
__device__ __forceinline__ int dst_rank_of(const Domain& domain, int i) {
    const int rank = domain.rank + 1 + i;
    return rank >= domain.num_ranks ? rank - domain.num_ranks : rank;
}

// Rows that rank src_rank sends to dst_rank and that fit there. Both sides compute it from the same matrix and the announced capacity.
__device__ __forceinline__ int64_t num_rows_between(const DispatchArgs& args, int src_rank, int dst_rank, int64_t capacity) {
    const int num_ranks = args.domain.num_ranks;
    const int64_t begin = src_rank == 0 ? 0 : args.rank_prefix[(src_rank - 1) * num_ranks + dst_rank];
    const int64_t end = args.rank_prefix[src_rank * num_ranks + dst_rank];
    return max_of(0, min_of(end, capacity) - begin);
}
__device__ __forceinline__ int64_t first_row_between(const DispatchArgs& args, int src_rank, int dst_rank) {
    return src_rank == 0 ? 0 : args.rank_prefix[(src_rank - 1) * args.domain.num_ranks + dst_rank];
}

// What both ends of a staged pair agree on: the parts of a row, then its side data as one more unit.
struct StagedShape {
    RowParts parts;
    SideRow side;

    __device__ explicit StagedShape(const DispatchArgs& args) : parts(args.staged_parts), side{args.num_scales, args.num_topk, args.has_src_idx} {}
    __device__ int num_units() const { return parts.num_parts + (side.num_bytes() > 0); }
    __device__ bool is_built(int unit) const { return unit == parts.num_parts; }
    __device__ int num_bytes(int unit) const { return is_built(unit) ? side.num_bytes() : parts.num_bytes(unit); }
};

struct TokenSource : StagedShape {
    const DispatchArgs& args;
    int dst_rank;
    int64_t first_row, num_rows;

    __device__ TokenSource(const DispatchArgs& a, int dst, int64_t capacity)
        : StagedShape(a), args(a), dst_rank(dst), first_row(first_row_between(a, a.domain.rank, dst)), num_rows(num_rows_between(a, a.domain.rank, dst, capacity)) {}
    __device__ int64_t num_candidates() const { return args.num_tokens; }
    __device__ int64_t row(int64_t token) const {
        const int64_t row = args.send_head[token * args.domain.num_ranks + dst_rank] - first_row;
        return row >= 0 && row < num_rows ? row : -1;
    }
    __device__ const uint8_t* address(int64_t token, int unit) const { return args.x + token * parts.num_row_bytes + parts.begin(unit); }
    __device__ void build(int64_t token, uint8_t* to) const {
        const int lane = threadIdx.x % 32;
        for (int col = lane; col < side.num_scales; col += 32)
            reinterpret_cast<uint32_t*>(to)[col] = args.scales[token * args.scales_stride_token + col * args.scales_stride_col];
        if (lane < side.num_topk) {
            const int64_t expert = localise_expert(args.topk_idx[token * args.num_topk + lane], dst_rank, args.num_local_experts);
            reinterpret_cast<int64_t*>(to + side.topk_idx_offset())[lane] = expert;
            reinterpret_cast<float*>(to + side.weights_offset())[lane] = expert < 0 ? 0.0f : args.topk_weights[token * args.num_topk + lane];
        }
        if (lane == 0 && side.num_src_idx > 0) *reinterpret_cast<int32_t*>(to + side.src_idx_offset()) = static_cast<int32_t>(token);
    }
};

struct OutputSink : StagedShape {
    const DispatchArgs& args;
    int64_t first_row, count;

    __device__ OutputSink(const DispatchArgs& a, int src_rank)
        : StagedShape(a), args(a), first_row(first_row_between(a, src_rank, a.domain.rank)), count(num_rows_between(a, src_rank, a.domain.rank, a.capacity)) {}
    __device__ int64_t num_rows() const { return count; }
    __device__ uint8_t* address(int64_t row, int unit) const { return args.recv_x + (first_row + row) * parts.num_row_bytes + parts.begin(unit); }
    __device__ void unpack(int64_t row, const uint8_t* from) const {
        const int lane = threadIdx.x % 32;
        const int64_t at = first_row + row;
        for (int col = lane; col < side.num_scales; col += 32) args.recv_scales[at * side.num_scales + col] = reinterpret_cast<const uint32_t*>(from)[col];
        if (lane < side.num_topk) {
            args.recv_topk_idx[at * side.num_topk + lane] = reinterpret_cast<const int64_t*>(from + side.topk_idx_offset())[lane];
            args.recv_topk_weights[at * side.num_topk + lane] = reinterpret_cast<const float*>(from + side.weights_offset())[lane];
        }
        if (lane == 0 && side.num_src_idx > 0) args.recv_src_idx[at] = *reinterpret_cast<const int32_t*>(from + side.src_idx_offset());
    }
};

// The rows that cannot go directly. The first warps push, one for each other rank; as many more take out what peers have pushed here. Both
// kinds run in every block, so that a lone resident block makes progress on both ends.
template <bool kBulk>
__device__ void exchange_staged(const DispatchArgs& args, const WaitContext& context, const Handshake& handshake,
                                uint64_t (*barriers)[kMaxStagingLanes], uint8_t* dynamic) {
    const Domain& domain = args.domain;
    const int warp = threadIdx.x / 32;
    const int num_peers = domain.num_ranks - 1;
    if (warp >= 2 * num_peers || handshake.is_failed) return;
    const StagingLanes lanes{dynamic + warp * args.num_staging_lanes * args.num_lane_bytes, barriers[warp], args.num_staging_lanes, args.num_lane_bytes};
    init_lanes(lanes);
    const int peer = dst_rank_of(domain, warp % num_peers);
    if (warp < num_peers) {
        const Grant& grant = handshake.grants[peer];
        if (grant.is_staged) push_staged<kBulk>(domain, context, TokenSource(args, peer, grant.num_staged_rows), peer, lanes);
    } else if (args.is_staged) {
        drain_staged<kBulk>(domain, context, OutputSink(args, peer), peer, lanes);
    }
}

}  // namespace
}  // namespace deepep::nvlink
