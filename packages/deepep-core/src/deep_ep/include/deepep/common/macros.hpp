#pragma once
// What lets one header serve nvcc and a plain host compiler.

#if defined(__CUDACC__)
#define DEEPEP_HOST_DEVICE __host__ __device__ __forceinline__
#else
#define DEEPEP_HOST_DEVICE inline
#endif

// SM90 instructions (bulk copies, mbarriers) exist in this compilation pass.
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 900 && !defined(DISABLE_SM90_FEATURES)
#define DEEPEP_HAS_BULK 1
#else
#define DEEPEP_HAS_BULK 0
#endif
