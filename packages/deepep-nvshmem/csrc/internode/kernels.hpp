#pragma once
// What each kernel across nodes is given, and how it is launched. The launch functions return CUDA's answer and decide nothing else.
//
// T tokens here, K choices, S scales per row, N ranks, D nodes, P = N / D ranks of a node, E experts, L = E / N, R rows received here, F rows that
// this rank forwards (those that its own tokens put on its own node included), by source node, then source token.
#include <cuda_runtime_api.h>

#include <cstdint>
#include <optional>

#include "deepep/layout/routing.hpp"
#include "deepep/layout/status.hpp"
#include "internode/window.hpp"
#include "kernels/kernels.hpp"

namespace deepep::internode {

using nvlink::IndexArray;

// Counters of this rank that no peer touches, besides DeviceState. All zero at the start.
struct PrivateState {
    uint32_t are_counts_good;   // of the newest notify: 1 or 0
    uint32_t dispatch_blocks;   // blocks of the running dispatch that have drawn a number
    uint32_t combine_blocks;
    uint32_t own_rows;          // next own row to push (dispatch)
    uint32_t own_tokens;        // next token to sum (combine)
    uint32_t padding[27];
};

// What the host needs from notify, in pinned memory. `ticket` is stored last, with release. Headers, uint32 [N][kNumHeaderWords], expert
// counts, int32 [max_local_experts], and masks of ranks, uint32 [2][ceil(N / 32)] (differing headers, impossible counts), follow it.
struct CountsSummary {
    uint32_t ticket;
    int32_t num_recv_tokens;
    int32_t num_forward_rows;
    uint32_t is_good;
};

// One rank's view of its node and of the network; the same for every kernel.
struct Domain {
    nvlink::Domain local;  // the node: its rank is this one's local rank. Errors and deadlines of all kernels: local.host, local.state()
    Group group;
    uint8_t* network;      // NVSHMEM memory of this rank, as NetworkWindow lays it out
    NetworkWindow window;
    int64_t num_chunk_bytes;
    uint64_t nodes_stored_to;  // the other nodes whose peer of this rank is reached by stores (over NVLink), a bit for each; beyond 64 none
    PrivateState* state;
    // Dispatch: what this rank expects next in each slot from each other node, {epoch, chunk + 1}, and which teams' deliverers have begun, {epoch, 1}.
    unsigned long long* next_chunks;  // [kMaxSlots][D - 1]
    uint64_t* deliverers_begun;       // a word for each SM, more than there are teams
    unsigned long long* collected;    // combine: whether somebody has taken it upon itself to collect for a place, {epoch, 1}; a word for each SM
    int32_t* histogram;  // [E + N + D], zero between calls of layout
    CountsSummary* host_counts;
    uint32_t* host_headers;  // [N][kNumHeaderWords]
    int32_t* host_experts;   // [max_local_experts]
    uint32_t* host_masks;    // [2][ceil(N / 32)]

