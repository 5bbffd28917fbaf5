#pragma once
// How blocks that only send share the rows for other ranks, which the links do not take from all SMs alike: the stores of some wait while others are
// done. Rows are cut into pieces; a warp adds up or copies a piece by itself. Each gets a few pieces with its share and draws all others, one at a
// time, from a counter in device memory, so that all end together however fast the links take what they have.
#include "combine_weights.cuh"
#include "deepep/ptx/async_copy.cuh"

namespace deepep::ibgda {

// Pieces dealt to a warp. Few, because they stay with it however long its SM's stores wait; more than one, because rows that need no weights go
// before the weights have come. Four H200s, 128 tokens of 7168 each, top-8 of 288: two 22.8 us, one 23.3, three 23.4; on another machine two 23.0, four 25.5;
// two, and each number asked for one piece earlier, 24.1; rows shared by a block's warps and nothing drawn, 24.5 (benchmarks/results/2026-11-22-h200-x4).
constexpr int kMostDealt = 2;

// Parts of a row that a warp has under way together: those of a piece.
template <class Format>
constexpr int kPieceParts = Format::kColumns == 8 ? 2 : 1;

// Items of sending for other ranks run through the pieces of a row first, then through the sources, so that all links are busy at once.
struct Piece {
    int source;
    int token;
    int number;  // in its row

    __device__ static Piece of(const CombineArgs& args, int item) {
        uint32_t number, place;
        const uint32_t row = args.plan.by_num_pieces.quotient(static_cast<uint32_t>(item), &number);
        const uint32_t token = args.plan.by_num_sources.quotient(row, &place);
        int source = args.domain.rank + 1 + static_cast<int>(place);
        if (source >= args.domain.num_ranks) source -= args.domain.num_ranks;
        return {source, static_cast<int>(token), static_cast<int>(number)};
    }
};

// A warp that draws. What it has in hand are pieces of some rows: their choices lie side by side in the warp's part of shared memory, in 1 << choice_shift
// lanes for each row. Registers are scarce while rows are added up, and what is spilled waits for the number that has just been asked for.
template <class Format>
class Drawer {
public:
    static constexpr int kVectors = kPieceParts<Format>;
    static constexpr int kPartBytes = 64 * Format::kColumns;  // in x
    static constexpr bool kSumsAlways = !Format::kSendsSingleRows;
    using Row = typename Format::Row;

    __device__ Drawer(const CombineArgs& args, CombineShared& shared) : args_(args), shared_(shared) {}

    // Before the operation has begun: the choices of the first pieces, and the first row that will go as it is, as far as the handle says. Its memory
    // belongs to x in any case.
    __device__ void look_ahead(int share) {
        load_dealt(share, sender_number());
        if constexpr (!kSumsAlways) {
            const bool has_row = is_expert_row(args_, choices()[lane()].row);
            const unsigned mine = __ballot_sync(kAllLanes, has_row) & lanes_of_row(lane());
            const unsigned raw = __ballot_sync(kAllLanes, has_row && (mine & (mine - 1)) == 0);
            if (raw == 0) return;
            ahead_ = __ffs(static_cast<int>(raw)) - 1;
            load_row(ahead_, Piece::of(args_, item_of(ahead_)), v_ahead_);
        }
    }

    // The pieces dealt with the share, then what is drawn. `num_warps`: that send the share.
    //
    // Whoever does a share draws until nothing is left. So once all shares have been taken up, all pieces have been sent or are in the hands of warps that
    // will send them: a block that finds no share left may wait for what other blocks send.
    __device__ void send_share(int share, int num_warps) {
        sort();
        send_ahead();
        int sender = sender_number();
#pragma unroll 1
        while (send_rows()) {
            // Other blocks' shares are sent by workers alone: they play the parts of the receivers, too.
            sender += num_warps;
            __syncwarp();  // all have read the choices
            if (sender < kMostSenders) {
                load_dealt(share, sender);
            } else {
                if (next_ == kUnasked) ask();
                answer();
                if (next_ >= shared_.most_tokens * args_.plan.num_sources * args_.plan.num_pieces) break;
                DEEPEP_STAMP(9, threadIdx.x == 0 && sender < kMostSenders + num_warps);
                take_fetched();
                ask();
            }
            sort();
        }
        ptx::async_wait<0>();  // nothing lands in the memory of a block that has ended
    }

private:
    static constexpr int kUnasked = -2, kAsked = -1;
    static constexpr uint32_t kMostDrawn = 0x7fffffff;  // never reached. An increment that may wrap at 2^32 becomes an addition, whose result is waited for at once

    __device__ static int lane() { return static_cast<int>(threadIdx.x) % 32; }
    // Where lane `l`'s row is.
    __device__ int item_of(int l) const { return base_ + (l >> args_.plan.choice_shift) * args_.plan.num_sending_blocks * kMostSenders; }
    __device__ unsigned lanes_of_row(int l) const {
        const int width = 1 << args_.plan.choice_shift;
        return kAllLanes >> (32 - width) << (l & -width);
    }
    __device__ int choice() const { return lane() & ((1 << args_.plan.choice_shift) - 1); }

