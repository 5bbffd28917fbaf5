// Random schedules of warps, blocks and the network, single-threaded: each seed is one schedule and replays exactly.
//
// The network is worse than any real one: it reads a put's bytes at any later time, delivers them in pieces, keeps no order between puts and
// words, only a put's signal comes behind its bytes, and behind what its warp has stored before. Ranks go from one operation to the next without
// waiting for each other. Blocks of a rank start in the order of their numbers, as many at once as happen to be resident. Ranks and single warps
// may be slow.
//
//   scheduled_streams FIRST_SEED NUM_SCHEDULES [RULE]      RULE: number of a rule that is broken; prints what happened, as "name count" lines
#include <cstdlib>

#include "deepep/rdma/faults.hpp"
#include "cases.hpp"

namespace {

using namespace streams;
using deepep::rdma::Random;

struct {
    uint64_t schedules, operations[2], few_slots, many_rows, reused, many_rows_reused, rows, empty;
    uint64_t many_blocks, one_block, teams, senders_alone, teams_one_by_one, skewed, no_tokens, node_without_rows, blocks_without_rows;
    uint64_t relieved_at_start, relieved_later, relieved_with_chunks, collectors, late_collectors, collecting_forwarders, direct_forwarders;  // blocks
} tally;

class Network final : public Port {
public:
    Network(Random& random, Rule broken) : random_(random), broken_(broken) {}
    void put(uint8_t* to, const uint8_t* from, int64_t num_bytes, uint64_t* word, uint64_t value) override {
        const bool is_signal_first = broken_ == Rule::kSignalBehindData;
        if (is_signal_first) set_word(word, value);
        under_way_.push_back({to, from, num_bytes, is_signal_first ? nullptr : word, value, nullptr, 0, false, {}});
    }
    void store(const void* warp, uint8_t* to, const uint8_t* from, int64_t num_bytes, uint64_t* word, uint64_t value) override {
        Move move{to, from, num_bytes, word, value, warp, ++num_stores_, random_.below(8) == 0, {}};
        if (broken_ != Rule::kStoresHaveRead) {
            move.stored.assign(from, from + num_bytes);
            move.from = move.stored.data();
        }
        under_way_.push_back(std::move(move));
    }
    void set_word(uint64_t* word, uint64_t value) override { under_way_.push_back({nullptr, nullptr, 0, word, value, nullptr, 0, false, {}}); }
    bool is_idle() const { return under_way_.empty(); }

    bool step() {
        if (under_way_.empty()) return false;
        size_t index = random_.below(static_cast<uint32_t>(under_way_.size()));
        if (under_way_[index].num_bytes == 0 && broken_ != Rule::kWordBehindParts) index = store_before(index);
        Move& move = under_way_[index];
        if (move.is_slow && random_.below(32) != 0) return true;
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
        if (index + 1 < under_way_.size()) std::swap(under_way_[index], under_way_.back());
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
        const void* warp;  // that has stored it; null: another agent reads the bytes
        uint64_t number;   // of the store
        bool is_slow;
        std::vector<uint8_t> stored;
    };
    // What a move's word has to wait for; the move itself, if it is nothing.
    size_t store_before(size_t index) const {
        const Move& move = under_way_[index];
        for (size_t other = 0; move.warp != nullptr && other < under_way_.size(); ++other)
            if (under_way_[other].warp == move.warp && under_way_[other].number < move.number) return store_before(other);
        return index;
    }

    Random& random_;
    const Rule broken_;
    uint64_t num_stores_ = 0;
    std::vector<Move> under_way_;
};

// One rank's kernel: blocks that run, and how many have started.
struct Kernel {
    struct Running {
        std::unique_ptr<Block> block;
        std::vector<std::unique_ptr<Warp>> warps;
        std::vector<uint32_t> slowness;  // of each warp
        bool is_over() const {
            for (const auto& warp : warps)
                if (!warp->is_over()) return false;
            return true;
        }
    };
    std::vector<Running> running;
    int num_started = 0;
};

class Schedule {
public:
    Schedule(uint64_t seed, Rule broken)
        : random_(seed), seed_(seed), broken_(broken), case_(random_, kNumOperations, kMaxRanksHere, kMaxTokensHere), network_(random_, broken) {
        num_blocks_ = 1 + random_.below(5);
        num_team_senders_ = random_.below(2) == 0 ? 0 : 1 + random_.below(3);
        answers_directly_ = random_.below(4) != 0;
        shape_ = {static_cast<int>(1 + random_.below(3)), static_cast<int>(1 + random_.below(3)), static_cast<int>(1 + random_.below(3)),
                  static_cast<int>(1 + random_.below(3)), random_.below(6) == 0 ? static_cast<int>(random_.below(40)) : 0, static_cast<int>(random_.below(20)), 0};
        const bool runs_one_block = random_.below(4) == 0;
        for (int rank = 0; rank < case_.num_ranks; ++rank) {
            num_resident_.push_back(runs_one_block ? 1 : 1 + random_.below(num_blocks_));
            slowness_.push_back(draw_slowness(3));
        }
        tally.one_block += runs_one_block && num_blocks_ > 1;
        tally.teams += num_team_senders_ > 0 && num_blocks_ > num_team_senders_;
        tally.senders_alone += num_team_senders_ > 0 && num_blocks_ % (num_team_senders_ + 1) != 0;
        tally.teams_one_by_one += runs_one_block && num_team_senders_ > 0 && num_blocks_ > num_team_senders_;
        network_share_ = 1 + random_.below(15);
        if (random_.below(3) != 0) shape_.num_late_steps = static_cast<int>(random_.below(30));
        current_.assign(case_.num_ranks, 0);
        kernels_.resize(case_.num_ranks);
    }

