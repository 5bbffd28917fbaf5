#pragma once
// The streams between nodes as the kernels run them, on the host: what each warp does, cut into steps, over the memory that window.hpp lays
// out. One rank per node: ranks of different local numbers never meet on the network.
//
// Rows are stamped with operation, ends and row number when they are packed; whoever takes a row checks its stamp. So a row that is missing,
// comes twice, lies elsewhere, or was overwritten too early shows.
#include <cstring>
#include <memory>
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
    kCreditBehindLoads,        // a forwarder gives credit after it has read the chunk
    kDrain,                    // a sender ends after its last credits
    kRequestBehindResult,      // a source asks again after it has read the slot
    kLastBehindResult,         // the last word of a context comes after its last answer has been read
    kLastForAll,               // contexts that never asked get a last word, too
    kServeOnce,                // a forwarder acts on each request once
    kNeverWaitForOne,          // a forward warp looks at all of its contexts
    kSameBlockServesSlot,      // both ends of a slot belong to blocks of the same number
    kSignalBehindData,         // the network delivers a put's signal after its bytes
    kNumRules,
};

// How words and bytes get to other ranks.
struct Port {
    virtual ~Port() = default;
    virtual void put(uint8_t* to, const uint8_t* from, int64_t num_bytes, uint64_t* word, uint64_t value) = 0;
    virtual void set_word(uint64_t* word, uint64_t value) = 0;
};

inline uint64_t load_word(const uint64_t* word) { return __atomic_load_n(word, __ATOMIC_ACQUIRE); }

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

// Who runs: warps of one rank in one operation.
struct Place {
    NetworkWindow window;
    uint8_t* const* memories;  // of all ranks
    int rank;
    int num_ranks;
    int block;
    int num_blocks;
    Rule broken;
    Port* port;

    uint8_t* own() const { return memories[rank]; }
    bool keeps(Rule rule) const { return broken != rule; }
    // The same word or ring in a peer's memory.
    template <class T>
    T* at(int peer, T* address) const {
        return reinterpret_cast<T*>(memories[peer] + (reinterpret_cast<uint8_t*>(address) - own()));
    }
};

class Warp {
public:
    Warp(const Place& place, Operation& operation) : place_(place), operation_(operation) {}
    virtual ~Warp() = default;
    virtual bool step() = 0;  // whether anything happened
    virtual bool is_over() const = 0;

protected:
    // Slot numbers of this warp's block, dealt out with the other nodes to its warps. `role` is 1 for the end that answers.
    template <class Visit>
    void deal(int warp, int num_warps, int role, const Visit& visit) const {
        int index = 0;
        const int shift = role == 1 && !place_.keeps(Rule::kSameBlockServesSlot) ? 1 : 0;
        for (int slot = (place_.block + shift) % place_.num_blocks; slot < operation_.geometry.num_slots; slot += place_.num_blocks)
            for (int node = 0; node < place_.num_ranks; ++node)
                if (node != place_.rank && index++ % num_warps == warp) visit(node, slot);
    }
    int64_t message_offset(int slot, int row) const { return operation_.geometry.slot_offset(slot) + row * operation_.geometry.num_message_bytes; }

    const Place place_;
    Operation& operation_;
};

// A warp with several contexts, of which it may wait for none.
template <class Context>
class ContextWarp : public Warp {
public:
    using Warp::Warp;
    bool step() override {
        const int count = static_cast<int>(contexts_.size());
        for (int i = 0; i < count; ++i) {
            const int index = (next_ + i) % count;
            Context& context = contexts_[index];
            if (context.is_over) continue;
            if (advance(context)) {
                // Rows of a chunk are worked on without a pause; then the next context has its turn.
                next_ = context.row > 0 ? index : (index + 1) % count;
                return true;
            }
            if (waits_for_one_) return false;
        }
        return false;
    }
    bool is_over() const override {
        for (const Context& context : contexts_)
            if (!context.is_over) return false;
        return true;
    }

protected:
    virtual bool advance(Context& context) = 0;

    std::vector<Context> contexts_;
    bool waits_for_one_ = false;

private:
    int next_ = 0;
};

struct ChunkContext {
    int node, slot;
    int64_t chunk;
    int row = 0;
    bool is_over = false;
    bool has_credited = false;  // the forwarder, for this chunk
};

