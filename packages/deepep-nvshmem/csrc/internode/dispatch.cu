// Dispatch across nodes: every token's row crosses to each other node once, to the rank there with the sender's local number, which stores it to
// the ranks of its node that hold the token's experts; rows for the own node are stored there directly. All land in their final place.
//
// On many SMs blocks form teams, of which one block delivers and the others send (dispatch_streams.cuh says why). On few each block does both.
//
// Send warps      pack rows into the send ring's slots and put the slots to the peers' receive rings (dispatch_send.cuh). In a team's sender, deliver
//                 warps that have nothing to deliver bring rows into their stages and put them out of there, if stores reach all peers (dispatch_direct.cuh).
// Deliver warps   bring rows (from the receive rings, or own ones) into shared-memory stages by bulk loads, and empty them by one bulk store per
//                 destination rank; side data by ordinary stores (dispatch_deliver.cuh). Without bulk copies the warp copies.
// Arrival warp    finds the chunks that have come from other nodes, for all deliver warps of its block (dispatch_arrivals.cuh).
// Credit warp     says to the senders which slots are free again. In a sender that puts rows out of its stages it looks at credits; where no warp is to spare it is the arrival warp, too.
// Before: notify (or an earlier dispatch) has said how many rows each stream carries and where they go. No row lands in an output before its
// owner's READY was seen; the kernel ends when this rank's rows are out of its rings and all rows for this rank have arrived.
//
// No deadlock: delivering depends on data and on READY, which every rank posts before it waits for anything; sending depends on delivering
// alone, and neither kind of warp waits for one stream while another can go on.
#include "deepep/ptx/registers.cuh"
#include "internode/dispatch_deliver.cuh"
#include "internode/dispatch_direct.cuh"
#include "internode/dispatch_send.cuh"
#include "internode/stages.cuh"
#include "internode/trace.cuh"
#include "kernels/completion.cuh"

namespace deepep::internode {
namespace {

constexpr int kOp = static_cast<int>(Op::kDispatch);
constexpr int kMaxThreads = kMaxDispatchWarps * 32;

struct Shared {
    nvlink::Handshake handshake;
    DispatchArgs args;  // for calls: there a kernel's parameters are loads through the L1 cache, which is empty whenever a warp has acquired
    uint32_t is_last;
    uint32_t epoch;
    int block;
    bool delivers;
    int num_deliverers_left;
    int num_contexts;
    uint32_t num_posted;  // of the queue of chunks that have come
    uint32_t num_taken;
    int32_t is_queue_over;
};

// Dynamic shared memory: the deliver warps' stages (or side parts), what they hold, the streams, the contexts' chunks.
struct DynamicShared {
    uint8_t* stages;
    uint64_t* barriers;
    StagedItem* items;
    StreamShape* sent;
    StreamShape* received;
    int32_t* next_sent;
    int32_t* credited;
    int32_t* credits;
    int32_t* returned;
    int32_t* arrived;
    int32_t* order;
    ContextPlace* places;

    __device__ DynamicShared(const DispatchArgs& args, uint8_t* memory) {
        const int num_stages = args.num_deliver_warps * args.num_stages, num_nodes = args.domain.group.num_nodes();
        stages = memory;
        barriers = reinterpret_cast<uint64_t*>(stages + static_cast<int64_t>(num_stages) * args.num_stage_bytes);
        sent = reinterpret_cast<StreamShape*>(barriers + align_up(num_stages, 2));
        received = sent + num_nodes;
        items = reinterpret_cast<StagedItem*>(received + num_nodes);
        places = reinterpret_cast<ContextPlace*>(items + num_stages);
        next_sent = reinterpret_cast<int32_t*>(places + args.num_block_contexts);
        credited = next_sent + args.num_block_contexts;
        credits = credited + args.num_block_contexts;
        returned = credits + args.num_block_contexts;
        arrived = returned + args.num_block_contexts;
        order = arrived + args.num_block_contexts;
    }

