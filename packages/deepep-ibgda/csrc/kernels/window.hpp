#pragma once
// Where everything lies in a rank's arena. Host and kernels use the same struct; nothing here needs CUDA.
#include <cstdint>

#include "deepep/layout/arithmetic.hpp"
#include "deepep/layout/status.hpp"

namespace deepep::ibgda {

constexpr int kMaxWindowRanks = 512;
constexpr int kMaxLocalExperts = 1022;  // experts of one rank
constexpr int kMaxExperts = 8192;
constexpr int kMaxTokens = 65535;  // of one rank in one call
constexpr int kMaxHidden = 65536;
constexpr int kMaxBlocks = 512;  // of one launch
constexpr int kNumSlots = 3;     // messages of one kind from one rank that can be under way or unread
constexpr uint32_t kEmptyWord = 0xffffffffu;  // what rows consist of while they are not there; no payload contains it

enum Direction : int { kDispatch = 0, kCombine = 1 };
constexpr int kNumDirections = 2;

// The index message of dispatch: signal words (sequence in the upper half), so nobody has to clear them.
enum IndexWord : int { kIndexNumTokens = 0, kIndexChecksum = 1, kIndexCounts = 2 };
constexpr int kNumIndexWords = kIndexCounts + kMaxLocalExperts;

// A rank's message about one token of dispatch:
//
//   payload  [H] e4m3 or bf16
//   scales   float32 [H/128], e4m3 only, filled up to 16 bytes
//   header   [flags][escape][choice x K][weight x K, if they travel], filled up to 16 bytes
//
// A token that does not go to a rank is a header whose first vector is zero.
struct RowMessage {
    int32_t num_payload_bytes;
    int32_t num_scales;
    int32_t num_header_words;

    DEEPEP_HOST_DEVICE static RowMessage of(int hidden, bool use_fp8, int num_topk, bool has_weights) {
        return {use_fp8 ? hidden : 2 * hidden, use_fp8 ? hidden / 128 : 0, 2 + num_topk * (has_weights ? 2 : 1)};
    }
    DEEPEP_HOST_DEVICE int num_payload_vectors() const { return num_payload_bytes / 16; }
    DEEPEP_HOST_DEVICE int num_scale_vectors() const { return (num_scales + 3) / 4; }
    DEEPEP_HOST_DEVICE int num_header_vectors() const { return (num_header_words + 3) / 4; }
    DEEPEP_HOST_DEVICE int scales_offset() const { return num_payload_bytes; }
    DEEPEP_HOST_DEVICE int header_offset() const { return num_payload_bytes + 16 * num_scale_vectors(); }
    DEEPEP_HOST_DEVICE int num_bytes() const { return header_offset() + 16 * num_header_vectors(); }
    DEEPEP_HOST_DEVICE int64_t stride() const { return align_up(num_bytes(), 128); }
};

// The same places as numbers.
struct RowOffsets {
    int32_t num_payload_vectors, num_scales, num_scale_vectors, num_header_words, num_header_vectors;
    int32_t scales, header, num_bytes;
    uint32_t stride;

    static RowOffsets of(const RowMessage& row) {
        return {row.num_payload_vectors(), row.num_scales,      row.num_scale_vectors(), row.num_header_words, row.num_header_vectors(),
                row.scales_offset(),       row.header_offset(), row.num_bytes(),         static_cast<uint32_t>(row.stride())};
    }
};

// Words of a header.
constexpr uint32_t kRowPresent = 1, kRowEscaped = 2;       // flags
constexpr uint32_t kNoChoice = 0xfffffffeu;                // the choice is not on that rank
constexpr uint32_t kRepeatedChoice = 0x80000000u;          // an earlier choice of the token names the same expert
constexpr int kPositionBits = 16;                          // below: position among the source's tokens for that expert; above: local expert
static_assert(kMaxTokens < 1 << kPositionBits && kMaxLocalExperts < 0x7fff, "a choice is one word and never looks empty");

// Rows of combine in LogFMT: for each block of 128 columns 43 words of three codes, and low and high in one word.
constexpr int kLogfmtColumns = 128, kLogfmtCodeWords = 43, kLogfmtWords = 44;

struct CombineRow {
    int32_t num_bytes;

