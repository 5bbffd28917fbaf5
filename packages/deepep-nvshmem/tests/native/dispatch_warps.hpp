#pragma once
// Dispatch: the warps of a block, step by step.
#include <deque>

#include "queue_warps.hpp"

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

// A sender takes no chunk any more once its team's deliverer has begun.
inline bool is_relieved(const Block& block) {
    if (block.role != BlockRole::kSender) return false;
    return peek(&block.place.words->deliverers_begun[block.team]) == signal_word(block.operation.epoch, 1) || !block.place.keeps(Rule::kDeliverUntilRelieved);
}

// Looks around all contexts for chunks that have come, claims them, and posts them to the block's deliver warps.
class ArrivalWarp : public PostingWarp {
public:
    using PostingWarp::PostingWarp;

    bool step() override {
        if (!found_.empty()) return claim();
        if (place_.keeps(Rule::kNoteBeforePost) && note()) return true;
        if (post() || note()) return true;
        return look();
    }
    // What it has found is not posted yet.
    bool is_amid_look() const { return !found_.empty() || !notes_.empty() || !due_.empty(); }

private:
    struct Found {
        int index;  // of the context
        uint64_t entry;
    };
    struct Note {
        int index;
        int32_t chunk;
    };
    const uint64_t* full(int index) const {
        return place_.window.full(place_.own(), NetworkWindow::kDispatchFull, block_.receiving[index].node) + block_.receiving[index].slot;
    }

    bool look() {
        if (is_relieved(block_)) {
            for (size_t index = 0; index < block_.arrived.size(); ++index) block_.num_held += peek(&block_.credits[index]) != block_.arrived[index] + 1;
            return end_queue(kRelieved);
        }
        bool is_everything_over = true;
        for (int index = 0; index < static_cast<int>(block_.receiving.size()); ++index) {
            const uint64_t seen = peek(full(index));  // the word may be older than the entry
            const uint64_t entry = peek(block_.entry(index));
            const int32_t chunk = block_.chunk_of(entry, block_.receiving[index].slot);
            if (chunk >= block_.received(block_.receiving[index].node).num_chunks()) continue;
            is_everything_over = false;
            if (seen == chunk_word(operation_.epoch, chunk))
                found_.push_back({index, entry});
            else if (!place_.keeps(Rule::kNeverWaitForOne))
                break;
        }
        if (is_everything_over || (found_.empty() && !place_.keeps(Rule::kEndBehindLastChunk))) return end_queue(kAllPosted);
        return !found_.empty();
    }
    // The next chunk of the context comes only after this one's credit, so it may be named at once.
    bool claim() {
        const auto [index, entry] = found_.back();
        found_.pop_back();
        const int32_t chunk = block_.chunk_of(entry, block_.receiving[index].slot);
        if (!place_.claim(block_.entry(index), entry, chunk_word(operation_.epoch, chunk + operation_.geometry.num_slots), Rule::kClaimDeliveries)) return true;
        static_cast<void>(place_.acquire(full(index), Order::kChunks));
        notes_.push_back({index, chunk});
        due_.push_back(index);
        return true;
    }
    bool note() {
        if (notes_.empty()) return false;
        for (const Note& note : notes_) block_.arrived[note.index] = note.chunk;
        notes_.clear();
        return true;
    }

    std::vector<Found> found_;
    std::vector<Note> notes_;
};

// Takes chunks from the queue, and keeps a few rows under way: their loads end when they are delivered, the oldest first.
class DeliverWarp : public TakingWarp {
public:
    DeliverWarp(Block& block, bool takes_chunks) : TakingWarp(block), takes_chunks_(takes_chunks) {}

