#pragma once
// Dispatch, sending: a warp packs the rows of a chunk into its slot of the send ring and puts the slot to the peer's receive ring.
//
//   CREDIT {epoch, chunk + 1}  forwarder -> sender: both slots of that chunk are free. Acquired before the first store of the next chunk.
// A warp takes whatever chunk of its block can go and never waits for one slot while another can go on. It ends when all chunks have been credited, so that
// the next operation finds every slot free, and the network has read every slot.
#include "internode/dispatch_streams.cuh"
#include "internode/network.cuh"
#include "internode/trace.cuh"

namespace deepep::internode {
namespace {

class SendWarp {
public:
    __device__ SendWarp(const DispatchArgs& args, const WaitContext& context, const BlockContexts& contexts, const StreamShape* streams, int32_t* next_chunks, int warp)
        : args_(args), context_(context), contexts_(contexts), streams_(streams), next_chunks_(next_chunks), warp_(warp), lane_(threadIdx.x % 32) {}

    __device__ void run() {
        const int count = contexts_.count();
        int num_idle = 0;
        uint64_t start_ns = 0;
        while (true) {
            Waiting waiting;
            bool has_moved = false, is_over = true;
            for (int base = 0; base < count; base += 32) {
                const int index = base + lane_;
                int node = 0, slot = 0, chunk = kOver;
                if (index < count) {
                    node = contexts_.node_of(index);
                    slot = contexts_.slot_of(index);
                    chunk = peek(next_chunks_ + index);
                }
                bool is_ready = chunk >= 0 && is_free(node, slot, chunk, waiting);
                if (is_ready && chunk >= streams_[node].num_chunks) {
                    acquire_credit(node, slot, chunk);
                    next_chunks_[index] = chunk = kOver;
                    is_ready = false;
                }
                is_over = is_over && !__any_sync(~0u, chunk != kOver);
                const uint32_t mask = __ballot_sync(~0u, is_ready);
                if (mask == 0) continue;
                const int source = choose_lane(mask, warp_);
                bool is_mine = false;
                if (lane_ == source && atomicCAS(next_chunks_ + index, chunk, kTaken) == chunk) {
                    acquire_credit(node, slot, chunk);
                    is_mine = true;
                }
                has_moved = true;
                if (!__shfl_sync(~0u, is_mine, source)) continue;
                send_chunk(__shfl_sync(~0u, node, source), __shfl_sync(~0u, slot, source), __shfl_sync(~0u, chunk, source));
                if (is_mine) atomicExch(next_chunks_ + index, chunk + args_.geometry.num_slots);
                DEEPEP_TRACE(if (is_mine) stamp_first(kChunkSent), stamp_last(kChunkSent), count_moved(kMovedBySenders));
            }
            if (is_over) return;
            if (has_moved) {
                num_idle = 0;
                start_ns = 0;
                continue;
            }
            __nanosleep(kIdleNs);
            if (++num_idle == kIdlePasses) {
                num_idle = 0;
                if (is_hopeless(context_, Phase::kCredit, waiting, start_ns)) return;
            }
        }
    }

private:
    static constexpr unsigned kIdleNs = 100;  // between looks at words that many warps look at

    // Whether the chunk before this one in its slot has left both ends' slots (behind the last chunk: whether the slot is over).
    __device__ bool is_free(int node, int slot, int chunk, Waiting& waiting) const {
        const int before = chunk - args_.geometry.num_slots;
        if (before < 0) return true;
        const uint64_t* word = args_.domain.window.credit(args_.domain.network, node) + slot;
        const uint64_t expected = chunk_word(context_.epoch, before), seen = ptx::load_relaxed_sys(word);
        if (seen != expected) {
            waiting = {args_.domain.group.peer_of(node), seen, expected};
            return false;
        }
        return true;
    }
    // What is_free() has seen, acquired: by the lane whose warp goes on.
    __device__ void acquire_credit(int node, int slot, int chunk) const {
        if (chunk >= args_.geometry.num_slots)
            static_cast<void>(ptx::load_acquire_sys(args_.domain.window.credit(args_.domain.network, node) + slot));
    }

