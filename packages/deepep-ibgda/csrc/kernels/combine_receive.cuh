#pragma once
// The receiving half of combine: warps take parts of this rank's tokens, poll the slots of the ranks that hold them, and add up. What the own rank
// holds they add up themselves where every block of the kernel both sends and receives.
#include "combine_shared.cuh"
#include "deepep/ptx/async_copy.cuh"

namespace deepep::ibgda {

// In lane k: choice k of one of this rank's tokens.
struct OwnChoice {
    int32_t expert = -1;
    float weight = 0;
    int32_t row = -1;  // of x, if the expert is here and the kernel sends

    __device__ static bool is_there(const CombineArgs& args, int token) { return token < args.num_tokens && static_cast<int>(threadIdx.x) % 32 < args.num_topk; }
    __device__ static ChoiceWords& words(CombineShared& shared) { return shared.choices[threadIdx.x / 32][threadIdx.x % 32]; }

    // Puts them on their way to shared memory: registers are scarce while another part is waited for.
    template <bool kAtSource>
    __device__ static void fetch(const CombineArgs& args, CombineShared& shared, int token) {
        if (!is_there(args, token)) return;
        ChoiceWords& to = words(shared);
        const int k = static_cast<int>(threadIdx.x) % 32, i = token * args.num_topk + k;
        if (args.topk_idx.bits == 64)
            ptx::async_copy<8>(&to.index, static_cast<const int64_t*>(args.topk_idx.data) + i);
        else
            ptx::async_copy<4>(&to.index, static_cast<const int32_t*>(args.topk_idx.data) + i);
        ptx::async_copy<4>(&to.weight, args.topk_weights + i);
        if (!kAtSource && args.plan.adds_own) ptx::async_copy<4>(&to.row, args.handle + args.handle_layout.routes() + route_of(args, args.domain.rank, token) + k);
        ptx::async_commit();
    }
    template <bool kAtSource>
    __device__ static OwnChoice take(const CombineArgs& args, CombineShared& shared, int token) {
        OwnChoice choice;
        if (!is_there(args, token)) return choice;
        ptx::async_wait<0>();
        const ChoiceWords& from = words(shared);
        choice.expert = IndexArray::checked(args.topk_idx.bits == 64 ? from.index : static_cast<int32_t>(from.index), args.num_experts);
        choice.weight = from.weight;
        if (!kAtSource && args.plan.adds_own) choice.row = from.row;
        return choice;
    }
};

// A warp that takes parts. A term is what one rank has sent for a token, or (kAtSource) one choice's row; terms are bits, of which the lowest is
// added first. Ranks are looked at 32 at a time.
template <bool kAtSource, class Format>
class Receiver {
public:
    static constexpr int kTermsInFlight = 4;
    static constexpr int kPartBytes = 64 * Format::kColumns;  // in x and in the result

    __device__ Receiver(const CombineArgs& args, const CombineShared& shared) : args_(args), shared_(shared), lane_(static_cast<int>(threadIdx.x) % 32) {}

    // Adds up one part of a token, stores the result and empties the part's places. False: the operation has failed.
    __device__ bool take(int token, int part, OwnChoice choice) {
        token_ = token;
        part_ = part;
        const uint64_t begin_ns = args_.wait_stats != nullptr ? ptx::global_timer_ns() : 0;
        uint32_t start = 0;
#pragma unroll 1
        while (true) {
            rank_ = choice.expert < 0 ? -1 : static_cast<int>(args_.plan.by_num_local_experts.quotient(static_cast<uint32_t>(choice.expert)));
            if (rank_ >= 0 && shared_.num_tokens[rank_] < 0) rank_ = -1;
            if constexpr (kAtSource) first_of_ = __ffs(static_cast<int>(__match_any_sync(kAllLanes, choice.expert))) - 1;
            const int missing = add_up(choice);
            if (missing < 0) break;
            // Nothing has been changed: the part begins again, perhaps without what this peer holds.
            const Verdict verdict = judge_as_warp(args_.domain, shared_.operation, kCombine, missing, &start);
            if (verdict == Verdict::kReport && lane_ == 0)
                fail(args_.domain, shared_.operation, kCombine, Phase::kRow, missing, 0, shared_.operation.sequences[missing], start);
            if (verdict == Verdict::kEnd || verdict == Verdict::kReport) return false;
            if (verdict == Verdict::kSkip && rank_ == missing) choice.expert = -1;
            if (verdict == Verdict::kSkip) start = 0;
        }
        if (begin_ns != 0) note_waits(begin_ns);
        return true;
    }

private:
    // A rank whose term has not come for a while, or -1: done.
    __device__ int add_up(const OwnChoice& choice) const {
        const uint32_t begin = static_cast<uint32_t>(part_ * kPartBytes + lane_ * (2 * Format::kColumns));
        const bool is_inside = begin < static_cast<uint32_t>(2 * args_.hidden);
        auto sum = Sum<Format::kColumns>::zero();
        if constexpr (kAtSource) {
            const int missing = add_terms(0, __ballot_sync(kAllLanes, rank_ >= 0), choice, begin, is_inside, sum);
            if (missing >= 0) return missing;
        } else {
#pragma unroll 1
            for (int base = 0; base < args_.domain.num_ranks; base += 32) {
                const int missing = add_terms(base, ranks_from(base), choice, begin, is_inside, sum);
                if (missing >= 0) return missing;
            }
        }
        if (is_inside && args_.out != nullptr)
            *reinterpret_cast<typename Format::Row*>(args_.out + static_cast<int64_t>(token_) * args_.hidden * 2 + begin) = Format::rounded(sum);
        if constexpr (kAtSource) {
            clear(0, __ballot_sync(kAllLanes, rank_ >= 0), is_inside);
        } else {
#pragma unroll 1
            for (int base = 0; base < args_.domain.num_ranks; base += 32) clear(base, ranks_from(base), is_inside);
        }
        return -1;
    }

