#pragma once
// The sending half of dispatch: a block takes a token, or a part of its columns. Its workers cast the columns in registers and store them into the
// slots of the token's destinations; its control warp stores what the row needs beside: scales, header, and this block's words of the index.
#include <cuda_fp8.h>

#include "deepep/codec/fp8.hpp"
#include "dispatch_shared.cuh"

namespace deepep::ibgda {

constexpr int kSegmentColumns = 512;  // of a warp at once: 16 of each lane, four scale blocks
constexpr int kSegmentsInFlight = 2;
constexpr int kMostPartSegments = kControlWarp * kSegmentsInFlight;

// Two bf16 magnitudes at once: as integers they order like the numbers, NaN above infinity.
__device__ __forceinline__ uint32_t max_magnitudes(uint32_t a, uint32_t b) { return __vmaxu2(a & 0x7fff7fffu, b & 0x7fff7fffu); }

__device__ __forceinline__ uint32_t cast_two(uint32_t pair, float factor) {
    const float low = __fmul_rn(__uint_as_float(pair << 16), factor);
    const float high = __fmul_rn(__uint_as_float(pair & 0xffff0000u), factor);
    return __nv_cvt_float2_to_fp8x2(make_float2(low, high), __NV_SATFINITE, __NV_E4M3);
}

// Casts a lane's 16 columns; eight neighbouring lanes share a block of 128 and find its maximum together.
__device__ __forceinline__ uint4 cast_lane(const uint4 (&v)[2], bool round_scale, uint32_t* scale) {
    uint32_t pair = 0;
#pragma unroll
    for (int j = 0; j < 2; ++j) pair = max_magnitudes(pair, max_magnitudes(max_magnitudes(v[j].x, v[j].y), max_magnitudes(v[j].z, v[j].w)));
    uint32_t largest = max(pair & 0xffffu, pair >> 16);
#pragma unroll
    for (int offset = 1; offset < 8; offset *= 2) largest = max(largest, __shfl_xor_sync(kAllLanes, largest, offset));
    const codec::Fp8Scale of_block = codec::fp8_scale(codec::bf16_to_float(static_cast<uint16_t>(largest)), round_scale);
    *scale = codec::bits_of(of_block.scale);
    const auto four = [&](uint32_t a, uint32_t b) { return cast_two(a, of_block.factor) | cast_two(b, of_block.factor) << 16; };
    return make_uint4(four(v[0].x, v[0].y), four(v[0].z, v[0].w), four(v[1].x, v[1].y), four(v[1].z, v[1].w));
}

__device__ __forceinline__ uint4 escaped(uint4 v, uint32_t escape) {
    const auto word = [&](uint32_t w) { return w == kEmptyWord ? escape : w; };
    return make_uint4(word(v.x), word(v.y), word(v.z), word(v.w));
}

// The columns of a part that a worker warp holds: every kControlWarp-th segment of [first, end).
template <bool kFp8>
struct RowPart {
    uint4 v[kSegmentsInFlight][2];  // bf16; once cast, the first of each two is e4m3

