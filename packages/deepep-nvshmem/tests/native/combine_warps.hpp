#pragma once
// Combine: the warps of a block, step by step.
#include "streams.hpp"

namespace streams {

// Takes any new request.
class ForwardWarp : public Warp {
public:
    ForwardWarp(Block& block, int warp) : Warp(block), first_(warp * 7), seen_(block.receiving.size(), 0) {}

    bool step() override {
        if (request_.count > 0) return serve();
        if (chosen_ < 0) return look();
        const int index = chosen_;
        chosen_ = -1;
        if (!place_.claim(&block_.served[index], before_, word_, Rule::kClaimRequests)) return true;
        static_cast<void>(acquire(request_word(index)));
        const int node = block_.receiving[index].node;
        const int32_t first = first_row(node), end = operation_.first_rows[place_.rank][node + 1];
        request_ = Request::of(word_);
        CHECK(request_.count >= 1 && request_.count <= operation_.geometry.num_slot_rows && request_.begin >= first && request_.begin + request_.count <= end,
              "operation %u: rows %lld + %d are asked for; rows %d to %d are of node %d", operation_.index, static_cast<long long>(request_.begin),
              request_.count, first, end, node);
        index_ = index;
        row_ = 0;
        return true;
    }

private:
    const uint64_t* request_word(int index) const {
        return place_.window.request(place_.own(), operation_.epoch, block_.receiving[index].node) + block_.receiving[index].slot;
    }
    int32_t first_row(int node) const { return operation_.first_rows[place_.rank][node]; }

    bool look() {
        const int count = static_cast<int>(block_.receiving.size());
        bool is_everything_over = true;
        for (int i = 0; i < count; ++i) {
            const int index = (first_ + i) % count;
            before_ = peek(&block_.served[index]);
            if (before_ != 0 && Request::of(before_).is_last) continue;
            is_everything_over = false;
            word_ = peek(request_word(index));
            if (!place_.keeps(Rule::kTableBeforeWord)) std::swap(word_, seen_[index]);  // that of the look before
            if (word_ != 0 && Request::is_of(word_, operation_.epoch) && (word_ != before_ || !place_.keeps(Rule::kServeOnce))) {
                if (Request::of(word_).is_last) {
                    CHECK(Request::of(word_).count == 0, "a last request asks for %d rows", Request::of(word_).count);
                    static_cast<void>(acquire(request_word(index)));  // it permits the next operation's stores to both slots
                    poke(&block_.served[index], word_);
                } else {
                    chosen_ = index;
                }
                return true;
            }
            if (!place_.keeps(Rule::kNeverWaitForOne)) return false;
        }
        return is_everything_over && end();
    }

    bool serve() {
        const auto [node, slot] = block_.receiving[index_];
        uint8_t* ring = place_.window.send_ring(place_.own(), place_.rank, node);
        operation_.write(ring + block_.message_offset(slot, row_), node, place_.rank, request_.begin + row_ - first_row(node));
        if (++row_ < request_.count) return true;
        uint8_t* to = place_.at(node, place_.window.receive_ring(place_.own(), node, place_.rank));
        uint64_t* word = place_.at(node, place_.window.full(place_.own(), NetworkWindow::kCombineFull, place_.rank) + slot);
        place_.port->put(to + block_.message_offset(slot, 0), ring + block_.message_offset(slot, 0), row_ * operation_.geometry.num_message_bytes, word,
                         chunk_word(operation_.epoch, request_.begin));
        request_.count = 0;
        return true;
    }

    const int first_;  // of the contexts that it looks at
    int chosen_ = -1;  // by the last look
    uint64_t before_ = 0, word_ = 0;
    std::vector<uint64_t> seen_;  // of each context; where a rule is broken
    Request request_ = {0, 0, false};  // in work while its count is not 0
    int index_ = 0, row_ = 0;
};

// Rows of a block of tokens that a node holds.
inline Request rows_of(const Block& block, const Stream& stream, int64_t tokens, int node) {
    Request rows{-1, 0, false};
    for (int64_t token = stream.first_row(tokens); token < stream.first_row(tokens) + stream.rows_of(tokens); ++token) {
        const int32_t head = block.operation.heads[block.place.rank][token][node];
        if (head >= 0 && rows.count++ == 0) rows.begin = head;
    }
    return rows;
}
inline Stream own_tokens(const Block& block) {
    return Stream::of(block.operation.geometry, static_cast<int64_t>(block.operation.heads[block.place.rank].size()));
}

// Takes blocks of tokens in their order, slot after slot, and adds up what all nodes answer.
class SourceWarp : public Warp {
public:
    explicit SourceWarp(Block& block) : Warp(block), stream_(own_tokens(block)) {}