    DEEPEP_HOST_DEVICE bool has_stores_to(int node) const { return node < 64 && (nodes_stored_to >> node & 1) != 0; }
    DEEPEP_HOST_DEVICE bool has_stores_to_all() const {
        for (int node = 0; node < group.num_nodes(); ++node)
            if (node != group.node() && !has_stores_to(node)) return false;
        return true;
    }
};

struct LayoutArgs {
    Domain domain;
    IndexArray topk_idx;  // [T, K]
    int64_t num_tokens;
    int num_topk;
    int num_experts;
    int32_t* num_tokens_per_rank;    // [N]
    int32_t* num_tokens_per_node;    // [D]
    int32_t* num_tokens_per_expert;  // [E]
    bool* is_token_in_rank;          // [T, N]
    int32_t* num_bad_indices;        // one, or null
};

// Parts of the handle that follow from the counts of all ranks.
struct HandlePrefixes {
    int32_t* rdma_channel_prefix;       // [D]: tokens to each node
    int32_t* gbl_channel_prefix;        // [N]: tokens to each rank
    int32_t* recv_rdma_channel_prefix;  // [D]: rows this rank forwards from each node
    int32_t* recv_rdma_rank_prefix;     // [D]: inclusive sums of those
    int32_t* recv_gbl_channel_prefix;   // [N]: first row of each source rank here
    int32_t* recv_gbl_rank_prefix;      // [N]: inclusive sums over source ranks of received rows
};

struct NotifyArgs {
    Domain domain;
    uint32_t status;
    uint32_t reason;
    uint32_t fields[kNumHeaderFields];
    int64_t num_tokens;
    int num_experts;
    int expert_alignment;
    const int32_t* num_tokens_per_rank;
    const int32_t* num_tokens_per_node;
    const int32_t* num_tokens_per_expert;
    const int32_t* num_bad_indices;   // or null
    HandlePrefixes prefixes;          // all null in a refused call
    int32_t* recv_tokens_per_expert;  // [L], or null
    uint32_t ticket;                  // 0: nothing for the host
};

// Which token goes where, once the counts are known.
struct PlanArgs {
    Domain domain;
    int64_t num_tokens;
    const bool* is_token_in_rank;  // [T, N]; null: a cached dispatch, tokens_to_node is built from send_rdma_head
    int32_t* send_rdma_head;       // [T, D]
    int32_t* dst_rows;             // [T, N]: row of the token at each rank, or -1
    int32_t* tokens_to_node;       // [D, T]: the i-th token that goes to each node
};

// Where the pieces of a row's side part lie in it: DispatchMessage's offsets, worked out once because they are asked for on the way of every row.
struct SideLayout {
    int32_t topk_idx;
    int32_t weights;
    int32_t heads;
    int32_t token;

    static SideLayout of(const DispatchMessage& message) {
        return {message.topk_idx_offset(), message.weights_offset(), message.heads_offset(), message.token_offset()};
    }
};

struct DispatchArgs {
    Domain domain;
    // what this rank sends
    const uint8_t* x;        // [T, row bytes]
    const uint32_t* scales;  // [T, S] with strides
    int num_scales;          // 0: no scales
    int64_t scales_stride_token;  // in elements
    int64_t scales_stride_col;
    IndexArray topk_idx;  // [T, K]
    const float* topk_weights;
    int64_t num_tokens;
    int num_topk;  // 0: no top-k indices and weights
    int num_experts;
    const int32_t* tokens_to_node;         // [D, T]
    const int32_t* dst_rows;               // [T, N]; null: a cached dispatch
    const int32_t* rdma_channel_prefix;    // [D]
    const int32_t* recv_rdma_rank_prefix;  // [D]
    const int32_t* recv_gbl_rank_prefix;   // [N]
    int32_t* send_nvl_head;                // [F, 8]: written by a fresh dispatch, read by a cached one
    int64_t num_forward_capacity;          // rows of it
    // what this rank receives, all in the arena
    uint8_t* recv_x;
    uint32_t* recv_scales;
    int64_t* recv_topk_idx;
    float* recv_topk_weights;
    int32_t* recv_src_meta;  // [R, 2]: source rank, source token; null in a cached dispatch
    int64_t capacity;
    bool fill_unused;
    // how
    DispatchMessage message;
    ChunkGeometry geometry;
    RowParts parts;  // of a row in shared memory
    bool use_bulk;
    bool loads_scales;  // a row's scales can be loaded in bulk
    bool stores_scales;  // likewise stored
    bool loads_heads;    // a cached dispatch's heads can be loaded in bulk
    SideLayout side;
    int stage_side;      // where a row's side part begins in a deliver warp's stage: directly behind a whole row, so that one bulk load brings both
    int num_stage_bytes;
    bool stores_side;    // lanes store some of a row's side part to its destinations
    bool writes_own_side;  // lanes write some of an own row's side part into its stage
    int num_own_side_bytes;   // of an own row, loaded in bulk
    int num_sent_side_bytes;  // of a forwarded row, likewise
    int num_local_experts;
    int num_team_senders;  // blocks that send for each one that delivers; 0: every block does both
    int num_places;        // parts of the slots, each served by one sender
    bool sends_directly;   // out of shared memory: in teams, where stores reach all peers
    int node;              // as the group says, without divisions in the kernel
    int num_nodes;
    uint64_t* full_words;    // of this rank's window: FULL and CREDIT from each node [D, kMaxSlots]
    uint64_t* credit_words;
    uint8_t* send_rings;     // and its rings
    uint8_t* receive_rings;
    int64_t num_slot_bytes;
    int num_deliver_warps;
    int num_send_warps;
    int num_stages;       // of each deliver warp
    int num_block_contexts;  // of all nodes in one block, at most
    int num_dynamic_bytes;

