#pragma once
// Dispatch, delivering: which rows a warp takes next, and where they go.
//
// A deliver warp takes rows from two places: chunks that have arrived from other nodes, in the slots that it serves, and, while none is there,
// this rank's own rows for its own node, which the GPU's deliver warps share out among themselves. Who takes a chunk is settled in device memory, because
// two blocks may deliver for one place.
//   FULL   {epoch, chunk + 1}  sender -> forwarder, behind the chunk's bytes. Acquired before the first load of the chunk.
//   CREDIT {epoch, chunk + 1}  forwarder -> sender, after the last load of the chunk has landed. One warp of the block gives all credits back: its
//                              fence waits for what the whole SM has under way, which would hold up a deliver warp.
#include "deepep/ptx/bulk.cuh"
#include "internode/dispatch_side.cuh"
#include "internode/dispatch_streams.cuh"
#include "internode/network.cuh"
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
    __device__ RowQueue(const DispatchArgs& args, const WaitContext& context, const BlockContexts& contexts, const StreamShape* sent, const StreamShape* received)
        : args_(args), context_(context), contexts_(contexts), received_(received), lane_(threadIdx.x % 32) {
        num_own_items_ = static_cast<uint32_t>(min_of(sent[args.node].num_rows, received[args.node].num_rows) * args.parts.num_parts);
    }

    // Claims the first own rows, and looks for chunks. `warp`: its number among the block's deliver warps.
    __device__ void begin(int warp) {
        next_own_ = contexts_.places.first * args_.num_deliver_warps + warp;
        claim();
        if (has_teams()) {  // not every block delivers, so no row is dealt to it
            next_own_ = __shfl_sync(~0u, claimed_, 0);
            claim();
        }
        ask_for_token();
        num_not_over_ = contexts_.count();
        look();
    }

    // The same for own rows alone: chunks are not looked for.
    __device__ void begin_own_rows() {
        claim();
        next_own_ = __shfl_sync(~0u, claimed_, 0);
        claim();
        ask_for_token();
        num_not_over_ = 0;
    }

    // In a sender: whether the team's deliverer has begun. The sender's warps then take nothing any more. Uniform over the warp.
    __device__ bool is_relieved() const { return __shfl_sync(~0u, ptx::load_relaxed_sys(contexts_.deliverer_begun()), 0) == signal_word(context_.epoch, 1); }

    // Uniform over the warp. False: nothing to take now.
    __device__ bool next(Item& item) {
        if (rows_left_ == 0) {
            if (is_claiming_)
                open_chunk();
            else
                choose_chunk();
            if (!is_claiming_) look();
        }
        if (rows_left_ > 0)
            take_forwarded(item);
        else if (next_own_ < num_own_items_)
            take_own(item);
        else
            return false;
        return true;
    }
    __device__ bool is_over() const { return rows_left_ == 0 && num_not_over_ <= 0 && next_own_ >= num_own_items_; }
    // Takes nothing any more, and drops what it has claimed.
    __device__ void abandon() {
        rows_left_ = num_not_over_ = 0;
        next_own_ = kNone;
        is_claiming_ = false;
    }
    __device__ bool has_ended_badly(uint64_t& start_ns) const {
        return is_hopeless(context_, Phase::kWindow, waiting(), start_ns);
    }