class DispatchSender : public ContextWarp<ChunkContext> {
public:
    DispatchSender(const Place& place, Operation& operation, int warp, int num_warps) : ContextWarp(place, operation) {
        deal(warp, num_warps, 0, [&](int node, int slot) { contexts_.push_back({node, slot, slot}); });
    }

protected:
    bool advance(ChunkContext& c) override {
        const auto& tokens = operation_.tokens[place_.rank][c.node];
        const Stream stream = Stream::of(operation_.geometry, static_cast<int64_t>(tokens.size()));
        const int64_t before = c.chunk - operation_.geometry.num_slots;
        const bool is_end = c.chunk >= stream.num_chunks();
        if (c.row == 0 && before >= 0 && place_.keeps(is_end ? Rule::kDrain : Rule::kWaitForCredit) &&
            load_word(place_.window.credit(place_.own(), c.node) + c.slot) != chunk_word(operation_.epoch, before))
            return false;
        if (is_end) return c.is_over = true;
        uint8_t* ring = place_.window.send_ring(place_.own(), place_.rank, c.node);
        operation_.write(ring + message_offset(c.slot, c.row), place_.rank, c.node, stream.first_row(c.chunk) + c.row);
        if (++c.row < stream.rows_of(c.chunk)) return true;
        uint8_t* to = place_.at(c.node, place_.window.receive_ring(place_.own(), c.node, place_.rank));
        uint64_t* word = place_.at(c.node, place_.window.full(place_.own(), NetworkWindow::kDispatchFull, place_.rank) + c.slot);
        place_.port->put(to + message_offset(c.slot, 0), ring + message_offset(c.slot, 0), c.row * operation_.geometry.num_message_bytes, word,
                         chunk_word(operation_.epoch, c.chunk));
        c.row = 0;
        c.chunk += operation_.geometry.num_slots;
        return true;
    }
};

class DispatchForwarder : public ContextWarp<ChunkContext> {
public:
    DispatchForwarder(const Place& place, Operation& operation, int warp, int num_warps) : ContextWarp(place, operation) {
        waits_for_one_ = !place.keeps(Rule::kNeverWaitForOne);
        deal(warp, num_warps, 1, [&](int node, int slot) { contexts_.push_back({node, slot, slot}); });
    }

protected:
    bool advance(ChunkContext& c) override {
        const int64_t num_rows = operation_.first_rows[place_.rank][c.node + 1] - operation_.first_rows[place_.rank][c.node];
        const Stream stream = Stream::of(operation_.geometry, num_rows);
        if (c.chunk >= stream.num_chunks()) return c.is_over = true;
        if (c.row == 0) {
            const uint64_t* full = place_.window.full(place_.own(), NetworkWindow::kDispatchFull, c.node) + c.slot;
            if (load_word(full) != chunk_word(operation_.epoch, c.chunk)) return false;
            if (!place_.keeps(Rule::kCreditBehindLoads) && !c.has_credited) return give_credit(c);
        }
        const uint8_t* ring = place_.window.receive_ring(place_.own(), place_.rank, c.node);
        operation_.take(ring + message_offset(c.slot, c.row), c.node, place_.rank, stream.first_row(c.chunk) + c.row);
        if (++c.row < stream.rows_of(c.chunk)) return true;
        if (!c.has_credited) give_credit(c);
        c.has_credited = false;
        c.row = 0;
        c.chunk += operation_.geometry.num_slots;
        return true;
    }

private:
    bool give_credit(ChunkContext& c) {
        place_.port->set_word(place_.at(c.node, place_.window.credit(place_.own(), place_.rank) + c.slot), chunk_word(operation_.epoch, c.chunk));
        return c.has_credited = true;
    }
};

struct RequestContext {
    int node, slot;
    uint64_t served = 0;
    Request request = {0, 0, false};  // in work while its count is not 0
    int row = 0;
    bool is_over = false;
};

