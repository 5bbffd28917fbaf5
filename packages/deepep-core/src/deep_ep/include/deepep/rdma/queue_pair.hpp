#pragma once
// A queue pair as the one who posts work sees it: a thread of a GPU or of the host. Several posters may share one.
//
//   reserve   takes slots for a batch; slots are taken only when they are free, so a poster that gives up leaves no hole
//   write_*   (wqe.hpp) fills them; batches of different posters are written at the same time
//   submit    publishes batches in the order of their slots; whoever rings the doorbell rings for all that is ready
//   wait_completed   returns when the NIC has finished a request
//
// All waits take a policy, called after each look that was in vain, which says when to give up; and each of them ends at once when the
// queue pair has failed. A failure is never passed over: it stays in `state->failure` until the queue pair is reset.
#include <cstdint>

#include "atomics.hpp"
#include "wqe.hpp"

namespace deepep::rdma {

constexpr uint32_t kMaxDepth = 32768;  // half of the range of 16-bit request numbers, so that differences are unambiguous

enum class WaitVerdict : uint32_t { kGoOn = 0, kTimeout = 1, kAborted = 2 };

enum class Outcome : uint8_t {
    kOk = 0,
    kTimeout = 1,
    kAborted = 2,
    kCompletionError = 3,  // the NIC said that a request failed; syndromes say why
    kBadCompletion = 4,    // the NIC reported a request that nobody has posted
    kLostPoster = 5,       // a poster reserved slots and never published them; those behind it cannot be published either
    kBadBatch = 6,         // a batch of no requests, or of more than the ring holds
};

struct QueueStatus {
    Outcome outcome;
    Syndrome syndrome;
    uint8_t vendor_syndrome;
    uint16_t request;  // number of the failed request
    uint32_t queue_pair;
    int32_t peer;

    DEEPEP_HOST_DEVICE bool ok() const { return outcome == Outcome::kOk; }
};

// Counters of requests since the queue pair was made, in the posters' own memory; the NIC never sees them. Each only grows.
//   rung <= ready <= reserved <= completed + depth;  completed <= ready
struct alignas(64) QueuePairState {
    uint64_t reserved;    // slots given to posters
    uint64_t ready;       // written and published, in order. Release by each poster; who acquires it may let the NIC read those slots
    uint64_t rung;        // told to the NIC
    uint64_t completed;   // reported by the NIC. Who acquires it may write those slots again
    uint64_t failure;     // 0, or the first failure that somebody saw (pack_failure)
    uint32_t is_ringing;  // 1 while somebody holds the doorbell
    uint32_t num_doorbells;
    uint64_t padding[2];
};
static_assert(sizeof(QueuePairState) == 64, "one line per queue pair");

// The memory that posters and NIC share:
//
//   requests          WqeBlock [depth]      written by posters, read by the NIC once the doorbell record covers them
//   completion        CompletionEntry       written by the NIC
//   doorbell record   be32                  written by posters before each doorbell: requests are ready up to here
//   doorbell          uint64                written by posters; in a real NIC a register, and the write is what wakes it
struct QueueMemory {
    uint32_t depth;

    static constexpr int64_t kAlignment = 64;
    DEEPEP_HOST_DEVICE int64_t completion_offset() const { return static_cast<int64_t>(depth) * kWqeBlockBytes; }
    DEEPEP_HOST_DEVICE int64_t doorbell_record_offset() const { return completion_offset() + sizeof(CompletionEntry); }
    DEEPEP_HOST_DEVICE int64_t doorbell_offset() const { return doorbell_record_offset() + kAlignment; }
    DEEPEP_HOST_DEVICE int64_t num_bytes() const { return doorbell_offset() + kAlignment; }

    DEEPEP_HOST_DEVICE WqeBlock* requests(uint8_t* base) const { return reinterpret_cast<WqeBlock*>(base); }
    DEEPEP_HOST_DEVICE CompletionEntry* completion(uint8_t* base) const {
        return reinterpret_cast<CompletionEntry*>(base + completion_offset());
    }
    DEEPEP_HOST_DEVICE uint32_t* record(uint8_t* base) const { return reinterpret_cast<uint32_t*>(base + doorbell_record_offset()); }
    DEEPEP_HOST_DEVICE uint64_t* doorbell(uint8_t* base) const { return reinterpret_cast<uint64_t*>(base + doorbell_offset()); }
};

struct QueuePair {
    WqeBlock* requests;
    const CompletionEntry* completion;
    uint32_t* record;
    uint64_t* doorbell;
    QueuePairState* state;
    uint32_t number;
    uint32_t depth;  // a power of two, at most kMaxDepth
    int32_t peer;

