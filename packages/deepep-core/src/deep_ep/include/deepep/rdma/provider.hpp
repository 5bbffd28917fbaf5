#pragma once
// What a provider of queue pairs supplies: queue pairs for each peer, keys of the memory here and there, and what it knows of a failure.
// Kernels see an RdmaView only, so they are the same whether a NIC or the software NIC (software_nic.hpp) is behind it.
#include <cstdint>
#include <string>

#include "../layout/arithmetic.hpp"
#include "queue_pair.hpp"

namespace deepep::rdma {

// Keys of one rank's symmetric memory. Some providers register memory piece by piece, in chunks of equal size: the memory may begin inside
// the first and end inside the last.
struct MemoryKeys {
    uint64_t base;  // address of the memory as its owner names it; requests carry it
    int64_t num_bytes;
    int64_t chunk_bytes;
    int64_t first_chunk_offset;  // where the memory begins in its first chunk
    const Be32* keys;            // [num_chunks()]

    DEEPEP_HOST_DEVICE int64_t num_chunks() const {
        return num_bytes == 0 ? 0 : (first_chunk_offset + num_bytes + chunk_bytes - 1) / chunk_bytes;
    }
    // Where a request finds `offset`. The offset lies inside the memory.
    DEEPEP_HOST_DEVICE Location at(int64_t offset) const {
        return {base + static_cast<uint64_t>(offset), keys[(first_chunk_offset + offset) / chunk_bytes]};
    }
    // How many bytes from `offset` on one request may touch: a request has one key.
    DEEPEP_HOST_DEVICE int64_t contiguous(int64_t offset) const {
        return min_of(chunk_bytes - (first_chunk_offset + offset) % chunk_bytes, num_bytes - offset);
    }
};

struct RdmaView {
    int32_t num_peers;
    int32_t num_queue_pairs;       // for each peer
    const QueuePair* queue_pairs;  // [num_peers][num_queue_pairs]; the entry of a peer without queue pairs (this rank) has depth 0
    MemoryKeys local;
    const MemoryKeys* remote;  // [num_peers]

    // Requests that must land in order use the same one. Kernels copy it: the posting code reads its fields again and again.
    DEEPEP_HOST_DEVICE const QueuePair& queue_pair(int peer, int lane) const {
        return queue_pairs[static_cast<int64_t>(peer) * num_queue_pairs + lane % num_queue_pairs];
    }
};

// The cause of a queue pair's failure as its provider knows it. The completion entry may no longer have it: requests behind the failed one
// are flushed, and each flush overwrites the entry.
struct QueueFault {
    bool is_known;
    Syndrome syndrome;
    uint16_t request;
};

class QueuePairProvider {
public:
    virtual ~QueuePairProvider() = default;
    virtual const char* name() const = 0;
    // Its tables lie in host memory; whoever launches kernels copies them to where the kernels can read. Valid until destroyed.
    virtual RdmaView view() const = 0;
    virtual QueueFault first_fault(uint32_t queue_pair) const = 0;
    // Makes all queue pairs as new. No poster is at work, on any rank that shares them.
    virtual void reset() = 0;
};

inline const char* name_of(Syndrome syndrome) {
    switch (syndrome) {
        case Syndrome::kNone: return "no error";
        case Syndrome::kLocalLength: return "local length error";
        case Syndrome::kLocalOperation: return "local operation error (malformed request)";
        case Syndrome::kLocalProtection: return "local protection error (key or bounds of local memory)";
        case Syndrome::kFlushed: return "flushed after an earlier error";
        case Syndrome::kWindowBind: return "memory window bind error";
        case Syndrome::kBadResponse: return "bad response from the peer's NIC";
        case Syndrome::kLocalAccess: return "local access error";
        case Syndrome::kRemoteInvalidRequest: return "remote invalid request (alignment or size)";
        case Syndrome::kRemoteAccess: return "remote access error (key or bounds of the peer's memory)";
        case Syndrome::kRemoteOperation: return "remote operation error";
        case Syndrome::kRetriesExhausted: return "retries exhausted (the peer's NIC does not answer)";
        case Syndrome::kReceiverNotReady: return "receiver not ready";
        case Syndrome::kRemoteAborted: return "remote aborted";
    }
    return "unknown syndrome";
}

inline std::string describe(const QueueStatus& status) {
    const std::string where = "queue pair " + std::to_string(status.queue_pair) + " to rank " + std::to_string(status.peer);
    switch (status.outcome) {
        case Outcome::kOk: return where + " is healthy";
        case Outcome::kTimeout: return where + ": waited until the deadline";
        case Outcome::kAborted: return where + ": aborted while waiting";
        case Outcome::kCompletionError:
            return where + ": request " + std::to_string(status.request) + " failed: " + name_of(status.syndrome) + ", syndrome " +
                   std::to_string(static_cast<int>(status.syndrome)) + ", vendor syndrome " + std::to_string(status.vendor_syndrome);
        case Outcome::kBadCompletion:
            return where + ": the NIC reported request " + std::to_string(status.request) + ", which was never posted";
        case Outcome::kLostPoster:
            return where + ": the requests before " + std::to_string(status.request) + " were reserved and never published";
        case Outcome::kBadBatch: return where + ": a batch needs at least one request and at most as many as the ring holds";
    }
    return where + ": unknown outcome";
}

}  // namespace deepep::rdma