class CombineForwarder : public ContextWarp<RequestContext> {
public:
    CombineForwarder(const Place& place, Operation& operation, int warp, int num_warps) : ContextWarp(place, operation) {
        waits_for_one_ = !place.keeps(Rule::kNeverWaitForOne);
        deal(warp, num_warps, 1, [&](int node, int slot) { contexts_.push_back({node, slot}); });
    }

protected:
    bool advance(RequestContext& c) override {
        const int32_t first = operation_.first_rows[place_.rank][c.node], end = operation_.first_rows[place_.rank][c.node + 1];
        if (c.request.count == 0) {
            const uint64_t word = load_word(place_.window.request(place_.own(), operation_.epoch, c.node) + c.slot);
            if (!Request::is_of(word, operation_.epoch) || (word == c.served && place_.keeps(Rule::kServeOnce)) || word == 0) return false;
            c.served = word;
            const Request request = Request::of(word);
            if (request.is_last) {
                CHECK(request.count == 0, "a last request asks for %d rows", request.count);
                return c.is_over = true;
            }
            c.request = request;
            CHECK(request.count >= 1 && request.count <= operation_.geometry.num_slot_rows && request.begin >= first && request.begin + request.count <= end,
                  "operation %u: rows %lld + %d are asked for; rows %d to %d are of node %d", operation_.index, static_cast<long long>(request.begin),
                  request.count, first, end, c.node);
            return true;
        }
        uint8_t* ring = place_.window.send_ring(place_.own(), place_.rank, c.node);
        operation_.write(ring + message_offset(c.slot, c.row), c.node, place_.rank, c.request.begin + c.row - first);
        if (++c.row < c.request.count) return true;
        uint8_t* to = place_.at(c.node, place_.window.receive_ring(place_.own(), c.node, place_.rank));
        uint64_t* word = place_.at(c.node, place_.window.full(place_.own(), NetworkWindow::kCombineFull, place_.rank) + c.slot);
        place_.port->put(to + message_offset(c.slot, 0), ring + message_offset(c.slot, 0), c.row * operation_.geometry.num_message_bytes, word,
                         chunk_word(operation_.epoch, c.request.begin));
        c.request.count = c.row = 0;
        return true;
    }
};

// One slot at a time, of all nodes together.
class CombineSource : public Warp {
public:
    CombineSource(const Place& place, Operation& operation, int warp, int num_warps) : Warp(place, operation) {
        int index = 0;
        for (int slot = place.block; slot < operation.geometry.num_slots; slot += place.num_blocks)
            if (index++ % num_warps == warp) slots_.push_back(slot);
        stream_ = Stream::of(operation.geometry, static_cast<int64_t>(operation.heads[place.rank].size()));
    }

    bool step() override {
        if (num_first_requests_ < slots_.size()) {
            request(slots_[num_first_requests_], slots_[num_first_requests_]);
            ++num_first_requests_;
            return true;
        }
        if (!is_reading_) {
            while (!is_over() && block() >= stream_.num_chunks()) next();
            if (is_over()) return false;
            for (int node = 0; node < place_.num_ranks; ++node)
                if (node != place_.rank && rows_of(block(), node).count > 0 &&
                    load_word(place_.window.full(place_.own(), NetworkWindow::kCombineFull, node) + slot()) !=
                        chunk_word(operation_.epoch, rows_of(block(), node).begin))
                    return false;
            is_reading_ = true;
            token_ = stream_.first_row(block());
            if (!place_.keeps(Rule::kRequestBehindResult) && block() + operation_.geometry.num_slots < stream_.num_chunks())
                request(block() + operation_.geometry.num_slots, slot());
            if (!place_.keeps(Rule::kLastBehindResult) && block() + operation_.geometry.num_slots >= stream_.num_chunks())
                request(block() + operation_.geometry.num_slots, slot());
            return true;
        }
        for (int node = 0; node < place_.num_ranks; ++node) {
            const int32_t head = operation_.heads[place_.rank][token_][node];
            if (node == place_.rank || head < 0) continue;
            const int row = head - static_cast<int>(rows_of(block(), node).begin);
            const uint8_t* ring = place_.window.receive_ring(place_.own(), place_.rank, node);
            operation_.take(ring + message_offset(slot(), row), place_.rank, node, head - operation_.first_rows[node][place_.rank]);
        }
        if (++token_ < stream_.first_row(block()) + stream_.rows_of(block())) return true;
        const int64_t next_block = block() + operation_.geometry.num_slots;
        if (place_.keeps(next_block < stream_.num_chunks() ? Rule::kRequestBehindResult : Rule::kLastBehindResult)) request(next_block, slot());
        is_reading_ = false;
        next();
        return true;
    }
    bool is_over() const override {
        return num_first_requests_ == slots_.size() && !is_reading_ && (slots_.empty() || first_ + slots_.front() >= stream_.num_chunks());
    }

private:
    int slot() const { return slots_[slot_]; }
    int64_t block() const { return first_ + slot(); }
    void next() {
        if (++slot_ < slots_.size()) return;
        slot_ = 0;
        first_ += operation_.geometry.num_slots;
    }
    Request rows_of(int64_t block, int node) const {
        Request rows{-1, 0, false};
        for (int64_t token = stream_.first_row(block); token < stream_.first_row(block) + stream_.rows_of(block); ++token) {
            const int32_t head = operation_.heads[place_.rank][token][node];
            if (head >= 0 && rows.count++ == 0) rows.begin = head;
        }
        return rows;
    }
    void request(int64_t block, int slot) {
        for (int node = 0; node < place_.num_ranks; ++node) {
            if (node == place_.rank) continue;
            uint64_t* word = place_.at(node, place_.window.request(place_.own(), operation_.epoch, place_.rank) + slot);
            if (block >= stream_.num_chunks()) {
                if (block < operation_.geometry.num_slots && !place_.keeps(Rule::kLastForAll)) continue;
                place_.port->set_word(word, Request{0, 0, true}.word(operation_.epoch));
            } else if (rows_of(block, node).count > 0) {
                place_.port->set_word(word, rows_of(block, node).word(operation_.epoch));
            }
        }
    }

