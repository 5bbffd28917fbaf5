// Combine: every token's expert outputs come back from the ranks that hold them and are summed.
//
// Load warp     one lane: pulls the rows of a token (or parts of them) from their owners into a ring of shared-memory stages.
// Sum warps     dealt out to the stages: a stage's warps add its rows in rank order behind the biases, round once, store.
// Weights warp  sums the top-k weights in the same order, with ordinary loads.
// (Without bulk copies every warp loads from the owners, sums and stores by itself.)
// Before: send_head says at which row each rank holds a token. An owner's rows are read only after its READY was seen; an owner's kernel ends only
// after every rank has said READ_DONE. Tokens are assigned statically and nothing but READY is awaited before they are finished, so one
// resident block is enough.
#include "deepep/ptx/bulk.cuh"
#include "handshake.cuh"
#include "sum.cuh"

namespace deepep::nvlink {
namespace {

constexpr int kOp = static_cast<int>(Op::kCombine);
constexpr int kNumSumWarps = 16;
constexpr int kLoadWarp = kNumSumWarps;
constexpr int kWeightsWarp = kNumSumWarps + 1;
constexpr int kNumThreads = (kNumSumWarps + 2) * 32;
constexpr int kReadersPerBlock = 2;  // the row pipeline and the weights warp

// What a stage holds. The load lane writes it before it arms the stage's barrier; the sum warps read it after the barrier completed.
struct __align__(16) StageItem {
    int64_t offset;  // of the part in out and the biases
    int32_t num_bytes;
    uint32_t rank_mask;
};

struct Shared {
    Handshake handshake;
    StageItem items[kMaxPullStages];
    uint64_t full[kMaxPullStages];   // the stage's rows have landed
    uint64_t empty[kMaxPullStages];  // the sum warps have read them
    uint32_t is_last;
};

// Rows of a token at each rank, -1 where it is not held. A row that the owner does not have is reported and left out.
struct Heads {
    int32_t rows[kMaxRanks];

