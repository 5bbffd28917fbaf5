#pragma once
// What dispatch and combine have in common: the roles of a block's warps, how an operation begins, how its blocks share the work of sending, and
// how its waits end (waits.cuh, control.cuh).
//
// Roles: the first half of a block's warps send, the others receive, side by side; nothing on the receiving side waits for what its own block
// sends. The last of the sending warps, the control warp, reads the sequences and checks the credits, also where a kernel only receives. The
// first block to have read posts this rank's own credits (some block always comes first), the last one advances the sequences: no block can then
// read them too late, however late it starts.
#include "deepep/ptx/atomics.cuh"
#include "deepep/ptx/barrier.cuh"
#include "deepep/ptx/memory.cuh"
#include "deepep/ptx/vector.cuh"
#include "deepep/sync/wait.cuh"
#include "launch.cuh"
#include "remote.cuh"

namespace deepep::ibgda {

constexpr int kControlWarp = kSendWarps - 1;
constexpr int kNumWorkers = kControlWarp * 32;  // threads of the other sending warps
constexpr unsigned kAllLanes = 0xffffffffu;

// --- roles ----------------------------------------------------------------------------------------------------------

// The block's barriers. 0, of all threads, serves before an operation begins only.
enum BlockBarrier : int { kSenders = 1, kWorkers = 2, kReceivers = 3, kBegun = 4, kGroups = 5 };

__device__ __forceinline__ bool is_receiver() { return threadIdx.x >= kNumSendThreads; }
__device__ __forceinline__ bool is_control_warp() { return threadIdx.x / 32 == kControlWarp; }
__device__ __forceinline__ int receive_thread() { return static_cast<int>(threadIdx.x) - kNumSendThreads; }
__device__ __forceinline__ int receive_warp() { return static_cast<int>(threadIdx.x) / 32 - kSendWarps; }

__device__ __forceinline__ void send_barrier() { ptx::named_barrier(kSenders, kNumSendThreads); }
__device__ __forceinline__ void worker_barrier() { ptx::named_barrier(kWorkers, kNumWorkers); }
__device__ __forceinline__ void receive_barrier() { ptx::named_barrier(kReceivers, kNumReceiveThreads); }
__device__ __forceinline__ bool receive_barrier_or(bool value) { return ptx::named_barrier_or(kReceivers, kNumReceiveThreads, value); }
// The control warp says that the operation has begun, in kernels that receive; every receiver waits for that before anything else.
__device__ __forceinline__ void tell_receivers() { ptx::named_barrier_arrive(kBegun, kNumReceiveThreads + 32); }
__device__ __forceinline__ void wait_begun() { ptx::named_barrier(kBegun, kNumReceiveThreads + 32); }

// Four lanes of the control warp look at the slots that one peer fills in one direction: three of them at a slot each, the fourth at what the
// peer was told last.
struct CreditLane {
    uint32_t taken;
    uint32_t broken;
    uint64_t told;
};

// Of the running operation; in shared memory.
struct Operation {
    CreditLane credit_lanes[32];         // kept for post_credits
    uint8_t* outgoing[kMaxWindowRanks];  // rows that this rank fills for a peer: in the peer's window, or in the own outbox (RDMA)
    uint8_t* incoming[kMaxWindowRanks];  // rows that a peer fills for this rank
    uint32_t sequences[kMaxWindowRanks];  // 0: the rank takes no part
    uint32_t launch;
    uint32_t num_sends;
    uint32_t is_claimed;  // this block's own share of sending is still its own
    uint32_t is_failed;
    int32_t next_share;
    uint32_t is_last;  // to receive: add_wait_stats
};

__device__ __forceinline__ Op op_of(Direction direction) { return direction == kDispatch ? Op::kDispatch : Op::kCombine; }
__device__ __forceinline__ WaitContext wait_context(const Domain& domain, const Operation& operation, Direction direction) {
    return {domain.host, domain.state(), op_of(direction), domain.rank, operation.launch};
}

// --- peers outside the NVLink domain --------------------------------------------------------------------------------

// All messages to a peer go through one queue pair: a later one then says that the earlier ones have landed.
constexpr int kQueueLane = 0;

template <bool kRemote>
__device__ __forceinline__ bool is_remote(const Domain& domain, int peer) {
    return kRemote && domain.remote.has(peer);
}

// A box begins with its index, then come weights, then the rows of both directions.
__device__ __forceinline__ uint8_t* box_of_rows(const Domain& domain, Direction direction, uint8_t* rows) { return rows - domain.window.rows_in_box(direction); }
__device__ __forceinline__ uint64_t* outgoing_index(const Domain& domain, const Operation& operation, Direction direction, int peer) {
    return reinterpret_cast<uint64_t*>(box_of_rows(domain, direction, operation.outgoing[peer]));
}
__device__ __forceinline__ uint64_t* incoming_index(const Domain& domain, const Operation& operation, Direction direction, int peer) {
    return reinterpret_cast<uint64_t*>(box_of_rows(domain, direction, operation.incoming[peer]));
}
__device__ __forceinline__ uint64_t* outgoing_weights(const Domain& domain, const Operation& operation, Direction direction, int peer) {
    return reinterpret_cast<uint64_t*>(box_of_rows(domain, direction, operation.outgoing[peer]) + domain.window.weights_in_box());
}
__device__ __forceinline__ uint64_t* incoming_weights(const Domain& domain, const Operation& operation, Direction direction, int peer) {
    return reinterpret_cast<uint64_t*>(box_of_rows(domain, direction, operation.incoming[peer]) + domain.window.weights_in_box());
}
// Rows lie at multiples of their stride; boxes may exceed 4 GiB, factors do not.
__device__ __forceinline__ uint64_t row_offset(int row, uint32_t stride) { return static_cast<uint64_t>(static_cast<uint32_t>(row)) * stride; }

// Posts bytes of an outgoing box to their place in the peer's. By one thread, after a barrier with those that stored them.
__device__ __noinline__ inline bool post_outgoing(const Domain& domain, const Operation& operation, Direction direction, int peer, const uint8_t* begin,
                                                  uint32_t num_bytes) {
    const int slot = static_cast<int>(operation.sequences[peer] % kNumSlots);
    const int64_t local_offset = begin - domain.own;
    const int64_t offset_in_box = local_offset - domain.window.outbox_distance() - domain.window.index_offset(slot, peer);
    return post_write(domain.remote, wait_context(domain, operation, direction), peer, kQueueLane, local_offset,
                      domain.window.index_offset(slot, domain.rank) + offset_in_box, num_bytes);
}

}  // namespace deepep::ibgda
