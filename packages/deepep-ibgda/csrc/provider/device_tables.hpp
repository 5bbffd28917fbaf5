#pragma once
// A provider's tables where kernels can read them.
#include <cuda_runtime_api.h>

#include <cstdint>

#include "deepep/rdma/provider.hpp"
#include "remote_peers.hpp"

namespace deepep::ibgda {

class DeviceTables {
public:
    explicit DeviceTables(int device);
    ~DeviceTables();
    DeviceTables(const DeviceTables&) = delete;
    DeviceTables& operator=(const DeviceTables&) = delete;

    // Copies the tables of `host`. No kernel that uses the former ones is running.
    void update(const rdma::RdmaView& host);
    // For the arguments of kernels: changes with each update; its address does not.
    const RemotePeers& peers() const { return peers_; }

private:
    int device_;
    cudaStream_t stream_ = nullptr;
    uint8_t* memory_ = nullptr;
    size_t num_bytes_ = 0;
    RemotePeers peers_ = {};
};

}  // namespace deepep::ibgda
