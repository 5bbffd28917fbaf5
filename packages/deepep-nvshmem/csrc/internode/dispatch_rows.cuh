#pragma once
// Dispatch, delivering: which rows a warp takes next, and where they go.
//
// A deliver warp takes rows from two places: chunks that have arrived from other nodes, which the arrival warp posts (dispatch_arrivals.cuh), and, while none is
// there, this rank's own rows for its own node, which the GPU's deliver warps share out among themselves.
//   CREDIT {epoch, chunk + 1}  forwarder -> sender, after the last load of the chunk has landed. One warp of the block gives all credits back: its
//                              fence waits for what the whole SM has under way, which would hold up a deliver warp.
#include "deepep/ptx/bulk.cuh"
#include "internode/dispatch_arrivals.cuh"
#include "internode/dispatch_side.cuh"
#include "internode/dispatch_streams.cuh"
#include "internode/network.cuh"
#include "internode/trace.cuh"
#include "kernels/handshake.cuh"

namespace deepep::internode {
namespace {

// One row, or part of one, on its way to the ranks of this node.
struct Item {
    const uint8_t* row;    // the part
    const uint8_t* side;   // of a row from another node; null: an own row
    int32_t token;         // of an own row
    int32_t forward_row;   // its row of send_nvl_head
    int32_t src_rank;
    int32_t part;
    int32_t credited;      // the chunk's last item: its context, else -1
    int32_t chunk;
};

// What the deliver warps of a block share, in shared memory.
struct Delivery {
    int32_t* credits;         // of each context: chunk + 1 whose loads have landed
    int32_t* num_warps_left;  // that may still ask for credits
};

class RowQueue {
public:
    static constexpr int kNoLimit = 0x7FFFFFFF;

    __device__ RowQueue(const DispatchArgs& args, const WaitContext& context, const BlockContexts& contexts, const Arrivals& arrivals, const StreamShape* sent, const StreamShape* received)
        : args_(args), context_(context), contexts_(contexts), arrivals_(arrivals), received_(received), lane_(threadIdx.x % 32) {
        num_own_items_ = static_cast<uint32_t>(min_of(sent[args.node].num_rows, received[args.node].num_rows)) * static_cast<uint32_t>(args.parts.num_parts);
    }

    // Claims the first own rows. `warp`: its number among the block's deliver warps.
    __device__ void begin(int warp) {
        next_own_ = contexts_.places.first * args_.num_deliver_warps + warp;
        claim();
        if (has_teams()) {  // not every block delivers, so no row is dealt to it
            next_own_ = __shfl_sync(~0u, claimed_, 0);
            claim();
        }
        ask_for_token();
        takes_chunks_ = true;
    }

    // The same for own rows alone, so many at most.
    __device__ void begin_own_rows(int most) {
        claims_left_ = most;
        claim();
        next_own_ = __shfl_sync(~0u, claimed_, 0);
        claim();
        ask_for_token();
        takes_chunks_ = false;
    }

    // Uniform over the warp. False: nothing to take now.
    __device__ bool next(Item& item) {
        if (rows_left_ == 0 && takes_chunks_) take_chunk();
        if (rows_left_ > 0)
            take_forwarded(item);
        else if (next_own_ < num_own_items_)
            take_own(item);
        else
            return false;
        return true;
    }
    // Own rows alone: whether some may be left behind the last one that was taken.
    __device__ bool may_leave_rows() const { return next_own_ == kNone; }
    __device__ bool is_over() const { return rows_left_ == 0 && !takes_chunks_ && next_own_ >= num_own_items_; }
    // Takes nothing any more, and drops what it has claimed.
    __device__ void abandon() {
        rows_left_ = 0;
        takes_chunks_ = false;
        next_own_ = kNone;
    }

private:
    static constexpr uint32_t kNone = 0xFFFFFFFF;

    __device__ bool has_teams() const { return args_.num_team_senders > 0; }

    __device__ void take_chunk() {
        const int32_t why_ended = arrivals_.queue.has_ended();
        const int index = arrivals_.queue.take();
        if (index >= 0) {
            begin_chunk(index);
        } else if (why_ended != 0) {
            takes_chunks_ = false;
            if (why_ended == Arrivals::kRelieved) claims_left_ = 0;  // what it has claimed it delivers
        }
    }
    __device__ void begin_chunk(int index) {
#if DEEPEP_HAS_BULK
        if (lane_ == 0) ptx::fence_async_global();  // FULL, acquired by the arrival warp and joined by the queue, permits bulk loads
#endif
        const int node = contexts_.node_of(index);
        const StreamShape& stream = received_[node];
        credited_ = index;
        credited_chunk_ = arrivals_.chunks[index];
        const int first = credited_chunk_ * stream.num_chunk_rows;
        rows_left_ = static_cast<int>(min_of(stream.num_chunk_rows, stream.num_rows - first));
        part_ = 0;
        src_rank_ = args_.peer_of(node);
        forward_row_ = stream.first_row + first;
        message_ = args_.slot_in(args_.receive_rings, args_.node, node, contexts_.slot_of(index));
    }

