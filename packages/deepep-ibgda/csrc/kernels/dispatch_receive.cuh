#pragma once
// The receiving half of dispatch: some warps of a block share a row, poll its words, and store it to every expert row that its header names.
#include "deepep/codec/fp8.hpp"
#include "dispatch_shared.cuh"

namespace deepep::ibgda {

constexpr int kVectorsInFlight = 7;  // of a row, per lane
constexpr int kPartVectors = 32 * kVectorsInFlight;

// --- the index ------------------------------------------------------------------------------------------------------

// The index words of every source, as they have come; zero where a source is left out.
struct Index {
    const DispatchArgs& args;
    const int32_t* words;

    __device__ const int32_t* of(int source) const { return words + source * (kIndexCounts + args.num_local_experts); }
    __device__ int num_tokens(int source) const { return of(source)[kIndexNumTokens]; }
    __device__ int count(int source, int expert) const { return of(source)[kIndexCounts + expert]; }
    // Rows of an expert lie by source rank.
    __device__ int first_row(int source, int expert) const {
        int first = 0;
#pragma unroll 4
        for (int rank = 0; rank < source; ++rank) first += count(rank, expert);
        return first;
    }
};

// A word that did not come, or says what cannot be. False: that ends the operation.
__device__ __noinline__ inline bool accepts_bad_word(const DispatchArgs& args, DispatchShared& shared, int rank, int word, bool has_come, uint32_t value) {
    const Domain& domain = args.domain;
    if (!has_come) {
        shared.is_lost[rank] = 1;
        return domain.enable_shrink && rank != domain.rank;
    }
    const bool is_checksum = word == kIndexChecksum;
    report(domain, shared.operation, kDispatch, is_checksum ? ErrorKind::kMismatch : ErrorKind::kBadCount, Phase::kIndex, rank, value,
           is_checksum ? args.checksum : static_cast<uint32_t>(args.max_tokens));
    mark_failed(wait_context(domain, shared.operation, kDispatch));
    return false;
}

// With enable_shrink: all blocks go by what the first of them found, with a lost source's rows or without. By all receivers.
__device__ __noinline__ inline void agree_on_lost(const DispatchArgs& args, DispatchShared& shared, int32_t* index) {
    const Domain& domain = args.domain;
    const Operation& operation = shared.operation;
#pragma unroll 1
    for (int rank = receive_thread(); rank < domain.num_ranks; rank += kNumReceiveThreads) {
        if (operation.sequences[rank] == 0 && operation.is_failed == 0) continue;
        const uint32_t mine = operation.launch << 1 | shared.is_lost[rank];
        uint32_t before = ptx::load_relaxed_gpu(domain.verdict(rank));
        while (before >> 1 != (operation.launch & 0x7fffffffu)) {
            const uint32_t found = atomicCAS(domain.verdict(rank), before, mine);
            before = found == before ? mine : found;
        }
        shared.is_lost[rank] = (before & 1) | (operation.sequences[rank] == 0);
    }
    receive_barrier();
    const int num_words = kIndexCounts + args.num_local_experts;
#pragma unroll 1
    for (int i = receive_thread(); i < domain.num_ranks * num_words; i += kNumReceiveThreads)
        if (shared.is_lost[i / num_words] != 0) index[i] = 0;
    receive_barrier();
}

// Reads every source's index message. By all receivers. False: the operation has failed.
__device__ __forceinline__ bool read_index(const DispatchArgs& args, DispatchShared& shared, int32_t* index) {
    const Domain& domain = args.domain;
    const Operation& operation = shared.operation;
    if (domain.enable_shrink) {
#pragma unroll 1
        for (int rank = receive_thread(); rank < domain.num_ranks; rank += kNumReceiveThreads) shared.is_lost[rank] = operation.sequences[rank] == 0;
        receive_barrier();
    }
    const uint64_t begin_ns = args.wait_stats != nullptr ? ptx::global_timer_ns() : 0;
    const int num_words = domain.num_ranks * static_cast<int>(args.plan.by_index_words.divisor);
    bool is_good = true;
#pragma unroll 1
    for (int i = receive_thread(); i - i % 32 < num_words; i += kNumReceiveThreads) {
        uint32_t word;
        const int rank = static_cast<int>(args.plan.by_index_words.quotient(static_cast<uint32_t>(min(i, num_words - 1)), &word));
        const bool wants = i < num_words && operation.sequences[rank] != 0;
        uint32_t value = 0;
        const bool has_come =
            wait_tagged(domain, operation, kDispatch, wants, incoming_index(domain, operation, kDispatch, rank) + word, Phase::kIndex, rank, &value);
        const bool is_bad = word == kIndexChecksum ? value != args.checksum : value > static_cast<uint32_t>(args.max_tokens);
        if (wants && (!has_come || is_bad)) {
            is_good = accepts_bad_word(args, shared, rank, static_cast<int>(word), has_come, value) && is_good;
            value = 0;
        }
        if (i < num_words) index[i] = wants ? static_cast<int32_t>(value) : 0;
        if (args.wait_stats != nullptr && wants && word == kIndexNumTokens && blockIdx.x == 0) note_wait(domain, kDispatch, rank, begin_ns);
    }
    if (receive_barrier_or(!is_good)) {
        if (!is_good) mark_failed(wait_context(domain, operation, kDispatch));
        return false;
    }
    if (domain.enable_shrink) agree_on_lost(args, shared, index);
    return true;
}

// What this rank learns beside the rows. By the senders of one block, which have nothing left to do, once its receivers have read the index.
__device__ __noinline__ inline void store_counts(const DispatchArgs& args, const DispatchShared& shared, const int32_t* index_words) {
    const Domain& domain = args.domain;
    const Index index{args, index_words};
    const int thread = static_cast<int>(threadIdx.x);
#pragma unroll 1
    for (int rank = thread; rank < domain.num_ranks; rank += kNumSendThreads) {
        const bool is_lost = shared.operation.sequences[rank] == 0 || (domain.enable_shrink && shared.is_lost[rank] != 0);
        args.handle[args.handle_layout.tokens() + rank] = is_lost ? -1 : index.num_tokens(rank);
    }
    if (thread == 0) args.handle[args.handle_layout.meta()] = args.has_weights ? 1 : 0;
    if (args.recv_x == nullptr) return;
#pragma unroll 1
    for (int expert = thread; expert < args.num_local_experts; expert += kNumSendThreads) {
        int32_t first = 0;
#pragma unroll 1
        for (int rank = 0; rank < domain.num_ranks; ++rank) {
            const int32_t count = index.count(rank, expert);
            args.layout_range[static_cast<int64_t>(expert) * domain.num_ranks + rank] = static_cast<int64_t>(first) << 32 | count;
            first += count;
        }
        args.recv_count[expert] = first;
        if (args.cumulative_stats != nullptr) args.cumulative_stats[expert] += first;
    }
}

// --- rows -----------------------------------------------------------------------------------------------------------

// What becomes of a part of a row. kAbsent: the token goes elsewhere. kGone: it has been given up.
enum Arrival { kPresent, kAbsent, kGone };

// One warp's part of one row, as many vectors as its registers hold.
template <bool kFp8>
class RowReader {
public:
    __device__ RowReader(const DispatchArgs& args, DispatchShared& shared, const Index& index)
        : args_(args), shared_(shared), index_(index), lane_(static_cast<int>(threadIdx.x) % 32) {}

