// The extension's table of contents. Addresses and streams arrive as integers; nothing is decided here.
#include "arena.hpp"
#include "bind_shared.hpp"
#include "deepep/memory/symmetric.hpp"
#include "runtime.hpp"

using namespace deepep;
using namespace deepep::nvlink;
using namespace py::literals;

namespace {

void bind_memory(py::module_& m) {
    py::class_<Arena>(m, "Arena", py::module_local())
        .def(py::init<int, uint64_t>(), py::kw_only(), "device"_a, "num_reserved_bytes"_a)
        .def_property_readonly("base", &Arena::base)
        .def_property_readonly("num_bytes", &Arena::num_bytes)
        .def_property_readonly("granularity", &Arena::granularity)
        .def("grow", &Arena::grow, "num_bytes"_a)
        .def("export_fd", &Arena::export_fd, "segment"_a)
        .def("segment_bytes", &Arena::segment_bytes, "segment"_a)
        .def("close", &Arena::close);
    py::class_<PeerArena>(m, "PeerArena", py::module_local())
        .def(py::init<int, uint64_t>(), py::kw_only(), "device"_a, "num_reserved_bytes"_a)
        .def_property_readonly("base", &PeerArena::base)
        .def_property_readonly("num_bytes", &PeerArena::num_bytes)
        .def("map", &PeerArena::map_fd, "fd"_a, "num_bytes"_a)
        .def("close", &PeerArena::close);
    py::class_<Heap, std::shared_ptr<Heap>>(m, "Heap", py::module_local())
        .def(py::init(&make_heap), py::kw_only(), "base"_a, "num_bytes"_a, "granule"_a = 2 << 20)
        .def("allocate", &Heap::allocate, "num_bytes"_a)
        .def("free", &Heap::free, "address"_a)
        .def("extend", &Heap::extend, "num_bytes"_a)
        .def_property_readonly("base", &Heap::base)
        .def_property_readonly("num_bytes", &Heap::num_bytes)
        .def_property_readonly("num_free_bytes", &Heap::num_free_bytes)
        .def_property_readonly("num_largest_free_bytes", &Heap::num_largest_free_bytes);
    m.def("set_current_heap", &set_current_heap, "heap"_a.none(true));
}

void bind_records(py::module_& m) {
    py::class_<Counts>(m, "Counts")
        .def_readonly("num_recv_tokens", &Counts::num_recv_tokens)
        .def_readonly("num_recv_tokens_per_expert", &Counts::num_recv_tokens_per_expert)
        .def_property_readonly("headers", [](const Counts& counts) { return list_of_headers(counts.headers); })
        .def_readonly("mismatch_mask", &Counts::mismatch_mask)
        .def_readonly("bad_count_mask", &Counts::bad_count_mask);
    bind_error_record(m);
}

void bind_runtime(py::module_& m) {
    py::class_<Runtime>(m, "Runtime")
        .def(py::init([](int rank, int num_ranks, int device, std::vector<uint64_t> arena_ptrs, int64_t num_arena_bytes, int max_local_experts,
                         int64_t num_staging_bytes) {
                 return std::make_unique<Runtime>(
                     RuntimeConfig{rank, num_ranks, device, std::move(arena_ptrs), num_arena_bytes, max_local_experts, num_staging_bytes});
             }),
             py::kw_only(), "rank"_a, "num_ranks"_a, "device"_a, "arena_ptrs"_a, "num_arena_bytes"_a, "max_local_experts"_a, "num_staging_bytes"_a)
        .def_static("window_bytes", &Runtime::window_bytes, py::kw_only(), "num_ranks"_a, "max_local_experts"_a, "num_staging_bytes"_a)
        .def("set_arena_bytes", &Runtime::set_arena_bytes, "num_bytes"_a)
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
                uint64_t num_tokens_per_expert, uint64_t is_token_in_rank, uint64_t num_bad_indices, uint64_t stream) {
                 LayoutArgs args{};
                 args.topk_idx = {pointer<void>(topk_idx), topk_idx_bits};
                 args.num_tokens = num_tokens;
                 args.num_topk = num_topk;
                 args.num_experts = num_experts;
                 args.num_tokens_per_rank = pointer<int32_t>(num_tokens_per_rank);
                 args.num_tokens_per_expert = pointer<int32_t>(num_tokens_per_expert);
                 args.is_token_in_rank = pointer<bool>(is_token_in_rank);
                 args.num_bad_indices = pointer<int32_t>(num_bad_indices);
                 self.layout(args, stream_of(stream));
             },
             py::kw_only(), "topk_idx"_a, "topk_idx_bits"_a, "num_tokens"_a, "num_topk"_a, "num_experts"_a, "num_tokens_per_rank"_a,
             "num_tokens_per_expert"_a, "is_token_in_rank"_a, "num_bad_indices"_a, "stream"_a)
        .def("notify",
             [](Runtime& self, const std::vector<uint32_t>& fields, int64_t num_tokens, int num_experts, int expert_alignment,
                uint64_t num_tokens_per_rank, uint64_t num_tokens_per_expert, uint64_t is_token_in_rank, uint64_t rank_prefix, uint64_t send_head,
                uint64_t recv_tokens_per_expert, uint64_t num_bad_indices, uint32_t ticket, uint64_t stream, uint64_t first_rows) {
                 NotifyArgs args{};
                 args.status = kStatusValid;
                 fill_fields(args, fields);
                 args.num_tokens = num_tokens;
                 args.num_experts = num_experts;
                 args.expert_alignment = expert_alignment;
                 args.num_tokens_per_rank = pointer<int32_t>(num_tokens_per_rank);
                 args.num_tokens_per_expert = pointer<int32_t>(num_tokens_per_expert);
                 args.is_token_in_rank = pointer<bool>(is_token_in_rank);
                 args.rank_prefix = pointer<int32_t>(rank_prefix);
                 args.first_rows = pointer<int32_t>(first_rows);
                 args.send_head = pointer<int32_t>(send_head);
                 args.recv_tokens_per_expert = pointer<int32_t>(recv_tokens_per_expert);
                 args.num_bad_indices = pointer<int32_t>(num_bad_indices);
                 args.ticket = ticket;
                 self.notify(args, stream_of(stream));
             },
             py::kw_only(), "fields"_a, "num_tokens"_a, "num_experts"_a, "expert_alignment"_a, "num_tokens_per_rank"_a, "num_tokens_per_expert"_a,
             "is_token_in_rank"_a, "rank_prefix"_a, "send_head"_a, "recv_tokens_per_expert"_a, "num_bad_indices"_a, "ticket"_a, "stream"_a,
             "first_rows"_a = 0)
        .def("refuse",
             [](Runtime& self, const std::vector<uint32_t>& fields, int num_experts, uint32_t reason, uint32_t ticket, uint64_t stream) {
                 NotifyArgs args{};
                 args.status = kStatusInvalid;
                 args.reason = reason;
                 fill_fields(args, fields);
                 args.num_experts = num_experts;
                 args.expert_alignment = 1;
                 args.ticket = ticket;
                 self.notify(args, stream_of(stream));
             },
             py::kw_only(), "fields"_a, "num_experts"_a, "reason"_a, "ticket"_a, "stream"_a)
        .def("wait_counts", &Runtime::wait_counts, "ticket"_a, "timeout_s"_a, py::call_guard<py::gil_scoped_release>())
        .def("dispatch",
             [](Runtime& self, uint64_t x, int64_t num_row_bytes, uint64_t scales, int num_scales, int64_t scales_stride_token, int64_t scales_stride_col,
                uint64_t topk_idx, int topk_idx_bits, uint64_t topk_weights, int64_t num_tokens, int num_topk, int num_experts, uint64_t rank_prefix,
                uint64_t send_head, std::optional<bool> has_src_idx, uint64_t recv_x, uint64_t recv_scales, uint64_t recv_topk_idx, uint64_t recv_topk_weights,
                uint64_t recv_src_idx, int64_t capacity, bool fill_unused, int num_sms, uint64_t stream, bool use_bulk, int num_warps, int num_stages,
                int num_side_warps, uint32_t ticket, int64_t least_rows, double timeout_s) -> const char* {
                 DispatchArgs args{};
                 args.x = pointer<uint8_t>(x);
                 args.scales = pointer<uint32_t>(scales);
                 args.num_scales = num_scales;
                 args.scales_stride_token = scales_stride_token;
                 args.scales_stride_col = scales_stride_col;
                 args.topk_idx = {pointer<void>(topk_idx), topk_idx_bits};
                 args.topk_weights = pointer<float>(topk_weights);
                 args.num_tokens = num_tokens;
                 args.num_topk = num_topk;
                 args.has_src_idx = has_src_idx.value_or(recv_src_idx != 0 || num_topk > 0);
                 args.rank_prefix = pointer<int32_t>(rank_prefix);
                 args.send_head = pointer<int32_t>(send_head);
                 args.recv_x = pointer<uint8_t>(recv_x);
                 args.recv_scales = pointer<uint32_t>(recv_scales);
                 args.recv_topk_idx = pointer<int64_t>(recv_topk_idx);
                 args.recv_topk_weights = pointer<float>(recv_topk_weights);
                 args.recv_src_idx = pointer<int32_t>(recv_src_idx);
                 args.capacity = capacity;
                 args.fill_unused = fill_unused;
                 const Tuning tuning{num_sms, use_bulk, num_warps, num_stages, num_side_warps};
                 std::optional<py::gil_scoped_release> unlocked;
                 if (ticket != 0) unlocked.emplace();
                 return self.dispatch(args, num_row_bytes, num_experts, tuning, {ticket, least_rows, timeout_s}, stream_of(stream));
             },
             py::kw_only(), "x"_a, "num_row_bytes"_a, "scales"_a, "num_scales"_a, "scales_stride_token"_a, "scales_stride_col"_a, "topk_idx"_a,
             "topk_idx_bits"_a, "topk_weights"_a, "num_tokens"_a, "num_topk"_a, "num_experts"_a, "rank_prefix"_a, "send_head"_a,
             "has_src_idx"_a = py::none(), "recv_x"_a, "recv_scales"_a, "recv_topk_idx"_a, "recv_topk_weights"_a,
             "recv_src_idx"_a, "capacity"_a, "fill_unused"_a, "num_sms"_a,
             "stream"_a, "use_bulk"_a = true, "num_warps"_a = 0, "num_stages"_a = 0, "num_side_warps"_a = 0, "ticket"_a = 0, "least_rows"_a = 0,
             "timeout_s"_a = 0.0)
        .def("combine",
             [](Runtime& self, uint64_t y, int64_t num_recv_tokens, int64_t num_row_bytes, uint64_t topk_weights, int num_topk, uint64_t bias_0,
                uint64_t bias_1, uint64_t rank_prefix, uint64_t send_head, int64_t num_tokens, uint64_t out, uint64_t out_topk_weights, int num_sms,
                uint64_t stream, uint64_t relay, bool use_bulk, int num_warps, int num_stages) {
                 CombineArgs args{};
                 args.relay = pointer<uint8_t>(relay);
                 args.y = pointer<uint8_t>(y);
                 args.topk_weights = pointer<float>(topk_weights);
                 args.num_recv_tokens = num_recv_tokens;
                 args.bias_0 = pointer<uint8_t>(bias_0);
                 args.bias_1 = pointer<uint8_t>(bias_1);
                 args.rank_prefix = pointer<int32_t>(rank_prefix);
                 args.send_head = pointer<int32_t>(send_head);
                 args.num_tokens = num_tokens;
                 args.num_topk = num_topk;
                 args.out = pointer<uint8_t>(out);
                 args.out_topk_weights = pointer<float>(out_topk_weights);
                 return self.combine(args, num_row_bytes, {num_sms, use_bulk, num_warps, num_stages, 0}, stream_of(stream));
             },
             py::kw_only(), "y"_a, "num_recv_tokens"_a, "num_row_bytes"_a, "topk_weights"_a, "num_topk"_a, "bias_0"_a, "bias_1"_a, "rank_prefix"_a,
             "send_head"_a, "num_tokens"_a, "out"_a, "out_topk_weights"_a, "num_sms"_a, "stream"_a, "relay"_a = 0, "use_bulk"_a = true,
             "num_warps"_a = 0,
             "num_stages"_a = 0);
}