    DEEPEP_HOST_DEVICE static CombineRow of(int hidden, bool use_logfmt) {
        return {use_logfmt ? hidden / kLogfmtColumns * kLogfmtWords * 4 : 2 * hidden};
    }
    DEEPEP_HOST_DEVICE int64_t stride() const { return align_up(num_bytes, 128); }
};

// The window. `writer` stands for the rank that stores; a rank writes to itself like to any other.
//
//   state      DeviceState                     this rank only: error claim, failed launches
//   launches   uint32 [2]                      this rank only, as all that follows up to `draws`: kernels of each direction so far
//   sends      uint32 [2]                      those of them that sent
//   readers    uint32 [2]                      blocks of the running kernel that have read what its last one changes
//   sequences  uint32 [2][N]                   operations in which the pair took part
//   consumed   uint32 [2][3][N]                sequence of the message that was last taken from a slot
//   broken     uint32 [2][3][N]                sequence of a message that was given up
//   posted     uint64 [2][N]                   credits as they were last told
//   granted    uint64 [2][N]                   the peers' credits as the kernel before acquired them
//   masked     uint32 [N]
//   verdicts   uint32 [N]                      launch << 1 | (lost): what the blocks agreed on for a source's index
//   waits      uint64 [2][N]                   longest wait of the running operation, nanoseconds
//   claims     uint32 [2][kMaxBlocks]          which virtual blocks have been taken up
//   draws      uint32 [2][2], a line each      what a sending kernel's warps have drawn so far; kernels that send use the two words in turn
//   arenas     uint64 [N]                      every rank's arena as mapped here
//   credits    uint64 [2][N]                   written by rank n: what it has taken from the slots that we fill there
//   boxes      [3][N] of each: index word [1024], weight word [], dispatch rows, combine rows; written by rank n at [slot][n]
//   outboxes   the same once more, where some ranks are remote: what goes to rank n at [slot][n]
//
// Sizes of boxes follow from the arena's size alone, so calls of different shapes can be under way at the same time.
struct LowLatencyWindow {
    int32_t num_ranks = 0;
    int32_t combine_share = 0;  // of a box, in parts of which dispatch rows have kDispatchShare and weights 1
    int64_t num_part_bytes = 0;
    bool has_outboxes = false;

    static constexpr int64_t kAlignment = 128;
    static constexpr int kDispatchShare = 32;

    DEEPEP_HOST_DEVICE static int share_of(bool reduces_at_source) { return reduces_at_source ? 256 : 32; }

    // The window that an arena of num_arena_bytes holds.
    DEEPEP_HOST_DEVICE static LowLatencyWindow of(int num_ranks, int64_t num_arena_bytes, bool reduces_at_source, bool has_remote) {
        LowLatencyWindow window{num_ranks, share_of(reduces_at_source), 0, has_remote};
        const int64_t num_free_bytes = num_arena_bytes - window.num_bytes();
        const int64_t num_parts = window.num_boxes() * (1 + kDispatchShare + window.combine_share);
        window.num_part_bytes = num_free_bytes < 0 ? 0 : num_free_bytes / num_parts / kAlignment * kAlignment;
        return window;
    }
    // What a call needs; any window with parts as large takes it.
    DEEPEP_HOST_DEVICE static int64_t needed_part_bytes(int max_tokens, int hidden, int num_topk, bool reduces_at_source) {
        const int64_t num_dispatch = max_tokens * RowMessage::of(hidden, false, num_topk, true).stride();
        const int64_t num_combine = (reduces_at_source ? static_cast<int64_t>(max_tokens) * num_topk : max_tokens) * CombineRow::of(hidden, false).stride();
        const int64_t num_weights = 8ll * max_tokens * num_topk;
        return align_up(max_of(num_weights, max_of(ceil_div(num_dispatch, kDispatchShare), ceil_div(num_combine, share_of(reduces_at_source)))),
                        kAlignment);
    }

