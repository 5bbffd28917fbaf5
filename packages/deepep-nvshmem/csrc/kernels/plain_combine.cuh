#pragma once
// Combine with ordinary loads and stores: one warp per token, straight from the owners' memory or from this rank's staging window.
#include "combine_parts.cuh"
#include "relay.cuh"

namespace deepep::nvlink {
namespace {

// Where one rank keeps a token's row: a plain row, or units of the staging window.
struct PlainRow {
    const uint8_t* row = nullptr;   // direct
    const uint8_t* ring = nullptr;  // staged
    int64_t first_unit = 0;

    __device__ const uint8_t* part(const CombineArgs& args, int index) const {
        if (ring == nullptr) return row + args.parts.begin(index);
        return ring + (first_unit + index) % args.domain.window.num_slots * kNumSlotBytes;
    }
};

// Lane r waits for the slots that hold rank r's row of the token (and later returns them).
__device__ __forceinline__ bool wait_slots_plain(const CombineArgs& args, const WaitContext& context, int rank, int64_t first_unit) {
    const uint64_t* words = args.domain.window.slot_full(args.domain.arenas[args.domain.rank], Op::kCombine, rank);
    for (int unit = 0; unit < units_per_row(args); ++unit) {
        const int64_t number = first_unit + unit;
        const uint64_t* word = words + number % args.domain.window.num_slots;
        if (!wait_exact(context, word, signal_word(context.epoch, static_cast<uint32_t>(number + 1)), Phase::kSlotFull, rank)) return false;
    }
    return true;
}

__device__ __forceinline__ void return_slots_plain(const CombineArgs& args, const WaitContext& context, int rank, int64_t first_unit) {
    uint64_t* words = args.domain.window.slot_free(args.domain.arenas[rank], Op::kCombine, args.domain.rank);
    for (int unit = 0; unit < units_per_row(args); ++unit) {
        const int64_t number = first_unit + unit;
        ptx::store_release_sys(words + number % args.domain.window.num_slots, signal_word(context.epoch, static_cast<uint32_t>(number + 1)));
    }
}

// Kept apart from the kernel's other paths, which need fewer registers.
__device__ __noinline__ void gather_rows_plain(const CombineArgs& args, const WaitContext& context, const Handshake& handshake) {
    const Domain& domain = args.domain;
    const int lane = threadIdx.x % 32;
    while (true) {
        const int64_t token = claim_rows(&context.state->pull_claims[kMaxRanks], 1);
        if (token >= args.num_tokens) return;
        PlainRow rows[kMaxRanks];
        uint32_t held_mask = 0, ring_mask = 0;
        int64_t own_first_unit = 0;  // of the rank that this lane stands for
        int32_t own_row = -1;        // likewise, where that rank relays
#pragma unroll
        for (int rank = 0; rank < kMaxRanks; ++rank) {
            if (rank >= domain.num_ranks) continue;
            const Grant& grant = handshake.grants[rank];
            const int64_t row = args.send_head[token * domain.num_ranks + rank];
            const bool is_ring = grant.is_staged && rank != domain.rank;
            const int64_t num_rows = is_ring ? grant.num_staged_rows : grant.num_rows;
            if (row >= 0 && row >= num_rows) report_row(context, handshake, rank, row, num_rows);
            if (row < 0 || row >= num_rows) continue;
            held_mask |= 1u << rank;
            if (is_ring) {
                ring_mask |= 1u << rank;
                rows[rank].ring = domain.window.staging(domain.arenas[domain.rank], rank);
                rows[rank].first_unit = (row - first_row_of(args, rank)) * units_per_row(args);
                if (lane == rank) own_first_unit = rows[rank].first_unit;
            } else {
                rows[rank].row = grant.rows + row * args.parts.num_row_bytes;
                if (grant.is_relayed && rank != domain.rank && lane == rank) own_row = static_cast<int32_t>(row);
            }
        }
        const bool waits = lane < kMaxRanks && (ring_mask >> lane & 1);
        if (!__all_sync(~0u, !waits || wait_slots_plain(args, context, lane, own_first_unit))) return;
        if (!__all_sync(~0u, own_row < 0 || wait_relayed_row(args, context, lane, own_row) >= 0)) return;
        for (int part = 0; part < args.parts.num_parts; ++part) {
            const int64_t offset = token * args.parts.num_row_bytes + args.parts.begin(part);
            for (int byte = lane * 16; byte < args.parts.num_bytes(part); byte += 32 * 16) {
                int4 vectors[kMaxRanks];
#pragma unroll
                for (int rank = 0; rank < kMaxRanks; ++rank)
                    if (held_mask >> rank & 1) vectors[rank] = load_vector(rows[rank].part(args, part) + byte);
                Accumulator sum;
                if (args.bias_0 != nullptr) sum.add(load_vector(args.bias_0 + offset + byte));
                if (args.bias_1 != nullptr) sum.add(load_vector(args.bias_1 + offset + byte));
#pragma unroll
                for (int rank = 0; rank < kMaxRanks; ++rank)
                    if (held_mask >> rank & 1) sum.add(vectors[rank]);
                *reinterpret_cast<int4*>(args.out + offset + byte) = sum.rounded();
            }
        }
        if (handshake.has_staged && lane < args.num_topk) {
            float sum = 0.0f;
#pragma unroll
            for (int rank = 0; rank < kMaxRanks; ++rank) {
                if (!(held_mask >> rank & 1)) continue;
                const int64_t row = args.send_head[token * domain.num_ranks + rank];
                const float* weights = rows[rank].ring != nullptr ? reinterpret_cast<const float*>(rows[rank].part(args, args.parts.num_parts))
                                                                  : reinterpret_cast<const float*>(handshake.grants[rank].weights) + row * args.num_topk;
                sum = __fadd_rn(sum, weights[lane]);
            }
            args.out_topk_weights[token * args.num_topk + lane] = sum;
        }
        __syncwarp();  // all lanes have read the slots that are returned now
        if (waits) return_slots_plain(args, context, lane, own_first_unit);
        __syncwarp();
    }
}

}  // namespace
}  // namespace deepep::nvlink
