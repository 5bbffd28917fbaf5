// Low-latency dispatch: every token's row goes once to each rank that holds one of its experts, and is stored there to every such expert's rows.
//
// Sending    a block takes a token, casts it in registers and stores it into a slot of each destination's window; the routing table is
//            scanned meanwhile for the row's places.
// Receiving  groups of warps poll the slots. Slots hold nothing but ones until data comes, so every word tells by itself that it has come;
//            no flag follows the data, and no store waits for another.
// Before: nothing has to have happened but what the credits say. Hook mode launches the kernel once for each half.
#include "dispatch_receive.cuh"
#include "dispatch_send.cuh"

namespace deepep::ibgda {
namespace {

template <bool kFp8, bool kRemote>
__global__ void __launch_bounds__(kNumThreads, 2) low_latency_dispatch_kernel(const __grid_constant__ DispatchArgs args) {
    extern __shared__ __align__(16) int32_t dynamic[];
    __shared__ DispatchShared shared;
    DEEPEP_STAMP(0, threadIdx.x == 0);
    if ((args.phases & kSend) != 0) {
        bool begins = true;
        for (int share = static_cast<int>(blockIdx.x); share >= 0; begins = false) {
            const uint32_t claim = send_share<kFp8, kRemote>(args, shared, dynamic, share, begins);
            share = next_share(args.domain, kDispatch, shared.operation, claim);
        }
    } else if (static_cast<int>(threadIdx.x) / 32 == kControlWarp) {
        Control<kRemote> control(args.domain, kDispatch, shared.operation);
        control.begin_receive(reinterpret_cast<const uint32_t*>(args.handle + args.handle_layout.ticket()));
        control.settle();
    }
    if ((args.phases & kReceive) == 0) return;
    DEEPEP_STAMP(7, threadIdx.x == 0);
    __syncthreads();
    receive_rows<kFp8>(args, shared, dynamic);
    DEEPEP_STAMP(11, threadIdx.x == 0);
    if (args.wait_stats != nullptr) add_wait_stats(args.domain, kDispatch, shared.operation, args.wait_stats);
}

using Kernel = void (*)(DispatchArgs);

// Kernels without remote peers hold no call that posts.
Kernel kernel_of(bool use_fp8, bool has_remote) {
    if (has_remote) return use_fp8 ? low_latency_dispatch_kernel<true, true> : low_latency_dispatch_kernel<false, true>;
    return use_fp8 ? low_latency_dispatch_kernel<true, false> : low_latency_dispatch_kernel<false, false>;
}

}  // namespace

cudaError_t launch_dispatch(const DispatchArgs& args, int num_blocks, cudaStream_t stream) {
    const int num_dynamic_bytes = num_dynamic_words(args.num_experts) * static_cast<int>(sizeof(int32_t));
    kernel_of(args.use_fp8, args.domain.remote.any())<<<num_blocks, kNumThreads, num_dynamic_bytes, stream>>>(args);
    return cudaGetLastError();
}

cudaError_t prepare_dispatch() {
    constexpr int kMaxDynamicBytes = num_dynamic_words(kMaxExperts) * static_cast<int>(sizeof(int32_t));
    for (const bool use_fp8 : {false, true})
        for (const bool has_remote : {false, true}) {
            const cudaError_t status = cudaFuncSetAttribute(kernel_of(use_fp8, has_remote), cudaFuncAttributeMaxDynamicSharedMemorySize, kMaxDynamicBytes);
            if (status != cudaSuccess) return status;
        }
    return cudaSuccess;
}

#if defined(DEEPEP_LL_TRACE)
cudaError_t copy_dispatch_stamps(uint32_t* out) { return copy_stamps(out); }
#endif

bool is_sm90_compiled() {
#if defined(__CUDA_ARCH_LIST__) && !defined(DISABLE_SM90_FEATURES)
    constexpr int kArchitectures[] = {__CUDA_ARCH_LIST__};
    for (const int architecture : kArchitectures)
        if (architecture >= 900) return true;
#endif
    return false;
}

}  // namespace deepep::ibgda
