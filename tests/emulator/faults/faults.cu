// Kernels that are wrong, each in one way that the emulator has to see, beside right ones that it has to pass.
#include <cuda_runtime_api.h>
#include <pybind11/pybind11.h>

#include <cstdint>
#include <stdexcept>
#include <string>

#include "deepep/ptx/async_copy.cuh"
#include "deepep/ptx/atomics.cuh"
#include "deepep/ptx/barrier.cuh"
#include "deepep/ptx/bulk.cuh"
#include "deepep/ptx/memory.cuh"
#include "deepep/ptx/vector.cuh"

namespace {

namespace ptx = deepep::ptx;
constexpr unsigned kAll = 0xffffffffu;
constexpr int kNumWords = 64;

// What kernels work on; zero when a case begins.
struct Memory {
    uint32_t result[1024];
    alignas(16) uint32_t data[1024];
    uint64_t flag;
};
alignas(16) Memory memory;

__global__ void shuffle_of_half_a_warp(Memory* m, int) {
    uint32_t value = threadIdx.x;
    if (threadIdx.x % 32 < 16) value = __shfl_sync(kAll, value, 3);
    __syncwarp();
    m->result[threadIdx.x] = value;
}
__global__ void shuffle_of_all(Memory* m, int) {
    uint32_t value = __shfl_sync(kAll, static_cast<uint32_t>(threadIdx.x), 3);
    if (threadIdx.x % 32 < 16) m->result[threadIdx.x] = value;
    __syncwarp();
}
// Both halves shuffle, each in a line of its own.
__global__ void shuffles_that_meet_by_chance(Memory* m, int) {
    if (threadIdx.x % 32 < 16)
        m->result[threadIdx.x] = __shfl_sync(kAll, static_cast<uint32_t>(threadIdx.x), 3);
    else
        m->result[threadIdx.x] = __shfl_sync(kAll, static_cast<uint32_t>(threadIdx.x), 30);
}
__global__ void shuffle_from_outside_its_mask(Memory* m, int) {
    if (threadIdx.x < 16) m->result[threadIdx.x] = __shfl_sync(0xffffu, static_cast<uint32_t>(threadIdx.x), 20);
}
__global__ void lane_outside_its_mask(Memory* m, int) { m->result[threadIdx.x] = __ballot_sync(0xffffu, 1); }
// As many warps as `count` says meet; there are two.
__global__ void barrier_of(Memory* m, int count) {
    ptx::named_barrier(1, 32 * count);
    m->result[threadIdx.x] = 1;
}
__global__ void barrier_of_two_sizes(Memory*, int) { ptx::named_barrier(1, threadIdx.x < 32 ? 64 : 96); }

// The first block announces data; the second one looks at the announcement and then at the data. result[0]: words that it found old.
template <bool kReleases>
__global__ void announce(Memory* m, int) {
    if (blockIdx.x == 0) {
        ptx::store_relaxed_sys(m->data + threadIdx.x, 1u);
        __syncwarp();
        if (threadIdx.x != 0) return;
        if (kReleases)
            ptx::store_release_sys(&m->flag, uint64_t{1});
        else
            ptx::store_relaxed_sys(&m->flag, uint64_t{1});
        return;
    }
    while (ptx::load_acquire_sys(&m->flag) != 1) {
    }
    if (ptx::load_relaxed_sys(m->data + threadIdx.x) != 1) atomicAdd(m->result, 1u);
}
__global__ void wait_for_nobody(Memory* m, int) {
    while (ptx::load_relaxed_sys(&m->flag) != 1) {
    }
}
// Waits for nobody, but not for ever: result[0] is the number of milliseconds.
__global__ void wait_a_second(Memory* m, int) {
    const uint64_t begin = ptx::global_timer_ns();
    while (ptx::load_relaxed_sys(&m->flag) != 1 && ptx::global_timer_ns() - begin < 1'000'000'000) {
    }
    m->result[0] = static_cast<uint32_t>((ptx::global_timer_ns() - begin) / 1'000'000);
}

// result[i]: what a bulk copy brought.
template <bool kWaits>
__global__ void bulk_load(Memory* m, int) {
    extern __shared__ __align__(128) uint32_t stage[];
    __shared__ uint64_t barrier;
    if (threadIdx.x == 0) {
        ptx::mbarrier_init(&barrier, 1);
        ptx::mbarrier_arrive_expect(&barrier, kNumWords * 4);
        ptx::bulk_load(stage, m->data, kNumWords * 4, &barrier);
        if (kWaits) ptx::mbarrier_wait(&barrier, 0);
        for (int i = 0; i < kNumWords; ++i) m->result[i] = stage[i];
        ptx::mbarrier_wait(&barrier, 0);
    }
}
// A stage is sent, and filled again; result: what arrived.
template <bool kWaits>
__global__ void bulk_store(Memory* m, int) {
    extern __shared__ __align__(128) uint32_t stage[];
    if (threadIdx.x != 0) return;
    for (int i = 0; i < kNumWords; ++i) stage[i] = 7;
    ptx::fence_async_shared();
    ptx::bulk_store(m->data, stage, kNumWords * 4);
    ptx::bulk_commit();
    if (kWaits) ptx::bulk_wait_read<0>();
    for (int i = 0; i < kNumWords; ++i) stage[i] = 8;
    ptx::bulk_wait<0>();
    for (int i = 0; i < kNumWords; ++i) m->result[i] = m->data[i];
}
__global__ void end_before_a_copy_has_read(Memory* m, int) {
    extern __shared__ __align__(128) uint32_t stage[];
    if (threadIdx.x != 0) return;
    for (int i = 0; i < kNumWords; ++i) stage[i] = 7;
    for (int i = 0; i < 8; ++i) ptx::bulk_store(m->data + i * kNumWords, stage, kNumWords * 4);
    ptx::bulk_commit();
}
__global__ void promise_of_other_memory(Memory* m, int) {
    __shared__ uint32_t word;
    __builtin_assume(__isShared(&word));
    __builtin_assume(__isGlobal(m));
    __builtin_assume(__isShared(m));
}
__global__ void write_behind_shared_memory(Memory*, int) {
    extern __shared__ __align__(128) uint32_t stage[];
    if (threadIdx.x == 0) stage[kNumWords] = 1;
}
__global__ void read_what_nobody_wrote(Memory* m, int) {
    __shared__ uint32_t value[32];
    m->result[threadIdx.x] = value[threadIdx.x];
}
// result: the order in which warps came.
__global__ void come_in_any_order(Memory* m, int) {
    if (threadIdx.x % 32 == 0) m->result[atomicAdd(m->data, 1u)] = blockIdx.x * (blockDim.x / 32) + threadIdx.x / 32;
}

using Kernel = void (*)(Memory*, int);
struct Case {
    const char* name;
    Kernel kernel;
    int num_blocks, num_threads, number;
};
#define DEEPEP_CASE(kernel, ...) \
    Case { #kernel, kernel, __VA_ARGS__ }
const Case kCases[] = {
    DEEPEP_CASE(shuffle_of_half_a_warp, 1, 64, 0),
    DEEPEP_CASE(shuffle_of_all, 1, 64, 0),
    DEEPEP_CASE(shuffles_that_meet_by_chance, 1, 32, 0),
    DEEPEP_CASE(shuffle_from_outside_its_mask, 1, 32, 0),
    DEEPEP_CASE(lane_outside_its_mask, 1, 32, 0),
    {"barrier_of_two_warps", barrier_of, 1, 64, 2},
    {"barrier_of_three_warps", barrier_of, 1, 64, 3},
    DEEPEP_CASE(barrier_of_two_sizes, 1, 64, 0),
    {"announce_and_release", announce<true>, 2, 32, 0},
    {"announce_only", announce<false>, 2, 32, 0},
    DEEPEP_CASE(wait_for_nobody, 1, 32, 0),
    DEEPEP_CASE(wait_a_second, 1, 1, 0),
    {"bulk_load_and_wait", bulk_load<true>, 1, 32, 0},
    {"bulk_load_only", bulk_load<false>, 1, 32, 0},
    {"bulk_store_and_wait", bulk_store<true>, 1, 32, 0},
    {"bulk_store_only", bulk_store<false>, 1, 32, 0},
    DEEPEP_CASE(end_before_a_copy_has_read, 1, 32, 0),
    DEEPEP_CASE(promise_of_other_memory, 1, 32, 0),
    DEEPEP_CASE(write_behind_shared_memory, 1, 32, 0),
    DEEPEP_CASE(read_what_nobody_wrote, 1, 32, 0),
    DEEPEP_CASE(come_in_any_order, 3, 128, 0),
};

}  // namespace

PYBIND11_MODULE(_faults, m) {
    m.def("launch", [](const std::string& name) {
        for (const Case& one : kCases) {
            if (name != one.name) continue;
            memory = {};
            for (uint32_t i = 0; i < 1024; ++i) memory.data[i] = name.rfind("bulk_load", 0) == 0 ? 100 + i : 0;
            emulator::enqueue_kernel(nullptr, name, dim3(static_cast<unsigned>(one.num_blocks)), dim3(static_cast<unsigned>(one.num_threads)), kNumWords * 4,
                                     [&one] { one.kernel(&memory, one.number); });
            return;
        }
        throw std::invalid_argument("no case '" + name + "'");
    });
    m.def("result", [](int i) { return memory.result[i]; });
}
