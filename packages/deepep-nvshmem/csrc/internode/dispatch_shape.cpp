// How many warps and stages dispatch takes.
#include <string>

#include "deepep/common/exceptions.hpp"
#include "internode/kernels.hpp"

namespace deepep::internode {

void shape_dispatch(DispatchArgs& args, const Tuning& tuning, bool has_bulk) {
    constexpr int kSharedBudget = 216 * 1024, kMaxPartBytes = 16384, kMaxSideBytes = 8192, kUsualDeliverWarps = 4, kUsualSendWarps = 11, kEnoughBytes = 186 * 1024;
    const DispatchMessage& message = args.message;
    if (message.num_side_bytes() > kMaxSideBytes)
        throw ArgumentError("dispatch: a row's scales and top-k data have " + std::to_string(message.num_side_bytes()) + " bytes; at most " +
                            std::to_string(kMaxSideBytes) + " are accepted.");
    args.use_bulk = tuning.use_bulk && has_bulk;
    args.parts = RowParts::cut(message.num_row_bytes, args.use_bulk ? kMaxPartBytes : message.num_row_bytes);
    args.stores_scales = args.use_bulk && message.num_scales > 0 && message.num_scales % 4 == 0;
    args.loads_scales = args.stores_scales && args.scales_stride_col == 1 && args.scales_stride_token % 4 == 0 && reinterpret_cast<uintptr_t>(args.scales) % 16 == 0;
    args.loads_heads = args.use_bulk && message.is_cached && reinterpret_cast<uintptr_t>(args.send_nvl_head) % 16 == 0;
    const int num_nodes = args.domain.group.num_nodes();
    args.num_block_contexts = (num_nodes - 1) * static_cast<int>(ceil_div(args.geometry.num_slots, tuning.num_sms));
    // Streams (two of 16 bytes for each node); of the contexts the next chunk of both directions, and credits asked for and given back.
    const int num_table_bytes = num_nodes * 32 + args.num_block_contexts * 16;
    constexpr int kItemBytes = 32;  // of a stage: its barrier and what it holds
    const int num_budget = kSharedBudget - num_table_bytes;
    const int num_side_bytes = static_cast<int>(align_up(message.num_shared_side_bytes(), 128));
    args.num_send_warps = static_cast<int>(min_of(kMaxDispatchWarps - kNumCreditWarps - 1, tuning.num_send_warps > 0 ? tuning.num_send_warps : kUsualSendWarps));
    const int64_t most_warps = min_of(kMaxDeliverWarps, kMaxDispatchWarps - kNumCreditWarps - args.num_send_warps);
    if (args.use_bulk) {
        args.num_stage_bytes = static_cast<int>(align_up(args.parts.num_part_bytes, 128)) + num_side_bytes;
        const int num_rows = num_budget / (args.num_stage_bytes + kItemBytes);
        args.num_deliver_warps = static_cast<int>(tuning.num_warps > 0 ? tuning.num_warps : max_of(1, min_of(min_of(kUsualDeliverWarps, most_warps), num_rows / 3)));
        const int64_t num_wanted = max_of(3, kEnoughBytes / (args.num_deliver_warps * args.num_stage_bytes));
        args.num_stages = static_cast<int>(tuning.num_stages > 0 ? tuning.num_stages : min_of(min_of(kMaxDeliverStages, num_wanted), num_rows / args.num_deliver_warps));
        if (args.num_deliver_warps > most_warps || args.num_stages < 2 || args.num_stages > kMaxDeliverStages || args.num_deliver_warps * args.num_stages > num_rows)
            throw ArgumentError("dispatch: " + std::to_string(args.num_deliver_warps) + " warps of " + std::to_string(args.num_stages) + " stages do not fit; shared memory holds " +
                                std::to_string(num_rows) + " stages of this row size, each warp takes 2 to " + std::to_string(kMaxDeliverStages) + ", and " +
                                std::to_string(most_warps) + " warps are the most.");
    } else {
        args.num_stage_bytes = num_side_bytes;  // rows go straight through registers
        args.num_deliver_warps = static_cast<int>(min_of(kUsualDeliverWarps, most_warps));
        args.num_stages = 1;
    }
    const int num_stages = args.num_deliver_warps * args.num_stages;
    args.num_dynamic_bytes = num_stages * (args.num_stage_bytes + kItemBytes) + 16 + num_table_bytes;
    if (!args.use_bulk && args.num_dynamic_bytes > kMaxPlainSharedBytes)
        throw ArgumentError("dispatch: " + std::to_string(num_nodes) + " nodes on " + std::to_string(tuning.num_sms) + " SMs need " +
                            std::to_string(args.num_dynamic_bytes) + " bytes of shared memory; there are " + std::to_string(kMaxPlainSharedBytes) + ". Use more SMs.");
}

}  // namespace deepep::internode
