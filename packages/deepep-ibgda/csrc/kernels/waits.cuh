#pragma once
// How waits end: by what they wait for, a deadline, a mask, or a failure of the operation elsewhere; and how long they lasted.
#include "operation.cuh"

namespace deepep::ibgda {

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