    bool step() override {
        if (!place_.keeps(Rule::kKeepWhatIsHeld) && takes_chunks_ && why_queue_ended() == kRelieved) {
            takes_chunks_ = false;
            num_rows_ = next_row_;
            under_way_.clear();
        }
        const bool has_stage = static_cast<int>(under_way_.size()) < block_.shape.num_stages;
        if (has_stage && next_row_ < num_rows_) return load();
        if (has_stage && takes_chunks_ && open()) return true;
        if (!under_way_.empty()) return deliver();
        if (takes_chunks_ && !has_queue_ended()) return false;
        __atomic_fetch_sub(&block_.num_deliverers_left, 1, __ATOMIC_RELEASE);
        return end();
    }

private:
    struct Row {
        int index;  // of the context
        int32_t chunk;
        int row;
        bool is_last;  // of the chunk
    };

    bool open() {
        int32_t index = -1;
        if (!take(&index)) return false;
        if (index < 0) return true;
        index_ = index;
        chunk_ = block_.arrived[index];
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

    bool takes_chunks_;
    // The chunk that is being loaded.
    int index_ = 0, next_row_ = 0, num_rows_ = 0;
    int32_t chunk_ = 0;
    std::deque<Row> under_way_;
};

// Gives all credits of a block back, and so makes its fences for the whole system: it passes over all contexts until the deliver warps have ended. Where no
// other warp looks for chunks (`looks`), it does that, too, once on every pass.
class CreditWarp : public Warp {
public:
    CreditWarp(Block& block, bool looks) : Warp(block), returned_(block.receiving.size(), 0) {
        if (looks) arrivals_ = std::make_unique<ArrivalWarp>(block);
    }

    bool step() override {
        switch (phase_) {
            case Phase::kBegin:
                is_last_pass_ = have_others_ended();
                phase_ = Phase::kArrivals;
                [[fallthrough]];
            case Phase::kArrivals: {
                const bool has_moved = arrivals_ != nullptr && arrivals_->step();
                if (arrivals_ != nullptr && arrivals_->is_over()) arrivals_ = nullptr;
                const bool looks_again = !has_moved && !place_.keeps(Rule::kLookInTurn);
                if (arrivals_ == nullptr || !(arrivals_->is_amid_look() || looks_again)) phase_ = Phase::kLook;
                return has_moved;
            }
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
    enum class Phase { kBegin, kArrivals, kLook, kGiveBack };
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
    std::unique_ptr<ArrivalWarp> arrivals_;  // until it has ended the queue
    std::vector<Due> due_;
    std::vector<int32_t> returned_;
};

// Deliver warps, send warps, and the credit warp. A deliverer has nothing to send: its first send warp looks for chunks. In a sender, warps that have nothing
// more to deliver help to send.
class DispatchWarp : public RoleWarp {
public:
    using RoleWarp::RoleWarp;

private:
    bool settle() override {
        if (block_.role == BlockRole::kDeliverer && num_late_steps_left_-- > 0) return true;
        if (block_.role == BlockRole::kDeliverer) poke(&place_.words->deliverers_begun[block_.team], signal_word(operation_.epoch, 1));
        block_.delivers = !is_relieved(block_);
        return has_settled();
    }

    std::unique_ptr<Warp> part() override {
        const int sender = number_ - block_.shape.num_receiving_warps;
        const bool delivers = place_.keeps(Rule::kSettleOnce) ? block_.delivers : !is_relieved(block_), is_deliverer = block_.role == BlockRole::kDeliverer;
        if (sender < 0) return std::make_unique<DeliverWarp>(block_, delivers);
        if (sender == block_.shape.num_sending_warps) return std::make_unique<CreditWarp>(block_, delivers && !is_deliverer);
        if (!is_deliverer) return std::make_unique<SendWarp>(block_, sender);
        return sender == 0 ? std::make_unique<ArrivalWarp>(block_) : nullptr;
    }
    std::unique_ptr<Warp> next_part() override {
        if (number_ >= block_.shape.num_receiving_warps || block_.role != BlockRole::kSender || is_helping_) return nullptr;
        is_helping_ = true;
        return std::make_unique<SendWarp>(block_, block_.shape.num_sending_warps + number_);
    }

    int num_late_steps_left_ = block_.shape.num_late_steps;
    bool is_helping_ = false;
};

}  // namespace streams
