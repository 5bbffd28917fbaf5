// The extension's table of contents. Addresses and streams arrive as integers; nothing is decided here.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include "deepep/memory/symmetric.hpp"
#include "runtime.hpp"

namespace py = pybind11;
using namespace py::literals;
using namespace deepep;
using namespace deepep::ibgda;

namespace deepep::ibgda {
void bind_provider(py::module_& m);  // provider/bind_provider.cpp
}

namespace {

template <class T>
T* pointer(uint64_t address) {
    return reinterpret_cast<T*>(address);
}
cudaStream_t stream_of(uint64_t handle) { return reinterpret_cast<cudaStream_t>(handle); }

const char* name_of(ErrorKind kind) {
    static const char* const names[] = {"none", "timeout", "aborted", "peer_failed", "mismatch", "bad_count", "overflow", "layout_mismatch"};
    return names[static_cast<uint32_t>(kind)];
}
const char* name_of(Op op) { return op == Op::kDispatch ? "dispatch" : op == Op::kCombine ? "combine" : "none"; }
const char* name_of(Phase phase) {
    switch (phase) {
        case Phase::kCredit: return "credit";
        case Phase::kIndex: return "index";
        case Phase::kRow: return "row";
        case Phase::kWeights: return "weights";
        case Phase::kPost: return "post";
        default: return "none";
    }
}

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
}

void bind_error(py::module_& m) {
    py::class_<ErrorRecord>(m, "ErrorRecord", py::module_local())
        .def_property_readonly("kind", [](const ErrorRecord& e) { return name_of(static_cast<ErrorKind>(e.kind)); })
        .def_property_readonly("op", [](const ErrorRecord& e) { return name_of(static_cast<Op>(e.op)); })
        .def_property_readonly("phase", [](const ErrorRecord& e) { return name_of(static_cast<Phase>(e.phase)); })
        .def_readonly("rank", &ErrorRecord::rank)
        .def_readonly("peer", &ErrorRecord::peer)
        .def_readonly("epoch", &ErrorRecord::epoch)
        .def_readonly("seen", &ErrorRecord::seen)
        .def_readonly("expected", &ErrorRecord::expected)
        .def_readonly("elapsed_ns", &ErrorRecord::elapsed_ns)
        .def("__repr__", [](const ErrorRecord& e) {
            return std::string("ErrorRecord(") + name_of(static_cast<ErrorKind>(e.kind)) + " in " + name_of(static_cast<Op>(e.op)) + "/" +
                   name_of(static_cast<Phase>(e.phase)) + ": rank " + std::to_string(e.rank) + ", peer " + std::to_string(e.peer) + ", epoch " +
                   std::to_string(e.epoch) + ", seen " + std::to_string(e.seen) + ", expected " + std::to_string(e.expected) + ", after " +
                   std::to_string(e.elapsed_ns) + " ns)";
        });
}

