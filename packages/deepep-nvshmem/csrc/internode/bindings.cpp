// The table of contents of the extension across nodes. Addresses and streams arrive as integers; nothing is decided here.
#include "bind_shared.hpp"
#include "internode/runtime.hpp"

using namespace deepep;
using namespace deepep::internode;
using namespace py::literals;

namespace {

py::int_ mask_of(const std::vector<uint32_t>& words) {
    py::object mask = py::int_(0);
    for (auto word = words.rbegin(); word != words.rend(); ++word) mask = (mask << py::int_(32)) | py::int_(*word);
    return mask;
}

void bind_records(py::module_& m) {
    py::class_<Counts>(m, "Counts")
        .def_readonly("num_recv_tokens", &Counts::num_recv_tokens)
        .def_readonly("num_forward_rows", &Counts::num_forward_rows)
        .def_readonly("num_recv_tokens_per_expert", &Counts::num_recv_tokens_per_expert)
        .def_property_readonly("headers", [](const Counts& counts) { return list_of_headers(counts.headers); })
        .def_property_readonly("mismatch_mask", [](const Counts& counts) { return mask_of(counts.mismatch_mask); })
        .def_property_readonly("bad_count_mask", [](const Counts& counts) { return mask_of(counts.bad_count_mask); });
    bind_error_record(m);
}

#if DEEPEP_NVSHMEM_TRACE
// Of the current device's last operation of that name: for each block number, begin_ns, end_ns, ended, moved, firsts, lasts.
void bind_traces(py::module_& m) {
    m.def("traces", [](const std::string& op) {
        std::vector<BlockTrace> traces(kMaxTracedBlocks);
        check_runtime(op == "dispatch" ? copy_dispatch_traces(traces.data()) : copy_combine_traces(traces.data()), "reading the trace");
        py::list blocks;
        for (const BlockTrace& trace : traces) {
            if (trace.end_ns == 0) continue;
            const auto list = [](const auto& values) { return std::vector<uint32_t>(std::begin(values), std::end(values)); };
            blocks.append(py::make_tuple(trace.number, trace.begin_ns, trace.end_ns, trace.ended, list(trace.moved), list(trace.firsts), list(trace.lasts), list(trace.spans)));
        }
        return blocks;
    });
}
#endif

void bind_runtime(py::module_& m) {
    py::class_<Runtime>(m, "Runtime")
        .def(py::init([](int rank, int num_ranks, int ranks_per_node, int device, std::vector<uint64_t> arena_ptrs, int64_t num_arena_bytes, uint64_t network_ptr,
                         int max_local_experts, int64_t num_ring_bytes, int64_t num_chunk_bytes) {
                 return std::make_unique<Runtime>(RuntimeConfig{{rank, num_ranks, ranks_per_node}, device, std::move(arena_ptrs), num_arena_bytes, network_ptr,
                                                                max_local_experts, num_ring_bytes, num_chunk_bytes});
             }),
             py::kw_only(), "rank"_a, "num_ranks"_a, "ranks_per_node"_a, "device"_a, "arena_ptrs"_a, "num_arena_bytes"_a, "network_ptr"_a, "max_local_experts"_a,
             "num_ring_bytes"_a, "num_chunk_bytes"_a = 0)
        .def_static("window_bytes", &Runtime::window_bytes, py::kw_only(), "ranks_per_node"_a)
        .def_static("network_bytes", &Runtime::network_bytes, py::kw_only(), "num_ranks"_a, "ranks_per_node"_a, "max_local_experts"_a, "num_ring_bytes"_a)
        .def_static("least_ring_bytes", &Runtime::least_ring_bytes, py::kw_only(), "num_row_bytes"_a, "num_scales"_a, "num_topk"_a, "ranks_per_node"_a)
        .def("is_symmetric", &Runtime::is_symmetric, "address"_a, "num_bytes"_a)
        .def("set_timeout_ns", &Runtime::set_timeout_ns, "timeout_ns"_a)
        .def("abort", &Runtime::abort)
        .def("clear_abort", &Runtime::clear_abort)
        .def("error", &Runtime::error)
        .def("clear_error", &Runtime::clear_error)
        .def("reset", [](Runtime& self, uint64_t stream) { self.reset(stream_of(stream)); }, py::kw_only(), "stream"_a,
             py::call_guard<py::gil_scoped_release>())
        .def("close", &Runtime::close)
        .def("layout",
             [](Runtime& self, uint64_t topk_idx, int topk_idx_bits, int64_t num_tokens, int num_topk, int num_experts, uint64_t num_tokens_per_rank,
                uint64_t num_tokens_per_node, uint64_t num_tokens_per_expert, uint64_t is_token_in_rank, uint64_t num_bad_indices, uint64_t stream) {
                 LayoutArgs args{};
                 args.topk_idx = {pointer<void>(topk_idx), topk_idx_bits};
                 args.num_tokens = num_tokens;
                 args.num_topk = num_topk;
                 args.num_experts = num_experts;
                 args.num_tokens_per_rank = pointer<int32_t>(num_tokens_per_rank);
                 args.num_tokens_per_node = pointer<int32_t>(num_tokens_per_node);
                 args.num_tokens_per_expert = pointer<int32_t>(num_tokens_per_expert);
                 args.is_token_in_rank = pointer<bool>(is_token_in_rank);
                 args.num_bad_indices = pointer<int32_t>(num_bad_indices);
                 self.layout(args, stream_of(stream));
             },
             py::kw_only(), "topk_idx"_a, "topk_idx_bits"_a, "num_tokens"_a, "num_topk"_a, "num_experts"_a, "num_tokens_per_rank"_a,
             "num_tokens_per_node"_a, "num_tokens_per_expert"_a, "is_token_in_rank"_a, "num_bad_indices"_a, "stream"_a)
        .def("notify",
             [](Runtime& self, const std::vector<uint32_t>& fields, int64_t num_tokens, int num_experts, int expert_alignment, uint64_t num_tokens_per_rank,
                uint64_t num_tokens_per_node, uint64_t num_tokens_per_expert, uint64_t is_token_in_rank, uint64_t rdma_channel_prefix, uint64_t gbl_channel_prefix,
                uint64_t recv_rdma_channel_prefix, uint64_t recv_rdma_rank_prefix, uint64_t recv_gbl_channel_prefix, uint64_t recv_gbl_rank_prefix,
                uint64_t send_rdma_head, uint64_t dst_rows, uint64_t tokens_to_node, uint64_t recv_tokens_per_expert, uint64_t num_bad_indices, uint32_t ticket,
                uint64_t stream) {
                 NotifyArgs args{};
                 fill_fields(args, fields);
                 args.num_tokens = num_tokens;
                 args.num_experts = num_experts;
                 args.expert_alignment = expert_alignment;
                 args.num_tokens_per_rank = pointer<int32_t>(num_tokens_per_rank);
                 args.num_tokens_per_node = pointer<int32_t>(num_tokens_per_node);
                 args.num_tokens_per_expert = pointer<int32_t>(num_tokens_per_expert);
                 args.num_bad_indices = pointer<int32_t>(num_bad_indices);
                 args.prefixes = {pointer<int32_t>(rdma_channel_prefix),   pointer<int32_t>(gbl_channel_prefix),      pointer<int32_t>(recv_rdma_channel_prefix),
                                  pointer<int32_t>(recv_rdma_rank_prefix), pointer<int32_t>(recv_gbl_channel_prefix), pointer<int32_t>(recv_gbl_rank_prefix)};
                 args.recv_tokens_per_expert = pointer<int32_t>(recv_tokens_per_expert);
                 args.ticket = ticket;
                 PlanArgs plan{};
                 plan.is_token_in_rank = pointer<bool>(is_token_in_rank);
                 plan.send_rdma_head = pointer<int32_t>(send_rdma_head);
                 plan.dst_rows = pointer<int32_t>(dst_rows);
                 plan.tokens_to_node = pointer<int32_t>(tokens_to_node);
                 self.notify(args, plan, stream_of(stream));
             },
             py::kw_only(), "fields"_a, "num_tokens"_a, "num_experts"_a, "expert_alignment"_a, "num_tokens_per_rank"_a, "num_tokens_per_node"_a,
             "num_tokens_per_expert"_a, "is_token_in_rank"_a, "rdma_channel_prefix"_a, "gbl_channel_prefix"_a, "recv_rdma_channel_prefix"_a,
             "recv_rdma_rank_prefix"_a, "recv_gbl_channel_prefix"_a, "recv_gbl_rank_prefix"_a, "send_rdma_head"_a, "dst_rows"_a, "tokens_to_node"_a,
             "recv_tokens_per_expert"_a, "num_bad_indices"_a, "ticket"_a, "stream"_a)
        .def("refuse",
             [](Runtime& self, const std::vector<uint32_t>& fields, int /*num_experts*/, uint32_t reason, uint32_t ticket, uint64_t stream) {
                 NotifyArgs args{};
                 fill_fields(args, fields);
                 args.reason = reason;
                 args.ticket = ticket;
                 self.refuse(args, stream_of(stream));
             },
             py::kw_only(), "fields"_a, "num_experts"_a, "reason"_a, "ticket"_a, "stream"_a)
        .def("wait_counts", &Runtime::wait_counts, "ticket"_a, "timeout_s"_a, py::call_guard<py::gil_scoped_release>())
        .def("dispatch",
             [](Runtime& self, uint64_t x, int64_t num_row_bytes, uint64_t scales, int num_scales, int64_t scales_stride_token, int64_t scales_stride_col,
                uint64_t topk_idx, int topk_idx_bits, uint64_t topk_weights, int64_t num_tokens, int num_topk, int num_experts, bool is_cached, uint64_t dst_rows,
                uint64_t tokens_to_node, uint64_t unlisted_rdma_head, uint64_t rdma_channel_prefix, uint64_t recv_rdma_rank_prefix, uint64_t recv_gbl_rank_prefix,
                uint64_t send_nvl_head, int64_t forward_capacity, uint64_t recv_x, uint64_t recv_scales, uint64_t recv_topk_idx, uint64_t recv_topk_weights,
                uint64_t recv_src_meta, int64_t capacity, bool fill_unused, int num_sms, uint64_t stream, bool use_bulk, int num_warps, int num_stages,
                int num_send_warps, std::optional<int> num_team_senders, bool may_send_directly, uint32_t ticket, int64_t least_rows, double timeout_s) {
                 DispatchArgs args{};
                 args.message.num_row_bytes = num_row_bytes;
                 args.message.num_scales = num_scales;
                 args.message.num_topk = num_topk;
                 args.message.is_cached = is_cached;
                 args.x = pointer<uint8_t>(x);
                 args.scales = pointer<uint32_t>(scales);
                 args.scales_stride_token = scales_stride_token;
                 args.scales_stride_col = scales_stride_col;
                 args.topk_idx = {pointer<void>(topk_idx), topk_idx_bits};
                 args.topk_weights = pointer<float>(topk_weights);
                 args.num_tokens = num_tokens;
                 args.num_experts = num_experts;
                 args.dst_rows = pointer<int32_t>(dst_rows);
                 args.tokens_to_node = pointer<int32_t>(tokens_to_node);
                 args.rdma_channel_prefix = pointer<int32_t>(rdma_channel_prefix);
                 args.recv_rdma_rank_prefix = pointer<int32_t>(recv_rdma_rank_prefix);
                 args.recv_gbl_rank_prefix = pointer<int32_t>(recv_gbl_rank_prefix);
                 args.send_nvl_head = pointer<int32_t>(send_nvl_head);
                 args.num_forward_capacity = forward_capacity;
                 args.recv_x = pointer<uint8_t>(recv_x);
                 args.recv_scales = pointer<uint32_t>(recv_scales);
                 args.recv_topk_idx = pointer<int64_t>(recv_topk_idx);
                 args.recv_topk_weights = pointer<float>(recv_topk_weights);
                 args.recv_src_meta = pointer<int32_t>(recv_src_meta);
                 args.capacity = capacity;
                 args.fill_unused = fill_unused;
                 const Tuning tuning{num_sms, use_bulk, num_warps, num_stages, num_send_warps, num_team_senders, may_send_directly};
                 std::optional<py::gil_scoped_release> unlocked;
                 if (ticket != 0) unlocked.emplace();
                 return self.dispatch(args, pointer<int32_t>(unlisted_rdma_head), tuning, {ticket, least_rows, timeout_s}, stream_of(stream));
             },
             py::kw_only(), "x"_a, "num_row_bytes"_a, "scales"_a, "num_scales"_a, "scales_stride_token"_a, "scales_stride_col"_a, "topk_idx"_a, "topk_idx_bits"_a,
             "topk_weights"_a, "num_tokens"_a, "num_topk"_a, "num_experts"_a, "is_cached"_a, "dst_rows"_a, "tokens_to_node"_a, "unlisted_rdma_head"_a,
             "rdma_channel_prefix"_a, "recv_rdma_rank_prefix"_a, "recv_gbl_rank_prefix"_a, "send_nvl_head"_a, "forward_capacity"_a, "recv_x"_a, "recv_scales"_a,
             "recv_topk_idx"_a, "recv_topk_weights"_a, "recv_src_meta"_a, "capacity"_a, "fill_unused"_a, "num_sms"_a, "stream"_a, "use_bulk"_a = true,
             "num_warps"_a = 0, "num_stages"_a = 0, "num_send_warps"_a = 0, "num_team_senders"_a = py::none(), "may_send_directly"_a = true, "ticket"_a = 0, "least_rows"_a = 0, "timeout_s"_a = 0.0)
        .def("combine",
             [](Runtime& self, uint64_t x, int64_t num_recv_tokens, int64_t num_row_bytes, uint64_t topk_weights, int num_topk, uint64_t bias_0, uint64_t bias_1,
                uint64_t recv_rdma_rank_prefix, uint64_t send_rdma_head, uint64_t send_nvl_head, int64_t num_forward_rows, int64_t num_tokens, uint64_t out,
                uint64_t out_topk_weights, int num_sms, uint64_t stream, int num_warps, int num_stages, int num_source_warps, int num_source_stages,
                std::optional<bool> has_teams, bool may_send_directly) {
                 CombineArgs args{};
                 args.x = pointer<uint8_t>(x);
                 args.topk_weights = pointer<float>(topk_weights);
                 args.num_recv_tokens = num_recv_tokens;
                 args.recv_rdma_rank_prefix = pointer<int32_t>(recv_rdma_rank_prefix);
                 args.send_nvl_head = pointer<int32_t>(send_nvl_head);
                 args.num_forward_rows = num_forward_rows;
                 args.bias_0 = pointer<uint8_t>(bias_0);
                 args.bias_1 = pointer<uint8_t>(bias_1);
                 args.send_rdma_head = pointer<int32_t>(send_rdma_head);
                 args.num_tokens = num_tokens;
                 args.num_topk = num_topk;
                 args.out = pointer<uint8_t>(out);
                 args.out_topk_weights = pointer<float>(out_topk_weights);
                 const CombineTuning tuning{num_sms, num_warps, num_stages, num_source_warps, num_source_stages, has_teams, may_send_directly};
                 self.combine(args, num_row_bytes, tuning, stream_of(stream));
             },
             py::kw_only(), "x"_a, "num_recv_tokens"_a, "num_row_bytes"_a, "topk_weights"_a, "num_topk"_a, "bias_0"_a, "bias_1"_a, "recv_rdma_rank_prefix"_a,
             "send_rdma_head"_a, "send_nvl_head"_a, "num_forward_rows"_a, "num_tokens"_a, "out"_a, "out_topk_weights"_a, "num_sms"_a, "stream"_a, "num_warps"_a = 0,
             "num_stages"_a = 0, "num_source_warps"_a = 0, "num_source_stages"_a = 0, "has_teams"_a = py::none(), "may_send_directly"_a = true);
}

}  // namespace

PYBIND11_MODULE(_nvshmem, m) {
    m.doc() = "Native side of the backend nvshmem; csrc/README.md describes every call.";
    bind_exceptions(m);
    m.attr("MAX_NODE_RANKS") = kMaxNodeRanks;
    m.attr("MAX_TOPK") = kMaxTopk;
    m.attr("NUM_HEADER_FIELDS") = kNumHeaderFields;
    m.def("is_sm90_compiled", &nvlink::is_sm90_compiled);
    m.def("architectures", [] { return std::vector<int>{DEEPEP_ARCHITECTURES}; });
    m.def("network_attach", &attach_network, py::kw_only(), "device"_a);
    m.def("network_quiet", &quiet_network, py::call_guard<py::gil_scoped_release>());
#if DEEPEP_COUNT_PUTS
    m.def("put_counts", [] {
        PutCounts counts{};
        check_runtime(read_put_counts(counts), "reading the counts of puts");
        return py::make_tuple(counts.num_puts, counts.num_bytes, counts.num_words);
    });
#endif
#if DEEPEP_NVSHMEM_TRACE
    bind_traces(m);
#endif
    bind_records(m);
    bind_runtime(m);
}
