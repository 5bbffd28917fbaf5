#pragma once
// The receiving half of combine: warps take parts of this rank's tokens, poll the slots of the ranks that hold them, and add up.
#include "combine_shared.cuh"

namespace deepep::ibgda {

template <bool kAtSource, class Format>
class Receiver {
public:
    static constexpr int kTermsInFlight = 4;
    static constexpr int kPartColumns = 32 * Format::kColumns;

    __device__ Receiver(const CombineArgs& args, const CombineShared& shared) : args_(args), shared_(shared), lane_(static_cast<int>(threadIdx.x) % 32) {}

    // In lane k: the expert of the token's choice k.
    __device__ int32_t expert_of(int token) const {
        if (token >= args_.num_tokens || lane_ >= args_.num_topk) return -1;
        return args_.topk_idx.expert(static_cast<int64_t>(token) * args_.num_topk + lane_, args_.num_experts);
    }

    // Adds up one part of a token, empties its places and stores the result. False: the operation has failed.
    // `is_likely_there`: an earlier item of this warp has come.
    __device__ bool take(int token, int part, int32_t expert, bool is_likely_there) {
        token_ = token;
        part_ = part;
        is_inside_ = part * kPartColumns + lane_ * Format::kColumns < args_.hidden;
        rank_ = expert < 0 ? -1 : expert / args_.num_local_experts;
        if (rank_ >= 0 && shared_.num_tokens[rank_] < 0) rank_ = -1;
        float weight = 0;
        bool is_repeated = false;
        if constexpr (kAtSource) {
            if (rank_ >= 0) weight = args_.topk_weights[static_cast<int64_t>(token) * args_.num_topk + lane_];
            first_of_ = __ffs(static_cast<int>(__match_any_sync(kAllLanes, expert))) - 1;
            is_repeated = __any_sync(kAllLanes, rank_ >= 0 && first_of_ != lane_);
        }
        const unsigned all = __ballot_sync(kAllLanes, rank_ >= 0);
        auto sum = Sum<Format::kColumns>::zero();
#pragma unroll 1
        for (unsigned left = all; left != 0;) {
            if (!load(left, is_likely_there)) return false;
#pragma unroll
            for (int b = 0; b < kTermsInFlight; ++b) {
                if (left == 0) break;
                const int k = first_choice(left);
                float columns[Format::kColumns];
                Format::decode(v_[b], columns);
                if constexpr (kAtSource)
                    sum.add_product(__shfl_sync(kAllLanes, weight, k), columns);
                else
                    sum.add(columns);
                // Choices of one expert read the same place: it is emptied when all have.
                uint8_t* taken = place(k);
                if (is_inside_ && !is_repeated) Format::clear(taken);
                left = without_term(left, k);
            }
        }
        if constexpr (kAtSource) {
#pragma unroll 1
            for (unsigned left = is_repeated ? all : 0; left != 0; left &= left - 1) {
                uint8_t* part_place = place(first_choice(left));
                if (is_inside_) Format::clear(part_place);
            }
        }
        if (is_inside_ && args_.out != nullptr) {
            auto* out = reinterpret_cast<typename Format::Row*>(args_.out + static_cast<int64_t>(token) * args_.hidden * 2 + part * (kPartColumns * 2)) + lane_;
            *out = Format::rounded(sum);
        }
        return true;
    }

private:
    // The choice whose term is next: the first column (kAtSource), or one on the lowest rank.
    __device__ int first_choice(unsigned left) const {
        if constexpr (kAtSource) return __ffs(static_cast<int>(left)) - 1;
        const unsigned rank = (left >> lane_ & 1) != 0 ? static_cast<unsigned>(rank_) : kAllLanes;
        return __ffs(static_cast<int>(__ballot_sync(kAllLanes, rank == __reduce_min_sync(kAllLanes, rank)))) - 1;
    }
    __device__ unsigned without_term(unsigned left, int k) const {
        if constexpr (kAtSource) return left & ~(1u << k);
        return left & ~__ballot_sync(kAllLanes, rank_ == __shfl_sync(kAllLanes, rank_, k));
    }
    // Where the term of choice k arrives.
    __device__ uint8_t* place(int k) const {
        const Domain& domain = args_.domain;
        const int peer = __shfl_sync(kAllLanes, rank_, k);
        int first_of = 0;
        if constexpr (kAtSource) first_of = __shfl_sync(kAllLanes, first_of_, k);
        return domain.rows(domain.own, kCombine, shared_.operation.sequences[peer], peer) + slot_offset<kAtSource>(args_, token_, first_of) +
               part_ * Format::kPartBytes;
    }

