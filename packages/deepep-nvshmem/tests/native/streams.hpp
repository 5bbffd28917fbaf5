#pragma once
// The streams between nodes as the kernels run them, on the host: what each warp does, cut into steps, over the memory that window.hpp lays
// out and the tables that a block's warps share. One rank per node: ranks of different local numbers never meet on the network.
//
// Rows are stamped with operation, ends and row number when they are packed; whoever takes a row checks its stamp. So a row that is missing,
// comes twice, lies elsewhere, or was overwritten too early shows.
#include <cstring>
#include <memory>
#include <utility>
#include <vector>

#include "../../../deepep-core/tests/native/check.hpp"
#include "internode/window.hpp"

namespace streams {

using namespace deepep;
using namespace deepep::internode;

// Rules of the protocol that can be broken on purpose.
enum class Rule : int {
    kAll = 0,                  // all are kept
    kWaitForCredit,            // a sender waits for the credit of the slot's last chunk
    kCreditBehindLoads,        // credit is asked for after the chunk has been read
    kDrain,                    // senders end after their last credits
    kRequestBehindResult,      // a block is finished, and its slot asked for again, after the slot has been read
    kLastBehindResult,         // the same for the last block of a slot: the last word of a context comes after its last answer has been read
    kLastForAll,               // contexts that never asked get a last word, too
    kServeOnce,                // forwarders act on each request once
    kNeverWaitForOne,          // a warp that forwards looks at all contexts of its block
    kSameBlockServesSlot,      // both ends of a slot belong to blocks of the same number
    kSignalBehindData,         // the network delivers a put's signal after its bytes
    kClaimSends,               // one warp sends a chunk: the one that has swapped its entry
    kClaimDeliveries,          // one warp delivers a chunk: the one that has swapped its entry
    kClaimRequests,            // one warp serves a request: the one that has swapped the word
    kEndBehindLastChunk,       // a deliver warp ends when no chunk is left to open, not when none is there
    kReadEndFirst,             // the credit warp reads that the deliver warps have ended before it looks for their last credits
    kFinishInOrder,            // blocks of a slot are finished in their order, also those that wait for no answer
    kTableBeforeWord,          // a forward warp reads what has been served before it reads the request
    kRequestsOutlastSources,   // the request warp goes on behind the last source warp while it can ask
    kDeliverUntilRelieved,     // a sender delivers until its team's deliverer has begun
    kKeepWhatIsHeld,           // a sender's warp that is relieved delivers what it has claimed
    kEntryOfThisOperation,     // an entry of another operation stands for the first chunk of its slot
    kNumRules,
};

// How words and bytes get to other ranks, and words to other warps of a block.
struct Port {
    virtual ~Port() = default;
    virtual void put(uint8_t* to, const uint8_t* from, int64_t num_bytes, uint64_t* word, uint64_t value) = 0;
    virtual void set_word(uint64_t* word, uint64_t value) = 0;
    // In the block's shared memory, behind a fence of the block.
    virtual void publish(int32_t* shared, int32_t value) = 0;
};

// Plain words are looked at without order; what a warp acts upon, it acquires.
template <class T>
T peek(const T* word) {
    return __atomic_load_n(word, __ATOMIC_RELAXED);
}
template <class T>
T acquire(const T* word) {
    return __atomic_load_n(word, __ATOMIC_ACQUIRE);
}
template <class T>
void poke(T* shared, T value) {
    __atomic_store_n(shared, value, __ATOMIC_RELAXED);
}

// One operation of the whole group. Every rank knows the tables below from the counts (dispatch) or from its handle (combine).
struct Operation {
    bool is_combine;
    uint32_t index;  // of all operations
    uint32_t epoch;  // of those of its kind
    ChunkGeometry geometry;
    std::vector<std::vector<std::vector<int32_t>>> heads;   // [source][token][node]: row at the forwarder, or -1 (send_rdma_head)
    std::vector<std::vector<std::vector<int32_t>>> tokens;  // [source][node]: tokens that go there, ascending
    std::vector<std::vector<int32_t>> first_rows;           // [forwarder][source], and the end
    std::vector<std::vector<std::vector<uint8_t>>> arrivals;  // [source][node][i]: how often the i-th row arrived

    static Operation of(bool is_combine, uint32_t index, uint32_t epoch, const ChunkGeometry& geometry, int num_ranks,
                        std::vector<std::vector<std::vector<int32_t>>> tokens, const std::vector<int>& num_tokens) {
        Operation operation{is_combine, index, epoch, geometry, {}, std::move(tokens), {}, {}};
        operation.first_rows.assign(num_ranks, {0});
        operation.arrivals.resize(num_ranks);
        for (int source = 0; source < num_ranks; ++source) {
            operation.heads.emplace_back(num_tokens[source], std::vector<int32_t>(num_ranks, -1));
            for (int node = 0; node < num_ranks; ++node) {
                const std::vector<int32_t>& list = operation.tokens[source][node];
                const int32_t first = operation.first_rows[node].back();
                for (size_t i = 0; i < list.size(); ++i) operation.heads[source][list[i]][node] = first + static_cast<int32_t>(i);
                operation.first_rows[node].push_back(first + static_cast<int32_t>(list.size()));
                operation.arrivals[source].emplace_back(list.size(), 0);
            }
        }
        return operation;
    }