private:
    static constexpr uint32_t kNone = 0xFFFFFFFF;
    static constexpr int kRelieved = -1000;

    // Of this lane's contexts, one whose chunk has not come.
    __device__ Waiting waiting() const {
        for (int index = lane_; index < contexts_.count(); index += 32) {
            const int chunk = chunk_of(index, peek(args_.domain.next_chunks + contexts_.entry_of(index)));
            if (chunk < 0) continue;
            const uint64_t seen = ptx::load_relaxed_sys(word_of(index)), expected = chunk_word(context_.epoch, chunk);
            if (seen != expected) return {args_.domain.group.peer_of(contexts_.node_of(index)), seen, expected};
        }
        return {};
    }

    __device__ bool has_teams() const { return args_.num_team_senders > 0; }

    // A chunk is found in three steps, each one row behind the one before, so that the ways to the L2 cache and back cost nothing: look at entries and words,
    // choose a chunk and claim it, open it.
    //
    // Asks for the entries and the words of up to 32 contexts. Both at once: a word stays as it is until its chunk has been credited, so one that was read
    // before its entry is at worst not there yet.
    __device__ void look() {
        if (contexts_.places.role == BlockRole::kSender && is_relieved()) num_not_over_ = kRelieved;
        if (num_not_over_ <= 0) return;
        const int count = contexts_.count();
        looked_from_ = looked_from_ + 32 < count ? looked_from_ + 32 : 0;
        const int index = looked_from_ + lane_;
        if (index >= count) return;
        entry_ = peek(args_.domain.next_chunks + contexts_.entry_of(index));
        seen_ = ptx::load_relaxed_sys(word_of(index));
    }
    __device__ const uint64_t* word_of(int index) const { return contexts_.full_word(index); }
    // The chunk that is expected in a context; -1: none any more. An entry of another operation stands for the first one.
    __device__ int chunk_of(int index, uint64_t entry) const {
        if (index >= contexts_.count()) return -1;
        const int named = static_cast<int>(signal_value(entry)) - 1;
        const int chunk = signal_epoch(entry) == context_.epoch && named >= 0 ? named : contexts_.slot_of(index);
        return chunk < received_[contexts_.node_of(index)].num_chunks ? chunk : -1;
    }
    __device__ int looked_chunk() const { return chunk_of(looked_from_ + lane_, entry_); }

    __device__ void choose_chunk() {
        if (num_not_over_ <= 0) return;
        const int chunk = looked_chunk();
        if (!__any_sync(~0u, chunk >= 0)) {
            // Entries only rise: all contexts are over when all looks in a row, around all of them, have found that.
            num_not_over_ -= 32;
            return;
        }
        num_not_over_ = contexts_.count();
        const uint32_t mask = __ballot_sync(~0u, chunk >= 0 && seen_ == chunk_word(context_.epoch, chunk));
        if (mask == 0) return;
        const int source = choose_lane(mask, threadIdx.x / 32);
        index_ = looked_from_ + source;
        chunk_ = __shfl_sync(~0u, chunk, source);
        is_claiming_ = true;
        // The next chunk of the context comes only after this one's credit, so it may be named at once.
        const uint64_t next = chunk_word(context_.epoch, chunk_ + args_.geometry.num_slots);
        if (lane_ == source) before_ = atomicCAS(args_.domain.next_chunks + contexts_.entry_of(index_), entry_, next);
    }

    __device__ void open_chunk() {
        is_claiming_ = false;
        const int source = index_ - looked_from_;
        const bool is_mine = lane_ == source && before_ == entry_;
        if (is_mine) static_cast<void>(ptx::load_acquire_sys(word_of(index_)));  // what the look has seen; it stays until this chunk is credited
        if (!__shfl_sync(~0u, is_mine, source)) return;
        const Domain& domain = args_.domain;
        const int node = contexts_.node_of(index_), slot = contexts_.slot_of(index_);
        const StreamShape& stream = received_[node];
        const int first = chunk_ * stream.num_chunk_rows;
        rows_left_ = static_cast<int>(min_of(stream.num_chunk_rows, stream.num_rows - first));
        part_ = 0;
        src_rank_ = domain.group.peer_of(node);
        forward_row_ = stream.first_row + first;
        message_ = domain.window.receive_ring(domain.network, args_.node, node) + args_.geometry.slot_offset(slot);
#if DEEPEP_HAS_BULK
        if (lane_ == 0) ptx::fence_async_global();  // FULL, acquired above and joined by the shuffles' warp barriers, permits bulk loads
#endif
        __syncwarp();
    }

    __device__ void take_forwarded(Item& item) {
        const bool is_last_part = part_ + 1 == args_.parts.num_parts;
        item = {message_ + args_.parts.begin(part_), message_ + args_.message.side_offset(), 0, forward_row_, src_rank_, part_,
                is_last_part && rows_left_ == 1 ? index_ : -1, chunk_};
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
        if (lane_ == 0) claimed_ = ptx::add_relaxed_gpu(&args_.domain.state->own_rows, 1);
    }
    __device__ void take_own(Item& item) {
        const uint32_t row = args_.parts.num_parts == 1 ? next_own_ : next_own_ / args_.parts.num_parts;
        const int part = static_cast<int>(next_own_ - row * args_.parts.num_parts);
        const int64_t listed = listed_;
        const bool is_known = listed >= 0 && listed < args_.num_tokens;
        const int64_t token = is_known ? listed : 0;
        if (!is_known && lane_ == 0) report_error(context_, ErrorKind::kLayoutMismatch, Phase::kRows, args_.domain.group.rank, static_cast<uint64_t>(listed), args_.num_tokens, 0);
        item = {args_.x + token * args_.parts.num_row_bytes + args_.parts.begin(part), nullptr, static_cast<int32_t>(token),
                static_cast<int32_t>(received_[args_.node].first_row + row), args_.domain.group.rank, part, -1, 0};
        const uint32_t claimed = __shfl_sync(~0u, claimed_, 0);
        next_own_ = claimed == kNone ? kNone : claimed + (has_teams() ? 0 : args_.num_places * args_.num_deliver_warps);
        ask_for_token();
        if (num_not_over_ == kRelieved)
            claimed_ = kNone;
        else
            claim();
    }

    const DispatchArgs& args_;
    const WaitContext& context_;
    const BlockContexts& contexts_;
    const StreamShape* received_;
    const int lane_;
    uint32_t num_own_items_;
    uint32_t next_own_ = kNone;
    int32_t listed_ = -1;  // the token of next_own_
    uint32_t claimed_ = kNone;
    // Of the contexts, as many as may not be over: all but those that the last looks in a row found over. Zero or less: none. kRelieved: of no concern.
    int num_not_over_ = 0;
    // what this lane has asked for last: of the context looked_from_ + lane
    int looked_from_ = 0;
    unsigned long long entry_ = 0;
    uint64_t seen_ = 0;
    // the chunk that is being claimed, or taken
    bool is_claiming_ = false;
    unsigned long long before_ = 0;  // in the lane that claims: what the entry was
    int rows_left_ = 0;
    int part_ = 0;
    int index_ = 0;  // its context
    int chunk_ = 0;
    int src_rank_ = 0;
    int forward_row_ = 0;
    const uint8_t* message_ = nullptr;
};