    __device__ void take_forwarded(Item& item) {
        const bool is_last_part = part_ + 1 == args_.parts.num_parts;
        item = {message_ + args_.parts.begin(part_), message_ + args_.message.side_offset(), 0, forward_row_, src_rank_, part_,
                is_last_part && rows_left_ == 1 ? credited_ : -1, credited_chunk_};
        ++part_;
        if (!is_last_part) return;
        part_ = 0;
        --rows_left_;
        ++forward_row_;
        message_ += args_.geometry.num_message_bytes;
    }

    // The first rows are dealt out, the others claimed. The claim is sent two rows ahead of its use and the token asked for one row ahead, so that their
    // ways to the L2 cache and back cost nothing.
    __device__ void ask_for_token() {
        const uint32_t row = args_.parts.num_parts == 1 ? next_own_ : next_own_ / args_.parts.num_parts;
        if (next_own_ < num_own_items_) listed_ = args_.tokens_to_node[args_.node * args_.num_tokens + row];
    }
    __device__ void claim() {
        if (claims_left_ == 0) {
            claimed_ = kNone;
            return;
        }
        --claims_left_;
        if (lane_ == 0) claimed_ = ptx::add_relaxed_gpu(&args_.domain.state->own_rows, 1);
    }
    __device__ void take_own(Item& item) {
        const uint32_t row = args_.parts.num_parts == 1 ? next_own_ : next_own_ / args_.parts.num_parts;
        const int part = static_cast<int>(next_own_ - row * args_.parts.num_parts);
        int64_t token = static_cast<uint32_t>(listed_);
        if (token >= args_.num_tokens) {
            if (lane_ == 0) report_error(context_, ErrorKind::kLayoutMismatch, Phase::kRows, args_.domain.group.rank, static_cast<uint64_t>(token), args_.num_tokens, 0);
            token = 0;
        }
        item = {args_.x + token * args_.parts.num_row_bytes + args_.parts.begin(part), nullptr, static_cast<int32_t>(token),
                static_cast<int32_t>(received_[args_.node].first_row + row), args_.domain.group.rank, part, -1, 0};
        const uint32_t claimed = __shfl_sync(~0u, claimed_, 0);
        next_own_ = claimed == kNone ? kNone : claimed + (has_teams() ? 0 : args_.num_places * args_.num_deliver_warps);
        ask_for_token();
        claim();
    }

