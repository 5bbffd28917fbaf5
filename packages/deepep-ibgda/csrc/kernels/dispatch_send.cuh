#pragma once
// The sending half of dispatch: a block takes a token, casts it in registers and stores it into the slots of its destinations.
#include <cuda_fp8.h>

#include "deepep/codec/fp8.hpp"
#include "dispatch_shared.cuh"

namespace deepep::ibgda {

constexpr int kVectorsPerThread = 2;
constexpr int kChunkVectors = kNumWorkers * kVectorsPerThread;  // of bf16 that the workers hold at once

// The part of a bf16 row that a thread holds: 16 neighbouring columns (kFp8), or two vectors far apart, which store better.
template <bool kFp8>
struct RowChunk {
    uint4 v[kVectorsPerThread];

    __device__ static int vector(int chunk, int j) {
        const int thread = static_cast<int>(threadIdx.x);
        return chunk * kChunkVectors + (kFp8 ? thread * kVectorsPerThread + j : j * kNumWorkers + thread);
    }
    __device__ void load(const DispatchArgs& args, int token, int chunk) {
        const int num_vectors = args.hidden / 8;
        const uint4* row = reinterpret_cast<const uint4*>(args.x) + static_cast<int64_t>(token) * num_vectors;
#pragma unroll
        for (int j = 0; j < kVectorsPerThread; ++j) v[j] = vector(chunk, j) < num_vectors ? ptx::load_streaming(row + vector(chunk, j)) : make_uint4(0, 0, 0, 0);
    }
    // For a later load.
    __device__ static void prefetch(const DispatchArgs& args, int token) {
        const int first = static_cast<int>(threadIdx.x) * 8;  // one thread for a line of 128 bytes
        if (first < args.hidden / 8) ptx::prefetch_l2(reinterpret_cast<const uint4*>(args.x) + static_cast<int64_t>(token) * (args.hidden / 8) + first);
    }
    __device__ bool has_empty_word() const { return !is_full(v[0]) || !is_full(v[1]); }
};

// Two bf16 magnitudes at once: as integers they order like the numbers, NaN above infinity.
__device__ __forceinline__ uint32_t max_magnitudes(uint32_t a, uint32_t b) { return __vmaxu2(a & 0x7fff7fffu, b & 0x7fff7fffu); }

__device__ __forceinline__ uint32_t cast_two(uint32_t pair, float factor) {
    const float low = __fmul_rn(__uint_as_float(pair << 16), factor);
    const float high = __fmul_rn(__uint_as_float(pair & 0xffff0000u), factor);
    return __nv_cvt_float2_to_fp8x2(make_float2(low, high), __NV_SATFINITE, __NV_E4M3);
}

// Casts a thread's 16 columns; eight neighbouring lanes share a block of 128 and find its maximum together.
__device__ __forceinline__ uint4 cast_chunk(const RowChunk<true>& row, bool round_scale, uint32_t* scale) {
    uint32_t pair = 0;
#pragma unroll
    for (int j = 0; j < 2; ++j) pair = max_magnitudes(pair, max_magnitudes(max_magnitudes(row.v[j].x, row.v[j].y), max_magnitudes(row.v[j].z, row.v[j].w)));
    uint32_t largest = max(pair & 0xffffu, pair >> 16);
#pragma unroll
    for (int offset = 1; offset < 8; offset *= 2) largest = max(largest, __shfl_xor_sync(kAllLanes, largest, offset));
    const codec::Fp8Scale of_block = codec::fp8_scale(codec::bf16_to_float(static_cast<uint16_t>(largest)), round_scale);
    *scale = codec::bits_of(of_block.scale);
    const auto four = [&](uint32_t a, uint32_t b) { return cast_two(a, of_block.factor) | cast_two(b, of_block.factor) << 16; };
    return make_uint4(four(row.v[0].x, row.v[0].y), four(row.v[0].z, row.v[0].w), four(row.v[1].x, row.v[1].y), four(row.v[1].z, row.v[1].w));
}

__device__ __forceinline__ void worker_barrier() { ptx::named_barrier(1, kNumWorkers); }

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

__device__ __forceinline__ uint4 escaped(uint4 v, uint32_t escape) {
    const auto word = [&](uint32_t w) { return w == kEmptyWord ? escape : w; };
    return make_uint4(word(v.x), word(v.y), word(v.z), word(v.w));
}

// By the control warp: which ranks get the token, and where.
template <bool kRemote>
__device__ __forceinline__ void prepare_token(const DispatchArgs& args, const Operation& operation, Token& out, int token, int32_t expert, uint32_t weight) {
    const Domain& domain = args.domain;
    const int lane = static_cast<int>(threadIdx.x) % 32;
    __syncwarp();
    int dst_rank = expert < 0 ? -1 : expert / args.num_local_experts;
    if (dst_rank >= 0 && operation.sequences[dst_rank] == 0) dst_rank = -1;
    const int first_of = __ffs(static_cast<int>(__match_any_sync(kAllLanes, expert))) - 1;
    const unsigned same_rank = __match_any_sync(kAllLanes, dst_rank);
    const bool leads = dst_rank >= 0 && __ffs(static_cast<int>(same_rank)) - 1 == lane;
    const unsigned leaders = __ballot_sync(kAllLanes, leads);
    out.experts[lane] = expert;
    out.dst_ranks[lane] = dst_rank;
    out.first_of[lane] = first_of;
    out.weights[lane] = weight == kEmptyWord ? 0x7fffffffu : weight;
    if (leads) {
        const int i = __popc(leaders & ((1u << lane) - 1));
        out.destinations[i] = dst_rank;
        out.slots[i] = outgoing_rows<kRemote>(domain, operation, kDispatch, dst_rank) + token * args.message.stride();
    }
    if (lane == 0) out.num_destinations = __popc(leaders);
}

// The part of the routing table that this block looks at: positions of its token's choices, counts of its share of the experts.
struct Scan {
    const DispatchArgs& args;
    DispatchShared& shared;
    bool is_shared;  // the table is in shared memory

