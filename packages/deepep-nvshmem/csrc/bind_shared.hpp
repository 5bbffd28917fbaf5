#pragma once
// What the bindings of this package's extensions share: arguments as integers, the words for errors, the exceptions.
#include <cuda_runtime_api.h>
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <cstdint>
#include <string>
#include <vector>

#include "deepep/common/exceptions.hpp"
#include "deepep/layout/status.hpp"

namespace deepep {

namespace py = pybind11;

template <class T>
T* pointer(uint64_t address) {
    return reinterpret_cast<T*>(address);
}
inline cudaStream_t stream_of(uint64_t handle) { return reinterpret_cast<cudaStream_t>(handle); }

template <class Args>
void fill_fields(Args& args, const std::vector<uint32_t>& fields) {
    if (fields.size() > kNumHeaderFields)
        throw ArgumentError("fields has " + std::to_string(fields.size()) + " entries; a header carries at most " + std::to_string(kNumHeaderFields) + ".");
    for (size_t i = 0; i < fields.size(); ++i) args.fields[i] = fields[i];
}

inline const char* name_of(ErrorKind kind) {
    static const char* const names[] = {"none", "timeout", "aborted", "peer_failed", "mismatch", "bad_count", "overflow", "layout_mismatch"};
    return names[static_cast<uint32_t>(kind)];
}
inline const char* name_of(Op op) {
    static const char* const names[] = {"none", "notify", "dispatch", "combine"};
    return names[static_cast<uint32_t>(op)];
}
inline const char* name_of(Phase phase) {
    switch (phase) {
        case Phase::kHeader: return "header";
        case Phase::kCounts: return "counts";
        case Phase::kReady: return "ready";
        case Phase::kDone: return "done";
        case Phase::kReadDone: return "read_done";
        case Phase::kSlotFull: return "slot_full";
        case Phase::kSlotFree: return "slot_free";
        case Phase::kRows: return "rows";
        case Phase::kCredit: return "credit";
        case Phase::kWindow: return "window";
        case Phase::kRequest: return "request";
        default: return "none";
    }
}

inline py::list list_of_headers(const std::vector<std::vector<uint32_t>>& headers) {
    py::list list;
    for (const auto& header : headers) list.append(py::tuple(py::cast(header)));
    return list;
}

inline void bind_error_record(py::module_& m) {
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

// Local, like the classes of core's headers: several extensions of this library may be loaded in one process.
inline void bind_exceptions(py::module_& m) {
    auto native_error = py::register_local_exception<NativeError>(m, "NativeError", PyExc_RuntimeError);
    py::register_local_exception<DriverError>(m, "DriverError", native_error.ptr());
    py::register_local_exception<ArgumentError>(m, "ArgumentError", native_error.ptr());
}

}  // namespace deepep
