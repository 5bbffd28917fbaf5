// What the links between GPUs allow: every rank pushes rows to (or pulls rows from) every other rank at once, with nothing else to do.
// The yardstick for dispatch and combine; measure it in the same run as they.
#include "deepep/ptx/bulk.cuh"
#include "kernels.hpp"

namespace deepep::nvlink {
namespace {

struct Route {
    uint8_t* remote;
    uint8_t* local;
};

// The i-th row of this rank's traffic: peers in turn, starting behind this rank.
__device__ __forceinline__ Route route_of(const FabricArgs& args, int64_t i) {
    const int num_peers = args.num_ranks - 1;
    const int64_t row = i / num_peers;
    int peer = args.rank + 1 + static_cast<int>(i - row * num_peers);
    if (peer >= args.num_ranks) peer -= args.num_ranks;
    return {args.arenas[peer] + (static_cast<int64_t>(args.rank) * args.num_rows + row) * args.num_row_bytes, args.local + i * args.num_row_bytes};
}

template <bool kPulls>
__global__ void bulk_limit_kernel(const __grid_constant__ FabricArgs args) {
#if DEEPEP_HAS_BULK
    extern __shared__ __align__(128) uint8_t dynamic[];
    if (threadIdx.x % 32 != 0) return;
    const int warp = threadIdx.x / 32;
    const int num_stages = args.num_stages;
    uint8_t* ring = dynamic + static_cast<int64_t>(warp) * num_stages * args.num_row_bytes;
    uint64_t* barriers =
        reinterpret_cast<uint64_t*>(dynamic + static_cast<int64_t>(args.num_warps) * num_stages * args.num_row_bytes) + warp * num_stages;
    for (int stage = 0; stage < num_stages; ++stage) ptx::mbarrier_init(barriers + stage, 1);
    ptx::fence_mbarrier_init();
    const int64_t num_items = args.num_rows * (args.num_ranks - 1);
    const int64_t first = blockIdx.x + static_cast<int64_t>(gridDim.x) * warp;
    const int64_t stride = static_cast<int64_t>(gridDim.x) * args.num_warps;
    const int64_t num_mine = first < num_items ? (num_items - 1 - first) / stride + 1 : 0;
    int64_t num_loaded = 0;
    int load_stage = 0;
    auto load = [&] {
        const Route route = route_of(args, first + num_loaded * stride);
        ptx::mbarrier_arrive_expect(barriers + load_stage, args.num_row_bytes);
        ptx::bulk_load(ring + static_cast<int64_t>(load_stage) * args.num_row_bytes, kPulls ? route.remote : route.local, args.num_row_bytes,
                       barriers + load_stage);
        ++num_loaded;
        load_stage = load_stage + 1 == num_stages ? 0 : load_stage + 1;
    };
    while (num_loaded < num_stages - 1 && num_loaded < num_mine) load();
    int stage = 0;
    uint32_t parity = 0;
    for (int64_t k = 0; k < num_mine; ++k) {
        const Route route = route_of(args, first + k * stride);
        ptx::mbarrier_wait(barriers + stage, parity);
        ptx::bulk_store(kPulls ? route.local : route.remote, ring + static_cast<int64_t>(stage) * args.num_row_bytes, args.num_row_bytes);
        ptx::bulk_commit();
        if (num_loaded < num_mine) {
            ptx::bulk_wait_read<1>();
            load();
        }
        if (++stage == num_stages) {
            stage = 0;
            parity ^= 1;
        }
    }
    ptx::bulk_wait<0>();
#endif
}

__global__ void __launch_bounds__(1024) store_limit_kernel(const __grid_constant__ FabricArgs args) {
    constexpr int kUnroll = 4;
    const int num_vectors = args.num_row_bytes / 16;
    const int lane = threadIdx.x % 32;
    const int64_t num_items = args.num_rows * (args.num_ranks - 1);
    const int num_warps = blockDim.x / 32;
    for (int64_t item = blockIdx.x + static_cast<int64_t>(gridDim.x) * (threadIdx.x / 32); item < num_items;
         item += static_cast<int64_t>(gridDim.x) * num_warps) {
        const Route route = route_of(args, item);
        for (int base = lane; base < num_vectors; base += 32 * kUnroll) {
            int4 vectors[kUnroll];
#pragma unroll
            for (int u = 0; u < kUnroll; ++u)
                if (base + u * 32 < num_vectors) vectors[u] = reinterpret_cast<const int4*>(route.local)[base + u * 32];
#pragma unroll
            for (int u = 0; u < kUnroll; ++u)
                if (base + u * 32 < num_vectors) reinterpret_cast<int4*>(route.remote)[base + u * 32] = vectors[u];
        }
    }
}

template <class Kernel>
cudaError_t launch_bulk(Kernel kernel, const FabricArgs& args, int num_sms, cudaStream_t stream) {
    const int num_shared_bytes = args.num_warps * args.num_stages * (args.num_row_bytes + 8);
    const cudaError_t status = cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, num_shared_bytes);
    if (status != cudaSuccess) return status;
    kernel<<<num_sms, args.num_warps * 32, num_shared_bytes, stream>>>(args);
    return cudaGetLastError();
}

}  // namespace

cudaError_t launch_fabric(const FabricArgs& args, FabricDirection direction, int num_sms, cudaStream_t stream) {
    switch (direction) {
        case FabricDirection::kPush: return launch_bulk(bulk_limit_kernel<false>, args, num_sms, stream);
        case FabricDirection::kPull: return launch_bulk(bulk_limit_kernel<true>, args, num_sms, stream);
        default: store_limit_kernel<<<num_sms, 1024, 0, stream>>>(args); return cudaGetLastError();
    }
}

}  // namespace deepep::nvlink
