#pragma once
// Source warps: this rank's tokens. Block b is a run of tokens; it uses slot b % num_slots of every other node's ring.
//
//   request  the rows of the block that each other node holds (at the start for the first block of every slot, later when its slot is free)
//   own      the partial sum of this node, into the output: needs nothing from other nodes and runs while their answers are on their way
//   result   biases and partial sums, node by node, into the output
#include "combine_parts.cuh"

namespace deepep::internode {
namespace {

// Rows of one block that a node holds; they lie together at its forwarder.
struct NodeRows {
    int32_t begin;
    int32_t count;
};

class SourceWarp {
public:
    __device__ SourceWarp(const CombineArgs& args, const WaitContext& context, const nvlink::Handshake& handshake, ResultAddends& addends,
                          PartialAddends& own_addends, NodeRows* node_rows, const BlockSlots& slots, int warp)
        : args_(args), context_(context), handshake_(handshake), addends_(addends), own_addends_(own_addends), node_rows_(node_rows), slots_(slots),
          stream_(Stream::of(args.geometry, args.num_tokens)), lane_(threadIdx.x % 32), warp_(warp), num_nodes_(args.domain.group.num_nodes()),
          own_node_(args.domain.group.node()) {}

    __device__ void run() {
        for (int i = warp_; i < slots_.count; i += args_.num_source_warps) request(slots_.slot(i), slots_.slot(i));
        const int64_t num_blocks = stream_.num_chunks();
        for (int64_t first = 0; first < num_blocks; first += args_.geometry.num_slots)
            for (int i = warp_; i < slots_.count; i += args_.num_source_warps) {
                const int slot = slots_.slot(i);
                const int64_t block = first + slot;
                if (block >= num_blocks) continue;
                const int64_t begin = stream_.first_row(block), end = begin + stream_.rows_of(block);
                sum_own(begin, end);
                if (!wait_answers(block, slot)) return;
                for (int64_t token = begin; token < end; ++token) sum_result(token, slot);
                __syncwarp();
                // The loads of the slot that a word below gives back have ended: every lane's come before the warp barrier, and the fence of the
                // lane that sets the word keeps them before it.
                if (lane_ < num_nodes_) ptx::fence_acq_rel_sys();
                request(block + args_.geometry.num_slots, slot);
            }
    }

private:
    __device__ int32_t row_at(int64_t token, int node) const { return args_.send_rdma_head[token * num_nodes_ + node]; }

    __device__ NodeRows rows_of(int64_t block, int node) const {
        NodeRows rows{-1, 0};
        const int64_t begin = stream_.first_row(block), end = begin + stream_.rows_of(block);
#pragma unroll 4
        for (int64_t token = begin; token < end; ++token) {
            const int32_t row = row_at(token, node);
            if (row >= 0 && rows.count++ == 0) rows.begin = row;
        }
        return rows;
    }

    // Lane = node. A slot without further blocks gets its last word.
    __device__ void request(int64_t block, int slot) {
        const Domain& domain = args_.domain;
        for (int node = lane_; node < num_nodes_; node += 32) {
            if (node == own_node_) continue;
            uint64_t* word = domain.window.request(domain.network, context_.epoch, own_node_) + slot;
            if (block >= stream_.num_chunks()) {
                network::set_word(word, Request{0, 0, true}.word(context_.epoch), domain.group.peer_of(node));
                continue;
            }
            const NodeRows rows = rows_of(block, node);
            if (rows.count > 0) network::set_word(word, Request{rows.begin, rows.count, false}.word(context_.epoch), domain.group.peer_of(node));
        }
        __syncwarp();
    }

    __device__ bool wait_answers(int64_t block, int slot) {
        const Domain& domain = args_.domain;
        bool is_here = true;
        for (int node = lane_; node < num_nodes_; node += 32) {
            const NodeRows rows = node == own_node_ ? NodeRows{-1, 0} : rows_of(block, node);
            node_rows_[node] = rows;
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
            if (row.is_held) sum_over_node(args_, context_, handshake_, own_addends_, row.head, out_row(token), out_weights(token));
            row = next;
        }
    }

    __device__ void sum_result(int64_t token, int slot) {
        const Domain& domain = args_.domain;
        int num_rows = 0, num_partials = 0;
        bool has_own = false;
        __syncwarp();  // the list of the token before has been read; the own node's partial sum has been written
        if (args_.bias_0 != nullptr) addends_.rows[num_rows++] = args_.bias_0 + token * args_.message.num_row_bytes;
        if (args_.bias_1 != nullptr) addends_.rows[num_rows++] = args_.bias_1 + token * args_.message.num_row_bytes;
        for (int first = 0; first < num_nodes_; first += 32) {
            const int node = first + lane_;
            const int32_t row = node < num_nodes_ ? row_at(token, node) : -1;
            const bool is_own = node == own_node_ && row >= 0 && row < args_.num_forward_rows;
            const int64_t index = row < 0 || node == own_node_ ? 0 : static_cast<int64_t>(row) - node_rows_[node].begin;
            const bool is_good = index >= 0 && (node >= num_nodes_ || node == own_node_ || row < 0 || index < node_rows_[node].count);
            if (!is_good)  // the handle's rows do not rise by one
                report_error(context_, ErrorKind::kBadCount, Phase::kRows, domain.group.peer_of(node), row, node_rows_[node].begin, 0);
            const bool is_remote = node != own_node_ && row >= 0 && is_good;
            const uint32_t mask = __ballot_sync(~0u, is_own || is_remote);
            const int place = __popc(mask & ((1u << lane_) - 1));
            if (is_own) {
                addends_.rows[num_rows + place] = out_row(token);
                addends_.weights[num_partials + place] = out_weights(token);
            } else if (is_remote) {
                const uint8_t* message = domain.window.receive_ring(domain.network, own_node_, node) + args_.geometry.slot_offset(slot) +
                                         index * args_.geometry.num_message_bytes;
                addends_.rows[num_rows + place] = message;
                addends_.weights[num_partials + place] = reinterpret_cast<const float*>(message + args_.message.weights_offset());
            }
            has_own = has_own || __any_sync(~0u, is_own);
            num_rows += __popc(mask);
            num_partials += __popc(mask);
        }
        __syncwarp();
        if (has_own && num_rows == 1) return;  // it is the result
        sum_weights(addends_.weights, num_partials, args_.num_topk, out_weights(token));
        sum_rows(addends_.rows, num_rows, static_cast<int>(args_.message.num_row_bytes), out_row(token));
    }

    const CombineArgs& args_;
    const WaitContext& context_;
    const nvlink::Handshake& handshake_;
    ResultAddends& addends_;
    PartialAddends& own_addends_;
    NodeRows* node_rows_;
    const BlockSlots slots_;
    const Stream stream_;
    const int lane_;
    const int warp_;
    const int num_nodes_;
    const int own_node_;
};

}  // namespace
}  // namespace deepep::internode