    DEEPEP_HOST_DEVICE int64_t launches_offset() const { return align_up(static_cast<int64_t>(sizeof(DeviceState)), kAlignment); }
    DEEPEP_HOST_DEVICE int64_t sends_offset() const { return launches_offset() + 4 * kNumDirections; }
    DEEPEP_HOST_DEVICE int64_t readers_offset() const { return sends_offset() + 4 * kNumDirections; }
    DEEPEP_HOST_DEVICE int64_t sequences_offset() const { return launches_offset() + kAlignment; }
    DEEPEP_HOST_DEVICE int64_t consumed_offset() const { return sequences_offset() + align_up(4ll * kNumDirections * num_ranks, kAlignment); }
    DEEPEP_HOST_DEVICE int64_t broken_offset() const { return consumed_offset() + align_up(4ll * kNumDirections * kNumSlots * num_ranks, kAlignment); }
    DEEPEP_HOST_DEVICE int64_t posted_offset() const { return broken_offset() + align_up(4ll * kNumDirections * kNumSlots * num_ranks, kAlignment); }
    DEEPEP_HOST_DEVICE int64_t granted_offset() const { return posted_offset() + align_up(8ll * kNumDirections * num_ranks, kAlignment); }
    DEEPEP_HOST_DEVICE int64_t masked_offset() const { return granted_offset() + align_up(8ll * kNumDirections * num_ranks, kAlignment); }
    DEEPEP_HOST_DEVICE int64_t verdicts_offset() const { return masked_offset() + align_up(4ll * num_ranks, kAlignment); }
    DEEPEP_HOST_DEVICE int64_t waits_offset() const { return verdicts_offset() + align_up(4ll * num_ranks, kAlignment); }
    DEEPEP_HOST_DEVICE int64_t claims_offset() const { return waits_offset() + align_up(8ll * kNumDirections * num_ranks, kAlignment); }
    DEEPEP_HOST_DEVICE int64_t draws_offset() const { return claims_offset() + align_up(4ll * kNumDirections * kMaxBlocks, kAlignment); }
    DEEPEP_HOST_DEVICE int64_t arenas_offset() const { return draws_offset() + 2 * kNumDirections * kAlignment; }
    DEEPEP_HOST_DEVICE int64_t credits_offset() const { return arenas_offset() + align_up(8ll * num_ranks, kAlignment); }
    DEEPEP_HOST_DEVICE int64_t boxes_offset() const { return credits_offset() + align_up(8ll * kNumDirections * num_ranks, kAlignment); }

    DEEPEP_HOST_DEVICE int64_t num_boxes() const { return static_cast<int64_t>(has_outboxes ? 2 : 1) * kNumSlots * num_ranks; }
    DEEPEP_HOST_DEVICE int64_t num_weight_bytes() const { return num_part_bytes; }
    DEEPEP_HOST_DEVICE int64_t num_dispatch_bytes() const { return kDispatchShare * num_part_bytes; }
    DEEPEP_HOST_DEVICE int64_t num_combine_bytes() const { return combine_share * num_part_bytes; }
    DEEPEP_HOST_DEVICE int64_t num_rows_bytes(Direction direction) const { return direction == kDispatch ? num_dispatch_bytes() : num_combine_bytes(); }
    DEEPEP_HOST_DEVICE int64_t num_box_bytes() const { return 8 * kNumIndexWords + num_weight_bytes() + num_dispatch_bytes() + num_combine_bytes(); }
    DEEPEP_HOST_DEVICE int64_t num_bytes() const { return boxes_offset() + num_boxes() * num_box_bytes(); }
    // From a box to the outbox of the same slot and rank.
    DEEPEP_HOST_DEVICE int64_t outbox_distance() const { return kNumSlots * static_cast<int64_t>(num_ranks) * num_box_bytes(); }