    __device__ static int segment(int first, int c) { return first + c * kControlWarp + static_cast<int>(threadIdx.x) / 32; }
    // Of bf16: two neighbours, whose casts make one vector, or two far apart, which store better.
    __device__ static int vector(int segment, int j) {
        const int lane = static_cast<int>(threadIdx.x) % 32;
        return segment * (kSegmentColumns / 8) + (kFp8 ? 2 * lane + j : 32 * j + lane);
    }
    __device__ void load(const DispatchArgs& args, int token, int first, int end) {
        const int num_vectors = args.hidden / 8;
        const uint4* row = reinterpret_cast<const uint4*>(args.x) + row_offset(token, static_cast<uint32_t>(num_vectors));
#pragma unroll
        for (int c = 0; c < kSegmentsInFlight; ++c)
#pragma unroll
            for (int j = 0; j < 2; ++j) {
                const int i = vector(segment(first, c), j);
                v[c][j] = segment(first, c) < end && i < num_vectors ? ptx::load_streaming(row + i) : make_uint4(0, 0, 0, 0);
            }
    }
    // Scales beyond the row's last one fill up its last 16 bytes; what they say does not matter.
    __device__ void cast(const DispatchArgs& args, uint32_t* scales, int first, int end) {
        const int lane = static_cast<int>(threadIdx.x) % 32;
#pragma unroll
        for (int c = 0; c < kSegmentsInFlight; ++c) {
            if (segment(first, c) >= end) continue;
            uint32_t scale;
            v[c][0] = cast_lane(v[c], args.round_scale, &scale);
            if (lane % 8 == 0) scales[segment(first, c) * (kSegmentColumns / 128) + lane / 8] = scale;
        }
    }
    __device__ bool has_empty_word() const { return !is_full(v[0][0]) || !is_full(v[0][1]) || !is_full(v[1][0]) || !is_full(v[1][1]); }
    // In the whole row.
    __device__ static bool finds_empty_word(const DispatchArgs& args, int token) {
        bool found = false;
#pragma unroll 1
        for (int begin = 0; begin < args.plan.num_segments; begin += kMostPartSegments) {
            RowPart other;
            other.load(args, token, begin, min(begin + kMostPartSegments, args.plan.num_segments));
            found = found || other.has_empty_word();
        }
        return found;
    }
    __device__ void escape(uint32_t value) {
#pragma unroll
        for (int c = 0; c < kSegmentsInFlight; ++c)
#pragma unroll
            for (int j = 0; j < 2; ++j) v[c][j] = escaped(v[c][j], value);
    }
    __device__ void store(const DispatchArgs& args, const Token& token, int first, int end) const {
        const int num_vectors = args.message.num_payload_vectors, lane = static_cast<int>(threadIdx.x) % 32;
#pragma unroll 1
        for (int d = 0; d < token.num_destinations; ++d) {
            uint4* target = reinterpret_cast<uint4*>(token.slots[d]);
#pragma unroll
            for (int c = 0; c < kSegmentsInFlight; ++c) {
#pragma unroll
                for (int j = 0; j < (kFp8 ? 1 : 2); ++j) {
                    const int i = kFp8 ? segment(first, c) * 32 + lane : vector(segment(first, c), j);
                    if (segment(first, c) < end && i < num_vectors) ptx::store_relaxed_sys(target + i, v[c][j]);
                }
            }
        }
    }
};

// For a later load. By the workers.
__device__ __forceinline__ void prefetch_row(const DispatchArgs& args, int token) {
    const int first = static_cast<int>(threadIdx.x) * 8;  // one thread for a line of 128 bytes
    if (first < args.hidden / 8) ptx::prefetch_l2(reinterpret_cast<const uint4*>(args.x) + row_offset(token, static_cast<uint32_t>(args.hidden / 8)) + first);
}

// A value that occurs in none of the row's words. By the workers.
__device__ __noinline__ inline uint32_t find_escape(const DispatchArgs& args, DispatchShared& shared, int token) {
    const uint32_t* row = reinterpret_cast<const uint32_t*>(args.x) + static_cast<int64_t>(token) * (args.hidden / 2);
#pragma unroll 1
    for (uint32_t first = 0x7fc10000u;; first += 32) {
        if (threadIdx.x == 0) shared.found = 0;
        worker_barrier();
#pragma unroll 1
        for (int i = static_cast<int>(threadIdx.x); i < args.hidden / 2; i += kNumWorkers)
            if (row[i] - first < 32) atomicOr(&shared.found, 1u << (row[i] - first));
        worker_barrier();
        const uint32_t found = shared.found;
        worker_barrier();
        if (found != kAllLanes) return first + __ffs(~found) - 1;
    }
}

// --- the routing table ----------------------------------------------------------------------------------------------

constexpr uint32_t kNamedByAny = 1u << 16, kNamedBelow = 1;

// A token of more choices than registers are kept for.
__device__ __noinline__ inline void count_long_token(IndexArray topk_idx, int num_topk, int num_experts, int token, uint32_t* named, uint32_t add) {
    const int64_t first = static_cast<int64_t>(token) * num_topk;
#pragma unroll 1
    for (int k = 0; k < num_topk; ++k) {
        const int32_t expert = topk_idx.expert(first + k, num_experts);
        bool is_first = expert >= 0;
#pragma unroll 1
        for (int j = 0; j < k && is_first; ++j) is_first = topk_idx.expert(first + j, num_experts) != expert;
        if (is_first) atomicAdd(&named[expert], add);
    }
}

// Adds to each expert's word the tokens of [first, end), every `step`-th, that name it: `any` each, and 1 if they are below `limit`. A token that
// names an expert twice counts once.
__device__ __forceinline__ void count_tokens(const DispatchArgs& args, uint32_t* named, int first, int end, int step, int limit, uint32_t any) {
    constexpr int kChoices = 8;
    const int num_topk = args.num_topk, num_experts = args.num_experts;
#pragma unroll 1
    for (int token = first; token < end; token += step) {
        const uint32_t add = any + (token < limit ? kNamedBelow : 0);
        if (num_topk > kChoices) {
            count_long_token(args.topk_idx, num_topk, num_experts, token, named, add);
            continue;
        }
        int32_t experts[kChoices];
        const uint64_t i = row_offset(token, static_cast<uint32_t>(num_topk));
        if (args.topk_idx.bits == 64) {
            const int64_t* choices = static_cast<const int64_t*>(args.topk_idx.data) + i;
#pragma unroll
            for (int k = 0; k < kChoices; ++k) experts[k] = k < num_topk ? IndexArray::checked(choices[k], num_experts) : -1;
        } else {
            const int32_t* choices = static_cast<const int32_t*>(args.topk_idx.data) + i;
#pragma unroll
            for (int k = 0; k < kChoices; ++k) experts[k] = k < num_topk ? IndexArray::checked(choices[k], num_experts) : -1;
        }
#pragma unroll
        for (int k = 0; k < kChoices; ++k) {
            bool is_first = experts[k] >= 0;
#pragma unroll
            for (int j = 0; j < k; ++j) is_first = is_first && experts[j] != experts[k];
            if (is_first) atomicAdd(&named[experts[k]], add);
        }
    }
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

// What follows the payload: the scales of some segments, and the header. By the control warp.
__device__ __forceinline__ void store_tail(const DispatchArgs& args, const Token& token, const uint32_t* scales, int first_scale_vector, int num_scale_vectors,
                                           int num_header_vectors) {
#pragma unroll 1
    for (int i = static_cast<int>(threadIdx.x) % 32; i < num_scale_vectors + num_header_vectors; i += 32) {
        const bool is_scale = i < num_scale_vectors;
        const int j = is_scale ? first_scale_vector + i : i - num_scale_vectors;
        const uint4 words = *reinterpret_cast<const uint4*>((is_scale ? scales : token.words) + 4 * j);
        int4 ranks = make_int4(kEveryRank, kEveryRank, kEveryRank, kEveryRank);
        if (!is_scale) ranks = *reinterpret_cast<const int4*>(token.ranks + 4 * j);
        const int offset = (is_scale ? args.message.scales : args.message.header) + 16 * j;
#pragma unroll 1
        for (int d = 0; d < token.num_destinations; ++d) {
            const int32_t dst_rank = token.destinations[d];
            const auto word = [&](uint32_t value, int32_t rank) { return rank == kEveryRank || rank == dst_rank ? value : kNoChoice; };
            ptx::store_relaxed_sys(reinterpret_cast<uint4*>(token.slots[d] + offset),
                                   make_uint4(word(words.x, ranks.x), word(words.y, ranks.y), word(words.z, ranks.z), word(words.w, ranks.w)));
        }
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

// This share's words of the index messages. By the control warp; the counts are complete.
template <bool kRemote>
__device__ __forceinline__ void store_index(const DispatchArgs& args, const Operation& operation, int share, const uint32_t* named) {
    const Domain& domain = args.domain;
    const int lane = static_cast<int>(threadIdx.x) % 32;
    const int first = share * args.plan.num_share_experts, end = min(first + args.plan.num_share_experts, args.num_experts);
    const auto store = [&](int rank, int word, uint32_t value) {
        const uint32_t sequence = operation.sequences[rank];
        if (sequence != 0) ptx::store_relaxed_sys(outgoing_index(domain, operation, kDispatch, rank) + word, signal_word(sequence, value));
    };
#pragma unroll 1
    for (int expert = first + lane; expert < end; expert += 32) {
        uint32_t local_expert;
        const int rank = static_cast<int>(args.plan.by_local_experts.quotient(static_cast<uint32_t>(expert), &local_expert));
        store(rank, kIndexCounts + static_cast<int>(local_expert), named[expert] / kNamedByAny);
    }
#pragma unroll 1
    for (int i = lane; share == 0 && i < 2 * domain.num_ranks; i += 32)
        store(i / 2, i % 2, i % 2 == kIndexNumTokens ? static_cast<uint32_t>(args.num_tokens) : args.checksum);
    if constexpr (kRemote) {
        __syncwarp();
#pragma unroll 1
        for (int rank = lane; rank < domain.num_ranks; rank += 32) {
            if (operation.sequences[rank] == 0 || !domain.remote.has(rank)) continue;
            const auto post = [&](int word, int num_words) {
                post_outgoing(domain, operation, kDispatch, rank, reinterpret_cast<const uint8_t*>(outgoing_index(domain, operation, kDispatch, rank) + word),
                              8u * static_cast<uint32_t>(num_words));
            };
            if (share == 0) post(0, kIndexCounts);
            const int first_of_rank = rank * args.num_local_experts;
            const int begin = max(first, first_of_rank), last = min(end, first_of_rank + args.num_local_experts);
            if (begin < last) post(kIndexCounts + begin - first_of_rank, last - begin);
        }
    }
}

// Rows for ranks outside the NVLink domain lie in the outbox; a row that is sent whole goes as one work request. By all senders, after a barrier.
__device__ __forceinline__ void post_rows(const DispatchArgs& args, const Operation& operation, const Token& token, int part, int first, int end) {
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
        post(first * num_segment_bytes, min(end * num_segment_bytes, 16 * row.num_payload_vectors));
        post(row.scales + 16 * first, row.scales + 16 * min(end, row.num_scale_vectors));
        if (part == 0) post(row.header, row.num_bytes);
    }
}

// --- a share --------------------------------------------------------------------------------------------------------

// Every num_blocks-th part of a token, and the counts of some experts. By all senders. `begins`: it is the block's own, and nothing has been read of
// this operation yet. All words of `named` are zero if it begins.
template <bool kFp8, bool kRemote>
__device__ __forceinline__ void send_share(const DispatchArgs& args, DispatchShared& shared, uint32_t* named, int share, bool begins) {
    const Domain& domain = args.domain;
    Operation& operation = shared.operation;
    const DispatchPlan& plan = args.plan;
    const int thread = static_cast<int>(threadIdx.x), lane = thread % 32;
    const int num_shares = static_cast<int>(gridDim.x);
    const bool is_worker = thread < kNumWorkers, receives = (args.phases & kReceive) != 0;
    if (!begins) {
#pragma unroll 1
        for (int i = thread; i < args.num_experts; i += kNumSendThreads) named[i] = 0;
        send_barrier();
    }
    Control<kRemote> control(domain, kDispatch, operation);
    int num_counted = 0;  // tokens whose choices are in the lower halves of `named`
#pragma unroll 1
    for (int unit = share, round = 0; unit < plan.num_units || round == 0; unit += num_shares, ++round) {
        const bool has_token = unit < plan.num_units;
        const int token = unit >> plan.parts_log2, part = unit & ((1 << plan.parts_log2) - 1);
        const int first = part * plan.num_part_segments, end = has_token ? min(first + plan.num_part_segments, plan.num_segments) : first;
        Token& info = shared.tokens[round & 1];
        uint32_t* scales = shared.scales[round & 1];
        RowPart<kFp8> row;
        ChoiceLane choice;
        if (is_worker)
            row.load(args, token, first, end);
        else
            choice.load(args, token, has_token);
        // The workers count the table once, while the row is on its way; the control warp goes on from there.
        if (is_worker == (round == 0))
            count_tokens(args, named, is_worker ? thread : num_counted + lane, is_worker ? args.num_tokens : token, is_worker ? kNumWorkers : 32, token,
                         is_worker ? kNamedByAny : 0);
        num_counted = token;
        bool needs_escape = false;
        if (is_worker) {
            if constexpr (kFp8)
                row.cast(args, scales, first, end);
            else
                needs_escape = has_token && (plan.parts_log2 == 0 ? row.has_empty_word() : RowPart<kFp8>::finds_empty_word(args, token));
        } else {
            if (begins && round == 0) {
                control.begin_send(reinterpret_cast<uint32_t*>(args.handle + args.handle_layout.ticket()));
                if (receives) tell_receivers();
                DEEPEP_STAMP(1, lane == 0);
            }
            choice.find_destinations(args, operation, info, token);
        }
        DEEPEP_STAMP(2, thread == 0 && round == 0);
        if constexpr (kFp8)
            send_barrier();
        else
            needs_escape = send_barrier_or(needs_escape);
        DEEPEP_STAMP(3, thread == 0 && round == 0);
        const bool is_own = !begins || operation.is_claimed != 0;
        if (!is_worker) {
            if (round == 0 && is_own) store_index<kRemote>(args, operation, share, named);  // first what the others need first: nobody places a row without
            DEEPEP_STAMP(4, lane == 0 && round == 0);
        }
        uint32_t escape = 0;
        if (!kFp8 && needs_escape) {
            if (is_worker) {
                escape = find_escape(args, shared, token);
                if (thread == 0) shared.escape = escape;
            }
            send_barrier();
            escape = shared.escape;
        }
        if (!is_worker) {
            if (has_token && is_own) {
                if (part == 0) choice.write_header(args, named, info, needs_escape ? kRowPresent | kRowEscaped : kRowPresent, escape);
                store_tail(args, info, scales, first, kFp8 ? end - first : 0, part == 0 ? args.message.num_header_vectors : 0);
                if (part == 0) store_absence<kRemote>(args, operation, info, token);
            }
            DEEPEP_STAMP(6, lane == 0);
            if (begins && round == 0) control.settle(receives);
        } else if (has_token && is_own) {
            if (!kFp8 && needs_escape) row.escape(escape);
            row.store(args, info, first, end);
            DEEPEP_STAMP(5, thread == 0 && round == 0);
            if (unit + num_shares < plan.num_units) prefetch_row(args, (unit + num_shares) >> plan.parts_log2);
        }
        if (!is_own) return;
        if constexpr (kRemote) {
            send_barrier();
            if (has_token) post_rows(args, operation, info, part, first, end);
        }
    }
}

}  // namespace deepep::ibgda
