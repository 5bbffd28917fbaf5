#pragma once
// Combine: the warps of a block, step by step. What they do depends on whether their block collects.
#include <deque>

#include "queue_warps.hpp"

namespace streams {

// --- forwarding -----------------------------------------------------------------------------------------------------

// What the node of a context asks of this rank.
inline const uint64_t* request_word(const Block& block, int index) {
    const auto [node, slot] = block.receiving[index];
    return block.place.window.request(block.place.own(), block.operation.epoch, node) + slot;
}
inline int32_t first_row(const Block& block, int node) { return block.operation.first_rows[block.place.rank][node]; }
inline void check_request(const Block& block, int index, const Request& request) {
    const int node = block.receiving[index].node;
    const int32_t first = first_row(block, node), end = first_row(block, node + 1);
    CHECK(request.count >= 1 && request.count <= block.operation.geometry.num_slot_rows && request.begin >= first && request.begin + request.count <= end,
          "operation %u: rows %lld + %d are asked for; rows %d to %d are of node %d", block.operation.index, static_cast<long long>(request.begin), request.count,
          first, end, node);
}
// It permits the next operation's stores to both slots.
inline void acquire_last_request(const Block& block, int index, const Request& request) {
    CHECK(request.count == 0, "a last request asks for %d rows", request.count);
    static_cast<void>(block.place.acquire(request_word(block, index), Order::kLastRequests));
}
// Where a context's answer goes, at its node, and the word behind it.
inline uint8_t* answer_slot(const Block& block, int index) {
    const auto [node, slot] = block.receiving[index];
    return block.place.at(node, block.place.window.receive_ring(block.place.own(), node, block.place.rank)) + block.message_offset(slot, 0);
}
inline uint64_t* answer_word(const Block& block, int index) {
    const auto [node, slot] = block.receiving[index];
    return block.place.at(node, block.place.window.full(block.place.own(), NetworkWindow::kCombineFull, block.place.rank) + slot);
}

// Takes any new request, and answers out of the send ring.
class ForwardWarp : public Warp {
public:
    ForwardWarp(Block& block, int warp) : Warp(block), first_(warp * 7), seen_(block.receiving.size(), 0) {}

