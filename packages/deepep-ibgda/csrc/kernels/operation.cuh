#pragma once
// What dispatch and combine have in common: the roles of a block's warps, how an operation begins, how its blocks share the work of sending, and
// how its waits end.
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
__device__ __forceinline__ bool send_barrier_or(bool value) { return ptx::named_barrier_or(kSenders, kNumSendThreads, value); }
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

// --- waits ----------------------------------------------------------------------------------------------------------

// How long a wait lasts before it looks at the host's page, which lies across PCIe: if every waiting thread read it as soon as a peer is some
// microseconds late, the reads would take longer than the wait, and make other ranks wait in turn.
constexpr uint32_t kPatience = 5'000'000 >> 10;  // units of 1024 ns

// What becomes of a wait. kSkip: the peer is masked, the operation goes on without it. kEnd: the operation has failed. kReport: it fails here.
enum class Verdict : uint32_t { kGoOn, kSkip, kEnd, kReport };

__device__ __forceinline__ uint32_t coarse_time() { return static_cast<uint32_t>(ptx::global_timer_ns() >> 10) | 1; }

__device__ __forceinline__ bool has_failed(const Domain& domain, const Operation& operation, Direction direction) {
    return ptx::load_relaxed_gpu(&domain.state()->failed_epochs[static_cast<int>(op_of(direction))]) == operation.launch;
}

// A wait's slow side, entered every few hundred polls. It calls nothing: what a waiting thread holds stays in its registers. `start`: 0 at first.
// A message that is given up may still arrive: `broken` keeps its slot from being reused until the peer is known to have finished with it.
__device__ __forceinline__ Verdict judge_inline(const Domain& domain, const Operation& operation, Direction direction, int peer, uint32_t* start) {
    const uint32_t sequence = operation.sequences[peer];
    uint32_t* broken = domain.broken(direction, static_cast<int>(sequence % kNumSlots), peer);
    Verdict verdict = Verdict::kGoOn;
    const bool can_skip = domain.enable_shrink && peer != domain.rank;
    if (has_failed(domain, operation, direction)) {
        verdict = Verdict::kEnd;
    } else if (can_skip && ptx::load_relaxed_gpu(domain.masked(peer)) != 0) {
        verdict = Verdict::kSkip;
    } else {
        const uint32_t now = coarse_time();
        if (*start == 0) *start = now;
        if (now - *start < kPatience) return Verdict::kGoOn;
        if (ptx::load_relaxed_sys(&domain.host->is_aborted) != 0) {
            verdict = Verdict::kReport;
        } else {
            const uint64_t timeout = ptx::load_relaxed_sys(&domain.host->timeout_ns) >> 10;
            if (now - *start < min(timeout, static_cast<uint64_t>(0x7fffffff))) return Verdict::kGoOn;
            verdict = can_skip ? Verdict::kSkip : Verdict::kReport;
            if (can_skip) ptx::store_relaxed_gpu(domain.masked(peer), 1);
        }
    }
    ptx::store_relaxed_gpu(broken, sequence);
    return verdict;
}

// The same where little is held.
__device__ __noinline__ inline Verdict judge(const Domain& domain, const Operation& operation, Direction direction, int peer, uint32_t* start) {
    return judge_inline(domain, operation, direction, peer, start);
}

// The same for a warp in step, whose lanes wait for one peer.
__device__ __forceinline__ Verdict judge_as_warp(const Domain& domain, const Operation& operation, Direction direction, int peer, uint32_t* start) {
    Verdict verdict = Verdict::kGoOn;
    if (threadIdx.x % 32 == 0) verdict = judge_inline(domain, operation, direction, peer, start);
    return static_cast<Verdict>(__shfl_sync(kAllLanes, static_cast<uint32_t>(verdict), 0));
}

// A peer, or a handle, says what cannot be.
__device__ __noinline__ inline void report(const Domain& domain, const Operation& operation, Direction direction, ErrorKind kind, Phase phase, int peer,
                                           uint64_t seen, uint64_t expected) {
    report_error(wait_context(domain, operation, direction), kind, phase, peer, seen, expected, 0);
}

