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
    kRequestBehindResult,      // a block of tokens is finished after its slot has been read
    kLastBehindResult,         // the same for the last block of a slot: the last word of a context comes after its last answer has been read
    kRequestBehindFinished,    // a slot's next block is asked for when the one before is finished, not when its answers have come
    kLastForAll,               // contexts that never asked get a last word, too
    kPostBehindAnswers,        // a block of tokens is posted when all nodes have answered, not one
    kPostOnce,                 // a block of tokens is posted once
    kAtOnceBehindStages,       // a token that goes through no stages waits for those of its block that do
    kEntryBeforeCount,         // what is posted stands in the queue before it is counted
    kClaimWork,                // one warp does what is posted: the one that has counted it as taken
    kReadBeforeTaking,         // an entry of the queue is read before it is taken; later another one may stand there
    kReadQueueEndFirst,        // a warp that takes work reads that no more will be posted before it looks for some (combine's queues end when all is done)
    kForwarderMayCollect,      // a forwarder collects where no collector has begun
    kClaimCollecting,          // one block collects for a place: the one that has swapped its word
    kWordOfThisOperation,      // a word of another operation does not say that somebody collects
    kServeOnce,                // forwarders act on each request once
    kWordBehindParts,          // the word of an answer comes behind all parts of it
    kStoresHaveRead,           // a stage has been read when the put of its part returns
    kNeverWaitForOne,          // a warp that forwards looks at all contexts of its block
    kSameBlockServesSlot,      // both ends of a slot belong to blocks of the same number
    kSignalBehindData,         // the network delivers a put's signal after its bytes
    kClaimSends,               // one warp sends a chunk: the one that has swapped its entry
    kClaimDeliveries,          // one block delivers a chunk: the one that has swapped its entry
    kNoteBeforePost,           // which chunk has come is noted before its context is posted
    kClaimRequests,            // one warp serves a request: the one that has swapped the word
    kEndBehindLastChunk,       // an arrival warp ends the queue when no chunk is left to come, not when none is there
    kLookInTurn,               // a credit warp that looks for chunks, too, gives credits back between two looks, whether it has found some or not
    kReadEndFirst,             // the credit warp reads that the deliver warps have ended before it looks for their last credits
    kTableBeforeWord,          // a forward warp reads what has been served before it reads the request
    kDeliverUntilRelieved,     // a sender delivers until its team's deliverer has begun
    kSettleOnce,               // whether a sender is relieved already when it begins is settled once, for all its warps
    kKeepWhatIsHeld,           // a sender that is relieved delivers what it has posted
    kEntryOfThisOperation,     // an entry of another operation stands for the first chunk of its slot
    kNumRules,
};

// Orders between threads that can be left out on purpose.
enum class Order : int {
    kAll = 0,       // none is left out
    kSignals,       // a put's signal is released behind its bytes
    kWords,         // credits and requests are released behind the loads before them
    kCredits,       // deliver warps release a chunk behind its loads
    kFinished,      // source warps release a slot behind its loads,
    kFreed,         // and the request warp acquires that
    kPosts,         // a warp that posts releases what it has acquired and stored,
    kTakes,         // and whoever takes that acquires it
    kChunks,        // the arrival warp acquires chunks before it posts
    kAnswers,       // the request warp acquires answers before it posts
    kRequests,      // forwarders acquire a request before they post or serve it
    kLastRequests,  // and the last one before the next operation
    kNumOrders,
};

// How words and bytes get to other ranks.
struct Port {
    virtual ~Port() = default;
    virtual void put(uint8_t* to, const uint8_t* from, int64_t num_bytes, uint64_t* word, uint64_t value) = 0;
    // By stores of the calling warp, which have read `from` when this returns. `word` (null: none) comes behind all that the warp has stored before.
    virtual void store(const void* warp, uint8_t* to, const uint8_t* from, int64_t num_bytes, uint64_t* word, uint64_t value) = 0;
    virtual void set_word(uint64_t* word, uint64_t value) = 0;
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
    void write(uint8_t* message, int source, int node, int64_t row) const { write(message, source, node, row, 0, geometry.num_message_bytes); }
    // Bytes [begin, end) of a message, to `part`.
    void write(uint8_t* part, int source, int node, int64_t row, int64_t begin, int64_t end) const {
        for (int64_t byte = begin; byte < end; byte += 8) {
            const uint64_t value = stamp(source, node, row) + byte;
            memcpy(part + (byte - begin), &value, 8);
        }
    }
    void take(const uint8_t* message, int source, int node, int64_t row) {
        const uint64_t expected = stamp(source, node, row);
        for (int64_t byte = 0; byte < geometry.num_message_bytes; byte += 8) {
            uint64_t value;
            memcpy(&value, message + byte, 8);
            CHECK(value == expected + byte, "operation %u (%s): row %lld of source %d, node %d is not in its place", index, is_combine ? "combine" : "dispatch",
                  static_cast<long long>(row), source, node);
        }
        ++arrivals[source][node][row];
    }
};

// What the blocks of one rank share in device memory, from one operation to the next.
struct DeviceWords {
    std::vector<uint64_t> next_chunks;       // of each slot and other node: what is expected, {epoch, chunk + 1}
    std::vector<uint64_t> deliverers_begun;  // of each team, {epoch, 1}
    std::vector<uint64_t> collected;         // of each place, {epoch, 1}: some block collects

    explicit DeviceWords(int num_ranks)
        : next_chunks(static_cast<size_t>(kMaxSlots) * (num_ranks - 1), 0), deliverers_begun(kMaxSlots, 0), collected(kMaxSlots, 0) {}
};