    bool step() override {
        if (request_.count > 0) return serve();
        if (chosen_ < 0) return look();
        const int index = chosen_;
        chosen_ = -1;
        if (!place_.claim(&block_.served[index], before_, word_, Rule::kClaimRequests)) return true;
        static_cast<void>(place_.acquire(request_word(block_, index), Order::kRequests));
        request_ = Request::of(word_);
        check_request(block_, index, request_);
        index_ = index;
        row_ = 0;
        return true;
    }

private:
    bool look() {
        const int count = static_cast<int>(block_.receiving.size());
        bool is_everything_over = true;
        for (int i = 0; i < count; ++i) {
            const int index = (first_ + i) % count;
            before_ = peek(&block_.served[index]);
            if (before_ != 0 && Request::of(before_).is_last) continue;
            is_everything_over = false;
            word_ = peek(request_word(block_, index));
            if (!place_.keeps(Rule::kTableBeforeWord)) std::swap(word_, seen_[index]);  // that of the look before
            if (word_ != 0 && Request::is_of(word_, operation_.epoch) && (word_ != before_ || !place_.keeps(Rule::kServeOnce))) {
                if (Request::of(word_).is_last) {
                    acquire_last_request(block_, index, Request::of(word_));
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
        operation_.write(ring + block_.message_offset(slot, row_), node, place_.rank, request_.begin + row_ - first_row(block_, node));
        if (++row_ < request_.count) return true;
        place_.port->put(answer_slot(block_, index_), ring + block_.message_offset(slot, 0), row_ * operation_.geometry.num_message_bytes,
                         answer_word(block_, index_), chunk_word(operation_.epoch, request_.begin));
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

// Looks at the requests of all contexts for the warps that answer directly.
class WatchWarp : public PostingWarp {
public:
    using PostingWarp::PostingWarp;

    bool step() override { return post() || look(); }

private:
    bool look() {
        bool is_everything_over = true, has_moved = false;
        for (int index = 0; index < static_cast<int>(block_.receiving.size()); ++index) {
            uint64_t& before = block_.served[index];
            if (before != 0 && Request::of(before).is_last) continue;
            is_everything_over = false;
            const uint64_t word = peek(request_word(block_, index));
            if (word == 0 || !Request::is_of(word, operation_.epoch) || (word == before && place_.keeps(Rule::kServeOnce))) {
                if (place_.keeps(Rule::kNeverWaitForOne)) continue;
                return has_moved;
            }
            has_moved = true;
            const Request request = Request::of(word);
            if (request.is_last) {
                acquire_last_request(block_, index, request);
                before = word;
                continue;
            }
            // Only now it is certain that the request before is used no more.
            static_cast<void>(place_.acquire(request_word(block_, index), Order::kRequests));
            before = word;
            check_request(block_, index, request);
            for (int row = 0; row < request.count; ++row) block_.heads[index * operation_.geometry.num_slot_rows + row] = static_cast<int32_t>(request.begin + row);
            due_.push_back(index);
        }
        return is_everything_over ? end_queue() : has_moved;
    }
};

// Takes requests from the queue, and puts the parts of their answers out of its stages.
class DirectForwardWarp : public TakingWarp {
public:
    explicit DirectForwardWarp(Block& block)
        : TakingWarp(block), num_part_bytes_(align_up(ceil_div(operation_.geometry.num_message_bytes, block.shape.num_row_parts), 8)),
          stages_(block.shape.num_stages * num_part_bytes_) {}

    bool step() override {
        if (row_ == request_.count && open()) return true;
        if (row_ < request_.count && num_loaded_ - num_put_ < block_.shape.num_stages) return load();
        if (num_put_ < num_loaded_) return put();
        return has_queue_ended() && end();
    }

private:
    struct Part {
        int index;
        int64_t to;  // in the context's slot
        int64_t num_bytes;
        int64_t begin;  // of the answer
        bool is_last;   // of the answer
    };
    uint8_t* stage(int64_t number) { return stages_.data() + number % block_.shape.num_stages * num_part_bytes_; }

    bool open() {
        int32_t index = -1;
        if (!take(&index)) return false;
        if (index < 0) return true;
        index_ = index;
        request_ = Request::of(block_.served[index]);
        row_ = 0;
        offset_ = 0;
        return true;
    }
    bool load() {
        const int64_t num_message_bytes = operation_.geometry.num_message_bytes, end = min_of(offset_ + num_part_bytes_, num_message_bytes);
        const int32_t head = block_.heads[index_ * operation_.geometry.num_slot_rows + row_];
        const int node = block_.receiving[index_].node;
        operation_.write(stage(num_loaded_++), node, place_.rank, head - first_row(block_, node), offset_, end);
        const int64_t to = row_ * num_message_bytes + offset_;
        const bool ends_row = end == num_message_bytes;
        parts_.push_back({index_, to, end - offset_, request_.begin, ends_row && row_ + 1 == request_.count});
        row_ += ends_row;
        offset_ = ends_row ? 0 : end;
        return true;
    }
    bool put() {
        const Part part = parts_.front();
        parts_.pop_front();
        place_.port->store(this, answer_slot(block_, part.index) + part.to, stage(num_put_++), part.num_bytes, part.is_last ? answer_word(block_, part.index) : nullptr,
                           chunk_word(operation_.epoch, part.begin));
        return true;
    }

    const int64_t num_part_bytes_;
    std::vector<uint8_t> stages_;
    std::deque<Part> parts_;  // in the stages
    int64_t num_loaded_ = 0, num_put_ = 0;
    // The answer that is being loaded.
    Request request_ = {0, 0, false};
    int index_ = 0, row_ = 0;
    int64_t offset_ = 0;
};

// --- collecting -----------------------------------------------------------------------------------------------------

inline Stream own_tokens(const Block& block) {
    return Stream::of(block.operation.geometry, static_cast<int64_t>(block.operation.heads[block.place.rank].size()));
}

// Makes all requests of a block, and looks for all answers.
class RequestWarp : public PostingWarp {
public:
    explicit RequestWarp(Block& block) : PostingWarp(block), stream_(own_tokens(block)) {}

    bool step() override {
        if (post()) return true;
        if (!free_.empty()) {
            ask(free_.back());
            free_.pop_back();
            return true;
        }
        looks_for_answers_ = !looks_for_answers_;
        return looks_for_answers_ ? look_for_answers() : look_for_free_slots();
    }

private:
    static constexpr int32_t kNoMore = 0x7FFFFFFF;

    bool look_for_free_slots() {
        bool is_over = true;
        for (int i = 0; i < static_cast<int>(block_.slots.size()); ++i) {
            const int32_t asked = block_.asked[i];
            if (asked == kNoMore) continue;
            is_over = false;
            const int32_t freed = place_.keeps(Rule::kRequestBehindFinished) ? place_.acquire(&block_.finished[i], Order::kFreed) : block_.posted[i];
            if (freed == asked) free_.push_back(i);
        }
        return is_over ? end_queue() : !free_.empty();
    }

    void ask(int i) {
        const int64_t tokens = block_.slots[i] + static_cast<int64_t>(block_.asked[i]) * operation_.geometry.num_slots;
        const bool is_last = tokens >= stream_.num_chunks();
        const int num_tokens = is_last ? 0 : stream_.rows_of(tokens);
        for (int token = 0; token < num_tokens; ++token)
            for (int node = 0; node < place_.num_ranks; ++node)
                row(i, token, node) = operation_.heads[place_.rank][stream_.first_row(tokens) + token][node];
        for (int node = 0; node < place_.num_ranks; ++node) {
            NodeRows held{-1, 0};
            for (int token = 0; node != place_.rank && token < num_tokens; ++token)
                if (row(i, token, node) >= 0 && held.count++ == 0) held.begin = row(i, token, node);
            block_.node_rows[i * place_.num_ranks + node] = held;
            const bool has_word = is_last ? block_.asked[i] > 0 || place_.keeps(Rule::kLastForAll) : held.count > 0;
            if (node == place_.rank || !has_word) continue;
            place_.port->set_word(place_.at(node, place_.window.request(place_.own(), operation_.epoch, place_.rank) + block_.slots[i]),
                                  Request{is_last ? 0 : held.begin, held.count, is_last}.word(operation_.epoch));
        }
        block_.asked[i] = is_last ? kNoMore : block_.asked[i] + 1;
    }

    bool look_for_answers() {
        for (int i = 0; i < static_cast<int>(block_.slots.size()); ++i) {
            if (block_.asked[i] == kNoMore || block_.posted[i] == block_.asked[i] || !are_answers_here(i)) continue;
            if (place_.keeps(Rule::kPostOnce)) block_.posted[i] = block_.asked[i];
            due_.push_back(i);
        }
        return !due_.empty();
    }
    bool are_answers_here(int i) const {
        int num_missing = 0, num_here = 0;
        for (int node = 0; node < place_.num_ranks; ++node) {
            const NodeRows held = block_.node_rows[i * place_.num_ranks + node];
            if (held.count == 0) continue;
            const uint64_t* word = place_.window.full(place_.own(), NetworkWindow::kCombineFull, node) + block_.slots[i];
            if (place_.acquire(word, Order::kAnswers) == chunk_word(operation_.epoch, held.begin))
                ++num_here;
            else
                ++num_missing;
        }
        return num_missing == 0 || (num_here > 0 && !place_.keeps(Rule::kPostBehindAnswers));
    }
    int32_t& row(int i, int token, int node) { return block_.rows[(i * operation_.geometry.num_slot_rows + token) * place_.num_ranks + node]; }

    const Stream stream_;
    bool looks_for_answers_ = true;
    std::vector<int> free_;  // slots that are to be asked for again
};

// Takes blocks of tokens whose answers have come, and adds them up: in stages what fits, the rest at once.
class SourceWarp : public TakingWarp {
public:
    explicit SourceWarp(Block& block) : TakingWarp(block), stream_(own_tokens(block)) {}

    bool step() override {
        if (token_ == num_tokens_ && open()) return true;
        if (token_ < num_tokens_ && load()) return true;
        if (!in_stages_.empty()) return --in_stages_.front().num_steps_left < 0 ? add_up_oldest() : true;
        return has_queue_ended() && end();
    }

private:
    struct Addend {
        int node;
        const uint8_t* message;
        int64_t row;
    };
    struct Token {
        std::vector<Addend> addends;
        int i;  // the slot
        int32_t round;
        bool is_last;  // of its block
        int num_steps_left;
    };

    bool open() {
        int32_t i = -1;
        if (!take(&i)) return false;
        if (i < 0) return true;
        i_ = i;
        round_ = block_.asked[i] - 1;
        token_ = 0;
        num_tokens_ = stream_.rows_of(block_of(i, round_));
        return true;
    }
    int64_t block_of(int i, int32_t round) const { return block_.slots[i] + static_cast<int64_t>(round) * operation_.geometry.num_slots; }

    // False: it has to wait for what is in the stages.
    bool load() {
        Token token{{}, i_, round_, token_ + 1 == num_tokens_, block_.shape.num_load_steps};
        for (int node = 0; node < place_.num_ranks; ++node) {
            const int32_t row = block_.rows[(i_ * operation_.geometry.num_slot_rows + token_) * place_.num_ranks + node];
            if (node == place_.rank || row < 0) continue;
            const uint8_t* ring = place_.window.receive_ring(place_.own(), place_.rank, node);
            const int index = row - block_.node_rows[i_ * place_.num_ranks + node].begin;
            token.addends.push_back({node, ring + block_.message_offset(block_.slots[i_], index), row - operation_.first_rows[node][place_.rank]});
        }
        const int num_addends = static_cast<int>(token.addends.size());
        const bool has_stages = num_addends > 0 && num_addends <= block_.shape.num_stages;
        if (has_stages ? num_in_flight_ + num_addends > block_.shape.num_stages : num_in_flight_ > 0 && place_.keeps(Rule::kAtOnceBehindStages)) return false;
        ++token_;
        if (!has_stages) {
            add_up(token);
            if (token.is_last) finish(token);
            return true;
        }
        if (token.is_last && finishes_early(token)) finish(token);
        num_in_flight_ += num_addends;
        in_stages_.push_back(std::move(token));
        return true;
    }
    bool add_up_oldest() {
        const Token& token = in_stages_.front();
        add_up(token);
        num_in_flight_ -= static_cast<int>(token.addends.size());
        if (token.is_last && !finishes_early(token)) finish(token);
        in_stages_.pop_front();
        return true;
    }
    void add_up(const Token& token) {
        for (const Addend& addend : token.addends) operation_.take(addend.message, place_.rank, addend.node, addend.row);
    }
    void finish(const Token& token) { place_.publish(&block_.finished[token.i], token.round + 1, Order::kFinished); }
    bool finishes_early(const Token& token) const {
        return !place_.keeps(block_of(token.i, token.round + 1) >= stream_.num_chunks() ? Rule::kLastBehindResult : Rule::kRequestBehindResult);
    }

    const Stream stream_;
    std::deque<Token> in_stages_;
    int num_in_flight_ = 0;  // addends
    // The block of tokens that is being loaded.
    int i_ = 0, token_ = 0, num_tokens_ = 0;
    int32_t round_ = 0;
};

// --- roles ----------------------------------------------------------------------------------------------------------

// The first warp finds out whether its block collects; the others are forward and source warps, and one that posts.
class CombineWarp : public RoleWarp {
public:
    using RoleWarp::RoleWarp;

private:
    bool settle() override {
        uint64_t* word = &place_.words->collected[block_.own_place];
        if (block_.role == BlockRole::kBoth) return begin(true);
        if (block_.role == BlockRole::kSender && num_handshake_steps_left_-- > 0) return true;
        if (block_.role == BlockRole::kSender && !place_.keeps(Rule::kForwarderMayCollect)) return begin(false);
        if (has_looked_) return begin(place_.claim(word, before_, signal_word(operation_.epoch, 1), Rule::kClaimCollecting));
        before_ = peek(word);
        if (place_.keeps(Rule::kWordOfThisOperation) ? signal_epoch(before_) == operation_.epoch : before_ != 0) return begin(false);
        return has_looked_ = true;
    }
    bool begin(bool collects) {
        block_.collects = collects;
        const bool is_direct = block_.role == BlockRole::kSender && !collects && place_.answers_directly;
        block_.queue.order.resize(is_direct ? block_.receiving.size() : block_.slots.size());
        return has_settled();
    }

    std::unique_ptr<Warp> part() override {
        const int num_others = block_.shape.num_receiving_warps + block_.shape.num_sending_warps;
        const bool forwards = block_.role != BlockRole::kDeliverer, is_direct = forwards && !block_.collects && place_.answers_directly;
        const int num_forward_warps = !forwards ? 0 : block_.collects ? block_.shape.num_receiving_warps : num_others;
        if (number_ == num_others) {
            if (block_.collects) return std::make_unique<RequestWarp>(block_);
            if (is_direct) return std::make_unique<WatchWarp>(block_);
            return nullptr;
        }
        if (number_ >= num_forward_warps) return block_.collects ? std::make_unique<SourceWarp>(block_) : nullptr;
        if (is_direct) return std::make_unique<DirectForwardWarp>(block_);
        return std::make_unique<ForwardWarp>(block_, number_);
    }

    int num_handshake_steps_left_ = block_.shape.num_handshake_steps;
    bool has_looked_ = false;
    uint64_t before_ = 0;
};

}  // namespace streams