// The operation fails, and its record names the peer. By whoever got kReport; nothing is waited for afterwards.
__device__ __noinline__ inline void fail(const Domain& domain, const Operation& operation, Direction direction, Phase phase, int peer, uint64_t seen,
                                         uint64_t expected, uint32_t start) {
    const WaitContext context = wait_context(domain, operation, direction);
    const bool is_aborted = ptx::load_relaxed_sys(&domain.host->is_aborted) != 0;
    const uint64_t elapsed_ns = static_cast<uint64_t>(coarse_time() - start) << 10;
    report_error(context, is_aborted ? ErrorKind::kAborted : ErrorKind::kTimeout, phase, peer, seen, expected, elapsed_ns);
    mark_failed(context);
}

// Lanes that want to poll their signal word until it carries the operation's sequence with `peer`; a word's value is all that the reader may
// use. By a warp in step. False in lanes whose word did not come.
__device__ __forceinline__ bool wait_tagged(const Domain& domain, const Operation& operation, Direction direction, bool wants, const uint64_t* word,
                                            Phase phase, int peer, uint32_t* value) {
    const uint32_t sequence = operation.sequences[peer];
    const int lane = static_cast<int>(threadIdx.x) % 32;
    bool is_missing = wants;
    uint32_t start = 0;
    while (true) {
        unsigned looking = kAllLanes;
#pragma unroll 1
        for (int poll = 0; poll < kPollsPerCheck; ++poll) {
            if (is_missing && (looking >> lane & 1) != 0) {
                const uint64_t seen = ptx::load_relaxed_sys(word);
                is_missing = signal_epoch(seen) != sequence;
                *value = signal_value(seen);
            }
            const unsigned missing = __ballot_sync(kAllLanes, is_missing);
            if (missing == 0) return wants;
            // While nothing comes, one lane looks.
            looking = (missing & looking) == looking ? missing & (0u - missing) : missing;
        }
        // One lane judges for all that wait for its peer.
        const int first = __ffs(static_cast<int>(__ballot_sync(kAllLanes, is_missing))) - 1;
        Verdict verdict = Verdict::kGoOn;
        if (lane == first) verdict = judge(domain, operation, direction, peer, &start);
        if (verdict == Verdict::kReport) fail(domain, operation, direction, phase, peer, 0, sequence, start);
        const bool is_over = __shfl_sync(kAllLanes, static_cast<uint32_t>(verdict), first) != static_cast<uint32_t>(Verdict::kGoOn);
        if (is_over && __shfl_sync(kAllLanes, peer, first) == peer && is_missing) is_missing = wants = false;
    }
}

__device__ __forceinline__ bool is_full(uint4 v) {
    return v.x != kEmptyWord && v.y != kEmptyWord && v.z != kEmptyWord && v.w != kEmptyWord;
}
__device__ __forceinline__ uint4 empty_vector() { return make_uint4(kEmptyWord, kEmptyWord, kEmptyWord, kEmptyWord); }

// --- credits --------------------------------------------------------------------------------------------------------

// A slot whose message was given up: everything in it is emptied once a later message of that peer has been taken, because the peer's earlier
// kernel, with all its stores, had then ended.
__device__ __noinline__ inline void refill_box(const Domain& domain, Direction direction, int slot, int peer) {
    uint4* begin = reinterpret_cast<uint4*>(domain.own + domain.window.rows_offset(direction, slot, peer));
    const int64_t num_vectors = domain.window.num_rows_bytes(direction) / 16;
#pragma unroll 1
    for (int64_t i = 0; i < num_vectors; ++i) begin[i] = empty_vector();
}

__device__ __forceinline__ bool has_later_message(const Domain& domain, Direction direction, int slot, int peer) {
    const uint32_t given_up = ptx::load_relaxed_gpu(domain.broken(direction, slot, peer));
#pragma unroll 1
    for (int other = 0; other < kNumSlots; ++other) {
        const uint32_t taken = ptx::load_relaxed_gpu(domain.consumed(direction, other, peer));
        if (taken > given_up && ptx::load_relaxed_gpu(domain.broken(direction, other, peer)) != taken) return true;
    }
    return false;
}

