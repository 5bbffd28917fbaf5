#pragma once
// Queue pairs of a real NIC, from NVSHMEM's IBGDA transport: NVSHMEM connects them and registers the memory, and from then on only our own
// posting code uses them. Compiled where NVSHMEM's headers are found; its libraries are opened when the provider starts.
//
// NVSHMEM posts nothing of its own between construction and close(): its counters of these queue pairs stand still meanwhile.
#include <cstdint>
#include <memory>
#include <string>
#include <vector>

#include "deepep/rdma/provider.hpp"

namespace deepep::ibgda {

struct NvshmemConfig {
    int rank;
    int num_ranks;
    int device;
    std::string unique_id;  // of rank 0's nvshmem_unique_id, the same on all ranks
    std::string host_library;    // libnvshmem_host.so.3
    std::string device_library;  // libnvshmem_device.a of the same release
    std::string state_module;    // nvshmem_state.fatbin, built with this extension
    int64_t num_arena_bytes;
    std::vector<bool> is_remote;
    int num_queue_pairs;
    int64_t depth;
    int service_level;  // -1: what NVSHMEM does by itself
    int traffic_class;  // likewise
};

std::string nvshmem_unique_id(const std::string& host_library);

class NvshmemRdma {
public:
    // Collective. One at a time in a process, because NVSHMEM is.
    explicit NvshmemRdma(const NvshmemConfig& config);
    NvshmemRdma(const NvshmemRdma&) = delete;
    NvshmemRdma& operator=(const NvshmemRdma&) = delete;
    ~NvshmemRdma();

    // Every rank's arena as this GPU reaches it; 0 where it is remote.
    std::vector<uint64_t> arena_ptrs() const;
    uint64_t view_ptr() const;  // of RemotePeers
    // Collective. Gives the queue pairs back and ends NVSHMEM; no kernel is running. After a failure NVSHMEM would wait for the failed queue
    // pair, so then it is left as it is until the process ends.
    void close();

private:
    struct Parts;
    std::unique_ptr<Parts> parts_;
};

}  // namespace deepep::ibgda