void bind_runtime(py::module_& m) {
    py::class_<Runtime>(m, "Runtime")
        .def(py::init([](int rank, int num_ranks, int device, std::vector<uint64_t> arena_ptrs, int64_t num_arena_bytes, std::string ll_reduce,
                         bool enable_shrink, uint64_t rdma_view) {
                 return std::make_unique<Runtime>(RuntimeConfig{rank, num_ranks, device, std::move(arena_ptrs), num_arena_bytes, std::move(ll_reduce),
                                                                enable_shrink, rdma_view});
             }),
             py::kw_only(), "rank"_a, "num_ranks"_a, "device"_a, "arena_ptrs"_a, "num_arena_bytes"_a, "ll_reduce"_a, "enable_shrink"_a, "rdma_view"_a = 0)
        .def_static("window_bytes",
                    [](int num_ranks, int max_tokens, int hidden, int num_experts, int num_topk, const std::string& ll_reduce, bool has_remote) {
                        return Runtime::window_bytes(num_ranks, {hidden, num_topk, max_tokens, num_experts}, ll_reduce, has_remote);
                    },
                    py::kw_only(), "num_ranks"_a, "max_tokens"_a, "hidden"_a, "num_experts"_a, "num_topk"_a, "ll_reduce"_a, "has_remote"_a = false)
        .def_static("handle_words",
                    [](int num_ranks, int max_tokens, int num_experts, int num_topk) {
                        return Runtime::handle_words(num_ranks, {0, num_topk, max_tokens, num_experts});
                    },
                    py::kw_only(), "num_ranks"_a, "max_tokens"_a, "num_experts"_a, "num_topk"_a)
        .def_static("ticket_words", [](int num_ranks) { return num_ranks; }, py::kw_only(), "num_ranks"_a)
        .def("set_timeout_ns", &Runtime::set_timeout_ns, "timeout_ns"_a)
        .def("set_least_divided_blocks", &Runtime::set_least_divided_blocks, "num_blocks"_a)
        .def("abort", &Runtime::abort)
        .def("clear_abort", &Runtime::clear_abort)
        .def("error", &Runtime::error)
        .def("clear_error", &Runtime::clear_error)
        .def("reset", [](Runtime& self, uint64_t stream) { self.reset(stream_of(stream)); }, py::kw_only(), "stream"_a,
             py::call_guard<py::gil_scoped_release>())
        .def("close", &Runtime::close)
        .def("dispatch",
             [](Runtime& self, uint64_t x, uint64_t topk_idx, int topk_idx_bits, uint64_t topk_weights, bool has_weights, int num_tokens, int hidden, int num_topk,
                int max_tokens, int num_experts, bool use_fp8, bool round_scale, bool use_ue8m0, uint64_t recv_x, uint64_t recv_scales, uint64_t recv_count,
                uint64_t layout_range, uint64_t handle, uint64_t cumulative_stats, uint64_t wait_stats, int phases, int num_sms, uint64_t stream) {
                 DispatchArgs args{};
                 args.phases = phases;
                 args.x = pointer<uint8_t>(x);
                 args.topk_idx = {pointer<void>(topk_idx), topk_idx_bits};
                 args.topk_weights = pointer<float>(topk_weights);
                 args.num_tokens = num_tokens;
                 args.hidden = hidden;
                 args.num_topk = num_topk;
                 args.max_tokens = max_tokens;
                 args.num_experts = num_experts;
                 args.use_fp8 = use_fp8;
                 args.round_scale = round_scale;
                 args.use_ue8m0 = use_ue8m0;
                 args.has_weights = has_weights;
                 args.recv_x = pointer<uint8_t>(recv_x);
                 args.recv_scales = pointer<uint32_t>(recv_scales);
                 args.recv_count = pointer<int32_t>(recv_count);
                 args.layout_range = pointer<int64_t>(layout_range);
                 args.handle = pointer<int32_t>(handle);
                 args.cumulative_stats = pointer<int32_t>(cumulative_stats);
                 args.wait_stats = pointer<int64_t>(wait_stats);
                 self.dispatch(args, num_sms, stream_of(stream));
             },
             py::kw_only(), "x"_a, "topk_idx"_a, "topk_idx_bits"_a, "topk_weights"_a, "has_weights"_a, "num_tokens"_a, "hidden"_a, "num_topk"_a, "max_tokens"_a,
             "num_experts"_a, "use_fp8"_a, "round_scale"_a, "use_ue8m0"_a, "recv_x"_a, "recv_scales"_a, "recv_count"_a, "layout_range"_a, "handle"_a, "cumulative_stats"_a,
             "wait_stats"_a, "phases"_a, "num_sms"_a, "stream"_a)
        .def("combine",
             [](Runtime& self, uint64_t x, int64_t row_stride, uint64_t topk_idx, int topk_idx_bits, uint64_t topk_weights, uint64_t handle, uint64_t ticket,
                int num_tokens, int hidden, int num_topk, int max_tokens, int num_experts, bool use_logfmt, uint64_t out, uint64_t wait_stats, int phases,
                int num_sms, uint64_t stream) {
                 CombineArgs args{};
                 args.phases = phases;
                 args.x = pointer<uint8_t>(x);
                 args.num_row_bytes = 2 * row_stride;
                 args.topk_idx = {pointer<void>(topk_idx), topk_idx_bits};
                 args.topk_weights = pointer<float>(topk_weights);
                 args.handle = pointer<int32_t>(handle);
                 args.ticket = pointer<uint32_t>(ticket);
                 args.num_tokens = num_tokens;
                 args.hidden = hidden;
                 args.num_topk = num_topk;
                 args.max_tokens = max_tokens;
                 args.num_experts = num_experts;
                 args.use_logfmt = use_logfmt;
                 args.out = pointer<uint8_t>(out);
                 args.wait_stats = pointer<int64_t>(wait_stats);
                 self.combine(args, num_sms, stream_of(stream));
             },
             py::kw_only(), "x"_a, "row_stride"_a, "topk_idx"_a, "topk_idx_bits"_a, "topk_weights"_a, "handle"_a, "ticket"_a, "num_tokens"_a, "hidden"_a,
             "num_topk"_a, "max_tokens"_a, "num_experts"_a, "use_logfmt"_a, "out"_a, "wait_stats"_a, "phases"_a, "num_sms"_a, "stream"_a)
        .def("update_mask", [](Runtime& self, int rank, bool masked, uint64_t stream) { self.update_mask(rank, masked, stream_of(stream)); }, "rank"_a, "masked"_a,
             py::kw_only(), "stream"_a)
        .def("query_mask", [](Runtime& self, uint64_t out, uint64_t stream) { self.query_mask(pointer<int32_t>(out), stream_of(stream)); }, "out"_a, py::kw_only(),
             "stream"_a)
        .def("clean_mask", [](Runtime& self, uint64_t stream) { self.clean_mask(stream_of(stream)); }, py::kw_only(), "stream"_a);
}

