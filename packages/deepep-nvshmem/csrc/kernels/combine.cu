// Combine: every token's expert outputs come back from the ranks that hold them and are summed.
//
// Load warps     bring the rows of a token, part by part, into shared-memory stages: by bulk loads from the owner's memory (pull), or from this
//                rank's own staging window where the owner pushes. One lane per owning rank; each warp has tokens and stages of its own, because
//                one warp alone cannot issue copies fast enough for a few SMs to fill the link.
// Sum warps      dealt out to the stages: a stage's warps add its rows in rank order behind the biases, round once, store.
// Weights warps  sum the top-k weights in the same order with ordinary loads. When some owner pushes, the weights travel like parts of a row,
//                and one of these warps returns the window's slots instead.
// Relay warps    only where this rank's own rows are out of its peers' reach and memory for a relay is there (relay.cuh).
// Push warps     only where this rank's own rows are out of its peers' reach: one per other rank (staging.cuh).
// (Without bulk copies every sum warp loads, sums and stores by itself: plain_combine.cuh.)
// Before: send_head says at which row each rank holds a token. An owner's rows are read only after its READY was seen; an owner's kernel ends only
// after every rank has said READ_DONE. Tokens are claimed in order by running blocks and pull waits for READY alone, so one resident block is
// enough.
#include "combine_parts.cuh"
#include "plain_combine.cuh"
#include "relay.cuh"

namespace deepep::nvlink {
namespace {

#if DEEPEP_HAS_BULK
// What a stage holds. The load warp writes it before it arms the stage's barrier; the others read it after the barrier completed.
enum ItemKind : uint8_t { kRowsItem, kWeightsItem, kEndItem };
struct __align__(16) StageItem {
    int64_t offset;      // of the part in out and the biases (bytes), or of the token's weights (elements)
    int32_t num_bytes;   // of the part
    uint8_t kind;
    uint8_t num_rows;    // they lie in rank order
    uint16_t shifts;     // weights: two bits per row, elements between the 16-byte boundary and the first weight
};

struct Pipeline {
    StageItem items[kMaxPullStages];
    uint32_t slot_numbers[kMaxPullStages][kMaxRanks];  // unit + 1 where the row came through the window, else 0
    uint64_t full[kMaxPullStages];                     // the stage's rows have landed
    uint64_t empty[kMaxPullStages];                    // they have been read
    // From the sum warps to the warp that returns slots: unit + 1, back to 0 once it has been taken.
    uint32_t returned[kMaxPullStages][kMaxRanks];
    uint32_t num_stages_over;
};

class LoadWarp {
public:
    __device__ LoadWarp(const CombineArgs& args, const WaitContext& context, const Handshake& handshake, Pipeline& pipeline, uint8_t* ring, int warp)
        : args_(args), context_(context), handshake_(handshake), pipeline_(pipeline), ring_(ring), lane_(threadIdx.x % 32), rank_(lane_ % kMaxRanks),
          grant_(handshake.grants[rank_]) {
        base_ = first_row_of(args, rank_);
        is_ring_ = rank_ != args.domain.rank && grant_.is_staged;
        if (rank_ != args.domain.rank && grant_.is_relayed) here_until_ = 0;
        num_units_ = units_per_row(args);
        stage_ = first_stage_ = warp;
        num_parts_ = args.parts.num_parts + (handshake.has_staged && args.num_topk > 0 ? 1 : 0);
    }

