#pragma once
// What both ends of dispatch's streams share: how many rows each stream carries, and which block serves which slots.
#include "deepep/ptx/memory.cuh"
#include "deepep/sync/wait.cuh"
#include "internode/claims.cuh"
#include "internode/kernels.hpp"

namespace deepep::internode {
namespace {

// A stream as kernels use it, in shared memory: one for each node, the own one included.
struct StreamShape {
    int32_t num_rows;
    int32_t num_chunk_rows;
    int32_t num_chunks;
    int32_t first_row;  // of those that the forwarding rank keeps (receiving streams)
};

// By all threads; a barrier has to follow. Numbers that contradict the memory behind them count as zero rows.
__device__ inline void describe_streams(const DispatchArgs& args, const WaitContext& context, StreamShape* sent, StreamShape* received) {
    const Group& group = args.domain.group;
    for (int node = threadIdx.x; node < group.num_nodes(); node += blockDim.x) {
        const int64_t to_node = args.rdma_channel_prefix[node];
        const int64_t begin = node == 0 ? 0 : args.recv_rdma_rank_prefix[node - 1], end = args.recv_rdma_rank_prefix[node];
        const bool is_sent_good = to_node >= 0 && to_node <= args.num_tokens;
        const bool is_received_good = begin >= 0 && begin <= end && end <= args.num_forward_capacity;
        if (blockIdx.x == 0 && !is_sent_good) report_error(context, ErrorKind::kLayoutMismatch, Phase::kRows, args.peer_of(node), to_node, args.num_tokens, 0);
        if (blockIdx.x == 0 && !is_received_good) report_error(context, ErrorKind::kLayoutMismatch, Phase::kRows, args.peer_of(node), end, args.num_forward_capacity, 0);
        const auto shape = [&](int64_t num_rows, int64_t first_row) {
            const Stream stream = Stream::of(args.geometry, num_rows);
            return StreamShape{static_cast<int32_t>(num_rows), stream.num_chunk_rows, static_cast<int32_t>(stream.num_chunks()), static_cast<int32_t>(first_row)};
        };
        sent[node] = shape(is_sent_good ? to_node : 0, 0);
        received[node] = shape(is_received_good ? end - begin : 0, begin);
    }
}

// The contexts of a block: each is a slot of a stream from, or to, one other node.
//
// An SM's loads wait behind its own stores to other GPUs, so rows are delivered slowly where rows are sent: on many SMs blocks form teams (window.hpp).
// Blocks are numbered in the order in which they begin to run: where not all of them fit on the GPUs, the first ones of both ends find each other, end,
// and make room for the next. A sender must not need its team's deliverer for that, which may not fit either: until the deliverer has begun, the sender
// delivers for its place, too. So a place is served from when its sender runs, and whoever delivers for it is running.
//
// Which they are is worked out once, by all threads of the block (fill_contexts), because it takes divisions and is asked for on the way of every row.
struct ContextPlace {
    int32_t entry;  // the same number for a context in every block that serves it
    uint16_t node;
    uint16_t slot;
};
static_assert(kMaxSlots < 1 << 16);

struct BlockContexts {
    const DispatchArgs& args;  // a kernel's parameters cost no registers
    BlockPlaces places;
    const ContextPlace* table;  // in shared memory
    int num_contexts;

    // Of a team's block: whether the team's deliverer has begun, {epoch, 1}.
    __device__ uint64_t* deliverer_begun() const { return args.domain.deliverers_begun + places.team(args.num_team_senders); }
    __device__ int count() const { return num_contexts; }
    __device__ int slot_of(int index) const { return table[index].slot; }
    __device__ int node_of(int index) const { return table[index].node; }
    __device__ int entry_of(int index) const { return table[index].entry; }
    // Of what the context's node says to this rank, and of what this rank says to it.
    __device__ uint64_t* full_word(int index) const { return args.full_words + table[index].node * kMaxSlots + table[index].slot; }
    __device__ uint64_t* credit_word(int index) const { return args.credit_words + table[index].node * kMaxSlots + table[index].slot; }
};

// By all threads; a barrier has to follow. Returns how many there are: slot by slot the other nodes, each rank beginning with the one behind its own.
__device__ inline int fill_contexts(const DispatchArgs& args, const BlockPlaces& places, ContextPlace* table) {
    const int num_others = args.num_nodes - 1;
    const int count = num_others * places.num_own_slots(args.geometry.num_slots, args.num_places, args.num_team_senders);
    for (int index = threadIdx.x; index < count; index += blockDim.x) {
        const int round = BlockPlaces::quotient(index, num_others), other = index - round * num_others;
        const int slot = places.slot_of(round, args.num_places, args.num_team_senders), node = args.node + 1 + other;
        table[index] = {slot * num_others + other, static_cast<uint16_t>(node >= args.num_nodes ? node - args.num_nodes : node), static_cast<uint16_t>(slot)};
    }
    return count;
}

// What a sending context of this block carries next, in shared memory: a chunk's number, or one of these. Any warp may take a chunk; the
// chunks of one context are taken in order, because the table names one at a time.
constexpr int32_t kTaken = -2;  // a warp is at work on it
constexpr int32_t kOver = -1;

// Passes in which nothing moved, before a warp looks at the clock.
constexpr int kIdlePasses = 64;

// One lane's view of what its warp waits for, for the record of a wait that ends badly.
struct Waiting {
    int peer = -1;  // -1: nothing
    uint64_t seen = 0;
    uint64_t expected = 0;
};

// How long a warp has found nothing to do. The same in all its lanes.
struct Patience {
    int num_idle = 0;
    uint64_t start_ns = 0;  // of the wait, for is_hopeless

    __device__ void renew() {
        num_idle = 0;
        start_ns = 0;
    }
    // At every pass in which nothing moved: whether it is time to look at the clock.
    __device__ bool is_due() {
        if (++num_idle < kIdlePasses) return false;
        num_idle = 0;
        return true;
    }
};

// By the whole warp, some lane of which waits. start_ns belongs to the wait: 0 when it begins.
__device__ inline bool is_hopeless(const WaitContext& context, Phase phase, const Waiting& waiting, uint64_t& start_ns) {
    const int lane = threadIdx.x % 32;
    const uint32_t mask = __ballot_sync(~0u, waiting.peer >= 0);
    const int speaker = mask == 0 ? 0 : __ffs(static_cast<int>(mask)) - 1;
    bool is_over = false;
    uint64_t start = start_ns;  // the caller's own, if its address were taken, would keep all that lies beside it out of registers
    if (lane == speaker) is_over = wait_is_hopeless(context, phase, waiting.peer, waiting.seen, waiting.expected, &start);
    start_ns = __shfl_sync(~0u, start, speaker);
    return __shfl_sync(~0u, is_over, speaker);
}

// By a warp that has found nothing: true if it is to give up.
__device__ inline bool is_exhausted(Patience& patience, const WaitContext& context, Phase phase, const Waiting& waiting) {
    constexpr unsigned kIdleNs = 100;  // between looks at words that many warps look at
    __nanosleep(kIdleNs);
    return patience.is_due() && is_hopeless(context, phase, waiting, patience.start_ns);
}

// In a sender: whether the team's deliverer has begun. The sender takes no chunk any more then. Uniform over the warp.
__device__ inline bool is_relieved(const BlockContexts& contexts, uint32_t epoch) {
    return __shfl_sync(~0u, ptx::load_relaxed_sys(contexts.deliverer_begun()), 0) == signal_word(epoch, 1);
}

}  // namespace
}  // namespace deepep::internode