    // Vectors [first, end) of the row. `keeps_route`: the header's places go to the handle. The header stays as it is: the row's other warps read it.
    __device__ Arrival take(int source, int token, int first, int end, bool keeps_route) {
        slot_ = shared_.operation.incoming[source] + row_offset(token, args_.message.stride);
        if (args_.wait_stats != nullptr) shared_.wait_begin_ns[receive_warp()] = 0;
        Arrival arrival = poll_header(source, token, keeps_route);
        if (arrival == kPresent) {
            num_vectors_ = (end - first - lane_ + 31) / 32;
            num_scale_words_ = kFp8 ? (end == args_.message.num_payload_vectors ? 4 * args_.message.num_scale_vectors : end / 8) - first / 8 : 0;
            const bool has_come = poll_payload(source, first);
            DEEPEP_STAMP(9, receive_thread() == 0);
            if (has_come)
                store(first);
            else
                arrival = kGone;
        }
        if (arrival != kPresent && keeps_route) store_route(source, token, -1);
        if (args_.wait_stats != nullptr && arrival != kGone && lane_ == 0 && shared_.wait_begin_ns[receive_warp()] != 0)
            note_wait(args_.domain, kDispatch, source, shared_.wait_begin_ns[receive_warp()]);
        return arrival;
    }

