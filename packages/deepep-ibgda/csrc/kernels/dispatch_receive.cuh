#pragma once
// The receiving half of dispatch: some warps of a block share a row, poll its words, and store it to every expert row that its header names.
#include "deepep/codec/fp8.hpp"
#include "dispatch_shared.cuh"

namespace deepep::ibgda {

constexpr int kVectorsInFlight = 4;  // of a row, per lane
constexpr int kPartVectors = 32 * kVectorsInFlight;
constexpr int kLargestGroup = kNumWarps;

struct RowPlaces {
    int32_t* counts;  // [N, L]
    int32_t* firsts;  // [N, L]
};

// Reads every source's index message and lays out the expert rows: by source rank, then by token. False: the operation has failed.
__device__ __forceinline__ bool read_index(const DispatchArgs& args, DispatchShared& shared, const RowPlaces& places) {
    const Domain& domain = args.domain;
    const Operation& operation = shared.operation;
    const int num_local = args.num_local_experts, num_words = kIndexCounts + num_local;
#pragma unroll 1
    for (int rank = static_cast<int>(threadIdx.x); rank < domain.num_ranks; rank += kNumThreads) {
        const uint32_t sequence = operation.sequences[rank];
        shared.is_lost[rank] = sequence == 0;
        // The next kernel's credit. Kernel boundaries order it behind everything that is taken here.
        if (sequence != 0 && blockIdx.x == 0)
            ptx::store_relaxed_gpu(domain.consumed(kDispatch, static_cast<int>(sequence % kNumSlots), rank), sequence);
    }
    __syncthreads();
    const uint64_t begin_ns = args.wait_stats != nullptr ? ptx::global_timer_ns() : 0;
    bool is_good = true;
#pragma unroll 1
    for (int i = static_cast<int>(threadIdx.x); i - static_cast<int>(threadIdx.x) % 32 < domain.num_ranks * num_words; i += kNumThreads) {
        const int rank = min(i / num_words, domain.num_ranks - 1), word = i - rank * num_words;
        const uint32_t sequence = operation.sequences[rank];
        const bool wants = word < num_words && sequence != 0;
        uint32_t value = 0;
        const bool has_come = wait_tagged(domain, operation, kDispatch, wants, domain.index(domain.own, sequence, rank) + word, Phase::kIndex, rank, &value);
        if (word >= num_words) continue;
        if (wants && !has_come) {
            shared.is_lost[rank] = 1;
            is_good = is_good && domain.enable_shrink && rank != domain.rank;
            continue;
        }
        if (word == kIndexChecksum) {
            if (wants && value != args.checksum) {
                report(domain, operation, kDispatch, ErrorKind::kMismatch, Phase::kIndex, rank, value, args.checksum);
                is_good = false;
            }
            continue;
        }
        if (value > static_cast<uint32_t>(args.max_tokens)) {
            report(domain, operation, kDispatch, ErrorKind::kBadCount, Phase::kIndex, rank, value, args.max_tokens);
            is_good = false;
            value = 0;
        }
        if (word == kIndexNumTokens) {
            shared.num_tokens[rank] = static_cast<int32_t>(value);
            if (args.wait_stats != nullptr && blockIdx.x == 0) note_wait(domain, kDispatch, rank, begin_ns);
        } else {
            places.counts[rank * num_local + word - kIndexCounts] = static_cast<int32_t>(value);
        }
    }
    if (!is_good) mark_failed(wait_context(domain, operation, kDispatch));
    if (__syncthreads_or(!is_good || has_failed(domain, operation, kDispatch))) return false;
    if (domain.enable_shrink) {
        // All blocks go by what the first of them found: with a lost source's rows or without.
#pragma unroll 1
        for (int rank = static_cast<int>(threadIdx.x); rank < domain.num_ranks; rank += kNumThreads) {
            if (operation.sequences[rank] == 0 && operation.is_failed == 0) continue;
            const uint32_t mine = operation.launch << 1 | shared.is_lost[rank];
            uint32_t before = ptx::load_relaxed_gpu(domain.verdict(rank));
            while (before >> 1 != (operation.launch & 0x7fffffffu)) {
                const uint32_t found = atomicCAS(domain.verdict(rank), before, mine);
                before = found == before ? mine : found;
            }
            shared.is_lost[rank] = (before & 1) | (operation.sequences[rank] == 0);
        }
        __syncthreads();
    }
#pragma unroll 1
    for (int expert = static_cast<int>(threadIdx.x); expert < num_local; expert += kNumThreads) {
        int32_t first = 0;
#pragma unroll 1
        for (int rank = 0; rank < domain.num_ranks; ++rank) {
            if (shared.is_lost[rank]) places.counts[rank * num_local + expert] = 0;
            places.firsts[rank * num_local + expert] = first;
            first += places.counts[rank * num_local + expert];
        }
    }
#pragma unroll 1
    for (int rank = static_cast<int>(threadIdx.x); rank < domain.num_ranks; rank += kNumThreads)
        if (shared.is_lost[rank]) shared.num_tokens[rank] = -1;
    __syncthreads();
    return true;
}

// What this rank learns beside the rows. By all threads of one block.
__device__ __forceinline__ void store_counts(const DispatchArgs& args, const DispatchShared& shared, const RowPlaces& places) {
    const Domain& domain = args.domain;
    const int num_local = args.num_local_experts;
#pragma unroll 1
    for (int rank = static_cast<int>(threadIdx.x); rank < domain.num_ranks; rank += kNumThreads)
        args.handle[args.handle_layout.tokens() + rank] = shared.num_tokens[rank];
    if (threadIdx.x == 0) args.handle[args.handle_layout.meta()] = args.has_weights ? 1 : 0;
    if (args.recv_x == nullptr) return;
#pragma unroll 1
    for (int i = static_cast<int>(threadIdx.x); i < domain.num_ranks * num_local; i += kNumThreads) {
        const int rank = i % domain.num_ranks, expert = i / domain.num_ranks;
        args.layout_range[i] = static_cast<int64_t>(places.firsts[rank * num_local + expert]) << 32 | places.counts[rank * num_local + expert];
    }
#pragma unroll 1
    for (int expert = static_cast<int>(threadIdx.x); expert < num_local; expert += kNumThreads) {
        const int last = (domain.num_ranks - 1) * num_local + expert;
        const int32_t count = places.firsts[last] + places.counts[last];
        args.recv_count[expert] = count;
        if (args.cumulative_stats != nullptr) args.cumulative_stats[expert] += count;
    }
}

// Word `i` of a header whose vectors lie in the lanes; every lane may ask for another one.
__device__ __forceinline__ uint32_t header_word(uint4 header, int i) {
    const int lane = i / 4;
    const uint32_t x = __shfl_sync(kAllLanes, header.x, lane), y = __shfl_sync(kAllLanes, header.y, lane);
    const uint32_t z = __shfl_sync(kAllLanes, header.z, lane), w = __shfl_sync(kAllLanes, header.w, lane);
    return (i & 2) != 0 ? ((i & 1) != 0 ? w : z) : ((i & 1) != 0 ? y : x);
}

// One warp's part of one row.
template <bool kFp8>
class RowReader {
public:
    __device__ RowReader(const DispatchArgs& args, const DispatchShared& shared, const RowPlaces& places)
        : args_(args), shared_(shared), places_(places), lane_(static_cast<int>(threadIdx.x) % 32) {}