void bind_fabric(py::module_& m) {
    m.def(
        "fabric_limit",
        [](const std::string& direction, int rank, const std::vector<uint64_t>& arena_ptrs, uint64_t local, int64_t num_rows, int num_row_bytes, int num_sms,
           uint64_t stream) {
            const int num_ranks = static_cast<int>(arena_ptrs.size());
            if (num_ranks < 2 || num_ranks > kMaxRanks)
                throw ArgumentError("fabric_limit: arena_ptrs has " + std::to_string(num_ranks) + " entries; 2 to 8 are accepted.");
            if (num_row_bytes < 16 || num_row_bytes > 16384 || num_row_bytes % 16 != 0)
                throw ArgumentError("fabric_limit: num_row_bytes is " + std::to_string(num_row_bytes) + "; multiples of 16 up to 16384 are accepted.");
            FabricArgs args{};
            args.rank = rank;
            args.num_ranks = num_ranks;
            for (int i = 0; i < num_ranks; ++i) args.arenas[i] = pointer<uint8_t>(arena_ptrs[i]);
            args.local = pointer<uint8_t>(local);
            args.num_rows = num_rows;
            args.num_row_bytes = num_row_bytes;
            // About 200 KiB in flight per SM, four stages to a warp where rows are small.
            const int num_resident_rows = 200 * 1024 / num_row_bytes;
            args.num_warps = num_resident_rows >= 28 ? 7 : 3;
            args.num_stages = num_resident_rows / args.num_warps > 8 ? 8 : num_resident_rows / args.num_warps;
            const FabricDirection which = direction == "push"   ? FabricDirection::kPush
                                          : direction == "pull" ? FabricDirection::kPull
                                          : direction == "push_store"
                                              ? FabricDirection::kPushStore
                                              : throw ArgumentError("fabric_limit: direction '" + direction + "' is none of push, pull, push_store.");
            check_runtime(launch_fabric(args, which, num_sms, stream_of(stream)), "launching the fabric measurement");
        },
        py::kw_only(), "direction"_a, "rank"_a, "arena_ptrs"_a, "local"_a, "num_rows"_a, "num_row_bytes"_a, "num_sms"_a, "stream"_a);
}

}  // namespace

PYBIND11_MODULE(_nvlink, m) {
    m.doc() = "Native side of the backend nvlink; csrc/README.md describes every call.";
    bind_exceptions(m);
    m.attr("MAX_RANKS") = kMaxRanks;
    m.attr("MAX_TOPK") = kMaxTopk;
    m.attr("NUM_HEADER_FIELDS") = kNumHeaderFields;
    m.def("is_sm90_compiled", &is_sm90_compiled);
    m.def("architectures", [] { return std::vector<int>{DEEPEP_ARCHITECTURES}; });
    bind_memory(m);
    bind_records(m);
    bind_runtime(m);
    bind_fabric(m);
}
