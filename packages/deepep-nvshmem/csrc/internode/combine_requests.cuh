#pragma once
// Collecting, requests and answers: one warp of a block makes all requests for this rank's tokens and looks for all answers, because its fence waits for what the whole
// SM has under way and a look at a word takes long. Block b of tokens uses slot b % num_slots of every other node's ring.
//
//   REQUEST  the rows of the block that a node holds: at the start for the first block of every slot, later when the block before has been added up
//   FULL     the answer of a node. When all have come, the block is posted to the source warps
#include "combine_parts.cuh"

namespace deepep::internode {
namespace {

// Rows of one block that a node holds; they lie together at its forwarder.
struct NodeRows {
    int32_t begin;
    int32_t count;
};

// What is kept of a block's slots, in shared memory; `asked`, `posted` and `finished` zero at the start.
struct Collection {
    int32_t* asked;     // of each slot: blocks asked for
    int32_t* posted;    // blocks whose answers have come
    int32_t* finished;  // blocks that have been added up
    int32_t* words;     // of each slot: of its block, what each node holds, and of each token its row at the rank of each node that forwards it (of this node's, where
                        // it lies at each rank)
    WorkQueue queue;    // of slots

    __device__ NodeRows* node_rows(const CombineArgs& args, int i) const { return reinterpret_cast<NodeRows*>(words + i * args.num_slot_words); }
    // [tokens, D]
    __device__ int32_t* rows(const CombineArgs& args, int i) const { return words + i * args.num_slot_words + 2 * args.domain.group.num_nodes(); }
    // [tokens, P]
    __device__ int32_t* heads(const CombineArgs& args, int i) const { return rows(args, i) + args.geometry.num_slot_rows * args.domain.group.num_nodes(); }
};

class RequestWarp {
public:
    __device__ RequestWarp(const CombineArgs& args, const WaitContext& context, const Collection& collection, const BlockSlots& slots)
        : args_(args), context_(context), collection_(collection), slots_(slots), stream_(Stream::of(args.geometry, args.num_tokens)),
          num_blocks_(stream_.num_chunks()), num_nodes_(args.domain.group.num_nodes()), own_node_(args.domain.group.node()) {}

    // Until each slot has had its last request.
    __device__ void run() const {
        constexpr unsigned kIdleNs = 100;
        const int lane = threadIdx.x % 32;
        uint64_t idle_since_ns = 0;
        for (uint32_t poll = 1;; ++poll) {
            bool is_over = true, has_moved = false;
            int waits_in = -1, waits_for = -1;  // a slot of this lane, and the node that has not answered
            for (int first = 0; first < slots_.count; first += 32) {
                const int i = first + lane;
                int32_t asked = i < slots_.count ? collection_.asked[i] : kOver;
                const bool is_due = asked != kOver && asked == peek(collection_.finished + i);
                if (__any_sync(~0u, is_due)) {
                    // The loads of the slots that are given back have ended: each source warp's come before its word in shared memory.
                    ptx::fence_acq_rel_sys();
                    if (is_due) collection_.asked[i] = asked = ask(i, asked);
                    has_moved = true;
                }
                bool is_ready = false;
                if (asked != kOver && collection_.posted[i] != asked) {
                    const int node = missing(i);
                    is_ready = node < 0;
                    if (is_ready) {
                        collection_.posted[i] = asked;
                    } else {
                        waits_in = i;
                        waits_for = node;
                    }
                }
                is_over = is_over && !__any_sync(~0u, asked != kOver);
                has_moved = __any_sync(~0u, is_ready) || has_moved;
                collection_.queue.post(is_ready, i);
            }
            if (is_over) break;
            if (has_moved) {
                idle_since_ns = 0;
                poll = 0;
                continue;
            }
            __nanosleep(kIdleNs);
            if (poll % kPollsPerCheck != 0) continue;
            const uint32_t waiting = __ballot_sync(~0u, waits_for >= 0);
            bool is_hopeless = false;
            if (lane == __ffs(static_cast<int>(waiting)) - 1)
                is_hopeless = wait_is_hopeless(context_, Phase::kWindow, args_.domain.group.peer_of(waits_for), ptx::load_relaxed_sys(answer_word(waits_in, waits_for)),
                                               answer_to(waits_in, waits_for), &idle_since_ns);
            if (__any_sync(~0u, is_hopeless)) break;
        }
        collection_.queue.end();
    }

private:
    static constexpr int32_t kOver = 0x7FFFFFFF;

