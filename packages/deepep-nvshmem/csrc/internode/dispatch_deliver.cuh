#pragma once
// Dispatch, delivering: a warp brings rows (from the receive rings, or own ones) to the ranks of this node.
#include "internode/dispatch_rows.cuh"
#include "internode/stages.cuh"
#include "internode/trace.cuh"

namespace deepep::internode {
namespace {

constexpr unsigned kIdleNs = 50;  // between looks at the block's queue

#if DEEPEP_HAS_BULK
class DeliverWarp {
public:
    __device__ DeliverWarp(const DispatchArgs& args, const WaitContext& context, const nvlink::Handshake& handshake, const Delivery& delivery, RowQueue& queue, StageRing& ring)
        : args_(args), context_(context), handshake_(handshake), delivery_(delivery), queue_(queue), ring_(ring), lane_(threadIdx.x % 32) {}

    __device__ void fill() {
        Item item;
        while (ring_.num_in_flight < args_.num_stages - 1) {
            const bool has_item = queue_.next(item);
            DEEPEP_TRACE(if (lane_ == 0) spans_.spend(kFinding));
            if (!has_item) return;
            load(item);
            DEEPEP_TRACE(if (lane_ == 0) spans_.spend(kLoading));
        }
    }

    __device__ void run() {
        if (lane_ == 0) ptx::fence_async_global();  // READY, acquired by this block, permits the bulk stores below
        if (handshake_.is_failed) queue_.abandon();
        while (true) {
            fill();
            if (ring_.num_in_flight > 0)
                deliver();
            else if (queue_.is_over())
                break;
            else
                __nanosleep(kIdleNs);
            DEEPEP_TRACE(if (lane_ == 0) spans_.spend(kIdling));
        }
        if (lane_ == 0) ptx::bulk_wait<0>();  // all rows have landed, visibly to this thread: the block's release may vouch for them
        __syncwarp();
    }

private:
    __device__ void load(const Item& item) {
        constexpr int kHeadBytes = 4 * kMaxNodeRanks;
        const bool is_own = item.side == nullptr, is_whole = args_.parts.num_parts == 1;
        uint8_t* stage = ring_.stage_to_load();
        // The stage was emptied one delivery before the newest at least.
        if (lane_ == 0) ptx::bulk_wait_read<1>();
        if ((is_own && args_.writes_own_side) || (args_.message.is_cached && !args_.loads_heads)) {
            __syncwarp();
            write_side(item, is_own, stage);
        }
        if (lane_ == 0) {
            uint64_t* barrier = ring_.barrier_to_load();
            const int num_bytes = is_whole ? static_cast<int>(args_.parts.num_row_bytes) : args_.parts.num_bytes(item.part);
            const int num_side_bytes = is_own ? args_.num_own_side_bytes : args_.num_sent_side_bytes;
            ring_.item_to_load().to_deliver = {item.forward_row, item.src_rank, item.part, item.credited, item.chunk};
            ptx::mbarrier_arrive_expect(barrier, num_bytes + num_side_bytes + (args_.loads_heads ? kHeadBytes : 0));
            // A message's side part lies behind its row, there and here.
            const bool is_joined = is_whole && !is_own;
            ptx::bulk_load(stage, item.row, is_joined ? num_bytes + num_side_bytes : num_bytes, barrier);
            if (!is_joined && num_side_bytes > 0)
                ptx::bulk_load(stage + args_.stage_side, is_own ? reinterpret_cast<const uint8_t*>(args_.scales + item.token * args_.scales_stride_token) : item.side,
                               num_side_bytes, barrier);
            if (args_.loads_heads)
                ptx::bulk_load(stage + args_.stage_side + args_.side.heads, args_.send_nvl_head + static_cast<int64_t>(item.forward_row) * kMaxNodeRanks, kHeadBytes, barrier);
        }
        ring_.loaded();
    }

    // What of an item's side part is not loaded in bulk. A warp barrier comes before its readers.
    __device__ void write_side(const Item& item, bool is_own, uint8_t* stage) const {
        if (is_own) {
            SidePart(args_, args_.node, item.token, !args_.loads_scales).store(stage + args_.stage_side);
            if (args_.stores_scales && !args_.loads_scales) ptx::fence_async_shared();  // these ordinary writes are read by a bulk store
        }
        if (args_.message.is_cached && !args_.loads_heads) build_cached_heads(args_, item, stage);
        __syncwarp();
    }

