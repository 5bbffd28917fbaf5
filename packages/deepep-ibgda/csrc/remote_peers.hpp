#pragma once
// Which peers are reached by work requests, and all that posting needs: part of a kernel's arguments (remote.cuh posts).
#include <cstdint>
#include <string>

#include "deepep/rdma/provider.hpp"

namespace deepep::ibgda {

constexpr int kMaxPeers = 512;
constexpr uint32_t kMaxInlineWords = rdma::kMaxInlineBytes / 4;  // of one request

// A peer is remote if it has queue pairs.
struct RemotePeers {
    rdma::RdmaView view;  // tables in device memory
    uint32_t is_remote[kMaxPeers / 32];

    DEEPEP_HOST_DEVICE bool any() const { return view.num_peers != 0; }
    DEEPEP_HOST_DEVICE bool has(int peer) const { return any() && (is_remote[peer / 32] >> peer % 32 & 1) != 0; }
};

// What a provider hands to whoever launches kernels, in host memory at the address `view_ptr`. 0: no peer is remote.
inline RemotePeers remote_peers_of(uint64_t view_ptr) {
    RemotePeers none = {};
    return view_ptr == 0 ? none : *reinterpret_cast<const RemotePeers*>(view_ptr);
}

// The text of an error record of phase kPost: `seen` is the queue pair's failure word, 0 when the deadline came first; `expected` its number.
inline std::string describe_failure(int peer, uint64_t seen, uint64_t expected) {
    rdma::QueuePairState state = {};
    state.failure = seen != 0 ? seen : rdma::pack_failure(rdma::Outcome::kTimeout, rdma::Syndrome::kNone, 0, 0);
    rdma::QueuePair pair = {};
    pair.state = &state;
    pair.number = static_cast<uint32_t>(expected);
    pair.peer = peer;
    return rdma::describe(rdma::failure_of(pair));
}

}  // namespace deepep::ibgda
