// Dispatch: every token's row goes once to each rank that holds one of its experts, straight into its final place there.
//
// Push warps   a ring of shared-memory stages, filled by bulk loads from x and emptied by one bulk store per destination rank
//              (without bulk copies: the whole warp copies with 16-byte loads and stores).
// Side warps   top-k indices (renumbered for the destination), weights, source token numbers, and scale rows that bulk copies cannot carry;
//              ordinary stores, long runs of them, because rows of one source lie next to each other at the destination.
// Before: send_head and rank_prefix hold this routing (notify, or an earlier dispatch). No store lands before the destination's READY was
// seen; the kernel ends when all rows for this rank have arrived. Rows are claimed and finished before anything but READY is awaited, so one
// resident block is enough.
#include "completion.cuh"
#include "deepep/ptx/bulk.cuh"
#include "staged_dispatch.cuh"

namespace deepep::nvlink {
namespace {

constexpr int kOp = static_cast<int>(Op::kDispatch);
constexpr int kMaxThreads = kMaxDispatchWarps * 32;
[[maybe_unused]] constexpr int kStageAlignment = 128;

struct Shared {
    Handshake handshake;
    uint32_t is_last;
    int64_t stage_items[kMaxPushWarps][kMaxPushStages];
    int32_t side_tokens[kMaxThreads / 32][32];
    int32_t side_rows[kMaxThreads / 32][32];
    uint64_t staging_barriers[2 * kMaxRanks][kMaxStagingLanes];
};

// Rows of a token at each destination, in serving order; -1 where it does not go (or would not fit).
struct Heads {
    int32_t rows[kMaxRanks];

    __device__ static Heads load(const DispatchArgs& args, const Handshake& shared, int64_t token) {
        Heads heads;
#pragma unroll
        for (int i = 0; i < kMaxRanks; ++i)
            heads.rows[i] = i < args.domain.num_ranks ? args.send_head[token * args.domain.num_ranks + dst_rank_of(args.domain, i)] : -1;
#pragma unroll
        for (int i = 0; i < kMaxRanks; ++i)
            if (i < args.domain.num_ranks && heads.rows[i] >= shared.grants[dst_rank_of(args.domain, i)].num_rows) heads.rows[i] = -1;
        return heads;
    }
};

#if DEEPEP_HAS_BULK
// One warp's ring of stages. Rows (or parts of rows) are the items: the first ones are dealt out, the others claimed from a counter, because
// tokens differ in their number of destinations and the slowest warp would decide. Lane 0 issues every copy; the other lanes help to
// gather scales that do not lie in rows.
class RowPipe {
public:
    __device__ RowPipe(const DispatchArgs& args, Shared& shared, uint8_t* dynamic, int warp)
        : args_(args), shared_(shared), lane_(threadIdx.x % 32), items_(shared.stage_items[warp]) {
        const int64_t num_ring_bytes = static_cast<int64_t>(args.num_stages) * args.num_stage_bytes;
        ring_ = dynamic + warp * num_ring_bytes;
        barriers_ = reinterpret_cast<uint64_t*>(dynamic + args.num_push_warps * num_ring_bytes) + warp * args.num_stages;
        num_items_ = args.num_tokens * args.parts.num_parts;
        num_scale_bytes_ = args.use_bulk_scales ? args.num_scales * 4 : 0;
        scales_begin_ = static_cast<int>(align_up(args.parts.num_part_bytes, kStageAlignment));
        gathers_scales_ = args.use_bulk_scales && args.gathers_scales;
        next_item_ = static_cast<int64_t>(blockIdx.x) * args.num_push_warps + warp;
        num_dealt_left_ = args.num_stages - 1;
    }

    // Fills the ring. Needs nothing from the peers, so it runs while their READY is on its way.
    __device__ void start() {
        if (lane_ == 0) {
            for (int stage = 0; stage < args_.num_stages; ++stage) ptx::mbarrier_init(barriers_ + stage, 1);
            ptx::fence_mbarrier_init();
        }
        __syncwarp();
        if (num_dealt_left_ == 1) claim();
        for (int stage = 0; stage < args_.num_stages - 1 && next_item_ < num_items_; ++stage) load();
    }

