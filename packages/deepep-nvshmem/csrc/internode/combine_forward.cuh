#pragma once
// Forwarding: partial sums of this node for tokens of other nodes, where they are asked for.
//
// A context is one slot of one other node's ring. Its requests come one at a time; the answer goes to the same slot of the source's receive ring. Any warp of
// the block takes any request, and none is waited for, because a source may not go on with one before another has been answered. Here the answer is put together in the
// slot of the send ring; forwarders of teams that reach all sources by stores do without it (combine_direct.cuh).
//
//   REQUEST  source -> forwarder: the slot is free at both ends, sum these rows into it. Acquired before the first store of the answer.
#include "combine_parts.cuh"
#include "internode/trace.cuh"

namespace deepep::internode {
namespace {

// What the forward warps of a block look up again and again, in shared memory: a load from device memory takes long, and registers are few.
struct ForwardFacts {
    int32_t rank_prefix[kMaxCombineNodes];  // recv_rdma_rank_prefix

    // By the whole block; a barrier follows.
    __device__ void find(const CombineArgs& args) {
        for (int node = threadIdx.x; node < args.domain.group.num_nodes(); node += blockDim.x) rank_prefix[node] = args.recv_rdma_rank_prefix[node];
    }

    // Whether a node asks for rows that came from it; if not, this rank's operation has failed. `speaks`: this thread says so.
    __device__ bool permits(const CombineArgs& args, const WaitContext& context, int node, const Request& request, bool speaks) const {
        const int64_t begin = node == 0 ? 0 : rank_prefix[node - 1], end = min_of(rank_prefix[node], args.num_forward_rows);
        if (request.count >= 1 && request.count <= args.geometry.num_slot_rows && request.begin >= begin && begin >= 0 && request.begin + request.count <= end) return true;
        if (speaks) {
            report_error(context, ErrorKind::kBadCount, Phase::kRequest, args.domain.group.peer_of(node),
                         static_cast<uint64_t>(request.begin) << 32 | static_cast<uint32_t>(request.count),
                         static_cast<uint64_t>(begin) << 32 | static_cast<uint32_t>(end), 0);
            mark_failed(context);
        }
        return false;
    }
};

// By the whole warp, after a look in which nothing was new: true if it is to give up. `unfinished`: a context that this lane still waits for, or -1.
__device__ inline bool waits_in_vain(const BlockContexts& contexts, int unfinished, uint32_t poll, uint64_t& idle_since_ns) {
    constexpr unsigned kIdleNs = 100;  // between looks at words that many warps look at
    __nanosleep(kIdleNs);
    if (poll % kPollsPerCheck != 0) return false;
    const uint32_t waiting = __ballot_sync(~0u, unfinished >= 0);
    bool is_hopeless = false;
    if (static_cast<int>(threadIdx.x % 32) == __ffs(static_cast<int>(waiting)) - 1)
        is_hopeless = wait_is_hopeless(contexts.context, Phase::kRequest, contexts.peer_of(unfinished), ptx::load_relaxed_sys(contexts.request_word(unfinished)),
                                       Request{0, 0, true}.word(contexts.context.epoch), &idle_since_ns);
    return __any_sync(~0u, is_hopeless);
}

class ForwardWarp {
public:
    // `served`: the newest word that a warp has acted upon, of each context of this block, in shared memory; zero at the start.
    __device__ ForwardWarp(const CombineArgs& args, const WaitContext& context, const nvlink::Handshake& handshake, PartialAddends& addends, const ForwardFacts& facts,
                           unsigned long long* served, const BlockContexts& contexts)
        : args_(args), context_(context), handshake_(handshake), addends_(addends), served_(served), contexts_(contexts), lane_(threadIdx.x % 32), facts_(facts) {}

    __device__ void run() {
        const int num_contexts = contexts_.count();
        uint64_t idle_since_ns = 0;
        for (uint32_t poll = 1;; ++poll) {
            bool has_moved = false;
            int unfinished = -1;  // one of the contexts that this lane still waits for
            for (int first = 0; first < num_contexts; first += 32) {
                const int index = first + lane_;
                unsigned long long before = 0, word = 0;
                bool is_new = false;
                if (index < num_contexts) before = peek(served_ + index);
                if (index < num_contexts && (before == 0 || !Request::of(before).is_last)) {
                    word = ptx::load_relaxed_sys(contexts_.request_word(index));
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
                    static_cast<void>(ptx::load_acquire_sys(contexts_.request_word(index)));
                    is_mine = true;
                }
                if (__shfl_sync(~0u, is_mine, from) && !serve(first + from, Request::of(__shfl_sync(~0u, word, from)))) return;
            }
            if (!__any_sync(~0u, unfinished >= 0)) {
                // Last requests permit the next operation's stores to the slots; they were only looked at.
                ptx::fence_acq_rel_sys();
                return;
            }
            if (has_moved) {
                idle_since_ns = 0;
                poll = 0;
            } else if (waits_in_vain(contexts_, unfinished, poll, idle_since_ns)) {
                return;
            }
        }
    }

private:
    __device__ bool serve(int index, const Request& request) {
        const int node = contexts_.node_of(index);
        if (!facts_.permits(args_, context_, node, request, lane_ == 0)) return false;
        const int64_t num_message_bytes = args_.geometry.num_message_bytes;
        uint8_t* chunk = args_.domain.window.send_ring(args_.domain.network, args_.domain.group.node(), node) + args_.geometry.slot_offset(contexts_.slot_of(index));
        int32_t head = head_of(args_, request.begin);
        for (int i = 0; i < request.count; ++i) {
            const int32_t next_head = i + 1 < request.count ? head_of(args_, request.begin + i + 1) : -1;
            uint8_t* message = chunk + i * num_message_bytes;
            const int num_rows = list_over_node(args_, context_, handshake_, addends_, head);
            sum_listed(args_, addends_, num_rows, message, reinterpret_cast<float*>(message + args_.message.weights_offset()));
            head = next_head;
        }
        __syncwarp();
        contexts_.put_with_word(index, contexts_.target(index), chunk, request.count * num_message_bytes, request.begin);
        DEEPEP_TRACE(if (lane_ == 0) stamp_first(kAnswerSent), stamp_last(kAnswerSent), count_moved(kMovedBySenders));
        return true;
    }

    const CombineArgs& args_;
    const WaitContext& context_;
    const nvlink::Handshake& handshake_;
    PartialAddends& addends_;
    unsigned long long* served_;
    const BlockContexts& contexts_;
    const int lane_;
    const ForwardFacts& facts_;
};

}  // namespace
}  // namespace deepep::internode
