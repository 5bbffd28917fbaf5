#pragma once
// What both roles of combine across nodes share: who serves which slot, and a node's partial sum of one row.
#include "deepep/ptx/memory.cuh"
#include "deepep/sync/wait.cuh"
#include "internode/claims.cuh"
#include "internode/combine_sums.cuh"
#include "internode/kernels.hpp"
#include "internode/network.cuh"
#include "kernels/handshake.cuh"

namespace deepep::internode {
namespace {

constexpr int kCombineOp = static_cast<int>(Op::kCombine);
constexpr int kNumRequestWarps = 1;
constexpr int kNumCombineWarps = 16;  // of all roles together
constexpr int kMaxCombineNodes = 64;
constexpr int kNumBiases = 2;

// A node's partial sum of a row, as one warp lists it in shared memory.
struct PartialAddends {
    const uint8_t* rows[kMaxNodeRanks];
    const float* weights[kMaxNodeRanks];
};

// Slot k (of any node, at either end of a stream) belongs to place k % num_places. Blocks are numbered in the order in which they start, and so are
// the places of their forwarders: the lowest unfinished place of the group never waits for one that nobody serves.
struct BlockSlots {
    int place;
    int num_places;
    int count;  // of one ring

    __device__ BlockSlots(const CombineArgs& args, int place) : place(place), num_places(args.num_places), count(0) {
        if (place < args.geometry.num_slots) count = (args.geometry.num_slots - 1 - place) / num_places + 1;
    }
    __device__ int slot(int i) const { return place + i * num_places; }
};

// Whether the caller collects for a place: the first one to ask does. By one thread.
__device__ inline bool takes_collecting(const CombineArgs& args, uint32_t epoch, int place) {
    unsigned long long* word = args.domain.collected + place;
    const unsigned long long before = peek(word);
    return signal_epoch(before) != epoch && atomicCAS(word, before, signal_word(epoch, 1)) == before;
}

// Contexts of a block (one slot of one other node's ring) are numbered slot by slot; within a slot the other nodes, each rank beginning with the
// one behind its own.
struct BlockContexts {
    const CombineArgs& args;
    const WaitContext& context;
    BlockSlots slots;

    __device__ int num_others() const { return args.domain.group.num_nodes() - 1; }
    __device__ int count() const { return slots.count * num_others(); }
    __device__ int place_of(int index) const { return index / num_others(); }  // among the block's slots
    __device__ int slot_of(int index) const { return slots.slot(place_of(index)); }
    __device__ int node_of(int index) const {
        const Group& group = args.domain.group;
        const int node = group.node() + 1 + index % num_others();
        return node >= group.num_nodes() ? node - group.num_nodes() : node;
    }
    __device__ int peer_of(int index) const { return args.domain.group.peer_of(node_of(index)); }
    // What the context's node asks of this rank.
    __device__ const uint64_t* request_word(int index) const {
        return args.domain.window.request(args.domain.network, context.epoch, node_of(index)) + slot_of(index);
    }
    // Where the answer goes, at that node.
    __device__ uint8_t* target(int index) const {
        return args.domain.window.receive_ring(args.domain.network, node_of(index), args.domain.group.node()) + args.geometry.slot_offset(slot_of(index));
    }
    __device__ uint64_t* answer_word(int index) const {
        return args.domain.window.full(args.domain.network, NetworkWindow::kCombineFull, args.domain.group.node()) + slot_of(index);
    }
    // By one lane: the word alone, of an answer that has been put by stores. Behind a fence for the whole system.
    __device__ void set_answered(int index, int64_t begin) const { network::set_word(answer_word(index), chunk_word(context.epoch, begin), peer_of(index)); }
    // By the whole warp: bytes with which the answer is complete, and the word that says so.
    __device__ void put_with_word(int index, uint8_t* to, const uint8_t* from, int64_t num_bytes, int64_t begin) const {
        network::put_chunk(to, from, num_bytes, answer_word(index), chunk_word(context.epoch, begin), peer_of(index));
    }
};

// The row at the rank that this lane stands for, or -1 where there is none within what that rank has granted.
__device__ __forceinline__ int32_t held_head(const CombineArgs& args, const WaitContext& context, const nvlink::Handshake& handshake, int32_t head) {
    const int lane = threadIdx.x % 32;
    if (lane >= args.domain.group.ranks_per_node || head < 0) return -1;
    const int64_t num_rows = handshake.grants[lane % kMaxNodeRanks].num_rows;  // 0 or more
    if (head < num_rows) return head;
    report_error(context, ErrorKind::kOverflow, Phase::kRows, args.domain.group.node() * args.domain.group.ranks_per_node + lane, head, num_rows, 0);
    return -1;
}

// Lists the rows of a token at the ranks of this node that hold it, in rank order; returns how many. `head` is the row at the rank that this lane stands
// for, or -1. Called by a whole warp.
__device__ __forceinline__ int list_over_node(const CombineArgs& args, const WaitContext& context, const nvlink::Handshake& handshake,
                                              PartialAddends& addends, int32_t head) {
    const int lane = threadIdx.x % 32;
    const nvlink::Grant& grant = handshake.grants[lane % kMaxNodeRanks];
    const bool is_held = held_head(args, context, handshake, head) >= 0;
    const uint32_t mask = __ballot_sync(~0u, is_held);
    __syncwarp();  // all lanes have read the list of the row before
    if (is_held) {
        const int place = __popc(mask & ((1u << lane) - 1));
        addends.rows[place] = grant.rows + head * args.message.num_row_bytes;
        addends.weights[place] = reinterpret_cast<const float*>(grant.weights) + static_cast<int64_t>(head) * args.num_topk;
    }
    __syncwarp();
    return __popc(mask);
}

// Sums what is listed into `out`, and the weights. Called by a whole warp.
__device__ __forceinline__ void sum_listed(const CombineArgs& args, const PartialAddends& addends, int num_rows, uint8_t* out, float* out_weights) {
    const int lane = threadIdx.x % 32, num_weights = args.num_topk;
    // Reads across NVLink take microseconds: those of the weights (lane = choice) are under way while the rows are summed.
    float weights[kMaxNodeRanks];
#pragma unroll
    for (int i = 0; i < kMaxNodeRanks; ++i) weights[i] = lane < num_weights && i < num_rows ? addends.weights[i][lane] : 0.0f;
    sum_rows(addends.rows, num_rows, static_cast<int>(args.message.num_row_bytes), out);
    float sum = 0.0f;
#pragma unroll
    for (int i = 0; i < kMaxNodeRanks; ++i) sum = __fadd_rn(sum, weights[i]);  // adding +0 changes no sum that starts from +0
    if (lane < num_weights) out_weights[lane] = sum;
}

// The row at each local rank of forwarded row f: lane r asks for rank r.
__device__ __forceinline__ int32_t head_of(const CombineArgs& args, int64_t f) {
    const int lane = threadIdx.x % 32;
    return lane < args.domain.group.ranks_per_node ? args.send_nvl_head[f * kMaxNodeRanks + lane] : -1;
}

}  // namespace
}  // namespace deepep::internode
