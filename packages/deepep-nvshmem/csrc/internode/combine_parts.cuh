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
constexpr int kNumCombineWarps = 20;  // of all roles together
constexpr int kMaxCombineNodes = 64;
constexpr int kNumBiases = 2;

using PartialAddends = Addends<kMaxNodeRanks>;
using ResultAddends = Addends<kNumBiases + kMaxCombineNodes>;

// Everything that belongs to slot k (of any node, at either end of a stream) is served by block k % num_blocks. So block i of one rank needs
// block i of other ranks and no other, and the lowest unfinished block of the group never waits for a block that is not running: blocks are
// numbered in the order in which they start.
struct BlockSlots {
    int block;
    int num_blocks;
    int count;  // of one ring

    __device__ BlockSlots(int block_number, int num_slots)
        : block(block_number), num_blocks(gridDim.x), count(block_number < num_slots ? (num_slots - 1 - block_number) / num_blocks + 1 : 0) {}
    __device__ int slot(int i) const { return block + i * num_blocks; }
};

// Contexts of a block (one slot of one other node's ring) are numbered slot by slot; within a slot the other nodes, each rank beginning with the
// one behind its own.
__device__ __forceinline__ int other_node(const Group& group, int other) {
    const int node = group.node() + 1 + other;
    return node >= group.num_nodes() ? node - group.num_nodes() : node;
}

// The row at the rank that this lane stands for, or -1 where there is none within what that rank has granted.
__device__ __forceinline__ int32_t held_head(const CombineArgs& args, const WaitContext& context, const nvlink::Handshake& handshake, int32_t head) {
    const int lane = threadIdx.x % 32;
    if (lane >= args.domain.group.ranks_per_node || head < 0) return -1;
    const int64_t num_rows = handshake.grants[lane % kMaxNodeRanks].num_rows;  // 0 or more
    if (head < num_rows) return head;
    report_error(context, ErrorKind::kOverflow, Phase::kRows, args.domain.group.node() * args.domain.group.ranks_per_node + lane, head, num_rows, 0);
    return -1;
}

// Lists the rows of a token at the ranks of this node that hold it, in rank order, each from byte `begin` on; returns how many. `head` is the row at the
// rank that this lane stands for, or -1. Called by a whole warp.
__device__ __forceinline__ int list_over_node(const CombineArgs& args, const WaitContext& context, const nvlink::Handshake& handshake,
                                              PartialAddends& addends, int32_t head, int64_t begin = 0) {
    const int lane = threadIdx.x % 32;
    const nvlink::Grant& grant = handshake.grants[lane % kMaxNodeRanks];
    const bool is_held = held_head(args, context, handshake, head) >= 0;
    const uint32_t mask = __ballot_sync(~0u, is_held);
    __syncwarp();  // all lanes have read the list of the row before
    if (is_held) {
        const int place = __popc(mask & ((1u << lane) - 1));
        addends.rows[place] = grant.rows + head * args.message.num_row_bytes + begin;
        addends.weights[place] = reinterpret_cast<const float*>(grant.weights) + static_cast<int64_t>(head) * args.num_topk;
    }
    __syncwarp();
    return __popc(mask);
}

// Sums so many bytes of what is listed into `out`, and the weights, if they are wanted. Called by a whole warp.
__device__ __forceinline__ void sum_listed(const CombineArgs& args, const PartialAddends& addends, int num_rows, int num_bytes, uint8_t* out, float* out_weights) {
    const int lane = threadIdx.x % 32, num_weights = out_weights == nullptr ? 0 : args.num_topk;
    // Reads across NVLink take microseconds: those of the weights (lane = choice) are under way while the rows are summed.
    float weights[kMaxNodeRanks];
#pragma unroll
    for (int i = 0; i < kMaxNodeRanks; ++i) weights[i] = lane < num_weights && i < num_rows ? addends.weights[i][lane] : 0.0f;
    sum_rows(addends.rows, num_rows, num_bytes, out);
    float sum = 0.0f;
#pragma unroll
    for (int i = 0; i < kMaxNodeRanks; ++i) sum = __fadd_rn(sum, weights[i]);  // adding +0 changes no sum that starts from +0
    if (lane < num_weights) out_weights[lane] = sum;
}

__device__ __forceinline__ void sum_listed(const CombineArgs& args, const PartialAddends& addends, int num_rows, uint8_t* out, float* out_weights) {
    sum_listed(args, addends, num_rows, static_cast<int>(args.message.num_row_bytes), out, out_weights);
}

// The row at each local rank of forwarded row f: lane r asks for rank r.
__device__ __forceinline__ int32_t head_of(const CombineArgs& args, int64_t f) {
    const int lane = threadIdx.x % 32;
    return lane < args.domain.group.ranks_per_node ? args.send_nvl_head[f * kMaxNodeRanks + lane] : -1;
}

}  // namespace
}  // namespace deepep::internode
