#pragma once
// What a block's control warp sends beside rows: positions from the routing table, headers, scales, and the index that says how many tokens each
// expert gets.
#include "dispatch_row.cuh"

namespace deepep::ibgda {

// --- the routing table ----------------------------------------------------------------------------------------------

constexpr uint32_t kNamedByAny = 1u << 16, kNamedBelow = 1;
constexpr int kShortToken = 8;  // choices

// Adds to each expert's word the tokens of [first, end), every `step`-th, that name it: `any` each, and 1 if they are below `limit`. A token that
// names an expert twice counts once.
__device__ __forceinline__ void count_long_tokens(const DispatchArgs& args, uint32_t* named, int first, int end, int step, int limit, uint32_t any) {
#pragma unroll 1
    for (int token = first; token < end; token += step) {
        const int64_t i = static_cast<int64_t>(row_offset(token, static_cast<uint32_t>(args.num_topk)));
#pragma unroll 1
        for (int k = 0; k < args.num_topk; ++k) {
            const int32_t expert = args.topk_idx.expert(i + k, args.num_experts);
            bool is_first = expert >= 0;
#pragma unroll 1
            for (int j = 0; j < k && is_first; ++j) is_first = args.topk_idx.expert(i + j, args.num_experts) != expert;
            if (is_first) atomicAdd(&named[expert], any + (token < limit ? kNamedBelow : 0));
        }
    }
}

// The same where a token has few choices.
template <class Index>
__device__ __forceinline__ void count_short_tokens(const DispatchArgs& args, uint32_t* named, int first, int end, int step, int limit, uint32_t any) {
#pragma unroll 1
    for (int token = first; token < end; token += step) {
        const Index* choices = static_cast<const Index*>(args.topk_idx.data) + row_offset(token, static_cast<uint32_t>(args.num_topk));
        const uint32_t add = any + (token < limit ? kNamedBelow : 0);
        Index index[kShortToken];
#pragma unroll
        for (int k = 0; k < kShortToken; ++k) index[k] = k < args.num_topk ? choices[k] : -1;
        int32_t experts[kShortToken];
#pragma unroll
        for (int k = 0; k < kShortToken; ++k) {
            experts[k] = IndexArray::checked(index[k], args.num_experts);
            bool is_first = experts[k] >= 0;
#pragma unroll
            for (int j = 0; j < k; ++j) is_first = is_first && experts[j] != experts[k];
            if (is_first) atomicAdd(&named[experts[k]], add);
        }
    }
}

// The same for any token.
__device__ __forceinline__ void count_tokens(const DispatchArgs& args, uint32_t* named, int first, int end, int step, int limit, uint32_t any) {
    if (args.num_topk > kShortToken)
        count_long_tokens(args, named, first, end, step, limit, any);
    else if (args.topk_idx.bits == 64)
        count_short_tokens<int64_t>(args, named, first, end, step, limit, any);
    else
        count_short_tokens<int32_t>(args, named, first, end, step, limit, any);
}

// By the control warp, later on: more tokens are below the block's token.
__device__ __noinline__ inline void count_below(const DispatchArgs& args, uint32_t* named, int first, int end) {
    count_tokens(args, named, first + static_cast<int>(threadIdx.x) % 32, end, 32, end, 0);
    __syncwarp();
}

// --- the control warp -----------------------------------------------------------------------------------------------

// Choice k of the block's token, in lane k of the control warp.
struct ChoiceLane {
    int64_t index;
    float weight;
    int32_t expert;  // global, -1 for none
    int32_t dst_rank;  // -1 where nothing is sent
    bool is_repeated;  // an earlier choice names the same expert

