#pragma once
// Source warps: this rank's tokens. Block b is a run of tokens; it uses slot b % num_slots of every other node's ring.
//
//   request  the rows of the block that each other node holds (at the start for the first block of every slot, later when its slot is free).
//            One warp of the block makes all requests: its fence waits for what the whole SM has under way, which would hold up a source warp
//   own      the partial sum of this node, into the output: needs nothing from other nodes and runs while their answers are on their way
//   result   biases and partial sums, node by node, into the output
#include "combine_parts.cuh"
#include "internode/trace.cuh"

namespace deepep::internode {
namespace {

// Rows of one block that a node holds; they lie together at its forwarder.
struct NodeRows {
    int32_t begin;
    int32_t count;
};

// What a source warp keeps of the block that it works on, in shared memory.
struct SourceScratch {
    ResultAddends addends;
    NodeRows node_rows[kMaxCombineNodes];
    // Of each token, what this node adds: the partial sum in the output, or the only row that there is.
    const uint8_t* own_rows[kMaxChunkRows];
    const float* own_weights[kMaxChunkRows];
};

// Rows of the tokens [begin, end) at a node, by one lane.
__device__ inline NodeRows rows_at(const CombineArgs& args, int64_t begin, int64_t end, int node) {
    NodeRows rows{-1, 0};
    const int num_nodes = args.domain.group.num_nodes();
#pragma unroll 4
    for (int64_t token = begin; token < end; ++token) {
        const int32_t row = args.send_rdma_head[token * num_nodes + node];
        if (row >= 0 && rows.count++ == 0) rows.begin = row;
    }
    return rows;
}

// What the source warps of a block share, in shared memory; all zero at the start.
struct Collection {
    int32_t* num_taken;         // blocks that warps have taken
    int32_t* num_warps_ended;
    int32_t* finished;          // of each slot: blocks that have been added up
    int32_t* asked;             // of each context: blocks asked for (by the request warp alone)
};

// Makes the block's requests until each context has had its last, or the source warps have ended and nothing can be asked for (they have given up).
__device__ inline void make_requests(const CombineArgs& args, const WaitContext& context, const Collection& collection, const BlockSlots& slots) {
    constexpr int32_t kOver = 0x7FFFFFFF;
    constexpr unsigned kIdleNs = 100;
    const Domain& domain = args.domain;
    const Stream stream = Stream::of(args.geometry, args.num_tokens);
    const int lane = threadIdx.x % 32, num_others = domain.group.num_nodes() - 1, num_contexts = slots.count * num_others;
    while (true) {
        const bool is_last_pass = peek_as_warp(collection.num_warps_ended) == args.num_source_warps;  // read first
        __threadfence_block();
        bool has_asked = false, is_over = true;
        for (int first = 0; first < num_contexts; first += 32) {
            const int index = first + lane, i = index / num_others;
            const int32_t asked = index < num_contexts ? collection.asked[index] : kOver;
            const bool is_due = asked != kOver && asked <= peek(collection.finished + i);
            is_over = is_over && !__any_sync(~0u, asked != kOver);
            if (!__any_sync(~0u, is_due)) continue;
            has_asked = true;
            // The loads of the slots that are given back have ended: each source warp's come before its word in shared memory.
            ptx::fence_acq_rel_sys();
            if (!is_due) continue;
            const int node = other_node(domain.group, index % num_others), slot = slots.slot(i);
            const int64_t block = slot + static_cast<int64_t>(asked) * args.geometry.num_slots;
            uint64_t* word = domain.window.request(domain.network, context.epoch, domain.group.node()) + slot;
            if (block >= stream.num_chunks()) {
                network::set_word(word, Request{0, 0, true}.word(context.epoch), domain.group.peer_of(node));
                collection.asked[index] = kOver;
                continue;
            }
            const int64_t begin = stream.first_row(block);
            const NodeRows rows = rows_at(args, begin, begin + stream.rows_of(block), node);
            if (rows.count > 0) network::set_word(word, Request{rows.begin, rows.count, false}.word(context.epoch), domain.group.peer_of(node));
            collection.asked[index] = asked + 1;
        }
        // Blocks of which a node holds nothing are added up without a request, so this warp may lag behind the last source warp.
        if (is_over || (is_last_pass && !has_asked)) return;
        if (!has_asked) __nanosleep(kIdleNs);
    }
}

class SourceWarp {
public:
    __device__ SourceWarp(const CombineArgs& args, const WaitContext& context, const nvlink::Handshake& handshake, SourceScratch& scratch,
                          PartialAddends& own_addends, const Collection& collection, const BlockSlots& slots)
        : args_(args), context_(context), handshake_(handshake), scratch_(scratch), own_addends_(own_addends), collection_(collection), slots_(slots),
          stream_(Stream::of(args.geometry, args.num_tokens)), lane_(threadIdx.x % 32), num_nodes_(args.domain.group.num_nodes()),
          own_node_(args.domain.group.node()) {}

