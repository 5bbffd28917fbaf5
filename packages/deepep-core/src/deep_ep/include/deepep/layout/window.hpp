#pragma once
#include <cstdint>

#include "arithmetic.hpp"
#include "status.hpp"

namespace deepep {

// Words of a READY record: what a rank grants to its peers for one operation. Offsets are from the start of its arena.
enum ReadyWord : int {
    kReadyKind = 0,       // ReadyKind
    kReadyNumRows = 1,    // rows that fit (dispatch) or exist (combine)
    kReadyRows = 2,       // offset of rows: two words, low half first
    kReadyScales = 4,     // offset of scales
    kReadyTopkIdx = 6,    // offset of top-k indices
    kReadyWeights = 8,    // offset of top-k weights
    kReadySrcIdx = 10,    // offset of source token numbers
    kNumReadyWords = 12,
};
enum ReadyKind : uint32_t { kKindDirect = 1, kKindStaged = 2, kKindRelayed = 3 };
constexpr int kReadyStride = 16;  // words from one rank's READY record to the next: 128 bytes

constexpr int64_t kNumSlotBytes = 8192;  // one staging slot: a part of a row

// The window: the part of a rank's arena that its peers' kernels know by name.
//
//   state       DeviceState                                 this rank only
//   histogram   int32 [max_experts + ranks]                 this rank only (layout's sums; zero between calls)
//   counts      word [2][N][16 + N + max_local_experts]     written by rank n at [parity][n]
//   ready       word [kNumOps][N][kReadyStride]             written by rank n at [op][n]
//   done        word [kNumOps][N]                           written by rank n at [op][n] (DONE of dispatch, READ_DONE of combine)
//   slot_full   word [kNumOps][N][slots]                    written by rank n at [op][n]: it filled a slot here
//   slot_free   word [kNumOps][N][slots]                    written by rank n at [op][n]: it emptied a slot that we had filled there
//   staging     byte [N][slots][kNumSlotBytes]              written by rank n at [n]
//
// Sizes are known to both sides from the constructor's numbers, so one struct serves the host and every kernel.
struct NormalWindow {
    int32_t num_ranks = 0;
    int32_t max_local_experts = 0;
    int64_t num_slots = 0;  // staging slots for each source rank

    static constexpr int64_t kAlignment = 128;

    DEEPEP_HOST_DEVICE static NormalWindow of(int num_ranks, int max_local_experts, int64_t num_staging_bytes) {
        return {num_ranks, max_local_experts, num_staging_bytes / num_ranks / kNumSlotBytes};
    }

    DEEPEP_HOST_DEVICE int64_t counts_stride() const {  // in words
        return align_up(kNumHeaderWords + num_ranks + max_local_experts, kAlignment / 8);
    }

    DEEPEP_HOST_DEVICE int64_t state_offset() const { return 0; }
    DEEPEP_HOST_DEVICE int64_t histogram_offset() const { return state_offset() + static_cast<int64_t>(sizeof(DeviceState)); }
    DEEPEP_HOST_DEVICE int64_t counts_offset() const {
        return histogram_offset() + align_up(4 * (static_cast<int64_t>(num_ranks) * max_local_experts + num_ranks), kAlignment);
    }
    DEEPEP_HOST_DEVICE int64_t ready_offset() const { return counts_offset() + 8 * 2 * num_ranks * counts_stride(); }
    DEEPEP_HOST_DEVICE int64_t done_offset() const { return ready_offset() + 8 * kNumOps * num_ranks * kReadyStride; }
    DEEPEP_HOST_DEVICE int64_t slot_full_offset() const {
        return done_offset() + align_up(8 * kNumOps * num_ranks, kAlignment);
    }
    DEEPEP_HOST_DEVICE int64_t slot_free_offset() const {
        return slot_full_offset() + align_up(8 * kNumOps * num_ranks * num_slots, kAlignment);
    }
    DEEPEP_HOST_DEVICE int64_t staging_offset() const {
        return slot_free_offset() + align_up(8 * kNumOps * num_ranks * num_slots, kAlignment);
    }
    DEEPEP_HOST_DEVICE int64_t num_bytes() const {
        return align_up(staging_offset() + num_ranks * num_slots * kNumSlotBytes, kAlignment);
    }
    // What reset must clear: everything but the staging bytes.
    DEEPEP_HOST_DEVICE int64_t num_signal_bytes() const { return staging_offset(); }

    // Accessors: `arena` is where the arena of the rank in question is mapped here; `writer` the rank that stores the word.
    DEEPEP_HOST_DEVICE DeviceState* state(uint8_t* arena) const { return reinterpret_cast<DeviceState*>(arena + state_offset()); }
    DEEPEP_HOST_DEVICE int32_t* histogram(uint8_t* arena) const { return reinterpret_cast<int32_t*>(arena + histogram_offset()); }
    DEEPEP_HOST_DEVICE uint64_t* counts(uint8_t* arena, uint32_t epoch, int writer) const {
        return word(arena, counts_offset()) + ((epoch & 1) * static_cast<int64_t>(num_ranks) + writer) * counts_stride();
    }
    DEEPEP_HOST_DEVICE uint64_t* ready(uint8_t* arena, Op op, int writer) const {
        return word(arena, ready_offset()) + (op_index(op) * num_ranks + writer) * kReadyStride;
    }
    DEEPEP_HOST_DEVICE uint64_t* done(uint8_t* arena, Op op, int writer) const {
        return word(arena, done_offset()) + op_index(op) * num_ranks + writer;
    }
    DEEPEP_HOST_DEVICE uint64_t* slot_full(uint8_t* arena, Op op, int writer) const {
        return word(arena, slot_full_offset()) + (op_index(op) * num_ranks + writer) * num_slots;
    }
    DEEPEP_HOST_DEVICE uint64_t* slot_free(uint8_t* arena, Op op, int writer) const {
        return word(arena, slot_free_offset()) + (op_index(op) * num_ranks + writer) * num_slots;
    }
    DEEPEP_HOST_DEVICE uint8_t* staging(uint8_t* arena, int writer) const {
        return arena + staging_offset() + static_cast<int64_t>(writer) * num_slots * kNumSlotBytes;
    }

private:
    DEEPEP_HOST_DEVICE static uint64_t* word(uint8_t* arena, int64_t offset) { return reinterpret_cast<uint64_t*>(arena + offset); }
    DEEPEP_HOST_DEVICE static int64_t op_index(Op op) { return static_cast<int64_t>(op); }
};

}  // namespace deepep