    Stream stream_;
    std::vector<int> slots_;
    size_t num_first_requests_ = 0, slot_ = 0;
    int64_t first_ = 0, token_ = 0;
    bool is_reading_ = false;
};

inline std::vector<std::unique_ptr<Warp>> warps_of(const Place& place, Operation& operation, int num_warps) {
    std::vector<std::unique_ptr<Warp>> warps;
    for (int warp = 0; warp < num_warps; ++warp) {
        if (operation.is_combine) {
            warps.push_back(std::make_unique<CombineForwarder>(place, operation, warp, num_warps));
            warps.push_back(std::make_unique<CombineSource>(place, operation, warp, num_warps));
        } else {
            warps.push_back(std::make_unique<DispatchForwarder>(place, operation, warp, num_warps));
            warps.push_back(std::make_unique<DispatchSender>(place, operation, warp, num_warps));
        }
    }
    return warps;
}

// What one rank received is complete when its part of the operation has ended.
inline void check_arrivals(const Operation& operation, int rank) {
    for (size_t other = 0; other < operation.tokens.size(); ++other) {
        const auto& rows = operation.is_combine ? operation.arrivals[rank][other] : operation.arrivals[other][rank];
        if (static_cast<int>(other) == rank) continue;
        for (size_t row = 0; row < rows.size(); ++row)
            CHECK(rows[row] == 1, "operation %u: row %zu between ranks %d and %zu arrived %d times", operation.index, row, rank, other, rows[row]);
    }
}

// --- groups and operations drawn at random ---------------------------------------------------------------------------

struct Case {
    int num_ranks;
    NetworkWindow window;
    std::vector<std::unique_ptr<uint64_t[]>> storage;
    std::vector<uint8_t*> memories;
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
        }
        // Near the places where epochs of 24 and 32 bits wrap, now and then.
        constexpr uint32_t kStarts[] = {1, 0xFFFFFE, 0xFFFFFFFE, 77};
        uint32_t epochs[2] = {kStarts[random.below(4)], kStarts[random.below(4)]};
        for (int index = 0; index < num_operations; ++index) {
            const bool is_combine = random.below(2) != 0;
            const ChunkGeometry geometry = ChunkGeometry::of(window.num_ring_bytes, is_combine ? answered.num_bytes() : sent.num_bytes(), num_chunk_bytes);
            CHECK(geometry.is_usable(), "two rows fit");
            std::vector<int> num_tokens;
            for (int rank = 0; rank < num_ranks; ++rank) num_tokens.push_back(random.below(4) == 0 ? 0 : random.below(max_tokens + 1));
            // All nodes, one node, none, or so many out of eight.
            const uint32_t kind = random.below(5), only = random.below(num_ranks), chance = 1 + random.below(7);
            std::vector<std::vector<std::vector<int32_t>>> tokens(num_ranks, std::vector<std::vector<int32_t>>(num_ranks));
            for (int rank = 0; rank < num_ranks; ++rank)
                for (int token = 0; token < num_tokens[rank]; ++token)
                    for (int node = 0; node < num_ranks; ++node)
                        if (kind == 0 || (kind == 1 && node == static_cast<int>(only)) || (kind > 1 && random.below(8) < chance))
                            tokens[rank][node].push_back(token);
            operations.push_back(std::make_unique<Operation>(
                Operation::of(is_combine, index, epochs[is_combine]++, geometry, num_ranks, std::move(tokens), num_tokens)));
        }
    }
};

}  // namespace streams