    // Blocks are taken in their order, slot after slot: the one before in the same slot was taken earlier, so the wait for this one ends.
    __device__ void run() {
        collect();
        __syncwarp();
        if (lane_ == 0) {
            __threadfence_block();
            atomicAdd(collection_.num_warps_ended, 1);
        }
    }

private:
    __device__ void collect() {
        const int64_t num_blocks = stream_.num_chunks();
        while (slots_.count > 0) {
            int taken = 0;
            if (lane_ == 0) taken = atomicAdd(collection_.num_taken, 1);
            taken = __shfl_sync(~0u, taken, 0);
            const int round = taken / slots_.count, i = taken - round * slots_.count, slot = slots_.slot(i);
            const int64_t first = static_cast<int64_t>(round) * args_.geometry.num_slots, block = first + slot;
            if (first >= num_blocks) return;
            if (block >= num_blocks) continue;
            const int64_t begin = stream_.first_row(block), end = begin + stream_.rows_of(block);
            find_rows(begin, end);
            sum_own(begin, end);
            if (!wait_turn(i, round) || !wait_answers(slot)) return;
            for (int64_t token = begin; token < end; ++token) sum_result(token, static_cast<int>(token - begin), slot);
            __syncwarp();
            if (lane_ == 0) {
                __threadfence_block();  // joins the loads of the slot to the request warp's fence
                poke(collection_.finished + i, round + 1);
                DEEPEP_TRACE(stamp_first(kBlockCollected), stamp_last(kBlockCollected), count_moved(kMovedByReceivers));
            }
        }
    }

    // Blocks of a slot are finished in their order, and a block is asked for only when the one before is finished. No deadline: the warp that has
    // the block before waits for other ranks, and knows for whom.
    __device__ bool wait_turn(int i, int round) const {
        for (uint32_t poll = 1;; ++poll) {
            if (peek_as_warp(collection_.finished + i) == round) return true;
            if (poll % kPollsPerCheck == 0 && __any_sync(~0u, has_failed(context_))) return false;
        }
    }

    __device__ int32_t row_at(int64_t token, int node) const { return args_.send_rdma_head[token * num_nodes_ + node]; }

    // Lane = node.
    __device__ void find_rows(int64_t begin, int64_t end) {
        __syncwarp();  // all lanes have done with the rows of the block before
        for (int node = lane_; node < num_nodes_; node += 32) scratch_.node_rows[node] = node == own_node_ ? NodeRows{-1, 0} : rows_at(args_, begin, end, node);
    }

    __device__ bool wait_answers(int slot) {
        const Domain& domain = args_.domain;
        bool is_here = true;
        for (int node = lane_; node < num_nodes_; node += 32) {
            const NodeRows rows = scratch_.node_rows[node];
            if (rows.count > 0)
                is_here = wait_exact(context_, domain.window.full(domain.network, NetworkWindow::kCombineFull, node) + slot,
                                     chunk_word(context_.epoch, rows.begin), Phase::kWindow, domain.group.peer_of(node)) && is_here;
        }
        return __all_sync(~0u, is_here);
    }

    __device__ uint8_t* out_row(int64_t token) const { return args_.out + token * args_.message.num_row_bytes; }
    __device__ float* out_weights(int64_t token) const { return args_.out_topk_weights + token * args_.num_topk; }