    void run() {
        for (int rank = 0; rank < case_.num_ranks; ++rank) start_blocks(rank);
        int num_idle = 0;
        int64_t num_steps = 0;
        while (num_over_ < case_.num_ranks) {
            CHECK(++num_steps < kMostSteps, "seed %llu: much moves and nothing ends (operation %u of rank 0)", static_cast<unsigned long long>(seed_), current_[0]);
            num_idle = one_step() ? 0 : num_idle + 1;
            // Nothing moves by itself: when nobody can do anything, nobody ever will.
            if (num_idle > kIdleSteps) {
                CHECK(sweep(), "seed %llu: nothing moves any more (operation %u of rank 0)", static_cast<unsigned long long>(seed_), current_[0]);
                num_idle = 0;
            }
        }
        CHECK(network_.is_idle(), "seed %llu: all kernels have ended and something is under way", static_cast<unsigned long long>(seed_));
        ++tally.schedules;
        for (const auto& operation : case_.operations) count(*operation);
    }

private:
    static constexpr int kNumOperations = 5, kMaxRanksHere = 4, kMaxTokensHere = 24, kIdleSteps = 64;
    static constexpr int64_t kMostSteps = 4'000'000;

    uint32_t draw_slowness(uint32_t one_of) { return random_.below(one_of) == 0 ? 1 + random_.below(30) : 0; }

    void count(const Operation& operation) const {
        const ChunkGeometry& geometry = operation.geometry;
        ++tally.operations[operation.is_combine];
        tally.few_slots += geometry.num_slots == 2 && geometry.num_slot_rows == 1;
        tally.many_rows += geometry.num_slot_rows > 1;
        tally.many_blocks += num_blocks_ > geometry.num_slots;
        uint64_t num_rows = 0, num_tokens = 0, most_tokens = 0;
        bool has_reused = false, has_rank_without_tokens = false, has_block_without_rows = false;
        for (int source = 0; source < case_.num_ranks; ++source) {
            const auto& heads = operation.heads[source];
            num_tokens += heads.size();
            most_tokens = max_of(most_tokens, heads.size());
            has_rank_without_tokens = has_rank_without_tokens || heads.empty();
            for (const auto& list : operation.tokens[source]) {
                num_rows += list.size();
                has_reused = has_reused || Stream::of(geometry, static_cast<int64_t>(list.size())).num_chunks() > geometry.num_slots;
            }
            // A block of tokens that asks for nothing, between others of its slot.
            const Stream stream = Stream::of(geometry, static_cast<int64_t>(heads.size()));
            for (int64_t tokens = geometry.num_slots; tokens + geometry.num_slots < stream.num_chunks(); ++tokens)
                has_block_without_rows = has_block_without_rows || !asks(operation, source, stream, tokens);
        }
        bool has_node_without_rows = false;
        for (const auto& rows : operation.first_rows) has_node_without_rows = has_node_without_rows || (num_rows > 0 && rows.back() == 0);
        tally.rows += num_rows;
        tally.empty += num_rows == 0;
        tally.reused += has_reused;
        tally.many_rows_reused += has_reused && geometry.num_slot_rows > 1;
        tally.skewed += num_tokens > 0 && most_tokens * 4 >= num_tokens * 3;
        tally.no_tokens += num_tokens > 0 && has_rank_without_tokens;
        tally.node_without_rows += has_node_without_rows;
        tally.blocks_without_rows += operation.is_combine && has_block_without_rows;
    }
    void count(const Block& block) const {
        if (!block.operation.is_combine) {
            tally.relieved_at_start += !block.delivers;
            tally.relieved_later += block.queue.is_over == kRelieved && block.queue.num_posted > 0;
            tally.relieved_with_chunks += block.num_held > 0;
            return;
        }
        const bool is_forwarder = block.role == BlockRole::kSender, is_collector = block.role == BlockRole::kDeliverer;
        tally.collectors += is_collector && block.collects;
        tally.late_collectors += is_collector && !block.collects;
        tally.collecting_forwarders += is_forwarder && block.collects;
        tally.direct_forwarders += is_forwarder && !block.collects && answers_directly_;
    }
    bool asks(const Operation& operation, int source, const Stream& stream, int64_t tokens) const {
        for (int64_t token = stream.first_row(tokens); token < stream.first_row(tokens) + stream.rows_of(tokens); ++token)
            for (int node = 0; node < case_.num_ranks; ++node)
                if (node != source && operation.heads[source][token][node] >= 0) return true;
        return false;
    }