    // A row between two ranks; `row` counts the rows of that pair.
    uint64_t stamp(int source, int node, int64_t row) const {
        return ((index + 1) * 0x9E3779B97F4A7C15ull) ^ (static_cast<uint64_t>(source) << 56 | static_cast<uint64_t>(node) << 48 | static_cast<uint64_t>(row + 1));
    }
    void write(uint8_t* message, int source, int node, int64_t row) const {
        const uint64_t value = stamp(source, node, row);
        for (int64_t byte = 0; byte < geometry.num_message_bytes; byte += 8) memcpy(message + byte, &value, 8);
    }
    void take(const uint8_t* message, int source, int node, int64_t row) {
        const uint64_t expected = stamp(source, node, row);
        for (int64_t byte = 0; byte < geometry.num_message_bytes; byte += 8) {
            uint64_t value;
            memcpy(&value, message + byte, 8);
            CHECK(value == expected, "operation %u (%s): row %lld of source %d, node %d is not in its place", index, is_combine ? "combine" : "dispatch",
                  static_cast<long long>(row), source, node);
        }
        ++arrivals[source][node][row];
    }
};

// What the blocks of one rank share in device memory, from one operation to the next.
struct DeviceWords {
    std::vector<uint64_t> next_chunks;       // of each slot and other node: what is expected, {epoch, chunk + 1}
    std::vector<uint64_t> deliverers_begun;  // of each team, {epoch, 1}

    explicit DeviceWords(int num_ranks) : next_chunks(static_cast<size_t>(kMaxSlots) * (num_ranks - 1), 0), deliverers_begun(kMaxSlots, 0) {}
};

// Who runs: a block of one rank in one operation. `num_team_senders`: BlockPlaces.
struct Place {
    NetworkWindow window;
    uint8_t* const* memories;  // of all ranks
    int rank;
    int num_ranks;
    int block;
    int num_blocks;
    int num_team_senders;
    Rule broken;
    Port* port;
    DeviceWords* words;

    uint8_t* own() const { return memories[rank]; }
    bool keeps(Rule rule) const { return broken != rule; }
    // The same word or ring in a peer's memory.
    template <class T>
    T* at(int peer, T* address) const {
        return reinterpret_cast<T*>(memories[peer] + (reinterpret_cast<uint8_t*>(address) - own()));
    }
    // Whether this warp is the one that has the work that the word names.
    template <class T>
    bool claim(T* shared, T expected, T desired, Rule rule) const {
        if (keeps(rule)) return __atomic_compare_exchange_n(shared, &expected, desired, false, __ATOMIC_RELAXED, __ATOMIC_RELAXED);
        poke(shared, desired);
        return true;
    }
};

struct Context {
    int node, slot;
};

// What a context carries next is a chunk's number, or one of these.
constexpr int32_t kTaken = -2, kOver = -1;

// A block's contexts, and what its warps share; all that is not named otherwise is zero at the start.
struct Block {
    struct Shape {
        int num_sending_warps;    // send or source warps
        int num_receiving_warps;  // deliver or forward warps
        int num_stages;           // rows that a deliver warp has under way at once
    };
    const Place place;
    Operation& operation;
    const Shape shape;
    std::vector<int> slots;                     // of one ring
    std::vector<Context> sending, receiving;    // slot by slot; of senders and sources, of forwarders
    // Dispatch.
    BlockRole role = BlockRole::kBoth;
    int team = 0;
    std::vector<int32_t> next_sent;  // of each context: what goes into its slot next; at the start the slot
    std::vector<int32_t> credits;    // of each context: chunk + 1 that has been read
    int32_t num_deliverers_left = 0;
    // Combine.
    std::vector<uint64_t> served;   // of each context: the newest word that a warp has acted upon
    std::vector<int32_t> finished;  // of each slot: blocks of tokens that have been added up
    int32_t num_taken = 0;          // blocks of tokens that warps have taken
    int32_t num_sources_ended = 0;

