// Combine across nodes: every token's expert outputs come back and are summed; what crosses between nodes is one partial sum per token and node.
//
// Blocks form teams of a forwarder and a collector, because an SM's loads wait behind its own stores to other GPUs. A block does both alone where it has no team, and where
// its team's collector has not begun when the ranks of the node are ready: whoever is first takes the collecting upon itself (takes_collecting).
//
// Forward warps  partial sums of this node for tokens of other nodes, on request (combine_forward.cuh, combine_direct.cuh).
// Source warps   the own node's partial sums, and the results (combine_source.cuh).
// Request warp   of whoever collects: requests for this rank's tokens, and looks for the answers (combine_requests.cuh). Of a direct forwarder: looks at the requests of others.
//
// Before: the handle of the dispatch says where each token's rows lie (send_rdma_head at the source, send_nvl_head at the forwarder). A local
// rank's rows are read only after its READY was seen; its kernel ends only after all local ranks have said READ_DONE.
// Every slot of a ring is free when the kernel starts and when it ends: the last word of a context comes after its last answer has been
// consumed, so nothing is under way in either ring when both ends have passed it.
// No deadlock: forward warps wait for requests alone and never block on one; source warps take what has been answered; request warps wait for the forwarders
// of their own place, for none before another; block numbers are drawn in the order in which blocks start, so the lowest unfinished place has a forwarder that runs on every
// rank, and whoever collects for it runs. One resident block is enough, and the number of blocks has to be the same on all ranks.
#include "deepep/common/exceptions.hpp"
#include "internode/combine_direct.cuh"
#include "internode/combine_forward.cuh"
#include "internode/combine_source.cuh"
#include "internode/trace.cuh"

namespace deepep::internode {
namespace {

struct Shared {
    nvlink::Handshake handshake;
    int block;
    bool collects;
    uint32_t is_last;
    uint32_t num_posted;  // of the block's queue: requests of others, or own tokens
    uint32_t num_taken;
    int32_t is_queue_over;
    ForwardFacts facts;
    PartialAddends partials[kNumCombineWarps];  // of each warp
};

constexpr int kLastWarp = kNumCombineWarps - kNumRequestWarps;
constexpr int kContextBytes = 24;  // what is kept of each context: the newest word served; its place in the queue; of a slot: blocks asked for, posted, finished (or: an answer waits for its word)
constexpr int kStageItemBytes = 40;  // of a stage: its barrier and what it holds
static_assert(sizeof(ResultPart) + 8 == kStageItemBytes);
#if DEEPEP_HAS_BULK
static_assert(sizeof(AnswerPart) + 8 == kStageItemBytes);
#endif

// Stages of a role: their memory, then what they hold, then their barriers.
template <class Part>
struct RoleStages {
    const StageShape& shape;
    uint8_t* memory;

    __device__ int count() const { return shape.num_warps * shape.num_stages; }
    __device__ uint8_t* end() const { return memory + static_cast<int64_t>(count()) * (shape.num_stage_bytes + kStageItemBytes); }
    __device__ Part* parts(int warp) const { return reinterpret_cast<Part*>(memory + static_cast<int64_t>(count()) * shape.num_stage_bytes) + warp * shape.num_stages; }
    __device__ AddendStages of(int warp) const {
        uint64_t* barriers = reinterpret_cast<uint64_t*>(reinterpret_cast<Part*>(memory + static_cast<int64_t>(count()) * shape.num_stage_bytes) + count());
        return {shape, memory + warp * shape.num_stages * shape.num_stage_bytes, barriers + warp * shape.num_stages};
    }
};

// Dynamic shared memory: stages of whoever forwards directly, and heads of what is asked of it, or of whoever collects, and what that keeps of its slots and
// in its warps; tables of contexts. A block has fewer slots than contexts, or as many.
struct DynamicShared {
    uint8_t* work;
    unsigned long long* served;
    int32_t* order;
    int32_t* asked;
    int32_t* posted;
    int32_t* finished;

