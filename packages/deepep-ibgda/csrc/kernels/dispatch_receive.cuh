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

// One warp's part of one row.
template <bool kFp8>
class RowReader {
public:
    __device__ RowReader(const DispatchArgs& args, const DispatchShared& shared, const Index& index)
        : args_(args), shared_(shared), index_(index), lane_(static_cast<int>(threadIdx.x) % 32) {}

    // Vectors [begin, end) of the row, at least one; the first warp of a row also keeps its route. The header stays as it is: the row's other warps
    // read it. `is_likely_there`: an earlier row of this warp has come.
    // Returns how many vectors of the header have to be emptied.
    __device__ int take(int source, int token, int begin, int end, bool keeps_route, bool is_likely_there) {
        slot_ = shared_.operation.incoming[source] + row_offset(token, args_.message.stride);
        uint64_t begin_ns = 0;
        int num_header_vectors = args_.message.num_header_vectors;
#pragma unroll 1
        for (int first = begin; first < end; first += kPartVectors) {
            const int num_vectors = (end - first - lane_ + 31) / 32;  // of this lane
            const int num_scale_words = kFp8 ? num_scale_words_of(first, min(first + kPartVectors, end)) : 0;
            const Arrival arrival = poll(source, first, num_vectors, num_scale_words, is_likely_there || first != begin, &begin_ns);
            if (first == begin) {
                DEEPEP_STAMP(9, receive_thread() == 0 && !is_likely_there);
                if (arrival != kPresent) {
                    if (keeps_route) store_route(source, token, -1);
                    return arrival == kAbsent ? 1 : 0;
                }
                read_choices(source, token, keeps_route);
            } else if (arrival != kPresent) {
                return 0;
            }
            store(first, num_vectors, num_scale_words);
        }
        if (args_.wait_stats != nullptr && begin_ns != 0 && lane_ == 0) note_wait(args_.domain, kDispatch, source, begin_ns);
        if (is_bad_) report(args_.domain, shared_.operation, kDispatch, ErrorKind::kBadCount, Phase::kRow, source, static_cast<uint64_t>(token), 0);
        return num_header_vectors;
    }

    __device__ void empty_header(int num_vectors) const {
        if (lane_ < num_vectors) reinterpret_cast<uint4*>(slot_ + args_.message.header)[lane_] = empty_vector();
    }

private:
    enum Arrival { kPresent, kAbsent, kGone };

    // Scale words that belong to vectors [first, last); the row's last ones bring the words that fill up the scales.
    __device__ int num_scale_words_of(int first, int last) const {
        return (last == args_.message.num_payload_vectors ? 4 * args_.message.num_scale_vectors : last / 8) - first / 8;
    }

