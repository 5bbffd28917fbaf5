#pragma once
// A warp's stages in shared memory: what is to be added up, part of a row by part of a row, brought by bulk loads ahead of its use. Each addend of a part has a
// stage, and the sum may be made in the first one.
#include "combine_sums.cuh"
#include "deepep/ptx/bulk.cuh"
#include "internode/kernels.hpp"

namespace deepep::internode {
namespace {

// Kept alike by all lanes of its warp. Without bulk copies there are none.
struct AddendStages {
    const StageShape& shape;
    uint8_t* memory;
    uint64_t* barriers;
    int num_in_flight = 0;
#if DEEPEP_HAS_BULK
    int load_stage = 0;
    int take_stage = 0;
    uint32_t parity = 0;

    // Once, by the whole warp.
    __device__ void prepare() const {
        if (threadIdx.x % 32 == 0) {
            for (int stage = 0; stage < shape.num_stages; ++stage) ptx::mbarrier_init(barriers + stage, 1);
            ptx::fence_mbarrier_init();
        }
        __syncwarp();
    }

    __device__ bool has_room(int num_addends) const { return num_in_flight + num_addends <= shape.num_stages; }
    __device__ uint8_t* at(int stage) const { return memory + stage * shape.num_stage_bytes; }
    __device__ int behind(int stage, int count) const { return stage + count >= shape.num_stages ? stage + count - shape.num_stages : stage + count; }

    // By one lane: brings addend i of the part that is loaded next, and what goes behind it. Bytes: multiples of 16; `num_bytes` above 0.
    __device__ void load(int i, const uint8_t* row, int num_bytes, const uint8_t* tail, int num_tail_bytes) const {
        const int stage = behind(load_stage, i);
        ptx::mbarrier_arrive_expect(barriers + stage, num_bytes + num_tail_bytes);
        ptx::bulk_load(at(stage), row, num_bytes, barriers + stage);
        if (num_tail_bytes > 0) ptx::bulk_load(at(stage) + num_bytes, tail, num_tail_bytes, barriers + stage);
    }
    // By one lane, for a part without addends: it takes a stage all the same.
    __device__ void load_nothing() const { ptx::mbarrier_arrive(barriers + load_stage); }
    __device__ void loaded(int num_addends) {
        load_stage = behind(load_stage, num_addends);
        num_in_flight += num_addends;
    }

    // By the whole warp: waits for the oldest part and lists where its addends lie, for whoever is behind the next warp barrier.
    __device__ void wait(int num_addends, const uint8_t** list) {
        for (int i = 0; i < num_addends; ++i) {
            ptx::mbarrier_wait(barriers + take_stage, parity);
            if (threadIdx.x % 32 == 0) list[i] = at(take_stage);
            if (++take_stage == shape.num_stages) {
                take_stage = 0;
                parity ^= 1;
            }
        }
    }
    // By the whole warp, which has read them.
    __device__ void taken(int num_addends) {
        ptx::fence_async_shared();  // ordinary accesses come before the next bulk loads into the stages
        __syncwarp();
        num_in_flight -= num_addends;
    }
#endif
};

}  // namespace
}  // namespace deepep::internode
