#pragma once
// How kernels are launched, and what every kernel does first.
#include <cuda_runtime_api.h>

#include "deepep/ptx/dependency.cuh"
#include "kernels.hpp"

namespace deepep::ibgda {

// Kernel arguments come through a constant cache that is cold, 64 bytes at a time: each warp fetches other ones. The sum makes the compiler believe
// that somebody wants them.
template <class Args>
__device__ __forceinline__ uint32_t touch_constants(const Args& args) {
    constexpr int kLineWords = 16, kNumWords = static_cast<int>(sizeof(Args) / sizeof(uint32_t));
    const uint32_t* words = reinterpret_cast<const uint32_t*>(&args);
    uint32_t sum = 0;
#pragma unroll 1
    for (int word = static_cast<int>(threadIdx.x) / 32 * kLineWords; word < kNumWords + kLineWords; word += kNumWarps * kLineWords)
        sum += words[min(word, kNumWords - 1)];
    return sum;
}

// Before anything else: what needs no memory but the arguments and the block's own may come before the wait for the kernels before.
template <class Args>
__device__ __forceinline__ void begin_kernel(const Args& args) {
    __shared__ volatile uint32_t touched[kNumWarps];
    touched[threadIdx.x / 32] = touch_constants(args);
    ptx::wait_for_prerequisites();
}

// Whether the kernel waits for the kernels before it by itself (ptx::wait_for_prerequisites). Loads it.
template <class Args>
cudaError_t prepare(void (*kernel)(Args), bool* is_programmatic) {
    cudaFuncAttributes attributes;
    const cudaError_t status = cudaFuncGetAttributes(&attributes, kernel);
    if (status != cudaSuccess) return status;
#if defined(DISABLE_SM90_FEATURES)
    *is_programmatic = false;
#else
    *is_programmatic = *is_programmatic && attributes.ptxVersion >= 90;
#endif
    return cudaSuccess;
}

template <class Args>
cudaError_t launch(void (*kernel)(Args), const Args& args, int num_blocks, int num_dynamic_bytes, cudaStream_t stream) {
    cudaLaunchAttribute attribute = {};
    attribute.id = cudaLaunchAttributeProgrammaticStreamSerialization;
    attribute.val.programmaticStreamSerializationAllowed = 1;
    cudaLaunchConfig_t config = {};
    config.gridDim = dim3(static_cast<unsigned>(num_blocks));
    config.blockDim = dim3(kNumThreads);
    config.dynamicSmemBytes = static_cast<size_t>(num_dynamic_bytes);
    config.stream = stream;
    config.attrs = &attribute;
    config.numAttrs = args.domain.is_programmatic ? 1 : 0;
    return cudaLaunchKernelEx(&config, kernel, args);
}

}  // namespace deepep::ibgda
