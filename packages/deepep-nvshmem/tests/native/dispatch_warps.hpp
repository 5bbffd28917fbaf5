#pragma once
// Dispatch: the warps of a block, step by step.
#include <deque>

#include "streams.hpp"

namespace streams {

// Takes whatever chunk can go.
class SendWarp : public Warp {
public:
    SendWarp(Block& block, int warp) : Warp(block), first_(warp * 7) {}

    bool step() override {
        if (is_sending_) return send();
        if (chosen_ < 0) return look();
        const int index = chosen_;
        chosen_ = -1;
        if (!place_.claim(&block_.next_sent[index], chunk_, kTaken, Rule::kClaimSends)) return true;
        acquire_credit(index);
        index_ = index;
        row_ = 0;
        return is_sending_ = true;
    }

private:
    int64_t before() const { return chunk_ - operation_.geometry.num_slots; }
    const uint64_t* credit(int index) const {
        return place_.window.credit(place_.own(), block_.sending[index].node) + block_.sending[index].slot;
    }
    void acquire_credit(int index) const {
        if (before() >= 0) static_cast<void>(acquire(credit(index)));
    }

    bool look() {
        const int count = static_cast<int>(block_.sending.size());
        bool is_everything_over = true;
        for (int i = 0; i < count; ++i) {
            const int index = (first_ + i) % count;
            chunk_ = peek(&block_.next_sent[index]);
            is_everything_over = is_everything_over && chunk_ == kOver;
            if (chunk_ < 0) continue;
            const bool is_end = chunk_ >= block_.sent(block_.sending[index].node).num_chunks();
            if (before() >= 0 && place_.keeps(is_end ? Rule::kDrain : Rule::kWaitForCredit) &&
                peek(credit(index)) != chunk_word(operation_.epoch, before()))
                continue;
            if (!is_end) {
                chosen_ = index;
                return true;
            }
            acquire_credit(index);
            poke(&block_.next_sent[index], kOver);
            return true;
        }
        return is_everything_over && end();
    }

    bool send() {
        const auto [node, slot] = block_.sending[index_];
        const Stream stream = block_.sent(node);
        uint8_t* ring = place_.window.send_ring(place_.own(), place_.rank, node);
        operation_.write(ring + block_.message_offset(slot, row_), place_.rank, node, stream.first_row(chunk_) + row_);
        if (++row_ < stream.rows_of(chunk_)) return true;
        uint8_t* to = place_.at(node, place_.window.receive_ring(place_.own(), node, place_.rank));
        uint64_t* word = place_.at(node, place_.window.full(place_.own(), NetworkWindow::kDispatchFull, place_.rank) + slot);
        place_.port->put(to + block_.message_offset(slot, 0), ring + block_.message_offset(slot, 0), row_ * operation_.geometry.num_message_bytes, word,
                         chunk_word(operation_.epoch, chunk_));
        poke(&block_.next_sent[index_], chunk_ + operation_.geometry.num_slots);
        is_sending_ = false;
        return true;
    }

    const int first_;  // of the contexts that it looks at
    int chosen_ = -1;  // by the last look
    bool is_sending_ = false;
    int index_ = 0, row_ = 0;
    int32_t chunk_ = 0;
};

// Opens any chunk that has arrived, and keeps a few rows under way: their loads end when they are delivered, the oldest first. In a sender it takes nothing
// any more once the team's deliverer has begun, and then helps to send.
class DeliverWarp : public Warp {
public:
    DeliverWarp(Block& block, int warp) : Warp(block), first_(warp * 7), then_(block, block.shape.num_sending_warps + warp) {}

    bool step() override {
        if (is_sending_) {
            const bool has_moved = then_.step();
            return then_.is_over() ? end() : has_moved;
        }
        return deliver_step();
    }

private:
    bool deliver_step() {
        uint64_t* begun = &place_.words->deliverers_begun[block_.team];
        const uint64_t is_begun = signal_word(operation_.epoch, 1);
        if (block_.role == BlockRole::kDeliverer) poke(begun, is_begun);
        is_relieved_ = is_relieved_ || (block_.role == BlockRole::kSender && (peek(begun) == is_begun || !place_.keeps(Rule::kDeliverUntilRelieved)));
        if (is_relieved_) {
            chosen_ = -1;
            if (!place_.keeps(Rule::kKeepWhatIsHeld)) {
                num_rows_ = next_row_;
                under_way_.clear();
            }
        }
        const bool has_stage = static_cast<int>(under_way_.size()) < block_.shape.num_stages;
        if (has_stage && next_row_ < num_rows_) return load();
        if (has_stage && chosen_ >= 0) return open();
        if (has_stage && !is_relieved_ && look()) return true;
        if (!under_way_.empty()) return deliver();
        if (!is_relieved_ && !is_everything_over_ && place_.keeps(Rule::kEndBehindLastChunk)) return false;
        __atomic_fetch_sub(&block_.num_deliverers_left, 1, __ATOMIC_RELEASE);
        if (block_.role != BlockRole::kSender) return end();
        return is_sending_ = true;
    }