uint64_t capture_id(uint64_t stream) {
    cudaStreamCaptureStatus status = cudaStreamCaptureStatusNone;
    unsigned long long id = 0;
#if CUDART_VERSION >= 13000
    check_runtime(cudaStreamGetCaptureInfo(stream_of(stream), &status, &id, nullptr, nullptr, nullptr, nullptr), "asking whether a stream is captured");
#else
    check_runtime(cudaStreamGetCaptureInfo_v2(stream_of(stream), &status, &id, nullptr, nullptr, nullptr), "asking whether a stream is captured");
#endif
    return status == cudaStreamCaptureStatusNone ? 0 : id;
}

}  // namespace

PYBIND11_MODULE(_ibgda, m) {
    m.doc() = "Native side of the backend ibgda; csrc/README.md describes every call.";
    // Local, like the classes of core's headers: several extensions of this library may be loaded in one process.
    auto native_error = py::register_local_exception<NativeError>(m, "NativeError", PyExc_RuntimeError);
    py::register_local_exception<DriverError>(m, "DriverError", native_error.ptr());
    py::register_local_exception<ArgumentError>(m, "ArgumentError", native_error.ptr());
    m.attr("MAX_TOPK") = kMaxTopk;
    m.attr("MAX_TOKENS") = kMaxTokens;
    m.attr("MAX_LOCAL_EXPERTS") = kMaxLocalExperts;
    m.attr("SEND") = static_cast<int>(kSend);
    m.attr("RECEIVE") = static_cast<int>(kReceive);
    m.def("is_sm90_compiled", &is_sm90_compiled);
    m.def("architectures", [] { return std::vector<int>{DEEPEP_ARCHITECTURES}; });
#if defined(DEEPEP_LL_TRACE)
    // Of the current device's last operation: [block][stamp] clocks of its SM.
    m.def("stamps", [](const std::string& op) {
        std::vector<uint32_t> flat(kMaxBlocks * 14);
        check_runtime(op == "dispatch" ? copy_dispatch_stamps(flat.data()) : copy_combine_stamps(flat.data()), "reading the trace");
        return flat;
    });
#endif
    m.def("capture_id", &capture_id, py::kw_only(), "stream"_a);
    bind_memory(m);
    bind_error(m);
    bind_runtime(m);
    bind_provider(m);
}
