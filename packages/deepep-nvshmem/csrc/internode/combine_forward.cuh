#pragma once
// Forward warps: partial sums of this node for tokens of other nodes, where they are asked for.
//
// A context is one slot of one other node's ring. Its requests come one at a time; the answer is put together in the slot of the send ring, or in the
// warp's shared memory where the source is reached by stores (combine_direct.cuh), and goes to the same slot of the source's receive ring. Any warp of the
// block takes any request, and none is waited for, because a source may not go on with one before another has been answered.
#include "combine_direct.cuh"
#include "combine_parts.cuh"
#include "internode/trace.cuh"

namespace deepep::internode {
namespace {

// What the forward warps of a block look up again and again, in shared memory: a load from device memory takes long, and registers are few.
struct ForwardFacts {
    uint64_t nodes_stored_to;               // Domain's
    int32_t rank_prefix[kMaxCombineNodes];  // recv_rdma_rank_prefix

    // By the whole block; a barrier follows.
    __device__ void find(const CombineArgs& args) {
        if (threadIdx.x == 0) nodes_stored_to = args.domain.nodes_stored_to;
        for (int node = threadIdx.x; node < args.domain.group.num_nodes(); node += blockDim.x) rank_prefix[node] = args.recv_rdma_rank_prefix[node];
    }
};

class ForwardWarp {
public:
    // `served`: the newest word that a warp has acted upon, of each context of this block, in shared memory; zero at the start.
    // `stage`: this warp's memory for its direct answers.
    __device__ ForwardWarp(const CombineArgs& args, const WaitContext& context, const nvlink::Handshake& handshake, PartialAddends& addends, uint8_t* stage,
                           const ForwardFacts& facts, uint64_t* served, const BlockSlots& slots)
        : args_(args), context_(context), handshake_(handshake), addends_(addends), served_(reinterpret_cast<unsigned long long*>(served)), slots_(slots),
          lane_(threadIdx.x % 32), num_others_(args.domain.group.num_nodes() - 1), num_contexts_(slots.count * num_others_),
          facts_(facts), answer_(args, context, handshake, addends, stage) {}

    __device__ void run() {
        uint64_t idle_since_ns = 0;
        for (uint32_t poll = 1;; ++poll) {
            bool has_moved = false;
            int unfinished = -1;  // one of the contexts that this lane still waits for
            for (int first = 0; first < num_contexts_; first += 32) {
                const int index = first + lane_;
                unsigned long long before = 0, word = 0;
                bool is_new = false;
                if (index < num_contexts_) before = peek(served_ + index);
                if (index < num_contexts_ && (before == 0 || !Request::of(before).is_last)) {
                    word = ptx::load_relaxed_sys(request_word(index));
                    is_new = Request::is_of(word, context_.epoch) && word != before;
                    if (is_new && Request::of(word).is_last) {
                        poke(served_ + index, word);
                        is_new = false;
                    } else {
                        unfinished = index;
                    }
                }
                const uint32_t ready = __ballot_sync(~0u, is_new);
                if (ready == 0) continue;
                has_moved = true;
                const int from = choose_lane(ready, threadIdx.x / 32);
                bool is_mine = false;
                if (lane_ == from && atomicCAS(served_ + index, before, word) == before) {
                    // The request permits stores to both slots: it is acquired.
                    static_cast<void>(ptx::load_acquire_sys(request_word(index)));
                    is_mine = true;
                }
                if (__shfl_sync(~0u, is_mine, from) && !serve(first + from, Request::of(__shfl_sync(~0u, word, from)))) return;
            }
            const uint32_t waiting = __ballot_sync(~0u, unfinished >= 0);
            if (waiting == 0) {
                // Last requests permit the next operation's stores to the slots; they were only looked at.
                ptx::fence_acq_rel_sys();
                return;
            }
            if (has_moved) {
                idle_since_ns = 0;
                poll = 0;
                continue;
            }
            __nanosleep(kIdleNs);
            if (poll % kPollsPerCheck == 0) {
                bool is_hopeless = false;
                if (lane_ == __ffs(waiting) - 1)
                    is_hopeless = wait_is_hopeless(context_, Phase::kRequest, peer_of(unfinished), ptx::load_relaxed_sys(request_word(unfinished)),
                                                   Request{0, 0, true}.word(context_.epoch), &idle_since_ns);
                if (__any_sync(~0u, is_hopeless)) return;
            }
        }
    }

private:
    static constexpr unsigned kIdleNs = 100;  // between looks at words that many warps look at

