#pragma once
// What the two halves of dispatch share within a block.
#include "operation.cuh"
#include "trace.cuh"

namespace deepep::ibgda {

constexpr int kTableEntries = 4096;  // of the routing table, kept in shared memory when it has no more

// A token as its senders need it. Prepared by the control warp.
struct alignas(16) Token {
    int32_t experts[kMaxTopk];   // global, -1 for none; filled up with -1
    int32_t dst_ranks[kMaxTopk];  // of each choice; -1 where nothing is sent
    int32_t first_of[kMaxTopk];   // the first choice of the same expert
    uint32_t weights[kMaxTopk];   // bits
    int32_t num_destinations;
    int32_t destinations[kMaxTopk];
    uint8_t* slots[kMaxTopk];  // where the message goes
};

constexpr int kNumPositionBuffers = 3;

struct alignas(16) DispatchShared {
    Operation operation;
    Token tokens[2];  // this one, and the next
    int32_t positions[kNumPositionBuffers][kMaxTopk];
    uint32_t scales[2][kMaxHidden / 128];
    alignas(16) int32_t table[kTableEntries];
    uint32_t found;                     // escape values that occur in the row
    int32_t num_tokens[kMaxWindowRanks];  // of every source; -1: left out or lost
    uint32_t is_lost[kMaxWindowRanks];
};

// Dynamic shared memory, int32: sending, counts of a share's experts [E]; receiving, counts [N, L] and first rows [N, L] of every source's
// rows at each local expert.
constexpr int num_dynamic_words(int num_experts) { return 2 * num_experts; }

}  // namespace deepep::ibgda