// Who runs: a block of one rank in one operation. `num_team_senders`: of dispatch (BlockPlaces); combine has teams, too, where it is not 0.
struct Place {
    NetworkWindow window;
    uint8_t* const* memories;  // of all ranks
    int rank;
    int num_ranks;
    int block;
    int num_blocks;
    int num_team_senders;
    bool answers_directly;
    Rule broken;
    Order omitted;
    Port* port;
    DeviceWords* words;

    uint8_t* own() const { return memories[rank]; }
    bool keeps(Rule rule) const { return broken != rule; }
    template <class T>
    T acquire(const T* word, Order order) const {
        return omitted == order ? peek(word) : streams::acquire(word);
    }
    // In the block's shared memory, behind a fence of the block.
    void publish(int32_t* shared, int32_t value, Order order) const { __atomic_store_n(shared, value, omitted == order ? __ATOMIC_RELAXED : __ATOMIC_RELEASE); }
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

// Rows of a block of tokens that a node holds; they lie together at its forwarder.
struct NodeRows {
    int32_t begin, count;
};

// Why no more work comes.
constexpr int32_t kAllPosted = 1, kRelieved = 2;

// Work that one warp of a block posts and others take; a number stands there once at most.
struct WorkQueue {
    std::vector<int32_t> order;  // as many as there can be at a time, posted and not yet done
    int32_t num_posted = 0, num_taken = 0, is_over = 0;
};

// A block's contexts, and what its warps share; all that is not named otherwise is zero at the start.
struct Block {
    struct Shape {
        int num_sending_warps;    // send or source warps
        int num_receiving_warps;  // deliver or forward warps
        int num_stages;           // rows that a deliver warp has under way at once; of a source warp addends; of a warp that answers directly parts
        int num_row_parts;        // of an answer's rows
        int num_load_steps;       // of a source warp, until what is in a stage may be added up
        int num_handshake_steps;  // of a forwarder that may have to collect
        int num_late_steps;       // of a deliverer, until its team's senders see that it has begun
    };
    const Place place;
    Operation& operation;
    const Shape shape;
    BlockRole role = BlockRole::kBoth;
    std::vector<int> slots;                     // of one ring
    std::vector<Context> sending, receiving;    // slot by slot; of senders, of deliverers and forwarders
    int32_t has_begun = 0;                      // it is settled whether it delivers, or collects
    WorkQueue queue;                            // of own slots where the block collects, else of contexts
    // Dispatch.
    int team = 0;
    bool delivers = false;
    std::vector<int32_t> arrived;    // of each context: the chunk that was posted last; at the start -1
    int num_held = 0;                // chunks that a sender had posted and not yet read when it was relieved
    std::vector<int32_t> next_sent;  // of each context: what goes into its slot next; at the start the slot
    std::vector<int32_t> credits;    // of each context: chunk + 1 that has been read
    int32_t num_deliverers_left = 0;
    // Combine.
    int own_place = 0;
    bool collects = false;
    std::vector<uint64_t> served;        // of each context: the newest word that a warp has acted upon
    std::vector<int32_t> heads;          // [contexts, rows of a slot]: rows that are asked for directly
    std::vector<int32_t> asked, posted;  // of each slot: blocks of tokens that have been asked for; whose answers have come
    std::vector<int32_t> finished;       // and that have been added up
    std::vector<NodeRows> node_rows;     // [slots, D]: of the block of tokens that is asked for
    std::vector<int32_t> rows;           // [slots, rows of a slot, D]: its tokens' rows

    Block(const Place& where, Operation& what, const Shape& warps) : place(where), operation(what), shape(warps), num_deliverers_left(warps.num_receiving_warps) {
        const int num_slots = operation.geometry.num_slots;
        const int num_senders = operation.is_combine ? min_of(place.num_team_senders, 1) : place.num_team_senders;
        const int num_places = BlockPlaces::num_places(place.num_blocks, num_senders);
        const BlockPlaces places = BlockPlaces::of(place.block, num_senders);
        role = places.role;
        team = num_senders == 0 ? 0 : places.team(num_senders);
        own_place = places.first;
        for (int i = 0; i < places.num_own_slots(num_slots, num_places, num_senders); ++i) {
            const int slot = places.slot_of(i, num_places, num_senders);
            CHECK(slot < num_slots, "slot %d of %d", slot, num_slots);
            if (place.keeps(Rule::kSameBlockServesSlot)) add(receiving, slot);
            if (role == BlockRole::kDeliverer && !operation.is_combine) continue;
            slots.push_back(slot);
            add(sending, slot);
        }
        if (!place.keeps(Rule::kSameBlockServesSlot)) {
            const BlockPlaces others = BlockPlaces::of((place.block + 1) % place.num_blocks, num_senders);
            for (int i = 0; i < others.num_own_slots(num_slots, num_places, num_senders); ++i) add(receiving, others.slot_of(i, num_places, num_senders));
        }
        for (const Context& context : sending) next_sent.push_back(context.slot);
        credits.assign(receiving.size(), 0);
        if (!operation.is_combine) {
            arrived.assign(receiving.size(), -1);
            queue.order.resize(receiving.size());
            return;
        }
        const size_t num_slot_rows = operation.geometry.num_slot_rows, num_ranks = place.num_ranks;
        served.assign(receiving.size(), 0);
        heads.assign(receiving.size() * num_slot_rows, 0);
        asked.assign(slots.size(), 0);
        posted = finished = asked;
        node_rows.assign(slots.size() * num_ranks, {0, 0});
        rows.assign(slots.size() * num_slot_rows * num_ranks, 0);
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

// Steps in which a warp finds what it can do, if there is anything: the rest of a pass that began too early, and another one.
constexpr int kStepsOfPass = 5;

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
