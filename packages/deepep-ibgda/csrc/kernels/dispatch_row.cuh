#pragma once
// A row, or a part of its columns, in the registers of a block's workers: loaded, cast, and stored to its destinations.
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

}  // namespace deepep::ibgda
