#pragma once
// Waits that end: each has a deadline, an abort word, and a record of what went wrong.
#include <cstdint>

#include "../layout/signal.hpp"
#include "../layout/status.hpp"
#include "../ptx/memory.cuh"

namespace deepep {

// Who is waiting, and where the outcome is kept.
struct WaitContext {
    HostControl* host;
    DeviceState* state;
    Op op;
    int rank;
    uint32_t epoch;
};

// Keeps the first error of this generation for the host. `failed_epochs` then ends the waits of the operation's other blocks.
__device__ __noinline__ inline void report_error(const WaitContext& context, ErrorKind kind, Phase phase, int peer, uint64_t seen,
                                          uint64_t expected, uint64_t elapsed_ns) {
    const uint32_t generation = ptx::load_relaxed_sys(&context.host->error_generation) + 1;
    if (ptx::exchange_relaxed_gpu(&context.state->error_claim, generation) == generation) return;
    ErrorRecord* record = &context.host->error;
    ptx::store_relaxed_sys(&record->kind, static_cast<uint32_t>(kind));
    ptx::store_relaxed_sys(&record->op, static_cast<uint32_t>(context.op));
    ptx::store_relaxed_sys(&record->phase, static_cast<uint32_t>(phase));
    ptx::store_relaxed_sys(reinterpret_cast<uint32_t*>(&record->rank), static_cast<uint32_t>(context.rank));
    ptx::store_relaxed_sys(reinterpret_cast<uint32_t*>(&record->peer), static_cast<uint32_t>(peer));
    ptx::store_relaxed_sys(&record->epoch, context.epoch);
    ptx::store_relaxed_sys(&record->seen, seen);
    ptx::store_relaxed_sys(&record->expected, expected);
    ptx::store_relaxed_sys(&record->elapsed_ns, elapsed_ns);
    ptx::store_release_sys(&record->generation, generation);  // the host reads the fields after it sees the generation
}

__device__ __forceinline__ void mark_failed(const WaitContext& context) {
    ptx::store_relaxed_gpu(&context.state->failed_epochs[static_cast<int>(context.op)], context.epoch);
}
__device__ __forceinline__ bool has_failed(const WaitContext& context) {
    return ptx::load_relaxed_gpu(&context.state->failed_epochs[static_cast<int>(context.op)]) == context.epoch;
}

// A wait younger than this never looks at the host's page. The page lies across PCIe, and loads of it hold up all others of the SM: with hundreds
// of warps that look at it every 200 us, combine among four nodes of one H200 each took 3.9 ms instead of 0.9 (benchmarks/results/2026-11-21-h200-x4).
constexpr uint64_t kPatienceNs = 2'000'000;

// The slow side of a wait, entered every few hundred polls.
__device__ __noinline__ inline bool wait_is_hopeless(const WaitContext& context, Phase phase, int peer, uint64_t seen, uint64_t expected,
                                              uint64_t* start_ns) {
    if (has_failed(context)) return true;  // another wait of this operation has ended badly and has reported it
    const uint64_t now = ptx::global_timer_ns();
    if (*start_ns == 0) *start_ns = now;
    const uint64_t elapsed = now - *start_ns;
    if (elapsed < kPatienceNs) return false;
    const bool is_aborted = ptx::load_relaxed_sys(&context.host->is_aborted) != 0;
    if (!is_aborted && elapsed < ptx::load_relaxed_sys(&context.host->timeout_ns)) return false;
    report_error(context, is_aborted ? ErrorKind::kAborted : ErrorKind::kTimeout, phase, peer, seen, expected, elapsed);
    mark_failed(context);
    return true;
}

constexpr int kPollsPerCheck = 256;

// Waits poll with relaxed loads and acquire once at the end: an acquiring load across GPUs invalidates the SM's cache, and a warp that polls with
// it slows down all others of its SM (combine with rows that come late: 1832 instead of 640 us with 4 polling warps instead of 1 on 24 SMs).

// Polls until the word carries `epoch`; false when the wait ended badly. With kAcquire everything that its writer released before the word is
// then visible to this thread's ordinary loads; without it the word is all that may be used.
template <bool kAcquire>
__device__ __forceinline__ bool wait_signal(const WaitContext& context, const uint64_t* word, uint32_t epoch, Phase phase, int peer,
                                            uint32_t* value) {
    uint64_t start_ns = 0;
    while (true) {
        uint64_t seen = 0;
        for (int poll = 0; poll < kPollsPerCheck; ++poll) {
            seen = ptx::load_relaxed_sys(word);
            if (signal_epoch(seen) == epoch) {
                if (kAcquire) seen = ptx::load_acquire_sys(word);
                *value = signal_value(seen);
                return true;
            }
        }
        if (wait_is_hopeless(context, phase, peer, seen, signal_word(epoch, 0), &start_ns)) return false;
    }
}

// Polls until the word equals `expected` as a whole; acquires like wait_signal<true>.
__device__ __forceinline__ bool wait_exact(const WaitContext& context, const uint64_t* word, uint64_t expected, Phase phase, int peer) {
    uint64_t start_ns = 0;
    while (true) {
        uint64_t seen = 0;
        for (int poll = 0; poll < kPollsPerCheck; ++poll) {
            seen = ptx::load_relaxed_sys(word);
            if (seen == expected) {
                static_cast<void>(ptx::load_acquire_sys(word));
                return true;
            }
        }
        if (wait_is_hopeless(context, phase, peer, seen, expected, &start_ns)) return false;
    }
}

}  // namespace deepep
