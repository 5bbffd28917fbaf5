#pragma once
// Queue pairs and keys as NVSHMEM's IBGDA transport leaves them in its device state, turned into the tables that our posting code reads.
// Pure functions of that state: nothing here calls NVSHMEM or CUDA.
//
// The state's structures come from NVSHMEM's headers, but are no documented interface. So each is taken only with the version word that the
// headers give it (1 << 16 | size), and whatever a later release might fill in differently is refused with the reason.
//
//   queue pair   rcs[peer][lane][NIC]; requests, doorbell record, doorbell and a completion queue of one entry are those of queue_pair.hpp
//   keys         lkeys[chunk][NIC], rkeys[chunk][peer][NIC]: 64 entries in the state, the others in an array behind a pointer
//   addresses    the peer's address of a byte: peer_heap_base_remote[peer] + its offset in the symmetric heap
#include <cstdint>
#include <functional>
#include <string>
#include <vector>

#include "deepep/common/exceptions.hpp"
#include "deepep/rdma/provider.hpp"
#include "device_host/nvshmem_types.h"
#include "device_host_transport/nvshmem_common_ibgda.h"

namespace deepep::ibgda {

using IbgdaState = nvshmemi_ibgda_device_state_t;
using IbgdaQueuePair = nvshmemi_ibgda_device_qp_t;
using IbgdaCompletionQueue = nvshmemi_ibgda_device_cq_t;
using IbgdaKey = nvshmemi_ibgda_device_key_t;
using NvshmemState = nvshmemi_device_host_state_t;

// What the posting code takes over, byte for byte; its own layouts are checked where they are defined.
static_assert(sizeof(IbgdaState) == 8384 && sizeof(IbgdaQueuePair) == 184 && sizeof(IbgdaCompletionQueue) == 72 && sizeof(IbgdaKey) == 16,
              "NVSHMEM's IBGDA structures have another size than those that this code was written for");
static_assert(offsetof(IbgdaQueuePair, mvars) == 88 && offsetof(nvshmemi_ibgda_device_qp_management_t, tx_wq) == 8,
              "NVSHMEM's IBGDA queue pairs have another layout than those that this code was written for");
static_assert(sizeof(__be32) == sizeof(rdma::Be32), "keys are copied as they are");

struct NvshmemRequest {
    int rank;
    int num_ranks;
    std::vector<bool> is_remote;
    int num_queue_pairs;  // for each remote peer
    uint64_t arena;       // in the symmetric heap
    int64_t num_arena_bytes;
};

// A queue pair of NVSHMEM's, of which we are the only user from here on.
struct AdoptedPair {
    rdma::QueuePair pair;     // `state` is left to the caller
    uint64_t next_request;    // NVSHMEM has posted so many; all of them are complete
    uint64_t counters;        // device address of NVSHMEM's own counters (nvshmemi_ibgda_device_qp_management_t)
};

struct NvshmemTables {
    std::vector<AdoptedPair> pairs;  // [num_ranks][num_queue_pairs]; depth 0 where the peer is not remote
    rdma::MemoryKeys local;
    std::vector<rdma::MemoryKeys> remote;
    std::vector<rdma::Be32> local_keys;
    std::vector<std::vector<rdma::Be32>> remote_keys;
};

// Copies from device memory to the host.
using DeviceReader = std::function<void(void* destination, const void* source, size_t num_bytes)>;

namespace nvshmem_detail {

inline void require(bool condition, const std::string& text) {
    if (!condition) throw DriverError("NVSHMEM's IBGDA transport: " + text);
}
template <class T>
constexpr int version_of() {
    return (1 << 16) + static_cast<int>(sizeof(T));
}
template <class T>
void require_version(const T& value, const char* name) {
    require(value.version == version_of<T>(), std::string(name) + " has version word " + std::to_string(value.version) + "; this build knows " +
                                                  std::to_string(version_of<T>()) + ". Build deepep-ibgda against the NVSHMEM that is installed.");
}
template <class T>
T read(const DeviceReader& reader, const void* address) {
    T value;
    reader(&value, address, sizeof(T));
    return value;
}

inline void check_state(const IbgdaState& ibgda, const NvshmemState& state, const NvshmemRequest& request) {
    require_version(state, "its device state");
    require(state.ibgda_is_initialized, "it did not come up (no mlx5 NIC, or no right to use it). NVSHMEM_DEBUG=INFO says more.");
    require_version(ibgda, "its IBGDA state");
    require(state.mype == request.rank && state.npes == request.num_ranks,
            "NVSHMEM calls this process " + std::to_string(state.mype) + " of " + std::to_string(state.npes) + ", and the group calls it " +
                std::to_string(request.rank) + " of " + std::to_string(request.num_ranks) + ".");
    require(!ibgda.use_async_postsend, "doorbells are rung by a host thread; NVSHMEM_IBGDA_NIC_HANDLER has to be gpu.");
    require(ibgda.num_devices_initialized >= 1 && ibgda.globalmem.rcs != nullptr, "it has no queue pairs.");
    require(ibgda.num_rc_per_pe >= static_cast<uint32_t>(request.num_queue_pairs),
            "it has " + std::to_string(ibgda.num_rc_per_pe) + " queue pairs to each rank, and " + std::to_string(request.num_queue_pairs) +
                " were asked for (NVSHMEM_IBGDA_NUM_RC_PER_PE).");
    require(ibgda.log2_cumem_granularity >= 12 && ibgda.log2_cumem_granularity < 63, "its registration granularity is out of range.");
    const auto heap = reinterpret_cast<uint64_t>(state.heap_base);
    require(request.arena >= heap && request.arena - heap + static_cast<uint64_t>(request.num_arena_bytes) <= state.heap_size,
            "the arena is not inside the symmetric heap.");
}

inline AdoptedPair adopt(const IbgdaQueuePair& from, const IbgdaQueuePair* address, int peer, const DeviceReader& reader) {
    const std::string where = "queue pair to rank " + std::to_string(peer) + ": ";
    require_version(from, "a queue pair");
    require_version(from.mvars, "a queue pair's counters");
    require(from.qp_type == NVSHMEMI_IBGDA_DEVICE_QP_TYPE_RC, where + "it is not of type RC.");
    require(from.dev_idx == 0, where + "it belongs to NIC " + std::to_string(from.dev_idx) + ", not to the first.");
    const uint32_t depth = from.tx_wq.nwqes;
    require(depth >= 2 && depth <= rdma::kMaxDepth && (depth & (depth - 1)) == 0, where + "its depth is " + std::to_string(depth) + ".");
    require(from.tx_wq.wqe != nullptr && from.tx_wq.dbrec != nullptr && from.tx_wq.bf != nullptr && from.tx_wq.cq != nullptr,
            where + "it has no ring, doorbell or completion queue.");
    const auto queue = read<IbgdaCompletionQueue>(reader, from.tx_wq.cq);
    require_version(queue, "a completion queue");
    require(queue.cqe != nullptr && queue.qpn == from.qpn, where + "its completion queue belongs to another.");
    const auto& counters = from.mvars.tx_wq;
    require(counters.resv_head == counters.ready_head && counters.ready_head == counters.prod_idx && counters.cons_idx == counters.prod_idx,
            where + "NVSHMEM still has requests under way.");
    return {{static_cast<rdma::WqeBlock*>(from.tx_wq.wqe),
             static_cast<const rdma::CompletionEntry*>(queue.cqe),
             reinterpret_cast<uint32_t*>(from.tx_wq.dbrec),
             static_cast<uint64_t*>(from.tx_wq.bf),
             nullptr,
             from.qpn,
             depth,
             peer},
            counters.prod_idx,
            reinterpret_cast<uint64_t>(address) + offsetof(IbgdaQueuePair, mvars)};
}

// Entry `index` of a table whose first entries lie in the state and the others behind a pointer.
inline rdma::Be32 key_at(const IbgdaKey* first, uint64_t num_first, const IbgdaKey* others, uint64_t index, const DeviceReader& reader) {
    require(index < num_first || others != nullptr, "its table of keys is too short for the arena.");
    return {index < num_first ? first[index].key : read<IbgdaKey>(reader, others + (index - num_first)).key};
}

}  // namespace nvshmem_detail

// Throws DriverError where the state is not what this code knows.
inline NvshmemTables read_nvshmem_tables(const IbgdaState& ibgda, const NvshmemState& state, const NvshmemRequest& request,
                                         const DeviceReader& reader) {
    using namespace nvshmem_detail;
    check_state(ibgda, state, request);
    const auto num_nics = static_cast<uint64_t>(ibgda.num_devices_initialized);
    const auto num_ranks = static_cast<uint64_t>(request.num_ranks);
    const int64_t chunk_bytes = int64_t{1} << ibgda.log2_cumem_granularity;
    const uint64_t arena_offset = request.arena - reinterpret_cast<uint64_t>(state.heap_base);
    const auto first_chunk = arena_offset >> ibgda.log2_cumem_granularity;
    const rdma::MemoryKeys shape = {0, request.num_arena_bytes, chunk_bytes, static_cast<int64_t>(arena_offset) & (chunk_bytes - 1), nullptr};
    const auto num_chunks = static_cast<uint64_t>(shape.num_chunks());

    NvshmemTables tables;
    tables.remote.resize(num_ranks);
    tables.remote_keys.resize(num_ranks);
    for (uint64_t chunk = first_chunk; chunk < first_chunk + num_chunks; ++chunk)
        tables.local_keys.push_back(
            key_at(ibgda.constmem.lkeys, NVSHMEMI_IBGDA_MAX_CONST_LKEYS, ibgda.globalmem.lkeys, chunk * num_nics, reader));
    tables.local = shape;
    tables.local.base = request.arena;
    tables.local.keys = tables.local_keys.data();

    for (int peer = 0; peer < request.num_ranks; ++peer) {
        const bool is_remote = request.is_remote[peer];
        for (int lane = 0; lane < request.num_queue_pairs; ++lane) {
            if (!is_remote) {
                tables.pairs.push_back({});
                continue;
            }
            const IbgdaQueuePair* address =
                ibgda.globalmem.rcs + (static_cast<uint64_t>(peer) * ibgda.num_rc_per_pe + static_cast<uint64_t>(lane)) * num_nics;
            tables.pairs.push_back(adopt(read<IbgdaQueuePair>(reader, address), address, peer, reader));
        }
        if (!is_remote) continue;
        std::vector<rdma::Be32>& keys = tables.remote_keys[peer];
        for (uint64_t chunk = first_chunk; chunk < first_chunk + num_chunks; ++chunk)
            keys.push_back(key_at(ibgda.constmem.rkeys, NVSHMEMI_IBGDA_MAX_CONST_RKEYS, ibgda.globalmem.rkeys,
                                  (chunk * num_ranks + static_cast<uint64_t>(peer)) * num_nics, reader));
        tables.remote[peer] = shape;
        tables.remote[peer].base = reinterpret_cast<uint64_t>(read<void*>(reader, state.peer_heap_base_remote + peer)) + arena_offset;
        tables.remote[peer].keys = keys.data();
    }
    return tables;
}

}  // namespace deepep::ibgda
