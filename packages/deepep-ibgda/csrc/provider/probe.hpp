#pragma once
// One word over each queue pair to each remote peer, before the first operation: it shows that the queue pair leads to that peer, that the
// peer's keys and addresses are what we take them for, and that completions come back.
//
// Collective: every rank posts; then all pass a barrier; then every rank checks what has arrived at the start of its arena, which nothing
// else uses yet (num_bytes).
#include <cstdint>
#include <string>
#include <utility>
#include <vector>

#include "remote_peers.hpp"

namespace deepep::ibgda {

struct Probe {
    int rank;
    int device;
    uint8_t* arena;
    RemotePeers remote;
    uint32_t nonce;  // the same on all ranks, another one each time

    int64_t num_bytes() const { return int64_t{8} * remote.view.num_peers * remote.view.num_queue_pairs; }
};

// Waits for the completions. Empty, or which queue pair has failed and why.
std::string post_probe(const Probe& probe, double timeout_s);
// (peer, lane) of the words that have not arrived.
std::vector<std::pair<int, int>> missing_of_probe(const Probe& probe);

}  // namespace deepep::ibgda