    // Tokens in the order of their claims; the next claim and the next token's rows are looked up one token ahead.
    __device__ void run() {
        ptx::fence_async_global();  // READY, acquired by this block, permits the bulk loads below
        // Where a window has to be emptied in order, a token must not belong to a block that is not running yet: then even the first is claimed.
        const int64_t num_dealt = handshake_.has_staged ? 0 : static_cast<int64_t>(gridDim.x) * args_.num_load_warps;
        if (handshake_.has_staged) claim();
        int64_t token = handshake_.has_staged ? static_cast<int64_t>(__shfl_sync(~0u, claimed_, 0))
                                              : static_cast<int64_t>(first_stage_) * gridDim.x + blockIdx.x;
        claim();
        int32_t row = row_of(token);
        bool is_good = true;
        while (token < args_.num_tokens && is_good) {
            const int64_t next_token = num_dealt + static_cast<int64_t>(__shfl_sync(~0u, claimed_, 0));
            const int32_t next_row = row_of(next_token);
            claim();
            is_good = load_token(token, row);
            token = next_token;
            row = next_row;
        }
        for (int i = first_stage_; i < args_.num_stages; i += args_.num_load_warps) {
            if (lane_ == 0) {
                ptx::mbarrier_wait(pipeline_.empty + stage_, parity_);  // so all loads have landed, too
                pipeline_.items[stage_] = {0, 0, kEndItem, 0, 0};
                ptx::mbarrier_arrive(pipeline_.full + stage_);
            }
            advance();
        }
    }

private:
    __device__ void claim() {
        if (lane_ == 0) claimed_ = ptx::add_relaxed_gpu(&context_.state->pull_claims[kMaxRanks], 1);
    }
    __device__ int32_t row_of(int64_t token) const {
        return token < args_.num_tokens && rank_ < args_.domain.num_ranks ? args_.send_head[token * args_.domain.num_ranks + rank_] : -1;
    }
    __device__ void advance() {
        stage_ += args_.num_load_warps;
        if (stage_ >= args_.num_stages) {
            stage_ = first_stage_;
            parity_ ^= 1;
        }
    }

    __device__ bool load_token(int64_t token, int32_t row) {
        const int64_t num_rows = is_ring_ ? grant_.num_staged_rows : grant_.num_rows;
        const bool is_held = row >= 0 && row < num_rows;
        if (row >= 0 && row >= num_rows && lane_ < kMaxRanks) report_row(context_, handshake_, rank_, row, num_rows);
        if (!wait_relayed(row, is_held && row >= here_until_)) return false;
        const uint32_t mask = __ballot_sync(~0u, is_held) & ((1u << kMaxRanks) - 1);
        // Four parts at a time, because lanes wait for slots side by side: lane = rank + 8 * (part % 4).
        for (int part = 0; part < num_parts_; ++part) {
            if (part % 4 == 0 && handshake_.has_staged && !wait_slots(row, is_held && is_ring_, part)) return false;
            load_part(token, row, part, mask, is_held && lane_ / kMaxRanks == part % 4);
        }
        return true;
    }

    // Tokens, and so rows of one owner, come in ascending order: what is here stays here.
    __device__ bool wait_relayed(int32_t row, bool is_needed) {
        if (is_needed) here_until_ = wait_relayed_row(args_, context_, rank_, row);
        return __all_sync(~0u, !is_needed || here_until_ >= 0);
    }

    __device__ bool wait_slots(int32_t row, bool is_needed, int part) {
        bool is_full = true;
        const int own_part = part + lane_ / kMaxRanks;
        if (is_needed && own_part < num_parts_) {
            const int64_t unit = unit_of(row, own_part);
            const uint64_t* word = slot_word(unit);
            const uint64_t full = signal_word(context_.epoch, static_cast<uint32_t>(unit + 1));
            if (ptx::load_acquire_sys(word) != full) {
                is_full = wait_exact(context_, word, full, Phase::kSlotFull, rank_);
            }
            ptx::fence_async_global();  // FULL, acquired above, permits the bulk load
        }
        return __all_sync(~0u, is_full);
    }
    __device__ int64_t unit_of(int32_t row, int part) const { return (row - base_) * num_units_ + part; }
    __device__ const uint64_t* slot_word(int64_t unit) const {
        const NormalWindow& window = args_.domain.window;
        return window.slot_full(args_.domain.arenas[args_.domain.rank], Op::kCombine, rank_) + unit % window.num_slots;
    }

