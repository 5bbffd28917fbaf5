#pragma once
// The sending half of combine: warps of a block share rows, each takes parts of them. It adds up what this rank's experts made of a source's
// token and stores the sum into the source's slot. A row alone goes as it is, and so do all with ll_reduce = "expert": the source multiplies.
#include "combine_draw.cuh"

namespace deepep::ibgda {

// Rows of some tokens, side by side in a warp: 1 << choice_shift lanes for each, one for each choice.
struct Choices {
    int source;
    int token;
    int chunk;            // of the row
    bool is_own = false;  // the own rank's: the weight is here
    int32_t row = -1;     // of x that belongs to the choice; -1: none here
    uint32_t weight = 0;  // bits

    // The lane's row, `turn` steps after a share's first ones. Items run through the chunks first, then through the sources, so that all links are busy at once.
    __device__ static Choices load(const CombineArgs& args, int share, int turn, bool is_alone = false) {
        const CombinePlan& plan = args.plan;
        Choices choices;
        const int item = first(args, share) + (turn + (is_alone ? 0 : static_cast<int>(threadIdx.x) % 32 >> plan.choice_shift)) * stride(args, share);
        choices.is_own = is_own_share(args, share);
        const int pair = item >> plan.chunk_shift, k = static_cast<int>(threadIdx.x) & ((1 << plan.choice_shift) - 1);
        choices.chunk = item & ((1 << plan.chunk_shift) - 1);
        choices.token = static_cast<int>(plan.by_num_sources.quotient(static_cast<uint32_t>(pair)));
        uint32_t place;
        plan.by_num_sources.quotient(static_cast<uint32_t>(pair + (choices.token >> plan.turn_shift)), &place);
        choices.source = args.domain.rank + 1 + static_cast<int>(place);
        if (choices.source >= args.domain.num_ranks) choices.source -= args.domain.num_ranks;
        if (choices.is_own) {
            choices.source = args.domain.rank;
            choices.token = item;
        }
        if (choices.token >= args.max_tokens || k >= args.num_topk) return choices;
        const int64_t i = route_of(args, choices.source, choices.token) + k;
        choices.row = args.handle[args.handle_layout.routes() + i];
        if (!choices.is_own)
            choices.weight = static_cast<uint32_t>(args.handle[args.handle_layout.weights() + i]);
        else if (choices.token < args.num_tokens)
            choices.weight = __float_as_uint(args.topk_weights[choices.token * args.num_topk + k]);
        return choices;
    }
    // Where roles go by block, the shares of receiving blocks hold the own rank's rows and nothing else.
    __device__ static bool is_own_share(const CombineArgs& args, int share) { return args.plan.num_sending_blocks > 0 && share >= args.plan.num_sending_blocks; }
    // A share's items.
    __device__ static int first(const CombineArgs& args, int share) { return is_own_share(args, share) ? share - args.plan.num_sending_blocks : share; }
    __device__ static int stride(const CombineArgs& args, int share) {
        const int num_sending = args.plan.num_sending_blocks;
        return share < num_sending ? num_sending : static_cast<int>(gridDim.x) - num_sending;
    }
};

// A warp that sends: the workers do, and for their block's own share the receivers, too, to which nothing comes so early.
template <bool kAtSource, class Format, bool kRemote>
class Sender {
public:
    static constexpr int kVectors = kPieceParts<Format>;
    static constexpr int kPartBytes = 64 * Format::kColumns;  // in x
    static constexpr bool kSumsAlways = !kAtSource && !Format::kSendsSingleRows;

    // The warp is one of num_senders that share the rows.
    __device__ Sender(const CombineArgs& args, CombineShared& shared, int num_senders)
        : args_(args), shared_(shared), lane_(static_cast<int>(threadIdx.x) % 32), num_senders_(num_senders) {}