    // As Group::peer_of, without a division.
    DEEPEP_HOST_DEVICE int peer_of(int node) const { return node * message.num_heads + domain.local.rank; }
    // The slot of a ring that node `own` keeps for node `other`: NetworkWindow's send_ring and receive_ring.
    DEEPEP_HOST_DEVICE uint8_t* slot_in(uint8_t* rings, int own, int other, int slot) const {
        return rings + (other < own ? other : other - 1) * domain.window.num_ring_bytes + slot * num_slot_bytes;
    }
};

constexpr int kMaxAddendStages = 16;  // of a warp of combine

// The stages of the warps of a role in combine, and how rows are cut to fit into them.
struct StageShape {
    RowParts parts;
    int num_warps;
    int num_stages;  // of each; 0: there are none
    int num_stage_bytes;
};

struct CombineArgs {
    Domain domain;
    // what this rank owns, in the arena
    const uint8_t* x;           // [R, row bytes]
    const float* topk_weights;  // [R, K]
    int64_t num_recv_tokens;
    // what this rank forwards
    const int32_t* recv_rdma_rank_prefix;  // [D]
    const int32_t* send_nvl_head;          // [F, 8]
    int64_t num_forward_rows;              // F, or more (unused rows are -1)
    // what this rank collects
    const uint8_t* bias_0;  // [T, row bytes], or null
    const uint8_t* bias_1;
    const int32_t* send_rdma_head;  // [T, D]
    int64_t num_tokens;
    int num_topk;             // 0: no weights
    uint8_t* out;             // [T, row bytes]
    float* out_topk_weights;  // [T, K]
    // how
    CombineMessage message;
    ChunkGeometry geometry;
    bool has_teams;         // of a block that forwards and one that collects; else every block does both
    int num_places;         // parts of the slots, each with one block that forwards
    bool answers_directly;  // forwarders of teams put sums out of shared memory: they have bulk copies, and stores reach all peers
    bool loads_weights;     // which bring weights, too
    StageShape forward;     // of a forwarder that answers directly
    StageShape collect;     // of whoever collects; a block that forwards as well has as many warps for it as it can
    int num_slot_words;     // that whoever collects keeps of a slot
    int num_forward_warps;  // of a block that forwards and collects
    int num_block_contexts;  // of all nodes in one block, at most
    int num_work_bytes;      // of what differs between forwarders and collectors
    int num_dynamic_bytes;
};

// Shape limits of dispatch, for the host's choice.
constexpr int kMaxDeliverWarps = 14;
constexpr int kMaxDeliverStages = 8;    // of each
constexpr int kNumCreditWarps = 1;
constexpr int kMaxDispatchWarps = 16;  // of all roles together
constexpr int kMaxPlainSharedBytes = 92 * 1024;  // without bulk copies; every GPU from SM80 has as much

// What the caller asks of a kernel's shape; 0 means: choose.
struct Tuning {
    int num_sms;
    bool use_bulk;
    int num_warps;
    int num_stages;
    int num_send_warps;
    std::optional<int> num_team_senders = std::nullopt;  // the same on all ranks
    bool may_send_directly = true;
};

struct CombineTuning {
    int num_sms;
    int num_warps;   // that forward; 0: choose
    int num_stages;  // of each that answers directly; 0: choose
    int num_source_warps = 0;   // of a collector; 0: choose
    int num_source_stages = 0;  // of each; 0: choose
    std::optional<bool> has_teams = std::nullopt;  // the same on all ranks
    bool may_send_directly = true;
};

cudaError_t launch_layout(const LayoutArgs& args, cudaStream_t stream);
cudaError_t launch_counts(const NotifyArgs& args, cudaStream_t stream);
cudaError_t launch_plan(const PlanArgs& args, cudaStream_t stream);
cudaError_t launch_dispatch(const DispatchArgs& args, int num_sms, cudaStream_t stream);
cudaError_t launch_combine(const CombineArgs& args, int num_sms, cudaStream_t stream);

// Fill the fields under "how" (but message and geometry, which combine may make smaller) from the others; ArgumentError for what cannot be.
void shape_dispatch(DispatchArgs& args, const Tuning& tuning, bool has_bulk);
// `num_shared_bytes`: what a block may have in all.
void shape_combine(CombineArgs& args, const CombineTuning& tuning, int num_shared_bytes, bool has_bulk);

// Load the kernels of each file on the current device (lazy loading may not meet a spinning kernel) and raise their shared-memory limits.
cudaError_t prepare_layout();
cudaError_t prepare_counts();
cudaError_t prepare_plan();
cudaError_t prepare_dispatch(bool has_bulk);
cudaError_t prepare_combine(int num_shared_bytes);

#if DEEPEP_COUNT_PUTS
// What the kernels of this rank have handed to the network so far.
struct PutCounts {
    unsigned long long num_puts;   // each with a signal word
    unsigned long long num_bytes;  // of the puts, without the words
    unsigned long long num_words;  // set by themselves
};
cudaError_t read_put_counts(PutCounts& counts);  // of the current device; waits for nothing
#endif

#if DEEPEP_NVSHMEM_TRACE
// Clocks of a block's SM since it began: when the first and when the last of its warps came to a point, in the order of the enums below; and how many
// rows or chunks its warps moved.
constexpr int kMaxTracedBlocks = 256, kNumTracePoints = 6, kNumMovedKinds = 2, kNumSpanKinds = 7;
enum DispatchPoint : int { kHandshakeOver, kChunkSent, kSendingOver, kRowDelivered, kDeliveringOver, kCreditsOver };
enum CombinePoint : int { kCombineHandshakeOver, kAnswerSent, kForwardingOver, kBlockCollected, kCollectingOver, kRequestsOver };
enum MovedKind : int { kMovedBySenders, kMovedByReceivers };
// What the warps that move rows through stages spend their time on: finding work, asking for its bytes, waiting for them, passing them on; nothing.
// And of dispatch's chunks: from a chunk's put until its credit is seen, and from the last load of a chunk until its credit goes back.
enum SpanKind : int { kFinding, kLoading, kAwaiting, kPassing, kIdling, kUncredited, kCreditHeld };
struct BlockTrace {
    uint32_t firsts[kNumTracePoints];  // 0xFFFFFFFF: no warp came there
    uint32_t lasts[kNumTracePoints];
    uint32_t moved[kNumMovedKinds];
    uint32_t spans[kNumSpanKinds];  // sums over warps
    uint32_t ended;
    uint32_t number;  // in the order in which blocks began
    uint64_t begin_ns;  // the GPU's timer
    uint64_t end_ns;
    uint32_t begun;  // the SM's clock
};
cudaError_t copy_dispatch_traces(BlockTrace* out);  // of the current device, [kMaxTracedBlocks]
cudaError_t copy_combine_traces(BlockTrace* out);
#endif

// Some kernel of the image that holds NVSHMEM's device state.
const void* kernel_on_network();

}  // namespace deepep::internode