    // Of the row that has been taken; the other warps that read it have done so.
    __device__ void empty_header(Arrival arrival) const {
        const int num_vectors = arrival == kPresent ? args_.message.num_header_vectors : arrival == kAbsent ? 1 : 0;
        if (lane_ < num_vectors) reinterpret_cast<uint4*>(slot_ + args_.message.header)[lane_] = empty_vector();
    }

private:
    __device__ void note_begin() const {
        if (args_.wait_stats != nullptr && shared_.wait_begin_ns[receive_warp()] == 0) shared_.wait_begin_ns[receive_warp()] = ptx::global_timer_ns();
    }
    // False: the row is given up.
    __device__ bool goes_on(int source, uint32_t* start) const {
        const Verdict verdict = judge_as_warp(args_.domain, shared_.operation, kDispatch, source, start);
        if (verdict == Verdict::kReport && lane_ == 0) fail(args_.domain, shared_.operation, kDispatch, Phase::kRow, source, 0, kRowPresent, *start);
        return verdict == Verdict::kGoOn;
    }

    // The header comes beside the payload, mostly before it, and is read first: where the row goes is then known when its words arrive. All lanes look
    // at the row's flags; of the rest each looks at a choice, its weight, and one of the words that are left (the escape value, what fills up the last
    // vector). Words that a lane does not look at count as there.
    __device__ Arrival poll_header(int source, int token, bool keeps_route) {
        const uint32_t* header = reinterpret_cast<const uint32_t*>(slot_ + args_.message.header);
        const int num_topk = args_.num_topk, num_words = args_.message.num_header_words;
        const bool has_choice = lane_ < num_topk, has_weight = has_choice && args_.has_weights;
        const bool has_other = lane_ <= 4 * args_.message.num_header_vectors - num_words;
        uint32_t flags = kEmptyWord, choice = kEmptyWord, weight = kEmptyWord, start = 0;
        other_ = kEmptyWord;
        while (true) {
#pragma unroll 1
            for (int poll = 0; poll < kPollsPerCheck; ++poll) {
                if (flags == kEmptyWord) flags = ptx::load_relaxed_sys(header);
                if (__any_sync(kAllLanes, flags == kEmptyWord)) {
                    note_begin();
                    continue;
                }
                if (flags == 0) {
                    // A token that goes elsewhere: the header's first vector, all zero.
                    if (__all_sync(kAllLanes, is_full(ptx::load_relaxed_sys(reinterpret_cast<const uint4*>(header))))) return kAbsent;
                    continue;
                }
                if (has_choice && choice == kEmptyWord) choice = ptx::load_relaxed_sys(header + 2 + lane_);
                if (has_weight && weight == kEmptyWord) weight = ptx::load_relaxed_sys(header + 2 + num_topk + lane_);
                if (has_other && other_ == kEmptyWord) other_ = ptx::load_relaxed_sys(header + (lane_ == 0 ? 1 : num_words + lane_ - 1));
                if (!__all_sync(kAllLanes, (!has_choice || choice != kEmptyWord) && (!has_weight || weight != kEmptyWord) && (!has_other || other_ != kEmptyWord))) continue;
                is_escaped_ = (flags & kRowEscaped) != 0;
                read_choices(source, token, choice, weight, keeps_route);
                return kPresent;
            }
            if (!goes_on(source, &start)) return kGone;
        }
    }

    // Afterwards lane k holds the place of choice k: its expert, and its row among the expert's.
    __device__ void read_choices(int source, int token, uint32_t choice, uint32_t weight, bool keeps_route) {
        const int expert = static_cast<int>((choice & ~kRepeatedChoice) >> kPositionBits), position = static_cast<int>(choice & ((1u << kPositionBits) - 1));
        const bool is_chosen = lane_ < args_.num_topk && choice != kNoChoice;
        const bool has_place = is_chosen && expert < args_.num_local_experts && position < index_.count(source, expert);
        expert_ = expert;
        place_ = has_place ? index_.first_row(source, expert) + position : 0;
        if (is_chosen && !has_place)
            report(args_.domain, shared_.operation, kDispatch, ErrorKind::kBadCount, Phase::kRow, source, static_cast<uint64_t>(token), 0);
        if (keeps_route) {
            const int32_t row = has_place ? expert * num_rows() + place_ : -1;
            store_route(source, token, row);
            if (args_.has_weights && lane_ < args_.num_topk)
                args_.handle[args_.handle_layout.weights() + route_index(source, token) + lane_] = static_cast<int32_t>(weight);
            if (row >= 0 && args_.recv_x != nullptr) args_.handle[row] = token;  // src_info
        }
        targets_ = __ballot_sync(kAllLanes, has_place && (choice & kRepeatedChoice) == 0);
        if (args_.recv_x == nullptr) targets_ = 0;
    }