    // Called by the whole warp; the lanes with `loads` issue one copy each.
    __device__ void load_part(int64_t token, int32_t row, int part, uint32_t mask, bool loads) {
        const bool is_weights = part == args_.parts.num_parts;
        const int num_bytes = is_weights ? args_.num_topk * 4 : args_.parts.num_bytes(part);
        const uint8_t* from = nullptr;
        int num_copied = 0;
        uint32_t shift = 0, slot_number = 0;
        if (loads) {
            if (is_ring_) {
                const int64_t unit = unit_of(row, part);
                const NormalWindow& window = args_.domain.window;
                from = window.staging(args_.domain.arenas[args_.domain.rank], rank_) + unit % window.num_slots * kNumSlotBytes;
                slot_number = static_cast<uint32_t>(unit + 1);
            } else if (is_weights) {
                // A row of weights may start between 16-byte boundaries; the copy starts at the boundary before it.
                const uint8_t* exact = grant_.weights + static_cast<int64_t>(row) * num_bytes;
                shift = reinterpret_cast<uintptr_t>(exact) % 16;
                from = exact - shift;
            } else {
                from = grant_.rows + row * args_.parts.num_row_bytes + args_.parts.begin(part);
            }
            num_copied = static_cast<int>(align_up(num_bytes + shift, 16));
        }
        const int place = __popc(mask & ((1u << rank_) - 1));
        const int num_total = is_weights ? __reduce_add_sync(~0u, num_copied) : __popc(mask) * num_bytes;
        const uint32_t shifts = is_weights ? __reduce_or_sync(~0u, shift / 4 << 2 * place) : 0;
        if (lane_ == 0) ptx::mbarrier_wait(pipeline_.empty + stage_, parity_);
        if (handshake_.has_staged) {
            __syncwarp();
            if (lane_ / kMaxRanks == part % 4) pipeline_.slot_numbers[stage_][rank_] = slot_number;
            __syncwarp();
        }
        if (lane_ == 0) {
            const int64_t offset = is_weights ? token * args_.num_topk : token * args_.parts.num_row_bytes + args_.parts.begin(part);
            pipeline_.items[stage_] = {offset, num_bytes, is_weights ? kWeightsItem : kRowsItem, static_cast<uint8_t>(__popc(mask)),
                                       static_cast<uint16_t>(shifts)};
            ptx::mbarrier_arrive_expect(pipeline_.full + stage_, num_total);
        }
        __syncwarp();
        if (loads) ptx::bulk_load(ring_ + (stage_ * args_.domain.num_ranks + place) * args_.num_stage_row_bytes, from, num_copied, pipeline_.full + stage_);
        advance();
    }

