#pragma once
// What the warps of both operations have in common: the part that each takes in its block, and the block's queue, step by step.
#include "streams.hpp"

namespace streams {

// --- parts ----------------------------------------------------------------------------------------------------------

// The first warp settles what its block does, then each takes its part.
class RoleWarp : public Warp {
public:
    RoleWarp(Block& block, int number) : Warp(block), number_(number) {}

    bool step() override {
        if (part_ != nullptr) {
            const bool has_moved = part_->step();
            if (!part_->is_over()) return has_moved;
            part_ = next_part();
            return part_ != nullptr || end();
        }
        if (number_ == 0 && block_.has_begun == 0) return settle();
        if (streams::acquire(&block_.has_begun) == 0) return false;
        part_ = part();
        return part_ != nullptr || end();
    }

protected:
    virtual bool settle() = 0;
    virtual std::unique_ptr<Warp> part() = 0;  // null: none
    // When that is over.
    virtual std::unique_ptr<Warp> next_part() { return nullptr; }

    bool has_settled() {
        __atomic_store_n(&block_.has_begun, 1, __ATOMIC_RELEASE);  // a barrier of the block
        return true;
    }

    const int number_;

private:
    std::unique_ptr<Warp> part_;
};

// --- the queue of a block -------------------------------------------------------------------------------------------

class PostingWarp : public Warp {
public:
    using Warp::Warp;

protected:
    // One step of posting what is due, first all entries, then their count; false: nothing is due.
    bool post() {
        if (due_.empty()) return false;
        WorkQueue& queue = block_.queue;
        const bool counts_now = place_.keeps(Rule::kEntryBeforeCount) ? num_entered_ == due_.size() : !is_counted_;
        if (counts_now) {
            place_.publish(&queue.num_posted, num_posted_ + static_cast<int32_t>(due_.size()), Order::kPosts);
            is_counted_ = true;
        } else {
            poke(&queue.order[(num_posted_ + num_entered_) % queue.order.size()], due_[num_entered_]);
            ++num_entered_;
        }
        if (is_counted_ && num_entered_ == due_.size()) {
            num_posted_ += static_cast<int32_t>(due_.size());
            due_.clear();
            num_entered_ = 0;
            is_counted_ = false;
        }
        return true;
    }
    bool end_queue(int32_t why = kAllPosted) {
        place_.publish(&block_.queue.is_over, why, Order::kPosts);
        return end();
    }

    std::vector<int32_t> due_;

private:
    size_t num_entered_ = 0;
    int32_t num_posted_ = 0;
    bool is_counted_ = false;
};

class TakingWarp : public Warp {
public:
    using Warp::Warp;

protected:
    // As far as this warp knows: no more will be posted, and nothing was there when it has looked after that.
    bool has_queue_ended() const { return has_ended_; }
    int32_t why_queue_ended() const { return place_.acquire(&block_.queue.is_over, Order::kTakes); }
    // One step towards the oldest work that nobody has taken; false: there is none. `number` is its number, once the warp has it.
    bool take(int32_t* number) {
        WorkQueue& queue = block_.queue;
        switch (phase_) {
            case Phase::kLook: {
                // Steps lie between the two that count: the end as it was read at the look before, and this look; by mistake that look, and the end as it is now.
                const bool is_end_known = is_end_known_;
                is_end_known_ = why_queue_ended() != 0;
                if (!place_.keeps(Rule::kReadQueueEndFirst) && has_found_nothing_ && is_end_known_) has_ended_ = true;
                if (has_ended_) return false;
                taken_ = peek(&queue.num_taken);
                has_found_nothing_ = taken_ == place_.acquire(&queue.num_posted, Order::kTakes);
                if (has_found_nothing_) {
                    has_ended_ = is_end_known && place_.keeps(Rule::kReadQueueEndFirst);
                    return false;
                }
                seen_ = entry();
                phase_ = Phase::kTake;
                return true;
            }
            case Phase::kTake:
                phase_ = Phase::kLook;
                if (!place_.claim(&queue.num_taken, taken_, taken_ + 1, Rule::kClaimWork)) return true;
                if (place_.keeps(Rule::kReadBeforeTaking))
                    *number = seen_;
                else
                    phase_ = Phase::kRead;
                return true;
            default:
                *number = entry();
                phase_ = Phase::kLook;
                return true;
        }
    }

private:
    enum class Phase { kLook, kTake, kRead };
    int32_t entry() const { return peek(&block_.queue.order[taken_ % block_.queue.order.size()]); }

    Phase phase_ = Phase::kLook;
    int32_t taken_ = 0, seen_ = 0;
    bool is_end_known_ = false, has_found_nothing_ = false, has_ended_ = false;
};

}  // namespace streams
