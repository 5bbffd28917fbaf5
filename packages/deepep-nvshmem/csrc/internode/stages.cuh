#pragma once
// A warp's stages in shared memory: rows on their way between device memory and where they go. Filled by bulk loads, emptied in the same order.
#include <cstdint>

#include "deepep/ptx/bulk.cuh"
#include "internode/kernels.hpp"

namespace deepep::internode {
namespace {

// What else is known of a row that is to be delivered, or of one that is to be put.
struct alignas(16) ToDeliver {
    int32_t forward_row;
    int32_t src_rank;
    int32_t part;
    int32_t credited;  // the chunk's last item: its context, else -1
    int32_t chunk;
};
struct alignas(16) ToPut {
    uint8_t* to;
    int32_t peer;
    int32_t completed;  // the chunk's last row: its context, else -1
    int32_t chunk;
};
union StagedItem {
    ToDeliver to_deliver;
    ToPut to_put;
};

#if DEEPEP_HAS_BULK
// Kept alike by all lanes of its warp. Lane 0 issues every bulk copy.
struct StageRing {
    const DispatchArgs& args;
    uint8_t* stages;
    uint64_t* barriers;
    StagedItem* items;
    int num_in_flight = 0;
    int load_stage = 0;
    int take_stage = 0;
    uint32_t parity = 0;

    // Where an empty ring has come to, as a number.
    __device__ uint32_t place() const { return static_cast<uint32_t>(take_stage) << 1 | parity; }
    __device__ void go_to(uint32_t place) {
        load_stage = take_stage = static_cast<int>(place >> 1);
        parity = place & 1;
    }

    // Once, by the whole warp.
    __device__ void prepare() {
        if (threadIdx.x % 32 == 0) {
            for (int stage = 0; stage < args.num_stages; ++stage) ptx::mbarrier_init(barriers + stage, 1);
            ptx::fence_mbarrier_init();
        }
        __syncwarp();
    }

    __device__ uint8_t* stage_to_load() const { return stages + static_cast<int64_t>(load_stage) * args.num_stage_bytes; }
    __device__ uint64_t* barrier_to_load() const { return barriers + load_stage; }
    __device__ StagedItem& item_to_load() const { return items[load_stage]; }
    __device__ void loaded() {
        ++num_in_flight;
        load_stage = load_stage + 1 == args.num_stages ? 0 : load_stage + 1;
    }

    // The oldest stage, once its bytes are there.
    __device__ const uint8_t* wait_for_stage() const {
        ptx::mbarrier_wait(barriers + take_stage, parity);
        return stages + static_cast<int64_t>(take_stage) * args.num_stage_bytes;
    }
    __device__ const StagedItem& item_to_take() const { return items[take_stage]; }
    __device__ void taken() {
        --num_in_flight;
        if (++take_stage == args.num_stages) {
            take_stage = 0;
            parity ^= 1;
        }
    }
};
#endif

}  // namespace
}  // namespace deepep::internode
