#pragma once
// What the runtimes of this package share on the host: argument checks, the current device, and the page on which kernels report.
#include <cuda_runtime_api.h>
#include <sched.h>

#include <atomic>
#include <chrono>
#include <cstdint>
#include <cstring>
#include <optional>
#include <string>

#include "deepep/common/exceptions.hpp"
#include "deepep/layout/status.hpp"
#include "deepep/memory/symmetric.hpp"

namespace deepep {

inline void require(bool is_good, const std::string& text) {
    if (!is_good) throw ArgumentError(text);
}

inline bool is_aligned(const void* pointer, int64_t unit) { return reinterpret_cast<uintptr_t>(pointer) % unit == 0; }

// A field that a kernel may be writing.
template <class T>
T read_shared(const T& field) {
    return *const_cast<const volatile T*>(&field);
}

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
    DeviceGuard(const DeviceGuard&) = delete;
    DeviceGuard& operator=(const DeviceGuard&) = delete;
    ~DeviceGuard() {
        if (changed_) static_cast<void>(cudaSetDevice(previous_));
    }

private:
    int previous_ = 0;
    bool changed_ = false;
};

// Pinned memory that the host shares with one rank's kernels: HostControl, then whatever else the runtime publishes there.
class StatusPage {
public:
    StatusPage() = default;
    StatusPage(const StatusPage&) = delete;
    StatusPage& operator=(const StatusPage&) = delete;
    ~StatusPage() { close(); }

    // On the current device. Zeroed, but for a deadline of 100 s.
    void open(int64_t num_more_bytes) {
        void* page = nullptr;
        const size_t num_bytes = sizeof(HostControl) + static_cast<size_t>(num_more_bytes);
        check_runtime(cudaHostAlloc(&page, num_bytes, cudaHostAllocPortable | cudaHostAllocMapped), "allocating the pinned status page");
        std::memset(page, 0, num_bytes);
        control_ = static_cast<HostControl*>(page);
        control_->timeout_ns = 100ull * 1000 * 1000 * 1000;
    }
    void close() noexcept {
        if (control_ != nullptr) static_cast<void>(cudaFreeHost(control_));
        control_ = nullptr;
    }
    void require_open() const { require(control_ != nullptr, "this runtime has been closed."); }

    HostControl* control() const { return control_; }
    uint8_t* more() const { return reinterpret_cast<uint8_t*>(control_ + 1); }

    void set_timeout_ns(uint64_t timeout_ns) {
        require_open();
        *const_cast<volatile uint64_t*>(&control_->timeout_ns) = timeout_ns;
    }
    void set_aborted(bool is_aborted) {
        require_open();
        *const_cast<volatile uint32_t*>(&control_->is_aborted) = is_aborted ? 1 : 0;
    }
    std::optional<ErrorRecord> error() const {
        require_open();
        if (read_shared(control_->error.generation) != read_shared(control_->error_generation) + 1) return std::nullopt;
        std::atomic_thread_fence(std::memory_order_acquire);  // pairs with the device's release of `generation`
        return control_->error;
    }
    void clear_error() {
        if (error()) *const_cast<volatile uint32_t*>(&control_->error_generation) = control_->error_generation + 1;
    }

private:
    HostControl* control_ = nullptr;
};

// Polls until a kernel has published under this ticket; false after timeout_s.
inline bool wait_for_ticket(const uint32_t& published, uint32_t ticket, double timeout_s) {
    const auto deadline = std::chrono::steady_clock::now() + std::chrono::duration<double>(timeout_s);
    for (uint64_t poll = 1; read_shared(published) != ticket; ++poll) {
        if (poll % 4096 != 0) continue;
        if (std::chrono::steady_clock::now() > deadline) return false;
        sched_yield();
    }
    std::atomic_thread_fence(std::memory_order_acquire);  // pairs with the device's release of the ticket
    return true;
}

}  // namespace deepep