    __device__ void load(const DispatchArgs& args, int token, bool has_token) {
        const int lane = static_cast<int>(threadIdx.x) % 32;
        const bool is_there = has_token && lane < args.num_topk;
        const int64_t i = static_cast<int64_t>(row_offset(token, static_cast<uint32_t>(args.num_topk))) + lane;
        index = is_there ? args.topk_idx[i] : -1;
        weight = is_there && args.has_weights ? args.topk_weights[i] : 0;
    }
    // Which ranks get the token, and where. The operation has begun.
    __device__ void find_destinations(const DispatchArgs& args, const Operation& operation, Token& out, int token) {
        const Domain& domain = args.domain;
        const int lane = static_cast<int>(threadIdx.x) % 32;
        expert = IndexArray::checked(index, args.num_experts);
        dst_rank = expert < 0 ? -1 : static_cast<int32_t>(args.plan.by_local_experts.quotient(static_cast<uint32_t>(expert)));
        if (dst_rank >= 0 && operation.sequences[dst_rank] == 0) dst_rank = -1;
        is_repeated = __ffs(static_cast<int>(__match_any_sync(kAllLanes, expert))) - 1 != lane;
        const bool leads = __ffs(static_cast<int>(__match_any_sync(kAllLanes, dst_rank))) - 1 == lane && dst_rank >= 0;
        // Every token, and every rank, starts with another destination, so that all links are busy at once.
        uint32_t place;
        args.plan.by_ranks.quotient(static_cast<uint32_t>(dst_rank + 2 * domain.num_ranks - domain.rank - 1) + static_cast<uint32_t>(token) * (static_cast<uint32_t>(domain.num_ranks) - 1), &place);
        if (domain.num_ranks > 32) place = static_cast<uint32_t>(lane);
        const unsigned places = __reduce_or_sync(kAllLanes, leads ? 1u << place : 0);
        if (lane < kMaxWindowRanks / 32) out.is_destination[lane] = 0;
        __syncwarp();
        if (leads) {
            const int d = __popc(places & ((1u << place) - 1));
            out.destinations[d] = dst_rank;
            out.slots[d] = operation.outgoing[dst_rank] + row_offset(token, args.message.stride);
            atomicOr(&out.is_destination[dst_rank / 32], 1u << dst_rank % 32);
        }
        if (lane == 0) out.num_destinations = __popc(places);
    }
    // The header, once the routing table has been counted.
    __device__ void write_header(const DispatchArgs& args, const uint32_t* named, Token& out, uint32_t flags, uint32_t escape) const {
        const int lane = static_cast<int>(threadIdx.x) % 32, num_topk = args.num_topk;
        if (lane < 2) {
            out.words[lane] = lane == 0 ? flags : escape;
            out.ranks[lane] = kEveryRank;
        }
        if (lane < num_topk) {
            const uint32_t position = expert < 0 ? 0 : named[expert] % kNamedByAny;
            const uint32_t local_expert = static_cast<uint32_t>(expert - dst_rank * args.num_local_experts);
            out.words[2 + lane] = dst_rank < 0 ? kNoChoice : (is_repeated ? kRepeatedChoice : 0) | local_expert << kPositionBits | position;
            out.ranks[2 + lane] = dst_rank;
            if (args.has_weights) {
                const uint32_t bits = __float_as_uint(weight);
                out.words[2 + num_topk + lane] = bits == kEmptyWord ? 0x7fffffffu : bits;
                out.ranks[2 + num_topk + lane] = kEveryRank;
            }
        }
        const int filler = args.message.num_header_words + lane;
        if (filler < 4 * args.message.num_header_vectors) {
            out.words[filler] = 0;
            out.ranks[filler] = kEveryRank;
        }
        __syncwarp();
    }
};

// By the control warp.
__device__ __forceinline__ void store_header(const DispatchArgs& args, const Token& token) {
#pragma unroll 1
    for (int i = static_cast<int>(threadIdx.x) % 32; i < args.message.num_header_vectors; i += 32) {
        const uint4 words = *reinterpret_cast<const uint4*>(token.words + 4 * i);
        const int4 ranks = *reinterpret_cast<const int4*>(token.ranks + 4 * i);
#pragma unroll 1
        for (int d = 0; d < token.num_destinations; ++d) {
            const int32_t dst_rank = token.destinations[d];
            const auto word = [&](uint32_t value, int32_t rank) { return rank == kEveryRank || rank == dst_rank ? value : kNoChoice; };
            ptx::store_relaxed_sys(reinterpret_cast<uint4*>(token.slots[d] + args.message.header) + i,
                                   make_uint4(word(words.x, ranks.x), word(words.y, ranks.y), word(words.z, ranks.z), word(words.w, ranks.w)));
        }
    }
}

// Of segments [first, end), four words each. By the control warp.
__device__ __forceinline__ void store_scales(const DispatchArgs& args, const Token& token, const uint32_t* scales, int first, int end) {
#pragma unroll 1
    for (int i = first + static_cast<int>(threadIdx.x) % 32; i < end; i += 32) {
        const uint4 words = *reinterpret_cast<const uint4*>(scales + 4 * i);
#pragma unroll 1
        for (int d = 0; d < token.num_destinations; ++d) ptx::store_relaxed_sys(reinterpret_cast<uint4*>(token.slots[d] + args.message.scales) + i, words);
    }
}

// Ranks that do not get the token are told so. By the control warp.
template <bool kRemote>
__device__ __forceinline__ void store_absence(const DispatchArgs& args, const Operation& operation, const Token& info, int token) {
    const Domain& domain = args.domain;
#pragma unroll 1
    for (int rank = static_cast<int>(threadIdx.x) % 32; rank < domain.num_ranks; rank += 32) {
        if (operation.sequences[rank] == 0 || (info.is_destination[rank / 32] >> rank % 32 & 1) != 0) continue;
        uint8_t* header = operation.outgoing[rank] + row_offset(token, args.message.stride) + args.message.header;
        ptx::store_relaxed_sys(reinterpret_cast<uint4*>(header), make_uint4(0, 0, 0, 0));
        if (is_remote<kRemote>(domain, rank)) post_outgoing(domain, operation, kDispatch, rank, header, 16);
    }
}

// This share's index messages: some ranks' whole ones, so that few packets carry them. By the control warp; the table is counted.
template <bool kRemote>
__device__ __forceinline__ void store_index(const DispatchArgs& args, const Operation& operation, int share, const uint32_t* named) {
    const Domain& domain = args.domain;
    const int lane = static_cast<int>(threadIdx.x) % 32, num_words = kIndexCounts + args.num_local_experts;
#pragma unroll 1
    for (int rank = share; rank < domain.num_ranks; rank += args.plan.num_shares) {
        const uint32_t sequence = operation.sequences[rank];
        if (sequence == 0) continue;
        uint64_t* index = outgoing_index(domain, operation, kDispatch, rank);
        const uint32_t* counts = named + rank * args.num_local_experts - kIndexCounts;
#pragma unroll 1
        for (int i = lane; i < num_words; i += 32) {
            const uint32_t value = i >= kIndexCounts ? counts[i] / kNamedByAny : i == kIndexNumTokens ? static_cast<uint32_t>(args.num_tokens) : args.checksum;
            ptx::store_relaxed_sys(index + i, signal_word(sequence, value));
        }
        if (is_remote<kRemote>(domain, rank)) {
            __syncwarp();
            if (lane == 0) post_outgoing(domain, operation, kDispatch, rank, reinterpret_cast<const uint8_t*>(index), 8u * static_cast<uint32_t>(num_words));
            __syncwarp();
        }
    }
}

// Rows for ranks outside the NVLink domain lie in the outbox; a row that is sent whole goes as one work request. By all senders, after a barrier.
__device__ __forceinline__ void post_rows(const DispatchArgs& args, const Operation& operation, const Token& token, const Unit& unit) {
    const RowOffsets& row = args.message;
    const int warp = static_cast<int>(threadIdx.x) / 32;
#pragma unroll 1
    for (int d = warp; d < token.num_destinations; d += kSendWarps) {
        if (threadIdx.x % 32 != 0 || !args.domain.remote.has(token.destinations[d])) continue;
        const auto post = [&](int begin, int last) {
            if (begin < last)
                post_outgoing(args.domain, operation, kDispatch, token.destinations[d], token.slots[d] + begin, static_cast<uint32_t>(last - begin));
        };
        if (args.plan.parts_log2 == 0) {
            post(0, row.num_bytes);
            continue;
        }
        const int num_segment_bytes = kSegmentColumns * (args.use_fp8 ? 1 : 2);
        post(unit.first * num_segment_bytes, min(unit.end * num_segment_bytes, 16 * row.num_payload_vectors));
        post(row.scales + 16 * unit.first, row.scales + 16 * min(unit.end, row.num_scale_vectors));
        if (unit.part == 0) post(row.header, row.num_bytes);
    }
}

}  // namespace deepep::ibgda