    // Vectors [begin, end) of the row, at least one; the first warp of a row also keeps its route. The header stays as it is: the row's other warps
    // read it. `is_likely_there`: an earlier row of this warp has come.
    // Returns how many vectors of the header have to be emptied.
    __device__ int take(int source, int token, int begin, int end, bool keeps_route, bool is_likely_there) {
        const Domain& domain = args_.domain;
        const uint32_t sequence = shared_.operation.sequences[source];
        slot_ = domain.rows(domain.own, kDispatch, sequence, source) + token * args_.message.stride();
        bool is_first = true;
        int num_header_vectors = 0;
        uint64_t begin_ns = 0;
#pragma unroll 1
        for (int first = begin; first < end; first += kPartVectors) {
            const int num_scale_words = kFp8 ? num_scale_words_of(first, min(first + kPartVectors, end)) : 0;
            const Arrival arrival = poll(domain, source, first, end, num_scale_words, is_first, is_likely_there || !is_first, &begin_ns);
            if (arrival == kGone) {
                if (is_first && keeps_route) store_route(source, token, -1);
                return 0;
            }
            if (is_first) {
                if (arrival == kAbsent) {
                    if (keeps_route) store_route(source, token, -1);
                    num_header_vectors = 1;
                    break;
                }
                num_header_vectors = args_.message.num_header_vectors();
                read_choices(source, token, keeps_route);
            }
            is_first = false;
            store(first, end, num_scale_words);
        }
        if (begin_ns != 0 && args_.wait_stats != nullptr && lane_ == 0) note_wait(domain, kDispatch, source, begin_ns);
        // Last, because a call keeps nothing in registers.
        if (num_header_vectors > 1 && is_bad_)
            report(domain, shared_.operation, kDispatch, ErrorKind::kBadCount, Phase::kRow, source, static_cast<uint64_t>(token), 0);
        return num_header_vectors;
    }

