// Bindings of the RDMA side: the software NIC, and failures in words. Decides nothing.
#include <cuda_runtime_api.h>
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <map>

#include "provider/gpudirect.hpp"
#include "provider/probe.hpp"
#include "provider/software.hpp"

namespace py = pybind11;
using namespace py::literals;

namespace deepep::ibgda {

void bind_nvshmem(py::module_& m);

namespace {

rdma::Fault fault_of(const std::string& name) {
    std::string known;
    for (int i = 0; i < rdma::kNumFaults; ++i) {
        const auto fault = static_cast<rdma::Fault>(i);
        if (name == rdma::name_of(fault)) return fault;
        known += (i == 0 ? "'" : ", '") + std::string(rdma::name_of(fault)) + "'";
    }
    throw ArgumentError("software NIC: fault is '" + name + "'; known are " + known + ".");
}

py::dict as_dict(const rdma::NicCounters& counters) {
    py::dict dict("steps"_a = counters.num_steps, "writes"_a = counters.num_writes, "inline_writes"_a = counters.num_inline_writes,
                  "atomics"_a = counters.num_atomics, "bytes"_a = counters.num_bytes, "doorbells"_a = counters.num_doorbells,
                  "completions"_a = counters.num_completions, "errors"_a = counters.num_errors, "flushed"_a = counters.num_flushed);
    for (int i = 0; i < rdma::kNumFaults; ++i) {
        std::string name = rdma::name_of(static_cast<rdma::Fault>(i));
        for (char& c : name)
            if (c == ' ') c = '_';
        dict[py::str("fault_" + name)] = counters.num_faults[i];
    }
    return dict;
}

std::unique_ptr<SoftwareNicOfRank> make(int rank, int device, std::vector<uint64_t> arena_ptrs, int64_t num_arena_bytes,
                                        std::vector<bool> is_remote, int num_queue_pairs, int64_t depth, uint64_t seed,
                                        const std::map<std::string, uint32_t>& faults_per_million, uint32_t max_delay_steps,
                                        uint32_t dead_link_steps) {
    rdma::FaultPlan plan;
    plan.seed = seed;
    for (const auto& [name, per_million] : faults_per_million) plan.per_million[static_cast<int>(fault_of(name))] = per_million;
    plan.max_delay_steps = max_delay_steps;
    plan.dead_link_steps = dead_link_steps;
    return std::make_unique<SoftwareNicOfRank>(
        SoftwareNicConfig{rank, device, std::move(arena_ptrs), num_arena_bytes, std::move(is_remote), num_queue_pairs, depth, plan});
}

Probe make_probe(int rank, int device, uint64_t arena_ptr, uint64_t view_ptr, uint32_t nonce) {
    return {rank, device, reinterpret_cast<uint8_t*>(arena_ptr), remote_peers_of(view_ptr), nonce};
}

}  // namespace

void bind_provider(py::module_& m) {
    using gil_released = py::call_guard<py::gil_scoped_release>;
    py::class_<SoftwareNicOfRank>(m, "SoftwareNic")
        .def(py::init(&make), py::kw_only(), "rank"_a, "device"_a, "arena_ptrs"_a, "num_arena_bytes"_a, "is_remote"_a, "num_queue_pairs"_a = 1,
             "depth"_a = 1024, "seed"_a = 0, "faults_per_million"_a = std::map<std::string, uint32_t>{}, "max_delay_steps"_a = 8,
             "dead_link_steps"_a = 0)
        .def_property_readonly("view_ptr", &SoftwareNicOfRank::view_ptr)
        .def_property_readonly("num_queue_bytes", &SoftwareNicOfRank::num_queue_bytes)
        .def("start", &SoftwareNicOfRank::start, gil_released())
        .def("drain", &SoftwareNicOfRank::drain, py::kw_only(), "timeout_s"_a, gil_released())
        .def("stop", &SoftwareNicOfRank::stop, gil_released())
        .def("close", &SoftwareNicOfRank::close, gil_released())
        .def("reset", &SoftwareNicOfRank::reset, gil_released())
        .def("register_arenas", &SoftwareNicOfRank::register_arenas, py::kw_only(), "arena_ptrs"_a, "num_arena_bytes"_a, gil_released())
        .def(
            "inject",
            [](SoftwareNicOfRank& nic, int peer, const std::string& fault, int lane, std::optional<uint64_t> request, int syndrome) {
                return nic.inject(peer, lane, fault_of(fault), request, static_cast<rdma::Syndrome>(syndrome));
            },
            py::kw_only(), "peer"_a, "fault"_a, "lane"_a = 0, "request"_a = py::none(),
            "syndrome"_a = static_cast<int>(rdma::Syndrome::kRemoteOperation))
        .def("counters", [](const SoftwareNicOfRank& nic) { return as_dict(nic.counters()); })
        .def("first_fault", &SoftwareNicOfRank::first_fault, py::kw_only(), "peer"_a, "lane"_a = 0);
    m.def("describe_rdma_failure", &describe_failure, py::kw_only(), "peer"_a, "seen"_a, "expected"_a);
    m.def(
        "post_probe",
        [](int rank, int device, uint64_t arena_ptr, uint64_t view_ptr, uint32_t nonce, double timeout_s) {
            return post_probe(make_probe(rank, device, arena_ptr, view_ptr, nonce), timeout_s);
        },
        py::kw_only(), "rank"_a, "device"_a, "arena_ptr"_a, "view_ptr"_a, "nonce"_a, "timeout_s"_a, gil_released());
    m.def(
        "missing_of_probe",
        [](int rank, int device, uint64_t arena_ptr, uint64_t view_ptr, uint32_t nonce) {
            return missing_of_probe(make_probe(rank, device, arena_ptr, view_ptr, nonce));
        },
        py::kw_only(), "rank"_a, "device"_a, "arena_ptr"_a, "view_ptr"_a, "nonce"_a, gil_released());
#if defined(DEEPEP_HAS_NVSHMEM)
    bind_nvshmem(m);
    m.def("is_nvshmem_compiled", [] { return true; });
#else
    m.def("is_nvshmem_compiled", [] { return false; });
#endif
    m.def("rdma_obstacle", &gpudirect_obstacle, "device"_a);
}

}  // namespace deepep::ibgda
