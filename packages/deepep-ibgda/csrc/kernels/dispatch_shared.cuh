#pragma once
// What the two halves of dispatch share within a block.
#include "control.cuh"
#include "trace.cuh"

namespace deepep::ibgda {

// Further barriers: the workers have counted the routing table for the control warp; the receivers have read the index, for the senders.
constexpr int kTableCounted = 14, kIndexRead = 15;

constexpr int kMaxHeaderWords = 68;  // filled up to 16 bytes
static_assert(2 + 2 * kMaxTopk <= kMaxHeaderWords && kMaxHeaderWords % 4 == 0, "a header with weights fits");
constexpr int32_t kEveryRank = -2;

// A token as its senders need it. Prepared by the control warp.
struct alignas(16) Token {
    uint32_t words[kMaxHeaderWords];  // of the header
    int32_t ranks[kMaxHeaderWords];   // whom each of them concerns; others get kNoChoice instead
    uint8_t* slots[kMaxTopk];         // where the message goes
    int32_t destinations[kMaxTopk];
    uint32_t is_destination[kMaxWindowRanks / 32];  // bits
    int32_t num_destinations;
};

struct alignas(16) DispatchShared {
    Operation operation;
    Token tokens[2];  // this one, and the next
    alignas(16) uint32_t scales[2][kMaxHidden / 128];
    uint32_t found;  // escape values that occur in the row
    uint32_t escape;
    int32_t escaped_units[2];  // by parity of the round: the last unit whose row has to be escaped; -1 none
    uint32_t is_indexed;  // the index of every source has been read, and is good
    uint32_t is_lost[kMaxWindowRanks];       // with enable_shrink: sources that are left out
    uint64_t wait_begin_ns[kReceiveWarps];  // of the row that a warp waits for, if somebody wants to know
};

// In dynamic shared memory. Sending: how many tokens name each expert [E]; all of this rank in the upper half of a word, those below the
// block's token in the lower half. Receiving: the index words of every source [N, 2 + L].
static_assert(kMaxTokens < 1 << 16, "two counts of tokens to a word");
struct DispatchCounts {
    uint32_t* named;
    int32_t* index;
};
constexpr int num_dynamic_words(int num_experts, int num_ranks) { return 2 * num_experts + kIndexCounts * num_ranks; }

}  // namespace deepep::ibgda
