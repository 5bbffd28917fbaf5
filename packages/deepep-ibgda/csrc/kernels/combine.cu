// Low-latency combine: expert outputs go back to their tokens' ranks and are added up there, with the weights.
//
// Sending    warps take parts of rows; ll_reduce = "rank" adds up what this rank's experts made of a token before it travels, "expert" sends
//            every row.
// Receiving  warps poll the slots of the ranks that hold a token, and add in the contract's order.
// Before: the handle's dispatch has been received. Hook mode launches the kernel once for each half.
#include "combine_receive.cuh"
#include "combine_send.cuh"

namespace deepep::ibgda {
namespace {

template <bool kAtSource, class Format, bool kRemote>
__global__ void __launch_bounds__(kNumThreads, 2) low_latency_combine_kernel(const __grid_constant__ CombineArgs args) {
    __shared__ CombineShared shared;
    begin_kernel(args);
    DEEPEP_STAMP(0, threadIdx.x == 0);
    DEEPEP_STAMP_TIME(12, threadIdx.x == 0);
    const bool receives = (args.phases & kReceive) != 0;
    if (is_receiver() && !receives) return;
    if ((args.phases & kSend) != 0) {
        send_shares<kAtSource, Format, kRemote>(args, shared);
        // Statistics end with a barrier of the receivers.
        if (!receives || (args.wait_stats != nullptr && !is_receiver())) return;
    } else if (is_receiver()) {
        wait_begun();
    } else {
        if (!is_control_warp()) return;
        Control<kRemote> control(args.domain, kCombine, shared.operation);
        const HandleLane handle = HandleLane::load(args);
        control.begin_receive(args.ticket);
        handle.note(args, shared);
        tell_receivers();
        control.settle(true);
        return;
    }
    receive_rows<kAtSource, Format>(args, shared);
    DEEPEP_STAMP(11, threadIdx.x % 32 == 0);  // the last warp stays
    DEEPEP_STAMP_TIME(13, threadIdx.x % 32 == 0);
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

int log2_ceil(int number) {
    int log = 0;
    while (1 << log < number) ++log;
    return log;
}

CombinePlan plan_of(const CombineArgs& args, int num_blocks) {
    const int num_ranks = args.domain.num_ranks, num_columns = 32 * (args.use_logfmt ? LogfmtFormat::kColumns : PlainFormat::kColumns);
    CombinePlan plan;
    plan.num_parts = static_cast<int>(ceil_div(args.hidden, num_columns));
    plan.by_num_parts = Divisor::of(static_cast<uint32_t>(plan.num_parts));
    plan.by_num_local_experts = Divisor::of(static_cast<uint32_t>(args.num_local_experts));
    plan.num_expert_rows = args.num_experts * args.max_tokens;  // num_local_experts * (num_ranks * max_tokens)
    plan.slot_stride = static_cast<uint32_t>(args.row.stride());
    plan.has_own_weights = args.phases == (kSend | kReceive) && !args.domain.reduces_at_source;
    plan.num_sources = num_ranks - (plan.has_own_weights ? 1 : 0);
    plan.by_num_sources = Divisor::of(static_cast<uint32_t>(max_of(plan.num_sources, 1)));
    plan.choice_shift = log2_ceil(args.num_topk);
    // Small batches: rows are cut up until the lanes of a warp hold all of a share's, or each worker has one part. What other ranks have sent is not
    // known here; this rank's own number of tokens stands for theirs.
    const int64_t num_rows = static_cast<int64_t>(plan.num_sources) * args.num_tokens;
    plan.num_sending_blocks = args.domain.num_sending_blocks(num_blocks, plan.has_own_weights && 2 * args.num_tokens >= num_blocks && num_rows >= num_blocks);
    plan.adds_own = plan.has_own_weights && plan.num_sending_blocks == 0;
    const int num_shares = plan.num_sending_blocks > 0 ? plan.num_sending_blocks : num_blocks;
    const int64_t num_items = static_cast<int64_t>(num_shares) << (5 - plan.choice_shift);
    plan.chunk_shift = 0;
    while (plan.num_sending_blocks == 0 && kWorkerWarps << (plan.chunk_shift + 1) <= plan.num_parts && num_rows << (plan.chunk_shift + 1) <= num_items) ++plan.chunk_shift;
    plan.num_chunk_parts = static_cast<int>(ceil_div(plan.num_parts, 1 << plan.chunk_shift));
    // A row for another node goes as a whole.
    plan.num_pieces = static_cast<int>(ceil_div(plan.num_parts, args.use_logfmt ? kPieceParts<LogfmtFormat> : kPieceParts<PlainFormat>));
    plan.by_num_pieces = Divisor::of(static_cast<uint32_t>(plan.num_pieces));
    const bool draws = plan.num_sending_blocks > 0 && !args.domain.remote.any() && static_cast<int64_t>(plan.num_pieces) * plan.num_sources * args.max_tokens < 1 << 30;
    plan.num_dealt = draws ? static_cast<int>(min_of(kMostDealt, 32 >> plan.choice_shift)) : 0;
    // A share's rows are num_shares items apart: by itself that leads from source to source, unless the number of sources divides it.
    const int distance = num_shares >> plan.chunk_shift, num_sources = static_cast<int>(max_of(plan.num_sources, 1));
    plan.turn_shift = distance > 0 && distance % num_sources == 0 ? log2_ceil(distance / num_sources + 1) - 1 : 30;
    plan.num_share_weights = static_cast<int>(ceil_div(static_cast<int64_t>(args.num_tokens) * args.num_topk, num_blocks));
    return plan;
}

}  // namespace

cudaError_t launch_combine(const CombineArgs& args, int num_blocks, cudaStream_t stream) {
    CombineArgs planned = args;
    planned.plan = plan_of(args, num_blocks);
    return launch(kernel_of(args.domain.reduces_at_source, args.use_logfmt, args.domain.remote.any()), planned, num_blocks, 0, stream);
}

cudaError_t prepare_combine(bool* is_programmatic) {
    for (const bool at_source : {false, true})
        for (const bool use_logfmt : {false, true})
            for (const bool has_remote : {false, true}) {
                const cudaError_t status = prepare(kernel_of(at_source, use_logfmt, has_remote), is_programmatic);
                if (status != cudaSuccess) return status;
            }
    return cudaSuccess;
}

#if defined(DEEPEP_LL_TRACE)
cudaError_t copy_combine_stamps(uint32_t* out) { return copy_stamps(out); }
#endif

}  // namespace deepep::ibgda
