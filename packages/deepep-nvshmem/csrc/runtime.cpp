#include "runtime.hpp"

#include <limits>

namespace deepep::nvlink {
namespace {

constexpr int64_t kMaxTokens = 1 << 28;  // of one rank, and rows of one output: sums over eight ranks stay in int32

void require_rows(const char* op, int64_t num_row_bytes, int64_t num_tokens, int num_topk) {
    const std::string where = std::string(op) + ": ";
    require(num_row_bytes > 0 && num_row_bytes % 16 == 0 && num_row_bytes < std::numeric_limits<int32_t>::max(),
            where + "a row has " + std::to_string(num_row_bytes) + " bytes; accepted are positive multiples of 16 below 2 GiB.");
    require(num_tokens >= 0 && num_tokens <= kMaxTokens,
            where + "num_tokens is " + std::to_string(num_tokens) + "; accepted are 0 to " + std::to_string(kMaxTokens) + ".");
    require(num_topk >= 0 && num_topk <= kMaxTopk,
            where + "num_topk is " + std::to_string(num_topk) + "; accepted are 0 to " + std::to_string(kMaxTopk) + ".");
}

// How many rows each staging warp carries at once: what shared memory holds, and few enough that the ring takes two batches.
void choose_staging_lanes(const char* op, bool use_bulk, int num_warps, int num_lane_bytes, int num_shared_bytes, int num_units, int64_t num_slots, int& num_lanes) {
    const int64_t fit_slots = num_slots / (2 * num_units);
    require(fit_slots >= 1, std::string(op) + ": the staging window has " + std::to_string(num_slots) + " slots for each rank; this row size needs " +
                                std::to_string(2 * num_units) + ". Give num_staging_bytes more.");
    const int64_t fit_shared = num_warps == 0 ? 1 : num_shared_bytes / (static_cast<int64_t>(num_warps) * num_lane_bytes);
    num_lanes = use_bulk ? static_cast<int>(max_of(1, min_of(kMaxStagingLanes, min_of(fit_slots, fit_shared)))) : 1;
}

}  // namespace

int64_t Runtime::window_bytes(int num_ranks, int max_local_experts, int64_t num_staging_bytes) {
    require(num_ranks >= 1 && num_ranks <= kMaxRanks,
            "num_ranks is " + std::to_string(num_ranks) + "; one NVLink domain takes 1 to " + std::to_string(kMaxRanks) + " ranks.");
    require(max_local_experts >= 1 && max_local_experts <= (1 << 20),
            "max_local_experts is " + std::to_string(max_local_experts) + "; accepted are 1 to " + std::to_string(1 << 20) + ".");
    require(num_staging_bytes >= num_ranks * 2 * kNumSlotBytes,
            "num_staging_bytes is " + std::to_string(num_staging_bytes) + "; " + std::to_string(num_ranks) + " ranks need at least " +
                std::to_string(num_ranks * 2 * kNumSlotBytes) + ".");
    return NormalWindow::of(num_ranks, max_local_experts, num_staging_bytes).num_bytes();
}

Runtime::Runtime(const RuntimeConfig& config) : config_(config), domain_{} {
    const int64_t num_window_bytes = window_bytes(config.num_ranks, config.max_local_experts, config.num_staging_bytes);
    require(config.rank >= 0 && config.rank < config.num_ranks, "rank is " + std::to_string(config.rank) + " of " + std::to_string(config.num_ranks) + ".");
    require(static_cast<int>(config.arena_ptrs.size()) == config.num_ranks,
            "arena_ptrs has " + std::to_string(config.arena_ptrs.size()) + " entries for " + std::to_string(config.num_ranks) + " ranks.");
    require(config.num_arena_bytes >= num_window_bytes, "an arena of " + std::to_string(config.num_arena_bytes) + " bytes cannot hold the window of " +
                                                            std::to_string(num_window_bytes) + " bytes.");
    const DeviceGuard guard(config.device);
    int major = 0;
    check_runtime(cudaDeviceGetAttribute(&major, cudaDevAttrComputeCapabilityMajor, config.device), "asking for the compute capability");
    check_runtime(cudaDeviceGetAttribute(&num_device_sms_, cudaDevAttrMultiProcessorCount, config.device), "asking for the SM count");
    int num_shared_bytes = 0;
    check_runtime(cudaDeviceGetAttribute(&num_shared_bytes, cudaDevAttrMaxSharedMemoryPerBlockOptin, config.device), "asking for the shared memory size");
    has_bulk_ = major >= 9 && num_shared_bytes >= kMaxSharedBytes && is_sm90_compiled();

    domain_.rank = config.rank;
    domain_.num_ranks = config.num_ranks;
    for (int rank = 0; rank < config.num_ranks; ++rank) {
        require(config.arena_ptrs[rank] != 0 && config.arena_ptrs[rank] % 256 == 0, "the arena of rank " + std::to_string(rank) + " is not aligned to 256 bytes.");
        domain_.arenas[rank] = reinterpret_cast<uint8_t*>(config.arena_ptrs[rank]);
    }
    domain_.num_arena_bytes = config.num_arena_bytes;
    domain_.window = NormalWindow::of(config.num_ranks, config.max_local_experts, config.num_staging_bytes);

    // Kernels are loaded now: lazy loading later could wait for a kernel that waits for us.
    check_runtime(prepare_layout(), "loading the layout kernel");
    check_runtime(prepare_notify(), "loading the notify kernel");
    check_runtime(prepare_dispatch(has_bulk_), "loading the dispatch kernel");
    check_runtime(prepare_combine(has_bulk_), "loading the combine kernel");

    page_.open(static_cast<int64_t>(sizeof(int32_t)) * config.max_local_experts);
    domain_.host = page_.control();
    domain_.host_experts = reinterpret_cast<int32_t*>(page_.more());
    check_runtime(cudaMemset(domain_.arenas[config.rank], 0, static_cast<size_t>(domain_.window.num_signal_bytes())), "clearing the window");
    check_runtime(cudaDeviceSynchronize(), "clearing the window");
}

int Runtime::num_local_experts(int num_experts) const {
    require(num_experts > 0 && num_experts % config_.num_ranks == 0,
            "num_experts is " + std::to_string(num_experts) + "; it must be a positive multiple of the " + std::to_string(config_.num_ranks) + " ranks.");
    const int num_local = num_experts / config_.num_ranks;
    require(num_local <= config_.max_local_experts, "num_experts is " + std::to_string(num_experts) + ", so each rank holds " + std::to_string(num_local) +
                                                        "; this buffer was built for at most " + std::to_string(config_.max_local_experts) + " per rank.");
    return num_local;
}

void Runtime::set_arena_bytes(int64_t num_bytes) {
    require(num_bytes >= domain_.num_arena_bytes,
            "an arena of " + std::to_string(domain_.num_arena_bytes) + " bytes cannot shrink to " + std::to_string(num_bytes) + ".");
    domain_.num_arena_bytes = num_bytes;
}

bool Runtime::is_symmetric(uint64_t address, int64_t num_bytes) const {
    const uint64_t base = reinterpret_cast<uint64_t>(domain_.arenas[config_.rank]);
    return address >= base && extent_fits(static_cast<int64_t>(address - base), num_bytes, 1, domain_.window.num_bytes(), domain_.num_arena_bytes);
}

void Runtime::reset(cudaStream_t stream) {
    page_.require_open();
    const DeviceGuard guard(config_.device);
    check_runtime(cudaMemsetAsync(domain_.arenas[config_.rank], 0, static_cast<size_t>(domain_.window.num_signal_bytes()), stream), "resetting the window");
    check_runtime(cudaStreamSynchronize(stream), "resetting the window");
    page_.clear_error();
    page_.set_aborted(false);
}

void Runtime::layout(LayoutArgs args, cudaStream_t stream) {
    page_.require_open();
    require_rows("layout", 16, args.num_tokens, args.num_topk);
    num_local_experts(args.num_experts);
    args.domain = domain_;
    const DeviceGuard guard(config_.device);
    check_runtime(launch_layout(args, stream), "launching layout");
}

void Runtime::notify(NotifyArgs args, cudaStream_t stream) {
    page_.require_open();
    require_rows("notify", 16, args.num_tokens, 0);
    require(args.expert_alignment >= 1, "notify: expert_alignment is " + std::to_string(args.expert_alignment) + "; accepted are 1 and more.");
    if (args.status == kStatusValid)
        num_local_experts(args.num_experts);
    else
        args.num_experts = 0;  // a refused call may carry any number; peers see the status first
    args.domain = domain_;
    const DeviceGuard guard(config_.device);
    check_runtime(launch_notify(args, stream), "launching notify");
    num_dispatch_experts_ = args.num_experts;
}

bool Runtime::wait_for_rows(const AwaitedCounts& awaited, int64_t capacity) const {
    const CountsRecord& record = domain_.host->counts;
    if (!wait_for_ticket(record.ticket, awaited.ticket, awaited.timeout_s)) return false;
    return record.mismatch_mask == 0 && record.bad_count_mask == 0 && !page_.error() && record.num_recv_tokens >= awaited.least_rows &&
           record.num_recv_tokens <= capacity;
}

std::optional<Counts> Runtime::wait_counts(uint32_t ticket, double timeout_s) const {
    page_.require_open();
    require(ticket != 0, "wait_counts: ticket 0 stands for no publication; use another number.");
    const CountsRecord& record = domain_.host->counts;
    if (!wait_for_ticket(record.ticket, ticket, timeout_s)) return std::nullopt;
    Counts counts{};
    counts.num_recv_tokens = record.num_recv_tokens;
    counts.mismatch_mask = record.mismatch_mask;
    counts.bad_count_mask = record.bad_count_mask;
    const int num_local = num_dispatch_experts_ / config_.num_ranks;
    counts.num_recv_tokens_per_expert.assign(domain_.host_experts, domain_.host_experts + num_local);
    for (int rank = 0; rank < config_.num_ranks; ++rank)
        counts.headers.emplace_back(record.headers[rank], record.headers[rank] + kNumHeaderWords);
    return counts;
}

const char* Runtime::dispatch(DispatchArgs args, int64_t num_row_bytes, int num_experts, const Tuning& tuning, const AwaitedCounts& awaited, cudaStream_t stream) {
    page_.require_open();
    require_rows("dispatch", num_row_bytes, args.num_tokens, args.num_topk);
    require(args.capacity >= 0 && args.capacity <= std::numeric_limits<int32_t>::max(),
            "dispatch: capacity is " + std::to_string(args.capacity) + " rows; accepted are 0 to 2^31 - 1.");
    require(tuning.num_sms >= 1 && tuning.num_sms <= num_device_sms_,
            "dispatch: num_sms is " + std::to_string(tuning.num_sms) + "; this device takes 1 to " + std::to_string(num_device_sms_) + ".");
    require(is_aligned(args.x, 16) && is_aligned(args.recv_x, 16) && is_aligned(args.recv_scales, 16) && is_aligned(args.recv_topk_idx, 16) &&
                is_aligned(args.recv_topk_weights, 16) && is_aligned(args.recv_src_idx, 16),
            "dispatch: x and the outputs must be aligned to 16 bytes.");
    require((args.topk_idx.data == nullptr) == (args.topk_weights == nullptr) || args.num_tokens == 0, "dispatch: topk_idx and topk_weights go together.");
    const bool has_topk = args.num_topk > 0;
    const bool has_scales = args.num_scales > 0;
    args.num_local_experts = has_topk ? num_local_experts(num_experts) : 0;
    args.domain = domain_;

    // An empty output may have any address, null included: nothing is written to it.
    const auto symmetric = [&](const void* pointer, int64_t num_unit_bytes) {
        return args.capacity == 0 || num_unit_bytes == 0 || is_symmetric(reinterpret_cast<uint64_t>(pointer), args.capacity * num_unit_bytes);
    };
    args.is_staged = !(symmetric(args.recv_x, num_row_bytes) && symmetric(args.recv_scales, has_scales ? args.num_scales * 4 : 0) &&
                       symmetric(args.recv_topk_idx, has_topk ? args.num_topk * 8 : 0) &&
                       symmetric(args.recv_topk_weights, has_topk ? args.num_topk * 4 : 0) && symmetric(args.recv_src_idx, args.has_src_idx ? 4 : 0));

    constexpr int kSharedBudget = 216 * 1024, kMaxPartBytes = 16384, kUsualPushWarps = 7, kEnoughBytes = 160 * 1024;
    args.use_bulk = tuning.use_bulk && has_bulk_;
    args.parts = RowParts::cut(num_row_bytes, kMaxPartBytes);
    args.use_bulk_scales = args.use_bulk && has_scales && args.num_scales % 4 == 0 && args.num_scales <= 1024;
    args.gathers_scales = args.scales_stride_col != 1 || args.scales_stride_token % 4 != 0 || !is_aligned(args.scales, 16);
    args.num_stage_bytes = static_cast<int>(align_up(args.parts.num_part_bytes, 128) + (args.use_bulk_scales ? align_up(args.num_scales * 4, 128) : 0));
    if (args.use_bulk) {
        const int num_rows = kSharedBudget / (args.num_stage_bytes + 8);
        args.num_push_warps = tuning.num_warps > 0 ? tuning.num_warps : static_cast<int>(max_of(1, min_of(kUsualPushWarps, num_rows / 4)));
        // Seven warps fill the link with 160 KiB in flight per SM; more only queues up in the switch (measured: 1 to 2 % slower).
        const int64_t num_wanted = args.num_push_warps == kUsualPushWarps ? max_of(3, kEnoughBytes / (args.num_push_warps * args.num_stage_bytes)) : num_rows;
        args.num_stages = tuning.num_stages > 0 ? tuning.num_stages : static_cast<int>(min_of(min_of(kMaxPushStages, num_wanted), num_rows / args.num_push_warps));
        require(args.num_push_warps <= kMaxPushWarps && args.num_stages >= 2 && args.num_stages <= kMaxPushStages && args.num_push_warps * args.num_stages <= num_rows,
                "dispatch: " + std::to_string(args.num_push_warps) + " warps of " + std::to_string(args.num_stages) + " stages do not fit; shared memory holds " +
                    std::to_string(num_rows) + " stages of this row size, each warp takes 2 to 8, and " + std::to_string(kMaxPushWarps) + " warps are the most.");
    } else {
        args.num_push_warps = kMaxPushWarps;
        args.num_stages = 0;
    }
    // Side data are many small stores; under the load of the rows each takes several microseconds, so they need warps, not bandwidth. The
    // staged phase needs two warps for each peer.
    const int num_peers = config_.num_ranks - 1;
    const int num_side_wanted = tuning.num_side_warps > 0 ? tuning.num_side_warps : has_scales && !args.use_bulk_scales ? 8 : 4;
    args.num_side_warps = static_cast<int>(min_of(kMaxDispatchWarps - args.num_push_warps, max_of(num_side_wanted, 2 * num_peers - args.num_push_warps)));
    args.staged_parts = RowParts::cut(num_row_bytes, kNumSlotBytes);
    const SideRow side{args.num_scales, args.num_topk, args.has_src_idx};
    require(side.num_bytes() <= kNumSlotBytes, "dispatch: a row's scales and top-k data have " + std::to_string(side.num_bytes()) + " bytes; at most " +
                                                   std::to_string(kNumSlotBytes) + " are accepted.");
    args.num_lane_bytes = static_cast<int>(align_up(max_of(args.staged_parts.num_part_bytes, side.num_bytes()), 128));
    choose_staging_lanes("dispatch", args.use_bulk, 2 * num_peers, args.num_lane_bytes, kSharedBudget, args.staged_parts.num_parts + 1,
                         domain_.window.num_slots, args.num_staging_lanes);
    args.num_dynamic_bytes = args.use_bulk ? static_cast<int>(max_of(args.num_push_warps * args.num_stages * (args.num_stage_bytes + 8),
                                                                     2 * num_peers * args.num_staging_lanes * args.num_lane_bytes))
                                           : 0;
    const DeviceGuard guard(config_.device);
    // Everything is ready: the GPU idles from the counts to the launch.
    if (awaited.ticket != 0 && !wait_for_rows(awaited, args.capacity)) return nullptr;
    check_runtime(launch_dispatch(args, tuning.num_sms, stream), "launching dispatch");
    return args.is_staged ? "staged" : "in_place";
}

const char* Runtime::combine(CombineArgs args, int64_t num_row_bytes, const Tuning& tuning, cudaStream_t stream) {
    page_.require_open();
    require_rows("combine", num_row_bytes, args.num_tokens, args.num_topk);
    require(args.num_recv_tokens >= 0 && args.num_recv_tokens <= std::numeric_limits<int32_t>::max(),
            "combine: num_recv_tokens is " + std::to_string(args.num_recv_tokens) + ".");
    require(tuning.num_sms >= 1 && tuning.num_sms <= num_device_sms_,
            "combine: num_sms is " + std::to_string(tuning.num_sms) + "; this device takes 1 to " + std::to_string(num_device_sms_) + ".");
    require(is_aligned(args.y, 16) && is_aligned(args.topk_weights, 16) && is_aligned(args.out, 16) && is_aligned(args.bias_0, 16) && is_aligned(args.bias_1, 16),
            "combine: y, topk_weights, out and the biases must be aligned to 16 bytes.");
    args.domain = domain_;
    const bool has_weights = args.num_topk > 0;
    const auto symmetric = [&](const void* pointer, int64_t num_unit_bytes) {
        return args.num_recv_tokens == 0 || is_symmetric(reinterpret_cast<uint64_t>(pointer), args.num_recv_tokens * num_unit_bytes);
    };
    args.use_bulk = tuning.use_bulk && has_bulk_;
    const bool is_y_symmetric = symmetric(args.y, num_row_bytes);
    const bool are_weights_symmetric = !has_weights || symmetric(args.topk_weights, args.num_topk * 4);
    // A relay carries rows only; without peers there is nobody to relay for.
    const bool can_relay = args.relay != nullptr && !is_y_symmetric && are_weights_symmetric && config_.num_ranks > 1;
    require(args.relay == nullptr || (is_aligned(args.relay, 16) && symmetric(args.relay, num_row_bytes)),
            "combine: the relay must lie in the arena, as large as y, aligned to 16 bytes.");
    if (!can_relay) args.relay = nullptr;
    args.is_staged = !can_relay && !(is_y_symmetric && are_weights_symmetric);

    constexpr int kSharedBudget = 216 * 1024, kPushBudget = 96 * 1024;
    args.parts = RowParts::cut(num_row_bytes, config_.num_ranks > 4 ? kNumSlotBytes / 2 : kNumSlotBytes);
    // A stage's rows also carry weights: up to 32 of them and 12 bytes before them.
    args.num_stage_row_bytes = static_cast<int>(max_of(args.parts.num_part_bytes, align_up(kMaxTopk * 4 + 12, 16)));
    args.num_push_warps = args.is_staged ? config_.num_ranks - 1 : 0;
    args.num_lane_bytes = static_cast<int>(align_up(args.num_stage_row_bytes, 128));
    const int num_stage_bytes = config_.num_ranks * args.num_stage_row_bytes;
    // Staged, the two directions share shared memory: a wanted number of stages leaves the rest to the pushing warps.
    const int64_t num_wanted_bytes = tuning.num_stages * static_cast<int64_t>(num_stage_bytes);
    const int num_push_budget = tuning.num_stages > 0 ? static_cast<int>(max_of(0, kSharedBudget - num_wanted_bytes)) : kPushBudget;
    if (can_relay) {
        args.num_push_warps = kNumRelayWarps;
        args.num_staging_lanes = 0;
    } else {
        choose_staging_lanes("combine", args.use_bulk, args.num_push_warps, args.num_lane_bytes, num_push_budget, args.parts.num_parts + 1,
                             domain_.window.num_slots, args.num_staging_lanes);
    }
    args.num_push_bytes = can_relay ? kNumRelayWarps * kRelayWarpBytes : args.use_bulk ? args.num_push_warps * args.num_staging_lanes * args.num_lane_bytes : 0;
    const int num_stages = static_cast<int>(min_of(kMaxPullStages, (kSharedBudget - args.num_push_bytes) / num_stage_bytes));
    args.num_stages = tuning.num_stages > 0 ? static_cast<int>(min_of(tuning.num_stages, num_stages)) : num_stages;
    args.num_load_warps = static_cast<int>(min_of(min_of(tuning.num_warps > 0 ? tuning.num_warps : args.is_staged ? 4 : 2, kMaxLoadWarps), args.num_stages));
    args.num_dynamic_bytes = args.num_push_bytes + (args.use_bulk ? args.num_stages * num_stage_bytes : 0);
    const DeviceGuard guard(config_.device);
    check_runtime(launch_combine(args, tuning.num_sms, stream), "launching combine");
    return can_relay ? "relayed" : args.is_staged ? "staged" : "pull";
}

}  // namespace deepep::nvlink