    // Before the operation has begun: the first row that will go as it is, as far as the handle says, is put on its way. Its memory belongs to x in any case.
    __device__ void look_ahead(const Choices& choices) {
        if constexpr (!kAtSource && !kSumsAlways) {
            const bool has_row = is_expert_row(args_, choices.row);
            const unsigned mine = __ballot_sync(kAllLanes, has_row) & lanes_of_row();
            const unsigned raw = __ballot_sync(kAllLanes, has_row && (mine & (mine - 1)) == 0);
            if (raw == 0) return;
            ahead_ = __ffs(static_cast<int>(raw)) - 1;
            load_raw(expert_row(args_, __shfl_sync(kAllLanes, choices.row, ahead_)), parts_of(__shfl_sync(kAllLanes, choices.chunk, ahead_)), v_ahead_);
        }
    }

    // This warp's parts of a share's rows. `choices`: the first ones.
    __device__ void send_rows(int share, Choices choices) {
        const int num_items = Choices::is_own_share(args_, share) ? shared_.most_tokens : (shared_.most_tokens * args_.plan.num_sources) << args_.plan.chunk_shift;
        const int first = Choices::first(args_, share), stride = Choices::stride(args_, share), step = 32 >> args_.plan.choice_shift;
#pragma unroll 1
        for (int turn = 0; first + turn * stride < num_items; turn += step) {
            if (turn != 0) choices = Choices::load(args_, share, turn);
            take(choices, kRemote && args_.domain.remote.has(choices.source));
            if (!send_taken() && !args_.domain.enable_shrink) return;
        }
    }

    // For a rank outside the NVLink domain: this warp's parts of the row that `choices` names in its first lanes. `sent`: the choices whose rows have
    // been stored. False: the weights did not come.
    __device__ bool send_remote(const Choices& choices, unsigned* sent) {
        take(choices, false);
        *sent = kAtSource ? raw_ : raw_ | summed_;
        return send_taken();
    }

private:
    // Which rows there are.
    __device__ void take(const Choices& choices, bool is_left_out) {
        choices_ = choices;
        const bool is_known = choices.token < shared_.num_tokens[choices.source] && is_expert_row(args_, choices.row);
        if (!is_known || is_left_out) choices_.row = -1;
        const bool has_row = choices_.row >= 0;
        const unsigned all = __ballot_sync(kAllLanes, has_row);
        mine_ = all & lanes_of_row();
        if constexpr (kAtSource) {
            // Choices of one expert share a row. Other lanes may hold other chunks of the same one.
            const unsigned alike = __match_any_sync(kAllLanes, choices_.row) & mine_;
            raw_ = __ballot_sync(kAllLanes, has_row && __ffs(static_cast<int>(alike)) - 1 == lane_);
            summed_ = 0;
        } else {
            const bool leads = has_row && __ffs(static_cast<int>(mine_)) - 1 == lane_, is_single = (mine_ & (mine_ - 1)) == 0;
            raw_ = kSumsAlways ? 0 : __ballot_sync(kAllLanes, leads && is_single);
            summed_ = __ballot_sync(kAllLanes, leads && (kSumsAlways || !is_single));
            is_missing_ = has_row && shared_.has_weights == 0 && !choices.is_own && (kSumsAlways || !is_single);
        }
    }
    // Rows that need no weights go first. False: the weights of some others did not come.
    __device__ bool send_taken() {
#pragma unroll 1
        for (unsigned left = raw_; left != 0; left &= left - 1) send_raw(__ffs(static_cast<int>(left)) - 1);
        DEEPEP_STAMP(5, threadIdx.x == 0 && raw_ != 0);
        ahead_ = -1;
        bool is_good = true;
        uint32_t start = 0;
#pragma unroll 1
        for (unsigned left = summed_; left != 0;) {
            const int l = __ffs(static_cast<int>(left)) - 1;
            if (!send_sum(l)) {
                if (goes_on(__shfl_sync(kAllLanes, choices_.source, l), &start)) continue;
                is_good = false;
                if (!args_.domain.enable_shrink) break;
            }
            DEEPEP_STAMP(10, threadIdx.x == 0 && left == summed_);
            left &= left - 1;
            start = 0;
        }
        return is_good;
    }