    // By one lane: asks for the next block of a slot, or for no more; what `asked` becomes.
    __device__ int32_t ask(int i, int32_t asked) const {
        const Domain& domain = args_.domain;
        uint64_t* word = domain.window.request(domain.network, context_.epoch, own_node_) + slots_.slot(i);
        const int64_t block = slots_.slot(i) + static_cast<int64_t>(asked) * args_.geometry.num_slots;
        const bool is_last = block >= num_blocks_;
        const int64_t begin = stream_.first_row(block);
        const int num_tokens = is_last ? 0 : stream_.rows_of(block);
        int32_t* rows = collection_.rows(args_, i);
#pragma unroll 4
        for (int k = 0; k < num_tokens * num_nodes_; ++k) rows[k] = args_.send_rdma_head[begin * num_nodes_ + k];
        NodeRows* node_rows = collection_.node_rows(args_, i);
        node_rows[own_node_] = {-1, 0};
        for (int other = 1; other < num_nodes_; ++other) {
            const int node = own_node_ + other < num_nodes_ ? own_node_ + other : own_node_ + other - num_nodes_;
            NodeRows held{-1, 0};
            for (int token = 0; token < num_tokens; ++token) {
                const int32_t row = rows[token * num_nodes_ + node];
                if (row >= 0 && held.count++ == 0) held.begin = row;
            }
            node_rows[node] = held;
            if (is_last || held.count > 0)
                network::set_word(word, Request{is_last ? 0 : held.begin, held.count, is_last}.word(context_.epoch), domain.group.peer_of(node));
        }
        if (is_last) return kOver;
        find_own_rows(i, num_tokens);
        return asked + 1;
    }

    __device__ void find_own_rows(int i, int num_tokens) const {
        const int num_ranks = args_.domain.group.ranks_per_node;
        const int32_t* rows = collection_.rows(args_, i);
        int32_t* heads = collection_.heads(args_, i);
        for (int token = 0; token < num_tokens; ++token) {
            const int32_t row = rows[token * num_nodes_ + own_node_];
            const bool is_held = row >= 0 && row < args_.num_forward_rows;
            if (row >= 0 && !is_held) report_error(context_, ErrorKind::kOverflow, Phase::kRows, args_.domain.group.rank, row, args_.num_forward_rows, 0);
            for (int rank = 0; rank < num_ranks; ++rank)
                heads[token * num_ranks + rank] = is_held ? args_.send_nvl_head[static_cast<int64_t>(row) * kMaxNodeRanks + rank] : -1;
        }
    }

    __device__ const uint64_t* answer_word(int i, int node) const {
        return args_.domain.window.full(args_.domain.network, NetworkWindow::kCombineFull, node) + slots_.slot(i);
    }
    __device__ uint64_t answer_to(int i, int node) const { return chunk_word(context_.epoch, collection_.node_rows(args_, i)[node].begin); }

    // By one lane: a node that has not answered; -1: all have, and their answers may be read by whoever learns of it.
    __device__ int missing(int i) const {
        const NodeRows* node_rows = collection_.node_rows(args_, i);
        int node = -1;
#pragma unroll 4
        for (int other = 0; other < num_nodes_; ++other)
            if (node_rows[other].count > 0 && ptx::load_relaxed_sys(answer_word(i, other)) != answer_to(i, other)) node = other;
        if (node >= 0) return node;
#pragma unroll 4
        for (int other = 0; other < num_nodes_; ++other)
            if (node_rows[other].count > 0) static_cast<void>(ptx::load_acquire_sys(answer_word(i, other)));
        return -1;
    }

    const CombineArgs& args_;
    const WaitContext& context_;
    const Collection& collection_;
    const BlockSlots slots_;
    const Stream stream_;
    const int64_t num_blocks_;
    const int num_nodes_;
    const int own_node_;
};

}  // namespace
}  // namespace deepep::internode
