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

// A part of a token's columns.
struct Unit {
    int token, part;
    int first, end;  // segments
    bool is_there;

    __device__ Unit(const DispatchPlan& plan, int unit)
        : token(unit >> plan.parts_log2),
          part(unit & ((1 << plan.parts_log2) - 1)),
          first(part * plan.num_part_segments),
          end(unit < plan.num_units ? min(first + plan.num_part_segments, plan.num_segments) : first),
          is_there(unit < plan.num_units) {}
};

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
    for (int rank = share; rank < domain.num_ranks; rank += static_cast<int>(gridDim.x)) {
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

// --- a share --------------------------------------------------------------------------------------------------------

__device__ __forceinline__ bool is_share_own(const Operation& operation, bool begins) { return !begins || operation.is_claimed != 0; }

// A share: every num_blocks-th unit, and the index messages to some ranks. `begins`: it is the block's own, and nothing has been read of this operation yet.
// All words of `named` are zero if it begins. Workers and the control warp meet at a barrier in each round: the row is cast, the destinations are known.
template <bool kFp8, bool kRemote>
__device__ __forceinline__ void send_share_as_worker(const DispatchArgs& args, DispatchShared& shared, uint32_t* named, int share, bool begins) {
    const DispatchPlan& plan = args.plan;
    const int thread = static_cast<int>(threadIdx.x), num_shares = static_cast<int>(gridDim.x);
    if (!begins) {
#pragma unroll 1
        for (int i = thread; i < args.num_experts; i += kNumWorkers) named[i] = 0;
        worker_barrier();
    }
    int i = share, round = 0;
#pragma unroll 1
    do {
        const Unit unit(plan, i);
        const Token& info = shared.tokens[round & 1];
        RowPart<kFp8> row;
        row.load(args, unit.token, unit.first, unit.end);
        if (round == 0) {
            count_tokens(args, named, thread, args.num_tokens, kNumWorkers, unit.token, kNamedByAny);  // while the row is on its way
            ptx::named_barrier_arrive(kTableCounted, kNumSendThreads);
        }
        bool needs_escape = false;
        if constexpr (kFp8) {
            row.cast(args, shared.scales[round & 1], unit.first, unit.end);
            DEEPEP_STAMP(2, thread == 0 && round == 0);
            send_barrier();
        } else {
            needs_escape = plan.parts_log2 == 0 ? row.has_empty_word() : unit.is_there && RowPart<kFp8>::finds_empty_word(args, unit.token);
            needs_escape = send_barrier_or(needs_escape);
        }
        DEEPEP_STAMP(3, thread == 0 && round == 0);
        if (!is_share_own(shared.operation, begins)) return;
        if (!kFp8 && needs_escape) {
            const uint32_t escape = find_escape(args, shared, unit.token);
            if (thread == 0) shared.escape = escape;
            send_barrier();
            row.escape(escape);
        }
        i += num_shares;
        if (unit.is_there) row.store(args, info, unit.first, unit.end);
        DEEPEP_STAMP(5, thread == 0 && round == 0);
        if (i < plan.num_units) prefetch_row(args, i >> plan.parts_log2);
        if constexpr (kRemote) {
            send_barrier();
            if (unit.is_there) post_rows(args, shared.operation, info, unit);
        }
        ++round;
    } while (i < plan.num_units);
}

template <bool kFp8, bool kRemote>
__device__ __forceinline__ void send_share_as_control(const DispatchArgs& args, DispatchShared& shared, uint32_t* named, int share, bool begins) {
    const DispatchPlan& plan = args.plan;
    Operation& operation = shared.operation;
    const int num_shares = static_cast<int>(gridDim.x);
    const bool receives = (args.phases & kReceive) != 0;
    Control<kRemote> control(args.domain, kDispatch, operation);
    int i = share, round = 0, num_counted = 0;  // tokens whose choices are in the lower halves of `named`
#pragma unroll 1
    do {
        const Unit unit(plan, i);
        Token& info = shared.tokens[round & 1];
        ChoiceLane choice = {};
        choice.load(args, unit.token, unit.is_there);
        if (begins && round == 0) {
            control.begin_send(reinterpret_cast<uint32_t*>(args.handle + args.handle_layout.ticket()));
            if (receives) tell_receivers();
            DEEPEP_STAMP(1, threadIdx.x % 32 == 0);
        }
        const bool is_own = is_share_own(operation, begins), has_header = is_own && unit.is_there && unit.part == 0;
        // First what the others need first: nobody places a row before the counts are known.
        if (round == 0) {
            ptx::named_barrier(kTableCounted, kNumSendThreads);
            if (is_own) store_index<kRemote>(args, operation, share, named);
            DEEPEP_STAMP(4, threadIdx.x % 32 == 0);
        } else {
            count_below(args, named, num_counted, unit.token);
        }
        num_counted = unit.token;
        choice.find_destinations(args, operation, info, unit.token);
        const auto send_header = [&](uint32_t flags, uint32_t escape) {
            if (!has_header) return;
            choice.write_header(args, named, info, flags, escape);
            store_header(args, info);
            store_absence<kRemote>(args, operation, info, unit.token);
        };
        if constexpr (kFp8) {
            send_header(kRowPresent, 0);
            send_barrier();
            if (is_own) store_scales(args, info, shared.scales[round & 1], unit.first, unit.end);
        } else {
            const bool needs_escape = send_barrier_or(false);
            if (is_own && needs_escape) send_barrier();
            send_header(needs_escape ? kRowPresent | kRowEscaped : kRowPresent, needs_escape ? shared.escape : 0);
        }
        DEEPEP_STAMP(6, threadIdx.x % 32 == 0);
        if (begins && round == 0) control.settle(receives);
        if (!is_own) return;
        if constexpr (kRemote) {
            send_barrier();
            if (unit.is_there) post_rows(args, operation, info, unit);
        }
        i += num_shares;
        ++round;
    } while (i < plan.num_units);
}

// By all senders.
template <bool kFp8, bool kRemote>
__device__ __forceinline__ void send_rows(const DispatchArgs& args, DispatchShared& shared, uint32_t* named) {
    int share = static_cast<int>(blockIdx.x);
    bool begins = true;
    if (is_control_warp()) {
#pragma unroll 1
        do {
            send_share_as_control<kFp8, kRemote>(args, shared, named, share, begins);
            share = next_share_as_control(args.domain, kDispatch, shared.operation);
            begins = false;
        } while (share >= 0);
    } else {
#pragma unroll 1
        do {
            send_share_as_worker<kFp8, kRemote>(args, shared, named, share, begins);
            share = next_share_as_worker(shared.operation);
            begins = false;
        } while (share >= 0);
    }
}

}  // namespace deepep::ibgda
