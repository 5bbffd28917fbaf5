#include "internode/runtime.hpp"

#include <dlfcn.h>

#include <limits>

namespace deepep::internode {
namespace {

std::string text(int64_t number) { return std::to_string(number); }

void require_rows(const char* op, int64_t num_row_bytes, int64_t num_tokens, int num_topk) {
    const std::string where = std::string(op) + ": ";
    require(num_row_bytes > 0 && num_row_bytes % 16 == 0 && num_row_bytes < std::numeric_limits<int32_t>::max(),
            where + "a row has " + text(num_row_bytes) + " bytes; accepted are positive multiples of 16 below 2 GiB.");
    require(num_tokens >= 0 && num_tokens <= kMaxTokens, where + "num_tokens is " + text(num_tokens) + "; accepted are 0 to " + text(kMaxTokens) + ".");
    require(num_topk >= 0 && num_topk <= kMaxTopk, where + "num_topk is " + text(num_topk) + "; accepted are 0 to " + text(kMaxTopk) + ".");
}

void require_group(int num_ranks, int ranks_per_node) {
    require(ranks_per_node >= 1 && ranks_per_node <= kMaxNodeRanks,
            "ranks_per_node is " + text(ranks_per_node) + "; accepted are 1 to " + text(kMaxNodeRanks) + ".");
    require(num_ranks % ranks_per_node == 0 && num_ranks >= 2 * ranks_per_node && num_ranks <= (1 << 20),
            "num_ranks is " + text(num_ranks) + "; it must be a multiple of the " + text(ranks_per_node) + " ranks per node, and there must be several nodes.");
}

// Looked up by name, so that the extension loads without the library.
template <class Function>
Function host_library_function(const char* name) {
    void* address = dlsym(RTLD_DEFAULT, name);
    if (address == nullptr)
        throw NativeError(std::string("NVSHMEM's host library, which has ") + name + ", is not in this process; load libnvshmem_host.so.3 with RTLD_GLOBAL first.");
    return reinterpret_cast<Function>(address);
}

uint64_t nodes_stored_to(const Group& group, const void* network) {
    const auto pointer_at = host_library_function<void* (*)(const void*, int)>("nvshmem_ptr");
    uint64_t nodes = 0;
    for (int node = 0; node < min_of(group.num_nodes(), 64); ++node)
        if (node != group.node() && pointer_at(network, group.peer_of(node)) != nullptr) nodes |= 1ull << node;
    return nodes;
}

}  // namespace

int64_t Runtime::window_bytes(int ranks_per_node) {
    require(ranks_per_node >= 1 && ranks_per_node <= kMaxNodeRanks,
            "ranks_per_node is " + text(ranks_per_node) + "; accepted are 1 to " + text(kMaxNodeRanks) + ".");
    return NormalWindow::of(ranks_per_node, 1, 0).num_bytes();
}

int64_t Runtime::network_bytes(int num_ranks, int ranks_per_node, int max_local_experts, int64_t num_ring_bytes) {
    require_group(num_ranks, ranks_per_node);
    require(max_local_experts >= 1 && max_local_experts <= (1 << 20), "max_local_experts is " + text(max_local_experts) + "; accepted are 1 to " + text(1 << 20) + ".");
    require(num_ring_bytes >= 4096 && num_ring_bytes <= (1ll << 40), "num_ring_bytes is " + text(num_ring_bytes) + "; accepted are 4096 to 2^40.");
    return NetworkWindow::of(num_ranks, num_ranks / ranks_per_node, max_local_experts, num_ring_bytes).num_bytes();
}

int64_t Runtime::least_ring_bytes(int64_t num_row_bytes, int num_scales, int num_topk, int ranks_per_node) {
    const int64_t dispatched = DispatchMessage{num_row_bytes, num_scales, num_topk, ranks_per_node, false}.num_bytes();
    return 2 * max_of(dispatched, CombineMessage{num_row_bytes, num_topk}.num_bytes());
}

Runtime::Runtime(const RuntimeConfig& config) : config_(config) {
    const Group& group = config.group;
    const int64_t num_window_bytes = window_bytes(group.ranks_per_node);
    static_cast<void>(network_bytes(group.num_ranks, group.ranks_per_node, config.max_local_experts, config.num_ring_bytes));  // checks them
    require(group.rank >= 0 && group.rank < group.num_ranks, "rank is " + text(group.rank) + " of " + text(group.num_ranks) + ".");
    require(static_cast<int>(config.arena_ptrs.size()) == group.ranks_per_node,
            "arena_ptrs has " + text(static_cast<int64_t>(config.arena_ptrs.size())) + " entries for the " + text(group.ranks_per_node) + " ranks of a node.");
    require(config.num_arena_bytes >= num_window_bytes,
            "an arena of " + text(config.num_arena_bytes) + " bytes cannot hold the window of " + text(num_window_bytes) + " bytes.");
    require(config.network_ptr != 0 && config.network_ptr % NetworkWindow::kAlignment == 0, "network_ptr is not aligned to 128 bytes.");
    require(config.num_chunk_bytes >= 0, "num_chunk_bytes is " + text(config.num_chunk_bytes) + "; accepted are 0 and more.");
    const DeviceGuard guard(config.device);
    int major = 0, num_shared_bytes = 0;
    check_runtime(cudaDeviceGetAttribute(&major, cudaDevAttrComputeCapabilityMajor, config.device), "asking for the compute capability");
    check_runtime(cudaDeviceGetAttribute(&num_device_sms_, cudaDevAttrMultiProcessorCount, config.device), "asking for the SM count");
    check_runtime(cudaDeviceGetAttribute(&num_shared_bytes, cudaDevAttrMaxSharedMemoryPerBlockOptin, config.device), "asking for the shared memory size");
    has_bulk_ = major >= 9 && num_shared_bytes >= nvlink::kMaxSharedBytes && nvlink::is_sm90_compiled();
    num_shared_bytes_ = static_cast<int>(min_of(num_shared_bytes, nvlink::kMaxSharedBytes));

    nvlink::Domain& local = domain_.local;
    local.rank = group.local_rank();
    local.num_ranks = group.ranks_per_node;
    for (int rank = 0; rank < group.ranks_per_node; ++rank) {
        require(config.arena_ptrs[rank] != 0 && config.arena_ptrs[rank] % 256 == 0, "the arena of local rank " + text(rank) + " is not aligned to 256 bytes.");
        local.arenas[rank] = reinterpret_cast<uint8_t*>(config.arena_ptrs[rank]);
    }
    local.num_arena_bytes = config.num_arena_bytes;
    local.window = NormalWindow::of(group.ranks_per_node, 1, 0);
    domain_.group = group;
    domain_.network = reinterpret_cast<uint8_t*>(config.network_ptr);
    domain_.window = NetworkWindow::of(group.num_ranks, group.num_nodes(), config.max_local_experts, config.num_ring_bytes);
    domain_.num_chunk_bytes = config.num_chunk_bytes > 0 ? config.num_chunk_bytes : kUsualChunkBytes;
    domain_.nodes_stored_to = nodes_stored_to(group, domain_.network);

    // Kernels are loaded now: lazy loading later could wait for a kernel that waits for us.
    check_runtime(prepare_layout(), "loading the layout kernel");
    check_runtime(prepare_counts(), "loading the counts kernel");
    check_runtime(prepare_plan(), "loading the plan kernel");
    check_runtime(prepare_dispatch(has_bulk_), "loading the dispatch kernel");
    check_runtime(prepare_combine(num_shared_bytes_), "loading the combine kernel");
    // Again, because NVSHMEM's memory may have grown since.
    const int status = attach_network(config.device);
    if (status != 0) throw NativeError("NVSHMEM did not accept the kernels of this extension (nvshmemx_cumodule_init answered " + text(status) + ").");

    const int64_t num_header_bytes = 4ll * group.num_ranks * kNumHeaderWords, num_mask_bytes = 4 * 2 * ceil_div(group.num_ranks, 32);
    page_.open(static_cast<int64_t>(sizeof(CountsSummary)) + num_header_bytes + num_mask_bytes + 4ll * config.max_local_experts);
    local.host = page_.control();
    domain_.host_counts = reinterpret_cast<CountsSummary*>(page_.more());
    domain_.host_headers = reinterpret_cast<uint32_t*>(domain_.host_counts + 1);
    domain_.host_masks = domain_.host_headers + num_header_bytes / 4;
    domain_.host_experts = reinterpret_cast<int32_t*>(domain_.host_masks + num_mask_bytes / 4);

    const int64_t num_counts = static_cast<int64_t>(group.num_ranks) * config.max_local_experts + group.num_ranks + group.num_nodes();
    const int64_t num_contexts = (group.num_nodes() - 1) * static_cast<int64_t>(kMaxSlots);
    num_private_bytes_ = static_cast<int64_t>(sizeof(PrivateState)) + 8 * (num_contexts + 2 * num_device_sms_) + 4 * num_counts;
    check_runtime(cudaMalloc(&private_memory_, static_cast<size_t>(num_private_bytes_)), "allocating this rank's counters");
    domain_.state = static_cast<PrivateState*>(private_memory_);
    domain_.next_chunks = reinterpret_cast<unsigned long long*>(domain_.state + 1);
    domain_.deliverers_begun = reinterpret_cast<uint64_t*>(domain_.next_chunks + num_contexts);
    domain_.collected = reinterpret_cast<unsigned long long*>(domain_.deliverers_begun + num_device_sms_);
    domain_.histogram = reinterpret_cast<int32_t*>(domain_.collected + num_device_sms_);
    try {
        clear_memory(nullptr);
    } catch (...) {
        close();
        throw;
    }
}

void Runtime::close() noexcept {
    if (private_memory_ != nullptr) {
        try {
            const DeviceGuard guard(config_.device);
            static_cast<void>(cudaFree(private_memory_));
        } catch (const NativeError&) {  // no device any more, so no memory either
        }
    }
    private_memory_ = nullptr;
    page_.close();
}

int attach_network(int device) {
    const auto attach = host_library_function<int (*)(CUmodule)>("nvshmemx_cumodule_init");
    const DeviceGuard guard(device);
    cudaFunction_t kernel = nullptr;
    check_runtime(cudaGetFuncBySymbol(&kernel, kernel_on_network()), "looking up a kernel");
    decltype(&::cuFuncGetModule) get_module = nullptr;
    DriverApi::find("cuFuncGetModule", get_module);
    CUmodule module = nullptr;
    DriverApi::get().check(get_module(&module, reinterpret_cast<CUfunction>(kernel)), "looking up the kernels' module");
    return attach(module);
}

void quiet_network() { host_library_function<void (*)()>("nvshmem_quiet")(); }

void Runtime::clear_memory(cudaStream_t stream) const {
    check_runtime(cudaMemsetAsync(domain_.local.arenas[domain_.local.rank], 0, static_cast<size_t>(domain_.local.window.num_signal_bytes()), stream), "clearing the window");
    check_runtime(cudaMemsetAsync(domain_.network, 0, static_cast<size_t>(domain_.window.num_signal_bytes()), stream), "clearing the network's words");
    check_runtime(cudaMemsetAsync(private_memory_, 0, static_cast<size_t>(num_private_bytes_), stream), "clearing this rank's counters");
    check_runtime(cudaStreamSynchronize(stream), "clearing this rank's memory");
}

bool Runtime::is_symmetric(uint64_t address, int64_t num_bytes) const {
    const uint64_t base = reinterpret_cast<uint64_t>(domain_.local.arenas[domain_.local.rank]);
    return address >= base && extent_fits(static_cast<int64_t>(address - base), num_bytes, 1, domain_.local.window.num_bytes(), domain_.local.num_arena_bytes);
}

std::optional<ErrorRecord> Runtime::error() const {
    std::optional<ErrorRecord> record = page_.error();
    if (!record) return record;
    // The waits of the node's handshakes count its ranks from 0.
    const Phase phase = static_cast<Phase>(record->phase);
    if (phase == Phase::kReady || phase == Phase::kDone || phase == Phase::kReadDone) record->peer += config_.group.node() * config_.group.ranks_per_node;
    return record;
}

void Runtime::reset(cudaStream_t stream) {
    page_.require_open();
    const DeviceGuard guard(config_.device);
    clear_memory(stream);
    clear_error();
    clear_abort();
}

void Runtime::require_experts(int num_experts) const {
    const int num_ranks = config_.group.num_ranks;
    require(num_experts > 0 && num_experts % num_ranks == 0,
            "num_experts is " + text(num_experts) + "; it must be a positive multiple of the " + text(num_ranks) + " ranks.");
    require(num_experts / num_ranks <= config_.max_local_experts, "num_experts is " + text(num_experts) + ", so each rank holds " + text(num_experts / num_ranks) +
                                                                     "; this buffer was built for at most " + text(config_.max_local_experts) + " per rank.");
}

void Runtime::require_sms(const char* op, int num_sms) const {
    require(num_sms >= 1 && num_sms <= num_device_sms_,
            std::string(op) + ": num_sms is " + text(num_sms) + "; this device takes 1 to " + text(num_device_sms_) + ".");
}

ChunkGeometry Runtime::geometry_of(const char* op, int64_t num_message_bytes, bool is_combine) const {
    const ChunkGeometry geometry = ChunkGeometry::of(domain_.window.num_ring_bytes, num_message_bytes, domain_.num_chunk_bytes,
                                                     ChunkGeometry::most_slots(is_combine, domain_.group.num_nodes()));
    require(geometry.is_usable(), std::string(op) + ": a message of this row size has " + text(num_message_bytes) + " bytes; a ring holds " +
                                      text(domain_.window.num_ring_bytes) + ", and two messages have to fit.");
    return geometry;
}

void Runtime::layout(LayoutArgs args, cudaStream_t stream) {
    page_.require_open();
    require_rows("layout", 16, args.num_tokens, args.num_topk);
    require_experts(args.num_experts);
    args.domain = domain_;
    const DeviceGuard guard(config_.device);
    check_runtime(launch_layout(args, stream), "launching layout");
}

void Runtime::notify(NotifyArgs args, PlanArgs plan, cudaStream_t stream) {
    page_.require_open();
    require_rows("notify", 16, args.num_tokens, 0);
    require(args.expert_alignment >= 1, "notify: expert_alignment is " + text(args.expert_alignment) + "; accepted are 1 and more.");
    require_experts(args.num_experts);
    args.status = kStatusValid;
    args.domain = plan.domain = domain_;
    plan.num_tokens = args.num_tokens;
    const DeviceGuard guard(config_.device);
    check_runtime(launch_counts(args, stream), "launching the exchange of counts");
    check_runtime(launch_plan(plan, stream), "launching plan");
    num_dispatch_experts_ = args.num_experts;
}

void Runtime::refuse(NotifyArgs args, cudaStream_t stream) {
    page_.require_open();
    args.status = kStatusInvalid;
    args.num_experts = 0;  // a refused call may carry any number; peers see the status first
    args.expert_alignment = 1;
    args.domain = domain_;
    const DeviceGuard guard(config_.device);
    check_runtime(launch_counts(args, stream), "launching the exchange of counts");
    num_dispatch_experts_ = 0;
}

bool Runtime::rows_fit(const AwaitedCounts& awaited, int64_t capacity, int64_t num_forward_capacity) const {
    const CountsSummary& summary = *domain_.host_counts;
    if (!wait_for_ticket(summary.ticket, awaited.ticket, awaited.timeout_s)) return false;
    return summary.is_good && !page_.error() && summary.num_recv_tokens >= awaited.least_rows && summary.num_recv_tokens <= capacity &&
           summary.num_forward_rows <= num_forward_capacity;
}

std::optional<Counts> Runtime::wait_counts(uint32_t ticket, double timeout_s) const {
    page_.require_open();
    require(ticket != 0, "wait_counts: ticket 0 stands for no publication; use another number.");
    const CountsSummary& summary = *domain_.host_counts;
    if (!wait_for_ticket(summary.ticket, ticket, timeout_s)) return std::nullopt;
    const int num_ranks = config_.group.num_ranks;
    const int64_t num_mask_words = ceil_div(num_ranks, 32);
    Counts counts;
    counts.num_recv_tokens = summary.num_recv_tokens;
    counts.num_forward_rows = summary.num_forward_rows;
    counts.num_recv_tokens_per_expert.assign(domain_.host_experts, domain_.host_experts + num_dispatch_experts_ / num_ranks);
    for (int rank = 0; rank < num_ranks; ++rank)
        counts.headers.emplace_back(domain_.host_headers + rank * kNumHeaderWords, domain_.host_headers + (rank + 1) * kNumHeaderWords);
    counts.mismatch_mask.assign(domain_.host_masks, domain_.host_masks + num_mask_words);
    counts.bad_count_mask.assign(domain_.host_masks + num_mask_words, domain_.host_masks + 2 * num_mask_words);
    return counts;
}

bool Runtime::dispatch(DispatchArgs args, const int32_t* unlisted_rdma_head, const Tuning& tuning, const AwaitedCounts& awaited, cudaStream_t stream) {
    page_.require_open();
    DispatchMessage& message = args.message;
    require_rows("dispatch", message.num_row_bytes, args.num_tokens, message.num_topk);
    require_sms("dispatch", tuning.num_sms);
    require(args.capacity >= 0 && args.capacity <= std::numeric_limits<int32_t>::max(),
            "dispatch: capacity is " + text(args.capacity) + " rows; accepted are 0 to 2^31 - 1.");
    require(args.num_forward_capacity >= 0 && args.num_forward_capacity <= kMaxForwardRows,
            "dispatch: forward_capacity is " + text(args.num_forward_capacity) + " rows; accepted are 0 to " + text(kMaxForwardRows) + ".");
    require(message.num_scales >= 0, "dispatch: num_scales is " + text(message.num_scales) + ".");
    if (message.num_topk > 0) require_experts(args.num_experts);
    message.num_heads = config_.group.ranks_per_node;
    const auto require_symmetric = [&](const void* pointer, int64_t num_unit_bytes, const char* name) {
        const bool is_used = args.capacity > 0 && num_unit_bytes > 0;
        require(is_aligned(pointer, 16) && (!is_used || is_symmetric(reinterpret_cast<uint64_t>(pointer), args.capacity * num_unit_bytes)),
                std::string("dispatch: ") + name + " must lie in the arena, aligned to 16 bytes.");
    };
    require(is_aligned(args.x, 16), "dispatch: x must be aligned to 16 bytes.");
    require(args.topk_weights != nullptr || message.num_topk == 0 || args.num_tokens == 0, "dispatch: topk_idx and topk_weights go together.");
    require_symmetric(args.recv_x, message.num_row_bytes, "recv_x");
    require_symmetric(args.recv_scales, 4ll * message.num_scales, "recv_scales");
    require_symmetric(args.recv_topk_idx, 8ll * message.num_topk, "recv_topk_idx");
    require_symmetric(args.recv_topk_weights, 4ll * message.num_topk, "recv_topk_weights");
    require_symmetric(args.recv_src_meta, message.is_cached ? 0 : 8, "recv_src_meta");
    args.domain = domain_;
    args.geometry = geometry_of("dispatch", message.num_bytes(), false);
    shape_dispatch(args, tuning, has_bulk_);
    const DeviceGuard guard(config_.device);
    if (unlisted_rdma_head != nullptr) {
        PlanArgs plan{};
        plan.domain = domain_;
        plan.num_tokens = args.num_tokens;
        plan.send_rdma_head = const_cast<int32_t*>(unlisted_rdma_head);  // only read
        plan.tokens_to_node = const_cast<int32_t*>(args.tokens_to_node);
        check_runtime(launch_plan(plan, stream), "launching plan");
    }
    // Everything is ready: the GPU idles from the counts to the launch.
    if (awaited.ticket != 0 && !rows_fit(awaited, args.capacity, args.num_forward_capacity)) return false;
    check_runtime(launch_dispatch(args, tuning.num_sms, stream), "launching dispatch");
    return true;
}

void Runtime::combine(CombineArgs args, int64_t num_row_bytes, const CombineTuning& tuning, cudaStream_t stream) {
    page_.require_open();
    require_rows("combine", num_row_bytes, args.num_tokens, args.num_topk);
    require_sms("combine", tuning.num_sms);
    require(args.num_recv_tokens >= 0 && args.num_recv_tokens <= std::numeric_limits<int32_t>::max(),
            "combine: num_recv_tokens is " + text(args.num_recv_tokens) + ".");
    require(args.num_forward_rows >= 0 && args.num_forward_rows <= kMaxForwardRows, "combine: num_forward_rows is " + text(args.num_forward_rows) + ".");
    const auto require_symmetric = [&](const void* pointer, int64_t num_unit_bytes, const char* name) {
        const bool is_used = args.num_recv_tokens > 0 && num_unit_bytes > 0;
        require(is_aligned(pointer, 16) && (!is_used || is_symmetric(reinterpret_cast<uint64_t>(pointer), args.num_recv_tokens * num_unit_bytes)),
                std::string("combine: ") + name + " must lie in the arena, aligned to 16 bytes.");
    };
    require_symmetric(args.x, num_row_bytes, "x");
    require_symmetric(args.topk_weights, 4ll * args.num_topk, "topk_weights");
    require(is_aligned(args.out, 16) && is_aligned(args.bias_0, 16) && is_aligned(args.bias_1, 16), "combine: out and the biases must be aligned to 16 bytes.");
    args.domain = domain_;
    args.message = {num_row_bytes, args.num_topk};
    args.geometry = geometry_of("combine", args.message.num_bytes(), true);
    shape_combine(args, tuning, num_shared_bytes_, has_bulk_);
    const DeviceGuard guard(config_.device);
    check_runtime(launch_combine(args, tuning.num_sms, stream), "launching combine");
}

}  // namespace deepep::internode