// In a cached dispatch heads come from the handle.
__device__ inline void build_cached_heads(const DispatchArgs& args, const Item& item, uint8_t* side) {
    const int lane = threadIdx.x % 32;
    if (lane < args.message.num_heads)
        reinterpret_cast<int32_t*>(side + args.message.heads_offset())[lane] = args.send_nvl_head[static_cast<int64_t>(item.forward_row) * kMaxNodeRanks + lane];
}

// This lane's destination row (lane = local rank), or -1; and a record of a row that does not fit.
__device__ inline int32_t checked_head(const DispatchArgs& args, const WaitContext& context, const nvlink::Handshake& handshake, const uint8_t* side) {
    const int lane = threadIdx.x % 32;
    if (lane >= args.message.num_heads) return -1;
    const int32_t head = reinterpret_cast<const int32_t*>(side + args.message.heads_offset())[lane];
    const int64_t num_rows = handshake.grants[lane].num_rows;
    if (head < num_rows) return head < 0 ? -1 : head;
    if (!handshake.is_failed)
        report_error(context, ErrorKind::kOverflow, Phase::kRows, args.domain.group.node() * args.domain.group.ranks_per_node + lane, head, num_rows, 0);
    return -1;
}

// Everything of a row but the row itself, by ordinary stores of the whole warp. `head` is that of checked_head.
__device__ inline void deliver_side(const DispatchArgs& args, const nvlink::Handshake& handshake, int src_rank, int32_t forward_row, const uint8_t* side, int32_t head,
                                    bool has_scales) {
    const DispatchMessage& message = args.message;
    const Group& group = args.domain.group;
    const int lane = threadIdx.x % 32, num_topk = message.num_topk;
    const int num_local_experts = args.num_experts / group.num_ranks;
    int32_t expert = -1;
    float weight = 0.0f;
    if (lane < num_topk) {
        expert = reinterpret_cast<const int32_t*>(side + message.topk_idx_offset())[lane];
        weight = reinterpret_cast<const float*>(side + message.weights_offset())[lane];
    }
    for (uint32_t mask = __ballot_sync(~0u, head >= 0); mask != 0; mask &= mask - 1) {
        const int local_rank = __ffs(static_cast<int>(mask)) - 1;
        const int64_t row = __shfl_sync(~0u, head, local_rank);
        const nvlink::Grant& grant = handshake.grants[local_rank];
        if (lane < num_topk) {
            const int64_t local_expert = localise_expert(expert, group.node() * group.ranks_per_node + local_rank, num_local_experts);
            reinterpret_cast<int64_t*>(grant.topk_idx)[row * num_topk + lane] = local_expert;
            reinterpret_cast<float*>(grant.weights)[row * num_topk + lane] = local_expert < 0 ? 0.0f : weight;
        }
        if (lane == 0 && !message.is_cached)
            reinterpret_cast<int2*>(grant.src_idx)[row] = make_int2(src_rank, *reinterpret_cast<const int32_t*>(side + message.token_offset()));
        if (has_scales)
            for (int col = lane; col < message.num_scales; col += 32)
                reinterpret_cast<uint32_t*>(grant.scales)[row * message.num_scales + col] = reinterpret_cast<const uint32_t*>(side)[col];
    }
    if (!message.is_cached && lane < kMaxNodeRanks)
        args.send_nvl_head[static_cast<int64_t>(forward_row) * kMaxNodeRanks + lane] =
            lane < message.num_heads ? reinterpret_cast<const int32_t*>(side + message.heads_offset())[lane] : -1;
}

