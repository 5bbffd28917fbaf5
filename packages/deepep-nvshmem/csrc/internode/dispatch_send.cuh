#pragma once
// Dispatch, sending: a warp packs the rows of a chunk into its slot of the send ring and puts the slot to the peer's receive ring. (Where stores reach all
// peers, the senders of teams do without the ring: dispatch_direct.cuh.)
//
//   CREDIT {epoch, chunk + 1}  forwarder -> sender: both slots of that chunk are free. Acquired before the first store of the next chunk.
// A warp takes whatever chunk of its block can go and never waits for one slot while another can go on. It ends when all chunks have been credited, so that
// the next operation finds every slot free, and the network has read every slot.
#include "internode/dispatch_side.cuh"
#include "internode/dispatch_streams.cuh"
#include "internode/network.cuh"
#include "internode/trace.cuh"

namespace deepep::internode {
namespace {

// A chunk that this warp has taken, the same in all lanes.
struct Claim {
    int index;  // its context
    int node;
    int slot;
    int chunk;
};

// The chunks of a block's sending contexts, which its warps share out among themselves.
class SendClaims {
public:
    enum class Found { kChunk, kMoved, kNothing, kOver };

    // `credited`: of each context, chunk + 1 that the block's credit warp has seen credited (watch_credits); null: the words are looked at.
    // `completed`: see complete().
    __device__ SendClaims(const WaitContext& context, const BlockContexts& contexts, const StreamShape* streams, int32_t* next_chunks, const int32_t* credited,
                          int32_t* completed = nullptr)
        : args_(contexts.args), context_(context), contexts_(contexts), streams_(streams), next_chunks_(next_chunks), credited_(credited), completed_(completed),
          lane_(threadIdx.x % 32) {}

    // Looks once around all contexts, or until it has taken a chunk. `waiting`: one of this lane's contexts that cannot go on.
    __device__ Found look(Claim& claim, Waiting& waiting) {
        const int count = contexts_.count();
        bool has_moved = false, is_over = true;
        for (int looked = 0; looked < count; looked += 32) {
            const int index = base_ + lane_;
            base_ = base_ + 32 < count ? base_ + 32 : 0;
            int node = 0, slot = 0, chunk = kOver;
            if (index < count) {
                node = contexts_.node_of(index);
                slot = contexts_.slot_of(index);
                chunk = peek(next_chunks_ + index);
            }
            bool is_ready = chunk >= 0 && is_free(index, node, chunk, waiting);
            if (is_ready && chunk >= streams_[node].num_chunks) {
                acquire_credit(index, chunk);
                next_chunks_[index] = chunk = kOver;
                is_ready = false;
            }
            is_over = is_over && !__any_sync(~0u, chunk != kOver);
            const uint32_t mask = __ballot_sync(~0u, is_ready);
            if (mask == 0) continue;
            has_moved = true;
            const int source = choose_lane(mask, threadIdx.x / 32);
            bool is_mine = false;
            if (lane_ == source && atomicCAS(next_chunks_ + index, chunk, kTaken) == chunk) {
                acquire_credit(index, chunk);
                is_mine = true;
            }
            if (!__shfl_sync(~0u, is_mine, source)) continue;
            claim = {__shfl_sync(~0u, index, source), __shfl_sync(~0u, node, source), __shfl_sync(~0u, slot, source), __shfl_sync(~0u, chunk, source)};
            return Found::kChunk;  // the credit, acquired by one lane and joined by the shuffles' warp barriers, permits the stores of all
        }
        return is_over ? Found::kOver : has_moved ? Found::kMoved : Found::kNothing;
    }

    // The chunk has been put: the context goes on with its next one.
    __device__ void release(int index, int chunk) const {
        DEEPEP_TRACE(if (lane_ == 0) begin_span(index));
        if (lane_ == 0) atomicExch(next_chunks_ + index, chunk + args_.geometry.num_slots);
        DEEPEP_TRACE(if (lane_ == 0) stamp_first(kChunkSent), stamp_last(kChunkSent), count_moved(kMovedBySenders));
    }

    // By a warp that has put a chunk's last row, behind a warp barrier: its word is left to the credit warp.
    __device__ void complete(int index, int chunk) const {
        if (lane_ == 0) {
            __threadfence_block();  // joins the warp's stores to the credit warp's fence
            poke(completed_ + index, chunk + 1);
        }
        release(index, chunk);
    }

