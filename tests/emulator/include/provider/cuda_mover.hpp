#pragma once
// The software NIC's way to move bytes: the host's own.
#include "deepep/rdma/software_nic.hpp"

namespace deepep::ibgda {

struct CudaMover : rdma::MemcpyMover {
    explicit CudaMover(int) {}
};

}  // namespace deepep::ibgda