// The doorbell is a release, like the store to a mapped peer.
__device__ __noinline__ inline void post_credit_word(const Domain& domain, const Operation& operation, Direction running, Direction direction, int peer,
                                                     uint64_t word) {
    const uint32_t words[2] = {low_half(static_cast<int64_t>(word)), high_half(static_cast<int64_t>(word))};
    post_inline(domain.remote, wait_context(domain, operation, running), peer, kQueueLane,
                domain.window.credits_offset() + 8ll * (direction * domain.num_ranks + domain.rank), words, 2);
}

// --- the control warp -----------------------------------------------------------------------------------------------

// Pairs of a direction and a peer, numbered.
struct CreditPair {
    Direction direction;
    int peer;

    __device__ static int count(const Domain& domain) { return kNumDirections * domain.num_ranks; }
    __device__ static CreditPair of(const Domain& domain, int i) { return i < domain.num_ranks ? CreditPair{kDispatch, i} : CreditPair{kCombine, i - domain.num_ranks}; }
};

__device__ __forceinline__ CreditLane read_credit_lane(const Domain& domain, int first_pair) {
    CreditLane result{0, 0, 0};
    const int lane = static_cast<int>(threadIdx.x) % 32, i = first_pair + lane / 4, slot = lane % 4;
    if (i >= CreditPair::count(domain)) return result;
    const CreditPair pair = CreditPair::of(domain, i);
    if (slot == kNumSlots) {
        result.told = ptx::load_relaxed_gpu(domain.posted(pair.direction, pair.peer));
    } else {
        result.taken = ptx::load_relaxed_gpu(domain.consumed(pair.direction, slot, pair.peer));
        result.broken = ptx::load_relaxed_gpu(domain.broken(pair.direction, slot, pair.peer));
    }
    return result;
}

// Tells every peer what has been taken from the slots that it fills here. What emptied those slots were earlier kernels, which the release passes
// on; the peer acquires the word before it stores into a slot again. What this operation itself takes is left to the next one, though other blocks
// may have noted it already. By the control warp of the first block.
template <bool kRemote>
__device__ __noinline__ void post_credits(const Domain& domain, Direction running, const Operation& operation) {
    const int lane = static_cast<int>(threadIdx.x) % 32, num_pairs = CreditPair::count(domain);
#pragma unroll 1
    for (int first = 0; first < num_pairs; first += 8) {
        CreditLane mine = first == 0 ? operation.credit_lanes[lane] : read_credit_lane(domain, first);
        const bool is_pair = first + lane / 4 < num_pairs;
        const int slot = lane % 4;
        const auto [direction, peer] = CreditPair::of(domain, min(first + lane / 4, num_pairs - 1));
        const uint64_t before = __shfl_sync(kAllLanes, mine.told, lane | 3);
        uint64_t word = 0;
        if (slot < kNumSlots && is_pair) {
            const uint64_t told = before & credit_of(kCreditMask, slot);
            bool is_new = mine.taken != 0 && credit_of(mine.taken, slot) != told && !(direction == running && mine.taken == operation.sequences[peer]);
            if (is_new && mine.broken == mine.taken) {
                is_new = has_later_message(domain, direction, slot, peer);
                if (is_new) refill_box(domain, direction, slot, peer);
            }
            word = is_new ? credit_of(mine.taken, slot) : told;
        }
        word |= __shfl_xor_sync(kAllLanes, word, 1);
        word |= __shfl_xor_sync(kAllLanes, word, 2);
        if (slot != kNumSlots || !is_pair || word == before) continue;
        *domain.posted(direction, peer) = word;
        if (is_remote<kRemote>(domain, peer))
            post_credit_word(domain, operation, running, direction, peer, word);
        else
            ptx::store_release_sys(domain.credits(reinterpret_cast<uint8_t*>(ptx::load_relaxed_gpu(domain.arena_word(peer))), direction, domain.rank), word);
    }
    __syncwarp();
    // For the next kernels: what is stored into a slot after a kernel boundary finds it empty.
#pragma unroll 1
    for (int i = lane; i < num_pairs; i += 32) {
        const auto [direction, peer] = CreditPair::of(domain, i);
        ptx::store_relaxed_gpu(domain.granted(direction, peer), ptx::load_acquire_sys(domain.credits(domain.own, direction, peer)));
    }
    __syncwarp();
    // Nobody waits for completions, so somebody has to ask how the queue pairs are.
    if (kRemote) static_cast<void>(poll_all(domain.remote, wait_context(domain, operation, running)));
}