    // --- what is in hand

    // Row of x that belongs to the choice, or -1; weight.
    __device__ ChoiceWords* choices() const { return shared_.choices[threadIdx.x / 32]; }
    // Of the piece that comes next: there while the one before is being sent.
    __device__ ChoiceWords* fetched() const { return shared_.next_choices[threadIdx.x / 32]; }

    __device__ void load_dealt(int share, int sender) {
        base_ = share * kMostSenders + sender;
        ChoiceWords& to = choices()[lane()];
        const Piece piece = Piece::of(args_, item_of(lane()));
        int32_t row = -1, weight = 0;
        if (lane() >> args_.plan.choice_shift < args_.plan.num_dealt && piece.token < args_.max_tokens && choice() < args_.num_topk) {
            const int32_t* words = args_.handle + route_of(args_, piece.source, piece.token) + choice();
            row = words[args_.handle_layout.routes()];
            weight = words[args_.handle_layout.weights()];
        }
        to.row = row;
        to.weight = __int_as_float(weight);
        __syncwarp();
    }
    __device__ bool is_fetched(int token) const { return lane() < args_.num_topk && token < args_.max_tokens; }
    // The choices of the next piece are put on their way to shared memory.
    __device__ void fetch() const {
        const Piece piece = Piece::of(args_, next_);
        if (!is_fetched(piece.token)) return;
        const int32_t* words = args_.handle + route_of(args_, piece.source, piece.token) + lane();
        ChoiceWords& to = fetched()[lane()];
        ptx::async_copy<4>(&to.row, words + args_.handle_layout.routes());
        ptx::async_copy<4>(&to.weight, words + args_.handle_layout.weights());
        ptx::async_commit();
    }
    // Each lane reads what it has copied itself.
    __device__ void take_fetched() {
        base_ = next_;
        ChoiceWords& to = choices()[lane()];
        to.row = -1;
        if (is_fetched(Piece::of(args_, base_).token)) {
            ptx::async_wait<0>();
            const ChoiceWords& from = fetched()[lane()];
            to.row = from.row;
            to.weight = from.weight;
        }
        __syncwarp();  // before the next ones are fetched, and others read these
    }

    // Which rows there are.
    __device__ void sort() {
        const Piece piece = Piece::of(args_, item_of(lane()));
        const bool has_row = is_expert_row(args_, choices()[lane()].row) && piece.token < shared_.num_tokens[piece.source];
        if (!has_row) choices()[lane()].row = -1;
        const unsigned mine = __ballot_sync(kAllLanes, has_row) & lanes_of_row(lane());
        const bool leads = has_row && __ffs(static_cast<int>(mine)) - 1 == lane(), is_single = (mine & (mine - 1)) == 0;
        raw_ = kSumsAlways ? 0 : __ballot_sync(kAllLanes, leads && is_single);
        summed_ = __ballot_sync(kAllLanes, leads && (kSumsAlways || !is_single));
    }

    // --- drawing

    // What is drawn is a number and nothing else, so the increment orders nothing. The counter's word is this kernel's alone: the kernel before has
    // emptied it (a kernel boundary lies between), and the next one draws from another.
    __device__ void ask() {
        next_ = kAsked;
        if (lane() == 0) drawn_ = ptx::increment_relaxed_gpu(args_.domain.draws(kCombine, shared_.operation.num_sends), kMostDrawn);
    }
    // Waits for the answer if it has not been taken.
    __device__ void answer() {
        if (next_ != kAsked) return;
        const int num_dealt = args_.plan.num_sending_blocks * kMostSenders * args_.plan.num_dealt;
        next_ = num_dealt + static_cast<int>(__shfl_sync(kAllLanes, drawn_, 0));
        fetch();
    }

    // --- sending

    // Rows that need no weights go first. False: the weights of some others did not come.
    __device__ bool send_rows() {
        uint32_t start = 0;
#pragma unroll 1
        while ((raw_ | summed_) != 0) {
            const bool is_raw = raw_ != 0;
            [[maybe_unused]] const bool is_first = next_ == kUnasked;  // sum, or a raw row of those that were dealt
            if (!is_raw && next_ == kUnasked) ask();
            const int l = __ffs(static_cast<int>(is_raw ? raw_ : summed_)) - 1;
            if (!send_row(l, is_raw)) {
                if (is_hopeful(sent().source, &start)) continue;
                if (!args_.domain.enable_shrink) return false;
            }
            DEEPEP_STAMP(5, threadIdx.x == 0 && is_first && is_raw);
            DEEPEP_STAMP(10, threadIdx.x == 0 && is_first && !is_raw);
            (is_raw ? raw_ : summed_) &= ~(1u << l);
            start = 0;
        }
        return true;
    }