    __device__ void run() {
        if (lane_ == 0) ptx::fence_async_global();  // READY, acquired by this block, permits the bulk stores below
        int stage = 0;
        uint32_t parity = 0;
        while (num_in_flight_ > 0) {
            if (lane_ == 0) push(stage, parity);
            --num_in_flight_;
            if (next_item_ < num_items_) {
                if (lane_ == 0) ptx::bulk_wait_read<1>();  // the stage pushed before this one is free
                __syncwarp();
                load();
            }
            if (++stage == args_.num_stages) {
                stage = 0;
                parity ^= 1;
            }
        }
        if (lane_ == 0) ptx::bulk_wait<0>();  // all rows have landed, visibly to this thread: the block's release may vouch for them
    }

private:
    __device__ void load() {
        const int64_t token = args_.parts.num_parts == 1 ? next_item_ : next_item_ / args_.parts.num_parts;
        const int part = static_cast<int>(next_item_ - token * args_.parts.num_parts);
        uint8_t* stage = ring_ + static_cast<int64_t>(load_stage_) * args_.num_stage_bytes;
        const bool has_scales = num_scale_bytes_ > 0 && part == 0;
        if (gathers_scales_ && has_scales) {
            for (int col = lane_; col < args_.num_scales; col += 32)
                reinterpret_cast<uint32_t*>(stage + scales_begin_)[col] =
                    args_.scales[token * args_.scales_stride_token + col * args_.scales_stride_col];
            ptx::fence_async_shared();  // these ordinary writes are read by a bulk store
            __syncwarp();
        }
        if (lane_ == 0) {
            const int num_bytes = args_.parts.num_bytes(part);
            const int num_more = has_scales && !gathers_scales_ ? num_scale_bytes_ : 0;
            items_[load_stage_] = next_item_;
            ptx::mbarrier_arrive_expect(barriers_ + load_stage_, num_bytes + num_more);
            ptx::bulk_load(stage, args_.x + token * args_.parts.num_row_bytes + args_.parts.begin(part), num_bytes, barriers_ + load_stage_);
            if (num_more > 0)
                ptx::bulk_load(stage + scales_begin_, args_.scales + token * args_.scales_stride_token, num_more, barriers_ + load_stage_);
        }
        ++num_in_flight_;
        load_stage_ = load_stage_ + 1 == args_.num_stages ? 0 : load_stage_ + 1;
        choose_next();
    }

    // The claim is sent one load ahead of its use, so that its way to the L2 cache and back costs nothing.
    __device__ void choose_next() {
        const int64_t num_warps = static_cast<int64_t>(gridDim.x) * args_.num_push_warps;
        if (--num_dealt_left_ > 0) {
            next_item_ += num_warps;
            if (num_dealt_left_ == 1) claim();
            return;
        }
        next_item_ = (args_.num_stages - 1) * num_warps + __shfl_sync(~0u, claimed_, 0);
        claim();
    }
    __device__ void claim() {
        if (lane_ == 0) claimed_ = ptx::add_relaxed_gpu(&args_.domain.state()->pull_claims[kMaxRanks], 1);
    }

    __device__ void push(int stage_index, uint32_t parity) {
        const int64_t item = items_[stage_index];
        const int64_t token = args_.parts.num_parts == 1 ? item : item / args_.parts.num_parts;
        const int part = static_cast<int>(item - token * args_.parts.num_parts);
        const Heads heads = Heads::load(args_, shared_.handshake, token);  // in flight while the row lands
        const uint8_t* stage = ring_ + static_cast<int64_t>(stage_index) * args_.num_stage_bytes;
        const int num_bytes = args_.parts.num_bytes(part);
        ptx::mbarrier_wait(barriers_ + stage_index, parity);
#pragma unroll
        for (int i = 0; i < kMaxRanks; ++i) {
            if (i >= args_.domain.num_ranks || heads.rows[i] < 0) continue;
            const Grant& grant = shared_.handshake.grants[dst_rank_of(args_.domain, i)];
            ptx::bulk_store(grant.rows + heads.rows[i] * args_.parts.num_row_bytes + args_.parts.begin(part), stage, num_bytes);
            if (num_scale_bytes_ > 0 && part == 0)
                ptx::bulk_store(grant.scales + static_cast<int64_t>(heads.rows[i]) * num_scale_bytes_, stage + scales_begin_, num_scale_bytes_);
        }
        ptx::bulk_commit();
    }