// The state becomes the next kernel's. By the control warp of the last block that has read it.
__device__ __noinline__ inline void advance(const Domain& domain, Direction direction, const Operation& operation, bool sends) {
    const int lane = static_cast<int>(threadIdx.x) % 32;
    if (lane == 0) {
        ptx::store_relaxed_gpu(domain.launches(direction), operation.launch);
        if (sends) ptx::store_relaxed_gpu(domain.sends(direction), operation.num_sends);
    }
    if (!sends) return;
#pragma unroll 1
    for (int peer = lane; peer < domain.num_ranks; peer += 32)
        if (operation.sequences[peer] != 0) ptx::store_relaxed_gpu(domain.sequence(direction, peer), operation.sequences[peer]);
#pragma unroll 1
    for (int block = static_cast<int>(gridDim.x) + lane; block < kMaxBlocks; block += 32)
        ptx::store_relaxed_gpu(domain.claims(direction) + block, operation.num_sends);
}

// By the control warp.
__device__ __noinline__ inline void wait_for_credits(const Domain& domain, Direction direction, Operation& operation) {
#pragma unroll 1
    for (int peer = static_cast<int>(threadIdx.x) % 32; peer < domain.num_ranks; peer += 32) {
        const uint32_t sequence = operation.sequences[peer];
        uint32_t start = 0;
#pragma unroll 1
        for (int poll = 1; sequence != 0; ++poll) {
            const uint64_t credits = ptx::load_acquire_sys(domain.credits(domain.own, direction, peer));
            if (grants(credits, sequence)) break;
            if (poll % kPollsPerCheck != 0) continue;
            const Verdict verdict = judge(domain, operation, direction, peer, &start);
            if (verdict == Verdict::kGoOn) continue;
            if (verdict == Verdict::kReport) fail(domain, operation, direction, Phase::kCredit, peer, credits, sequence - kNumSlots, start);
            operation.sequences[peer] = 0;  // nothing goes to a rank that cannot take it
            operation.is_failed = 1;
            break;
        }
    }
    __syncwarp();
}

// What the control warp of a block holds from the beginning of an operation until it has settled the operation's bookkeeping.
template <bool kRemote>
class Control {
public:
    __device__ Control(const Domain& domain, Direction direction, Operation& operation)
        : domain_(domain), direction_(direction), operation_(operation), lane_(static_cast<int>(threadIdx.x) % 32) {}

    // Afterwards the operation is valid for whoever the control warp tells. All loads are under way before the first one is waited for.
    __device__ void begin_send(uint32_t* ticket) {
        PeerState peer_state = {};
        if (lane_ < domain_.num_ranks) peer_state.load(domain_, direction_, lane_);
        const uint32_t num_launches = ptx::load_relaxed_gpu(domain_.launches(direction_));
        const uint32_t num_sends = ptx::load_relaxed_gpu(domain_.sends(direction_));
        const CreditLane credit_lane = read_credit_lane(domain_, 0);
        // Each send adds one to its block's word, whoever does the block's share; see claim_share. After the loads, because it is waited for at once.
        uint32_t claim = 0;
        if (lane_ == 0) claim = ptx::add_relaxed_gpu(domain_.claims(direction_) + blockIdx.x, 1);
        bool is_ready = true;
#pragma unroll 1
        for (int peer = lane_; peer < domain_.num_ranks; peer += 32) {
            if (peer != lane_) peer_state.load(domain_, direction_, peer);
            const uint32_t sequence = peer_state.is_masked != 0 ? 0 : peer_state.sequence + 1;
            note_peer(peer, reinterpret_cast<uint8_t*>(peer_state.arena), sequence);
            if (sequence != 0 && !grants(peer_state.credits, sequence)) is_ready = false;
            if (ticket != nullptr && blockIdx.x == 0) ticket[peer] = sequence;
        }
        if (lane_ == 0) {
            operation_.launch = num_launches + 1;
            operation_.num_sends = num_sends + 1;
            operation_.is_failed = 0;
        }
        sends_ = true;
        arrive(credit_lane);
        if (lane_ == 0) {
            operation_.is_claimed = claim == num_sends;
            if (claim != num_sends) ptx::add_relaxed_gpu(domain_.claims(direction_) + blockIdx.x, 0u - 1);  // somebody was faster
        }
        __syncwarp();
        if (__all_sync(kAllLanes, is_ready)) return;
        // Rarely: a peer is more than two operations behind. It may wait for our own credits meanwhile.
        post_and_advance();
        wait_for_credits(domain_, direction_, operation_);
    }