    __device__ int slot_of(int index) const { return slots_.slot(index / num_others_); }
    __device__ int node_of(int index) const { return other_node(args_.domain.group, index % num_others_); }
    __device__ int peer_of(int index) const { return args_.domain.group.peer_of(node_of(index)); }
    __device__ const uint64_t* request_word(int index) const { return args_.domain.window.request(args_.domain.network, context_.epoch, node_of(index)) + slot_of(index); }

    __device__ bool serve(int index, const Request& request) {
        const Domain& domain = args_.domain;
        const int own_node = domain.group.node(), node = node_of(index), slot = slot_of(index), peer = domain.group.peer_of(node);
        const int64_t begin_of_node = node == 0 ? 0 : facts_.rank_prefix[node - 1];
        const int64_t end_of_node = min_of(facts_.rank_prefix[node], args_.num_forward_rows);
        if (request.count < 1 || request.count > args_.geometry.num_slot_rows || request.begin < begin_of_node || begin_of_node < 0 ||
            request.begin + request.count > end_of_node) {
            if (lane_ == 0) {
                report_error(context_, ErrorKind::kBadCount, Phase::kRequest, peer, static_cast<uint64_t>(request.begin) << 32 | static_cast<uint32_t>(request.count),
                             static_cast<uint64_t>(begin_of_node) << 32 | static_cast<uint32_t>(end_of_node), 0);
                mark_failed(context_);
            }
            return false;
        }
        const int64_t num_message_bytes = args_.geometry.num_message_bytes;
        // What is put together with the signal: the last part of the answer, or all of it.
        uint8_t* to = domain.window.receive_ring(domain.network, node, own_node) + args_.geometry.slot_offset(slot);
        const uint8_t* from;
        int64_t num_bytes;
        if (facts_.nodes_stored_to >> node & 1) {
            answer_.begin(request.begin, request.count);
            while (true) {
                const DirectAnswer::Part part = answer_.next();
                if (part.is_last) {
                    to += part.offset;
                    from = part.from;
                    num_bytes = part.num_bytes;
                    break;
                }
                network::put_part(to + part.offset, part.from, part.num_bytes, peer);
            }
        } else {
            uint8_t* chunk = domain.window.send_ring(domain.network, own_node, node) + args_.geometry.slot_offset(slot);
            int32_t head = head_of(args_, request.begin);
            for (int i = 0; i < request.count; ++i) {
                const int32_t next_head = i + 1 < request.count ? head_of(args_, request.begin + i + 1) : -1;
                uint8_t* message = chunk + i * num_message_bytes;
                const int num_rows = list_over_node(args_, context_, handshake_, addends_, head);
                sum_listed(args_, addends_, num_rows, message, reinterpret_cast<float*>(message + args_.message.weights_offset()));
                head = next_head;
            }
            from = chunk;
            num_bytes = request.count * num_message_bytes;
        }
        __syncwarp();
        // Its fence, behind a warp barrier, comes after the stores of the parts before as well.
        network::put_chunk(to, from, num_bytes, domain.window.full(domain.network, NetworkWindow::kCombineFull, own_node) + slot,
                           chunk_word(context_.epoch, request.begin), peer);
        DEEPEP_TRACE(if (lane_ == 0) stamp_first(kAnswerSent), stamp_last(kAnswerSent), count_moved(kMovedBySenders));
        return true;
    }

    const CombineArgs& args_;
    const WaitContext& context_;
    const nvlink::Handshake& handshake_;
    PartialAddends& addends_;
    unsigned long long* served_;
    const BlockSlots slots_;
    const int lane_;
    const int num_others_;
    const int num_contexts_;
    const ForwardFacts& facts_;
    DirectAnswer answer_;
};

}  // namespace
}  // namespace deepep::internode