    // Offsets into the box of `slot` and `writer`.
    DEEPEP_HOST_DEVICE int64_t index_offset(int slot, int writer) const {
        return boxes_offset() + (static_cast<int64_t>(slot) * num_ranks + writer) * num_box_bytes();
    }
    // A box begins with its index.
    DEEPEP_HOST_DEVICE int64_t weights_in_box() const { return 8 * kNumIndexWords; }
    DEEPEP_HOST_DEVICE int64_t rows_in_box(Direction direction) const {
        return weights_in_box() + num_weight_bytes() + (direction == kDispatch ? 0 : num_dispatch_bytes());
    }
    DEEPEP_HOST_DEVICE int64_t weights_offset(int slot, int writer) const { return index_offset(slot, writer) + weights_in_box(); }
    DEEPEP_HOST_DEVICE int64_t rows_offset(Direction direction, int slot, int writer) const { return index_offset(slot, writer) + rows_in_box(direction); }
};
static_assert(8 * kNumIndexWords % LowLatencyWindow::kAlignment == 0, "boxes stay aligned");

// The same places as numbers, worked out by the host: each of the sums above is a long chain of dependent instructions, and kernels need them
// many times for each row.
struct WindowOffsets {
    int32_t num_ranks;
    int64_t launches, sends, readers, sequences, consumed, broken, posted, granted, masked, verdicts, waits, claims, draws, arenas, credits, boxes;
    int64_t num_box_bytes, num_outbox_distance, num_index_bytes;
    int64_t rows[kNumDirections];  // in a box
    int64_t num_rows_total[kNumDirections];

    static WindowOffsets of(const LowLatencyWindow& window) {
        return {window.num_ranks,
                window.launches_offset(),
                window.sends_offset(),
                window.readers_offset(),
                window.sequences_offset(),
                window.consumed_offset(),
                window.broken_offset(),
                window.posted_offset(),
                window.granted_offset(),
                window.masked_offset(),
                window.verdicts_offset(),
                window.waits_offset(),
                window.claims_offset(),
                window.draws_offset(),
                window.arenas_offset(),
                window.credits_offset(),
                window.boxes_offset(),
                window.num_box_bytes(),
                window.outbox_distance(),
                window.weights_in_box(),
                {window.rows_in_box(kDispatch), window.rows_in_box(kCombine)},
                {window.num_rows_bytes(kDispatch), window.num_rows_bytes(kCombine)}};
    }