    __device__ void send_chunk(int node, int slot, int chunk) {
        const Domain& domain = args_.domain;
        const Group& group = domain.group;
        const NetworkWindow& window = domain.window;
        const StreamShape& stream = streams_[node];
        const int first = chunk * stream.num_chunk_rows;
        const int num_rows = static_cast<int>(min_of(stream.num_chunk_rows, stream.num_rows - first));
        const int64_t offset = args_.geometry.slot_offset(slot), num_message_bytes = args_.geometry.num_message_bytes;
        uint8_t* here = window.send_ring(domain.network, group.node(), node) + offset;
        __syncwarp();  // the credit, acquired by one lane, permits the stores of all
        const int32_t tokens = lane_ < num_rows ? args_.tokens_to_node[node * args_.num_tokens + first + lane_] : -1;
        for (int i = 0; i < num_rows; ++i) pack_row(node, __shfl_sync(~0u, tokens, i), here + i * num_message_bytes);
        network::put_chunk(window.receive_ring(domain.network, node, group.node()) + offset, here, num_rows * num_message_bytes,
                           window.full(domain.network, NetworkWindow::kDispatchFull, group.node()) + slot, chunk_word(context_.epoch, chunk), group.peer_of(node));
    }

    __device__ void pack_row(int node, int64_t token, uint8_t* to) {
        const DispatchMessage& message = args_.message;
        const Group& group = args_.domain.group;
        const bool is_known = token >= 0 && token < args_.num_tokens;
        // Side data first: its loads are under way while the row is copied.
        int32_t expert = -1, head = -1;
        float weight = 0.0f;
        if (is_known && !message.is_cached) {
            if (lane_ < message.num_topk) {
                const int64_t chosen = args_.topk_idx[token * message.num_topk + lane_];
                if (chosen >= 0 && chosen < args_.num_experts) expert = static_cast<int32_t>(chosen);
                weight = args_.topk_weights[token * message.num_topk + lane_];
            }
            if (lane_ < message.num_heads) head = args_.dst_rows[token * group.num_ranks + node * group.ranks_per_node + lane_];
        }
        uint8_t* side = to + message.side_offset();
        if (is_known) {
            constexpr int kEarly = 2;
            const uint32_t* scales = args_.scales + token * args_.scales_stride_token;
            uint32_t early[kEarly];
#pragma unroll
            for (int i = 0; i < kEarly; ++i)
                if (lane_ + i * 32 < message.num_scales) early[i] = scales[(lane_ + i * 32) * args_.scales_stride_col];
            copy_row(to, args_.x + token * message.num_row_bytes, message.num_row_bytes);
#pragma unroll
            for (int i = 0; i < kEarly; ++i)
                if (lane_ + i * 32 < message.num_scales) reinterpret_cast<uint32_t*>(side)[lane_ + i * 32] = early[i];
            for (int col = lane_ + kEarly * 32; col < message.num_scales; col += 32)
                reinterpret_cast<uint32_t*>(side)[col] = scales[col * args_.scales_stride_col];
        }
        if (message.is_cached) return;
        if (lane_ < message.num_topk) {
            reinterpret_cast<int32_t*>(side + message.topk_idx_offset())[lane_] = expert;
            reinterpret_cast<float*>(side + message.weights_offset())[lane_] = weight;
        }
        if (lane_ < message.num_heads) reinterpret_cast<int32_t*>(side + message.heads_offset())[lane_] = head;
        if (lane_ == 0) *reinterpret_cast<int32_t*>(side + message.token_offset()) = static_cast<int32_t>(token);
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
    const BlockContexts& contexts_;
    const StreamShape* streams_;
    int32_t* next_chunks_;  // of this block's contexts: what goes into each slot next; -1 when the slot is over
    const int warp_;
    const int lane_;
};

}  // namespace
}  // namespace deepep::internode
