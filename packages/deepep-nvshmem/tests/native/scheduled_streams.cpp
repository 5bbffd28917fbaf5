// Random schedules of warps, blocks and the network, single-threaded: each seed is one schedule and replays exactly.
//
// The network is worse than any real one: it reads a put's bytes at any later time, delivers them in pieces, keeps no order between puts and
// words, only a put's signal comes behind its bytes. Ranks go from one operation to the next without waiting for each other. Blocks of a rank
// start in the order of their numbers, as many at once as happen to be resident.
//
//   scheduled_streams FIRST_SEED NUM_SCHEDULES [RULE]      RULE: number of a rule that is broken; prints what happened, as "name count" lines
#include <cstdlib>

#include "deepep/rdma/faults.hpp"
#include "streams.hpp"

namespace {

using namespace streams;
using deepep::rdma::Random;

struct {
    uint64_t schedules, operations[2], few_slots, many_rows, reused, rows, empty;
} tally;

class Network final : public Port {
public:
    Network(Random& random, Rule broken) : random_(random), is_signal_first_(broken == Rule::kSignalBehindData) {}
    void put(uint8_t* to, const uint8_t* from, int64_t num_bytes, uint64_t* word, uint64_t value) override {
        if (is_signal_first_) set_word(word, value);
        under_way_.push_back({to, from, num_bytes, is_signal_first_ ? nullptr : word, value});
    }
    void set_word(uint64_t* word, uint64_t value) override { under_way_.push_back({nullptr, nullptr, 0, word, value}); }
    bool is_idle() const { return under_way_.empty(); }

    bool step() {
        if (under_way_.empty()) return false;
        const size_t index = random_.below(static_cast<uint32_t>(under_way_.size()));
        Move& move = under_way_[index];
        if (move.num_bytes > 0) {
            const int64_t piece = min_of(move.num_bytes, 8 * (1 + random_.below(40)));
            memcpy(move.to, move.from, piece);
            move.to += piece;
            move.from += piece;
            move.num_bytes -= piece;
            if (move.num_bytes > 0 || move.word != nullptr) return true;
        } else {
            *move.word = move.value;
        }
        under_way_[index] = under_way_.back();
        under_way_.pop_back();
        return true;
    }

private:
    struct Move {
        uint8_t* to;
        const uint8_t* from;
        int64_t num_bytes;
        uint64_t* word;
        uint64_t value;
    };
    Random& random_;
    const bool is_signal_first_;
    std::vector<Move> under_way_;
};

// One rank's kernel: blocks that run, and how many have ended.
struct Kernel {
    struct Block {
        std::vector<std::unique_ptr<Warp>> warps;
        bool is_over() const {
            for (const auto& warp : warps)
                if (!warp->is_over()) return false;
            return true;
        }
    };
    std::vector<Block> running;
    int num_started = 0;
};

class Schedule {
public:
    Schedule(uint64_t seed, Rule broken)
        : random_(seed), seed_(seed), broken_(broken), case_(random_, kNumOperations, kMaxRanksHere, kMaxTokensHere), network_(random_, broken) {
        num_blocks_ = 1 + random_.below(4);
        num_warps_ = 1 + random_.below(3);
        for (int rank = 0; rank < case_.num_ranks; ++rank) {
            num_resident_.push_back(1 + random_.below(num_blocks_));
            slowness_.push_back(random_.below(3) == 0 ? 1 + random_.below(30) : 0);
        }
        network_share_ = 1 + random_.below(15);
        current_.assign(case_.num_ranks, 0);
        kernels_.resize(case_.num_ranks);
    }

    void run() {
        for (int rank = 0; rank < case_.num_ranks; ++rank) start_blocks(rank);
        int num_idle = 0;
        while (num_over_ < case_.num_ranks) {
            num_idle = one_step() ? 0 : num_idle + 1;
            // Nothing moves by itself: when nobody can do anything, nobody ever will.
            if (num_idle > kIdleSteps) {
                CHECK(sweep(), "seed %llu: nothing moves any more (operation %u of rank 0)", static_cast<unsigned long long>(seed_), current_[0]);
                num_idle = 0;
            }
        }
        CHECK(network_.is_idle(), "seed %llu: all kernels have ended and something is under way", static_cast<unsigned long long>(seed_));
        ++tally.schedules;
        for (const auto& operation : case_.operations) {
            ++tally.operations[operation->is_combine];
            tally.few_slots += operation->geometry.num_slots == 2 && operation->geometry.num_slot_rows == 1;
            tally.many_rows += operation->geometry.num_slot_rows > 1;
            uint64_t num_rows = 0;
            bool has_reused = false;
            for (const auto& source : operation->tokens)
                for (const auto& list : source) {
                    num_rows += list.size();
                    has_reused = has_reused || Stream::of(operation->geometry, static_cast<int64_t>(list.size())).num_chunks() > operation->geometry.num_slots;
                }
            tally.rows += num_rows;
            tally.empty += num_rows == 0;
            tally.reused += has_reused;
        }
    }

private:
    static constexpr int kNumOperations = 5, kMaxRanksHere = 4, kMaxTokensHere = 24, kIdleSteps = 64;

