#pragma once
// Weights that did not travel with dispatch: combine sends them to the ranks of their choices first.
#include "combine_shared.cuh"

namespace deepep::ibgda {

// A weight that did not travel with dispatch: it goes to the rank of its choice, as a signal word of the operation's sequence.
struct Weight {
    int64_t expert;
    float value;

    __device__ static Weight load(const CombineArgs& args, int i) { return {args.topk_idx[i], args.topk_weights[i]}; }
    template <bool kRemote>
    __device__ void send(const CombineArgs& args, const Operation& operation, int i) const {
        const Domain& domain = args.domain;
        if (expert < 0 || expert >= args.num_experts) return;
        const int rank = static_cast<int>(args.plan.by_num_local_experts.quotient(static_cast<uint32_t>(expert)));
        const uint32_t sequence = operation.sequences[rank];
        if (sequence == 0 || is_remote<kRemote>(domain, rank) || (args.plan.has_own_weights && rank == domain.rank)) return;
        ptx::store_relaxed_sys(outgoing_weights(domain, operation, kCombine, rank) + i, signal_word(sequence, __float_as_uint(value)));
    }
};

// Remote ranks get all weights, in one work request each. By a warp.
__device__ __noinline__ inline void post_weights(const CombineArgs& args, const Operation& operation) {
    const Domain& domain = args.domain;
    const int num_weights = args.num_tokens * args.num_topk, lane = static_cast<int>(threadIdx.x) % 32;
#pragma unroll 1
    for (int rank = 0; rank < domain.num_ranks; ++rank) {
        const uint32_t sequence = operation.sequences[rank];
        if (sequence == 0 || !domain.remote.has(rank) || num_weights == 0) continue;
        uint64_t* table = outgoing_weights(domain, operation, kCombine, rank);
#pragma unroll 1
        for (int i = lane; i < num_weights; i += 32) ptx::store_relaxed_sys(table + i, signal_word(sequence, __float_as_uint(args.topk_weights[i])));
        __syncwarp();
        if (lane == 0) post_outgoing(domain, operation, kCombine, rank, reinterpret_cast<uint8_t*>(table), 8u * static_cast<uint32_t>(num_weights));
    }
}

// Weights [begin, end) of this rank's, by a warp. `first`: the one of this lane, loaded before.
template <bool kRemote>
__device__ __forceinline__ void send_weights(const CombineArgs& args, const Operation& operation, int begin, int end, Weight first) {
    const int lane = static_cast<int>(threadIdx.x) % 32;
#pragma unroll 1
    for (int i = begin + lane; i < end; i += 32) {
        const Weight weight = i == begin + lane ? first : Weight::load(args, i);
        weight.send<kRemote>(args, operation, i);
    }
    if (kRemote && begin == 0) post_weights(args, operation);
}

// The shares of this rank's own weights may belong to blocks that are not resident, and the peer may wait for them: a block that waits for
// long sends all of them once (storing a word again changes nothing). `start`: of the wait.
template <bool kRemote>
__device__ __noinline__ void resend_weights(const CombineArgs& args, CombineShared& shared, uint32_t start) {
    const int lane = static_cast<int>(threadIdx.x) % 32, num_weights = args.num_tokens * args.num_topk;
    int is_first = 0;
    if (lane == 0 && start != 0 && coarse_time() - start >= kPatience) is_first = atomicExch(&shared.has_resent, 1u) == 0;
    if (__shfl_sync(kAllLanes, is_first, 0) == 0) return;
    send_weights<kRemote>(args, shared.operation, 0, num_weights, lane < num_weights ? Weight::load(args, lane) : Weight{-1, 0});
}

}  // namespace deepep::ibgda