    DEEPEP_HOST_DEVICE int64_t launches_offset() const { return launches; }
    DEEPEP_HOST_DEVICE int64_t sends_offset() const { return sends; }
    DEEPEP_HOST_DEVICE int64_t readers_offset() const { return readers; }
    DEEPEP_HOST_DEVICE int64_t sequences_offset() const { return sequences; }
    DEEPEP_HOST_DEVICE int64_t consumed_offset() const { return consumed; }
    DEEPEP_HOST_DEVICE int64_t broken_offset() const { return broken; }
    DEEPEP_HOST_DEVICE int64_t posted_offset() const { return posted; }
    DEEPEP_HOST_DEVICE int64_t granted_offset() const { return granted; }
    DEEPEP_HOST_DEVICE int64_t masked_offset() const { return masked; }
    DEEPEP_HOST_DEVICE int64_t verdicts_offset() const { return verdicts; }
    DEEPEP_HOST_DEVICE int64_t waits_offset() const { return waits; }
    DEEPEP_HOST_DEVICE int64_t claims_offset() const { return claims; }
    DEEPEP_HOST_DEVICE int64_t draws_offset() const { return draws; }
    DEEPEP_HOST_DEVICE int64_t arenas_offset() const { return arenas; }
    DEEPEP_HOST_DEVICE int64_t credits_offset() const { return credits; }
    DEEPEP_HOST_DEVICE int64_t outbox_distance() const { return num_outbox_distance; }
    DEEPEP_HOST_DEVICE int64_t weights_in_box() const { return num_index_bytes; }
    DEEPEP_HOST_DEVICE int64_t rows_in_box(Direction direction) const { return rows[direction]; }
    DEEPEP_HOST_DEVICE int64_t num_rows_bytes(Direction direction) const { return num_rows_total[direction]; }
    DEEPEP_HOST_DEVICE int64_t index_offset(int slot, int writer) const { return boxes + (slot * num_ranks + writer) * num_box_bytes; }
    DEEPEP_HOST_DEVICE int64_t weights_offset(int slot, int writer) const { return index_offset(slot, writer) + weights_in_box(); }
    DEEPEP_HOST_DEVICE int64_t rows_offset(Direction direction, int slot, int writer) const { return index_offset(slot, writer) + rows_in_box(direction); }
};

// A credit word: for each slot the sequence (its lower 21 bits) of the message that was last taken from it.
constexpr int kCreditBits = 21;
constexpr uint32_t kCreditMask = (1u << kCreditBits) - 1;
DEEPEP_HOST_DEVICE constexpr uint64_t credit_of(uint32_t sequence, int slot) { return static_cast<uint64_t>(sequence & kCreditMask) << kCreditBits * slot; }
// The message of this sequence may be written: the one that lay in its slot has been taken.
DEEPEP_HOST_DEVICE constexpr bool grants(uint64_t credits, uint32_t sequence) {
    return sequence <= kNumSlots || (credits >> kCreditBits * (sequence % kNumSlots) & kCreditMask) == ((sequence - kNumSlots) & kCreditMask);
}

// The memory behind a handle's src_info, in int32 words.
//
//   src_info   [L, M]
//   meta       [32]: whether weights travelled
//   tokens     [N]: T of every source, -1 where it was left out or lost
//   ticket     [N]: the operation's sequence with every rank, 0 where it was left out
//   routes     [N, X, K]: row of x that belongs to the choice (local expert * M + row), -1 for none
//   weights    float32 [N, X, K]
struct HandleLayout {
    int32_t num_ranks;
    int32_t max_tokens;
    int32_t num_experts;
    int32_t num_topk;

    DEEPEP_HOST_DEVICE int64_t meta() const { return align_up(static_cast<int64_t>(num_experts) * max_tokens, 32); }
    DEEPEP_HOST_DEVICE int64_t tokens() const { return meta() + 32; }
    DEEPEP_HOST_DEVICE int64_t ticket() const { return tokens() + align_up(num_ranks, 32); }
    DEEPEP_HOST_DEVICE int64_t routes() const { return ticket() + align_up(num_ranks, 32); }
    DEEPEP_HOST_DEVICE int64_t weights() const { return routes() + align_up(static_cast<int64_t>(num_ranks) * max_tokens * num_topk, 32); }
    DEEPEP_HOST_DEVICE int64_t num_words() const { return weights() + align_up(static_cast<int64_t>(num_ranks) * max_tokens * num_topk, 32); }
};

// The same places as numbers.
struct HandleOffsets {
    int64_t meta_words, tokens_words, ticket_words, routes_words, weights_words;

    static HandleOffsets of(const HandleLayout& layout) { return {layout.meta(), layout.tokens(), layout.ticket(), layout.routes(), layout.weights()}; }

    DEEPEP_HOST_DEVICE int64_t meta() const { return meta_words; }
    DEEPEP_HOST_DEVICE int64_t tokens() const { return tokens_words; }
    DEEPEP_HOST_DEVICE int64_t ticket() const { return ticket_words; }
    DEEPEP_HOST_DEVICE int64_t routes() const { return routes_words; }
    DEEPEP_HOST_DEVICE int64_t weights() const { return weights_words; }
};

}  // namespace deepep::ibgda