    __device__ unsigned lanes_of_row() const {
        const int width = 1 << args_.plan.choice_shift;
        return kAllLanes >> (32 - width) << (lane_ & -width);
    }

    // This warp's next parts of a row, and this lane's first columns there.
    struct Parts {
        int part;
        int end;

        __device__ uint32_t begin() const { return static_cast<uint32_t>(part * kPartBytes) + threadIdx.x % 32 * (2 * Format::kColumns); }
        __device__ unsigned inside(const CombineArgs& args, int num_senders) const {
            unsigned inside = 0;
#pragma unroll
            for (int j = 0; j < kVectors; ++j)
                if (part + j * num_senders < end && begin() + static_cast<uint32_t>(j * num_senders * kPartBytes) < static_cast<uint32_t>(2 * args.hidden)) inside |= 1u << j;
            return inside;
        }
    };
    __device__ uint32_t step() const { return static_cast<uint32_t>(num_senders_ * kPartBytes); }
    __device__ Parts parts_of(int chunk) const {
        const int first = chunk * args_.plan.num_chunk_parts;
        return {first + sender_number(), min(first + args_.plan.num_chunk_parts, args_.plan.num_parts)};
    }
    // The row of lane `l`. By all lanes, also those beyond the row's last column.
    __device__ Parts parts_of_lane(int l) const { return parts_of(__shfl_sync(kAllLanes, choices_.chunk, l)); }
    __device__ uint8_t* slot_of_lane(int l) const {
        const int source = __shfl_sync(kAllLanes, choices_.source, l), token = __shfl_sync(kAllLanes, choices_.token, l);
        return shared_.operation.outgoing[source] + slot_offset<kAtSource>(args_, token, l & ((1 << args_.plan.choice_shift) - 1));
    }
    __device__ uint8_t* place(uint8_t* slot, const Parts& parts, int j) const {
        return slot + static_cast<uint32_t>(parts.part + j * num_senders_) * Format::kPartBytes;
    }

    using Row = typename Format::Row;
    __device__ void load_raw(const uint8_t* row, const Parts& parts, Row (&v)[kVectors]) const {
        const unsigned inside = parts.inside(args_, num_senders_);
#pragma unroll
        for (int j = 0; j < kVectors; ++j)
            if ((inside >> j & 1) != 0) v[j] = Format::load_row(reinterpret_cast<const Row*>(row + parts.begin() + j * step()));
    }
    __device__ void send_raw(int l) {
        const uint8_t* row = expert_row(args_, __shfl_sync(kAllLanes, choices_.row, l));
        uint8_t* slot = slot_of_lane(l);
#pragma unroll 1
        for (Parts parts = parts_of_lane(l); parts.part < parts.end; parts.part += kVectors * num_senders_) {
            const unsigned inside = parts.inside(args_, num_senders_);
            if (l != ahead_) load_raw(row, parts, v_ahead_);
            ahead_ = -1;
#pragma unroll
            for (int j = 0; j < kVectors; ++j)
                if ((inside >> j & 1) != 0) Format::store(place(slot, parts, j), Format::encode(v_ahead_[j]));
        }
    }