    void start_blocks(int rank) {
        Kernel& kernel = kernels_[rank];
        Operation& operation = *case_.operations[current_[rank]];
        while (kernel.num_started < num_blocks_ && static_cast<int>(kernel.running.size()) < num_resident_[rank]) {
            const Place place{case_.window, case_.memories.data(), rank, case_.num_ranks, kernel.num_started, num_blocks_, broken_, &network_};
            kernel.running.push_back({warps_of(place, operation, num_warps_)});
            ++kernel.num_started;
        }
    }
    // Ends blocks and operations of a rank.
    bool end_what_is_over(int rank) {
        Kernel& kernel = kernels_[rank];
        bool has_ended = false;
        for (size_t i = 0; i < kernel.running.size();)
            if (kernel.running[i].is_over()) {
                kernel.running.erase(kernel.running.begin() + static_cast<long>(i));
                has_ended = true;
            } else {
                ++i;
            }
        if (!has_ended) return false;
        if (kernel.running.empty() && kernel.num_started == num_blocks_) {
            check_arrivals(*case_.operations[current_[rank]], rank);
            kernel.num_started = 0;
            if (++current_[rank] == case_.operations.size()) {
                ++num_over_;
                return true;
            }
        }
        start_blocks(rank);
        return true;
    }

    bool one_step() {
        if (random_.below(16) < network_share_) return network_.step();
        const int rank = static_cast<int>(random_.below(case_.num_ranks));
        if (current_[rank] == case_.operations.size()) return false;
        if (slowness_[rank] > 0 && random_.below(slowness_[rank] + 1) != 0) return false;
        Kernel& kernel = kernels_[rank];
        Kernel::Block& block = kernel.running[random_.below(static_cast<uint32_t>(kernel.running.size()))];
        const bool has_moved = block.warps[random_.below(static_cast<uint32_t>(block.warps.size()))]->step();
        return end_what_is_over(rank) || has_moved;
    }
    bool sweep() {
        bool has_moved = network_.step();
        for (int rank = 0; rank < case_.num_ranks; ++rank) {
            if (current_[rank] == case_.operations.size()) continue;
            for (Kernel::Block& block : kernels_[rank].running)
                for (const auto& warp : block.warps) has_moved = warp->step() || has_moved;
            has_moved = end_what_is_over(rank) || has_moved;
        }
        return has_moved;
    }

    Random random_;
    const uint64_t seed_;
    const Rule broken_;
    Case case_;
    Network network_;
    int num_blocks_, num_warps_, num_over_ = 0;
    uint32_t network_share_;
    std::vector<int> num_resident_;
    std::vector<uint32_t> slowness_, current_;
    std::vector<Kernel> kernels_;
};

}  // namespace

int main(int num_arguments, char** arguments) {
    CHECK(num_arguments == 3 || num_arguments == 4, "usage: scheduled_streams FIRST_SEED NUM_SCHEDULES [RULE]");
    const uint64_t first = std::strtoull(arguments[1], nullptr, 10), count = std::strtoull(arguments[2], nullptr, 10);
    const Rule broken = num_arguments == 4 ? static_cast<Rule>(std::atoi(arguments[3])) : Rule::kAll;
    for (uint64_t seed = first; seed < first + count; ++seed) Schedule(seed, broken).run();
    const auto print = [](const char* name, uint64_t value) { std::printf("%s\t%llu\n", name, static_cast<unsigned long long>(value)); };
    print("schedules", tally.schedules);
    print("dispatches", tally.operations[0]);
    print("combines", tally.operations[1]);
    print("two slots of one row", tally.few_slots);
    print("several rows in a slot", tally.many_rows);
    print("slots used again", tally.reused);
    print("rows", tally.rows);
    print("without rows", tally.empty);
}
