#include "runtime.hpp"

#include <atomic>
#include <cstring>
#include <limits>

#include "deepep/memory/symmetric.hpp"

namespace deepep::ibgda {
namespace {

constexpr uint64_t kDefaultTimeoutNs = 100ull * 1000 * 1000 * 1000;
constexpr int kDefaultSms = 128;

// Makes a device current for one call and restores the caller's.
class DeviceGuard {
public:
    explicit DeviceGuard(int device) {
        check_runtime(cudaGetDevice(&previous_), "asking for the current CUDA device");
        if (previous_ != device) {
            check_runtime(cudaSetDevice(device), "selecting CUDA device " + std::to_string(device));
            changed_ = true;
        }
    }
    ~DeviceGuard() {
        if (changed_) static_cast<void>(cudaSetDevice(previous_));
    }

private:
    int previous_ = 0;
    bool changed_ = false;
};

void require(bool is_good, const std::string& text) {
    if (!is_good) throw ArgumentError(text);
}

void require_between(const std::string& what, int64_t value, int64_t least, int64_t most) {
    require(value >= least && value <= most,
            what + " is " + std::to_string(value) + "; accepted are " + std::to_string(least) + " to " + std::to_string(most) + ".");
}

template <class T>
T read_shared(const T& field) {
    return *const_cast<const volatile T*>(&field);
}

bool is_aligned(const void* pointer, int64_t unit) { return reinterpret_cast<uintptr_t>(pointer) % unit == 0; }

bool reduces_at_source(const std::string& ll_reduce) {
    require(ll_reduce == "rank" || ll_reduce == "expert", "ll_reduce is '" + ll_reduce + "'; accepted are 'rank' and 'expert'.");
    return ll_reduce == "expert";
}

void require_shape(const std::string& where, int num_ranks, const CallShape& shape) {
    require_between(where + "num_ranks", num_ranks, 1, kMaxWindowRanks);
    require_between(where + "max_tokens", shape.max_tokens, 1, kMaxTokens);
    require_between(where + "hidden", shape.hidden, 8, kMaxHidden);
    require(shape.hidden % 8 == 0, where + "hidden is " + std::to_string(shape.hidden) + "; it has to be a multiple of 8.");
    require_between(where + "num_topk", shape.num_topk, 1, kMaxTopk);
    require_between(where + "num_experts", shape.num_experts, 1, kMaxExperts);
    require(shape.num_experts % num_ranks == 0,
            where + "num_experts is " + std::to_string(shape.num_experts) + "; it has to be a multiple of the " + std::to_string(num_ranks) + " ranks.");
    require_between(where + "the number of experts per rank", shape.num_experts / num_ranks, 1, kMaxLocalExperts);
    // Work items are counted in 32 bits, with room for a step beyond the last one.
    require_between(where + "num_ranks * max_tokens * hidden / 256", static_cast<int64_t>(num_ranks) * shape.max_tokens * ceil_div(shape.hidden, 256), 1, 1 << 30);
    require_between(where + "num_experts * max_tokens", static_cast<int64_t>(shape.num_experts) * shape.max_tokens, 1, std::numeric_limits<int32_t>::max());
}

// What every rank must have given alike, in one word; never all ones.
uint32_t checksum_of(const DispatchArgs& args) {
    uint32_t sum = 2166136261u;
    for (const int number : {args.hidden, args.num_topk, args.max_tokens, args.num_experts, args.use_fp8 | args.round_scale << 1 | args.use_ue8m0 << 2 | args.has_weights << 3})
        sum = (sum ^ static_cast<uint32_t>(number)) * 16777619u;
    return sum;
}

}  // namespace

int64_t Runtime::window_bytes(int num_ranks, const CallShape& shape, const std::string& ll_reduce, bool has_remote) {
    require_shape("window_bytes: ", num_ranks, shape);
    const bool at_source = reduces_at_source(ll_reduce);
    LowLatencyWindow window{num_ranks, LowLatencyWindow::share_of(at_source),
                            LowLatencyWindow::needed_part_bytes(shape.max_tokens, shape.hidden, shape.num_topk, at_source), has_remote};
    return window.num_bytes();
}

int64_t Runtime::handle_words(int num_ranks, const CallShape& shape) {
    return HandleLayout{num_ranks, shape.max_tokens, shape.num_experts, shape.num_topk}.num_words();
}

Runtime::Runtime(const RuntimeConfig& config) : config_(config), domain_{} {
    require_between("num_ranks", config.num_ranks, 1, kMaxWindowRanks);
    require_between("rank", config.rank, 0, config.num_ranks - 1);
    require(static_cast<int>(config.arena_ptrs.size()) == config.num_ranks,
            "arena_ptrs has " + std::to_string(config.arena_ptrs.size()) + " entries for " + std::to_string(config.num_ranks) + " ranks.");
    domain_.rank = config.rank;
    domain_.num_ranks = config.num_ranks;
    domain_.reduces_at_source = reduces_at_source(config.ll_reduce);
    domain_.least_divided_blocks = kLeastDividedBlocks;
    domain_.enable_shrink = config.enable_shrink;
    domain_.remote = remote_peers_of(config.rdma_view);
    for (int rank = 0; rank < config.num_ranks; ++rank) {
        const uint64_t arena = config.arena_ptrs[rank];
        require(arena % 256 == 0, "the arena of rank " + std::to_string(rank) + " is not aligned to 256 bytes.");
        require((arena == 0) == domain_.remote.has(rank), "the arena of rank " + std::to_string(rank) + (arena == 0 ? " is not mapped, and no queue pair leads there." : " is mapped, yet a queue pair leads there."));
    }
    require(config.arena_ptrs[config.rank] != 0, "this rank's own arena is not mapped.");
    domain_.own = reinterpret_cast<uint8_t*>(config.arena_ptrs[config.rank]);
    window_ = LowLatencyWindow::of(config.num_ranks, config.num_arena_bytes, domain_.reduces_at_source, domain_.remote.any());
    domain_.window = WindowOffsets::of(window_);
    require(window_.num_part_bytes > 0, "an arena of " + std::to_string(config.num_arena_bytes) + " bytes is too small for a window of " +
                                                   std::to_string(config.num_ranks) + " ranks; ask window_bytes for a size.");

    const DeviceGuard guard(config.device);
    check_runtime(cudaDeviceGetAttribute(&num_device_sms_, cudaDevAttrMultiProcessorCount, config.device), "asking for the SM count");
    // Kernels are loaded now: lazy loading later could wait for a kernel that waits for us.
    domain_.is_programmatic = true;
    check_runtime(prepare_dispatch(&domain_.is_programmatic), "loading the dispatch kernels");
    check_runtime(prepare_combine(&domain_.is_programmatic), "loading the combine kernels");
    void* page = nullptr;
    check_runtime(cudaHostAlloc(&page, sizeof(HostControl), cudaHostAllocPortable | cudaHostAllocMapped), "allocating the pinned status page");
    std::memset(page, 0, sizeof(HostControl));
    domain_.host = static_cast<HostControl*>(page);
    domain_.host->timeout_ns = kDefaultTimeoutNs;
    try {
        fill_window(nullptr);
        check_runtime(cudaDeviceSynchronize(), "filling the window");
    } catch (...) {
        close();
        throw;
    }
}

Runtime::~Runtime() { close(); }

void Runtime::close() noexcept {
    if (domain_.host == nullptr) return;
    static_cast<void>(cudaFreeHost(domain_.host));
    domain_.host = nullptr;
}

void Runtime::require_open() const { require(domain_.host != nullptr, "this runtime has been closed."); }

// Counters and credits zero, boxes empty, the table of arenas.
void Runtime::fill_window(cudaStream_t stream) {
    const LowLatencyWindow& window = window_;
    check_runtime(cudaMemsetAsync(domain_.own, 0, static_cast<size_t>(window.boxes_offset()), stream), "clearing the window");
    check_runtime(cudaMemsetAsync(domain_.own + window.boxes_offset(), 0xff, static_cast<size_t>(window.num_bytes() - window.boxes_offset()), stream),
                  "filling the window");
    check_runtime(cudaMemcpyAsync(domain_.own + window.arenas_offset(), config_.arena_ptrs.data(), config_.arena_ptrs.size() * sizeof(uint64_t),
                                  cudaMemcpyHostToDevice, stream),
                  "filling the window");
}

void Runtime::set_timeout_ns(uint64_t timeout_ns) {
    require_open();
    *const_cast<volatile uint64_t*>(&domain_.host->timeout_ns) = timeout_ns;
}
void Runtime::set_least_divided_blocks(int num_blocks) {
    if (num_blocks < 2) throw ArgumentError("least_divided_blocks is " + std::to_string(num_blocks) + "; it is at least 2: one sends, one receives.");
    domain_.least_divided_blocks = num_blocks;
}
void Runtime::abort() {
    require_open();
    *const_cast<volatile uint32_t*>(&domain_.host->is_aborted) = 1;
}
void Runtime::clear_abort() {
    require_open();
    *const_cast<volatile uint32_t*>(&domain_.host->is_aborted) = 0;
}

std::optional<ErrorRecord> Runtime::error() const {
    require_open();
    if (read_shared(domain_.host->error.generation) != read_shared(domain_.host->error_generation) + 1) return std::nullopt;
    std::atomic_thread_fence(std::memory_order_acquire);  // pairs with the device's release of `generation`
    return domain_.host->error;
}

void Runtime::clear_error() {
    require_open();
    if (error()) *const_cast<volatile uint32_t*>(&domain_.host->error_generation) = domain_.host->error_generation + 1;
}

void Runtime::reset(cudaStream_t stream) {
    require_open();
    const DeviceGuard guard(config_.device);
    fill_window(stream);
    check_runtime(cudaStreamSynchronize(stream), "resetting the window");
    clear_error();
    clear_abort();
}

int Runtime::num_blocks(int num_sms) const {
    const int64_t wanted = num_sms <= 0 ? kDefaultSms : num_sms;
    // Blocks take half an SM at most, so that two fit.
    return static_cast<int>(min_of(wanted, min_of(2 * num_device_sms_, kMaxBlocks)));
}

void Runtime::require_call(const char* op, const CallShape& shape, int num_tokens, int phases) const {
    const std::string where = std::string(op) + ": ";
    require_shape(where, config_.num_ranks, shape);
    require_between(where + "num_tokens", num_tokens, 0, shape.max_tokens);
    require_between(where + "phases", phases, kSend, kSend | kReceive);
    const int64_t needed = window_bytes(config_.num_ranks, shape, config_.ll_reduce, domain_.remote.any());
    require(needed <= config_.num_arena_bytes, where + "these sizes need a window of " + std::to_string(needed) + " bytes; this one has " +
                                                   std::to_string(config_.num_arena_bytes) + ".");
}

void Runtime::dispatch(DispatchArgs args, int num_sms, cudaStream_t stream) {
    require_open();
    const CallShape shape{args.hidden, args.num_topk, args.max_tokens, args.num_experts};
    const bool sends = (args.phases & kSend) != 0, receives = (args.phases & kReceive) != 0;
    require_call("dispatch", shape, args.num_tokens, args.phases);
    const int unit = args.use_fp8 ? (args.use_ue8m0 ? 512 : 128) : 8;
    require(args.hidden % unit == 0, "dispatch: hidden is " + std::to_string(args.hidden) + "; this cast needs a multiple of " + std::to_string(unit) + ".");
    require(is_aligned(args.x, 16) && is_aligned(args.recv_x, 16) && is_aligned(args.handle, 16), "dispatch: x, recv_x and handle must be aligned to 16 bytes.");
    require(args.handle != nullptr, "dispatch: handle is null.");
    require(!sends || args.num_tokens == 0 || (args.x != nullptr && args.topk_idx.data != nullptr && (args.topk_weights != nullptr || !args.has_weights)),
            "dispatch: x, topk_idx or topk_weights is null.");
    require(!receives || args.recv_x == nullptr ||
                (args.recv_count != nullptr && args.layout_range != nullptr && (args.recv_scales != nullptr) == args.use_fp8),
            "dispatch: recv_count, layout_range and, for FP8, recv_scales go together with recv_x.");
    require(!args.use_ue8m0 || args.round_scale, "dispatch: use_ue8m0 needs round_scale.");
    args.domain = domain_;
    args.num_local_experts = args.num_experts / config_.num_ranks;
    args.message = RowOffsets::of(RowMessage::of(args.hidden, args.use_fp8, args.num_topk, args.has_weights));
    args.handle_layout = HandleOffsets::of({config_.num_ranks, args.max_tokens, args.num_experts, args.num_topk});
    args.checksum = checksum_of(args);
    const DeviceGuard guard(config_.device);
    check_runtime(launch_dispatch(args, num_blocks(num_sms), stream), "launching dispatch");
}

void Runtime::combine(CombineArgs args, int num_sms, cudaStream_t stream) {
    require_open();
    const CallShape shape{args.hidden, args.num_topk, args.max_tokens, args.num_experts};
    require_call("combine", shape, args.num_tokens, args.phases);
    require(!args.use_logfmt || args.hidden % kLogfmtColumns == 0,
            "combine: hidden is " + std::to_string(args.hidden) + "; LogFMT needs a multiple of " + std::to_string(kLogfmtColumns) + ".");
    require(is_aligned(args.x, 16) && is_aligned(args.out, 16) && is_aligned(args.handle, 16), "combine: x, out and handle must be aligned to 16 bytes.");
    require(args.num_row_bytes % 16 == 0 && args.num_row_bytes >= 2ll * args.hidden,
            "combine: rows of x lie " + std::to_string(args.num_row_bytes / 2) + " elements apart; accepted are multiples of 8 from " + std::to_string(args.hidden) + ".");
    require(args.handle != nullptr, "combine: handle is null.");
    require(args.num_tokens == 0 || (args.topk_idx.data != nullptr && args.topk_weights != nullptr), "combine: topk_idx or topk_weights is null.");
    require((args.phases & kSend) == 0 || args.x != nullptr, "combine: x is null.");
    require(args.phases == (kSend | kReceive) || args.ticket != nullptr, "combine: ticket is null; a call of one phase needs it.");
    args.domain = domain_;
    args.num_local_experts = args.num_experts / config_.num_ranks;
    args.handle_layout = HandleOffsets::of({config_.num_ranks, args.max_tokens, args.num_experts, args.num_topk});
    args.row = CombineRow::of(args.hidden, args.use_logfmt);
    const DeviceGuard guard(config_.device);
    check_runtime(launch_combine(args, num_blocks(num_sms), stream), "launching combine");
}

void Runtime::require_masks() const {
    require_open();
    require(config_.enable_shrink, "masks: this runtime was built without enable_shrink.");
}

void Runtime::update_mask(int rank, bool is_masked, cudaStream_t stream) {
    require_masks();
    require_between("update_mask: rank", rank, 0, config_.num_ranks - 1);
    require(rank != config_.rank, "update_mask: rank " + std::to_string(rank) + " is this rank itself.");
    const DeviceGuard guard(config_.device);
    uint8_t* word = domain_.own + window_.masked_offset() + sizeof(uint32_t) * rank;
    // The memory of a 32-bit one, byte by byte.
    check_runtime(cudaMemsetAsync(word, 0, sizeof(uint32_t), stream), "changing the mask");
    if (is_masked) check_runtime(cudaMemsetAsync(word, 1, 1, stream), "changing the mask");
}

void Runtime::query_mask(int32_t* out, cudaStream_t stream) const {
    require_masks();
    const DeviceGuard guard(config_.device);
    check_runtime(cudaMemcpyAsync(out, domain_.own + window_.masked_offset(), sizeof(uint32_t) * config_.num_ranks, cudaMemcpyDeviceToDevice, stream),
                  "reading the mask");
}

void Runtime::clean_mask(cudaStream_t stream) {
    require_masks();
    const DeviceGuard guard(config_.device);
    check_runtime(cudaMemsetAsync(domain_.own + window_.masked_offset(), 0, sizeof(uint32_t) * config_.num_ranks, stream), "cleaning the mask");
}

}  // namespace deepep::ibgda
