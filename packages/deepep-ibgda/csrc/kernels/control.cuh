#pragma once
// What control warps do: credits, how an operation begins and how its state becomes the next one's, and who takes over which share of sending.
#include "waits.cuh"

namespace deepep::ibgda {

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
        if (sends) {
            ptx::store_relaxed_gpu(domain.sends(direction), operation.num_sends);
            // The next kernel's: the one before, which drew from this word last, has ended, and this kernel draws from the other.
            ptx::store_relaxed_gpu(domain.draws(direction, operation.num_sends + 1), 0);
        }
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

    __device__ void begin_send(uint32_t* ticket) {
        begin_send(ticket, [] {});
    }
    // Afterwards the operation is valid for whoever the control warp tells. All loads are under way before the first one is waited for, also those of
    // `load_more`: loaded earlier, they would be put on the stack, and so waited for, while the others have yet to be asked for.
    template <class LoadMore>
    __device__ void begin_send(uint32_t* ticket, const LoadMore& load_more) {
        // Each send adds one to its block's word, whoever does the block's share; see claim_share.
        uint32_t claim = 0;
        if (lane_ == 0) claim = ptx::increment_relaxed_gpu(domain_.claims(direction_) + blockIdx.x, 0xffffffffu);
        PeerState peer_state = {};
        if (lane_ < domain_.num_ranks) peer_state.load(domain_, direction_, lane_);
        const uint32_t num_launches = ptx::load_relaxed_gpu(domain_.launches(direction_));
        const uint32_t num_sends = ptx::load_relaxed_gpu(domain_.sends(direction_));
        const CreditLane credit_lane = read_credit_lane(domain_, 0);
        load_more();
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
        // Lanes read the time apart: they go on together.
        if (__any_sync(kAllLanes, ptx::global_timer_ns() - begin_ns < 4000)) continue;
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

}  // namespace deepep::ibgda
