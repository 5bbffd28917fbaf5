// How many warps and stages dispatch takes.
#include <string>

#include "deepep/common/exceptions.hpp"
#include "internode/kernels.hpp"

namespace deepep::internode {

void shape_dispatch(DispatchArgs& args, const Tuning& tuning, bool has_bulk) {
    constexpr int kSharedBudget = 216 * 1024, kMaxPartBytes = 16384, kMaxSideBytes = 8192, kUsualDeliverWarps = 4, kUsualSendWarps = 11, kEnoughBytes = 186 * 1024;
    constexpr int kLeastDividedSms = 2, kMaxTeamSenders = 7;
    const DispatchMessage& message = args.message;
    if (message.num_side_bytes() > kMaxSideBytes)
        throw ArgumentError("dispatch: a row's scales and top-k data have " + std::to_string(message.num_side_bytes()) + " bytes; at most " +
                            std::to_string(kMaxSideBytes) + " are accepted.");
    args.use_bulk = tuning.use_bulk && has_bulk;
    args.parts = RowParts::cut(message.num_row_bytes, args.use_bulk ? kMaxPartBytes : message.num_row_bytes);
    if (args.num_tokens * args.parts.num_parts > kMaxTokens)
        throw ArgumentError("dispatch: " + std::to_string(args.num_tokens) + " tokens of " + std::to_string(message.num_row_bytes) + " bytes are more than " +
                            std::to_string(kMaxTokens) + " parts of rows.");
    args.stores_scales = args.use_bulk && message.num_scales > 0 && message.num_scales % 4 == 0;
    args.loads_scales = args.stores_scales && args.scales_stride_col == 1 && args.scales_stride_token % 4 == 0 && reinterpret_cast<uintptr_t>(args.scales) % 16 == 0;
    args.loads_heads = args.use_bulk && message.is_cached && reinterpret_cast<uintptr_t>(args.send_nvl_head) % 16 == 0;
    args.num_team_senders = tuning.num_team_senders.value_or(tuning.num_sms >= kLeastDividedSms ? 1 : 0);
    if (args.num_team_senders < 0 || args.num_team_senders > kMaxTeamSenders)
        throw ArgumentError("dispatch: num_team_senders is " + std::to_string(args.num_team_senders) + "; accepted are 0 to " + std::to_string(kMaxTeamSenders) + ".");
    const bool is_divided = args.num_team_senders > 0;
    const int num_nodes = args.domain.group.num_nodes();
    args.node = args.domain.group.node();
    args.num_nodes = num_nodes;
    args.full_words = args.domain.window.full(args.domain.network, NetworkWindow::kDispatchFull, 0);
    args.credit_words = args.domain.window.credit(args.domain.network, 0);
    args.send_rings = args.domain.network + args.domain.window.send_rings_offset();
    args.receive_rings = args.domain.network + args.domain.window.receive_rings_offset();
    args.num_slot_bytes = args.geometry.slot_offset(1);
    args.num_places = BlockPlaces::num_places(tuning.num_sms, args.num_team_senders);
    args.num_block_contexts = (num_nodes - 1) * static_cast<int>(max_of(1, args.num_team_senders) * ceil_div(args.geometry.num_slots, args.num_places));
    // Streams (two of 16 bytes for each node); of the contexts the next chunk to send, credits received, asked for and given back, the chunk that has come and its
    // place in the queue, the chunk that is complete, and where they are (8).
    const int num_table_bytes = num_nodes * 32 + args.num_block_contexts * 36;
    constexpr int kItemBytes = 40;  // of a stage: its barrier and what it holds
    const int num_budget = kSharedBudget - num_table_bytes;
    args.side = SideLayout::of(message);
    args.stage_side = args.use_bulk ? args.parts.num_part_bytes : 0;  // without bulk copies rows go straight through registers
    args.num_stage_bytes = static_cast<int>(align_up(args.stage_side + message.num_shared_side_bytes(), 128));
    args.stores_side = !message.is_cached || (message.num_scales > 0 && !args.stores_scales);
    args.writes_own_side = !message.is_cached || (message.num_scales > 0 && !args.loads_scales);
    args.num_own_side_bytes = args.loads_scales ? message.num_scales * 4 : 0;
    args.num_sent_side_bytes = message.num_sent_side_bytes();
    args.num_local_experts = args.num_experts / args.domain.group.num_ranks;
    // In a team all warps of a sender send, and the deliverer has as many deliver warps as its shared memory feeds; the numbers matter together only
    // to a sender whose deliverer has not begun. Of one rank to a node most of the work is sending, of several it is delivering, which takes fewer warps with more stages
    // (benchmarks/results/2026-11-22-h200-x4).
    constexpr int kNumOtherWarps = kMaxDispatchWarps - kNumCreditWarps;
    const int num_divided_warps = args.domain.group.ranks_per_node == 1 ? 12 : 7;
    const int num_usual_deliver_warps = is_divided ? num_divided_warps : kUsualDeliverWarps;
    const int num_usual_send_warps = is_divided ? kNumOtherWarps - (tuning.num_warps > 0 ? tuning.num_warps : num_divided_warps) : kUsualSendWarps;
    args.num_send_warps =
        static_cast<int>(max_of(1, min_of(kNumOtherWarps - 1, tuning.num_send_warps > 0 ? tuning.num_send_warps : num_usual_send_warps)));
    const int64_t most_warps = min_of(kMaxDeliverWarps, kNumOtherWarps - args.num_send_warps);
    if (args.use_bulk) {
        const int num_rows = num_budget / (args.num_stage_bytes + kItemBytes);
        const int64_t num_fed_warps = num_rows / (is_divided ? 2 : 3);
        args.num_deliver_warps = static_cast<int>(tuning.num_warps > 0 ? tuning.num_warps : max_of(1, min_of(min_of(num_usual_deliver_warps, most_warps), num_fed_warps)));
        if (is_divided && tuning.num_send_warps == 0) args.num_send_warps = kNumOtherWarps - args.num_deliver_warps;
        const int64_t num_wanted = is_divided ? kMaxDeliverStages : max_of(3, kEnoughBytes / (args.num_deliver_warps * args.num_stage_bytes));
        args.num_stages = static_cast<int>(tuning.num_stages > 0 ? tuning.num_stages : min_of(min_of(kMaxDeliverStages, num_wanted), num_rows / args.num_deliver_warps));
        if (args.num_deliver_warps > most_warps || args.num_stages < 2 || args.num_stages > kMaxDeliverStages || args.num_deliver_warps * args.num_stages > num_rows)
            throw ArgumentError("dispatch: " + std::to_string(args.num_deliver_warps) + " warps of " + std::to_string(args.num_stages) + " stages do not fit; shared memory holds " +
                                std::to_string(num_rows) + " stages of this row size, each warp takes 2 to " + std::to_string(kMaxDeliverStages) + ", and " +
                                std::to_string(most_warps) + " warps are the most.");
    } else {
        args.num_deliver_warps = static_cast<int>(min_of(num_usual_deliver_warps, most_warps));
        args.num_stages = 1;
    }
    args.sends_directly = is_divided && args.domain.has_stores_to_all() && tuning.may_send_directly && args.use_bulk && args.parts.num_parts == 1;
    const int num_stages = args.num_deliver_warps * args.num_stages;
    args.num_dynamic_bytes = num_stages * (args.num_stage_bytes + kItemBytes) + 16 + num_table_bytes;
    if (!args.use_bulk && args.num_dynamic_bytes > kMaxPlainSharedBytes)
        throw ArgumentError("dispatch: " + std::to_string(num_nodes) + " nodes on " + std::to_string(tuning.num_sms) + " SMs need " +
                            std::to_string(args.num_dynamic_bytes) + " bytes of shared memory; there are " + std::to_string(kMaxPlainSharedBytes) + ". Use more SMs.");
}

}  // namespace deepep::internode