    // Loads the words that have not come yet until all have. While nothing comes, one lane looks: thousands of warps that looked at all their words
    // would keep the cache from taking what they wait for. False: the row is given up.
    __device__ bool poll_payload(int source, int first) {
        const uint4* payload = reinterpret_cast<const uint4*>(slot_) + first + lane_;
        const uint32_t* scales = reinterpret_cast<const uint32_t*>(slot_ + args_.message.scales) + first / 8 + lane_;
        uint32_t start = 0;
        while (true) {
            scale_ = kFp8 && lane_ < num_scale_words_ ? kEmptyWord : 0;
#pragma unroll
            for (int j = 0; j < kVectorsInFlight; ++j) v_[j] = j < num_vectors_ ? empty_vector() : make_uint4(0, 0, 0, 0);
            unsigned looking = kAllLanes;
#pragma unroll 1
            for (int poll = 0; poll < kPollsPerCheck; ++poll) {
                if ((looking >> lane_ & 1) != 0) {
#pragma unroll
                    for (int j = 0; j < kVectorsInFlight; ++j)
                        if (!is_full(v_[j])) v_[j] = ptx::load_relaxed_sys(payload + 32 * j);
                    if (kFp8 && scale_ == kEmptyWord) scale_ = ptx::load_relaxed_sys(scales);
                }
                bool is_complete = scale_ != kEmptyWord;
#pragma unroll
                for (int j = 0; j < kVectorsInFlight; ++j) is_complete = is_complete && is_full(v_[j]);
                const unsigned missing = __ballot_sync(kAllLanes, !is_complete);
                if (missing == 0) return true;
                looking = (missing & looking) == looking ? missing & (0u - missing) : missing;
                note_begin();
            }
            if (!goes_on(source, &start)) return false;
        }
    }

    __device__ int num_rows() const { return args_.domain.num_ranks * args_.max_tokens; }  // of one expert
    __device__ int64_t route_index(int source, int token) const { return (static_cast<int64_t>(source) * args_.max_tokens + token) * args_.num_topk; }
    __device__ void store_route(int source, int token, int32_t row) const {
        if (lane_ < args_.num_topk) args_.handle[args_.handle_layout.routes() + route_index(source, token) + lane_] = row;
    }

    // Stores what poll has loaded to each expert row, and empties its place in the slot.
    __device__ void store(int first) {
        if (!kFp8 && is_escaped_) {
            const uint32_t escape = __shfl_sync(kAllLanes, other_, 0);
            const auto word = [&](uint32_t w) { return w == escape ? kEmptyWord : w; };
#pragma unroll
            for (int j = 0; j < kVectorsInFlight; ++j) v_[j] = make_uint4(word(v_[j].x), word(v_[j].y), word(v_[j].z), word(v_[j].w));
        }
        int scale_index = first / 8 + lane_;
        bool has_scale = kFp8 && lane_ < num_scale_words_ && scale_index < args_.message.num_scales;
        int num_scales = args_.message.num_scales;
        uint32_t scale = scale_;
        if (kFp8 && args_.use_ue8m0) {
            scale = codec::ue8m0(codec::float_of(scale));
            scale |= __shfl_down_sync(kAllLanes, scale, 1) << 8;
            scale |= __shfl_down_sync(kAllLanes, scale, 2) << 16;
            has_scale = has_scale && lane_ % 4 == 0;
            scale_index /= 4;
            num_scales /= 4;
        }
#pragma unroll 1
        for (unsigned left = targets_; left != 0; left &= left - 1) {
            const int k = __ffs(static_cast<int>(left)) - 1;
            const int32_t expert = __shfl_sync(kAllLanes, expert_, k), place = __shfl_sync(kAllLanes, place_, k);
            uint4* target = reinterpret_cast<uint4*>(args_.recv_x + row_offset(expert * num_rows() + place, 16 * static_cast<uint32_t>(args_.message.num_payload_vectors))) +
                            first + lane_;
#pragma unroll
            for (int j = 0; j < kVectorsInFlight; ++j)
                if (j < num_vectors_) target[32 * j] = v_[j];
            if (has_scale) args_.recv_scales[row_offset(expert * num_scales + scale_index, static_cast<uint32_t>(num_rows())) + static_cast<uint32_t>(place)] = scale;
        }
        uint4* taken = reinterpret_cast<uint4*>(slot_) + first + lane_;
#pragma unroll
        for (int j = 0; j < kVectorsInFlight; ++j)
            if (j < num_vectors_) taken[32 * j] = empty_vector();
        if (kFp8 && lane_ < num_scale_words_) reinterpret_cast<uint32_t*>(slot_ + args_.message.scales)[first / 8 + lane_] = kEmptyWord;
    }

