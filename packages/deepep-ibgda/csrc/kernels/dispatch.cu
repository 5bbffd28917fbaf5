// Low-latency dispatch: every token's row goes once to each rank that holds one of its experts, and is stored there to every such expert's rows.
//
// Sending    a block takes a token, casts it in registers and stores it into a slot of each destination's window; the routing table is
//            counted meanwhile for the row's places.
// Receiving  groups of warps poll the slots. Slots hold nothing but ones until data comes, so every word tells by itself that it has come;
//            no flag follows the data, and no store waits for another.
// Before: nothing has to have happened but what the credits say. Hook mode launches the kernel once for each half.
#include "dispatch_receive.cuh"
#include "dispatch_send.cuh"

namespace deepep::ibgda {
namespace {

constexpr int kAllThreads = 0;  // the barrier before an operation begins

template <bool kFp8, bool kRemote>
__global__ void __launch_bounds__(kNumThreads, 2) low_latency_dispatch_kernel(const __grid_constant__ DispatchArgs args) {
    extern __shared__ __align__(16) uint32_t dynamic[];
    __shared__ DispatchShared shared;
    uint32_t* named = dynamic;
    int32_t* index_words = reinterpret_cast<int32_t*>(dynamic + args.num_experts);
    const bool sends = (args.phases & kSend) != 0, receives = (args.phases & kReceive) != 0;
#pragma unroll 1
    for (int i = static_cast<int>(threadIdx.x); i < args.num_experts; i += kNumThreads) named[i] = 0;
    if (threadIdx.x < 2) shared.escaped_units[threadIdx.x] = -1;
    begin_kernel(args);
    ptx::named_barrier(kAllThreads, kNumThreads);
    DEEPEP_STAMP(0, threadIdx.x == 0);
    DEEPEP_STAMP_TIME(12, threadIdx.x == 0);
    const bool is_last_block = blockIdx.x == gridDim.x - 1;
    if (is_receiver()) {
        if (!receives) return;
        wait_begun();
        // Blocks that only send: their receivers have nothing to do but for the statistics, which every block's add up.
        const bool has_rows = static_cast<int>(blockIdx.x) >= args.plan.num_sending_blocks;
        if (!has_rows && args.wait_stats == nullptr) return;
        const bool is_good = read_index(args, shared, index_words);
        DEEPEP_STAMP(8, receive_thread() == 0);
        if (is_last_block) {
            if (receive_thread() == 0) shared.is_indexed = is_good;
            ptx::named_barrier_arrive(kIndexRead, kNumThreads);
        }
        if (is_good && has_rows) receive_rows<kFp8>(args, shared, index_words);
        DEEPEP_STAMP(11, threadIdx.x % 32 == 0);  // the last warp's stays
        DEEPEP_STAMP_TIME(13, threadIdx.x % 32 == 0);
        if (is_good && args.wait_stats != nullptr) add_wait_stats(args.domain, kDispatch, shared.operation, args.wait_stats);
        return;
    }
    if (sends) {
        send_rows<kFp8, kRemote>(args, shared, named);
        DEEPEP_STAMP(7, threadIdx.x == 0);
    } else if (is_control_warp()) {
        Control<kRemote> control(args.domain, kDispatch, shared.operation);
        control.begin_receive(reinterpret_cast<const uint32_t*>(args.handle + args.handle_layout.ticket()));
        tell_receivers();
        control.settle(true);
    }
    if (!receives || !is_last_block) return;
    ptx::named_barrier(kIndexRead, kNumThreads);
    if (shared.is_indexed) store_counts(args, shared, index_words);
}

using Kernel = void (*)(DispatchArgs);

// Kernels without remote peers hold no call that posts.
Kernel kernel_of(bool use_fp8, bool has_remote) {
    if (has_remote) return use_fp8 ? low_latency_dispatch_kernel<true, true> : low_latency_dispatch_kernel<false, true>;
    return use_fp8 ? low_latency_dispatch_kernel<true, false> : low_latency_dispatch_kernel<false, false>;
}

// Tokens are cut into parts where there are more blocks than tokens, and where a row is longer than the workers of a block hold. Otherwise, where
// all of a row has one cast, or goes as one work request, it stays whole.
DispatchPlan plan_of(const DispatchArgs& args, int num_blocks) {
    constexpr int kMostPartsLog2 = 3;
    DispatchPlan plan = {};
    plan.num_sending_blocks = args.domain.num_sending_blocks(num_blocks, args.phases == (kSend | kReceive) && 2 * args.num_tokens > num_blocks);
    plan.num_shares = plan.num_sending_blocks > 0 ? plan.num_sending_blocks : num_blocks;
    plan.num_segments = static_cast<int>(ceil_div(args.hidden, kSegmentColumns));
    if (args.use_fp8 && !args.domain.remote.any())
        while (plan.parts_log2 < kMostPartsLog2 && args.num_tokens << (plan.parts_log2 + 1) <= plan.num_shares) ++plan.parts_log2;
    while (kMostPartSegments << plan.parts_log2 < plan.num_segments) ++plan.parts_log2;
    plan.num_units = args.num_tokens << plan.parts_log2;
    plan.num_part_segments = static_cast<int>(ceil_div(plan.num_segments, 1 << plan.parts_log2));
    plan.by_local_experts = Divisor::of(static_cast<uint32_t>(args.num_local_experts));
    plan.by_ranks = Divisor::of(static_cast<uint32_t>(args.domain.num_ranks));
    plan.by_index_words = Divisor::of(static_cast<uint32_t>(kIndexCounts + args.num_local_experts));
    return plan;
}

}  // namespace

cudaError_t launch_dispatch(DispatchArgs args, int num_blocks, cudaStream_t stream) {
    args.plan = plan_of(args, num_blocks);
    const int num_dynamic_bytes = num_dynamic_words(args.num_experts, args.domain.num_ranks) * static_cast<int>(sizeof(uint32_t));
    return launch(kernel_of(args.use_fp8, args.domain.remote.any()), args, num_blocks, num_dynamic_bytes, stream);
}

cudaError_t prepare_dispatch(bool* is_programmatic) {
    constexpr int kMaxDynamicBytes = num_dynamic_words(kMaxExperts, kMaxWindowRanks) * static_cast<int>(sizeof(uint32_t));
    for (const bool use_fp8 : {false, true})
        for (const bool has_remote : {false, true}) {
            const Kernel kernel = kernel_of(use_fp8, has_remote);
            cudaError_t status = prepare(kernel, is_programmatic);
            if (status == cudaSuccess) status = cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, kMaxDynamicBytes);
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
