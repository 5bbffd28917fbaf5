#pragma once
// Rows through the staging window, for memory that peers cannot reach: bounded space, any number of rows.
//
// Each pair of ranks has a ring of slots in the receiver's window. A row travels as units (parts of the row, then its side data), numbered
// along the ring: unit u of the pair uses slot u % slots.
//   SLOT FULL {epoch, u + 1}  pusher -> receiver, released after the unit's bytes have landed
//   SLOT FREE {epoch, u + 1}  receiver -> pusher, released after the unit has been read out
// A pusher stores unit u only after it has acquired FREE of unit u - slots. At the start of an operation every slot is free: READY says so.
//
// No deadlock: rows are claimed in order and whole, by warps that are running; both sides of a pair go through the tokens of the source in the
// same order. So the oldest row that has not been read out depends on nothing younger, as long as the ring holds two batches of rows, the
// pusher's and the receiver's, which need not be aligned (the host checks that).
#include "deepep/ptx/bulk.cuh"
#include "deepep/ptx/memory.cuh"
#include "deepep/sync/wait.cuh"
#include "kernels.hpp"

namespace deepep::nvlink {

// One warp's place in shared memory: a stage and a barrier for each lane that carries a row.
struct StagingLanes {
    uint8_t* stages;     // [num_lanes][num_lane_bytes]
    uint64_t* barriers;  // [num_lanes]
    int num_lanes;       // 1 without bulk copies: the whole warp then carries one row
    int num_lane_bytes;
};

__device__ __forceinline__ int64_t claim_rows(uint32_t* counter, int num_rows) {
    uint32_t first = 0;
    if (threadIdx.x % 32 == 0) first = ptx::add_relaxed_gpu(counter, num_rows);
    return __shfl_sync(~0u, first, 0);
}

__device__ __forceinline__ void init_lanes(const StagingLanes& lanes) {
#if DEEPEP_HAS_BULK
    if (static_cast<int>(threadIdx.x % 32) < lanes.num_lanes) {
        ptx::mbarrier_init(lanes.barriers + threadIdx.x % 32, 1);
        ptx::fence_mbarrier_init();
    }
    __syncwarp();
#endif
}

__device__ __forceinline__ void copy_by_warp(uint8_t* dst, const uint8_t* src, int num_bytes) {
    for (int byte = threadIdx.x % 32 * 16; byte < num_bytes; byte += 32 * 16)
        *reinterpret_cast<int4*>(dst + byte) = *reinterpret_cast<const int4*>(src + byte);
}

// Pushes rows to one rank's window. A Source says which rows there are:
//   num_candidates()          what is claimed, in order (tokens, or rows)
//   row(candidate)            its row number in this pair, or -1
//   num_units()               units of a row; the first one is never built
//   num_bytes(unit)           a multiple of 16, at most kNumSlotBytes
//   is_built(unit)            whether the unit is put together by build() instead of copied from address()
//   address(candidate, unit)  where the unit lies
//   build(candidate, to)      called by the whole warp
template <bool kBulk, class Source>
__device__ void push_staged(const Domain& domain, const WaitContext& context, const Source& source, int dst_rank, const StagingLanes& lanes) {
    const int lane = threadIdx.x % 32;
    const NormalWindow& window = domain.window;
    const uint64_t* free_words = window.slot_free(domain.arenas[domain.rank], context.op, dst_rank);
    uint64_t* full_words = window.slot_full(domain.arenas[dst_rank], context.op, domain.rank);
    uint8_t* ring = window.staging(domain.arenas[dst_rank], domain.rank);
    const auto row_of = [&](int64_t candidate) { return lane < lanes.num_lanes && candidate < source.num_candidates() ? source.row(candidate) : -1; };
    const auto free_word = [&](int64_t number) { return signal_word(context.epoch, static_cast<uint32_t>(number - window.num_slots + 1)); };
    const auto wait_free = [&](int64_t number, int64_t slot) {
        return number < window.num_slots || wait_exact(context, free_words + slot, free_word(number), Phase::kSlotFree, dst_rank);
    };
    int64_t first = claim_rows(&context.state->push_claims[dst_rank], lanes.num_lanes);
#if DEEPEP_HAS_BULK
    if constexpr (kBulk) {
        uint8_t* stage = lanes.stages + lane * lanes.num_lane_bytes;
        uint32_t parity = 0;
        const auto load = [&](int64_t candidate, int unit) {
            ptx::mbarrier_arrive_expect(lanes.barriers + lane, source.num_bytes(unit));
            ptx::bulk_load(stage, source.address(candidate, unit), source.num_bytes(unit), lanes.barriers + lane);
        };
        // FULL of a lane's newest unit is owed until the next one is on its way: waiting for the landing and releasing a flag take microseconds each,
        // and meanwhile the stage refills. Before any lane waits for room, all lanes pay: what they owe may be what the receiver waits for.
        int64_t owed = -1;
        const auto pay = [&] {
            ptx::store_release_sys(full_words + owed % window.num_slots, signal_word(context.epoch, static_cast<uint32_t>(owed + 1)));
            owed = -1;
        };
        int64_t row = row_of(first + lane);
        if (row >= 0) load(first + lane, 0);
        while (first < source.num_candidates()) {
            const bool has_row = row >= 0;
            int64_t next_first = 0, next_row = -1;
            for (int unit = 0; unit < source.num_units(); ++unit) {
                const int64_t number = row * source.num_units() + unit;
                const int64_t slot = has_row ? number % window.num_slots : 0;
                if (source.is_built(unit)) {
                    for (int i = 0; i < lanes.num_lanes; ++i)
                        if (__shfl_sync(~0u, has_row, i)) source.build(first + i, lanes.stages + i * lanes.num_lane_bytes);
                    ptx::fence_async_shared();  // these ordinary writes are read by the bulk store below
                    __syncwarp();
                }
                const bool must_wait = has_row && number >= window.num_slots && ptx::load_acquire_sys(free_words + slot) != free_word(number);
                const bool some_wait = __any_sync(~0u, must_wait);
                if (owed >= 0 && (some_wait || !has_row)) {
                    ptx::bulk_wait<0>();
                    pay();
                }
                const bool is_free = !must_wait || wait_free(number, slot);
                if (has_row && !source.is_built(unit)) {
                    ptx::mbarrier_wait(lanes.barriers + lane, parity);
                    parity ^= 1;
                }
                if (!__all_sync(~0u, is_free)) return;  // what was loaded has landed: shared memory may be left
                if (has_row) {
                    ptx::fence_async_global();  // FREE, acquired above, permits the bulk store
                    ptx::bulk_store(ring + slot * kNumSlotBytes, stage, source.num_bytes(unit));
                    ptx::bulk_commit();
                }
                if (unit == 0) {
                    next_first = claim_rows(&context.state->push_claims[dst_rank], lanes.num_lanes);
                    next_row = row_of(next_first + lane);
                }
                // What comes next is loaded while this unit is on its way.
                ptx::bulk_wait_read<0>();
                const bool is_last = unit + 1 == source.num_units();
                if (is_last && next_row >= 0) load(next_first + lane, 0);
                if (!is_last && has_row && !source.is_built(unit + 1)) load(first + lane, unit + 1);
                if (owed >= 0) {
                    ptx::bulk_wait<1>();  // this unit's store may still be on its way, the one before has landed
                    pay();
                }
                if (has_row) owed = number;
                __syncwarp();
            }
            first = next_first;
            row = next_row;
        }
        if (owed >= 0) {
            ptx::bulk_wait<0>();
            pay();
        }
        __syncwarp();
        return;
    }
#endif
    if constexpr (!kBulk) {
        for (; first < source.num_candidates(); first = claim_rows(&context.state->push_claims[dst_rank], 1)) {
            const int64_t row = __shfl_sync(~0u, row_of(first + lane), 0);
            for (int unit = 0; row >= 0 && unit < source.num_units(); ++unit) {
                const int64_t number = row * source.num_units() + unit;
                const int64_t slot = number % window.num_slots;
                if (!__all_sync(~0u, wait_free(number, slot))) return;  // every lane acquires: every lane stores
                uint8_t* to = ring + slot * kNumSlotBytes;
                if (source.is_built(unit))
                    source.build(first, to);
                else
                    copy_by_warp(to, source.address(first, unit), source.num_bytes(unit));
                __syncwarp();  // joins the warp's stores to lane 0, whose release passes them on
                if (lane == 0) ptx::store_release_sys(full_words + slot, signal_word(context.epoch, static_cast<uint32_t>(number + 1)));
            }
        }
    }
}

// Takes one rank's rows out of this rank's window. A Sink says where they go:
//   num_rows(), num_units(), num_bytes(unit) as above;  is_built(unit)
//   address(row, unit)        where the unit goes
//   unpack(row, from)         for a built unit; called by the whole warp
template <bool kBulk, class Sink>
__device__ void drain_staged(const Domain& domain, const WaitContext& context, const Sink& sink, int src_rank, const StagingLanes& lanes) {
    const int lane = threadIdx.x % 32;
    const NormalWindow& window = domain.window;
    const uint64_t* full_words = window.slot_full(domain.arenas[domain.rank], context.op, src_rank);
    uint64_t* free_words = window.slot_free(domain.arenas[src_rank], context.op, domain.rank);
    const uint8_t* ring = window.staging(domain.arenas[domain.rank], src_rank);
    [[maybe_unused]] uint32_t parity = 0;
    while (true) {
        const int64_t first = claim_rows(&context.state->pull_claims[src_rank], lanes.num_lanes);
        if (first >= sink.num_rows()) break;
        const int64_t row = first + lane;
        const bool has_row = lane < lanes.num_lanes && row < sink.num_rows();
        for (int unit = 0; unit < sink.num_units(); ++unit) {
            const int num_bytes = sink.num_bytes(unit);
            const int64_t number = row * sink.num_units() + unit;
            const int64_t slot = has_row ? number % window.num_slots : 0;
            const uint64_t full = signal_word(context.epoch, static_cast<uint32_t>(number + 1));
            bool is_full = true;
            if (has_row) {
                is_full = wait_exact(context, full_words + slot, full, Phase::kSlotFull, src_rank);
            }
            if (!__all_sync(~0u, is_full)) {
#if DEEPEP_HAS_BULK
                if constexpr (kBulk) ptx::bulk_wait<0>();  // no copy may outlive the block's shared memory
#endif
                return;
            }
#if DEEPEP_HAS_BULK
            if constexpr (kBulk) {
                uint8_t* stage = lanes.stages + lane * lanes.num_lane_bytes;
                if (has_row) {
                    ptx::bulk_wait_read<0>();   // the stage's last copy has left it
                    ptx::fence_async_global();  // FULL, acquired above, permits the bulk load
                    ptx::mbarrier_arrive_expect(lanes.barriers + lane, num_bytes);
                    ptx::bulk_load(stage, ring + slot * kNumSlotBytes, num_bytes, lanes.barriers + lane);
                    ptx::mbarrier_wait(lanes.barriers + lane, parity);
                    parity ^= 1;
                    ptx::store_release_sys(free_words + slot, full);
                    if (!sink.is_built(unit)) {
                        ptx::bulk_store(sink.address(row, unit), stage, num_bytes);
                        ptx::bulk_commit();
                    }
                }
                __syncwarp();
                if (sink.is_built(unit)) {
                    for (int i = 0; i < lanes.num_lanes; ++i)
                        if (__shfl_sync(~0u, has_row, i)) sink.unpack(first + i, lanes.stages + i * lanes.num_lane_bytes);
                    ptx::fence_async_shared();  // these ordinary reads come before the next bulk load into the stages
                    __syncwarp();
                }
            }
#endif
            if constexpr (!kBulk) {
                if (!__shfl_sync(~0u, has_row, 0)) continue;
                const uint8_t* from = ring + __shfl_sync(~0u, slot, 0) * kNumSlotBytes;
                if (sink.is_built(unit))
                    sink.unpack(first, from);
                else
                    copy_by_warp(sink.address(first, unit), from, num_bytes);
                __syncwarp();
                if (lane == 0) ptx::store_release_sys(free_words + slot, full);
            }
        }
    }
#if DEEPEP_HAS_BULK
    if constexpr (kBulk) ptx::bulk_wait<0>();
#endif
}

}  // namespace deepep::nvlink