// By one thread, once the chunk's loads have landed and the warp knows: hands the credit to the warp that gives credits back.
__device__ inline void ask_for_credit(const Delivery& delivery, int index, int32_t chunk) {
    __threadfence_block();  // joins the loads to that warp's fence
    poke(delivery.credits + index, chunk + 1);
}

// Gives credits back until the block's deliver warps have ended. `returned`: of each context, zero at the start. Where two blocks deliver for a place, the
// credit of each chunk comes from the one that took it; the next chunk of the context follows it, so there is one at a time.
__device__ inline void return_credits(const DispatchArgs& args, const WaitContext& context, const BlockContexts& contexts, const Delivery& delivery, int32_t* returned) {
    constexpr unsigned kIdleNs = 100;
    const int lane = threadIdx.x % 32, count = contexts.count();
    while (true) {
        // Read first: what was asked for before the last warp ended is seen below.
        const bool is_last_pass = peek_as_warp(delivery.num_warps_left) == 0;
        __threadfence_block();
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
                network::set_word(args.domain.window.credit(args.domain.network, args.domain.group.node()) + contexts.slot_of(index), chunk_word(context.epoch, due - 1),
                                  args.domain.group.peer_of(contexts.node_of(index)));
            }
        }
        if (is_last_pass) return;
        if (!has_returned) __nanosleep(kIdleNs);
    }
}

}  // namespace
}  // namespace deepep::internode
