#include "provider/software.hpp"

#include <chrono>
#include <thread>

#include "deepep/memory/symmetric.hpp"

namespace deepep::ibgda {
namespace {

using Provider = rdma::SoftwareProvider<CudaMover>;

// Far above what CUDA hands out, and different for each peer.
uint64_t address_for_requests(int peer) { return (static_cast<uint64_t>(peer) + 1) << 52; }

// Another thread may be recording a CUDA graph. Nothing that this thread does belongs into it, and by default CUDA would take its questions
// for events as a reason to give the recording up. Returns this thread's mode before.
cudaStreamCaptureMode let_other_threads_capture() {
    cudaStreamCaptureMode mode = cudaStreamCaptureModeRelaxed;
    static_cast<void>(cudaThreadExchangeStreamCaptureMode(&mode));
    return mode;
}

void require(bool condition, const std::string& text) {
    if (!condition) throw ArgumentError("software NIC: " + text);
}

Provider::Shape shape_of(const SoftwareNicConfig& config) {
    return {config.rank, static_cast<int32_t>(config.is_remote.size()), config.num_queue_pairs, static_cast<uint32_t>(config.depth),
            config.is_remote};
}

void check(const SoftwareNicConfig& config) {
    const int num_ranks = static_cast<int>(config.is_remote.size());
    require(num_ranks > 0 && num_ranks <= kMaxPeers,
            "is_remote has " + std::to_string(num_ranks) + " entries; 1 to " + std::to_string(kMaxPeers) + " ranks are supported.");
    require(config.rank >= 0 && config.rank < num_ranks, "rank is " + std::to_string(config.rank) + " of " + std::to_string(num_ranks) + ".");
    require(!config.is_remote[config.rank], "rank " + std::to_string(config.rank) + " cannot be remote to itself.");
    require(config.num_queue_pairs >= 1 && config.num_queue_pairs <= 64,
            "num_queue_pairs is " + std::to_string(config.num_queue_pairs) + "; 1 to 64 are accepted.");
    require(config.depth >= 2 && config.depth <= rdma::kMaxDepth && (config.depth & (config.depth - 1)) == 0,
            "depth is " + std::to_string(config.depth) + "; powers of two from 2 to " + std::to_string(rdma::kMaxDepth) + " are accepted.");
}

}  // namespace

SoftwareNicOfRank::SoftwareNicOfRank(const SoftwareNicConfig& config) : config_(config) {
    check(config);
    const Provider::Shape shape = shape_of(config);
    num_queue_bytes_ = shape.num_queue_bytes();
    try {
        check_runtime(cudaSetDevice(config.device), "selecting CUDA device " + std::to_string(config.device));
        check_runtime(cudaHostAlloc(&queue_memory_, static_cast<size_t>(num_queue_bytes_), cudaHostAllocPortable | cudaHostAllocMapped),
                      "allocating " + std::to_string(num_queue_bytes_) + " bytes of pinned memory for queue pairs");
        check_runtime(cudaMalloc(&states_, sizeof(rdma::QueuePairState) * static_cast<size_t>(shape.num_pairs())),
                      "allocating counters of queue pairs");
        nic_ = std::make_unique<rdma::SoftwareNic<CudaMover>>(config.faults, CudaMover(config.device));
        provider_ = std::make_unique<Provider>(*nic_, shape, queue_memory_, states_);
        tables_ = std::make_unique<DeviceTables>(config.device);
        register_arenas(config.arena_ptrs, config.num_arena_bytes);
    } catch (...) {
        close();
        throw;
    }
}

SoftwareNicOfRank::~SoftwareNicOfRank() { close(); }

void SoftwareNicOfRank::require_open() const { require(provider_ != nullptr, "it has been closed."); }

void SoftwareNicOfRank::register_arenas(const std::vector<uint64_t>& arena_ptrs, int64_t num_arena_bytes) {
    require_open();
    require(arena_ptrs.size() == config_.is_remote.size(), "arena_ptrs has " + std::to_string(arena_ptrs.size()) + " entries for " +
                                                               std::to_string(config_.is_remote.size()) + " ranks.");
    require(num_arena_bytes > 0, "num_arena_bytes is " + std::to_string(num_arena_bytes) + "; it must be positive.");
    for (int rank = 0; rank < static_cast<int>(arena_ptrs.size()); ++rank) {
        const bool is_needed = rank == config_.rank || config_.is_remote[rank];
        require(!is_needed || arena_ptrs[rank] != 0, "the arena of rank " + std::to_string(rank) + " is not mapped into this process.");
    }
    provider_->set_local(arena_ptrs[config_.rank], reinterpret_cast<uint8_t*>(arena_ptrs[config_.rank]), num_arena_bytes, num_arena_bytes);
    for (int rank = 0; rank < static_cast<int>(arena_ptrs.size()); ++rank)
        if (config_.is_remote[rank])
            provider_->set_remote(rank, address_for_requests(rank), reinterpret_cast<uint8_t*>(arena_ptrs[rank]), num_arena_bytes,
                                  num_arena_bytes);
    tables_->update(provider_->view());
}

void SoftwareNicOfRank::start() {
    require_open();
    nic_->start([device = config_.device] {
        static_cast<void>(cudaSetDevice(device));
        let_other_threads_capture();
    });
}

bool SoftwareNicOfRank::drain(double timeout_s) {
    require_open();
    const auto deadline = std::chrono::steady_clock::now() + std::chrono::duration<double>(timeout_s);
    check_runtime(cudaSetDevice(config_.device), "selecting CUDA device " + std::to_string(config_.device));
    cudaStreamCaptureMode mode = let_other_threads_capture();
    bool has_work = nic_->has_work();
    while (has_work && !nic_->has_failed() && std::chrono::steady_clock::now() < deadline) {
        std::this_thread::sleep_for(std::chrono::microseconds(20));
        has_work = nic_->has_work();
    }
    static_cast<void>(cudaThreadExchangeStreamCaptureMode(&mode));
    return !has_work && !nic_->has_failed();
}

void SoftwareNicOfRank::stop() {
    if (nic_ != nullptr) nic_->stop();
}

void SoftwareNicOfRank::close() noexcept {
    stop();
    tables_.reset();
    provider_.reset();
    nic_.reset();  // waits for its stream
    static_cast<void>(cudaSetDevice(config_.device));
    if (states_ != nullptr) static_cast<void>(cudaFree(states_));
    if (queue_memory_ != nullptr) static_cast<void>(cudaFreeHost(queue_memory_));
    states_ = nullptr;
    queue_memory_ = nullptr;
}

void SoftwareNicOfRank::reset() {
    require_open();
    provider_->reset();
}

uint64_t SoftwareNicOfRank::view_ptr() const {
    require_open();
    return reinterpret_cast<uint64_t>(&tables_->peers());
}

uint32_t SoftwareNicOfRank::number_of(int peer, int lane) const {
    require_open();
    const bool is_remote = peer >= 0 && peer < static_cast<int>(config_.is_remote.size()) && config_.is_remote[peer];
    require(is_remote && lane >= 0 && lane < config_.num_queue_pairs,
            "there is no queue pair to rank " + std::to_string(peer) + ", lane " + std::to_string(lane) + ".");
    return provider_->view().queue_pair(peer, lane).number;
}

uint64_t SoftwareNicOfRank::inject(int peer, int lane, rdma::Fault fault, std::optional<uint64_t> request, rdma::Syndrome syndrome) {
    require(fault != rdma::Fault::kReorder, "a reordering concerns several queue pairs; give its chance at construction.");
    const uint32_t number = number_of(peer, lane);
    if (!request.has_value()) return nic_->inject_next(number, fault, syndrome);
    nic_->inject(number, *request, fault, syndrome);
    return *request;
}

rdma::NicCounters SoftwareNicOfRank::counters() const {
    require_open();
    return nic_->counters();
}

std::optional<std::string> SoftwareNicOfRank::first_fault(int peer, int lane) const {
    const rdma::QueueFault fault = nic_->first_fault(number_of(peer, lane));
    if (!fault.is_known) return std::nullopt;
    std::string text = "request " + std::to_string(fault.request) + ": " + rdma::name_of(fault.syndrome);
    if (const std::string moving = nic_->moving_failure(); !moving.empty()) text += "; " + moving;
    return text;
}

}  // namespace deepep::ibgda