    struct Row {
        int index;  // of the context
        int32_t chunk;
        int row;
        bool is_last;  // of the chunk
    };
    const uint64_t* full(int index) const {
        return place_.window.full(place_.own(), NetworkWindow::kDispatchFull, block_.receiving[index].node) + block_.receiving[index].slot;
    }

    bool look() {
        const int count = static_cast<int>(block_.receiving.size());
        is_everything_over_ = true;
        for (int i = 0; i < count; ++i) {
            const int index = (first_ + i) % count;
            const uint64_t seen = peek(full(index));  // the word may be older than the entry
            const uint64_t entry = peek(block_.entry(index));
            const int32_t chunk = block_.chunk_of(entry, block_.receiving[index].slot);
            if (chunk >= block_.received(block_.receiving[index].node).num_chunks()) continue;
            is_everything_over_ = false;
            if (seen == chunk_word(operation_.epoch, chunk)) {
                chosen_ = index;
                chosen_entry_ = entry;
                return true;
            }
            if (!place_.keeps(Rule::kNeverWaitForOne)) return false;
        }
        return false;
    }
    // The next chunk of the context comes only after this one's credit, so it may be named at once.
    bool open() {
        const int index = chosen_;
        chosen_ = -1;
        const int32_t chunk = block_.chunk_of(chosen_entry_, block_.receiving[index].slot);
        if (!place_.claim(block_.entry(index), chosen_entry_, chunk_word(operation_.epoch, chunk + operation_.geometry.num_slots), Rule::kClaimDeliveries)) return true;
        static_cast<void>(acquire(full(index)));
        index_ = index;
        chunk_ = chunk;
        next_row_ = 0;
        num_rows_ = block_.received(block_.receiving[index].node).rows_of(chunk_);
        return true;
    }
    bool load() {
        const bool is_last = next_row_ + 1 == num_rows_;
        under_way_.push_back({index_, chunk_, next_row_++, is_last});
        if (is_last && !place_.keeps(Rule::kCreditBehindLoads)) place_.publish(&block_.credits[index_], chunk_ + 1, Order::kCredits);
        return true;
    }
    bool deliver() {
        const Row item = under_way_.front();
        under_way_.pop_front();
        const auto [node, slot] = block_.receiving[item.index];
        const uint8_t* ring = place_.window.receive_ring(place_.own(), place_.rank, node);
        operation_.take(ring + block_.message_offset(slot, item.row), node, place_.rank, block_.received(node).first_row(item.chunk) + item.row);
        if (item.is_last && place_.keeps(Rule::kCreditBehindLoads)) place_.publish(&block_.credits[item.index], item.chunk + 1, Order::kCredits);
        return true;
    }

    const int first_;
    int chosen_ = -1;  // by the last look
    uint64_t chosen_entry_ = 0;
    bool is_everything_over_ = false;  // as of the last look
    bool is_relieved_ = false, is_sending_ = false;
    SendWarp then_;
    // The chunk that is being loaded.
    int index_ = 0, next_row_ = 0, num_rows_ = 0;
    int32_t chunk_ = 0;
    std::deque<Row> under_way_;
};

// Gives all credits of a block back, and so makes its fences for the whole system: it passes over all contexts until the deliver warps have ended.
class CreditWarp : public Warp {
public:
    explicit CreditWarp(Block& block) : Warp(block), returned_(block.receiving.size(), 0) {}

    bool step() override {
        switch (phase_) {
            case Phase::kBegin:
                is_last_pass_ = have_others_ended();
                phase_ = Phase::kLook;
                return false;
            case Phase::kLook:
                look();
                phase_ = Phase::kGiveBack;
                return !due_.empty();
            default:
                if (!due_.empty()) {
                    give_back(due_.back());
                    due_.pop_back();
                    return true;
                }
                phase_ = Phase::kBegin;
                if (!place_.keeps(Rule::kReadEndFirst)) is_last_pass_ = have_others_ended();
                return is_last_pass_ && end();
        }
    }

private:
    enum class Phase { kBegin, kLook, kGiveBack };
    struct Due {
        int index;  // of the context
        int32_t credit;
    };

    bool have_others_ended() const { return acquire(&block_.num_deliverers_left) == 0; }
    void look() {
        for (int index = 0; index < static_cast<int>(returned_.size()); ++index) {
            const int32_t credit = acquire(&block_.credits[index]);
            if (credit != returned_[index]) due_.push_back({index, credit});
        }
    }
    void give_back(const Due& due) {
        const auto [node, slot] = block_.receiving[due.index];
        returned_[due.index] = due.credit;
        place_.port->set_word(place_.at(node, place_.window.credit(place_.own(), place_.rank) + slot), chunk_word(operation_.epoch, due.credit - 1));
    }

    Phase phase_ = Phase::kBegin;
    bool is_last_pass_ = false;
    std::vector<Due> due_;
    std::vector<int32_t> returned_;
};

}  // namespace streams
