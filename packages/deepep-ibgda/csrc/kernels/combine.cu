// Low-latency combine: expert outputs go back to their tokens' ranks and are added up there, with the weights.
//
// Sending    warps take parts of rows; ll_reduce = "rank" adds up what this rank's experts made of a token before it travels, "expert" sends
//            every row.
// Receiving  warps poll the slots of the ranks that hold a token, as in dispatch, and add in the contract's order.
// Before: the handle's dispatch has been received. Hook mode launches the kernel once for each half.
#include "combine_receive.cuh"
#include "combine_send.cuh"

namespace deepep::ibgda {
namespace {

template <bool kAtSource, class Format, bool kRemote>
__global__ void __launch_bounds__(kNumThreads, 2) low_latency_combine_kernel(const __grid_constant__ CombineArgs args) {
    __shared__ CombineShared shared;
    DEEPEP_STAMP(0, threadIdx.x == 0);
    if ((args.phases & kSend) != 0) {
        bool begins = true;
        for (int share = static_cast<int>(blockIdx.x); share >= 0; begins = false) {
            const uint32_t claim = send_share<kAtSource, Format, kRemote>(args, shared, share, begins);
            share = next_share(args.domain, kCombine, shared.operation, claim);
        }
    } else if (static_cast<int>(threadIdx.x) / 32 == kControlWarp) {
        Control<kRemote> control(args.domain, kCombine, shared.operation);
        const HandleLane handle = HandleLane::load(args);
        control.begin_receive(args.ticket);
        handle.note(args, shared);
        control.settle();
    }
    if ((args.phases & kReceive) == 0) return;
    DEEPEP_STAMP(7, threadIdx.x == 0);
    __syncthreads();
    receive_rows<kAtSource, Format>(args, shared);
    DEEPEP_STAMP(11, threadIdx.x == 0);
    if (args.wait_stats != nullptr) add_wait_stats(args.domain, kCombine, shared.operation, args.wait_stats);
}

using Kernel = void (*)(CombineArgs);

template <bool kRemote>
Kernel kernel_of(bool at_source, bool use_logfmt) {
    if (use_logfmt) return at_source ? low_latency_combine_kernel<true, LogfmtFormat, kRemote> : low_latency_combine_kernel<false, LogfmtFormat, kRemote>;
    return at_source ? low_latency_combine_kernel<true, PlainFormat, kRemote> : low_latency_combine_kernel<false, PlainFormat, kRemote>;
}
// Kernels without remote peers hold no call that posts.
Kernel kernel_of(bool at_source, bool use_logfmt, bool has_remote) {
    return has_remote ? kernel_of<true>(at_source, use_logfmt) : kernel_of<false>(at_source, use_logfmt);
}

}  // namespace

cudaError_t launch_combine(const CombineArgs& args, int num_blocks, cudaStream_t stream) {
    kernel_of(args.domain.reduces_at_source, args.use_logfmt, args.domain.remote.any())<<<num_blocks, kNumThreads, 0, stream>>>(args);
    return cudaGetLastError();
}

cudaError_t prepare_combine() {
    for (const bool at_source : {false, true})
        for (const bool use_logfmt : {false, true})
            for (const bool has_remote : {false, true}) {
                cudaFuncAttributes attributes;
                const cudaError_t status = cudaFuncGetAttributes(&attributes, kernel_of(at_source, use_logfmt, has_remote));
                if (status != cudaSuccess) return status;
            }
    return cudaSuccess;
}

#if defined(DEEPEP_LL_TRACE)
cudaError_t copy_combine_stamps(uint32_t* out) { return copy_stamps(out); }
#endif

}  // namespace deepep::ibgda
