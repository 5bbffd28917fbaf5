// Bindings of the provider over NVSHMEM; compiled where NVSHMEM's headers are found.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include "provider/nvshmem.hpp"

namespace py = pybind11;
using namespace py::literals;

namespace deepep::ibgda {

void bind_nvshmem(py::module_& m) {
    using gil_released = py::call_guard<py::gil_scoped_release>;
    py::class_<NvshmemRdma>(m, "NvshmemRdma")
        .def(py::init([](int rank, int num_ranks, int device, const py::bytes& unique_id, std::string host_library, std::string device_library,
                         std::string state_module, int64_t num_arena_bytes, std::vector<bool> is_remote, int num_queue_pairs, int64_t depth,
                         int service_level, int traffic_class) {
                 NvshmemConfig config = {rank, num_ranks, device, std::string(unique_id), std::move(host_library), std::move(device_library),
                                         std::move(state_module), num_arena_bytes, std::move(is_remote), num_queue_pairs, depth, service_level,
                                         traffic_class};
                 const py::gil_scoped_release released;
                 return std::make_unique<NvshmemRdma>(config);
             }),
             py::kw_only(), "rank"_a, "num_ranks"_a, "device"_a, "unique_id"_a, "host_library"_a, "device_library"_a, "state_module"_a,
             "num_arena_bytes"_a, "is_remote"_a, "num_queue_pairs"_a = 1, "depth"_a = 1024, "service_level"_a = -1, "traffic_class"_a = -1)
        .def_property_readonly("arena_ptrs", &NvshmemRdma::arena_ptrs)
        .def_property_readonly("view_ptr", &NvshmemRdma::view_ptr)
        .def("close", &NvshmemRdma::close, gil_released());
    m.def(
        "nvshmem_unique_id", [](const std::string& host_library) { return py::bytes(nvshmem_unique_id(host_library)); }, py::kw_only(),
        "host_library"_a);
}

}  // namespace deepep::ibgda
