#pragma once
// The software NIC's way to move bytes between GPUs: copies and tiny kernels on one stream of its own, in the order of the requests.
//
// While it serves, it calls nothing that waits for the device, allocates or loads code: a kernel may be spinning until the bytes arrive.
//
// A call that CUDA refuses is not lost: every batch that had not landed by then has failed, and `failure` says why.
#include <cuda_runtime_api.h>

#include <cstdint>
#include <memory>
#include <string>

#include "deepep/rdma/software_nic.hpp"
#include "provider/batches.hpp"

namespace deepep::ibgda {

class CudaMover {
public:
    // Makes the stream and loads the kernels.
    explicit CudaMover(int device);
    CudaMover(CudaMover&&) = default;
    ~CudaMover();

    void copy(uint8_t* destination, const uint8_t* source, uint32_t num_bytes);
    void copy_inline(uint8_t* destination, const uint8_t* data, uint32_t num_bytes);
    // At once with regard to every other atomic of any GPU at system scope.
    void fetch_add(uint8_t* destination, uint8_t* result, uint64_t addend);
    uint64_t batch() const { return batches_.last(); }
    rdma::Progress progress(uint64_t batch);
    // Waits for the stream: not on behalf of a kernel that waits for its bytes.
    void drain();
    void store_state(rdma::QueuePairState* state, const rdma::QueuePairState& value);

    std::string failure() const { return failure_; }

private:
    struct Resources {
        int device = 0;
        cudaStream_t stream = nullptr;
        cudaEvent_t landed = nullptr;
        uint64_t* scratch = nullptr;  // where the kernels ran for the first time
        ~Resources();
    };

    void began(cudaError_t status, const char* what);
    void keep(cudaError_t status, const char* what);

    std::unique_ptr<Resources> resources_;
    Batches batches_;
    std::string failure_;
};

}  // namespace deepep::ibgda