    __device__ DynamicShared(const CombineArgs& args, uint8_t* memory)
        : work(memory), served(reinterpret_cast<unsigned long long*>(memory + args.num_work_bytes)), order(reinterpret_cast<int32_t*>(served + args.num_block_contexts)),
          asked(order + args.num_block_contexts), posted(asked + args.num_block_contexts), finished(posted + args.num_block_contexts) {}
};

// The block that finishes last tells the local ranks that this one reads their rows no more, and waits for the same from them.
__device__ void finish(const CombineArgs& args, const WaitContext& context, Shared& shared) {
    const nvlink::Domain& local = args.domain.local;
    DeviceState* state = context.state;
    __syncthreads();
    if (threadIdx.x == 0) shared.is_last = ptx::add_acq_rel_gpu(&state->arrivals[kCombineOp], 1) == gridDim.x - 1;
    __syncthreads();
    if (!shared.is_last) return;
    if (static_cast<int>(threadIdx.x) < local.num_ranks) {
        const int peer = threadIdx.x;
        // The barrier joins the block's loads to this thread, the arrivals those of all blocks.
        ptx::store_release_sys(local.window.done(local.arenas[peer], Op::kCombine, local.rank), signal_word(context.epoch, 1));
        uint32_t value = 0;
        // The next writer of x runs behind this kernel: it may overwrite what that peer has read.
        wait_signal<true>(context, local.window.done(local.arenas[local.rank], Op::kCombine, peer), context.epoch, Phase::kReadDone, peer, &value);
    }
    __syncthreads();
    if (threadIdx.x == 0) {
        ptx::store_relaxed_gpu(&args.domain.state->combine_blocks, 0);
        ptx::store_relaxed_gpu(&state->arrivals[kCombineOp], 0);
        ptx::store_relaxed_gpu(&state->epochs[kCombineOp], context.epoch);
    }
}

}  // namespace

// Not in the unnamed namespace: separate compilation would put this file's name into the kernel's.
__global__ void __launch_bounds__(kNumCombineWarps * 32, 1) forward_and_sum_kernel(const __grid_constant__ CombineArgs args) {
    extern __shared__ __align__(128) uint8_t dynamic[];
    __shared__ Shared shared;
    const nvlink::Domain& local = args.domain.local;
    DeviceState* state = local.state();
    const WaitContext context{local.host, state, Op::kCombine, args.domain.group.rank, ptx::load_relaxed_gpu(&state->epochs[kCombineOp]) + 1};
    const nvlink::GrantSizes sizes{args.message.num_row_bytes, 0, 0, args.num_topk * 4, 0};
    const nvlink::OwnGrant own{kKindDirect,
                               args.num_recv_tokens,
                               {const_cast<uint8_t*>(args.x), nullptr, nullptr, reinterpret_cast<uint8_t*>(const_cast<float*>(args.topk_weights)), nullptr},
                               local.arenas[local.rank]};
    const DynamicShared memory(args, dynamic);
    if (threadIdx.x == 0) {
        shared.block = static_cast<int>(ptx::add_relaxed_gpu(&args.domain.state->combine_blocks, 1));
        const BlockPlaces places = BlockPlaces::of(shared.block, args.has_teams ? 1 : 0);
        shared.collects = places.role == BlockRole::kBoth || (places.role == BlockRole::kDeliverer && takes_collecting(args, context.epoch, places.first));
        shared.num_posted = shared.num_taken = shared.is_queue_over = 0;
        DEEPEP_TRACE(begin_trace());
    }
    shared.facts.find(args);
    for (int i = threadIdx.x; i < args.num_block_contexts; i += blockDim.x) {
        memory.served[i] = 0;
        memory.asked[i] = memory.posted[i] = memory.finished[i] = 0;
    }
    nvlink::exchange_grants(local, context, shared.handshake, sizes, own);  // barriers inside
    DEEPEP_TRACE(if (threadIdx.x % 32 == 0) stamp_last(kCombineHandshakeOver));
    const BlockPlaces places = BlockPlaces::of(shared.block, args.has_teams ? 1 : 0);
    const bool forwards = places.role != BlockRole::kDeliverer;
    // Blocks begin at about the same time: only now is it likely that a collector which runs at all has begun.
    if (places.role == BlockRole::kSender && threadIdx.x == 0) shared.collects = takes_collecting(args, context.epoch, places.first);
    __syncthreads();
    const bool collects = shared.collects, is_direct = forwards && !collects && args.answers_directly;
    const int warp = threadIdx.x / 32;
    const int num_forward_warps = !forwards ? 0 : collects ? args.num_forward_warps : is_direct ? args.forward.num_warps : kLastWarp;
    const int num_source_warps = collects ? static_cast<int>(min_of(args.collect.num_warps, kLastWarp - num_forward_warps)) : 0;
    const int collector = warp - num_forward_warps;
    if (!shared.handshake.is_failed) {
        const BlockContexts contexts{args, context, BlockSlots(args, places.first)};
        const RoleStages<ResultPart> results{args.collect, memory.work};
        SourceScratch* scratch = reinterpret_cast<SourceScratch*>(results.end());
        const WorkQueue queue{memory.order, args.num_block_contexts, &shared.num_posted, &shared.num_taken, &shared.is_queue_over};
        const Collection collection{memory.asked, memory.posted, memory.finished, reinterpret_cast<int32_t*>(scratch + args.collect.num_warps), queue};
#if DEEPEP_HAS_BULK
        const RoleStages<AnswerPart> answers{args.forward, memory.work};
        const RequestTable requests{memory.served, memory.finished, reinterpret_cast<int32_t*>(answers.end()), queue};
#endif
        if (warp == kLastWarp) {
            if (collects) RequestWarp(args, context, collection, contexts.slots).run();
#if DEEPEP_HAS_BULK
            if (is_direct) watch_requests(args, context, shared.facts, contexts, requests);
#endif
            DEEPEP_TRACE(if (threadIdx.x % 32 == 0) stamp_last(kRequestsOver));
        } else if (collector < 0) {
#if DEEPEP_HAS_BULK
            if (is_direct)
                DirectForwardWarp(args, context, shared.handshake, shared.partials[warp], requests, contexts, answers.of(warp), answers.parts(warp)).run();
            else
#endif
                ForwardWarp(args, context, shared.handshake, shared.partials[warp], shared.facts, memory.served, contexts).run();
            DEEPEP_TRACE(if (threadIdx.x % 32 == 0) stamp_last(kForwardingOver));
        } else if (collector < num_source_warps) {
            SourceWarp(args, context, shared.handshake, scratch[collector], collection, contexts.slots, results.of(collector), results.parts(collector)).run();
            DEEPEP_TRACE(if (threadIdx.x % 32 == 0) stamp_last(kCollectingOver));
        }
    }
    finish(args, context, shared);
    DEEPEP_TRACE(if (threadIdx.x == 0) end_trace(shared.block));
}

#if DEEPEP_NVSHMEM_TRACE
cudaError_t copy_combine_traces(BlockTrace* out) { return copy_traces(out); }
#endif

// Stages for rows whose last part has so many bytes behind it, in so many bytes of shared memory for each warp; none, if they do not fit.
StageShape shape_stages(const CombineArgs& args, int num_warps, int num_stages, int num_warp_bytes, int64_t num_tail_bytes) {
    constexpr int kLeastPartBytes = 1024;
    const int64_t max_part_bytes = (num_warp_bytes / num_stages - kStageItemBytes) / 128 * 128 - num_tail_bytes;
    if (max_part_bytes < min_of(kLeastPartBytes, args.message.num_row_bytes)) return {{}, num_warps, 0, 0};
    const RowParts parts = RowParts::cut(args.message.num_row_bytes, max_part_bytes);
    return {parts, num_warps, num_stages, static_cast<int>(align_up(parts.num_part_bytes + num_tail_bytes, 128))};
}

int checked(const char* name, int value, int least, int most) {
    if (value < least || value > most)
        throw ArgumentError(std::string("combine: ") + name + " is " + std::to_string(value) + "; accepted are " + std::to_string(least) + " to " + std::to_string(most) + ".");
    return value;
}

// Words that whoever collects keeps of a slot.
int num_slot_words(const ChunkGeometry& geometry, const Group& group) { return 2 * group.num_nodes() + geometry.num_slot_rows * (group.num_nodes() + group.ranks_per_node); }

// What whoever collects keeps of a block's slots has to leave room for stages: where few SMs serve many small rows, slots have fewer of them, and in the end there are fewer slots.
// The same on all ranks, as it has to be.
void limit_slots(ChunkGeometry& geometry, const Group& group, int num_places) {
    constexpr int64_t kMaxTableBytes = 64 << 10;
    const auto num_bytes = [&] {
        return ceil_div(geometry.num_slots, num_places) * ((group.num_nodes() - 1) * kContextBytes + 4 * num_slot_words(geometry, group));
    };
    while (geometry.num_slot_rows > 1 && num_bytes() > kMaxTableBytes) --geometry.num_slot_rows;
    while (geometry.num_slots > 2 && num_bytes() > kMaxTableBytes) --geometry.num_slots;
}

void shape_combine(CombineArgs& args, const CombineTuning& tuning, int num_shared_bytes, bool has_bulk) {
    constexpr int kUsualForwardWarps = 9, kLeastSourceWarps = 5, kUsualSourceWarps = 7;
    const int num_sms = tuning.num_sms, num_nodes = args.domain.group.num_nodes(), num_ranks = args.domain.group.ranks_per_node;
    if (num_nodes < 2 || num_nodes > kMaxCombineNodes)
        throw ArgumentError("combine: the group has " + std::to_string(num_nodes) + " nodes; accepted are 2 to " + std::to_string(kMaxCombineNodes) + ".");
    args.has_teams = tuning.has_teams.value_or(num_sms > 1);
    args.num_places = BlockPlaces::num_places(num_sms, args.has_teams ? 1 : 0);
    limit_slots(args.geometry, args.domain.group, args.num_places);
    args.num_block_contexts = static_cast<int>(ceil_div(args.geometry.num_slots, args.num_places)) * (num_nodes - 1);
    args.num_slot_words = num_slot_words(args.geometry, args.domain.group);
    const int num_block_slots = static_cast<int>(ceil_div(args.geometry.num_slots, args.num_places));
    // Besides: what the kernel declares, and up to 128 bytes to align what follows it.
    const int num_budget = num_shared_bytes - static_cast<int>(sizeof(Shared)) - 128 - args.num_block_contexts * kContextBytes;
    const int num_slot_bytes = 4 * num_block_slots * args.num_slot_words, num_source_budget = num_budget - num_slot_bytes;
    if (num_source_budget < static_cast<int>(sizeof(SourceScratch)))
        throw ArgumentError("combine: " + std::to_string(num_nodes) + " nodes on " + std::to_string(num_sms) + " SMs need " +
                            std::to_string(num_shared_bytes - num_source_budget + sizeof(SourceScratch)) + " bytes of shared memory; there are " + std::to_string(num_shared_bytes) + ". Use more SMs.");
    const auto chosen = [](int asked, int usual) { return asked != 0 ? asked : usual; };

    // A part of a sum takes a stage for each addend. Fewer warps are better than rows in parts.
    const int num_usual_addends = static_cast<int>(min_of(num_ranks, 4) + min_of(num_nodes - 1, 4));
    const int num_stages = checked("num_source_stages", chosen(tuning.num_source_stages, num_usual_addends), 1, kMaxAddendStages);
    const int num_most_warps = static_cast<int>(min_of(kLastWarp, num_source_budget / static_cast<int>(sizeof(SourceScratch))));
    const auto stages_of = [&](int num_warps) { return shape_stages(args, num_warps, num_stages, num_source_budget / num_warps - static_cast<int>(sizeof(SourceScratch)), 0); };
    int num_usual_warps = has_bulk ? kUsualSourceWarps : kLastWarp;
    for (int num_warps = kUsualSourceWarps; has_bulk && num_warps >= kLeastSourceWarps; --num_warps)
        if (stages_of(num_warps).parts.num_parts == 1) {
            num_usual_warps = num_warps;
            break;
        }
    const int num_source_warps = checked("num_source_warps", chosen(tuning.num_source_warps, static_cast<int>(min_of(num_most_warps, num_usual_warps))), 1, num_most_warps);
    args.collect = has_bulk ? stages_of(num_source_warps) : StageShape{{}, num_source_warps, 0, 0};
    const auto num_stage_bytes = [](const StageShape& shape) { return shape.num_warps * shape.num_stages * (shape.num_stage_bytes + kStageItemBytes); };
    int64_t num_work_bytes = num_stage_bytes(args.collect) + num_source_warps * static_cast<int>(sizeof(SourceScratch)) + num_slot_bytes;

    args.num_forward_warps = checked("num_warps", chosen(tuning.num_warps, kUsualForwardWarps), 1, kLastWarp - 1);
    args.loads_weights = args.num_topk > 0 && args.num_topk % 4 == 0;
    args.forward = {};
    if (args.has_teams && args.domain.has_stores_to_all() && has_bulk && tuning.may_send_directly) {
        const int num_head_bytes = static_cast<int>(align_up(4ll * args.num_block_contexts * args.geometry.num_slot_rows * num_ranks, 16));
        const int num_warps = chosen(tuning.num_warps, num_ranks == 1 ? 14 : 10);
        const int num_stages = checked("num_stages", chosen(tuning.num_stages, num_ranks + 1), num_ranks, kMaxAddendStages);
        args.forward = shape_stages(args, num_warps, num_stages, (num_budget - num_head_bytes) / num_warps, align_up(4 * args.num_topk, 16));
        num_work_bytes = max_of(num_work_bytes, num_stage_bytes(args.forward) + num_head_bytes);
    }
    args.answers_directly = args.forward.num_stages > 0;
    args.num_work_bytes = static_cast<int>(align_up(num_work_bytes, 16));
    args.num_dynamic_bytes = args.num_work_bytes + args.num_block_contexts * kContextBytes;
}

cudaError_t launch_combine(const CombineArgs& args, int num_sms, cudaStream_t stream) {
    forward_and_sum_kernel<<<num_sms, kNumCombineWarps * 32, args.num_dynamic_bytes, stream>>>(args);
    return cudaGetLastError();
}

cudaError_t prepare_combine(int num_shared_bytes) {
    cudaFuncAttributes attributes;
    const cudaError_t status = cudaFuncGetAttributes(&attributes, forward_and_sum_kernel);
    if (status != cudaSuccess) return status;
    return cudaFuncSetAttribute(forward_and_sum_kernel, cudaFuncAttributeMaxDynamicSharedMemorySize,
                                num_shared_bytes - static_cast<int>(attributes.sharedSizeBytes));
}

}  // namespace deepep::internode