    // Loads the next terms of `left`; those of a peer that is given up become zero. While something is missing, one lane looks at its part of the
    // first missing term: thousands of warps that looked at all their words would keep the cache from taking what they wait for. False: the
    // operation has failed.
    __device__ bool load(unsigned left, bool is_likely_there) {
        const Domain& domain = args_.domain;
        unsigned given_up = 0;
        uint32_t start = 0;
        const uint64_t begin_ns = args_.wait_stats != nullptr ? ptx::global_timer_ns() : 0;
        while (true) {
            uint8_t* places[kTermsInFlight];
            unsigned rest = left;
#pragma unroll
            for (int b = 0; b < kTermsInFlight; ++b) {
                const bool is_wanted = rest != 0;
                const int k = is_wanted ? first_choice(rest) : 0;
                places[b] = is_wanted ? place(k) : nullptr;
                v_[b] = is_wanted && is_inside_ && (given_up >> b & 1) == 0 ? Format::empty() : Format::nothing();
                if (is_wanted) rest = without_term(rest, k);
            }
            int missing = 0, prober = 0;
            bool looks_at_all = is_likely_there;
#pragma unroll 1
            for (int poll = 0; poll < kPollsPerCheck; ++poll) {
#pragma unroll
                for (int b = 0; b < kTermsInFlight; ++b)
                    if ((looks_at_all || (b == missing && lane_ == prober)) && !Format::is_full(v_[b])) v_[b] = Format::load(places[b]);
                const int before = missing, prober_before = prober;
                missing = -1;
#pragma unroll
                for (int b = kTermsInFlight - 1; b >= 0; --b) {
                    const unsigned lanes = __ballot_sync(kAllLanes, !Format::is_full(v_[b]));
                    if (lanes == 0) continue;
                    missing = b;
                    prober = __ffs(static_cast<int>(lanes)) - 1;
                }
                if (missing < 0) {
                    if (poll > 0 && args_.wait_stats != nullptr) note_waits(left, begin_ns);
                    return true;
                }
                // The lane that looked has found its part: now all look, once.
                looks_at_all = !looks_at_all && (missing != before || prober != prober_before);
            }
            const int peer = peer_of_term(left, missing);
            const Verdict verdict = judge_as_warp(domain, shared_.operation, kCombine, peer, &start);
            if (verdict == Verdict::kGoOn) continue;
            if (verdict == Verdict::kReport && lane_ == 0)
                fail(domain, shared_.operation, kCombine, Phase::kRow, peer, 0, shared_.operation.sequences[peer], start);
            if (verdict != Verdict::kSkip) return false;
#pragma unroll 1
            for (int b = 0; b < kTermsInFlight; ++b)
                if (peer_of_term(left, b) == peer) given_up |= 1u << b;
            start = 0;
        }
    }
    // -1 beyond the last one.
    __device__ int peer_of_term(unsigned left, int term) const {
#pragma unroll 1
        for (; term > 0 && left != 0; --term) left = without_term(left, first_choice(left));
        return left == 0 ? -1 : __shfl_sync(kAllLanes, rank_, first_choice(left));
    }
    __device__ void note_waits(unsigned left, uint64_t begin_ns) const {
#pragma unroll 1
        for (int b = 0; b < kTermsInFlight; ++b) {
            const int peer = peer_of_term(left, b);
            if (peer >= 0 && lane_ == 0) note_wait(args_.domain, kCombine, peer, begin_ns);
        }
    }

    const CombineArgs& args_;
    const CombineShared& shared_;
    int lane_;
    int token_ = 0;
    int part_ = 0;
    bool is_inside_ = false;
    int rank_ = -1;     // lane k: of choice k
    int first_of_ = 0;  // lane k: the first choice of the same expert
    typename Format::Wire v_[kTermsInFlight];
};

// By all threads of every block.
template <bool kAtSource, class Format>
__device__ __forceinline__ void receive_rows(const CombineArgs& args, const CombineShared& shared) {
    const Domain& domain = args.domain;
    if (blockIdx.x == 0)
        for (int rank = static_cast<int>(threadIdx.x); rank < domain.num_ranks; rank += kNumThreads) {
            const uint32_t sequence = shared.operation.sequences[rank];
            // The next kernel's credit. Kernel boundaries order it behind everything that is taken here.
            if (sequence != 0) ptx::store_relaxed_gpu(domain.consumed(kCombine, static_cast<int>(sequence % kNumSlots), rank), sequence);
        }
    using Part = Receiver<kAtSource, Format>;
    const int num_parts = static_cast<int>(ceil_div(args.hidden, Part::kPartColumns)), num_blocks = static_cast<int>(gridDim.x);
    const int num_items = args.num_tokens * num_parts;
    Part receiver(args, shared);
    int i = static_cast<int>(threadIdx.x) / 32 * num_blocks + static_cast<int>(blockIdx.x);
    int32_t next = receiver.expert_of(i / num_parts);
#pragma unroll 1
    while (i < num_items) {
        const int item = i;
        const int32_t expert = next;
        i += num_blocks * kNumWarps;
        next = receiver.expert_of(i / num_parts);
        if (!receiver.take(item / num_parts, item % num_parts, expert, item >= num_blocks * kNumWarps)) return;
        DEEPEP_STAMP(8, threadIdx.x == 0 && item == static_cast<int>(blockIdx.x));
    }
}

}  // namespace deepep::ibgda