    Block(const Place& where, Operation& what, const Shape& warps) : place(where), operation(what), shape(warps), num_deliverers_left(warps.num_receiving_warps) {
        const int num_slots = operation.geometry.num_slots;
        const int num_senders = operation.is_combine ? 0 : place.num_team_senders, num_places = BlockPlaces::num_places(place.num_blocks, num_senders);
        const BlockPlaces places = BlockPlaces::of(place.block, num_senders);
        role = places.role;
        team = num_senders == 0 ? 0 : places.team(num_senders);
        for (int i = 0; i < places.num_own_slots(num_slots, num_places, num_senders); ++i) {
            const int slot = places.slot_of(i, num_places, num_senders);
            CHECK(slot < num_slots, "slot %d of %d", slot, num_slots);
            if (place.keeps(Rule::kSameBlockServesSlot)) add(receiving, slot);
            if (role == BlockRole::kDeliverer) continue;
            slots.push_back(slot);
            add(sending, slot);
        }
        if (!place.keeps(Rule::kSameBlockServesSlot)) {
            const BlockPlaces others = BlockPlaces::of((place.block + 1) % place.num_blocks, num_senders);
            for (int i = 0; i < others.num_own_slots(num_slots, num_places, num_senders); ++i) add(receiving, others.slot_of(i, num_places, num_senders));
        }
        for (const Context& context : sending) next_sent.push_back(context.slot);
        credits.assign(receiving.size(), 0);
        served.assign(receiving.size(), 0);
        finished.assign(slots.size(), 0);
    }

    Stream sent(int node) const { return Stream::of(operation.geometry, static_cast<int64_t>(operation.tokens[place.rank][node].size())); }
    Stream received(int node) const {
        return Stream::of(operation.geometry, operation.first_rows[place.rank][node + 1] - operation.first_rows[place.rank][node]);
    }
    // Of a receiving context.
    uint64_t* entry(int index) const {
        const auto [node, slot] = receiving[index];
        return &place.words->next_chunks[static_cast<size_t>(slot) * (place.num_ranks - 1) + (node + place.num_ranks - place.rank - 1) % place.num_ranks];
    }
    // What an entry says that is expected.
    int32_t chunk_of(uint64_t entry, int slot) const {
        const int32_t named = static_cast<int32_t>(signal_value(entry)) - 1;
        return (signal_epoch(entry) == operation.epoch || !place.keeps(Rule::kEntryOfThisOperation)) && named >= 0 ? named : slot;
    }
    int64_t message_offset(int slot, int row) const { return operation.geometry.slot_offset(slot) + row * operation.geometry.num_message_bytes; }

private:
    void add(std::vector<Context>& contexts, int slot) const {
        for (int other = 1; other < place.num_ranks; ++other) contexts.push_back({(place.rank + other) % place.num_ranks, slot});
    }
};

class Warp {
public:
    explicit Warp(Block& block) : block_(block), place_(block.place), operation_(block.operation) {}
    virtual ~Warp() = default;
    virtual bool step() = 0;  // whether anything happened
    bool is_over() const { return is_over_; }

protected:
    bool end() { return is_over_ = true; }

    Block& block_;
    const Place& place_;
    Operation& operation_;

private:
    bool is_over_ = false;
};

// The one warp of a block that makes its fences for the whole system: it passes over all contexts and does what the other warps have made due,
// until it has done all, or they have ended.
class FencingWarp : public Warp {
public:
    static constexpr int kStepsOfPass = 5;  // the rest of one that began too early, and one that finds something or ends the warp

    using Warp::Warp;
    bool step() final {
        switch (phase_) {
            case Phase::kBegin:
                is_last_pass_ = have_others_ended();
                phase_ = Phase::kLook;
                return false;
            case Phase::kLook:
                due_ = look();
                has_work_ = !due_.empty();
                phase_ = Phase::kWork;
                return has_work_;
            default:
                if (!due_.empty()) {
                    work(due_.back());
                    due_.pop_back();
                    return true;
                }
                phase_ = Phase::kBegin;
                if (!place_.keeps(Rule::kReadEndFirst)) is_last_pass_ = have_others_ended();
                return ends(is_last_pass_, has_work_) && end();
        }
    }

protected:
    struct Due {
        int index;  // of the context
        int32_t value;
    };
    virtual bool have_others_ended() const = 0;
    virtual std::vector<Due> look() const = 0;
    virtual void work(const Due& due) = 0;
    virtual bool ends(bool is_last_pass, bool had_work) const = 0;

private:
    enum class Phase { kBegin, kLook, kWork };
    Phase phase_ = Phase::kBegin;
    bool is_last_pass_ = false, has_work_ = false;
    std::vector<Due> due_;
};

// What one rank received is complete when its part of the operation has ended.
inline void check_arrivals(const Operation& operation, int rank) {
    for (size_t other = 0; other < operation.tokens.size(); ++other) {
        const auto& rows = operation.is_combine ? operation.arrivals[rank][other] : operation.arrivals[other][rank];
        if (static_cast<int>(other) == rank) continue;
        for (size_t row = 0; row < rows.size(); ++row)
            CHECK(rows[row] == 1, "operation %u: row %zu between ranks %d and %zu arrived %d times", operation.index, row, rank, other, rows[row]);
    }
}

}  // namespace streams
