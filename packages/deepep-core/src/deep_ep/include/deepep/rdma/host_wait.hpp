#pragma once
// The wait policy of host threads: a deadline, and a word by which somebody else ends the wait.
#include <atomic>
#include <chrono>
#include <cstdint>
#include <thread>

#include "queue_pair.hpp"

namespace deepep::rdma {

struct HostWait {
    std::chrono::steady_clock::time_point deadline;
    const std::atomic<bool>* is_aborted = nullptr;
    uint64_t num_calls = 0;  // looks that were in vain

    static HostWait within(std::chrono::nanoseconds timeout, const std::atomic<bool>* is_aborted = nullptr) {
        return {std::chrono::steady_clock::now() + timeout, is_aborted};
    }
    WaitVerdict operator()() {
        ++num_calls;
        if (is_aborted != nullptr && is_aborted->load(std::memory_order_relaxed)) return WaitVerdict::kAborted;
        if (std::chrono::steady_clock::now() >= deadline) return WaitVerdict::kTimeout;
        std::this_thread::yield();
        return WaitVerdict::kGoOn;
    }
};

}  // namespace deepep::rdma