    __device__ void deliver() {
        const uint8_t* stage = ring_.wait_for_stage();
        DEEPEP_TRACE(if (lane_ == 0) spans_.spend(kAwaiting));
        const ToDeliver& item = ring_.item_to_take().to_deliver;
        if (lane_ == 0) {
            store_row(item, stage);
            if (item.credited >= 0) ask_for_credit(delivery_, item.credited, item.chunk);
        }
        if (args_.stores_side) {
            __syncwarp();  // the item, and the side part of an own row, are there for all lanes
            if (item.part == 0) deliver_side(args_, handshake_, item.src_rank, item.forward_row, stage);
        }
        DEEPEP_TRACE(if (lane_ == 0) stamp_first(kRowDelivered), stamp_last(kRowDelivered), count_moved(kMovedByReceivers));
        ptx::fence_async_shared();  // these ordinary reads come before the next bulk load into the stage
        __syncwarp();  // all lanes have seen this phase of the stage's mbarrier
        ring_.taken();
        DEEPEP_TRACE(if (lane_ == 0) spans_.spend(kPassing));
    }

    // By one thread.
    __device__ void store_row(const ToDeliver& item, const uint8_t* stage) const {
        const int num_ranks = args_.message.num_heads, num_scale_bytes = args_.message.num_scales * 4;
        const int64_t begin = args_.parts.begin(item.part);
        const int num_bytes = args_.parts.num_parts == 1 ? static_cast<int>(args_.parts.num_row_bytes) : args_.parts.num_bytes(item.part);
        bool has_bad = false;
        // The next local rank first, itself last, so that not all ranks store to the same one.
        int local_rank = args_.domain.local.rank;
        for (int i = 0; i < num_ranks; ++i) {
            local_rank = local_rank + 1 == num_ranks ? 0 : local_rank + 1;
            const nvlink::Grant& grant = handshake_.grants[local_rank];
            const int32_t head = staged_heads(args_, stage)[local_rank];
            if (static_cast<uint32_t>(head) >= static_cast<uint32_t>(grant.num_rows)) {
                has_bad = has_bad || head >= 0;
                continue;
            }
            ptx::bulk_store(grant.rows + head * args_.parts.num_row_bytes + begin, stage, num_bytes);
            if (args_.stores_scales && item.part == 0) ptx::bulk_store(grant.scales + static_cast<int64_t>(head) * num_scale_bytes, stage + args_.stage_side, num_scale_bytes);
        }
        ptx::bulk_commit();
        if (has_bad) check_destinations(args_, context_, handshake_, stage);
    }

    const DispatchArgs& args_;
    const WaitContext& context_;
    const nvlink::Handshake& handshake_;
    const Delivery& delivery_;
    RowQueue& queue_;
    StageRing& ring_;
    const int lane_;
    DEEPEP_TRACE(SpanClock spans_;)
};
#endif

// The same without bulk copies: a warp per row, several 16-byte loads in flight, the side part in shared memory.
__device__ void deliver_row_plain(const DispatchArgs& args, const WaitContext& context, const nvlink::Handshake& handshake, const Delivery& delivery, const Item& item,
                                  uint8_t* side) {
    constexpr int kUnroll = 4;
    const DispatchMessage& message = args.message;
    const int lane = threadIdx.x % 32;
    const bool has_scales = message.num_scales > 0;
    if (item.side == nullptr)
        SidePart(args, args.node, item.token, has_scales).store(side);
    else
        for (int byte = lane * 16; byte < message.num_sent_side_bytes(); byte += 32 * 16)
            *reinterpret_cast<int4*>(side + byte) = *reinterpret_cast<const int4*>(item.side + byte);
    if (message.is_cached) build_cached_heads(args, item, side);
    __syncwarp();
    if (lane == 0) check_destinations(args, context, handshake, side);
    const int4* source = reinterpret_cast<const int4*>(item.row);
    const int num_vectors = static_cast<int>(args.parts.num_row_bytes / 16);
    for (int base = lane; base - lane < num_vectors; base += 32 * kUnroll) {
        int4 vectors[kUnroll];
#pragma unroll
        for (int u = 0; u < kUnroll; ++u)
            if (base + u * 32 < num_vectors) vectors[u] = source[base + u * 32];
        for (int local_rank = 0; local_rank < message.num_heads; ++local_rank) {
            const int64_t row = destination(args, handshake, side, local_rank);
            if (row < 0) continue;
            int4* target = reinterpret_cast<int4*>(handshake.grants[local_rank].rows + row * args.parts.num_row_bytes);
#pragma unroll
            for (int u = 0; u < kUnroll; ++u)
                if (base + u * 32 < num_vectors) target[base + u * 32] = vectors[u];
        }
    }
    deliver_side(args, handshake, item.src_rank, item.forward_row, side);
    __syncwarp();  // all lanes have read the message and the side part
    if (item.credited >= 0 && lane == 0) ask_for_credit(delivery, item.credited, item.chunk);
}

__device__ void deliver_rows_plain(const DispatchArgs& args, const WaitContext& context, const nvlink::Handshake& handshake, const Delivery& delivery, RowQueue& queue,
                                   uint8_t* side) {
    if (handshake.is_failed) return;
    while (true) {
        Item item;
        if (queue.next(item))
            deliver_row_plain(args, context, handshake, delivery, item, side);
        else if (queue.is_over())
            return;
        else
            __nanosleep(kIdleNs);
    }
}

}  // namespace
}  // namespace deepep::internode