    const DispatchArgs& args_;
    const WaitContext& context_;
    const BlockContexts& contexts_;
    const Arrivals& arrivals_;
    const StreamShape* received_;
    const int lane_;
    uint32_t num_own_items_;
    uint32_t next_own_ = kNone;
    int32_t listed_ = -1;  // the token of next_own_
    uint32_t claimed_ = kNone;
    int claims_left_ = kNoLimit;  // of own rows
    bool takes_chunks_ = false;
    // the chunk whose rows are being taken
    int rows_left_ = 0;
    int part_ = 0;
    int credited_ = 0;  // its context
    int credited_chunk_ = 0;
    int src_rank_ = 0;
    int forward_row_ = 0;
    const uint8_t* message_ = nullptr;
};

// The destination rows of the row in a stage, by local rank.
__device__ __forceinline__ const int32_t* staged_heads(const DispatchArgs& args, const uint8_t* stage) {
    return reinterpret_cast<const int32_t*>(stage + args.stage_side + args.side.heads);
}

// In a cached dispatch heads come from the handle.
__device__ inline void build_cached_heads(const DispatchArgs& args, const Item& item, uint8_t* stage) {
    const int lane = threadIdx.x % 32;
    if (lane < args.message.num_heads)
        reinterpret_cast<int32_t*>(stage + args.stage_side + args.side.heads)[lane] = args.send_nvl_head[static_cast<int64_t>(item.forward_row) * kMaxNodeRanks + lane];
}

// The destination row at a rank of this node, or -1.
__device__ __forceinline__ int32_t destination(const DispatchArgs& args, const nvlink::Handshake& handshake, const uint8_t* stage, int local_rank) {
    const int32_t head = staged_heads(args, stage)[local_rank];
    return static_cast<uint32_t>(head) < static_cast<uint32_t>(handshake.grants[local_rank].num_rows) ? head : -1;
}

// By one thread: a record of a destination row that does not fit.
__device__ inline void check_destinations(const DispatchArgs& args, const WaitContext& context, const nvlink::Handshake& handshake, const uint8_t* stage) {
    if (handshake.is_failed) return;
    for (int local_rank = 0; local_rank < args.message.num_heads; ++local_rank) {
        const int32_t head = staged_heads(args, stage)[local_rank];
        const int64_t num_rows = handshake.grants[local_rank].num_rows;
        if (head >= num_rows) report_error(context, ErrorKind::kOverflow, Phase::kRows, args.node * args.message.num_heads + local_rank, head, num_rows, 0);
    }
}

// What lanes store of a row: its choices, its weights, where it comes from; scales only if bulk stores do not.
__device__ inline void deliver_side(const DispatchArgs& args, const nvlink::Handshake& handshake, int src_rank, int32_t forward_row, const uint8_t* stage) {
    const DispatchMessage& message = args.message;
    const int lane = threadIdx.x % 32, num_topk = message.num_topk, num_ranks = message.num_heads;
    int32_t expert = -1;
    float weight = 0.0f;
    if (lane < num_topk) {
        expert = reinterpret_cast<const int32_t*>(stage + args.stage_side + args.side.topk_idx)[lane];
        weight = reinterpret_cast<const float*>(stage + args.stage_side + args.side.weights)[lane];
    }
    for (int local_rank = 0; local_rank < num_ranks; ++local_rank) {
        const int64_t row = destination(args, handshake, stage, local_rank);
        if (row < 0) continue;
        const nvlink::Grant& grant = handshake.grants[local_rank];
        if (lane < num_topk) {
            const int64_t local_expert = localise_expert(expert, args.node * num_ranks + local_rank, args.num_local_experts);
            reinterpret_cast<int64_t*>(grant.topk_idx)[row * num_topk + lane] = local_expert;
            reinterpret_cast<float*>(grant.weights)[row * num_topk + lane] = local_expert < 0 ? 0.0f : weight;
        }
        if (lane == 0 && !message.is_cached)
            reinterpret_cast<int2*>(grant.src_idx)[row] = make_int2(src_rank, *reinterpret_cast<const int32_t*>(stage + args.stage_side + args.side.token));
        if (!args.stores_scales)
            for (int col = lane; col < message.num_scales; col += 32)
                reinterpret_cast<uint32_t*>(grant.scales)[row * message.num_scales + col] = reinterpret_cast<const uint32_t*>(stage + args.stage_side)[col];
    }
    if (!message.is_cached && lane < kMaxNodeRanks)
        args.send_nvl_head[static_cast<int64_t>(forward_row) * kMaxNodeRanks + lane] =
            lane < num_ranks ? staged_heads(args, stage)[lane] : -1;
}

// By one thread, once the chunk's loads have landed and the warp knows: hands the credit to the warp that gives credits back.
__device__ inline void ask_for_credit(const Delivery& delivery, int index, int32_t chunk) {
    DEEPEP_TRACE(begin_span(index));
    __threadfence_block();  // joins the loads to that warp's fence
    poke(delivery.credits + index, chunk + 1);
}

// Gives credits back until the block's deliver warps have ended. `returned`: of each context, zero at the start. Where two blocks deliver for a place, the
// credit of each chunk comes from the one that took it; the next chunk of the context follows it, so there is one at a time. `look`: what it does besides, on
// every pass.
template <class Look>
__device__ void return_credits(const DispatchArgs& args, const WaitContext& context, const BlockContexts& contexts, const Delivery& delivery, int32_t* returned, const Look& look) {
    constexpr unsigned kIdleNs = 100;
    const int lane = threadIdx.x % 32, count = contexts.count();
    while (true) {
        // Read first: what was asked for before the last warp ended is seen below.
        const bool is_last_pass = peek_as_warp(delivery.num_warps_left) == 0;
        __threadfence_block();
        look();
        bool has_returned = false;
        for (int base = 0; base < count; base += 32) {
            const int index = base + lane;
            const int32_t due = index < count ? peek(delivery.credits + index) : 0;
            const bool is_due = index < count && due != returned[index];
            if (!__any_sync(~0u, is_due)) continue;
            has_returned = true;
            ptx::fence_acq_rel_sys();  // the loads of the chunks stay before the words that let the senders overwrite them
            if (is_due) {
                returned[index] = due;
                DEEPEP_TRACE(end_span(index, kCreditHeld));
                network::set_word(args.credit_words + args.node * kMaxSlots + contexts.slot_of(index), chunk_word(context.epoch, due - 1),
                                  args.peer_of(contexts.node_of(index)));
            }
        }
        if (is_last_pass) return;
        if (!has_returned) __nanosleep(kIdleNs);
    }
}

}  // namespace
}  // namespace deepep::internode
