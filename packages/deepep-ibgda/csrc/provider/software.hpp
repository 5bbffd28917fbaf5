#pragma once
// The software NIC of one rank: its kernels post to queue pairs in pinned host memory, and a host thread of this process moves the bytes
// between this rank's arena and its peers' arenas as they are mapped here. For tests of everything above the NIC, and for trying several
// nodes on one host; a deployment uses a NIC.
//
// Peers' memory goes by an address that is none on this GPU, so a kernel cannot reach it but by a request.
#include <cuda_runtime_api.h>

#include <cstdint>
#include <memory>
#include <optional>
#include <string>
#include <vector>

#include "deepep/rdma/software_provider.hpp"
#include "provider/cuda_mover.hpp"
#include "provider/device_tables.hpp"

namespace deepep::ibgda {

struct SoftwareNicConfig {
    int rank;
    int device;
    std::vector<uint64_t> arena_ptrs;  // as mapped here; this rank's own and those of remote peers
    int64_t num_arena_bytes;
    std::vector<bool> is_remote;  // peers that get queue pairs
    int num_queue_pairs;          // for each of them
    int64_t depth;
    rdma::FaultPlan faults;
};

class SoftwareNicOfRank {
public:
    explicit SoftwareNicOfRank(const SoftwareNicConfig& config);
    SoftwareNicOfRank(const SoftwareNicOfRank&) = delete;
    SoftwareNicOfRank& operator=(const SoftwareNicOfRank&) = delete;
    ~SoftwareNicOfRank();

    void start();
    // Waits until everything that was posted has been executed and has landed, and says whether it has. No kernel of this rank is running.
    bool drain(double timeout_s);
    void stop();
    void close() noexcept;
    void reset();
    void register_arenas(const std::vector<uint64_t>& arena_ptrs, int64_t num_arena_bytes);

    uint64_t view_ptr() const;  // of RemotePeers
    int64_t num_queue_bytes() const { return num_queue_bytes_; }
    uint64_t inject(int peer, int lane, rdma::Fault fault, std::optional<uint64_t> request, rdma::Syndrome syndrome);
    rdma::NicCounters counters() const;
    std::optional<std::string> first_fault(int peer, int lane) const;

private:
    void require_open() const;
    uint32_t number_of(int peer, int lane) const;

    const SoftwareNicConfig config_;
    int64_t num_queue_bytes_ = 0;
    uint8_t* queue_memory_ = nullptr;              // pinned, mapped: posters and the NIC's thread
    rdma::QueuePairState* states_ = nullptr;       // device memory: posters only
    std::unique_ptr<rdma::SoftwareNic<CudaMover>> nic_;
    std::unique_ptr<rdma::SoftwareProvider<CudaMover>> provider_;
    std::unique_ptr<DeviceTables> tables_;
};

}  // namespace deepep::ibgda