    __device__ Arrivals arrivals(const DispatchArgs& args, Shared& shared) const {
        return {arrived, {order, args.num_block_contexts, &shared.num_posted, &shared.num_taken, &shared.is_queue_over}};
    }

#if DEEPEP_HAS_BULK
    // Of a deliver warp.
    __device__ StageRing ring(const DispatchArgs& args, int warp) const {
        return {args, stages + static_cast<int64_t>(warp) * args.num_stages * args.num_stage_bytes, barriers + warp * args.num_stages, items + warp * args.num_stages};
    }
#endif
};

#if DEEPEP_HAS_BULK
constexpr uint32_t kMayLeaveRows = 1u << 31;
// Some own rows, `most` or fewer, by a warp of a sender that has nothing else to do; its ring is empty before and after. `place`: where the ring has come to. Returns where it comes
// to, with kMayLeaveRows unless all own rows have been taken.
// A call, and everything else read anew, so that nothing of this takes registers from the loops around it. `args`: in shared memory.
__device__ __noinline__ uint32_t deliver_own_rows(const DispatchArgs& args, uint8_t* memory, Shared& shared, int warp, uint32_t place, int most) {
    DeviceState* state = args.domain.local.state();
    const WaitContext context{args.domain.local.host, state, Op::kDispatch, args.domain.group.rank, shared.epoch};
    const DynamicShared dynamic(args, memory);
    const BlockContexts contexts{args, BlockPlaces::of(shared.block, args.num_team_senders), dynamic.places, shared.num_contexts};
    const Delivery delivery{dynamic.credits, &shared.num_deliverers_left};
    const Arrivals arrivals = dynamic.arrivals(args, shared);
    StageRing ring = dynamic.ring(args, warp);
    ring.go_to(place);
    RowQueue queue(args, context, contexts, arrivals, dynamic.sent, dynamic.received);
    queue.begin_own_rows(most);
    DeliverWarp(args, context, shared.handshake, delivery, queue, ring).run();
    DEEPEP_TRACE(if (threadIdx.x % 32 == 0) stamp_last(kDeliveringOver));
    return ring.place() | (queue.may_leave_rows() ? kMayLeaveRows : 0);
}
#endif

// Worst-case sizes: rows that nobody sends or forwards are marked as such.
__device__ void fill_unused_rows(const DispatchArgs& args, const StreamShape* received) {
    const int64_t num_received = min_of(args.recv_gbl_rank_prefix[args.domain.group.num_ranks - 1], args.capacity);
    const StreamShape& last = received[args.domain.group.num_nodes() - 1];
    const int64_t thread = static_cast<int64_t>(blockIdx.x) * blockDim.x + threadIdx.x;
    const int64_t num_threads = static_cast<int64_t>(gridDim.x) * blockDim.x;
    for (int64_t i = num_received * args.message.num_topk + thread; i < args.capacity * args.message.num_topk; i += num_threads) {
        args.recv_topk_idx[i] = -1;
        args.recv_topk_weights[i] = 0.0f;
    }
    if (args.recv_src_meta == nullptr) return;
    for (int64_t i = num_received * 2 + thread; i < args.capacity * 2; i += num_threads) args.recv_src_meta[i] = -1;
    for (int64_t i = (static_cast<int64_t>(last.first_row) + last.num_rows) * kMaxNodeRanks + thread; i < args.num_forward_capacity * kMaxNodeRanks; i += num_threads)
        args.send_nvl_head[i] = -1;
}

// The block that finishes last leaves the claims as the next operation wants them.
__device__ void finish(const DispatchArgs& args, const WaitContext& context, Shared& shared) {
    if (!nvlink::exchange_done(args.domain.local, context, shared.is_last) || threadIdx.x != 0) return;
    ptx::store_relaxed_gpu(&args.domain.state->dispatch_blocks, 0);
    ptx::store_relaxed_gpu(&args.domain.state->own_rows, 0);
    nvlink::end_operation(context);
}

__global__ void __launch_bounds__(kMaxThreads, 1) dispatch_rows_kernel(const __grid_constant__ DispatchArgs args) {
    extern __shared__ __align__(128) uint8_t memory[];
    __shared__ Shared shared;
    const Domain& domain = args.domain;
    const Group& group = domain.group;
    DeviceState* state = domain.local.state();
    const WaitContext context{domain.local.host, state, Op::kDispatch, group.rank, ptx::load_relaxed_gpu(&state->epochs[kOp]) + 1};
    const DynamicShared dynamic(args, memory);
    if (threadIdx.x == 0) {
        shared.block = static_cast<int>(ptx::add_relaxed_gpu(&domain.state->dispatch_blocks, 1));
        shared.num_deliverers_left = args.num_deliver_warps;
        shared.epoch = context.epoch;
        shared.num_posted = shared.num_taken = shared.is_queue_over = 0;
        DEEPEP_TRACE(begin_trace());
    }
    static_assert(sizeof(DispatchArgs) % 4 == 0);
    for (int i = threadIdx.x; i < static_cast<int>(sizeof(DispatchArgs) / 4); i += blockDim.x)
        reinterpret_cast<uint32_t*>(&shared.args)[i] = reinterpret_cast<const uint32_t*>(&args)[i];
    describe_streams(args, context, dynamic.sent, dynamic.received);
    if (blockIdx.x == 0 && threadIdx.x == 0 && args.recv_gbl_rank_prefix[group.num_ranks - 1] > args.capacity)
        report_error(context, ErrorKind::kOverflow, Phase::kRows, group.rank, args.recv_gbl_rank_prefix[group.num_ranks - 1], args.capacity, 0);
    __syncthreads();
    const BlockPlaces places = BlockPlaces::of(shared.block, args.num_team_senders);
    const int num_contexts = fill_contexts(args, places, dynamic.places);
    if (threadIdx.x == 0) shared.num_contexts = num_contexts;
    const BlockContexts contexts{args, places, dynamic.places, num_contexts};
    const BlockRole role = places.role;
    if (role == BlockRole::kDeliverer && threadIdx.x == 0) ptx::store_relaxed_sys(contexts.deliverer_begun(), signal_word(context.epoch, 1));
    // Each thread its own entries of the table: the barrier follows.
    for (int i = threadIdx.x; i < num_contexts; i += blockDim.x) {
        dynamic.next_sent[i] = contexts.slot_of(i);
        dynamic.credited[i] = dynamic.credits[i] = dynamic.returned[i] = 0;
    }
    __syncthreads();

    const DispatchMessage& message = args.message;
    const nvlink::GrantSizes sizes{args.parts.num_row_bytes, message.num_scales * 4, message.num_topk * 8, message.num_topk * 4, message.is_cached ? 0 : 8};
    const nvlink::OwnGrant own{kKindDirect,
                               args.capacity,
                               {args.recv_x, reinterpret_cast<uint8_t*>(args.recv_scales), reinterpret_cast<uint8_t*>(args.recv_topk_idx),
                                reinterpret_cast<uint8_t*>(args.recv_topk_weights), reinterpret_cast<uint8_t*>(args.recv_src_meta)},
                               domain.local.arenas[domain.local.rank]};
    // The send warps come first: they have nothing to do before the handshake, whose words the first threads post.
    const int warp = threadIdx.x / 32, deliverer = warp - args.num_send_warps;
    const bool is_sender = deliverer < 0, is_deliverer = !is_sender && deliverer < args.num_deliver_warps;
    const Arrivals arrivals = dynamic.arrivals(args, shared);
    const Delivery delivery{dynamic.credits, &shared.num_deliverers_left};
    [[maybe_unused]] uint32_t place = 0;  // where the warp's stages have come to
#if DEEPEP_HAS_BULK
    if (args.use_bulk && is_deliverer) dynamic.ring(args, deliverer).prepare();
#endif
    nvlink::exchange_grants(domain.local, context, shared.handshake, sizes, own);
    DEEPEP_TRACE(if (threadIdx.x % 32 == 0) stamp_last(kHandshakeOver));
    // Blocks begin at about the same time: only now is it likely that a deliverer which runs at all has begun.
    if (warp == 0) shared.delivers = role != BlockRole::kSender || !is_relieved(contexts, context.epoch);
    __syncthreads();
    const bool delivers = shared.delivers;
    const bool sends = (role == BlockRole::kSender || (role == BlockRole::kBoth && is_sender)) && !shared.handshake.is_failed;
    if (is_deliverer) {
        if (delivers) {
            RowQueue queue(args, context, contexts, arrivals, dynamic.sent, dynamic.received);
            queue.begin(deliverer);
#if DEEPEP_HAS_BULK
            if (args.use_bulk) {
                StageRing ring = dynamic.ring(args, deliverer);
                DeliverWarp(args, context, shared.handshake, delivery, queue, ring).run();
                place = ring.place();
            } else
#endif
                deliver_rows_plain(args, context, shared.handshake, delivery, queue, dynamic.stages + static_cast<int64_t>(deliverer) * args.num_stage_bytes);
            DEEPEP_TRACE(if (threadIdx.x % 32 == 0) stamp_last(kDeliveringOver));
        }
        if (threadIdx.x % 32 == 0) {
            __threadfence_block();  // behind what the warp has asked for
            atomicSub(&shared.num_deliverers_left, 1);
        }
        __syncwarp();
    } else if (!is_sender || role == BlockRole::kDeliverer) {
        // A deliverer has warps that send nothing: the first of them looks for chunks. Elsewhere the credit warp does.
        ArrivalWarp arrival_warp(args, context, contexts, arrivals, dynamic.received);
        bool is_looking = delivers && (role == BlockRole::kDeliverer ? warp == 0 : !is_sender);
        if (is_looking && shared.handshake.is_failed) is_looking = arrival_warp.end(Arrivals::kAllPosted);
        const auto look = [&] {
            if (is_looking) is_looking = arrival_warp.look();
        };
        if (is_sender)
            while (is_looking) look();
        else
            return_credits(args, context, contexts, delivery, dynamic.returned, look);
        DEEPEP_TRACE(if (threadIdx.x % 32 == 0) stamp_last(kCreditsOver));
    }
    // In a sender, warps that have nothing more to deliver help to send.
    if (sends) {
        // Worked out anew, so that nothing of it takes registers while rows are delivered.
        const DynamicShared dynamic(args, memory + ptx::unknown_zero());
        const BlockContexts contexts{args, BlockPlaces::of(shared.block, args.num_team_senders), dynamic.places, shared.num_contexts};
#if DEEPEP_HAS_BULK
        StageRing ring = dynamic.ring(args, is_deliverer ? deliverer : 0);
        ring.go_to(place);
        bool may_leave_rows = true;
        const auto help = [&](int most) {
            if (may_leave_rows) {
                const uint32_t place = deliver_own_rows(shared.args, memory, shared, deliverer, ring.place(), most);
                ring.go_to(place & ~kMayLeaveRows);
                may_leave_rows = (place & kMayLeaveRows) != 0;
            }
            return may_leave_rows;
        };
#endif
        // Of a sender that puts rows out of its stages: the word that says so to the warps that would use the ring.
        const uint64_t* relief = nullptr;
#if DEEPEP_HAS_BULK
        if (args.sends_directly && role == BlockRole::kSender) relief = contexts.deliverer_begun();
#endif
        const bool is_direct = relief != nullptr && is_deliverer;
        const SendClaims claims(context, contexts, dynamic.sent, dynamic.next_sent, is_direct ? dynamic.credited : nullptr);
#if DEEPEP_HAS_BULK
        if (is_direct)
            DirectSendWarp(context, contexts, claims, ring).run(help);
        else if (relief != nullptr && !is_sender)
            watch_credits(context, contexts, dynamic.next_sent, dynamic.credited);
        else
#endif
            SendWarp(args, context, claims, relief).run();
        DEEPEP_TRACE(if (threadIdx.x % 32 == 0) stamp_last(kSendingOver));
#if DEEPEP_HAS_BULK
        if (args.use_bulk && is_deliverer && role == BlockRole::kSender) help(RowQueue::kNoLimit);
#endif
    }
    if (args.fill_unused) fill_unused_rows(args, dynamic.received);
    finish(args, context, shared);
    DEEPEP_TRACE(if (threadIdx.x == 0) end_trace(shared.block));
}

}  // namespace

cudaError_t launch_dispatch(const DispatchArgs& args, int num_sms, cudaStream_t stream) {
    const int num_threads = (args.num_deliver_warps + args.num_send_warps + kNumCreditWarps) * 32;
    dispatch_rows_kernel<<<num_sms, num_threads, args.num_dynamic_bytes, stream>>>(args);
    return cudaGetLastError();
}

#if DEEPEP_NVSHMEM_TRACE
cudaError_t copy_dispatch_traces(BlockTrace* out) { return copy_traces(out); }
#endif

cudaError_t prepare_dispatch(bool has_bulk) {
    cudaFuncAttributes attributes;
    const cudaError_t status = cudaFuncGetAttributes(&attributes, dispatch_rows_kernel);
    if (status != cudaSuccess) return status;
    return cudaFuncSetAttribute(dispatch_rows_kernel, cudaFuncAttributeMaxDynamicSharedMemorySize,
                                has_bulk ? nvlink::kMaxSharedBytes - static_cast<int>(attributes.sharedSizeBytes) : kMaxPlainSharedBytes);
}

}  // namespace deepep::internode
