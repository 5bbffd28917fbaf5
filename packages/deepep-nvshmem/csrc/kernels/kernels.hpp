#pragma once
// What each kernel is given, and how it is launched. The launch functions return CUDA's answer and decide nothing else.
#include <cuda_runtime_api.h>

#include <cstdint>

#include "deepep/layout/routing.hpp"
#include "deepep/layout/status.hpp"
#include "deepep/layout/window.hpp"

namespace deepep::nvlink {

// One rank's view of the domain; the same for every kernel.
struct Domain {
    int rank;
    int num_ranks;
    uint8_t* arenas[kMaxRanks];  // every rank's arena as mapped here; [rank] is the own one
    int64_t num_arena_bytes;
    NormalWindow window;
    HostControl* host;      // pinned, this rank's
    int32_t* host_experts;  // pinned, [max_local_experts]

#if defined(__CUDACC__)
    __device__ DeviceState* state() const { return window.state(arenas[rank]); }
#endif
};

// Indices arrive as 32 or 64-bit integers.
struct IndexArray {
    const void* data;
    int bits;

#if defined(__CUDACC__)
    __device__ int64_t operator[](int64_t i) const {
        return bits == 64 ? static_cast<const int64_t*>(data)[i] : static_cast<const int32_t*>(data)[i];
    }
#endif
};

struct LayoutArgs {
    Domain domain;
    IndexArray topk_idx;  // [T, K]
    int64_t num_tokens;
    int num_topk;
    int num_experts;
    int32_t* num_tokens_per_rank;    // [N]
    int32_t* num_tokens_per_expert;  // [E]
    bool* is_token_in_rank;          // [T, N]
    int32_t* num_bad_indices;        // one, or null
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
    const int32_t* num_tokens_per_expert;
    const bool* is_token_in_rank;
    const int32_t* num_bad_indices;   // or null
    int32_t* rank_prefix;             // [N, N]
    int32_t* first_rows;              // [N], or null: first row of each source at this rank
    int32_t* send_head;               // [T, N]
    int32_t* recv_tokens_per_expert;  // [L], or null
    uint32_t ticket;                  // 0: nothing for the host
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
    bool has_src_idx;
    int num_local_experts;
    const int32_t* rank_prefix;  // [N, N]
    const int32_t* send_head;    // [T, N]
    // what this rank receives
    uint8_t* recv_x;
    uint32_t* recv_scales;
    int64_t* recv_topk_idx;
    float* recv_topk_weights;
    int32_t* recv_src_idx;
    int64_t capacity;
    bool fill_unused;
    bool is_staged;  // the outputs are not in the arena
    // how
    RowParts parts;
    bool use_bulk;
    bool use_bulk_scales;  // scale rows travel with the row's first part
    bool gathers_scales;   // their elements do not lie in rows that a bulk copy can read
    int num_push_warps;
    int num_side_warps;
    int num_stages;
    int num_stage_bytes;
    RowParts staged_parts;   // of a row in the staging window
    int num_staging_lanes;   // rows that each staging warp carries at once
    int num_lane_bytes;      // shared memory of each
    int num_dynamic_bytes;   // shared memory
};

struct CombineArgs {
    Domain domain;
    // what this rank owns
    const uint8_t* y;           // [R, row bytes]
    const float* topk_weights;  // [R, K]
    int64_t num_recv_tokens;
    bool is_staged;  // y or the weights are not in the arena, and there is no relay
    uint8_t* relay;  // [R, row bytes] in the arena, where y is copied for the peers; null: they read y itself, or get it staged
    // what this rank collects
    const uint8_t* bias_0;  // [T, row bytes], or null
    const uint8_t* bias_1;
    const int32_t* rank_prefix;
    const int32_t* send_head;  // [T, N]
    int64_t num_tokens;
    int num_topk;             // 0: no weights
    uint8_t* out;             // [T, row bytes]
    float* out_topk_weights;  // [T, K]
    // how
    RowParts parts;
    bool use_bulk;
    int num_stages;
    int num_stage_row_bytes;
    int num_load_warps;
    int num_push_warps;     // warps that push (staged: one for each other rank) or relay, else 0
    int num_staging_lanes;  // rows that each of them carries at once
    int num_lane_bytes;     // shared memory of each
    int num_push_bytes;     // of all of them; or what relay warps copy through
    int num_dynamic_bytes;  // shared memory
};

struct FabricArgs {
    int rank;
    int num_ranks;
    uint8_t* arenas[kMaxRanks];
    uint8_t* local;
    int64_t num_rows;
    int num_row_bytes;
    int num_warps;
    int num_stages;
};

// Shape limits of the kernels, for the host's choice.
constexpr int kMaxPushWarps = 12;   // of dispatch
constexpr int kMaxPushStages = 8;   // of each
constexpr int kMaxDispatchWarps = 20;  // push and side warps together
constexpr int kMaxStagingLanes = 8;
constexpr int kMaxPullStages = 16;  // of combine
constexpr int kMaxLoadWarps = 4;
constexpr int kNumRelayWarps = kMaxRanks - 1;
constexpr int kRelayBatch = 8;  // vectors that a lane of a relay warp has under way twice
constexpr int kRelayWarpBytes = 2 * kRelayBatch * 32 * 16;
constexpr int kMaxSharedBytes = 232448;  // what a block may have on SM90 and SM100; smaller devices use no bulk copies

cudaError_t launch_layout(const LayoutArgs& args, cudaStream_t stream);
cudaError_t launch_notify(const NotifyArgs& args, cudaStream_t stream);
cudaError_t launch_dispatch(const DispatchArgs& args, int num_sms, cudaStream_t stream);
cudaError_t launch_combine(const CombineArgs& args, int num_sms, cudaStream_t stream);
enum class FabricDirection { kPush, kPull, kPushStore };
cudaError_t launch_fabric(const FabricArgs& args, FabricDirection direction, int num_sms, cudaStream_t stream);

// Loads the kernels of each file on the current device (lazy loading may not meet a spinning kernel) and raises their shared-memory limits.
cudaError_t prepare_layout();
cudaError_t prepare_notify();
cudaError_t prepare_dispatch(bool has_bulk);
cudaError_t prepare_combine(bool has_bulk);

// Whether this build has the kernels' bulk copies.
constexpr bool is_sm90_compiled() {
#if defined(DISABLE_SM90_FEATURES)
    return false;
#else
    return true;
#endif
}

}  // namespace deepep::nvlink