    __device__ int num_rows(int node, int chunk) const {
        const StreamShape& stream = streams_[node];
        return static_cast<int>(min_of(stream.num_chunk_rows, stream.num_rows - chunk * stream.num_chunk_rows));
    }
    // Of the chunk's row of this lane, or -1.
    __device__ int32_t token(int node, int chunk) const {
        return lane_ < num_rows(node, chunk) ? args_.tokens_to_node[node * args_.num_tokens + chunk * streams_[node].num_chunk_rows + lane_] : -1;
    }
    __device__ uint8_t* target(int node, int slot) const { return args_.slot_in(args_.receive_rings, node, args_.node, slot); }
    // By the whole warp: bytes with which the chunk is complete, and the word that says so.
    __device__ void put_with_word(int peer, int slot, int chunk, uint8_t* to, const uint8_t* from, int64_t num_bytes) const {
        network::put_chunk(to, from, num_bytes, args_.full_words + args_.node * kMaxSlots + slot, chunk_word(context_.epoch, chunk), peer);
    }

private:
    // Whether the chunk before this one in its slot has left both ends' slots (behind the last chunk: whether the slot is over).
    __device__ bool is_free(int index, int node, int chunk, Waiting& waiting) const {
        const int before = chunk - args_.geometry.num_slots;
        if (before < 0) return true;
        const uint64_t expected = chunk_word(context_.epoch, before);
        const uint64_t seen = credited_ != nullptr ? chunk_word(context_.epoch, peek(credited_ + index) - 1)
                                                   : ptx::load_relaxed_sys(contexts_.credit_word(index));
        if (seen != expected) {
            waiting = {args_.peer_of(node), seen, expected};
            return false;
        }
        return true;
    }
    // What is_free() has seen, acquired: by the lane whose warp goes on.
    __device__ void acquire_credit(int index, int chunk) const {
        if (chunk < args_.geometry.num_slots) return;
        if (credited_ != nullptr)
            __threadfence_block();  // the credit warp has acquired the word, and fenced, before it said so
        else
            static_cast<void>(ptx::load_acquire_sys(contexts_.credit_word(index)));
    }

    const DispatchArgs& args_;
    const WaitContext& context_;
    const BlockContexts& contexts_;
    const StreamShape* streams_;
    int32_t* next_chunks_;  // of this block's contexts: what goes into each slot next; kOver when the slot is over
    const int32_t* credited_;
    int32_t* completed_;
    const int lane_;
    int base_ = 0;  // where the next look begins
};

// By a sender's credit warp: FULL of all chunks that are complete, with one fence behind the stores of the warps that have put them. Returns whether there were any.
__device__ inline bool signal_complete(const WaitContext& context, const BlockContexts& contexts, int32_t* completed) {
    const DispatchArgs& args = contexts.args;
    const int lane = threadIdx.x % 32, count = contexts.count();
    bool has_moved = false;
    for (int base = 0; base < count; base += 32) {
        const int index = base + lane;
        const int32_t chunk = index < count ? peek(completed + index) - 1 : -1;
        if (!__any_sync(~0u, chunk >= 0)) continue;
        has_moved = true;
        ptx::fence_acq_rel_sys();
        if (chunk < 0) continue;
        poke(completed + index, 0);  // the context's next chunk comes behind this one's credit
        network::set_word(args.full_words + args.node * kMaxSlots + contexts.slot_of(index), chunk_word(context.epoch, chunk), args.peer_of(contexts.node_of(index)));
    }
    return has_moved;
}

// By a sender's credit warp, until all its contexts are over: says which chunks are complete, and looks at the words of credits, so that the warps that send need not. Their own loads from
// device memory would wait behind the block's stores. `credited` and `completed`: zero at the start.
__device__ inline void watch_credits(const WaitContext& context, const BlockContexts& contexts, const int32_t* next_chunks, int32_t* credited, int32_t* completed) {
    const DispatchArgs& args = contexts.args;
    const int lane = threadIdx.x % 32, count = contexts.count();
    Patience patience;
    while (true) {
        bool is_over = true, has_moved = signal_complete(context, contexts, completed);
        Waiting waiting;
        for (int base = 0; base < count; base += 32) {
            const int index = base + lane;
            const int chunk = index < count ? peek(next_chunks + index) : kOver, before = chunk - args.geometry.num_slots;
            is_over = is_over && !__any_sync(~0u, chunk != kOver);
            bool is_new = false;
            if (chunk >= 0 && before >= 0 && credited[index] != before + 1) {
                const uint64_t* word = contexts.credit_word(index);
                const uint64_t expected = chunk_word(context.epoch, before), seen = ptx::load_relaxed_sys(word);
                is_new = seen == expected;
                if (is_new) {
                    static_cast<void>(ptx::load_acquire_sys(word));
                    DEEPEP_TRACE(end_span(index, kUncredited));
                    __threadfence_block();
                    poke(credited + index, before + 1);
                } else {
                    waiting = {args.peer_of(contexts.node_of(index)), seen, expected};
                }
            }
            has_moved = __any_sync(~0u, is_new) || has_moved;
        }
        if (is_over) return;
        if (has_moved || !__any_sync(~0u, waiting.peer >= 0)) patience.renew();
        if (!has_moved && is_exhausted(patience, context, Phase::kCredit, waiting)) return;
    }
}

class SendWarp {
public:
    // `relief`: the word that says that a block's other warps send everything, {epoch, 1}; null: they do not.
    __device__ SendWarp(const DispatchArgs& args, const WaitContext& context, const SendClaims& claims, const uint64_t* relief)
        : args_(args), context_(context), claims_(claims), relief_(relief), lane_(threadIdx.x % 32) {}

