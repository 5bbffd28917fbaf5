#pragma once
// Which of the moves on a stream have landed, told by one event: it stands behind a batch of them, and while it has not happened, later moves
// gather in the next batch. So a question costs one look at the event, however many moves there are.
#include <cstdint>

namespace deepep::ibgda {

class Batches {
public:
    // A move was put on the stream.
    void add_move() { is_open_empty_ = false; }
    // The batch of the last move.
    uint64_t last() const { return is_open_empty_ ? open_ - 1 : open_; }

    bool has_landed(uint64_t batch) const { return batch <= landed_; }
    // record() puts the event behind all moves; has_happened() looks at it. Either may find that the stream is broken: then nobody asks again.
    template <class Record, class HasHappened>
    bool look(uint64_t batch, const Record& record, const HasHappened& has_happened) {
        if (has_landed(batch)) return true;
        if (!is_recorded_) {
            record();
            is_recorded_ = is_open_empty_ = true;
            ++open_;
        }
        if (has_happened()) {
            is_recorded_ = false;
            landed_ = open_ - 1;
        }
        return has_landed(batch);
    }
    // Somebody has waited for the whole stream.
    void land_all() {
        landed_ = open_++;
        is_open_empty_ = true;
        is_recorded_ = false;
    }

private:
    uint64_t open_ = 1;    // the batch to which the next move belongs
    uint64_t landed_ = 0;  // batches up to here have landed
    bool is_open_empty_ = true;
    bool is_recorded_ = false;  // the event stands behind batch open_ - 1
};

}  // namespace deepep::ibgda
