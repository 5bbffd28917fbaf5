#pragma once
// Expert outputs that peers cannot reach, relayed: spare warps copy them into memory that peers can reach while the peers already pull.
//
// Rows of one destination lie together and are wanted in ascending order. They are copied in chunks, the first chunk of every destination before
// the second of any. A chunk's flag goes to its puller:
//   RELAYED {epoch, chunk + 1}  owner -> puller, in the word of a staging slot; released after the copying warp's stores of the chunk
// The puller acquires it before the first bulk load from the chunk. READ_DONE tells the owner when the relayed rows may be overwritten.
//
// No deadlock: chunks are claimed by running warps, which wait for nobody.
#include "deepep/ptx/async_copy.cuh"
#include "deepep/ptx/bulk.cuh"
#include "deepep/ptx/memory.cuh"
#include "combine_parts.cuh"

namespace deepep::nvlink {

// Both sides compute the same: as many rows as make the pair's flags suffice, and at least a few, so that flags stay rare.
__device__ __forceinline__ int64_t relay_chunk_rows(const NormalWindow& window, int64_t num_rows) {
    constexpr int64_t kLeastRows = 4;
    return max_of(kLeastRows, ceil_div(num_rows, window.num_slots));
}

__device__ __forceinline__ const uint64_t* relay_flag(const Domain& domain, int owner, int64_t chunk) {
    return domain.window.slot_full(domain.arenas[domain.rank], Op::kCombine, owner) + chunk;
}

// For the puller: waits for the chunk of `owner` that holds the row; returns the row behind that chunk, or -1 when the wait ended badly.
__device__ __noinline__ int32_t wait_relayed_row(const CombineArgs& args, const WaitContext& context, int owner, int32_t row) {
    const int64_t first = first_row_of(args, owner);
    const int64_t num_rows = args.rank_prefix[args.domain.rank * args.domain.num_ranks + owner] - first;
    const int64_t chunk_rows = relay_chunk_rows(args.domain.window, num_rows);
    const int64_t chunk = (row - first) / chunk_rows;
    const uint64_t flag = signal_word(context.epoch, static_cast<uint32_t>(chunk + 1));
    if (!wait_exact(context, relay_flag(args.domain, owner, chunk), flag, Phase::kSlotFull, owner)) return -1;
#if DEEPEP_HAS_BULK
    ptx::fence_async_global();  // RELAYED, acquired above, permits bulk loads
#endif
    return static_cast<int32_t>(first + (chunk + 1) * chunk_rows);
}

// By one warp, with two batches of vectors in shared memory, so that many loads are under way without registers. Each lane reads what it has
// itself brought.
__device__ __forceinline__ void copy_vectors(int4* to, const int4* from, int64_t num_vectors, uint8_t* buffers) {
    const int lane = threadIdx.x % 32;
    const auto vector_in = [&](int batch, int u) { return reinterpret_cast<int4*>(buffers) + (batch * kRelayBatch + u) * 32 + lane; };
    const auto load = [&](int64_t base, int batch) {
#pragma unroll
        for (int u = 0; u < kRelayBatch; ++u)
            if (base + u * 32 < num_vectors) ptx::async_copy_16(vector_in(batch, u), from + base + u * 32);
        ptx::async_commit();
    };
    int batch = 0;
    load(lane, 0);
    for (int64_t base = lane; base < num_vectors; base += 32 * kRelayBatch, batch ^= 1) {
        load(base + 32 * kRelayBatch, batch ^ 1);
        ptx::async_wait<1>();
#pragma unroll
        for (int u = 0; u < kRelayBatch; ++u)
            if (base + u * 32 < num_vectors) to[base + u * 32] = *vector_in(batch, u);
    }
    ptx::async_wait<0>();
}

// One warp's share of the copying. Measured with 24 SMs on four H200s, 4096 tokens of 7168 columns: 514 us this way, 578 us with the loads in
// registers, 545 us with batches of 16 (they take shared memory from the pulls), 664 us with bulk copies (they share this SM's engine with the
// pulls), 553 to 811 us with the GPU's copy engine.
__device__ void relay_rows(const CombineArgs& args, const WaitContext& context, uint8_t* buffers) {
    const Domain& domain = args.domain;
    const int lane = threadIdx.x % 32, num_ranks = domain.num_ranks;
    // Lane d stands for destination d.
    const int64_t first = lane == 0 || lane >= num_ranks ? 0 : args.rank_prefix[(lane - 1) * num_ranks + domain.rank];
    const int64_t num_rows = lane >= num_ranks || lane == domain.rank ? 0 : args.rank_prefix[lane * num_ranks + domain.rank] - first;
    const int64_t chunk_rows = relay_chunk_rows(domain.window, num_rows);
    // No more chunks than flags, by the size of a chunk.
    const uint32_t num_indices = __reduce_max_sync(~0u, static_cast<uint32_t>(ceil_div(num_rows, chunk_rows)));
    while (true) {
        uint32_t item = 0;
        if (lane == 0) item = ptx::add_relaxed_gpu(&context.state->push_claims[0], 1);
        item = __shfl_sync(~0u, item, 0);
        const uint32_t index = item / (num_ranks - 1);
        if (index >= num_indices) return;
        const int dst_rank = static_cast<int>((domain.rank + 1 + item % (num_ranks - 1)) % num_ranks);
        const int64_t begin = __shfl_sync(~0u, first + index * chunk_rows, dst_rank);
        const int64_t end = min_of(__shfl_sync(~0u, min_of(first + (index + 1) * chunk_rows, first + num_rows), dst_rank), args.num_recv_tokens);
        if (begin >= end) continue;
        copy_vectors(reinterpret_cast<int4*>(args.relay + begin * args.parts.num_row_bytes),
                     reinterpret_cast<const int4*>(args.y + begin * args.parts.num_row_bytes), (end - begin) * args.parts.num_row_bytes / 16, buffers);
        __syncwarp();  // joins the warp's stores to lane 0, whose release passes them on
        if (lane == 0)
            ptx::store_release_sys(domain.window.slot_full(domain.arenas[dst_rank], Op::kCombine, domain.rank) + index,
                                   signal_word(context.epoch, index + 1));
    }
}

}  // namespace deepep::nvlink
