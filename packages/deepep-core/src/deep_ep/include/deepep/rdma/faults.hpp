#pragma once
// Faults that the software NIC injects, by seeded chance or at a named request, each counted when it takes effect. Host only.
#include <cstdint>

#include "wqe.hpp"

namespace deepep::rdma {

enum class Fault : int {
    kDelay = 0,            // a request starts late, and with it all behind it on its queue pair
    kReorder = 1,          // a queue pair is served before another whose request has waited longer
    kDropCompletion = 2,   // a request is executed, its completion never written
    kErrorCompletion = 3,  // a request is not executed and completes with an error; what follows is flushed
    kDeadLink = 4,         // from this request on nothing is executed; after `dead_link_steps` the retries are exhausted
};
constexpr int kNumFaults = 5;

inline const char* name_of(Fault fault) {
    constexpr const char* kNames[kNumFaults] = {"delay", "reorder", "drop completion", "error completion", "dead link"};
    return kNames[static_cast<int>(fault)];
}

struct FaultPlan {
    uint64_t seed = 0;
    uint32_t per_million[kNumFaults] = {};  // chance for each request; kReorder: for each choice among several queue pairs
    uint32_t max_delay_steps = 8;
    uint32_t dead_link_steps = 0;  // 0: a dead link stays silent for ever
};

// splitmix64: small, seedable, the same everywhere.
class Random {
public:
    explicit Random(uint64_t seed) : state_(seed) {}
    uint64_t next() {
        uint64_t z = (state_ += 0x9e3779b97f4a7c15ull);
        z = (z ^ (z >> 30)) * 0xbf58476d1ce4e5b9ull;
        z = (z ^ (z >> 27)) * 0x94d049bb133111ebull;
        return z ^ (z >> 31);
    }
    // 0 to bound - 1.
    uint32_t below(uint32_t bound) { return static_cast<uint32_t>((next() >> 32) * bound >> 32); }
    bool chance(uint32_t per_million) { return per_million != 0 && below(1000000) < per_million; }

private:
    uint64_t state_;
};

}  // namespace deepep::rdma