    const CombineArgs& args_;
    const WaitContext& context_;
    const Handshake& handshake_;
    Pipeline& pipeline_;
    uint8_t* ring_;
    const int lane_;
    const int rank_;
    const Grant& grant_;
    int64_t base_;
    int num_units_;
    int num_parts_;
    bool is_ring_;
    int32_t here_until_ = 0x7fffffff;  // rows of this owner before it can be loaded
    uint32_t claimed_ = 0;
    int first_stage_;
    int stage_;
    uint32_t parity_ = 1;  // a fresh barrier counts as completed for parity 1
};

// Every stage has its own warps, so that several stages are summed at once. It has to be its own: stages fill in any order, and a warp that
// came to a stage's use before the use before it had landed would take the barrier's older phase of the same parity for its own.
__device__ void sum_stages(const CombineArgs& args, bool has_staged, Pipeline& pipeline, const uint8_t* ring, int warp) {
    const int num_stage_threads = kNumSumWarps / args.num_stages * 32;
    const int stage = warp * 32 / num_stage_threads;
    if (stage >= args.num_stages) return;
    const int thread = threadIdx.x - stage * num_stage_threads;
    const uint8_t* rows = ring + stage * args.domain.num_ranks * args.num_stage_row_bytes;
    for (uint32_t parity = 0;; parity ^= 1) {
        ptx::mbarrier_wait(pipeline.full + stage, parity);
        const StageItem item = pipeline.items[stage];
        if (item.kind == kEndItem) {
            __syncwarp();
            if (thread == 0) atomicAdd(&pipeline.num_stages_over, 1);
            return;
        }
        // The rows have left the window: its slots go back to their pushers.
        if (has_staged && thread < args.domain.num_ranks && pipeline.slot_numbers[stage][thread] != 0) {
            volatile uint32_t* cell = &pipeline.returned[stage][thread];
            while (*cell != 0) __nanosleep(20);  // the warp beside takes it within microseconds and waits for nobody
            __threadfence_block();
            *cell = pipeline.slot_numbers[stage][thread];
        }
        if (item.kind == kRowsItem) {
            sum_some_rows(item.num_rows, rows, args.num_stage_row_bytes, args.bias_0 == nullptr ? nullptr : args.bias_0 + item.offset,
                          args.bias_1 == nullptr ? nullptr : args.bias_1 + item.offset, args.out + item.offset, thread * 16, num_stage_threads * 16,
                          item.num_bytes);
        } else if (thread < args.num_topk) {
            float sum = 0.0f;
            for (int i = 0; i < item.num_rows; ++i)
                sum = __fadd_rn(sum, reinterpret_cast<const float*>(rows + i * args.num_stage_row_bytes)[(item.shifts >> 2 * i & 3) + thread]);
            args.out_topk_weights[item.offset + thread] = sum;
        }
        // Every reader's own fence, then the arrival: the load warp's next bulk copy into the stage comes after these ordinary reads.
        ptx::fence_async_shared();
        __syncwarp();
        if (threadIdx.x % 32 == 0) ptx::mbarrier_arrive(pipeline.empty + stage);
    }
}

// Tells the pushers which slots are free again. A fence across GPUs takes microseconds, so one warp does it for all stages, as many slots at a
// time as have come up.
__device__ void return_slots(const CombineArgs& args, const WaitContext& context, Pipeline& pipeline) {
    const Domain& domain = args.domain;
    const int rank = threadIdx.x % kMaxRanks;
    while (true) {
        // Lanes read the word apart: they go on together.
        const bool is_over = __all_sync(~0u, *const_cast<volatile uint32_t*>(&pipeline.num_stages_over) == static_cast<uint32_t>(args.num_stages));
        __threadfence_block();  // cells filled before the count went up are seen below
        bool has_any = false;
        for (int stage = threadIdx.x % 32 / kMaxRanks; stage - static_cast<int>(threadIdx.x % 32 / kMaxRanks) < args.num_stages; stage += 32 / kMaxRanks) {
            volatile uint32_t* cell = &pipeline.returned[stage < args.num_stages ? stage : 0][rank];
            const uint32_t number = stage < args.num_stages ? *cell : 0;
            if (number != 0) {
                __threadfence_block();
                *cell = 0;
            }
            if (!__any_sync(~0u, number != 0)) continue;
            has_any = true;
            if (number != 0)
                ptx::store_release_sys(domain.window.slot_free(domain.arenas[rank], Op::kCombine, domain.rank) + (number - 1) % domain.window.num_slots,
                                       signal_word(context.epoch, number));
        }
        if (is_over && !has_any) return;
    }
}
#endif

struct Shared {
    Handshake handshake;
    uint32_t is_last;
#if DEEPEP_HAS_BULK
    Pipeline pipeline;
#endif
    uint64_t staging_barriers[kMaxRanks][kMaxStagingLanes];
};

// The block that finishes last waits until no rank reads this one's rows any more.
__device__ void finish(const CombineArgs& args, const WaitContext& context, Shared& shared) {
    const Domain& domain = args.domain;
    DeviceState* state = context.state;
    __syncthreads();
    if (threadIdx.x == 0) shared.is_last = ptx::add_acq_rel_gpu(&state->arrivals[kCombineOp], 1) == gridDim.x - 1;
    __syncthreads();
    if (!shared.is_last) return;
    if (static_cast<int>(threadIdx.x) < domain.num_ranks) {
        const uint64_t* word = domain.window.done(domain.arenas[domain.rank], Op::kCombine, threadIdx.x);
        uint32_t value = 0;
        // The next writer of y runs behind this kernel: it may overwrite what that peer has read.
        wait_signal<true>(context, word, context.epoch, Phase::kReadDone, threadIdx.x, &value);
    }
    __syncthreads();
    if (threadIdx.x == 0) {
        for (uint32_t& claims : state->push_claims) ptx::store_relaxed_gpu(&claims, 0);
        for (uint32_t& claims : state->pull_claims) ptx::store_relaxed_gpu(&claims, 0);
        ptx::store_relaxed_gpu(&state->arrivals[kCombineOp], 0);
        ptx::store_relaxed_gpu(&state->epochs[kCombineOp], context.epoch);
    }
}

template <int kMaxPushWarpsHere>
__global__ void __launch_bounds__((kFirstPushWarp + kMaxPushWarpsHere) * 32, 1) gather_and_sum_kernel(const __grid_constant__ CombineArgs args) {
    extern __shared__ __align__(128) uint8_t dynamic[];
    __shared__ Shared shared;
    const Domain& domain = args.domain;
    DeviceState* state = domain.state();
    const WaitContext context{domain.host, state, Op::kCombine, domain.rank, ptx::load_relaxed_gpu(&state->epochs[kCombineOp]) + 1};
    const GrantSizes sizes{args.parts.num_row_bytes, 0, 0, args.num_topk * 4, 0};
    const OwnGrant own{args.is_staged ? kKindStaged : args.relay != nullptr ? kKindRelayed : kKindDirect,
                       args.num_recv_tokens,
                       {args.relay != nullptr ? args.relay : const_cast<uint8_t*>(args.y), nullptr, nullptr, reinterpret_cast<uint8_t*>(const_cast<float*>(args.topk_weights)), nullptr},
                       domain.arenas[domain.rank]};
    exchange_grants(domain, context, shared.handshake, sizes, own);
    const bool has_staged = shared.handshake.has_staged;
    // This rank's own rows need no relay. A barrier follows before they are used.
    if (args.relay != nullptr && threadIdx.x == 0) shared.handshake.grants[domain.rank].rows = const_cast<uint8_t*>(args.y);
#if DEEPEP_HAS_BULK
    if (args.use_bulk && threadIdx.x < kMaxPullStages * kMaxRanks) shared.pipeline.returned[threadIdx.x / kMaxRanks][threadIdx.x % kMaxRanks] = 0;
    if (args.use_bulk && threadIdx.x == 0) {
        shared.pipeline.num_stages_over = 0;
        for (int stage = 0; stage < args.num_stages; ++stage) {
            ptx::mbarrier_init(shared.pipeline.full + stage, 1);
            ptx::mbarrier_init(shared.pipeline.empty + stage, kNumSumWarps / args.num_stages);
        }
        ptx::fence_mbarrier_init();
    }
#endif
    __syncthreads();

    const int warp = threadIdx.x / 32;
    const int reader = warp - kNumSumWarps;
    if (warp >= kFirstPushWarp && args.relay != nullptr) {
        if (!shared.handshake.is_failed) relay_rows(args, context, dynamic + (warp - kFirstPushWarp) * kRelayWarpBytes);
    } else if (warp >= kFirstPushWarp) {
        push_own_rows(args, context, shared.handshake, warp - kFirstPushWarp, dynamic, shared.staging_barriers[warp - kFirstPushWarp]);
#if DEEPEP_HAS_BULK
    } else if (args.use_bulk) {
        uint8_t* ring = dynamic + args.num_push_bytes;
        if (reader < 0) {
            sum_stages(args, has_staged, shared.pipeline, ring, warp);
        } else {
            if (reader < args.num_load_warps)
                LoadWarp(args, context, shared.handshake, shared.pipeline, ring, reader).run();
            else if (!has_staged)
                sum_weights(args, shared.handshake, reader - args.num_load_warps, kNumReaderWarps - args.num_load_warps);
            else if (reader == args.num_load_warps)
                return_slots(args, context, shared.pipeline);
            __syncwarp();
            if (threadIdx.x % 32 == 0) end_reading(args, context);
        }
#endif
    }
    if (!args.use_bulk) {
        if (reader < 0) gather_rows_plain(args, context, shared.handshake);
        if (reader >= 0 && reader < kNumReaderWarps && !has_staged) sum_weights(args, shared.handshake, reader, kNumReaderWarps);
        __syncthreads();
        if (threadIdx.x < kNumReaderWarps) end_reading(args, context);
    }
    finish(args, context, shared);
}

}  // namespace

cudaError_t launch_combine(const CombineArgs& args, int num_sms, cudaStream_t stream) {
    const int num_threads = (kFirstPushWarp + args.num_push_warps) * 32;
    if (args.num_push_warps > 0)
        gather_and_sum_kernel<kMaxRanks - 1><<<num_sms, num_threads, args.num_dynamic_bytes, stream>>>(args);
    else
        gather_and_sum_kernel<0><<<num_sms, num_threads, args.num_dynamic_bytes, stream>>>(args);
    return cudaGetLastError();
}

cudaError_t prepare_combine(bool has_bulk) {
    for (const auto kernel : {gather_and_sum_kernel<0>, gather_and_sum_kernel<kMaxRanks - 1>}) {
        cudaFuncAttributes attributes;
        cudaError_t status = cudaFuncGetAttributes(&attributes, kernel);
        const int num_dynamic_bytes = has_bulk ? kMaxSharedBytes - static_cast<int>(attributes.sharedSizeBytes) : kNumRelayWarps * kRelayWarpBytes;
        if (status == cudaSuccess) status = cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, num_dynamic_bytes);
        if (status != cudaSuccess) return status;
    }
    return cudaSuccess;
}

}  // namespace deepep::nvlink
