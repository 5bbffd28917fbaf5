// The same warps as threads, over memory that they share: what a warp reads was released to it by a word, or ThreadSanitizer says so. A put
// copies at once, as it does over NVLink.
//
//   threaded_streams SEED NUM_OPERATIONS [signals | words | tables]
//
// The last argument takes the release from a put's signal, from credits and requests, or from what the warps of a block publish to each other.
#include <atomic>
#include <chrono>
#include <cstdlib>
#include <string>
#include <thread>

#include "deepep/rdma/faults.hpp"
#include "cases.hpp"

namespace {

using namespace streams;

constexpr int kMaxRanksHere = 3, kMaxTokensHere = 40;
constexpr Block::Shape kShape{2, 2, 2};
constexpr int kNumWarps = 5;  // with the one that fences
constexpr auto kPatience = std::chrono::seconds(250);  // of the whole program; what stands still does so for ever

class SharedMemory final : public Port {
public:
    explicit SharedMemory(const std::string& relaxed)
        : relaxes_signals_(relaxed == "signals"), relaxes_words_(relaxed == "words"), relaxes_tables_(relaxed == "tables") {
        CHECK(relaxed.empty() || relaxes_signals_ || relaxes_words_ || relaxes_tables_, "signals, words or tables may be relaxed, not %s", relaxed.c_str());
    }
    void put(uint8_t* to, const uint8_t* from, int64_t num_bytes, uint64_t* word, uint64_t value) override {
        memcpy(to, from, num_bytes);
        store(word, value, relaxes_signals_);
    }
    void set_word(uint64_t* word, uint64_t value) override { store(word, value, relaxes_words_); }
    void publish(int32_t* shared, int32_t value) override { store(shared, value, relaxes_tables_); }

private:
    template <class T>
    static void store(T* word, T value, bool is_relaxed) {
        if (is_relaxed)
            __atomic_store_n(word, value, __ATOMIC_RELAXED);
        else
            __atomic_store_n(word, value, __ATOMIC_RELEASE);
    }
    const bool relaxes_signals_, relaxes_words_, relaxes_tables_;
};

// Warps of one rank end an operation together: the end of a kernel.
struct KernelEnd {
    std::atomic<int> num_arrived{0};
    std::atomic<uint32_t> num_ended{0};
};

// One rank: its blocks, one for each operation.
struct Rank {
    std::vector<std::unique_ptr<Block>> blocks;
    std::vector<std::vector<std::unique_ptr<Warp>>> warps;
    KernelEnd end;
};

void run_warp(Case& group, Rank& own, int rank, int number) {
    const auto deadline = std::chrono::steady_clock::now() + kPatience;
    for (uint32_t index = 0; index < group.operations.size(); ++index) {
        Operation& operation = *group.operations[index];
        Warp& warp = *own.warps[index][number];
        KernelEnd& end = own.end;
        while (!warp.is_over()) {
            if (warp.step()) continue;
            CHECK(std::chrono::steady_clock::now() < deadline, "rank %d, warp %d: nothing moves any more in operation %u", rank, number, index);
            std::this_thread::yield();
        }
        if (end.num_arrived.fetch_add(1, std::memory_order_acq_rel) == kNumWarps - 1) {
            check_arrivals(operation, rank);
            end.num_arrived.store(0, std::memory_order_relaxed);
            end.num_ended.store(index + 1, std::memory_order_release);
        }
        while (end.num_ended.load(std::memory_order_acquire) != index + 1) {
            CHECK(std::chrono::steady_clock::now() < deadline, "rank %d, warp %d: operation %u does not end", rank, number, index);
            std::this_thread::yield();
        }
    }
}

}  // namespace

int main(int num_arguments, char** arguments) {
    CHECK(num_arguments == 3 || num_arguments == 4, "usage: threaded_streams SEED NUM_OPERATIONS [signals | words | tables]");
    deepep::rdma::Random random(std::strtoull(arguments[1], nullptr, 10));
    Case group(random, std::atoi(arguments[2]), kMaxRanksHere, kMaxTokensHere);
    SharedMemory port(num_arguments == 4 ? arguments[3] : "");
    std::vector<Rank> ranks(group.num_ranks);
    for (int rank = 0; rank < group.num_ranks; ++rank)
        for (const auto& operation : group.operations) {
            const Place place{group.window, group.memories.data(), rank, group.num_ranks, 0, 1, Rule::kAll, &port};
            ranks[rank].blocks.push_back(std::make_unique<Block>(place, *operation, kShape));
            ranks[rank].warps.push_back(warps_of(*ranks[rank].blocks.back()));
            CHECK(ranks[rank].warps.back().size() == kNumWarps, "%zu warps", ranks[rank].warps.back().size());
        }
    std::vector<std::thread> threads;
    for (int rank = 0; rank < group.num_ranks; ++rank)
        for (int warp = 0; warp < kNumWarps; ++warp) threads.emplace_back(run_warp, std::ref(group), std::ref(ranks[rank]), rank, warp);
    for (std::thread& thread : threads) thread.join();
}
