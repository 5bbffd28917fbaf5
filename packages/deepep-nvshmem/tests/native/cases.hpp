#pragma once
// Groups and operations drawn at random, and the warps of a block.
#include "combine_warps.hpp"
#include "dispatch_warps.hpp"

namespace streams {

// Which nodes hold the tokens of one operation.
template <class Random>
class Routing {
public:
    Routing(Random& random, int num_ranks)
        : random_(random), kind_(static_cast<Kind>(random.below(kNumKinds))), only_(random.below(num_ranks)), chance_(1 + random.below(7)) {}
    void begin_token(int token) {
        if (token != 0 && num_left_of_run_-- > 0) return;
        num_left_of_run_ = static_cast<int>(random_.below(6));
        is_run_held_ = random_.below(2) != 0;
    }
    bool goes_to(int node) {
        const bool is_chosen = node == static_cast<int>(only_), is_lucky = random_.below(8) < chance_;
        switch (kind_) {
            case kEverywhere: return true;
            case kOneNode: return is_chosen;
            case kAllButOne: return !is_chosen && is_lucky;
            case kRuns: return is_run_held_ && is_lucky;
            default: return is_lucky;
        }
    }

private:
    // Runs: no other node holds anything of some tokens that follow each other.
    enum Kind { kEverywhere, kOneNode, kAllButOne, kRuns, kByChance, kNumKinds };

    Random& random_;
    const Kind kind_;
    const uint32_t only_, chance_;
    int num_left_of_run_ = 0;
    bool is_run_held_ = false;
};

struct Case {
    int num_ranks;
    NetworkWindow window;
    std::vector<std::unique_ptr<uint64_t[]>> storage;
    std::vector<uint8_t*> memories;
    std::vector<DeviceWords> words;
    std::vector<std::unique_ptr<Operation>> operations;

    template <class Random>
    Case(Random& random, int num_operations, int max_ranks, int max_tokens) {
        num_ranks = 2 + random.below(max_ranks - 1);
        const int64_t row_bytes = 16 * (1 + random.below(40));
        const int num_topk = random.below(9);
        const DispatchMessage sent{row_bytes, static_cast<int>(random.below(6)), num_topk, static_cast<int>(1 + random.below(8)), random.below(2) != 0};
        const CombineMessage answered{row_bytes, num_topk};
        const int64_t least = 2 * max_of(sent.num_bytes(), answered.num_bytes());
        const int64_t num_ring_bytes = random.below(3) == 0 ? least : least + random.below(static_cast<uint32_t>(least * 24));
        const int64_t num_chunk_bytes = random.below(2) == 0 ? 0 : random.below(static_cast<uint32_t>(4 * least));
        window = NetworkWindow::of(num_ranks, num_ranks, static_cast<int>(random.below(5)), num_ring_bytes);
        for (int rank = 0; rank < num_ranks; ++rank) {
            storage.push_back(std::make_unique<uint64_t[]>(window.num_bytes() / 8));
            memories.push_back(reinterpret_cast<uint8_t*>(storage.back().get()));
            words.emplace_back(num_ranks);
        }
        // Near the places where epochs of 24 and 32 bits wrap, now and then.
        constexpr uint32_t kStarts[] = {1, 0xFFFFFE, 0xFFFFFFFE, 77};
        uint32_t epochs[2] = {kStarts[random.below(4)], kStarts[random.below(4)]};
        for (int index = 0; index < num_operations; ++index) {
            const bool is_combine = random.below(2) != 0;
            const ChunkGeometry geometry = ChunkGeometry::of(window.num_ring_bytes, is_combine ? answered.num_bytes() : sent.num_bytes(), num_chunk_bytes,
                                                             ChunkGeometry::most_slots(is_combine, num_ranks));
            CHECK(geometry.is_usable(), "two rows fit");
            // Slots of several rows are at least 16.
            const std::vector<int> num_tokens = draw_num_tokens(random, geometry.num_slot_rows > 1 && random.below(3) == 0 ? 4 * max_tokens : max_tokens);
            std::vector<std::vector<std::vector<int32_t>>> tokens(num_ranks, std::vector<std::vector<int32_t>>(num_ranks));
            Routing<Random> routing(random, num_ranks);
            for (int rank = 0; rank < num_ranks; ++rank)
                for (int token = 0; token < num_tokens[rank]; ++token) {
                    routing.begin_token(token);
                    for (int node = 0; node < num_ranks; ++node)
                        if (routing.goes_to(node)) tokens[rank][node].push_back(token);
                }
            operations.push_back(std::make_unique<Operation>(
                Operation::of(is_combine, index, epochs[is_combine]++, geometry, num_ranks, std::move(tokens), num_tokens)));
        }
    }

private:
    // Any number up to the most; or one rank has many and the others have few.
    template <class Random>
    std::vector<int> draw_num_tokens(Random& random, int max_tokens) const {
        const bool is_skewed = random.below(4) == 0;
        const uint32_t busiest = random.below(num_ranks);
        std::vector<int> num_tokens;
        for (uint32_t rank = 0; rank < static_cast<uint32_t>(num_ranks); ++rank) {
            if (is_skewed)
                num_tokens.push_back(rank == busiest ? max_tokens : random.below(3));
            else
                num_tokens.push_back(random.below(4) == 0 ? 0 : random.below(max_tokens + 1));
        }
        return num_tokens;
    }
};

inline std::vector<std::unique_ptr<Warp>> warps_of(Block& block) {
    std::vector<std::unique_ptr<Warp>> warps;
    for (int number = 0; number < block.shape.num_receiving_warps + block.shape.num_sending_warps + 1; ++number) {
        if (block.operation.is_combine)
            warps.push_back(std::make_unique<CombineWarp>(block, number));
        else
            warps.push_back(std::make_unique<DispatchWarp>(block, number));
    }
    return warps;
}

}  // namespace streams