    __device__ void empty_header(int num_vectors) const {
        if (lane_ < num_vectors) reinterpret_cast<uint4*>(slot_ + args_.message.header_offset())[lane_] = empty_vector();
    }

private:
    enum Arrival { kPresent, kAbsent, kGone };

    // Scale words that belong to vectors [first, last); the row's last ones bring the words that fill up the scales.
    __device__ int num_scale_words_of(int first, int last) const {
        return (last == args_.message.num_payload_vectors() ? 4 * args_.message.num_scale_vectors() : last / 8) - first / 8;
    }

    // Loads the words that have not come yet until all have. Until the header begins to come, one lane looks at 16 bytes: thousands of warps that
    // looked at all their words would keep the cache from taking what they wait for.
    __device__ Arrival poll(const Domain& domain, int source, int first, int end, int num_scale_words, bool is_first, bool is_likely_there,
                            uint64_t* wait_begin_ns) {
        const uint4* payload = reinterpret_cast<const uint4*>(slot_) + first + lane_;
        const uint4* header = reinterpret_cast<const uint4*>(slot_ + args_.message.header_offset()) + lane_;
        const uint32_t* scales = reinterpret_cast<const uint32_t*>(slot_ + args_.message.scales_offset()) + first / 8 + lane_;
        const bool has_header = is_first && lane_ < args_.message.num_header_vectors();
        uint32_t start = 0;
        while (true) {
            forget(first, end, has_header, num_scale_words);
            bool looks_at_all = is_likely_there;
#pragma unroll 1
            for (int poll = 0; poll < kPollsPerCheck; ++poll) {
                if (!is_full(header_) && (looks_at_all || lane_ == 0)) header_ = ptx::load_relaxed_sys(header);
                if (looks_at_all) {
#pragma unroll
                    for (int j = 0; j < kVectorsInFlight; ++j)
                        if (!is_full(v_[j])) v_[j] = ptx::load_relaxed_sys(payload + 32 * j);
                    if (kFp8 && scale_ == kEmptyWord) scale_ = ptx::load_relaxed_sys(scales);
                }
                bool is_complete = is_full(header_) && scale_ != kEmptyWord;
#pragma unroll
                for (int j = 0; j < kVectorsInFlight; ++j) is_complete = is_complete && is_full(v_[j]);
                // A token that goes elsewhere: one vector, all zero.
                const bool has_first = __shfl_sync(kAllLanes, static_cast<int>(is_full(header_)), 0) != 0;
                if (is_first && has_first && header_flags() == 0) return kAbsent;
                if (__all_sync(kAllLanes, is_complete)) return kPresent;
                looks_at_all = has_first;
                if (args_.wait_stats != nullptr && *wait_begin_ns == 0) *wait_begin_ns = ptx::global_timer_ns();
            }
            const Verdict verdict = judge_as_warp(domain, shared_.operation, kDispatch, source, &start);
            if (verdict == Verdict::kGoOn) continue;
            if (verdict == Verdict::kReport && lane_ == 0) fail(domain, shared_.operation, kDispatch, Phase::kRow, source, header_.x, kRowPresent, start);
            return kGone;
        }
    }
    // What has been loaded; the words that this lane does not look at count as there.
    __device__ void forget(int first, int end, bool has_header, int num_scale_words) {
        header_ = has_header ? empty_vector() : make_uint4(0, 0, 0, 0);
        scale_ = lane_ < num_scale_words ? kEmptyWord : 0;
#pragma unroll
        for (int j = 0; j < kVectorsInFlight; ++j) v_[j] = first + lane_ + 32 * j < end ? empty_vector() : make_uint4(0, 0, 0, 0);
    }
    __device__ uint32_t header_flags() const { return __shfl_sync(kAllLanes, header_.x, 0); }

