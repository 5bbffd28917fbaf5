#pragma once
// What each kernel is given, and how it is launched. The launch functions return CUDA's answer and decide nothing else.
#include <cuda_runtime_api.h>

#include <cstdint>

#include "remote_peers.hpp"
#include "window.hpp"

namespace deepep::ibgda {

// A block's warps: those that send, then those that receive.
constexpr int kSendWarps = 8, kReceiveWarps = 8;
constexpr int kNumWarps = kSendWarps + kReceiveWarps;
constexpr int kNumSendThreads = 32 * kSendWarps, kNumReceiveThreads = 32 * kReceiveWarps;
constexpr int kNumThreads = kNumSendThreads + kNumReceiveThreads;

// Large batches divide the roles among blocks: the first half only sends to other ranks, the second half receives. An SM's loads queue up behind its own
// stores while those wait for room on the links, so a block that does both receives at full speed only once everything is sent. Half of 128 SMs fill the
// links; with few blocks every one is needed for that. With one peer a rank's own rows are half of the work and the links half as busy: among two H200s, 128
// tokens of 7168, undivided blocks dispatch in 11.3 us where divided ones take 14.8 (benchmarks/results/2026-11-21-h200-x2).
// One resident block is enough all the same: senders wait for no rows and end, receivers do their own share and then those that nobody has taken up.
constexpr int kLeastDividedBlocks = 96, kLeastDividedRanks = 3;

enum OperationPhase : int { kSend = 1, kReceive = 2 };

// Divides by a number that the host knows.
struct Divisor {
    uint32_t divisor;
    uint32_t inverse;  // 2^32 / divisor, rounded down

    static Divisor of(uint32_t divisor) { return {divisor, static_cast<uint32_t>(min_of((1ll << 32) / divisor, 0xffffffffll))}; }

#if defined(__CUDACC__)
    // Exact: without the correction the quotient is at most one too small.
    __device__ uint32_t quotient(uint32_t n, uint32_t* rest) const {
        uint32_t q = __umulhi(n, inverse);
        *rest = n - q * divisor;
        if (*rest >= divisor) {
            *rest -= divisor;
            ++q;
        }
        return q;
    }
    __device__ uint32_t quotient(uint32_t n) const {
        uint32_t rest;
        return quotient(n, &rest);
    }
#endif
};

// One rank's view of the group; the same for every kernel.
struct Domain {
    int rank;
    int num_ranks;
    bool reduces_at_source;  // ll_reduce = "expert"
    bool enable_shrink;
    bool is_programmatic;  // kernels wait for the kernels before them themselves
    int least_divided_blocks;
    uint8_t* own;  // this rank's arena
    WindowOffsets window;
    HostControl* host;  // pinned, this rank's
    RemotePeers remote;