    // Loads the words that have not come yet until all have. Until the header and one vector of the payload have, nobody looks at more: thousands of
    // warps that looked at all their words would keep the cache from taking what they wait for.
    __device__ Arrival poll(int source, int first, int num_vectors, int num_scale_words, bool is_likely_there, uint64_t* wait_begin_ns) {
        const uint4* payload = reinterpret_cast<const uint4*>(slot_) + first + lane_;
        const uint32_t* header = reinterpret_cast<const uint32_t*>(slot_ + args_.message.header);
        const uint32_t* scales = reinterpret_cast<const uint32_t*>(slot_ + args_.message.scales) + first / 8 + lane_;
        uint32_t start = 0;
        while (true) {
            // The words that this lane does not look at count as there. Lanes look at the whole warp's flags, and at a choice and its weight each.
            flags_ = kEmptyWord;
            choice_ = lane_ < args_.num_topk ? kEmptyWord : 0;
            weight_ = lane_ < args_.num_topk && args_.has_weights ? kEmptyWord : 0;
            escape_ = kFp8 ? 0 : kEmptyWord;
            scale_ = kFp8 && lane_ < num_scale_words ? kEmptyWord : 0;
#pragma unroll
            for (int j = 0; j < kVectorsInFlight; ++j) v_[j] = j < num_vectors ? empty_vector() : make_uint4(0, 0, 0, 0);
            bool looks_at_all = is_likely_there;
#pragma unroll 1
            for (int poll = 0; poll < kPollsPerCheck; ++poll) {
                if (flags_ == kEmptyWord) flags_ = ptx::load_relaxed_sys(header);
                if (looks_at_all) {
                    if (choice_ == kEmptyWord) choice_ = ptx::load_relaxed_sys(header + 2 + lane_);
                    if (weight_ == kEmptyWord) weight_ = ptx::load_relaxed_sys(header + 2 + args_.num_topk + lane_);
                    if (!kFp8 && escape_ == kEmptyWord) escape_ = ptx::load_relaxed_sys(header + 1);
                    if (kFp8 && scale_ == kEmptyWord) scale_ = ptx::load_relaxed_sys(scales);
                }
                if (looks_at_all || lane_ == 31) {
#pragma unroll
                    for (int j = 0; j < kVectorsInFlight; ++j)
                        if (!is_full(v_[j])) v_[j] = ptx::load_relaxed_sys(payload + 32 * j);
                }
                bool is_complete = true;
#pragma unroll
                for (int j = 0; j < kVectorsInFlight; ++j) is_complete = is_complete && is_full(v_[j]);
                const unsigned complete = __ballot_sync(kAllLanes, is_complete && flags_ != kEmptyWord);
                is_complete = is_complete && choice_ != kEmptyWord && weight_ != kEmptyWord && escape_ != kEmptyWord && scale_ != kEmptyWord;
                if (__all_sync(kAllLanes, is_complete && flags_ != kEmptyWord)) return flags_ != 0 ? kPresent : kAbsent;
                // A token that goes elsewhere: the header's first vector, all zero.
                if (__all_sync(kAllLanes, flags_ == 0)) return kAbsent;
                looks_at_all = complete >> 31 != 0;
                if (args_.wait_stats != nullptr && *wait_begin_ns == 0) *wait_begin_ns = ptx::global_timer_ns();
            }
            const Verdict verdict = judge_as_warp(args_.domain, shared_.operation, kDispatch, source, &start);
            if (verdict == Verdict::kGoOn) continue;
            if (verdict == Verdict::kReport && lane_ == 0)
                fail(args_.domain, shared_.operation, kDispatch, Phase::kRow, source, ptx::load_relaxed_sys(header), kRowPresent, start);
            return kGone;
        }
    }

    // Afterwards lane k holds the place of choice k: its expert, and its row among the expert's.
    __device__ void read_choices(int source, int token, bool keeps_route) {
        const int expert = static_cast<int>((choice_ & ~kRepeatedChoice) >> kPositionBits), position = static_cast<int>(choice_ & ((1u << kPositionBits) - 1));
        const bool is_chosen = lane_ < args_.num_topk && choice_ != kNoChoice;
        const bool has_place = is_chosen && expert < args_.num_local_experts && position < index_.count(source, expert);
        expert_ = expert;
        place_ = has_place ? index_.first_row(source, expert) + position : 0;
        is_bad_ = is_chosen && !has_place;
        if (keeps_route) {
            const int32_t row = has_place ? expert * num_rows() + place_ : -1;
            store_route(source, token, row);
            if (args_.has_weights && lane_ < args_.num_topk)
                args_.handle[args_.handle_layout.weights() + route_index(source, token) + lane_] = static_cast<int32_t>(weight_);
            if (row >= 0 && args_.recv_x != nullptr) args_.handle[row] = token;  // src_info
        }
        targets_ = __ballot_sync(kAllLanes, has_place && (choice_ & kRepeatedChoice) == 0);
        if (args_.recv_x == nullptr) targets_ = 0;
    }
    __device__ int num_rows() const { return args_.domain.num_ranks * args_.max_tokens; }  // of one expert
    __device__ int64_t route_index(int source, int token) const { return (static_cast<int64_t>(source) * args_.max_tokens + token) * args_.num_topk; }
    __device__ void store_route(int source, int token, int32_t row) const {
        if (lane_ < args_.num_topk) args_.handle[args_.handle_layout.routes() + route_index(source, token) + lane_] = row;
    }