    // Afterwards lane k holds the place of choice k: its expert and row, or -1.
    __device__ void read_choices(int source, int token, bool keeps_route) {
        escape_ = __shfl_sync(kAllLanes, header_.y, 0);
        has_escape_ = (header_flags() & kRowEscaped) != 0;
        const uint32_t choice = header_word(header_, 2 + lane_ % args_.num_topk);
        const uint32_t weight = header_word(header_, 2 + (args_.has_weights ? args_.num_topk : 0) + lane_ % args_.num_topk);
        const int expert = static_cast<int>((choice & ~kRepeatedChoice) >> kPositionBits), position = static_cast<int>(choice & ((1u << kPositionBits) - 1));
        int32_t row = -1;
        if (lane_ < args_.num_topk && choice != kNoChoice) {
            const int place = source * args_.num_local_experts + expert;
            if (expert < args_.num_local_experts && position < places_.counts[place]) row = expert * num_rows() + places_.firsts[place] + position;
        }
        is_bad_ = lane_ < args_.num_topk && choice != kNoChoice && row < 0;
        if (keeps_route) {
            store_route(source, token, row);
            if (args_.has_weights && lane_ < args_.num_topk)
                args_.handle[args_.handle_layout.weights() + route_index(source, token) + lane_] = static_cast<int32_t>(weight);
            if (row >= 0 && args_.recv_x != nullptr) args_.handle[row] = token;  // src_info
        }
        row_ = row;
        targets_ = __ballot_sync(kAllLanes, row >= 0 && (choice & kRepeatedChoice) == 0);
        if (args_.recv_x == nullptr) targets_ = 0;
    }
    __device__ int num_rows() const { return args_.domain.num_ranks * args_.max_tokens; }  // of one expert
    __device__ int64_t route_index(int source, int token) const { return (static_cast<int64_t>(source) * args_.max_tokens + token) * args_.num_topk; }
    __device__ void store_route(int source, int token, int32_t row) const {
        if (lane_ < args_.num_topk) args_.handle[args_.handle_layout.routes() + route_index(source, token) + lane_] = row;
    }

