// The same warps as threads, over memory that they share: what a warp reads was released to it by a word, or ThreadSanitizer says so. A put
// copies at once, as it does over NVLink. With an even seed a rank has one block; with an odd one a team of two: one that sends and one that
// delivers, one that forwards and one that collects. With every fourth seed forwarders answer directly.
//
//   threaded_streams SEED NUM_OPERATIONS [ORDER]      ORDER: number of an order that is left out
#include <atomic>
#include <chrono>
#include <cstdlib>
#include <thread>

#include "deepep/rdma/faults.hpp"
#include "cases.hpp"

namespace {

using namespace streams;

constexpr int kMaxRanksHere = 3, kMaxTokensHere = 40;
constexpr Block::Shape kShape{2, 2, 2, 2, 0, 100, 0};
constexpr int kNumWarps = 5;  // of a block, with the one that gives credits back and looks for chunks, or posts
constexpr auto kPatience = std::chrono::seconds(250);  // of the whole program; what stands still does so for ever

class SharedMemory final : public Port {
public:
    explicit SharedMemory(Order omitted) : omitted_(omitted) {}
    void put(uint8_t* to, const uint8_t* from, int64_t num_bytes, uint64_t* word, uint64_t value) override {
        memcpy(to, from, num_bytes);
        if (word != nullptr) set(word, value, Order::kSignals);
    }
    void store(const void*, uint8_t* to, const uint8_t* from, int64_t num_bytes, uint64_t* word, uint64_t value) override { put(to, from, num_bytes, word, value); }
    void set_word(uint64_t* word, uint64_t value) override { set(word, value, Order::kWords); }

private:
    void set(uint64_t* word, uint64_t value, Order order) const { __atomic_store_n(word, value, omitted_ == order ? __ATOMIC_RELAXED : __ATOMIC_RELEASE); }
    const Order omitted_;
};

// Warps of one rank end an operation together: the end of a kernel.
struct KernelEnd {
    std::atomic<int> num_arrived{0};
    std::atomic<uint32_t> num_ended{0};
};

// One rank: the blocks and the warps of each operation.
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
        if (end.num_arrived.fetch_add(1, std::memory_order_acq_rel) + 1 == static_cast<int>(own.warps[index].size())) {
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
    CHECK(num_arguments == 3 || num_arguments == 4, "usage: threaded_streams SEED NUM_OPERATIONS [ORDER]");
    const uint64_t seed = std::strtoull(arguments[1], nullptr, 10);
    const int num_team_senders = static_cast<int>(seed % 2), num_blocks = 1 + num_team_senders;
    deepep::rdma::Random random(seed);
    Case group(random, std::atoi(arguments[2]), kMaxRanksHere, kMaxTokensHere);
    const Order omitted = num_arguments == 4 ? static_cast<Order>(std::atoi(arguments[3])) : Order::kAll;
    SharedMemory port(omitted);
    std::vector<Rank> ranks(group.num_ranks);
    for (int rank = 0; rank < group.num_ranks; ++rank)
        for (const auto& operation : group.operations) {
            std::vector<std::unique_ptr<Warp>> warps;
            for (int number = 0; number < num_blocks; ++number) {
                const Place place{group.window, group.memories.data(), rank, group.num_ranks, number, num_blocks, num_team_senders, seed % 4 == 1,
                                  Rule::kAll, omitted, &port, &group.words[rank]};
                ranks[rank].blocks.push_back(std::make_unique<Block>(place, *operation, kShape));
                for (auto& warp : warps_of(*ranks[rank].blocks.back())) warps.push_back(std::move(warp));
            }
            CHECK(static_cast<int>(warps.size()) == num_blocks * kNumWarps, "%zu warps", warps.size());
            ranks[rank].warps.push_back(std::move(warps));
        }
    std::vector<std::thread> threads;
    for (int rank = 0; rank < group.num_ranks; ++rank)
        for (int warp = 0; warp < num_blocks * kNumWarps; ++warp) threads.emplace_back(run_warp, std::ref(group), std::ref(ranks[rank]), rank, warp);
    for (std::thread& thread : threads) thread.join();
}
