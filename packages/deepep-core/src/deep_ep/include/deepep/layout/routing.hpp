#pragma once
#include <cstdint>

#include "arithmetic.hpp"

namespace deepep {

// Rank that holds an expert, or -1 for an index that names none (unused choices and bad indices alike).
DEEPEP_HOST_DEVICE constexpr int rank_of_expert(int64_t expert, int64_t num_experts, int64_t num_local_experts) {
    return expert < 0 || expert >= num_experts ? -1 : static_cast<int>(expert / num_local_experts);
}

// Expert as its rank numbers it, or -1 when it lives elsewhere.
DEEPEP_HOST_DEVICE constexpr int64_t localise_expert(int64_t expert, int rank, int64_t num_local_experts) {
    if (expert < 0) return -1;  // first, because a garbage index far below zero would overflow the difference
    const int64_t local = expert - static_cast<int64_t>(rank) * num_local_experts;
    return local >= 0 && local < num_local_experts ? local : -1;
}

// A row of num_row_bytes cut into equal parts (the last may be shorter) of at most max_part_bytes, each a multiple of 16 bytes.
struct RowParts {
    int64_t num_row_bytes;
    int32_t num_parts;
    int32_t num_part_bytes;

    DEEPEP_HOST_DEVICE static RowParts cut(int64_t num_row_bytes, int64_t max_part_bytes) {
        const int64_t wanted = max_of(1, ceil_div(num_row_bytes, max_part_bytes));
        const int64_t part = max_of(16, align_up(ceil_div(num_row_bytes, wanted), 16));
        // Rounding parts up to 16 bytes can make fewer of them enough.
        return {num_row_bytes, static_cast<int32_t>(max_of(1, ceil_div(num_row_bytes, part))), static_cast<int32_t>(part)};
    }
    DEEPEP_HOST_DEVICE int64_t begin(int part) const { return static_cast<int64_t>(part) * num_part_bytes; }
    DEEPEP_HOST_DEVICE int32_t num_bytes(int part) const {
        return static_cast<int32_t>(min_of(num_part_bytes, num_row_bytes - begin(part)));
    }
};

// What accompanies a row through the staging window, as one unit:
//   scales uint32 [S] | top-k indices int64 [K] (8-byte aligned) | weights float32 [K] | source token int32
struct SideRow {
    int32_t num_scales;
    int32_t num_topk;
    int32_t num_src_idx;  // 1 or 0

    DEEPEP_HOST_DEVICE int32_t topk_idx_offset() const { return static_cast<int32_t>(align_up(4ll * num_scales, 8)); }
    DEEPEP_HOST_DEVICE int32_t weights_offset() const { return topk_idx_offset() + 8 * num_topk; }
    DEEPEP_HOST_DEVICE int32_t src_idx_offset() const { return weights_offset() + 4 * num_topk; }
    DEEPEP_HOST_DEVICE int32_t num_bytes() const { return static_cast<int32_t>(align_up(src_idx_offset() + 4ll * num_src_idx, 16)); }
};

}  // namespace deepep
