#pragma once
// What the two halves of combine share within a block.
#include "operation.cuh"
#include "row_formats.cuh"
#include "trace.cuh"

namespace deepep::ibgda {

struct CombineShared {
    Operation operation;
    int32_t num_tokens[kMaxWindowRanks];  // of every source; -1 where it takes no part, or took none in dispatch
    int32_t most_tokens;                  // of any source
    uint32_t has_weights;                 // they came with dispatch
    uint32_t has_resent;                  // this block has sent all of this rank's weights
};

// What the handle says about a lane's source; by the control warp. Loaded before the operation's state is waited for, noted afterwards.
struct HandleLane {
    int32_t num_tokens;
    int32_t has_weights;

    __device__ static HandleLane load(const CombineArgs& args) {
        const int rank = min(static_cast<int>(threadIdx.x) % 32, args.domain.num_ranks - 1);
        return {args.handle[args.handle_layout.tokens() + rank], args.handle[args.handle_layout.meta()]};
    }
    __device__ void note(const CombineArgs& args, CombineShared& shared) const {
        const int lane = static_cast<int>(threadIdx.x) % 32;
        int32_t most = 0;
#pragma unroll 1
        for (int rank = lane; rank < args.domain.num_ranks; rank += 32) {
            const int32_t count = rank == lane ? num_tokens : args.handle[args.handle_layout.tokens() + rank];
            const bool takes_part = shared.operation.sequences[rank] != 0 && count >= 0 && count <= args.max_tokens;
            shared.num_tokens[rank] = takes_part ? count : -1;
            most = max(most, takes_part ? count : 0);
        }
        most = __reduce_max_sync(kAllLanes, most);
        if (lane != 0) return;
        shared.most_tokens = most;
        shared.has_weights = has_weights != 0;
        shared.has_resent = 0;
    }
};

// Where a row lies in a box: one row for each token (ll_reduce = "rank"), or one for each choice.
template <bool kAtSource>
__device__ __forceinline__ int64_t slot_offset(const CombineArgs& args, int token, int choice) {
    return (kAtSource ? static_cast<int64_t>(token) * args.num_topk + choice : token) * args.row.stride();
}

}  // namespace deepep::ibgda