    // Stores what poll has loaded to each expert row, and empties its place in the slot.
    __device__ void store(int first, int num_vectors, int num_scale_words) {
        if (!kFp8 && (flags_ & kRowEscaped) != 0) {
            const auto word = [&](uint32_t w) { return w == escape_ ? kEmptyWord : w; };
#pragma unroll
            for (int j = 0; j < kVectorsInFlight; ++j) v_[j] = make_uint4(word(v_[j].x), word(v_[j].y), word(v_[j].z), word(v_[j].w));
        }
        int scale_index = first / 8 + lane_;
        bool has_scale = kFp8 && lane_ < num_scale_words && scale_index < args_.message.num_scales;
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
                if (j < num_vectors) target[32 * j] = v_[j];
            if (has_scale) args_.recv_scales[row_offset(expert * num_scales + scale_index, static_cast<uint32_t>(num_rows())) + static_cast<uint32_t>(place)] = scale;
        }
        uint4* taken = reinterpret_cast<uint4*>(slot_) + first + lane_;
#pragma unroll
        for (int j = 0; j < kVectorsInFlight; ++j)
            if (j < num_vectors) taken[32 * j] = empty_vector();
        if (kFp8 && lane_ < num_scale_words) reinterpret_cast<uint32_t*>(slot_ + args_.message.scales)[first / 8 + lane_] = kEmptyWord;
    }

    const DispatchArgs& args_;
    const DispatchShared& shared_;
    const Index& index_;
    int lane_;
    uint8_t* slot_ = nullptr;
    uint4 v_[kVectorsInFlight];
    uint32_t flags_, escape_;      // of the row
    uint32_t choice_, weight_;     // lane k: of choice k
    uint32_t scale_;
    int32_t expert_ = 0, place_ = 0;  // lane k: of choice k, on this rank
    unsigned targets_ = 0;
    bool is_bad_ = false;  // this lane's choice names a place that there is not
};

// By all receivers of every block.
template <bool kFp8>
__device__ __forceinline__ void receive_rows(const DispatchArgs& args, const DispatchShared& shared, const int32_t* index_words) {
    const Domain& domain = args.domain;
    const Index index{args, index_words};
    const int lane = static_cast<int>(threadIdx.x) % 32, warp = receive_warp();
    int num_tokens = 0;  // the most of any source
#pragma unroll 1
    for (int rank = lane; rank < domain.num_ranks; rank += 32) num_tokens = max(num_tokens, index.num_tokens(rank));
    num_tokens = static_cast<int>(__reduce_max_sync(kAllLanes, static_cast<unsigned>(num_tokens)));
    const int num_rows = num_tokens * domain.num_ranks, num_blocks = static_cast<int>(gridDim.x);
    // As many warps to a row as there are, so that little is left to do when its last word arrives. Groups of several warps take one row at most.
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
#pragma unroll 1
    for (int i = (static_cast<int>(blockIdx.x) << groups_log2) + group, round = 0; i < num_rows; i += num_blocks << groups_log2, ++round) {
        int source;
        const int token = place_of(i, &source);
        if (token >= index.num_tokens(source)) continue;
        const int num_header_vectors = begin < end ? reader.take(source, token, begin, end, part == 0, round != 0) : 0;
        // Every warp of the row has read its header.
        if (size_log2 > 0 && part != 0) {
            ptx::named_barrier_arrive(kGroups + group, 32 << size_log2);
        } else {
            if (size_log2 > 0)
                ptx::named_barrier(kGroups + group, 32 << size_log2);
            else
                __syncwarp();
            reader.empty_header(num_header_vectors);
        }
        DEEPEP_STAMP(10, receive_thread() == 0 && round == 0);
    }
}

}  // namespace deepep::ibgda