    bool step() override {
        switch (phase_) {
            case Phase::kTake: return take();
            case Phase::kWait:
                if (!are_answers_here()) return false;
                token_ = stream_.first_row(tokens_);
                phase_ = finishes_early() ? Phase::kTurn : Phase::kRead;
                return true;
            case Phase::kRead:
                read();
                if (++token_ < stream_.first_row(tokens_) + stream_.rows_of(tokens_)) return true;
                phase_ = finishes_early() ? Phase::kTake : Phase::kTurn;
                return true;
            default:
                if (place_.keeps(Rule::kFinishInOrder) && acquire(&block_.finished[i_]) != round_) return false;
                place_.port->publish(&block_.finished[i_], round_ + 1);
                phase_ = finishes_early() ? Phase::kRead : Phase::kTake;
                return true;
        }
    }

private:
    enum class Phase { kTake, kWait, kRead, kTurn };

    bool take() {
        const int count = static_cast<int>(block_.slots.size());
        const int taken = count == 0 ? 0 : __atomic_fetch_add(&block_.num_taken, 1, __ATOMIC_RELAXED);
        round_ = count == 0 ? 0 : taken / count;
        const int64_t first = static_cast<int64_t>(round_) * operation_.geometry.num_slots;
        if (count == 0 || first >= stream_.num_chunks()) {
            __atomic_fetch_add(&block_.num_sources_ended, 1, __ATOMIC_RELEASE);
            return end();
        }
        i_ = taken % count;
        slot_ = block_.slots[i_];
        tokens_ = first + slot_;
        if (tokens_ < stream_.num_chunks()) phase_ = Phase::kWait;
        return true;
    }
    bool finishes_early() const {
        const bool is_last = tokens_ + operation_.geometry.num_slots >= stream_.num_chunks();
        return !place_.keeps(is_last ? Rule::kLastBehindResult : Rule::kRequestBehindResult);
    }
    bool are_answers_here() const {
        for (int node = 0; node < place_.num_ranks; ++node) {
            const Request rows = node == place_.rank ? Request{-1, 0, false} : rows_of(block_, stream_, tokens_, node);
            if (rows.count > 0 && acquire(place_.window.full(place_.own(), NetworkWindow::kCombineFull, node) + slot_) != chunk_word(operation_.epoch, rows.begin))
                return false;
        }
        return true;
    }
    void read() {
        for (int node = 0; node < place_.num_ranks; ++node) {
            const int32_t head = operation_.heads[place_.rank][token_][node];
            if (node == place_.rank || head < 0) continue;
            const int row = head - static_cast<int>(rows_of(block_, stream_, tokens_, node).begin);
            const uint8_t* ring = place_.window.receive_ring(place_.own(), place_.rank, node);
            operation_.take(ring + block_.message_offset(slot_, row), place_.rank, node, head - operation_.first_rows[node][place_.rank]);
        }
    }

    const Stream stream_;
    Phase phase_ = Phase::kTake;
    int i_ = 0, slot_ = 0, round_ = 0;
    int64_t tokens_ = 0, token_ = 0;  // the block of tokens in work, and the token in it
};

// Makes all requests of a block.
class RequestWarp : public FencingWarp {
public:
    explicit RequestWarp(Block& block) : FencingWarp(block), stream_(own_tokens(block)), asked_(block.sending.size(), 0) {}

protected:
    bool have_others_ended() const override { return acquire(&block_.num_sources_ended) == block_.shape.num_sending_warps; }
    std::vector<Due> look() const override {
        std::vector<Due> due;
        for (int index = 0; index < static_cast<int>(asked_.size()); ++index)
            if (asked_[index] != kNoMore && asked_[index] <= acquire(&block_.finished[index / (place_.num_ranks - 1)])) due.push_back({index, asked_[index]});
        return due;
    }
    void work(const Due& due) override {
        const auto [node, slot] = block_.sending[due.index];
        const int64_t tokens = slot + static_cast<int64_t>(due.value) * operation_.geometry.num_slots;
        uint64_t* word = place_.at(node, place_.window.request(place_.own(), operation_.epoch, place_.rank) + slot);
        if (tokens >= stream_.num_chunks()) {
            asked_[due.index] = kNoMore;
            if (due.value > 0 || place_.keeps(Rule::kLastForAll)) place_.port->set_word(word, Request{0, 0, true}.word(operation_.epoch));
            return;
        }
        asked_[due.index] = due.value + 1;
        const Request rows = rows_of(block_, stream_, tokens, node);
        if (rows.count > 0) place_.port->set_word(word, rows.word(operation_.epoch));
    }
    bool ends(bool is_last_pass, bool had_work) const override {
        bool has_all = true;
        for (const int32_t asked : asked_) has_all = has_all && asked == kNoMore;
        return has_all || (is_last_pass && (!had_work || !place_.keeps(Rule::kRequestsOutlastSources)));
    }

private:
    static constexpr int32_t kNoMore = 0x7FFFFFFF;

    const Stream stream_;
    std::vector<int32_t> asked_;  // of each context: blocks asked for
};

}  // namespace streams