    // In a kernel that only receives.
    __device__ void begin_receive(const uint32_t* ticket) {
        const uint32_t num_launches = ptx::load_relaxed_gpu(domain_.launches(direction_));
        const CreditLane credit_lane = read_credit_lane(domain_, 0);
#pragma unroll 1
        for (int peer = lane_; peer < domain_.num_ranks; peer += 32) note_peer(peer, domain_.own, ticket[peer]);  // nothing goes out
        if (lane_ == 0) {
            operation_.launch = num_launches + 1;
            operation_.num_sends = 0;
            operation_.is_claimed = 0;
            operation_.is_failed = 0;
        }
        arrive(credit_lane);
    }

    // As late as it likes, but before the block waits for anything: what is done here takes microseconds, and nobody else needs it soon. `receives`:
    // so does this kernel.
    __device__ void settle(bool receives) {
        if (receives && blockIdx.x == 0) {
#pragma unroll 1
            for (int peer = lane_; peer < domain_.num_ranks; peer += 32) {
                const uint32_t sequence = operation_.sequences[peer];
                // The next kernel's credit. Kernel boundaries order it behind everything that is taken here.
                if (sequence != 0) ptx::store_relaxed_gpu(domain_.consumed(direction_, static_cast<int>(sequence % kNumSlots), peer), sequence);
            }
        }
        post_and_advance();
    }

private:
    struct PeerState {
        uint32_t is_masked, sequence;
        uint64_t arena;
        uint64_t credits;  // what the peer has taken and emptied; an earlier kernel acquired it: an acquire here would delay the first store

        __device__ void load(const Domain& domain, Direction direction, int peer) {
            sequence = ptx::load_relaxed_gpu(domain.sequence(direction, peer));
            arena = ptx::load_relaxed_gpu(domain.arena_word(peer));
            credits = ptx::load_relaxed_gpu(domain.granted(direction, peer));
            is_masked = domain.enable_shrink && peer != domain.rank ? ptx::load_relaxed_gpu(domain.masked(peer)) : 0;
        }
    };

    __device__ void post_and_advance() {
        if (is_settled_) return;
        is_settled_ = true;
        const uint32_t before = __shfl_sync(kAllLanes, arrival_, 0);
        if (before == 0) post_credits<kRemote>(domain_, direction_, operation_);
        if (before == gridDim.x - 1) advance(domain_, direction_, operation_, sends_);
    }
    __device__ void note_peer(int peer, uint8_t* arena, uint32_t sequence) {
        const WindowOffsets& window = domain_.window;
        const int slot = static_cast<int>(sequence % kNumSlots);
        uint8_t* incoming = domain_.own + window.rows_offset(direction_, slot, peer);
        operation_.sequences[peer] = sequence;
        operation_.incoming[peer] = incoming;
        operation_.outgoing[peer] =
            is_remote<kRemote>(domain_, peer) ? incoming + window.outbox_distance() : arena + window.rows_offset(direction_, slot, domain_.rank);
    }
    // This block's reads of what the last block changes are done: their values have been stored to shared memory. What follows from that is only
    // that those reads cannot return what is stored later; no data is passed on, so the addition needs no fence.
    __device__ void arrive(const CreditLane& credit_lane) {
        operation_.credit_lanes[lane_] = credit_lane;
        __syncwarp();
        if (lane_ == 0) arrival_ = ptx::increment_relaxed_gpu(domain_.readers(direction_), gridDim.x - 1);
    }

