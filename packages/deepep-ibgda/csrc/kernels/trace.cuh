#pragma once
// Where the time of a block goes: built with DEEPEP_LL_TRACE only. Each block keeps the clock of its SM at some points of its last operation.
#include "deepep/ptx/memory.cuh"
#include "window.hpp"

#if defined(DEEPEP_LL_TRACE)
namespace deepep::ibgda {

constexpr int kNumStamps = 14;

// [block][stamp]: cycles of the SM's clock; the last two are nanoseconds of the GPU's timer, at the block's begin and when its last warp ends.
static __device__ uint32_t trace_stamps[kMaxBlocks][kNumStamps];

// By one thread of the block that has come to this point.
__device__ __forceinline__ void stamp(int point) { trace_stamps[blockIdx.x][point] = ptx::clock_ordered(); }
__device__ __forceinline__ void stamp_time(int point) { trace_stamps[blockIdx.x][point] = static_cast<uint32_t>(ptx::global_timer_ns()); }

inline cudaError_t copy_stamps(uint32_t* out) { return cudaMemcpyFromSymbol(out, trace_stamps, sizeof(trace_stamps)); }

}  // namespace deepep::ibgda
#define DEEPEP_STAMP(point, condition) \
    if (condition) stamp(point)
#define DEEPEP_STAMP_TIME(point, condition) \
    if (condition) stamp_time(point)
#else
#define DEEPEP_STAMP_TIME(point, condition)
#define DEEPEP_STAMP(point, condition)
#endif
