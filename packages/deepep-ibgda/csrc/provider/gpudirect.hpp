#pragma once
// What a GPU must be able to do before a NIC may write to its memory.
#include <cuda_runtime_api.h>

#include <string>

namespace deepep::ibgda {

// Empty, or why this device cannot be written to by a NIC while kernels read what arrives. A row's words are their own flags, so they may
// arrive in any order; but with no ordering CUDA promises nothing about when a running kernel sees a NIC's writes at all.
inline std::string gpudirect_obstacle(int device) {
    const std::string where = "CUDA device " + std::to_string(device);
    int is_supported = 0, ordering = 0;
    cudaError_t status = cudaDeviceGetAttribute(&is_supported, cudaDevAttrGPUDirectRDMASupported, device);
    if (status == cudaSuccess) status = cudaDeviceGetAttribute(&ordering, cudaDevAttrGPUDirectRDMAWritesOrdering, device);
    if (status != cudaSuccess) {
        static_cast<void>(cudaGetLastError());
        return where + " cannot be asked for its GPUDirect RDMA attributes: " + cudaGetErrorString(status) + ".";
    }
    if (is_supported == 0) return where + " does not support GPUDirect RDMA: a NIC cannot write to its memory.";
    if (ordering < cudaGPUDirectRDMAWritesOrderingOwner)
        return where + " gives GPUDirect RDMA writes no order (attribute " + std::to_string(ordering) + ", needed is OWNER, " +
               std::to_string(static_cast<int>(cudaGPUDirectRDMAWritesOrderingOwner)) + "): its kernels could miss what a NIC has written.";
    return "";
}

}  // namespace deepep::ibgda