    const Domain& domain_;
    Direction direction_;
    Operation& operation_;
    int lane_;
    bool sends_ = false;
    bool is_settled_ = false;
    uint32_t arrival_ = 0;
};

// --- sending, shared among blocks -----------------------------------------------------------------------------------

// The work of sending is cut into shares, one per block. A block that has finished its own looks for shares that nobody has taken up (their
// blocks are not resident) and takes them over before it waits for anything: so one resident block per rank is enough.
// A share's word equals num_sends once it is claimed (or, for a moment, one more).

// By the control warp: claims a share that nobody has taken up, or -1. Blocks that have just been launched claim theirs within a microsecond or
// two; so long nothing is taken from them.
__device__ __noinline__ inline int claim_share(const Domain& domain, Direction direction, const Operation& operation) {
    const int lane = static_cast<int>(threadIdx.x) % 32, num_shares = static_cast<int>(gridDim.x);
    const uint64_t begin_ns = ptx::global_timer_ns();
    while (true) {
        int found = num_shares;
#pragma unroll 4
        for (int share = lane; share < num_shares; share += 32)
            if (static_cast<int32_t>(ptx::load_relaxed_gpu(domain.claims(direction) + share) - operation.num_sends) < 0) found = min(found, share);
        found = __reduce_min_sync(kAllLanes, found);
        if (found == num_shares) return -1;
        if (ptx::global_timer_ns() - begin_ns < 4000) continue;
        uint32_t before = 0;
        if (lane == 0) before = atomicCAS(domain.claims(direction) + found, operation.num_sends - 1, operation.num_sends);
        if (__shfl_sync(kAllLanes, before, 0) == operation.num_sends - 1) return found;
    }
}

// By all senders, each warp in its role: the next share to send, or -1. A share holds a barrier of the senders at least.
__device__ __forceinline__ int next_share_as_worker(const Operation& operation) {
    send_barrier();
    return operation.next_share;
}
__device__ __forceinline__ int next_share_as_control(const Domain& domain, Direction direction, Operation& operation) {
    const int share = claim_share(domain, direction, operation);
    if (threadIdx.x % 32 == 0) operation.next_share = share;
    send_barrier();
    return share;
}
__device__ __forceinline__ int next_share(const Domain& domain, Direction direction, Operation& operation) {
    return is_control_warp() ? next_share_as_control(domain, direction, operation) : next_share_as_worker(operation);
}

// --- statistics -----------------------------------------------------------------------------------------------------

// The last block adds each source's longest wait to the caller's statistics. By all receivers, at the end.
__device__ __noinline__ inline void add_wait_stats(const Domain& domain, Direction direction, Operation& operation, int64_t* stats) {
    receive_barrier();
    uint32_t* arrivals = &domain.state()->arrivals[static_cast<int>(op_of(direction))];
    if (receive_thread() == 0) operation.is_last = ptx::add_acq_rel_gpu(arrivals, 1) == gridDim.x - 1;
    receive_barrier();
    if (operation.is_last == 0) return;
#pragma unroll 1
    for (int peer = receive_thread(); peer < domain.num_ranks; peer += kNumReceiveThreads) {
        unsigned long long* longest = reinterpret_cast<unsigned long long*>(domain.longest_wait(direction, peer));
        stats[peer] += static_cast<int64_t>(atomicExch(longest, 0ull));
    }
    if (receive_thread() == 0) ptx::store_relaxed_gpu(arrivals, 0);
}

__device__ __noinline__ inline void note_wait(const Domain& domain, Direction direction, int peer, uint64_t begin_ns) {
    if (peer != domain.rank)
        atomicMax(reinterpret_cast<unsigned long long*>(domain.longest_wait(direction, peer)),
                  static_cast<unsigned long long>(ptx::global_timer_ns() - begin_ns));
}

}  // namespace deepep::ibgda