    // Stores what poll has loaded to each expert row, and empties its place in the slot.
    __device__ void store(int first, int end, int num_scale_words) {
        if (!kFp8 && has_escape_) {
            const auto word = [&](uint32_t w) { return w == escape_ ? kEmptyWord : w; };
#pragma unroll
            for (int j = 0; j < kVectorsInFlight; ++j) v_[j] = make_uint4(word(v_[j].x), word(v_[j].y), word(v_[j].z), word(v_[j].w));
        }
        const int num_vectors = args_.message.num_payload_vectors();
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
            const int32_t row = __shfl_sync(kAllLanes, row_, __ffs(static_cast<int>(left)) - 1);
            uint4* target = reinterpret_cast<uint4*>(args_.recv_x) + static_cast<int64_t>(row) * num_vectors + first + lane_;
#pragma unroll
            for (int j = 0; j < kVectorsInFlight; ++j)
                if (first + lane_ + 32 * j < end) target[32 * j] = v_[j];
            if (has_scale) {
                const int expert = row / num_rows();
                args_.recv_scales[(static_cast<int64_t>(expert) * num_scales + scale_index) * num_rows() + row % num_rows()] = scale;
            }
        }
        uint4* taken = reinterpret_cast<uint4*>(slot_) + first + lane_;
#pragma unroll
        for (int j = 0; j < kVectorsInFlight; ++j)
            if (first + lane_ + 32 * j < end) taken[32 * j] = empty_vector();
        if (kFp8 && lane_ < num_scale_words) reinterpret_cast<uint32_t*>(slot_ + args_.message.scales_offset())[first / 8 + lane_] = kEmptyWord;
    }

    const DispatchArgs& args_;
    const DispatchShared& shared_;
    const RowPlaces& places_;
    int lane_;
    uint8_t* slot_;
    uint4 header_;
    uint4 v_[kVectorsInFlight];
    uint32_t scale_;
    uint32_t escape_;
    bool has_escape_;
    bool is_bad_ = false;  // this lane's choice names a place that there is not
    int32_t row_;
    unsigned targets_;
};

// By all threads of every block.
template <bool kFp8>
__device__ __forceinline__ void receive_rows(const DispatchArgs& args, DispatchShared& shared, int32_t* dynamic) {
    const Domain& domain = args.domain;
    const RowPlaces places{dynamic, dynamic + args.num_experts};
    if (!read_index(args, shared, places)) return;
    DEEPEP_STAMP(8, threadIdx.x == 0);
    if (blockIdx.x == gridDim.x - 1) store_counts(args, shared, places);

    int num_tokens = 0;  // the most of any source
#pragma unroll 1
    for (int rank = 0; rank < domain.num_ranks; ++rank) num_tokens = max(num_tokens, shared.num_tokens[rank]);
    const int num_rows = num_tokens * domain.num_ranks, num_blocks = static_cast<int>(gridDim.x);
    // As many warps to a row as there are, so that little is left to do when its last word arrives.
    int group_size = kLargestGroup;
    while (group_size > 1 && static_cast<int64_t>(num_rows) * group_size > num_blocks * kNumWarps) group_size /= 2;
    const int warp = static_cast<int>(threadIdx.x) / 32;
    const int group = warp / group_size, part = warp % group_size;
    // Parts begin with a scale word (or, packed, with four).
    const int unit = kFp8 ? (args.use_ue8m0 ? 32 : 8) : 1;
    const int num_vectors = args.message.num_payload_vectors();
    const int num_part_vectors = static_cast<int>(align_up(ceil_div(num_vectors, group_size), unit));
    const int begin = min(part * num_part_vectors, num_vectors), end = min(begin + num_part_vectors, num_vectors);
    RowReader<kFp8> reader(args, shared, places);
    DEEPEP_STAMP(9, threadIdx.x == 0);
#pragma unroll 1
    for (int i = group * num_blocks + static_cast<int>(blockIdx.x); i < num_rows; i += num_blocks * (kNumWarps / group_size)) {
        const int source = (i + domain.rank) % domain.num_ranks, token = i / domain.num_ranks;
        if (token >= shared.num_tokens[source]) continue;
        const int num_header_vectors = begin < end ? reader.take(source, token, begin, end, part == 0, i >= num_blocks * (kNumWarps / group_size)) : 0;
        // Every warp of the row has read its header.
        if (group_size > 1)
            ptx::named_barrier(1 + group, group_size * 32);
        else
            __syncwarp();
        if (part == 0) reader.empty_header(num_header_vectors);
        DEEPEP_STAMP(10, threadIdx.x == 0 && i == static_cast<int>(blockIdx.x));
    }
}

}  // namespace deepep::ibgda