    const DispatchArgs& args_;
    Shared& shared_;
    const int lane_;
    int64_t* items_;  // item of each stage
    uint8_t* ring_;
    uint64_t* barriers_;
    int64_t num_items_;
    int64_t next_item_;
    int num_dealt_left_;
    uint32_t claimed_ = 0;
    int num_in_flight_ = 0;
    int load_stage_ = 0;
    int num_scale_bytes_;
    int scales_begin_;
    bool gathers_scales_;
};
#endif

// The same without bulk copies: a warp per row, several 16-byte loads in flight.
__device__ void push_rows_plain(const DispatchArgs& args, const Handshake& shared, int warp, int num_warps) {
    constexpr int kUnroll = 4;
    const int lane = threadIdx.x % 32;
    const int64_t num_vectors = args.parts.num_row_bytes / 16;
    for (int64_t token = static_cast<int64_t>(blockIdx.x) * num_warps + warp; token < args.num_tokens;
         token += static_cast<int64_t>(gridDim.x) * num_warps) {
        const Heads heads = Heads::load(args, shared, token);
        const int4* src = reinterpret_cast<const int4*>(args.x + token * args.parts.num_row_bytes);
        for (int64_t base = lane; base < num_vectors; base += 32 * kUnroll) {
            int4 vectors[kUnroll];
#pragma unroll
            for (int u = 0; u < kUnroll; ++u)
                if (base + u * 32 < num_vectors) vectors[u] = src[base + u * 32];
#pragma unroll
            for (int i = 0; i < kMaxRanks; ++i) {
                if (i >= args.domain.num_ranks || heads.rows[i] < 0) continue;
                int4* dst = reinterpret_cast<int4*>(shared.grants[dst_rank_of(args.domain, i)].rows + heads.rows[i] * args.parts.num_row_bytes);
#pragma unroll
                for (int u = 0; u < kUnroll; ++u)
                    if (base + u * 32 < num_vectors) dst[base + u * 32] = vectors[u];
            }
        }
    }
}

// Side data of 32 tokens at a time for one destination: the tokens that go there are listed, then their elements are stored as one run.
__device__ void push_side_data(const DispatchArgs& args, Shared& shared, int warp, int num_warps) {
    const Domain& domain = args.domain;
    const int lane = threadIdx.x % 32;
    int32_t* tokens = shared.side_tokens[warp];
    int32_t* rows = shared.side_rows[warp];
    const bool has_topk = args.num_topk > 0;
    const bool has_scales = args.num_scales > 0 && !args.use_bulk_scales;
    if (!has_topk && !has_scales && !args.has_src_idx) return;
    const int64_t num_groups = ceil_div(args.num_tokens, 32) * domain.num_ranks;
    for (int64_t group = static_cast<int64_t>(blockIdx.x) + static_cast<int64_t>(gridDim.x) * warp; group < num_groups;
         group += static_cast<int64_t>(gridDim.x) * num_warps) {
        const int dst_rank = dst_rank_of(domain, static_cast<int>(group % domain.num_ranks));
        const int64_t token = group / domain.num_ranks * 32 + lane;
        const Grant& grant = shared.handshake.grants[dst_rank];
        const int32_t row = token < args.num_tokens ? args.send_head[token * domain.num_ranks + dst_rank] : -1;
        const bool goes = row >= 0 && row < grant.num_rows;
        const uint32_t mask = __ballot_sync(~0u, goes);
        const int num_rows = __popc(mask);
        __syncwarp();  // the lists of the group before have been read
        if (goes) {
            const int place = __popc(mask & ((1u << lane) - 1));
            tokens[place] = lane;
            rows[place] = row;
        }
        __syncwarp();
        const int64_t first_token = token - lane;
        if (has_topk) {
            int64_t* recv_topk_idx = reinterpret_cast<int64_t*>(grant.topk_idx);
            float* recv_weights = reinterpret_cast<float*>(grant.weights);
            for (int e = lane; e < num_rows * args.num_topk; e += 32) {
                const int i = e / args.num_topk, k = e % args.num_topk;
                const int64_t from = (first_token + tokens[i]) * args.num_topk + k;
                const int64_t to = static_cast<int64_t>(rows[i]) * args.num_topk + k;
                const int64_t expert = localise_expert(args.topk_idx[from], dst_rank, args.num_local_experts);
                recv_topk_idx[to] = expert;
                recv_weights[to] = expert < 0 ? 0.0f : args.topk_weights[from];
            }
        }
        if (args.has_src_idx && lane < num_rows)
            reinterpret_cast<int32_t*>(grant.src_idx)[rows[lane]] = static_cast<int32_t>(first_token + tokens[lane]);
        if (has_scales) {
            uint32_t* recv_scales = reinterpret_cast<uint32_t*>(grant.scales);
#pragma unroll 4
            for (int e = lane; e < num_rows * args.num_scales; e += 32) {
                const int i = e / args.num_scales, col = e % args.num_scales;
                recv_scales[static_cast<int64_t>(rows[i]) * args.num_scales + col] =
                    args.scales[(first_token + tokens[i]) * args.scales_stride_token + col * args.scales_stride_col];
            }
        }
    }
}

// Worst-case sizes: rows that nobody sends are marked as such.
__device__ void fill_unused_rows(const DispatchArgs& args) {
    const int num_ranks = args.domain.num_ranks;
    const int64_t num_received = min_of(args.rank_prefix[(num_ranks - 1) * num_ranks + args.domain.rank], args.capacity);
    const int64_t begin = num_received * args.num_topk, end = args.capacity * args.num_topk;
    const int64_t thread = static_cast<int64_t>(blockIdx.x) * blockDim.x + threadIdx.x;
    const int64_t num_threads = static_cast<int64_t>(gridDim.x) * blockDim.x;
    if (args.num_topk > 0)
        for (int64_t i = begin + thread; i < end; i += num_threads) {
            args.recv_topk_idx[i] = -1;
            args.recv_topk_weights[i] = 0.0f;
        }
    if (args.has_src_idx)
        for (int64_t row = num_received + thread; row < args.capacity; row += num_threads) args.recv_src_idx[row] = -1;
}

// Says so when a destination cannot hold what is routed to it (worst-case sizes chosen too small, or a handle of another routing).
__device__ void check_capacities(const DispatchArgs& args, const WaitContext& context, const Handshake& shared) {
    const int num_ranks = args.domain.num_ranks;
    const int dst_rank = threadIdx.x;
    if (blockIdx.x != 0 || dst_rank >= num_ranks || shared.is_failed) return;
    const int64_t wanted = args.rank_prefix[(num_ranks - 1) * num_ranks + dst_rank];
    const int64_t capacity = max_of(shared.grants[dst_rank].num_rows, shared.grants[dst_rank].num_staged_rows);
    if (wanted > capacity) report_error(context, ErrorKind::kOverflow, Phase::kRows, dst_rank, wanted, capacity, 0);
}

// The block that finishes last leaves the claims as the next operation wants them.
__device__ void finish(const DispatchArgs& args, const WaitContext& context, Shared& shared) {
    if (!exchange_done(args.domain, context, shared.is_last) || threadIdx.x != 0) return;
    for (uint32_t& claims : context.state->push_claims) ptx::store_relaxed_gpu(&claims, 0);
    for (uint32_t& claims : context.state->pull_claims) ptx::store_relaxed_gpu(&claims, 0);
    end_operation(context);
}

__global__ void __launch_bounds__(kMaxThreads, 1) push_rows_kernel(const __grid_constant__ DispatchArgs args) {
    extern __shared__ __align__(128) uint8_t dynamic[];
    __shared__ Shared shared;
    const Domain& domain = args.domain;
    DeviceState* state = domain.state();
    const WaitContext context{domain.host, state, Op::kDispatch, domain.rank, ptx::load_relaxed_gpu(&state->epochs[kOp]) + 1};
    const GrantSizes sizes{args.parts.num_row_bytes, args.num_scales * 4, args.num_topk * 8, args.num_topk * 4, args.has_src_idx ? 4 : 0};
    const OwnGrant own{args.is_staged ? kKindStaged : kKindDirect,
                       args.capacity,
                       {args.recv_x, reinterpret_cast<uint8_t*>(args.recv_scales), reinterpret_cast<uint8_t*>(args.recv_topk_idx),
                        reinterpret_cast<uint8_t*>(args.recv_topk_weights), reinterpret_cast<uint8_t*>(args.recv_src_idx)},
                       domain.arenas[domain.rank]};
    const int warp = threadIdx.x / 32;
    const bool is_pusher = warp < args.num_push_warps;
#if DEEPEP_HAS_BULK
    RowPipe pipe(args, shared, dynamic, is_pusher ? warp : 0);
    if (args.use_bulk && is_pusher) pipe.start();
#endif
    exchange_grants(domain, context, shared.handshake, sizes, own);
    check_capacities(args, context, shared.handshake);
    if (!is_pusher) {
        push_side_data(args, shared, warp - args.num_push_warps, args.num_side_warps);
    } else if (!args.use_bulk) {
        push_rows_plain(args, shared.handshake, warp, args.num_push_warps);
#if DEEPEP_HAS_BULK
    } else {
        pipe.run();
#endif
    }
    if (shared.handshake.has_staged) {
        __syncthreads();  // the rings above are empty: their shared memory may be used anew
#if DEEPEP_HAS_BULK
        if (args.use_bulk) exchange_staged<true>(args, context, shared.handshake, shared.staging_barriers, dynamic);
#endif
        if (!args.use_bulk) exchange_staged<false>(args, context, shared.handshake, shared.staging_barriers, dynamic);
    }
    if (args.fill_unused) fill_unused_rows(args);
    finish(args, context, shared);
}

}  // namespace

cudaError_t launch_dispatch(const DispatchArgs& args, int num_sms, cudaStream_t stream) {
    const int num_threads = (args.num_push_warps + args.num_side_warps) * 32;
    push_rows_kernel<<<num_sms, num_threads, args.num_dynamic_bytes, stream>>>(args);
    return cudaGetLastError();
}

cudaError_t prepare_dispatch(bool has_bulk) {
    cudaFuncAttributes attributes;
    const cudaError_t status = cudaFuncGetAttributes(&attributes, push_rows_kernel);
    if (status != cudaSuccess || !has_bulk) return status;
    return cudaFuncSetAttribute(push_rows_kernel, cudaFuncAttributeMaxDynamicSharedMemorySize,
                                kMaxSharedBytes - static_cast<int>(attributes.sharedSizeBytes));
}

}  // namespace deepep::nvlink