    // The piece's first columns of this lane, in a row of x.
    __device__ static uint32_t begin_of(const Piece& piece) {
        return static_cast<uint32_t>(piece.number * kVectors * kPartBytes + lane() * (2 * Format::kColumns));
    }
    // Bit j: the row has the columns of the piece's part j.
    __device__ unsigned inside(uint32_t begin) const {
        unsigned inside = 0;
#pragma unroll
        for (int j = 0; j < kVectors; ++j)
            if (begin + static_cast<uint32_t>(j * kPartBytes) < static_cast<uint32_t>(2 * args_.hidden)) inside |= 1u << j;
        return inside;
    }
    __device__ void load_row(int l, const Piece& piece, Row (&v)[kVectors]) const {
        const uint32_t begin = begin_of(piece);
        const uint8_t* columns = expert_row(args_, choices()[l].row) + begin;
#pragma unroll
        for (int j = 0; j < kVectors; ++j)
            v[j] = (inside(begin) >> j & 1) != 0 ? Format::load_row(reinterpret_cast<const Row*>(columns + j * kPartBytes)) : Row{};
    }
    __device__ uint8_t* place_of(const Piece& piece) const {
        return shared_.operation.outgoing[piece.source] + slot_offset<false>(args_, piece.token, 0) + static_cast<uint32_t>(piece.number * kVectors * Format::kPartBytes);
    }
    template <class Part>
    __device__ void store(uint8_t* place, uint32_t begin, const Part& part) const {
#pragma unroll
        for (int j = 0; j < kVectors; ++j)
            if ((inside(begin) >> j & 1) != 0) Format::store(place + j * Format::kPartBytes, Format::encode(part(j)));
    }
    // The row of look_ahead.
    __device__ void send_ahead() {
        if (ahead_ < 0 || (raw_ >> ahead_ & 1) == 0) return;
        const Piece piece = Piece::of(args_, item_of(ahead_));
        store(place_of(piece), begin_of(piece), [&](int j) { return v_ahead_[j]; });
        raw_ &= ~(1u << ahead_);
    }
    // What is being sent.
    __device__ SentPiece& sent() const { return shared_.sent[threadIdx.x / 32]; }

    // False: nothing has been sent, weights have not come yet.
    __device__ bool send_row(int l, bool is_raw) {
        const Piece piece = Piece::of(args_, item_of(l));
        const uint32_t begin = begin_of(piece);
        if (is_raw) {
            Row v[kVectors];
            load_row(l, piece, v);
            answer();
            store(place_of(piece), begin, [&](int j) { return v[j]; });
            return true;
        }
        __syncwarp();  // all have read what was sent before
        if (lane() == 0) sent() = {place_of(piece), piece.source, piece.token};
        unsigned left = __ballot_sync(kAllLanes, choices()[lane()].row >= 0) & lanes_of_row(l);
        __syncwarp();
        unsigned missing = shared_.has_weights == 0 ? left : 0;
        WeightedSum<Format, kVectors> sum;
        const ChoiceWords* words = choices();
#pragma unroll 1
        while (left != 0) {
            // Asked for when the rows are under way.
            left = sum.add(
                args_, left, [&](int from) { return words[from].row; }, [&](int from) { return __float_as_uint(words[from].weight); }, begin, kPartBytes,
                inside(begin), [&] { return missing == 0 || (missing = poll_weights(missing)) == 0; });
            if (missing != 0) return false;
        }
        answer();
        store(sent().place, begin, [&](int j) { return sum.rounded(j); });
        return true;
    }

    // Looks for weights, for a while. Returns the lanes whose weights have not come.
    __device__ unsigned poll_weights(unsigned missing) const {
        const int source = sent().source;
        const uint32_t sequence = shared_.operation.sequences[source];
        const uint64_t* word = incoming_weights(args_.domain, shared_.operation, kCombine, source) + sent().token * args_.num_topk + choice();
#pragma unroll 1
        for (int poll = 0; missing != 0 && poll < kPollsPerCheck; ++poll) {
            bool is_missing = (missing >> lane() & 1) != 0;
            if (is_missing) {
                const uint64_t seen = ptx::load_relaxed_sys(word);
                is_missing = signal_epoch(seen) != sequence;
                if (!is_missing) choices()[lane()].weight = __uint_as_float(signal_value(seen));
            }
            missing = __ballot_sync(kAllLanes, is_missing);
        }
        __syncwarp();
        return missing;
    }
    // Whether the weights may still come. By a warp that holds nothing in its registers just then.
    __device__ bool is_hopeful(int source, uint32_t* start) {
        const Verdict verdict = judge_as_warp(args_.domain, shared_.operation, kCombine, source, start);
        if (verdict == Verdict::kReport && lane() == 0)
            fail(args_.domain, shared_.operation, kCombine, Phase::kWeights, source, 0, shared_.operation.sequences[source], *start);
        if (verdict != Verdict::kGoOn) return false;
        resend_weights<false>(args_, shared_, *start);
        return true;
    }

    const CombineArgs& args_;
    CombineShared& shared_;
    int base_ = 0;         // the item of the first row in hand
    unsigned raw_ = 0;     // lanes whose row goes as it is
    unsigned summed_ = 0;  // one lane of each token whose rows are added up
    int next_ = kUnasked;  // the item to send next
    uint32_t drawn_ = 0;   // lane 0: the answer
    int ahead_ = -1;       // the lane whose row has been loaded
    Row v_ahead_[kVectors] = {};
};

}  // namespace deepep::ibgda
