// The same warps as threads, over memory that they share: what a warp reads was released to it by a word, or ThreadSanitizer says so. A put
// copies at once, as it does over NVLink.
//
//   threaded_streams SEED NUM_OPERATIONS
//
// -DRELAXED_SIGNALS and -DRELAXED_WORDS take the release from a put's signal and from credits and requests.
#include <atomic>
#include <chrono>
#include <cstdlib>
#include <thread>

#include "deepep/rdma/faults.hpp"
#include "streams.hpp"

namespace {

using namespace streams;

constexpr int kMaxRanksHere = 3, kMaxTokensHere = 40, kNumWarps = 2;
constexpr auto kPatience = std::chrono::seconds(60);
#ifdef RELAXED_SIGNALS
constexpr int kSignalOrder = __ATOMIC_RELAXED;
#else
constexpr int kSignalOrder = __ATOMIC_RELEASE;
#endif
#ifdef RELAXED_WORDS
constexpr int kWordOrder = __ATOMIC_RELAXED;
#else
constexpr int kWordOrder = __ATOMIC_RELEASE;
#endif

struct SharedMemory final : Port {
    void put(uint8_t* to, const uint8_t* from, int64_t num_bytes, uint64_t* word, uint64_t value) override {
        memcpy(to, from, num_bytes);
        __atomic_store_n(word, value, kSignalOrder);
    }
    void set_word(uint64_t* word, uint64_t value) override { __atomic_store_n(word, value, kWordOrder); }
};

// Warps of one rank end an operation together: the end of a kernel.
struct KernelEnd {
    std::atomic<int> num_arrived{0};
    std::atomic<uint32_t> num_ended{0};
};

void run_warp(Case& group, KernelEnd& end, Port& port, int rank, int warp) {
    const auto deadline = std::chrono::steady_clock::now() + kPatience;
    for (uint32_t index = 0; index < group.operations.size(); ++index) {
        Operation& operation = *group.operations[index];
        const Place place{group.window, group.memories.data(), rank, group.num_ranks, 0, 1, Rule::kAll, &port};
        // Its own copy of the list; one warp of it runs here.
        const auto warps = warps_of(place, operation, kNumWarps);
        while (!warps[warp]->is_over()) {
            if (warps[warp]->step()) continue;
            CHECK(std::chrono::steady_clock::now() < deadline, "rank %d, warp %d: nothing moves any more in operation %u", rank, warp, index);
            std::this_thread::yield();
        }
        if (end.num_arrived.fetch_add(1, std::memory_order_acq_rel) == 2 * kNumWarps - 1) {
            check_arrivals(operation, rank);
            end.num_arrived.store(0, std::memory_order_relaxed);
            end.num_ended.store(index + 1, std::memory_order_release);
        }
        while (end.num_ended.load(std::memory_order_acquire) != index + 1) {
            CHECK(std::chrono::steady_clock::now() < deadline, "rank %d, warp %d: operation %u does not end", rank, warp, index);
            std::this_thread::yield();
        }
    }
}

}  // namespace

int main(int num_arguments, char** arguments) {
    CHECK(num_arguments == 3, "usage: threaded_streams SEED NUM_OPERATIONS");
    deepep::rdma::Random random(std::strtoull(arguments[1], nullptr, 10));
    Case group(random, std::atoi(arguments[2]), kMaxRanksHere, kMaxTokensHere);
    SharedMemory port;
    std::vector<KernelEnd> ends(group.num_ranks);
    std::vector<std::thread> threads;
    for (int rank = 0; rank < group.num_ranks; ++rank)
        for (int warp = 0; warp < 2 * kNumWarps; ++warp) threads.emplace_back(run_warp, std::ref(group), std::ref(ends[rank]), std::ref(port), rank, warp);
    for (std::thread& thread : threads) thread.join();
}