    // The blocks that only send; 0: every block does both.
    int num_sending_blocks(int num_blocks, bool is_large_batch) const {
        return is_large_batch && num_blocks >= least_divided_blocks && num_ranks >= kLeastDividedRanks ? num_blocks / 2 : 0;
    }

#if defined(__CUDACC__)
    template <class T>
    __device__ T* at(int64_t offset) const {
        return reinterpret_cast<T*>(own + offset);
    }
    __device__ DeviceState* state() const { return at<DeviceState>(0); }
    __device__ uint32_t* launches(Direction direction) const { return at<uint32_t>(window.launches_offset()) + direction; }
    __device__ uint32_t* sends(Direction direction) const { return at<uint32_t>(window.sends_offset()) + direction; }
    __device__ uint32_t* readers(Direction direction) const { return at<uint32_t>(window.readers_offset()) + direction; }
    __device__ uint32_t* sequence(Direction direction, int peer) const {
        return at<uint32_t>(window.sequences_offset()) + direction * num_ranks + peer;
    }
    __device__ uint32_t* consumed(Direction direction, int slot, int peer) const {
        return at<uint32_t>(window.consumed_offset()) + (direction * kNumSlots + slot) * num_ranks + peer;
    }
    __device__ uint32_t* broken(Direction direction, int slot, int peer) const {
        return at<uint32_t>(window.broken_offset()) + (direction * kNumSlots + slot) * num_ranks + peer;
    }
    __device__ uint64_t* posted(Direction direction, int peer) const {
        return at<uint64_t>(window.posted_offset()) + direction * num_ranks + peer;
    }
    __device__ uint64_t* granted(Direction direction, int peer) const {
        return at<uint64_t>(window.granted_offset()) + direction * num_ranks + peer;
    }
    __device__ uint32_t* masked(int peer) const { return at<uint32_t>(window.masked_offset()) + peer; }
    __device__ uint32_t* verdict(int peer) const { return at<uint32_t>(window.verdicts_offset()) + peer; }
    __device__ uint64_t* longest_wait(Direction direction, int peer) const {
        return at<uint64_t>(window.waits_offset()) + direction * num_ranks + peer;
    }
    __device__ uint32_t* claims(Direction direction) const { return at<uint32_t>(window.claims_offset()) + direction * kMaxBlocks; }
    // Of the kernel that is the num_sends-th to send.
    __device__ uint32_t* draws(Direction direction, uint32_t num_sends) const {
        return at<uint32_t>(window.draws_offset() + (2 * direction + static_cast<int>(num_sends % 2)) * LowLatencyWindow::kAlignment);
    }
    __device__ uint64_t* arena_word(int peer) const { return at<uint64_t>(window.arenas_offset()) + peer; }
    // Written by `writer`, in the arena given.
    __device__ uint64_t* credits(uint8_t* arena, Direction direction, int writer) const {
        return reinterpret_cast<uint64_t*>(arena + window.credits_offset()) + direction * num_ranks + writer;
    }
    __device__ uint64_t* index(uint8_t* arena, uint32_t sequence, int writer) const {
        return reinterpret_cast<uint64_t*>(arena + window.index_offset(static_cast<int>(sequence % kNumSlots), writer));
    }
    __device__ uint64_t* weights(uint8_t* arena, uint32_t sequence, int writer) const {
        return reinterpret_cast<uint64_t*>(arena + window.weights_offset(static_cast<int>(sequence % kNumSlots), writer));
    }
    __device__ uint8_t* rows(uint8_t* arena, Direction direction, uint32_t sequence, int writer) const {
        return arena + window.rows_offset(direction, static_cast<int>(sequence % kNumSlots), writer);
    }
#endif
};

// Indices arrive as 32 or 64-bit integers.
struct IndexArray {
    const void* data;
    int bits;

#if defined(__CUDACC__)
    __device__ int64_t operator[](int64_t i) const { return bits == 64 ? static_cast<const int64_t*>(data)[i] : static_cast<const int32_t*>(data)[i]; }
    // -1 for what names no expert.
    __device__ static int32_t checked(int64_t index, int num_experts) { return index >= 0 && index < num_experts ? static_cast<int32_t>(index) : -1; }
    __device__ int32_t expert(int64_t i, int num_experts) const { return checked((*this)[i], num_experts); }
#endif
};

// How the work of a dispatch is cut up. By launch_dispatch.
struct DispatchPlan {
    int parts_log2;         // tokens are sent in so many parts, by as many blocks
    int num_units;          // parts of all tokens
    int num_part_segments;  // of a row
    int num_segments;
    Divisor by_local_experts, by_ranks, by_index_words;
    int num_sending_blocks;  // blocks that only send; the others then only receive. 0: every block does both
    int num_shares;          // blocks that send
};

struct DispatchArgs {
    Domain domain;
    int phases;
    // what this rank sends
    const uint8_t* x;  // bf16 [T, H]
    IndexArray topk_idx;  // [T, K]
    const float* topk_weights;  // [T, K], or null
    int num_tokens;
    // the shape, alike on every rank
    int hidden;
    int num_topk;
    int max_tokens;
    int num_experts;
    int num_local_experts;
    bool use_fp8;
    bool round_scale;
    bool use_ue8m0;
    bool has_weights;
    uint32_t checksum;  // of these numbers
    RowOffsets message;
    // what this rank receives
    uint8_t* recv_x;        // [L, M, payload bytes], or null
    uint32_t* recv_scales;  // [L, scale words, M]
    int32_t* recv_count;    // [L]
    int64_t* layout_range;  // [L, N]
    int32_t* handle;        // HandleLayout
    HandleOffsets handle_layout;
    int32_t* cumulative_stats;  // [L], or null
    int64_t* wait_stats;        // [N], or null
    DispatchPlan plan;
};

// What follows from the shape and the number of blocks; worked out by the host.
struct CombinePlan {
    // A row is cut into parts, which one warp takes at once (32 lanes, some columns each); the last one may be shorter.
    int num_parts;
    Divisor by_num_parts;
    Divisor by_num_local_experts;
    int num_expert_rows;    // of x
    // Blocks that only send; the others then send the own rank's rows only, and receive. 0: every block does both.
    int num_sending_blocks;
    uint32_t slot_stride;   // bytes from row to row in a box
    // sending
    bool adds_own;          // rows of the own rank stay out of this: the receiving warps add them up from x themselves
    bool has_own_weights;   // the own rank's need not travel
    int num_sources;        // ranks that get rows from here
    Divisor by_num_sources;
    int turn_shift;         // every 1 << turn_shift tokens the order of sources moves on by one, so that each share has rows for all
    int chunk_shift;        // a share takes a 1 << chunk_shift-th of a row at a time,
    int num_chunk_parts;    // that is so many parts
    int num_dealt;          // pieces of rows that each warp of a block that only sends gets with its share; it draws the others. 0: nothing is drawn
    int num_pieces;         // of a row: combine_draw.cuh
    Divisor by_num_pieces;
    int choice_shift;       // 1 << choice_shift lanes of a warp hold the choices of a row
    int num_share_weights;  // of this rank's weights, sent by each share
};

struct CombineArgs {
    Domain domain;
    int phases;
    // what this rank sends
    const uint8_t* x;  // bf16 [L * M, row bytes]
    int64_t num_row_bytes;
    const int32_t* handle;
    HandleOffsets handle_layout;
    uint32_t* ticket;  // [N], or null where one kernel does both
    // what this rank collects
    IndexArray topk_idx;
    const float* topk_weights;  // [T, K]
    int num_tokens;
    uint8_t* out;  // bf16 [T, H], or null
    int64_t* wait_stats;
    // the shape
    int hidden;
    int num_topk;
    int max_tokens;
    int num_experts;
    int num_local_experts;
    bool use_logfmt;
    CombineRow row;
    CombinePlan plan;
};

cudaError_t launch_dispatch(DispatchArgs args, int num_blocks, cudaStream_t stream);
cudaError_t launch_combine(const CombineArgs& args, int num_blocks, cudaStream_t stream);

// Loads the kernels of each file on the current device: lazy loading may not meet a spinning kernel. `is_programmatic` becomes false if one of
// them cannot be launched before the kernel before it has ended.
cudaError_t prepare_dispatch(bool* is_programmatic);
cudaError_t prepare_combine(bool* is_programmatic);

#if defined(DEEPEP_LL_TRACE)
// uint32 [kMaxBlocks][14]: trace.cuh.
cudaError_t copy_dispatch_stamps(uint32_t* out);
cudaError_t copy_combine_stamps(uint32_t* out);
#endif

bool is_sm90_compiled();

}  // namespace deepep::ibgda
