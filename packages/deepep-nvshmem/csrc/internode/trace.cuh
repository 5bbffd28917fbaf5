#pragma once
// Where the time of a block goes: built with DEEPEP_NVSHMEM_TRACE only. Each block keeps the clock of its SM at some points of its last operation, and how much it
// has moved; tests/gpu/measure_nodes.py names the points.
#include "deepep/ptx/memory.cuh"
#include "internode/kernels.hpp"

#if DEEPEP_NVSHMEM_TRACE
namespace deepep::internode {
namespace {

__device__ BlockTrace traces[kMaxTracedBlocks];
__shared__ BlockTrace trace;  // of the running block

// By one thread; a barrier of the block has to follow before any other thread comes to a point.
__device__ __forceinline__ void begin_trace() {
    trace = {};
    for (uint32_t& first : trace.firsts) first = 0xFFFFFFFF;
    trace.begin_ns = ptx::global_timer_ns();
    trace.begun = ptx::clock_ordered();
}
// By one lane of each warp that comes to a point: what counts is the first one, or the last one.
__device__ __forceinline__ void stamp_first(int point) { atomicMin(&trace.firsts[point], ptx::clock_ordered() - trace.begun); }
__device__ __forceinline__ void stamp_last(int point) { atomicMax(&trace.lasts[point], ptx::clock_ordered() - trace.begun); }
__device__ __forceinline__ void count_moved(int kind) { atomicAdd(&trace.moved[kind], 1u); }
// By lane 0: the time since its last call, or since its begin, goes to a kind.
struct SpanClock {
    uint32_t last = ptx::clock_ordered();
    __device__ __forceinline__ void spend(int kind) {
        const uint32_t now = ptx::clock_ordered();
        atomicAdd(&trace.spans[kind], now - last);
        last = now;
    }
};
// Time that passes between two threads of a block: something of a context begins with one and ends with the other.
constexpr int kMaxTracedContexts = 256;
__shared__ uint32_t begun_clocks[kMaxTracedContexts];
__device__ __forceinline__ void begin_span(int context) {
    if (context < kMaxTracedContexts) begun_clocks[context] = ptx::clock_ordered();
}
__device__ __forceinline__ void end_span(int context, int kind) {
    if (context < kMaxTracedContexts) atomicAdd(&trace.spans[kind], ptx::clock_ordered() - begun_clocks[context]);
}
// By the thread that began it, behind a barrier that all others came to after their last point.
__device__ __forceinline__ void end_trace(int number) {
    trace.ended = ptx::clock_ordered() - trace.begun;
    trace.end_ns = ptx::global_timer_ns();
    trace.number = static_cast<uint32_t>(number);
    if (blockIdx.x < kMaxTracedBlocks) traces[blockIdx.x] = trace;
}

cudaError_t copy_traces(BlockTrace* out) { return cudaMemcpyFromSymbol(out, traces, sizeof(traces)); }

}  // namespace
}  // namespace deepep::internode
#define DEEPEP_TRACE(...) __VA_ARGS__
#else
#define DEEPEP_TRACE(...)
#endif