    __device__ void run() {
        Patience patience;
        while (true) {
            if (relief_ != nullptr && __shfl_sync(~0u, ptx::load_relaxed_sys(relief_), 0) == signal_word(context_.epoch, 1)) return;
            Claim claim;
            Waiting waiting;
            const SendClaims::Found found = claims_.look(claim, waiting);
            if (found == SendClaims::Found::kOver) return;
            if (found == SendClaims::Found::kNothing) {
                if (is_exhausted(patience, context_, Phase::kCredit, waiting)) return;
                continue;
            }
            patience.renew();
            if (found == SendClaims::Found::kChunk) send_chunk(claim);
        }
    }

private:
    __device__ void send_chunk(const Claim& claim) {
        const int num_rows = claims_.num_rows(claim.node, claim.chunk);
        const int64_t num_message_bytes = args_.geometry.num_message_bytes;
        uint8_t* here = args_.slot_in(args_.send_rings, args_.node, claim.node, claim.slot);
        const int32_t tokens = claims_.token(claim.node, claim.chunk);
        for (int i = 0; i < num_rows; ++i) pack_row(claim.node, __shfl_sync(~0u, tokens, i), here + i * num_message_bytes);
        claims_.put_with_word(args_.peer_of(claim.node), claim.slot, claim.chunk, claims_.target(claim.node, claim.slot), here, num_rows * num_message_bytes);
        claims_.release(claim.index, claim.chunk);
    }

    __device__ void pack_row(int node, int64_t token, uint8_t* to) {
        const DispatchMessage& message = args_.message;
        const SidePart side(args_, node, token, true);
        if (token >= 0 && token < args_.num_tokens) copy_row(to, args_.x + token * message.num_row_bytes, message.num_row_bytes);
        side.store(to + message.side_offset());
    }

    __device__ void copy_row(uint8_t* to, const uint8_t* from, int64_t num_bytes) const {
        constexpr int kUnroll = 14;  // all of a row of 7168 bytes under way at once
        const int num_vectors = static_cast<int>(num_bytes / 16);
        const int4* source = reinterpret_cast<const int4*>(from);
        int4* target = reinterpret_cast<int4*>(to);
        for (int base = lane_; base < num_vectors; base += 32 * kUnroll) {
            int4 vectors[kUnroll];
#pragma unroll
            for (int u = 0; u < kUnroll; ++u)
                if (base + u * 32 < num_vectors) vectors[u] = source[base + u * 32];
#pragma unroll
            for (int u = 0; u < kUnroll; ++u)
                if (base + u * 32 < num_vectors) target[base + u * 32] = vectors[u];
        }
    }

    const DispatchArgs& args_;
    const WaitContext& context_;
    SendClaims claims_;
    const uint64_t* relief_;
    const int lane_;
};

}  // namespace
}  // namespace deepep::internode
