// Combine across nodes: every token's expert outputs come back and are summed; what crosses between nodes is one partial sum per token and node.
//
// Forward warps  partial sums of this node for tokens of other nodes, on request (combine_forward.cuh, combine_direct.cuh).
// Source warps   the own node's partial sums, and the results (combine_source.cuh).
// Request warp   requests for this rank's tokens.
//
// Before: the handle of the dispatch says where each token's rows lie (send_rdma_head at the source, send_nvl_head at the forwarder). A local
// rank's rows are read only after its READY was seen; its kernel ends only after all local ranks have said READ_DONE.
// Every slot of a ring is free when the kernel starts and when it ends: the last word of a context comes after its last answer has been
// consumed, so nothing is under way in either ring when both ends have passed it.
// No deadlock: forward warps wait for requests alone and never block on one; source warps wait for forward warps of the blocks with their own
// number and for source warps that took earlier tokens; the lowest unfinished block runs on every rank (block numbers are drawn in the order in which blocks start). One resident block is
// enough, and the number of blocks has to be the same on all ranks.
#include "deepep/common/exceptions.hpp"
#include "internode/combine_forward.cuh"
#include "internode/combine_source.cuh"
#include "internode/trace.cuh"

namespace deepep::internode {
namespace {

struct Shared {
    nvlink::Handshake handshake;
    uint32_t block;
    uint32_t is_last;
    int32_t num_taken;
    int32_t num_sources_ended;
    ForwardFacts facts;
    PartialAddends partials[kNumCombineWarps];  // of each warp
};

constexpr int kContextBytes = 16;  // what is kept of each context: the newest word served; blocks asked for, blocks finished

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
    SourceScratch* scratch = reinterpret_cast<SourceScratch*>(dynamic + args.num_forward_warps * args.num_warp_bytes);
    uint64_t* served = reinterpret_cast<uint64_t*>(scratch + args.num_source_warps);
    int32_t* asked = reinterpret_cast<int32_t*>(served + args.num_block_contexts);
    const Collection collection{&shared.num_taken, &shared.num_sources_ended, asked + args.num_block_contexts, asked};
    if (threadIdx.x == 0) {
        shared.block = ptx::add_relaxed_gpu(&args.domain.state->combine_blocks, 1);
        shared.num_taken = shared.num_sources_ended = 0;
        DEEPEP_TRACE(begin_trace());
    }
    shared.facts.find(args);
    // A block has fewer slots than contexts, or as many.
    for (int i = threadIdx.x; i < args.num_block_contexts; i += blockDim.x) {
        served[i] = 0;
        asked[i] = collection.finished[i] = 0;
    }
    nvlink::exchange_grants(local, context, shared.handshake, sizes, own);  // barriers inside
    DEEPEP_TRACE(if (threadIdx.x % 32 == 0) stamp_last(kCombineHandshakeOver));
    if (!shared.handshake.is_failed) {
        const BlockSlots slots(static_cast<int>(shared.block), args.geometry.num_slots);
        const int warp = threadIdx.x / 32;
        if (warp < args.num_forward_warps) {
            ForwardWarp(args, context, shared.handshake, shared.partials[warp], dynamic + warp * args.num_warp_bytes, shared.facts,
                        served, slots)
                .run();
            DEEPEP_TRACE(if (threadIdx.x % 32 == 0) stamp_last(kForwardingOver));
        } else if (warp < args.num_forward_warps + args.num_source_warps) {
            SourceWarp(args, context, shared.handshake, scratch[warp - args.num_forward_warps], shared.partials[warp], collection, slots).run();
            DEEPEP_TRACE(if (threadIdx.x % 32 == 0) stamp_last(kCollectingOver));
        } else {
            make_requests(args, context, collection, slots);
            DEEPEP_TRACE(if (threadIdx.x % 32 == 0) stamp_last(kRequestsOver));
        }
    }
    finish(args, context, shared);
    DEEPEP_TRACE(if (threadIdx.x == 0) end_trace(static_cast<int>(shared.block)));
}

#if DEEPEP_NVSHMEM_TRACE
cudaError_t copy_combine_traces(BlockTrace* out) { return copy_traces(out); }
#endif

// A stage for each forward warp, and how rows are cut to fit into it, in so many bytes of shared memory.
void shape_stages(CombineArgs& args, int num_shared_bytes) {
    constexpr int kLeastPartBytes = 1024;
    const int64_t num_tail_bytes = args.message.num_bytes() - args.message.num_row_bytes;  // behind the last part
    const int num_head_bytes = args.geometry.num_slot_rows * 4 * kMaxNodeRanks;
    const int64_t max_part_bytes = (num_shared_bytes / args.num_forward_warps - num_head_bytes) / 128 * 128 - 128 - num_tail_bytes;
    if (max_part_bytes < min_of(kLeastPartBytes, args.message.num_row_bytes)) {
        args.domain.nodes_stored_to = 0;
        return;
    }
    args.parts = RowParts::cut(args.message.num_row_bytes, max_part_bytes);
    args.num_stage_bytes = static_cast<int>(align_up(args.parts.num_part_bytes + num_tail_bytes, 128));
    args.num_warp_bytes = static_cast<int>(align_up(args.num_stage_bytes + num_head_bytes, 128));
    args.num_dynamic_bytes += args.num_forward_warps * args.num_warp_bytes;
}

void shape_combine(CombineArgs& args, const CombineTuning& tuning, int num_shared_bytes) {
    const int num_sms = tuning.num_sms, num_warps = tuning.num_warps;
    const int num_nodes = args.domain.group.num_nodes();
    if (num_nodes < 2 || num_nodes > kMaxCombineNodes)
        throw ArgumentError("combine: the group has " + std::to_string(num_nodes) + " nodes; accepted are 2 to " + std::to_string(kMaxCombineNodes) + ".");
    constexpr int kNumSummingWarps = kNumCombineWarps - kNumRequestWarps;
    if (!tuning.may_send_directly) args.domain.nodes_stored_to = 0;
    const bool sends_directly = args.domain.nodes_stored_to != 0;
    args.num_stage_bytes = args.num_warp_bytes = 0;
    // Where a node has one rank nothing is pulled, and puts out of the ring decide.
    const int usual = args.domain.group.ranks_per_node == 1 && !sends_directly ? 14 : 10;
    args.num_forward_warps = num_warps > 0 ? num_warps : usual;
    if (args.num_forward_warps >= kNumSummingWarps)
        throw ArgumentError("combine: num_warps is " + std::to_string(num_warps) + "; accepted are 1 to " + std::to_string(kNumSummingWarps - 1) +
                            " forward warps.");
    args.num_source_warps = kNumSummingWarps - args.num_forward_warps;
    args.num_block_contexts = static_cast<int>(ceil_div(args.geometry.num_slots, max_of(1, num_sms))) * (num_nodes - 1);
    args.num_dynamic_bytes = args.num_source_warps * static_cast<int>(sizeof(SourceScratch)) + args.num_block_contexts * kContextBytes;
    if (args.num_dynamic_bytes > kMaxPlainSharedBytes)
        throw ArgumentError("combine: " + std::to_string(num_nodes) + " nodes on " + std::to_string(num_sms) + " SMs need " +
                            std::to_string(args.num_dynamic_bytes) + " bytes of shared memory; there are " + std::to_string(kMaxPlainSharedBytes) + ". Use more SMs.");
    // Besides: what the kernel declares, and up to 128 bytes to align what follows it.
    if (sends_directly) shape_stages(args, num_shared_bytes - static_cast<int>(sizeof(Shared)) - 128 - args.num_dynamic_bytes);
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