    // False: nothing has been sent, weights have not come yet.
    __device__ bool send_sum(int l) {
        const unsigned rows = __shfl_sync(kAllLanes, mine_, l);
#pragma unroll 1
        for (Parts parts = parts_of_lane(l); parts.part < parts.end; parts.part += kVectors * num_senders_) {
            const unsigned inside = parts.inside(args_, num_senders_);
            WeightedSum<Format, kVectors> sum;
#pragma unroll 1
            for (unsigned left = rows; left != 0;) {
                bool is_ready;  // asked when the rows are under way
                left = sum.add(
                    args_, left, [&](int l) { return __shfl_sync(kAllLanes, choices_.row, l); }, [&](int l) { return __shfl_sync(kAllLanes, choices_.weight, l); },
                    parts.begin(), step(), inside, [&] { return is_ready = poll_weights(rows); });
                if (!is_ready) return false;
            }
            uint8_t* slot = slot_of_lane(l);
#pragma unroll
            for (int j = 0; j < kVectors; ++j)
                if ((inside >> j & 1) != 0) Format::store(place(slot, parts, j), Format::encode(sum.rounded(j)));
        }
        return true;
    }

    // Looks for weights, for a while. True: those of `rows` have come.
    __device__ bool poll_weights(unsigned rows) {
        if ((__ballot_sync(kAllLanes, is_missing_) & rows) == 0) return true;
        const uint32_t sequence = shared_.operation.sequences[choices_.source];
        const uint64_t* word = incoming_weights(args_.domain, shared_.operation, kCombine, choices_.source) + choices_.token * args_.num_topk +
                               (lane_ & ((1 << args_.plan.choice_shift) - 1));
#pragma unroll 1
        for (int poll = 0; poll < kPollsPerCheck; ++poll) {
            if (is_missing_) {
                const uint64_t seen = ptx::load_relaxed_sys(word);
                is_missing_ = signal_epoch(seen) != sequence;
                choices_.weight = signal_value(seen);
            }
            if ((__ballot_sync(kAllLanes, is_missing_) & rows) == 0) return true;
        }
        return false;
    }
    // Whether there is still hope. By a warp that holds nothing in its registers just then.
    __device__ bool goes_on(int source, uint32_t* start) {
        const Verdict verdict = judge_as_warp(args_.domain, shared_.operation, kCombine, source, start);
        if (verdict == Verdict::kReport && lane_ == 0)
            fail(args_.domain, shared_.operation, kCombine, Phase::kWeights, source, 0, shared_.operation.sequences[source], *start);
        if (verdict != Verdict::kGoOn) return false;
        resend_weights<kRemote>(args_, shared_, *start);
        return true;
    }

