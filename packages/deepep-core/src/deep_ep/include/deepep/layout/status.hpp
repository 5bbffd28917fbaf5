#pragma once
#include <cstdint>

#include "../common/macros.hpp"

namespace deepep {

constexpr int kMaxRanks = 8;          // of one NVLink domain
constexpr int kMaxTopk = 32;          // choices per token
constexpr int kNumHeaderFields = 12;  // free fields of a call's header
constexpr int kNumHeaderWords = 16;   // status, experts, bad indices, reason, then the free fields

enum HeaderWord : int { kHeaderStatus = 0, kHeaderNumExperts = 1, kHeaderNumBadIndices = 2, kHeaderReason = 3, kHeaderFields = 4 };
enum HeaderStatus : uint32_t { kStatusValid = 0, kStatusInvalid = 1 };

enum class Op : uint32_t { kNone = 0, kNotify = 1, kDispatch = 2, kCombine = 3 };
constexpr int kNumOps = 4;

enum class Phase : uint32_t {
    kNone = 0,
    kHeader = 1,    // waiting for a peer's header
    kCounts = 2,    // waiting for a peer's counts
    kReady = 3,     // waiting for a peer to enter the operation and grant its memory
    kDone = 4,      // waiting for a peer's rows to have landed
    kReadDone = 5,  // waiting for a peer to stop reading our rows
    kSlotFull = 6,  // waiting for a row in the staging window
    kSlotFree = 7,  // waiting for room in a peer's staging window
    kRows = 8,      // checking row numbers
    kPost = 10,     // posting work requests for a peer, or hearing of their completion
    kCredit = 11,   // waiting for a peer to have taken an earlier message
    kIndex = 12,    // waiting for a peer's index of its rows
    kRow = 13,      // waiting for the words of a peer's row
    kWeights = 14,  // waiting for a peer's top-k weights
    kWindow = 15,   // waiting for rows from another node
    kRequest = 16,  // waiting for another node to ask for rows
};

enum class ErrorKind : uint32_t {
    kNone = 0,
    kTimeout = 1,
    kAborted = 2,
    kPeerFailed = 3,
    kMismatch = 4,
    kBadCount = 5,
    kOverflow = 6,
    kLayoutMismatch = 7,
};

// The first thing that went wrong, in pinned host memory. Valid while `generation` equals the host's error_generation + 1.
struct ErrorRecord {
    uint32_t generation;
    uint32_t kind;
    uint32_t op;
    uint32_t phase;
    int32_t rank;
    int32_t peer;
    uint32_t epoch;
    uint32_t reserved;
    uint64_t seen;
    uint64_t expected;
    uint64_t elapsed_ns;
};

// What the host needs from notify, in pinned host memory. `ticket` is stored last, with release.
struct CountsRecord {
    uint32_t ticket;
    int32_t num_recv_tokens;
    uint32_t mismatch_mask;
    uint32_t bad_count_mask;
    uint32_t headers[kMaxRanks][kNumHeaderWords];
};

// Pinned host memory that the host and this rank's kernels share; expert counts (int32 each) follow it.
// Kernels read the first three fields only when a wait turns slow, so that they cost nothing otherwise.
struct HostControl {
    uint64_t timeout_ns;        // host writes
    uint32_t is_aborted;        // host writes
    uint32_t error_generation;  // host writes; the device's record answers with + 1
    ErrorRecord error;          // device writes
    CountsRecord counts;        // device writes
};

// Device memory of one rank that no peer touches: operation counters and block arrivals. All zero at the start.
struct DeviceState {
    uint32_t epochs[kNumOps];         // operations of each kind that have ended here
    uint32_t failed_epochs[kNumOps];  // epoch of the last operation of that kind in which a wait ended badly
    uint32_t arrivals[kNumOps];       // blocks of the running operation that have finished; its last block sets 0 again
    uint32_t readers[kNumOps];        // likewise: readers of peers' memory that have finished
    uint32_t layout_arrivals;
    uint32_t layout_bad_indices;
    uint32_t error_claim;             // generation whose error record has an author
    uint32_t reserved;
    uint32_t push_claims[kMaxRanks];  // staged paths: next item to push to each rank
    uint32_t pull_claims[kMaxRanks + 2];  // next row to take from each rank (staged paths); then: next row to send or token to sum
    uint32_t padding[26];
};
static_assert(sizeof(DeviceState) % 128 == 0, "the window aligns its regions to 128 bytes");

}  // namespace deepep