    // What this node holds of a token: its row at each local rank (lane = rank).
    struct OwnRow {
        bool is_held = false;
        int32_t head = -1;
    };
    __device__ OwnRow own_row(int64_t token) const {
        const int32_t row = row_at(token, own_node_);
        if (row < 0) return {};
        if (row < args_.num_forward_rows) return {true, head_of(args_, row)};
        if (lane_ == 0) report_error(context_, ErrorKind::kOverflow, Phase::kRows, args_.domain.group.rank, row, args_.num_forward_rows, 0);
        return {};
    }
    __device__ void sum_own(int64_t begin, int64_t end) {
        OwnRow row = own_row(begin);
        for (int64_t token = begin; token < end; ++token) {
            const OwnRow next = token + 1 < end ? own_row(token + 1) : OwnRow{};  // under way while this token is summed
            if (row.is_held) {
                const int num_rows = list_over_node(args_, context_, handshake_, own_addends_, row.head);
                // A single row is its own partial sum: rounding does not change it, and no sum that starts from +0 tells -0 from +0.
                if (num_rows != 1) sum_listed(args_, own_addends_, num_rows, out_row(token), out_weights(token));
                if (lane_ == 0) {
                    scratch_.own_rows[token - begin] = num_rows == 1 ? own_addends_.rows[0] : out_row(token);
                    scratch_.own_weights[token - begin] = num_rows == 1 ? own_addends_.weights[0] : out_weights(token);
                }
            }
            row = next;
        }
    }

    __device__ void sum_result(int64_t token, int place_in_block, int slot) {
        const Domain& domain = args_.domain;
        int num_rows = 0, num_partials = 0;
        bool has_own = false;
        __syncwarp();  // the list of the token before has been read; the own node's partial sum has been written
        if (args_.bias_0 != nullptr) scratch_.addends.rows[num_rows++] = args_.bias_0 + token * args_.message.num_row_bytes;
        if (args_.bias_1 != nullptr) scratch_.addends.rows[num_rows++] = args_.bias_1 + token * args_.message.num_row_bytes;
        for (int first = 0; first < num_nodes_; first += 32) {
            const int node = first + lane_;
            const int32_t row = node < num_nodes_ ? row_at(token, node) : -1;
            const bool is_own = node == own_node_ && row >= 0 && row < args_.num_forward_rows;
            const int64_t index = row < 0 || node == own_node_ ? 0 : static_cast<int64_t>(row) - scratch_.node_rows[node].begin;
            const bool is_good = index >= 0 && (node >= num_nodes_ || node == own_node_ || row < 0 || index < scratch_.node_rows[node].count);
            if (!is_good)  // the handle's rows do not rise by one
                report_error(context_, ErrorKind::kBadCount, Phase::kRows, domain.group.peer_of(node), row, scratch_.node_rows[node].begin, 0);
            const bool is_remote = node != own_node_ && row >= 0 && is_good;
            const uint32_t mask = __ballot_sync(~0u, is_own || is_remote);
            const int place = __popc(mask & ((1u << lane_) - 1));
            if (is_own) {
                scratch_.addends.rows[num_rows + place] = scratch_.own_rows[place_in_block];
                scratch_.addends.weights[num_partials + place] = scratch_.own_weights[place_in_block];
            } else if (is_remote) {
                const uint8_t* message = domain.window.receive_ring(domain.network, own_node_, node) + args_.geometry.slot_offset(slot) +
                                         index * args_.geometry.num_message_bytes;
                scratch_.addends.rows[num_rows + place] = message;
                scratch_.addends.weights[num_partials + place] = reinterpret_cast<const float*>(message + args_.message.weights_offset());
            }
            has_own = has_own || __any_sync(~0u, is_own);
            num_rows += __popc(mask);
            num_partials += __popc(mask);
        }
        __syncwarp();
        if (has_own && num_rows == 1 && scratch_.addends.rows[0] == out_row(token)) return;  // it is the result
        sum_weights(scratch_.addends.weights, num_partials, args_.num_topk, out_weights(token));
        sum_rows(scratch_.addends.rows, num_rows, static_cast<int>(args_.message.num_row_bytes), out_row(token));
    }

    const CombineArgs& args_;
    const WaitContext& context_;
    const nvlink::Handshake& handshake_;
    SourceScratch& scratch_;
    PartialAddends& own_addends_;
    const Collection& collection_;
    const BlockSlots slots_;
    const Stream stream_;
    const int lane_;
    const int num_nodes_;
    const int own_node_;
};

}  // namespace
}  // namespace deepep::internode