    __device__ __forceinline__ static Heads load(const CombineArgs& args, int64_t token) {
        Heads heads;
        const int num_ranks = args.domain.num_ranks;
#pragma unroll
        for (int rank = 0; rank < kMaxRanks; ++rank)
            heads.rows[rank] = rank < num_ranks && token < args.num_tokens ? args.send_head[token * num_ranks + rank] : -1;
        return heads;
    }
};

__device__ __noinline__ void report_row(const WaitContext& context, int rank, int64_t row, int64_t num_rows) {
    report_error(context, ErrorKind::kOverflow, Phase::kRows, rank, row, num_rows, 0);
}

// This block's share of reading peers' memory is over; the last share of the rank tells the owners. Called by one thread.
__device__ void end_reading(const CombineArgs& args, const WaitContext& context) {
    const Domain& domain = args.domain;
    if (ptx::add_acq_rel_gpu(&context.state->readers[kOp], 1) != gridDim.x * kReadersPerBlock - 1) return;
    ptx::store_relaxed_gpu(&context.state->readers[kOp], 0);
    ptx::fence_acq_rel_sys();  // loads that ended before the arrivals stay before the words below
    for (int peer = 0; peer < domain.num_ranks; ++peer)
        ptx::store_relaxed_sys(domain.window.done(domain.arenas[peer], Op::kCombine, domain.rank), signal_word(context.epoch, 1));
}

#if DEEPEP_HAS_BULK
// Parts of rows that this block sums.
__device__ __forceinline__ int64_t num_items_of_block(const CombineArgs& args) {
    return blockIdx.x < args.num_tokens ? ((args.num_tokens - 1 - blockIdx.x) / gridDim.x + 1) * args.parts.num_parts : 0;
}

// Token by token, all parts of one behind each other; the rows of the next token are looked up one token ahead.
__device__ void load_rows(const CombineArgs& args, const WaitContext& context, Shared& shared, uint8_t* ring) {
    const int num_ranks = args.domain.num_ranks;
    ptx::fence_async_global();  // READY, acquired by this block, permits the bulk loads below
    int stage = 0;
    uint32_t parity = 1;  // a fresh barrier counts as completed for parity 1
    int64_t token = blockIdx.x;
    Heads next = Heads::load(args, token);
    while (token < args.num_tokens) {
        const Heads heads = next;
        const int64_t next_token = token + gridDim.x;
        next = Heads::load(args, next_token);
        uint32_t mask = 0;
        const uint8_t* sources[kMaxRanks];
#pragma unroll
        for (int rank = 0; rank < kMaxRanks; ++rank) {
            if (rank >= num_ranks || heads.rows[rank] < 0) continue;
            const Grant& grant = shared.handshake.grants[rank];
            sources[rank] = grant.rows + heads.rows[rank] * args.parts.num_row_bytes;
            if (heads.rows[rank] < grant.num_rows)
                mask |= 1u << rank;
            else if (!shared.handshake.is_failed)
                report_row(context, rank, heads.rows[rank], grant.num_rows);
        }
        const int num_rows = __popc(mask);
        for (int part = 0; part < args.parts.num_parts; ++part) {
            const int num_bytes = args.parts.num_bytes(part);
            const int64_t begin = args.parts.begin(part);
            ptx::mbarrier_wait(shared.empty + stage, parity);
            shared.items[stage] = {token * args.parts.num_row_bytes + begin, num_bytes, mask};
            ptx::mbarrier_arrive_expect(shared.full + stage, num_rows * num_bytes);
            uint8_t* rows = ring + stage * num_ranks * args.parts.num_part_bytes;
#pragma unroll
            for (int rank = 0; rank < kMaxRanks; ++rank)
                if (mask >> rank & 1) ptx::bulk_load(rows + rank * args.parts.num_part_bytes, sources[rank] + begin, num_bytes, shared.full + stage);
            if (++stage == args.num_stages) {
                stage = 0;
                parity ^= 1;
            }
        }
        token = next_token;
    }
    // The newest use of every stage: when these have landed, all have.
    for (int64_t item = max_of(0, num_items_of_block(args) - args.num_stages); item < num_items_of_block(args); ++item)
        ptx::mbarrier_wait(shared.full + item % args.num_stages, item / args.num_stages & 1);
    end_reading(args, context);
}

__device__ __forceinline__ void sum_vector(const CombineArgs& args, const StageItem& item, const uint8_t* rows, int byte) {
    Accumulator sum;
    if (args.bias_0 != nullptr) sum.add(*reinterpret_cast<const int4*>(args.bias_0 + item.offset + byte));
    if (args.bias_1 != nullptr) sum.add(*reinterpret_cast<const int4*>(args.bias_1 + item.offset + byte));
    // All reads of four ranks first, then their sums: one latency of shared memory instead of four.
#pragma unroll
    for (int group = 0; group < kMaxRanks; group += 4) {
        if (item.rank_mask >> group == 0) break;
        int4 vectors[4];
#pragma unroll
        for (int i = 0; i < 4; ++i)
            if (item.rank_mask >> (group + i) & 1) vectors[i] = *reinterpret_cast<const int4*>(rows + (group + i) * args.parts.num_part_bytes + byte);
#pragma unroll
        for (int i = 0; i < 4; ++i)
            if (item.rank_mask >> (group + i) & 1) sum.add(vectors[i]);
    }
    *reinterpret_cast<int4*>(args.out + item.offset + byte) = sum.rounded();
}

// Every stage has its own warps, so that several stages are summed at once. It has to be its own: stages fill in any order, and a warp that
// came to a stage's use before the use before it had landed would take the barrier's older phase of the same parity for its own.
__device__ void sum_rows(const CombineArgs& args, Shared& shared, const uint8_t* ring, int warp) {
    const int num_stage_warps = kNumSumWarps / args.num_stages;
    const int stage = warp / num_stage_warps;
    if (stage >= args.num_stages) return;
    const int first_byte = (threadIdx.x - stage * num_stage_warps * 32) * 16;
    const uint8_t* rows = ring + stage * args.domain.num_ranks * args.parts.num_part_bytes;
    const int64_t num_items = num_items_of_block(args);
    uint32_t parity = 0;
    for (int64_t k = stage; k < num_items; k += args.num_stages, parity ^= 1) {
        ptx::mbarrier_wait(shared.full + stage, parity);
        const StageItem item = shared.items[stage];
#pragma unroll 2
        for (int byte = first_byte; byte < item.num_bytes; byte += num_stage_warps * 32 * 16) sum_vector(args, item, rows, byte);
        __syncwarp();
        // Orders this warp's reads before the load lane's next bulk copy into the stage.
        if (threadIdx.x % 32 == 0) ptx::mbarrier_arrive(shared.empty + stage);
    }
}
#endif

// The same with ordinary loads: one warp per token.
__device__ void pull_rows_plain(const CombineArgs& args, const WaitContext& context, Shared& shared) {
    const int lane = threadIdx.x % 32;
    const int64_t num_vectors = args.parts.num_row_bytes / 16;
    for (int64_t token = blockIdx.x + static_cast<int64_t>(gridDim.x) * (threadIdx.x / 32); token < args.num_tokens;
         token += static_cast<int64_t>(gridDim.x) * kNumSumWarps) {
        const Heads heads = Heads::load(args, token);
        const int64_t offset = token * args.parts.num_row_bytes;
        for (int64_t i = lane; i < num_vectors; i += 32) {
            int4 vectors[kMaxRanks];
#pragma unroll
            for (int rank = 0; rank < kMaxRanks; ++rank) {
                const Grant& grant = shared.handshake.grants[rank];
                if (heads.rows[rank] >= 0 && heads.rows[rank] < grant.num_rows)
                    vectors[rank] = *reinterpret_cast<const int4*>(grant.rows + heads.rows[rank] * args.parts.num_row_bytes + i * 16);
            }
            Accumulator sum;
            if (args.bias_0 != nullptr) sum.add(*reinterpret_cast<const int4*>(args.bias_0 + offset + i * 16));
            if (args.bias_1 != nullptr) sum.add(*reinterpret_cast<const int4*>(args.bias_1 + offset + i * 16));
#pragma unroll
            for (int rank = 0; rank < kMaxRanks; ++rank) {
                const int64_t num_rows = shared.handshake.grants[rank].num_rows;
                if (heads.rows[rank] < 0) continue;
                if (heads.rows[rank] < num_rows)
                    sum.add(vectors[rank]);
                else if (!shared.handshake.is_failed)
                    report_row(context, rank, heads.rows[rank], num_rows);
            }
            *reinterpret_cast<int4*>(args.out + offset + i * 16) = sum.rounded();
        }
    }
}

__device__ void sum_weights(const CombineArgs& args, Shared& shared) {
    const int num_ranks = args.domain.num_ranks;
    const int64_t num_elements = args.num_tokens * args.num_topk;
    const int64_t stride = static_cast<int64_t>(gridDim.x) * 32;
    for (int64_t i = blockIdx.x * 32ll + threadIdx.x % 32; i < num_elements; i += stride) {
        const int64_t token = i / args.num_topk;
        const int64_t k = i - token * args.num_topk;
        const Heads heads = Heads::load(args, token);
        float values[kMaxRanks];
#pragma unroll
        for (int rank = 0; rank < kMaxRanks; ++rank) {
            values[rank] = 0.0f;
            if (rank < num_ranks && heads.rows[rank] >= 0 && heads.rows[rank] < shared.handshake.grants[rank].num_rows)
                values[rank] = reinterpret_cast<const float*>(shared.handshake.grants[rank].weights)[heads.rows[rank] * static_cast<int64_t>(args.num_topk) + k];
        }
        float sum = 0.0f;
#pragma unroll
        for (int rank = 0; rank < kMaxRanks; ++rank)
            if (heads.rows[rank] >= 0) sum = __fadd_rn(sum, values[rank]);
        args.out_topk_weights[i] = sum;
    }
}

// The block that finishes last waits until no rank reads this one's rows any more.
__device__ void finish(const CombineArgs& args, const WaitContext& context, Shared& shared) {
    const Domain& domain = args.domain;
    DeviceState* state = context.state;
    __syncthreads();
    if (threadIdx.x == 0) shared.is_last = ptx::add_acq_rel_gpu(&state->arrivals[kOp], 1) == gridDim.x - 1;
    __syncthreads();
    if (!shared.is_last) return;
    if (static_cast<int>(threadIdx.x) < domain.num_ranks) {
        const uint64_t* word = domain.window.done(domain.arenas[domain.rank], Op::kCombine, threadIdx.x);
        uint32_t value = 0;
        // The next writer of y runs behind this kernel: it may overwrite what that peer has read.
        if (wait_signal(context, word, context.epoch, Phase::kReadDone, threadIdx.x, &value)) acquire_signal(word);
    }
    __syncthreads();
    if (threadIdx.x == 0) {
        ptx::store_relaxed_gpu(&state->arrivals[kOp], 0);
        ptx::store_relaxed_gpu(&state->epochs[kOp], context.epoch);
    }
}

__global__ void __launch_bounds__(kNumThreads, 1) pull_and_sum_kernel(const __grid_constant__ CombineArgs args) {
    extern __shared__ __align__(128) uint8_t ring[];
    __shared__ Shared shared;
    const Domain& domain = args.domain;
    DeviceState* state = domain.state();
    const WaitContext context{domain.host, state, Op::kCombine, domain.rank, ptx::load_relaxed_gpu(&state->epochs[kOp]) + 1};
#if DEEPEP_HAS_BULK
    if (args.use_bulk && threadIdx.x == 0) {
        for (int stage = 0; stage < args.num_stages; ++stage) {
            ptx::mbarrier_init(shared.full + stage, 1);
            ptx::mbarrier_init(shared.empty + stage, kNumSumWarps / args.num_stages);
        }
        ptx::fence_mbarrier_init();  // the handshake's barriers follow
    }
#endif
    const bool has_weights = args.num_topk > 0;
    const GrantSizes sizes{args.parts.num_row_bytes, 0, 0, has_weights ? args.num_topk * 4 : 0, 0};
    const OwnGrant own{kKindDirect, args.num_recv_tokens, offset_in_arena(domain, args.y), 0, 0, offset_in_arena(domain, args.topk_weights), 0};
    exchange_grants(domain, context, shared.handshake, sizes, own);

    const int warp = threadIdx.x / 32;
    const int lane = threadIdx.x % 32;
    if (warp == kWeightsWarp) {
        if (has_weights) sum_weights(args, shared);
        __syncwarp();
        if (lane == 0) end_reading(args, context);
#if DEEPEP_HAS_BULK
    } else if (args.use_bulk) {
        if (warp == kLoadWarp) {
            if (lane == 0) load_rows(args, context, shared, ring);
        } else {
            sum_rows(args, shared, ring, warp);
        }
#endif
    }
    if (!args.use_bulk) {
        if (warp < kNumSumWarps) pull_rows_plain(args, context, shared);
        __syncthreads();
        if (threadIdx.x == 0) end_reading(args, context);
    }
    finish(args, context, shared);
}

}  // namespace

cudaError_t launch_combine(const CombineArgs& args, int num_sms, cudaStream_t stream) {
    const int num_shared_bytes = args.use_bulk ? args.num_stages * args.domain.num_ranks * args.parts.num_part_bytes : 0;
    pull_and_sum_kernel<<<num_sms, kNumThreads, num_shared_bytes, stream>>>(args);
    return cudaGetLastError();
}

cudaError_t prepare_combine(bool has_bulk) {
    cudaFuncAttributes attributes;
    const cudaError_t status = cudaFuncGetAttributes(&attributes, pull_and_sum_kernel);
    if (status != cudaSuccess || !has_bulk) return status;
    return cudaFuncSetAttribute(pull_and_sum_kernel, cudaFuncAttributeMaxDynamicSharedMemorySize,
                                kMaxSharedBytes - static_cast<int>(attributes.sharedSizeBytes));
}

}  // namespace deepep::nvlink
