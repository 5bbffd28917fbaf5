#pragma once
// Expert outputs that peers cannot reach, relayed: spare warps copy them into memory that peers can reach while the peers already pull.
//
// Rows of one destination lie together and are wanted in ascending order. They are copied in chunks, the first chunk of every destination before
// the second of any. A chunk's flag goes to its puller:
//   RELAYED {epoch, chunk + 1}  owner -> puller, in the word of a staging slot; released by the copying thread after the chunk's bytes have landed
// The puller acquires it before the first bulk load from the chunk. READ_DONE tells the owner when the relayed rows may be overwritten.
//
// No deadlock: chunks are claimed by running warps, which wait for nobody.
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

#if DEEPEP_HAS_BULK
// A chunk on its way through a warp: the next part of it to load or to store.
struct RelayChunk {
    int dst_rank;
    int index;
    int part;
    int64_t row, end_row;

    __device__ bool is_over() const { return row == end_row; }
    __device__ void advance(int num_parts) {
        if (++part == num_parts) {
            part = 0;
            ++row;
        }
    }
};

// Copies chunks of this rank's rows into its relay until none is left. One thread works a ring of shared-memory stages: loads run ahead of
// stores by up to all stages but one, across at most one chunk's border.
class Relay {
public:
    // `first_rows`: shared memory, [num_ranks + 1], filled here by the whole warp.
    __device__ Relay(const CombineArgs& args, const WaitContext& context, int64_t* first_rows, uint8_t* ring, uint64_t* barriers)
        : args_(args), context_(context), first_rows_(first_rows), ring_(ring), barriers_(barriers) {
        const int lane = threadIdx.x % 32, num_ranks = args.domain.num_ranks;
        if (lane <= num_ranks) first_rows[lane] = lane == 0 ? 0 : args.rank_prefix[(lane - 1) * num_ranks + args.domain.rank];
        __syncwarp();
        const int64_t num_rows = lane < num_ranks && lane != args.domain.rank ? first_rows[lane + 1] - first_rows[lane] : 0;
        num_indices_ = __reduce_max_sync(~0u, static_cast<uint32_t>(ceil_div(num_rows, relay_chunk_rows(args.domain.window, num_rows))));
    }

    __device__ void run() {
        for (int stage = 0; stage < args_.num_staging_lanes; ++stage) ptx::mbarrier_init(barriers_ + stage, 1);
        ptx::fence_mbarrier_init();
        ptx::fence_async_global();  // what this stream did to the relay before is over; bulk stores may follow
        claimed_ = claim();
        load_chunk_ = next_chunk();
        RelayChunk storing = load_chunk_;
        RelayChunk stored{};  // landing is not yet awaited
        int num_behind = -1;  // parts stored after it; -1: there is none
        while (!storing.is_over()) {
            while (num_ahead_ < args_.num_staging_lanes - 1 && load()) {
            }
            store(storing);
            storing.advance(args_.parts.num_parts);
            if (num_behind >= 0 && ++num_behind == kLag) {
                ptx::bulk_wait<kLag>();
                tell(stored);
                num_behind = -1;
            }
            if (!storing.is_over()) continue;
            if (num_behind >= 0) {
                ptx::bulk_wait<0>();
                tell(stored);
            }
            stored = storing;
            num_behind = 0;
            if (!has_next_) load();  // no load has run into the next chunk yet
            if (!has_next_) break;
            storing = next_;
            has_next_ = false;
        }
        ptx::bulk_wait<0>();
        if (num_behind >= 0) tell(stored);
    }

private:
    static constexpr int kLag = 4;  // stores that follow a chunk before its landing is awaited: by then it has most often happened

    __device__ uint32_t claim() const { return ptx::add_relaxed_gpu(&context_.state->push_claims[0], 1); }

    // The next chunk; an empty one when there is none. The claim after it is already under way when this returns.
    __device__ RelayChunk next_chunk() {
        const int num_ranks = args_.domain.num_ranks, rank = args_.domain.rank;
        while (true) {
            const uint32_t index = claimed_ / (num_ranks - 1);
            if (index >= num_indices_) return {};
            const int dst_rank = static_cast<int>((rank + 1 + claimed_ % (num_ranks - 1)) % num_ranks);
            claimed_ = claim();
            const int64_t first = first_rows_[dst_rank], last = min_of(first_rows_[dst_rank + 1], args_.num_recv_tokens);
            const int64_t num_rows = relay_chunk_rows(args_.domain.window, first_rows_[dst_rank + 1] - first);
            const int64_t begin = first + index * num_rows;
            if (begin < last) return {dst_rank, static_cast<int>(index), 0, begin, min_of(begin + num_rows, last)};
        }
    }

    __device__ bool load() {
        if (load_chunk_.is_over()) {
            if (has_next_) return false;
            const RelayChunk chunk = next_chunk();
            if (chunk.is_over()) return false;
            load_chunk_ = next_ = chunk;
            has_next_ = true;
        }
        const int num_bytes = args_.parts.num_bytes(load_chunk_.part);
        ptx::mbarrier_arrive_expect(barriers_ + load_stage_, num_bytes);
        ptx::bulk_load(stage(load_stage_), args_.y + load_chunk_.row * args_.parts.num_row_bytes + args_.parts.begin(load_chunk_.part), num_bytes,
                       barriers_ + load_stage_);
        load_stage_ = load_stage_ + 1 == args_.num_staging_lanes ? 0 : load_stage_ + 1;
        load_chunk_.advance(args_.parts.num_parts);
        ++num_ahead_;
        return true;
    }

    __device__ void store(const RelayChunk& chunk) {
        ptx::mbarrier_wait(barriers_ + store_stage_, store_parity_);
        ptx::bulk_store(args_.relay + chunk.row * args_.parts.num_row_bytes + args_.parts.begin(chunk.part), stage(store_stage_),
                        args_.parts.num_bytes(chunk.part));
        ptx::bulk_commit();
        ptx::bulk_wait_read<1>();  // the stage of the part before this one is free: it is the next to be filled
        --num_ahead_;
        if (++store_stage_ == args_.num_staging_lanes) {
            store_stage_ = 0;
            store_parity_ ^= 1;
        }
    }

    __device__ void tell(const RelayChunk& chunk) const {
        const Domain& domain = args_.domain;
        ptx::store_release_sys(domain.window.slot_full(domain.arenas[chunk.dst_rank], Op::kCombine, domain.rank) + chunk.index,
                               signal_word(context_.epoch, static_cast<uint32_t>(chunk.index + 1)));
    }

    __device__ uint8_t* stage(int index) const { return ring_ + index * args_.num_lane_bytes; }

    const CombineArgs& args_;
    const WaitContext& context_;
    const int64_t* first_rows_;
    uint8_t* ring_;
    uint64_t* barriers_;
    uint32_t num_indices_;  // chunks of the destination that gets most; no more than there are flags
    uint32_t claimed_ = 0;
    RelayChunk load_chunk_{};
    RelayChunk next_{};  // where loads have gone on while the chunk before it is still being stored
    bool has_next_ = false;
    int num_ahead_ = 0;  // parts loaded and not stored
    int load_stage_ = 0;
    int store_stage_ = 0;
    uint32_t store_parity_ = 0;
};
#endif

}  // namespace deepep::nvlink