    const CombineArgs& args_;
    CombineShared& shared_;
    int lane_;
    int num_senders_;
    Choices choices_;
    unsigned mine_ = 0;        // lanes with a row of this lane's token
    unsigned raw_ = 0;         // lanes whose row goes as it is
    unsigned summed_ = 0;      // one lane of each token whose rows are added up
    bool is_missing_ = false;  // this lane's weight has not come
    int ahead_ = -1;           // the lane whose row's first columns have been loaded
    Row v_ahead_[kVectors] = {};
};

// Rows for ranks outside the NVLink domain: the workers share a row in the outbox, then it goes as one work request.
template <bool kAtSource, class Format>
__device__ __noinline__ void post_rows(const CombineArgs& args, CombineShared& shared, int share) {
    const Domain& domain = args.domain;
    Sender<kAtSource, Format, true> sender(args, shared, kWorkerWarps);
    const int num_items = (shared.most_tokens * args.plan.num_sources) << args.plan.chunk_shift;
    const int lane = static_cast<int>(threadIdx.x) % 32;
#pragma unroll 1
    for (int turn = 0; share + turn * Choices::stride(args, share) < num_items; ++turn) {
        // One row at a time, so that the lanes of all others have none.
        Choices choices = Choices::load(args, share, turn, true);
        if (lane >> args.plan.choice_shift != 0) choices.row = -1;
        if (!domain.remote.has(choices.source) || choices.token >= shared.num_tokens[choices.source]) continue;
        unsigned sent = 0;
        const bool is_good = sender.send_remote(choices, &sent);
        if (ptx::named_barrier_or(kWorkers, kNumWorkers, !is_good) || threadIdx.x != 0) continue;
        // The bytes of the chunk.
        const uint32_t begin = static_cast<uint32_t>(choices.chunk * args.plan.num_chunk_parts) * Format::kPartBytes;
        const uint32_t end = min(begin + static_cast<uint32_t>(args.plan.num_chunk_parts) * Format::kPartBytes, static_cast<uint32_t>(args.row.num_bytes));
        const uint8_t* slots = shared.operation.outgoing[choices.source];
#pragma unroll 1
        for (unsigned left = kAtSource ? sent : sent != 0; left != 0 && begin < end; left &= left - 1)
            post_outgoing(domain, shared.operation, kCombine, choices.source, slots + slot_offset<kAtSource>(args, choices.token, __ffs(static_cast<int>(left)) - 1) + begin,
                          end - begin);
    }
}

// By all warps of a kernel that sends (receivers: if it receives, too): this block's share. By its senders then those that nobody has taken up.
template <bool kAtSource, class Format, bool kRemote>
__device__ __forceinline__ void send_shares(const CombineArgs& args, CombineShared& shared) {
    const Domain& domain = args.domain;
    const bool receives = (args.phases & kReceive) != 0;
    const int lane = static_cast<int>(threadIdx.x) % 32;
    Control<kRemote> control(domain, kCombine, shared.operation);
    bool begins = true;
#pragma unroll 1
    for (int share = static_cast<int>(blockIdx.x); share >= 0; share = next_share(domain, kCombine, shared.operation)) {
        if (is_control_warp()) {
            const int num_weights = args.num_tokens * args.num_topk, begin = min(share * args.plan.num_share_weights, num_weights);
            const int end = min(begin + args.plan.num_share_weights, num_weights);
            Weight weight{-1, 0};
            if (!kAtSource && begin + lane < end) weight = Weight::load(args, begin + lane);
            if (begins) {
                HandleLane handle;
                control.begin_send(args.ticket, [&] { handle = HandleLane::load(args); });
                DEEPEP_STAMP(1, lane == 0);
                handle.note(args, shared);
                DEEPEP_STAMP(2, lane == 0);
                if (receives) tell_receivers();
            }
            send_barrier();
            if constexpr (!kAtSource) {
                const bool is_mine = !begins || shared.operation.is_claimed != 0;
                if (is_mine && shared.has_weights == 0) send_weights<kRemote>(args, shared.operation, begin, end, weight);
            }
            DEEPEP_STAMP(4, lane == 0);
            if (begins) control.settle(receives);
        } else {
            const int num_warps = begins && receives ? kMostSenders : kWorkerWarps;
            const auto wait_for_control = [&] {
                if (is_receiver())
                    wait_begun();
                else
                    send_barrier();
                DEEPEP_STAMP(3, threadIdx.x == 0);
                DEEPEP_STAMP(7, receive_thread() == 0);
                return !begins || shared.operation.is_claimed != 0;
            };
            bool is_drawn = false;
            if constexpr (!kAtSource && !kRemote) is_drawn = args.plan.num_dealt > 0 && !Choices::is_own_share(args, share);
            if (is_drawn) {
                Drawer<Format> drawer(args, shared);
                drawer.look_ahead(share);
                if (wait_for_control()) drawer.send_share(share, num_warps);
                DEEPEP_STAMP(6, lane == 0);
                if (is_receiver()) return;
            } else {
                const Choices choices = Choices::load(args, share, 0);
                Sender<kAtSource, Format, kRemote> sender(args, shared, num_warps);
                sender.look_ahead(choices);
                const bool is_mine = wait_for_control();
                if (is_mine) sender.send_rows(share, choices);
                DEEPEP_STAMP(6, lane == 0);
                if (is_receiver()) return;
                if constexpr (kRemote) {
                    if (is_mine && !Choices::is_own_share(args, share)) post_rows<kAtSource, Format>(args, shared, share);
                }
            }
        }
        begins = false;
    }
}

}  // namespace deepep::ibgda