    const DispatchArgs& args_;
    DispatchShared& shared_;
    const Index& index_;
    int lane_;
    uint8_t* slot_ = nullptr;
    int num_vectors_ = 0, num_scale_words_ = 0;  // of this lane; of the warp
    uint4 v_[kVectorsInFlight];
    uint32_t scale_;
    uint32_t other_;  // lane 0: the escape value
    bool is_escaped_ = false;
    int32_t expert_ = 0, place_ = 0;  // lane k: of choice k, on this rank
    unsigned targets_ = 0;
};

// By all receivers of every block.
template <bool kFp8>
__device__ __forceinline__ void receive_rows(const DispatchArgs& args, DispatchShared& shared, const int32_t* index_words) {
    const Domain& domain = args.domain;
    const Index index{args, index_words};
    const int lane = static_cast<int>(threadIdx.x) % 32, warp = receive_warp();
    int num_tokens = 0;  // the most of any source
#pragma unroll 1
    for (int rank = lane; rank < domain.num_ranks; rank += 32) num_tokens = max(num_tokens, index.num_tokens(rank));
    num_tokens = static_cast<int>(__reduce_max_sync(kAllLanes, static_cast<unsigned>(num_tokens)));
    const int num_rows = num_tokens * domain.num_ranks, num_blocks = static_cast<int>(gridDim.x);
    // As many warps to a row as there are, so that little is left to do when its last word arrives.
    constexpr int kWarpsLog2 = 3;
    static_assert(kReceiveWarps == 1 << kWarpsLog2, "groups divide the receivers");
    int groups_log2 = 0;
    while (groups_log2 < kWarpsLog2 && num_rows > num_blocks << groups_log2) ++groups_log2;
    const int size_log2 = kWarpsLog2 - groups_log2, group = warp >> size_log2, part = warp & ((1 << size_log2) - 1);
    // Parts begin with a scale word (or, packed, with four).
    const int unit = kFp8 ? (args.use_ue8m0 ? 32 : 8) : 1;
    const int num_vectors = args.message.num_payload_vectors;
    const int num_part_vectors = ((num_vectors + (1 << size_log2) - 1 >> size_log2) + unit - 1) & -unit;
    const int begin = min(part * num_part_vectors, num_vectors), end = min(begin + num_part_vectors, num_vectors);
    // Rows by token, then by source, from the own rank on.
    const auto place_of = [&](int i, int* source) {
        uint32_t rest;
        const int token = static_cast<int>(args.plan.by_ranks.quotient(static_cast<uint32_t>(i), &rest));
        *source = static_cast<int>(rest) + domain.rank;
        if (*source >= domain.num_ranks) *source -= domain.num_ranks;
        return token;
    };
    RowReader<kFp8> reader(args, shared, index);
    const int num_sending = args.plan.num_sending_blocks, first_row = (static_cast<int>(blockIdx.x) - num_sending << groups_log2) + group;
#pragma unroll 1
    for (int i = first_row; i < num_rows; i += num_blocks - num_sending << groups_log2) {
        int source;
        const int token = place_of(i, &source);
        if (token >= index.num_tokens(source)) continue;
        Arrival arrival = kGone;
#pragma unroll 1
        for (int first = begin; first < end && (first == begin || arrival == kPresent); first += kPartVectors)
            arrival = reader.take(source, token, first, min(first + kPartVectors, end), part == 0 && first == begin);
        // Every warp of the row has read its header.
        if (size_log2 > 0)
            ptx::named_barrier(kGroups + group, 32 << size_log2);
        else
            __syncwarp();
        if (part == 0) reader.empty_header(arrival);
        DEEPEP_STAMP(10, receive_thread() == 0 && i == first_row);
    }
}

}  // namespace deepep::ibgda