    __device__ int32_t entry(int i) const { return is_shared ? shared.table[i] : args.topk_idx.expert(i, args.num_experts); }
    // A token that names an expert twice counts once.
    __device__ bool is_first_of_its_token(int i, int32_t expert) const {
#pragma unroll 1
        for (int j = i - i % args.num_topk; j < i; ++j)
            if (entry(j) == expert) return false;
        return true;
    }
    // The first of a token's choices that names the expert, or -1.
    __device__ int choice_of(const int32_t* experts, int32_t expert) const {
        if (args.num_topk % 4 != 0) {
#pragma unroll 1
            for (int k = 0; k < args.num_topk; ++k)
                if (experts[k] == expert) return k;
            return -1;
        }
#pragma unroll 1
        for (int k = 0; k < args.num_topk; k += 4) {
            const int4 four = *reinterpret_cast<const int4*>(experts + k);
            const int hit = four.x == expert ? k : four.y == expert ? k + 1 : four.z == expert ? k + 2 : four.w == expert ? k + 3 : -1;
            if (hit >= 0) return hit;
        }
        return -1;
    }
    // positions[k]: tokens below `token` that name choice k's expert, for the first choice of each expert.
    __device__ void count_positions(const int32_t* experts, int token, int32_t* positions) const {
#pragma unroll 1
        for (int i = static_cast<int>(threadIdx.x); i < token * args.num_topk; i += kNumWorkers) {
            const int32_t expert = entry(i);
            const int hit = expert < 0 ? -1 : choice_of(experts, expert);
            if (hit >= 0 && is_first_of_its_token(i, expert)) atomicAdd(&positions[hit], 1);
        }
    }
    __device__ void count_experts(int first_expert, int num_experts, int32_t* counts) const {
#pragma unroll 1
        for (int i = static_cast<int>(threadIdx.x); i < args.num_tokens * args.num_topk; i += kNumWorkers) {
            const int32_t expert = entry(i);
            if (expert < first_expert || expert >= first_expert + num_experts) continue;
            if (is_first_of_its_token(i, expert)) atomicAdd(&counts[expert - first_expert], 1);
        }
    }
};

// One word of a row's header for a destination.
__device__ __forceinline__ uint32_t header_word(const DispatchArgs& args, const Token& token, const int32_t* positions, int word, int dst_rank, uint32_t flags,
                                                uint32_t escape) {
    if (word == 0) return flags;
    if (word == 1) return escape;
    const int k = word - 2;
    if (k >= args.num_topk) return k - args.num_topk < args.num_topk && args.has_weights ? token.weights[k - args.num_topk] : 0;
    if (token.dst_ranks[k] != dst_rank) return kNoChoice;
    const uint32_t local_expert = static_cast<uint32_t>(token.experts[k] - dst_rank * args.num_local_experts);
    const int first_of = token.first_of[k];
    return (first_of != k ? kRepeatedChoice : 0) | local_expert << kPositionBits | static_cast<uint32_t>(positions[first_of]);
}

// What follows the payload: scales and header, to every destination. By the workers.
__device__ __forceinline__ void store_tail(const DispatchArgs& args, const Token& token, const int32_t* positions, const uint32_t* scales, uint32_t flags,
                                           uint32_t escape) {
    const int num_scale_vectors = args.message.num_scale_vectors();
    const int num_vectors = num_scale_vectors + args.message.num_header_vectors();
#pragma unroll 1
    for (int i = static_cast<int>(threadIdx.x); i < num_vectors * token.num_destinations; i += kNumWorkers) {
        const int d = i / num_vectors, j = i % num_vectors;
        uint32_t words[4];
#pragma unroll
        for (int w = 0; w < 4; ++w) {
            if (j < num_scale_vectors)
                words[w] = 4 * j + w < args.message.num_scales ? scales[4 * j + w] : 0;
            else
                words[w] = header_word(args, token, positions, 4 * (j - num_scale_vectors) + w, token.destinations[d], flags, escape);
        }
        uint4* target = reinterpret_cast<uint4*>(token.slots[d] + args.message.scales_offset()) + j;
        ptx::store_relaxed_sys(target, make_uint4(words[0], words[1], words[2], words[3]));
    }
}

// Ranks that do not get the token are told so. By the workers.
template <bool kRemote>
__device__ __forceinline__ void store_absence(const DispatchArgs& args, const Operation& operation, const Token& info, int token) {
    const Domain& domain = args.domain;
#pragma unroll 1
    for (int rank = static_cast<int>(threadIdx.x); rank < domain.num_ranks; rank += kNumWorkers) {
        bool goes = operation.sequences[rank] == 0;
#pragma unroll 1
        for (int i = 0; i < info.num_destinations; ++i) goes = goes || info.destinations[i] == rank;
        if (goes) continue;
        uint8_t* header = outgoing_rows<kRemote>(domain, operation, kDispatch, rank) + token * args.message.stride() + args.message.header_offset();
        ptx::store_relaxed_sys(reinterpret_cast<uint4*>(header), make_uint4(0, 0, 0, 0));
        if (is_remote<kRemote>(domain, rank)) post_outgoing(domain, operation, kDispatch, rank, header, 16);
    }
}

// This share's words of the index messages. By the workers; the counts are complete.
template <bool kRemote>
__device__ __forceinline__ void store_index(const DispatchArgs& args, const Operation& operation, int share, int first_expert, int num_experts,
                                            const int32_t* counts) {
    const Domain& domain = args.domain;
    const auto word_of = [&](int rank, int word) { return reinterpret_cast<uint64_t*>(outgoing_box<kRemote>(domain, operation, rank)) + word; };
    const auto store = [&](int rank, int word, uint32_t value) {
        if (operation.sequences[rank] != 0) ptx::store_relaxed_sys(word_of(rank, word), signal_word(operation.sequences[rank], value));
    };
#pragma unroll 1
    for (int i = static_cast<int>(threadIdx.x); i < num_experts; i += kNumWorkers) {
        const int expert = first_expert + i;
        store(expert / args.num_local_experts, kIndexCounts + expert % args.num_local_experts, static_cast<uint32_t>(counts[i]));
    }
#pragma unroll 1
    for (int i = static_cast<int>(threadIdx.x); share == 0 && i < 2 * domain.num_ranks; i += kNumWorkers)
        store(i / 2, i % 2, i % 2 == kIndexNumTokens ? static_cast<uint32_t>(args.num_tokens) : args.checksum);
    if constexpr (kRemote) {
        worker_barrier();
#pragma unroll 1
        for (int rank = static_cast<int>(threadIdx.x); rank < domain.num_ranks; rank += kNumWorkers) {
            if (operation.sequences[rank] == 0 || !domain.remote.has(rank)) continue;
            const auto post = [&](int word, int num_words) {
                post_outgoing(domain, operation, kDispatch, rank, reinterpret_cast<const uint8_t*>(word_of(rank, word)), 8u * static_cast<uint32_t>(num_words));
            };
            if (share == 0) post(0, kIndexCounts);
            const int first_of_rank = rank * args.num_local_experts;
            const int begin = max(first_expert, first_of_rank), end = min(first_expert + num_experts, first_of_rank + args.num_local_experts);
            if (begin < end) post(kIndexCounts + begin - first_of_rank, end - begin);
        }
    }
}

// Rows for ranks outside the NVLink domain lie in the outbox; they go as one work request each. By the workers.
__device__ __forceinline__ void post_rows(const DispatchArgs& args, const Operation& operation, const Token& token) {
    worker_barrier();
    const int warp = static_cast<int>(threadIdx.x) / 32;
#pragma unroll 1
    for (int d = warp; d < token.num_destinations; d += kControlWarp)
        if (threadIdx.x % 32 == 0 && args.domain.remote.has(token.destinations[d]))
            post_outgoing(args.domain, operation, kDispatch, token.destinations[d], token.slots[d], static_cast<uint32_t>(args.message.num_bytes()));
}

// The routing table to shared memory, -1 for what names no expert. By the workers; several loads of each are under way at once.
__device__ __forceinline__ void copy_table(const DispatchArgs& args, int32_t* table, int num_entries) {
    constexpr int kInFlight = 4;
#pragma unroll 1
    for (int first = static_cast<int>(threadIdx.x); first < num_entries; first += kInFlight * kNumWorkers) {
        int64_t index[kInFlight];
#pragma unroll
        for (int j = 0; j < kInFlight; ++j) index[j] = first + j * kNumWorkers < num_entries ? args.topk_idx[first + j * kNumWorkers] : -1;
#pragma unroll
        for (int j = 0; j < kInFlight; ++j)
            if (first + j * kNumWorkers < num_entries) table[first + j * kNumWorkers] = IndexArray::checked(index[j], args.num_experts);
    }
}

// A share: every num_blocks-th token, and the counts of some experts. By all threads. `begins`: nothing has been read of this operation yet.
// Returns what next_share wants to know.
template <bool kFp8, bool kRemote>
__device__ __forceinline__ uint32_t send_share(const DispatchArgs& args, DispatchShared& shared, int32_t* counts, int share, bool begins) {
    const Domain& domain = args.domain;
    Operation& operation = shared.operation;
    const int thread = static_cast<int>(threadIdx.x), lane = thread % 32;
    const int num_shares = static_cast<int>(gridDim.x);
    const bool is_worker = thread < kNumWorkers;
    const int num_entries = args.num_tokens * args.num_topk;
    const Scan scan{args, shared, num_entries <= kTableEntries};
    const int num_share_experts = static_cast<int>(ceil_div(args.num_experts, num_shares));
    const int first_expert = share * num_share_experts;
    const int num_experts = static_cast<int>(max_of(0, min_of(num_share_experts, args.num_experts - first_expert)));
    const int num_chunks = static_cast<int>(ceil_div(args.hidden / 8, kChunkVectors));

    Control<kRemote> control(domain, kDispatch, operation);
    uint32_t claim = 0;
#pragma unroll 1
    for (int token = share, round = 0; token < args.num_tokens || round == 0; token += num_shares, ++round) {
        const bool has_token = token < args.num_tokens;
        Token& info = shared.tokens[round & 1];
        int32_t* positions = shared.positions[round % kNumPositionBuffers];
        uint32_t* scales = shared.scales[round & 1];
        RowChunk<kFp8> row = {};
        uint4 quantised = {};
        bool needs_escape = false;
        if (is_worker) {
            if (has_token) row.load(args, token, 0);
            if (round == 0) {
                if (scan.is_shared) copy_table(args, shared.table, num_entries);
#pragma unroll 1
                for (int i = thread; i < num_experts; i += kNumWorkers) counts[i] = 0;
                if (thread < kMaxTopk) positions[thread] = 0;
                worker_barrier();
                if (scan.is_shared) scan.count_experts(first_expert, num_experts, counts);
            }
            // For the next token. Read last two tokens ago; a block barrier on each side.
            if (thread < kMaxTopk) shared.positions[(round + 1) % kNumPositionBuffers][thread] = 0;
            // While the row is on its way.
            if (scan.is_shared && has_token) scan.count_positions(shared.table + token * args.num_topk, token, positions);
            if constexpr (kFp8) {
                uint32_t scale = 0;
                quantised = cast_chunk(row, args.round_scale, &scale);
                if (has_token && lane % 8 == 0 && thread / 8 < args.message.num_scales) scales[thread / 8] = scale;
            } else if (has_token) {
                needs_escape = row.has_empty_word();
#pragma unroll 1
                for (int chunk = 1; chunk < num_chunks; ++chunk) {
                    RowChunk<false> other;
                    other.load(args, token, chunk);
                    needs_escape = needs_escape || other.has_empty_word();
                }
            }
        } else if (round == 0) {
            // Loaded before anything is waited for.
            const bool has_choice = has_token && lane < args.num_topk;
            const int64_t choice = static_cast<int64_t>(token) * args.num_topk + lane;
            const int64_t expert = has_choice ? args.topk_idx[choice] : -1;
            const float weight = has_choice && args.has_weights ? args.topk_weights[choice] : 0;
            if (begins) control.begin_send(reinterpret_cast<uint32_t*>(args.handle + args.handle_layout.ticket()));
            DEEPEP_STAMP(1, lane == 0);
            prepare_token<kRemote>(args, operation, info, token, IndexArray::checked(expert, args.num_experts), __float_as_uint(weight));
        }
        DEEPEP_STAMP(2, thread == 0 && round == 0);
        needs_escape = __syncthreads_or(needs_escape);
        DEEPEP_STAMP(3, thread == 0 && round == 0);
        if (round == 0) claim = load_claim(domain, kDispatch);
        if (begins && !operation.is_claimed) {
            if (!is_worker) control.settle();
            return claim;
        }
        if (!is_worker) {
            // Meanwhile: the operation's bookkeeping, and the next token.
            if (begins && round == 0) control.settle();
            const int next = token + num_shares;
            if (next < args.num_tokens) {
                const int64_t i = static_cast<int64_t>(next) * args.num_topk + lane;
                const int32_t expert = lane < args.num_topk ? args.topk_idx.expert(i, args.num_experts) : -1;
                const uint32_t weight = args.has_weights && lane < args.num_topk ? __float_as_uint(args.topk_weights[i]) : 0;
                prepare_token<kRemote>(args, operation, shared.tokens[(round + 1) & 1], next, expert, weight);
            }
            continue;
        }
        if (!scan.is_shared) {
            if (round == 0) scan.count_experts(first_expert, num_experts, counts);
            if (has_token) scan.count_positions(info.experts, token, positions);
            worker_barrier();
        }
        // First what the others need first: nobody places a row before the counts are known.
        if (round == 0) store_index<kRemote>(args, operation, share, first_expert, num_experts, counts);
        DEEPEP_STAMP(4, thread == 0 && round == 0);
        if (!has_token) continue;
        if (token + num_shares < args.num_tokens) RowChunk<kFp8>::prefetch(args, token + num_shares);
        uint32_t flags = kRowPresent, escape = 0;
        if (!kFp8 && needs_escape) {
            flags |= kRowEscaped;
            escape = find_escape(args, shared, token);
        }
        const int num_destinations = info.num_destinations;
#pragma unroll 1
        for (int chunk = 0; chunk < num_chunks; ++chunk) {
            if (chunk > 0) {
                row.load(args, token, chunk);
                if constexpr (kFp8) {
                    uint32_t scale = 0;
                    quantised = cast_chunk(row, args.round_scale, &scale);
                    const int block = chunk * (kNumWorkers / 8) + thread / 8;
                    if (lane % 8 == 0 && block < args.message.num_scales) scales[block] = scale;
                }
            }
            // Every token starts with another destination, so that all links are busy at once.
#pragma unroll 1
            for (int i = 0; i < num_destinations; ++i) {
                uint4* target = reinterpret_cast<uint4*>(info.slots[(i + token) % num_destinations]);
                if constexpr (kFp8) {
                    const int vector = chunk * kNumWorkers + thread;
                    if (vector < args.message.num_payload_vectors()) ptx::store_relaxed_sys(target + vector, quantised);
                } else {
#pragma unroll
                    for (int j = 0; j < kVectorsPerThread; ++j) {
                        const int vector = RowChunk<false>::vector(chunk, j);
                        if (vector < args.message.num_payload_vectors())
                            ptx::store_relaxed_sys(target + vector, needs_escape ? escaped(row.v[j], escape) : row.v[j]);
                    }
                }
            }
        }
        DEEPEP_STAMP(5, thread == 0 && round == 0);
        if (num_chunks > 1) worker_barrier();  // scales of later chunks
        store_tail(args, info, positions, scales, flags, escape);
        if constexpr (kRemote) post_rows(args, operation, info);
        store_absence<kRemote>(args, operation, info, token);
        DEEPEP_STAMP(6, thread == 0);
    }
    return claim;
}

}  // namespace deepep::ibgda