    // The ranks that hold the token, from this one on: at most 32.
    __device__ unsigned ranks_from(int base) const {
        const unsigned bit = static_cast<unsigned>(rank_ - base);
        return __reduce_or_sync(kAllLanes, rank_ >= 0 && bit < 32 ? 1u << bit : 0);
    }

    // What this rank's experts made of the part, as it would have travelled.
    __device__ typename Format::Wire own_sum(const OwnChoice& choice, uint32_t begin, bool is_inside) const {
        WeightedSum<Format, 1> sum;
#pragma unroll 1
        for (unsigned left = __ballot_sync(kAllLanes, rank_ == args_.domain.rank && is_expert_row(args_, choice.row)); left != 0;)
            left = sum.add(
                args_, left, [&](int l) { return __shfl_sync(kAllLanes, choice.row, l); },
                [&](int l) { return __float_as_uint(__shfl_sync(kAllLanes, choice.weight, l)); }, begin, 0, is_inside ? 1 : 0, [] { return true; });
        return Format::encode(sum.rounded(0));
    }

    __device__ int peer_of(int base, int term) const { return kAtSource ? __shfl_sync(kAllLanes, rank_, term) : base + term; }
    __device__ bool is_own(int base, int term) const { return !kAtSource && args_.plan.adds_own && base + term == args_.domain.rank; }
    // Where the term arrives.
    __device__ uint8_t* place(int base, int term) const {
        const int k = kAtSource ? __shfl_sync(kAllLanes, first_of_, term) : 0;
        return shared_.operation.incoming[peer_of(base, term)] + slot_offset<kAtSource>(args_, token_, k) + static_cast<uint32_t>(part_ * Format::kPartBytes);
    }

    __device__ int add_terms(int base, unsigned terms, const OwnChoice& choice, uint32_t begin, bool is_inside, Sum<Format::kColumns>& sum) const {
#pragma unroll 1
        while (terms != 0) {
            typename Format::Wire v[kTermsInFlight];
            const unsigned missing = load(v, base, terms, choice, begin, is_inside);
            if (missing != 0) return peer_of(base, __ffs(static_cast<int>(missing)) - 1);
#pragma unroll
            for (int b = 0; b < kTermsInFlight; ++b) {
                if (terms == 0) break;
                const int term = __ffs(static_cast<int>(terms)) - 1;
                terms &= terms - 1;
                float columns[Format::kColumns];
                Format::decode(v[b], columns);
                if constexpr (kAtSource) {
                    sum.add_product(__shfl_sync(kAllLanes, choice.weight, term), columns);
                } else {
                    const unsigned choices = __ballot_sync(kAllLanes, rank_ == base + term);
                    if (Format::kSendsSingleRows && (choices & (choices - 1)) == 0 && !is_own(base, term)) {
                        auto product = Sum<Format::kColumns>::zero();
                        product.add_product(__shfl_sync(kAllLanes, choice.weight, __ffs(static_cast<int>(choices)) - 1), columns);
                        Format::columns(Format::rounded(product), columns);
                    }
                    sum.add(columns);
                }
            }
        }
        return -1;
    }

