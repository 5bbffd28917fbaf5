#pragma once
// Numbering tokens: a block goes through them in tiles and counts those that go to one place.
#include <cstdint>

namespace deepep::nvlink {

// A tile of tokens, eight neighbours to a thread: which of them go there, and how many of the tile's go there before this thread's.
template <int kNumThreads>
struct TokenTile {
    static constexpr int kTokensPerThread = 8;
    static constexpr int kNumTokens = kNumThreads * kTokensPerThread;
    static constexpr int kNumWarps = kNumThreads / 32;

    uint32_t mask;
    int32_t before;
    int32_t total;

    // By all threads of the block; goes(token) is asked for this thread's tokens first, first + 1, ... below num_tokens.
    template <class Goes>
    __device__ static TokenTile scan(int32_t (&warp_sums)[kNumWarps], int64_t first, int64_t num_tokens, Goes goes) {
        const int lane = threadIdx.x % 32;
        const int warp = threadIdx.x / 32;
        uint32_t mask = 0;
#pragma unroll
        for (int i = 0; i < kTokensPerThread; ++i) mask |= (first + i < num_tokens && goes(first + i) ? 1u : 0u) << i;
        const int32_t mine = __popc(mask);
        int32_t inclusive = mine;
#pragma unroll
        for (int offset = 1; offset < 32; offset *= 2) {
            const int32_t other = __shfl_up_sync(~0u, inclusive, offset);
            if (lane >= offset) inclusive += other;
        }
        __syncthreads();  // the previous tile's sums have been read
        if (lane == 31) warp_sums[warp] = inclusive;
        __syncthreads();
        int32_t warps_before = 0, total = 0;
#pragma unroll
        for (int i = 0; i < kNumWarps; ++i) {
            const int32_t sum = warp_sums[i];
            warps_before += i < warp ? sum : 0;
            total += sum;
        }
        return {mask, warps_before + inclusive - mine, total};
    }
};

}  // namespace deepep::nvlink
