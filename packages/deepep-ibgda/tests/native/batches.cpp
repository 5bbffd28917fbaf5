// Batches against a stream made up here: random moves, questions, and time that passes.
//
//   batches NUM_STEPS
#include <cstdlib>
#include <deque>
#include <vector>

#include "../../../deepep-core/tests/native/check.hpp"
#include "deepep/rdma/faults.hpp"
#include "provider/batches.hpp"

using deepep::ibgda::Batches;

namespace {

// Moves land in order, one at a time; the event has happened once all moves before it have landed.
struct Stream {
    uint64_t num_moves = 0, num_landed = 0, event_behind = 0, num_records = 0;
    void record() {
        event_behind = num_moves;
        ++num_records;
    }
    bool has_happened() const { return num_landed >= event_behind; }
};

bool look(Batches& batches, Stream& stream, uint64_t batch) {
    return batches.look(batch, [&] { stream.record(); }, [&] { return stream.has_happened(); });
}

void one_by_one() {
    Batches batches;
    Stream stream;
    CHECK(batches.last() == 0 && look(batches, stream, 0) && stream.num_records == 0, "without moves there is nothing to wait for");
    const auto move = [&] {
        ++stream.num_moves;
        batches.add_move();
        return batches.last();
    };
    const uint64_t first = move();
    CHECK(move() == first, "moves share a batch until somebody asks");
    CHECK(!look(batches, stream, first) && stream.num_records == 1, "under way");
    const uint64_t second = move();
    CHECK(second == first + 1 && !look(batches, stream, second) && stream.num_records == 1, "the event is in use");
    stream.num_landed = 1;
    CHECK(!look(batches, stream, first), "half of a batch");
    stream.num_landed = 2;
    CHECK(!look(batches, stream, second) && batches.has_landed(first), "the first has landed");
    CHECK(!look(batches, stream, second) && stream.num_records == 2, "now the event stands behind the second");
    stream.num_landed = 3;
    CHECK(look(batches, stream, second) && batches.last() == second, "both");
    const uint64_t third = move();
    stream.num_landed = stream.num_moves;
    batches.land_all();
    CHECK(batches.has_landed(third) && batches.last() == third && stream.num_records == 2, "after a wait nobody needs to ask");
    CHECK(!look(batches, stream, move()), "and the next move is under way again");
}

void at_random(uint64_t num_steps) {
    deepep::rdma::Random random(7);
    Batches batches;
    Stream stream;
    struct Asked {
        uint64_t batch, num_moves;
    };
    std::deque<Asked> open;
    uint64_t num_early = 0, num_answers = 0;
    for (uint64_t step = 0; step < num_steps; ++step) {
        switch (random.below(8)) {
            case 0:
            case 1:
                ++stream.num_moves;
                batches.add_move();
                open.push_back({batches.last(), stream.num_moves});
                break;
            case 2:
            case 3:
            case 4: stream.num_landed += stream.num_landed < stream.num_moves; break;
            case 5:
                if (random.chance(20000)) {
                    stream.num_landed = stream.num_moves;
                    batches.land_all();
                }
                break;
            default:
                if (open.empty()) break;
                const Asked& asked = open[random.below(static_cast<uint32_t>(open.size()))];
                if (look(batches, stream, asked.batch)) {
                    CHECK(stream.num_landed >= asked.num_moves, "step %llu: said to have landed too early", static_cast<unsigned long long>(step));
                    ++num_answers;
                } else {
                    num_early += stream.num_landed < asked.num_moves;
                }
                while (!open.empty() && batches.has_landed(open.front().batch)) {
                    CHECK(stream.num_landed >= open.front().num_moves, "an earlier batch has not landed");
                    open.pop_front();
                }
        }
    }
    // In the end everything is said to have landed, with two looks at most.
    stream.num_landed = stream.num_moves;
    CHECK(open.empty() || look(batches, stream, open.back().batch) || look(batches, stream, open.back().batch), "landed and not said so");
    CHECK(num_early > num_steps / 100 && num_answers > num_steps / 100 && stream.num_records > num_steps / 100, "little was asked");
    CHECK(stream.num_records < stream.num_moves, "an event for every move");
}

}  // namespace

int main(int num_arguments, char** arguments) {
    CHECK(num_arguments == 2, "usage: batches NUM_STEPS");
    one_by_one();
    at_random(std::strtoull(arguments[1], nullptr, 10));
}