    // Loads the next terms; what is here is added up meanwhile. After the first look one lane looks at its part of a term until that has come: thousands
    // of warps that looked at all their words would keep the cache from taking what they wait for. Returns the terms that have not come for a while.
    __device__ unsigned load(typename Format::Wire (&v)[kTermsInFlight], int base, unsigned terms, const OwnChoice& choice, uint32_t begin,
                             bool is_inside) const {
        unsigned rest = terms, missing = 0, looks_at_all = 0;
#pragma unroll
        for (int b = 0; b < kTermsInFlight; ++b) {
            v[b] = Format::nothing();
            if (rest == 0) continue;
            const int term = __ffs(static_cast<int>(rest)) - 1;
            rest &= rest - 1;
            uint8_t* term_place = place(base, term);
            if (is_inside && !is_own(base, term)) v[b] = Format::load(term_place);
        }
        rest = terms;
#pragma unroll
        for (int b = 0; b < kTermsInFlight; ++b) {
            if (rest != 0 && is_own(base, __ffs(static_cast<int>(rest)) - 1)) looks_at_all = 1u << b;
            rest &= rest - 1;
        }
        if (looks_at_all != 0) {
            const auto own = own_sum(choice, begin, is_inside);
#pragma unroll
            for (int b = 0; b < kTermsInFlight; ++b)
                if ((looks_at_all >> b & 1) != 0) v[b] = own;
        }
#pragma unroll 1
        for (int poll = 0; poll < kPollsPerCheck; ++poll) {
            rest = terms;
            missing = 0;
#pragma unroll
            for (int b = 0; b < kTermsInFlight; ++b) {
                const unsigned lanes = __ballot_sync(kAllLanes, Format::is_full(v[b]));
                looks_at_all |= (lanes & 1) << b;
                if (lanes != kAllLanes) missing |= rest & (0u - rest);
                rest &= rest - 1;
            }
            if (missing == 0) break;
            rest = terms;
#pragma unroll
            for (int b = 0; b < kTermsInFlight; ++b) {
                if (rest == 0) break;
                uint8_t* term_place = place(base, __ffs(static_cast<int>(rest)) - 1);
                rest &= rest - 1;
                if ((lane_ == 0 || (looks_at_all >> b & 1) != 0) && !Format::is_full(v[b])) v[b] = Format::load(term_place);
            }
        }
        return missing;
    }

    // Choices of one expert read the same place.
    __device__ void clear(int base, unsigned terms, bool is_inside) const {
#pragma unroll 1
        for (; terms != 0; terms &= terms - 1) {
            const int term = __ffs(static_cast<int>(terms)) - 1;
            uint8_t* taken = place(base, term);
            if (is_inside && !is_own(base, term)) Format::clear(taken);
        }
    }

    __device__ void note_waits(uint64_t begin_ns) const {
        const bool is_first = __ffs(static_cast<int>(__match_any_sync(kAllLanes, rank_))) - 1 == lane_;
        if (is_first && rank_ >= 0) note_wait(args_.domain, kCombine, rank_, begin_ns);
    }

    const CombineArgs& args_;
    const CombineShared& shared_;
    int lane_;
    int token_ = 0;
    int part_ = 0;
    int rank_ = -1;     // lane k: of choice k
    int first_of_ = 0;  // lane k: the first choice of the same expert
};

// The next of the block's parts. By a warp.
__device__ __forceinline__ int claim_part(CombineShared& shared) {
    int claimed = 0;
    if (threadIdx.x % 32 == 0) claimed = atomicAdd(&shared.next_part, 1);
    return __shfl_sync(kAllLanes, claimed, 0);
}

// By all receivers of every block, and by its senders when nothing is left to send. Blocks that only send have no parts.
template <bool kAtSource, class Format>
__device__ __forceinline__ void receive_rows(const CombineArgs& args, CombineShared& shared) {
    const int num_items = args.num_tokens * args.plan.num_parts;
    const int first = static_cast<int>(blockIdx.x) - args.plan.num_sending_blocks, stride = static_cast<int>(gridDim.x) - args.plan.num_sending_blocks;
    if (first < 0) return;
    Receiver<kAtSource, Format> receiver(args, shared);
    const auto claim = [&] {
        const int i = claim_part(shared) * stride + first;
        OwnChoice::fetch<kAtSource>(args, shared, static_cast<int>(args.plan.by_num_parts.quotient(static_cast<uint32_t>(i))));
        return i;
    };
    int i = claim();
#pragma unroll 1
    for (bool is_first = true; i < num_items; is_first = false) {
        uint32_t part;
        const int token = static_cast<int>(args.plan.by_num_parts.quotient(static_cast<uint32_t>(i), &part));
        const OwnChoice choice = OwnChoice::take<kAtSource>(args, shared, token);
        __syncwarp();
        i = claim();  // while this part is waited for
        if (!receiver.take(token, static_cast<int>(part), choice)) {
            ptx::async_wait<0>();  // nothing lands in the memory of a block that has ended
            return;
        }
        DEEPEP_STAMP(8, receive_thread() == 0 && is_first);
    }
}

}  // namespace deepep::ibgda