    void start_blocks(int rank) {
        Kernel& kernel = kernels_[rank];
        Operation& operation = *case_.operations[current_[rank]];
        while (kernel.num_started < num_blocks_ && static_cast<int>(kernel.running.size()) < num_resident_[rank]) {
            const Place place{case_.window, case_.memories.data(), rank, case_.num_ranks, kernel.num_started, num_blocks_, num_team_senders_, answers_directly_,
                              broken_, Order::kAll, &network_, &case_.words[rank]};
            auto block = std::make_unique<Block>(place, operation, shape_);
            auto warps = warps_of(*block);
            std::vector<uint32_t> slowness;
            for (size_t warp = 0; warp < warps.size(); ++warp) slowness.push_back(draw_slowness(6));
            kernel.running.push_back({std::move(block), std::move(warps), std::move(slowness)});
            ++kernel.num_started;
        }
    }
    // Ends blocks and operations of a rank.
    bool end_what_is_over(int rank) {
        Kernel& kernel = kernels_[rank];
        const Operation& operation = *case_.operations[current_[rank]];
        bool has_ended = false;
        for (size_t i = 0; i < kernel.running.size();)
            if (kernel.running[i].is_over()) {
                count(*kernel.running[i].block);
                kernel.running.erase(kernel.running.begin() + static_cast<long>(i));
                has_ended = true;
            } else {
                ++i;
            }
        if (!has_ended) return false;
        if (kernel.running.empty() && kernel.num_started == num_blocks_) {
            check_arrivals(operation, rank);
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
        if (is_late(slowness_[rank])) return false;
        Kernel& kernel = kernels_[rank];
        Kernel::Running& block = kernel.running[random_.below(static_cast<uint32_t>(kernel.running.size()))];
        const uint32_t warp = random_.below(static_cast<uint32_t>(block.warps.size()));
        if (is_late(block.slowness[warp])) return false;
        const bool has_moved = step(*block.warps[warp]);
        return end_what_is_over(rank) || has_moved;
    }
    bool is_late(uint32_t slowness) { return slowness > 0 && random_.below(slowness + 1) != 0; }
    static bool step(Warp& warp) { return !warp.is_over() && warp.step(); }
    // Whatever can move first, from any rank on.
    bool sweep() {
        if (network_.step()) return true;
        const uint32_t first = random_.below(case_.num_ranks);
        for (int other = 0; other < case_.num_ranks; ++other) {
            const int rank = static_cast<int>(first + other) % case_.num_ranks;
            if (current_[rank] == case_.operations.size()) continue;
            for (Kernel::Running& block : kernels_[rank].running)
                for (const auto& warp : block.warps)
                    for (int i = 0; i < kStepsOfPass; ++i)
                        if (step(*warp)) {
                            end_what_is_over(rank);
                            return true;
                        }
        }
        return false;
    }

    Random random_;
    const uint64_t seed_;
    const Rule broken_;
    Case case_;
    Network network_;
    int num_blocks_, num_team_senders_, num_over_ = 0;
    bool answers_directly_;
    Block::Shape shape_;
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
    print("slots of several rows used again", tally.many_rows_reused);
    print("rows", tally.rows);
    print("without rows", tally.empty);
    print("more blocks than slots", tally.many_blocks);
    print("one block at a time", tally.one_block);
    print("teams of blocks", tally.teams);
    print("senders without a deliverer", tally.senders_alone);
    print("teams, one block at a time", tally.teams_one_by_one);
    print("most tokens at one rank", tally.skewed);
    print("a rank without tokens", tally.no_tokens);
    print("a node without rows", tally.node_without_rows);
    print("blocks of tokens without rows", tally.blocks_without_rows);
    print("senders relieved when they begin", tally.relieved_at_start);
    print("senders relieved amid chunks", tally.relieved_later);
    print("senders relieved with chunks to deliver", tally.relieved_with_chunks);
    print("collectors", tally.collectors);
    print("collectors that come too late", tally.late_collectors);
    print("forwarders that collect", tally.collecting_forwarders);
    print("forwarders that answer directly", tally.direct_forwarders);
}