    DEEPEP_HOST_DEVICE WqeBlock* slot(uint64_t index) const { return &requests[index & (depth - 1)]; }
    DEEPEP_HOST_DEVICE WqePlace place(uint64_t index, bool is_signalled) const { return {number, index, is_signalled}; }
    DEEPEP_HOST_DEVICE QueueStatus status(Outcome outcome) const { return {outcome, Syndrome::kNone, 0, 0, number, peer}; }
};

DEEPEP_HOST_DEVICE uint64_t pack_failure(Outcome outcome, Syndrome syndrome, uint8_t vendor_syndrome, uint16_t request) {
    return static_cast<uint64_t>(outcome) | static_cast<uint64_t>(syndrome) << 8 | static_cast<uint64_t>(vendor_syndrome) << 16 |
           static_cast<uint64_t>(request) << 32;
}

// What is known of the queue pair's health, without looking at the NIC's memory.
DEEPEP_HOST_DEVICE QueueStatus failure_of(const QueuePair& pair) {
    const uint64_t word = load_relaxed_gpu(&pair.state->failure);
    return {static_cast<Outcome>(word & 0xff),
            static_cast<Syndrome>(word >> 8 & 0xff),
            static_cast<uint8_t>(word >> 16),
            static_cast<uint16_t>(word >> 32),
            pair.number,
            pair.peer};
}

// Keeps the first failure; returns the one that was kept.
DEEPEP_HOST_DEVICE QueueStatus fail(const QueuePair& pair, uint64_t failure) {
    compare_exchange_acq_rel_gpu(&pair.state->failure, 0, failure);
    return failure_of(pair);
}

// One look at the completion entry. Advances `completed`; notices errors. A poster that never waits for completions calls it once per
// operation: nothing else would tell it that the queue pair has failed.
DEEPEP_HOST_DEVICE QueueStatus poll(const QueuePair& pair) {
    const uint64_t failure = load_relaxed_gpu(&pair.state->failure);
    if (failure != 0) return failure_of(pair);
    // In this order: an entry read after `completed` is not older than it. The posters' number grows by the difference of the 16-bit
    // numbers; should 65536 requests pass between these two loads, the sum is too low, never too high.
    const uint64_t completed = load_acquire_gpu(&pair.state->completed);
    const uint32_t entry = Be32{load_acquire_sys(&pair.completion->counter_opcode.bits)}.value();
    const auto opcode = static_cast<CompletionOpcode>(entry >> 4 & 0xf);
    const auto request = static_cast<uint16_t>(entry >> 16);
    if (opcode == CompletionOpcode::kInvalid) return pair.status(Outcome::kOk);  // the NIC has not written it yet
    if (opcode != CompletionOpcode::kRequest) {
        // Behind an error there are only errors, "flushed" ones, so both words belong to errors even if the NIC writes in between.
        const uint32_t error = Be32{load_relaxed_sys(&pair.completion->error.bits)}.value();
        return fail(
            pair, pack_failure(Outcome::kCompletionError, static_cast<Syndrome>(error & 0xff), static_cast<uint8_t>(error >> 8), request));
    }
    const uint64_t now = completed + static_cast<uint16_t>(request + 1 - static_cast<uint16_t>(completed));
    if (now == completed) return pair.status(Outcome::kOk);
    if (now > load_acquire_gpu(&pair.state->reserved)) {
        return fail(pair, pack_failure(Outcome::kBadCompletion, Syndrome::kNone, 0, request));
    }
    max_release_gpu(&pair.state->completed, now);
    return pair.status(Outcome::kOk);
}

DEEPEP_HOST_DEVICE Outcome outcome_of(WaitVerdict verdict) {
    return verdict == WaitVerdict::kAborted ? Outcome::kAborted : Outcome::kTimeout;
}

// Takes `count` consecutive slots, the first of which is request *begin. Waits while the ring is full.
template <class Wait>
DEEPEP_HOST_DEVICE QueueStatus reserve(const QueuePair& pair, uint32_t count, Wait& wait, uint64_t* begin) {
    if (count == 0 || count > pair.depth) return pair.status(Outcome::kBadBatch);
    const QueueStatus health = failure_of(pair);
    if (!health.ok()) return health;
    uint64_t reserved = load_relaxed_gpu(&pair.state->reserved);
    while (true) {
        // Acquire: what is written into the slots comes after the NIC has read what was there.
        if (reserved + count <= load_acquire_gpu(&pair.state->completed) + pair.depth) {
            const uint64_t seen = compare_exchange_acq_rel_gpu(&pair.state->reserved, reserved, reserved + count);
            if (seen == reserved) {
                *begin = reserved;
                return pair.status(Outcome::kOk);
            }
            reserved = seen;  // another poster was first
            continue;
        }
        const uint64_t completed_before = load_relaxed_gpu(&pair.state->completed);
        const QueueStatus status = poll(pair);
        if (!status.ok()) return status;
        if (load_relaxed_gpu(&pair.state->completed) == completed_before) {
            const WaitVerdict verdict = wait();
            if (verdict != WaitVerdict::kGoOn) return pair.status(outcome_of(verdict));
        }
        reserved = load_relaxed_gpu(&pair.state->reserved);
    }
}

// Tells the NIC about everything that is ready. The caller holds `is_ringing`.
DEEPEP_HOST_DEVICE void ring_doorbell(const QueuePair& pair) {
    const uint64_t ready = load_acquire_gpu(&pair.state->ready);
    if (ready == load_relaxed_gpu(&pair.state->rung)) return;
    // The record before the doorbell: the NIC may read it as soon as it wakes. Both release what `ready` has published.
    store_release_sys(pair.record, doorbell_record(ready).bits);
    store_release_sys(pair.doorbell, doorbell_word(pair.number, ready));
    pair.state->num_doorbells += 1;
    store_relaxed_gpu(&pair.state->rung, ready);
}

// Publishes the batch [begin, begin + count), whose entries this thread has written (or a barrier has joined to it those that have), and
// returns when the NIC has been told. The last entry must be signalled, else nobody learns that the slots are free again.
template <class Wait>
DEEPEP_HOST_DEVICE QueueStatus submit(const QueuePair& pair, uint64_t begin, uint32_t count, Wait& wait) {
    // The batches before this one belong to posters that have nothing to wait for but each other.
    while (load_acquire_gpu(&pair.state->ready) != begin) {
        const QueueStatus status = failure_of(pair);
        if (!status.ok()) return status;
        const WaitVerdict verdict = wait();
        if (verdict != WaitVerdict::kGoOn) {
            // These slots are now a hole that nobody can fill: those who wait behind it need not try.
            fail(pair, pack_failure(Outcome::kLostPoster, Syndrome::kNone, 0, static_cast<uint16_t>(begin)));
            return pair.status(outcome_of(verdict));
        }
    }
    const uint64_t end = begin + count;
    store_release_gpu(&pair.state->ready, end);
    while (load_relaxed_gpu(&pair.state->rung) < end) {
        if (exchange_acquire_gpu(&pair.state->is_ringing, 1) == 0) {
            ring_doorbell(pair);
            store_release_gpu(&pair.state->is_ringing, 0);
            continue;
        }
        const QueueStatus status = failure_of(pair);
        if (!status.ok()) return status;
        const WaitVerdict verdict = wait();
        if (verdict != WaitVerdict::kGoOn) return pair.status(outcome_of(verdict));
    }
    return pair.status(Outcome::kOk);
}

// Waits until the NIC has finished all requests before `end`: the bytes that they read may be changed, their results are there.
template <class Wait>
DEEPEP_HOST_DEVICE QueueStatus wait_completed(const QueuePair& pair, uint64_t end, Wait& wait) {
    while (load_acquire_gpu(&pair.state->completed) < end) {
        const uint64_t completed_before = load_relaxed_gpu(&pair.state->completed);
        const QueueStatus status = poll(pair);
        if (!status.ok()) return status;
        if (load_relaxed_gpu(&pair.state->completed) != completed_before) continue;
        const WaitVerdict verdict = wait();
        if (verdict != WaitVerdict::kGoOn) return pair.status(outcome_of(verdict));
    }
    return pair.status(Outcome::kOk);
}

// The counters of a queue pair whose requests are numbered from `first_index`.
inline QueuePairState initial_state(uint64_t first_index = 0) {
    return {first_index, first_index, first_index, first_index, 0, 0, 0, {}};
}
// What the NIC shares with the posters, as new. The counters (initial_state) are set by whoever can reach them. No poster is at work and the
// NIC does not serve the queue pair.
inline void reset_memory(const QueuePair& pair, CompletionEntry* completion, uint64_t first_index = 0) {
    *completion = {};
    completion->counter_opcode = Be32::of(static_cast<uint32_t>(CompletionOpcode::kInvalid) << 4);
    *pair.record = doorbell_record(first_index).bits;
    *pair.doorbell = 0;
}

}  // namespace deepep::rdma
