#pragma once
// The end of dispatch: every rank tells every other one that its rows have landed, and hears the same from them.
#include "deepep/ptx/memory.cuh"
#include "deepep/sync/wait.cuh"
#include "kernels.hpp"

namespace deepep::nvlink {

constexpr uint32_t kDoneGood = 1, kDoneFailed = 2;

// By all threads of every block, when the block has finished; true in the block that finished last, once all ranks of the domain have finished.
// That block clears the operation's claims and then calls end_operation.
__device__ __forceinline__ bool exchange_done(const Domain& domain, const WaitContext& context, uint32_t& is_last) {
    __syncthreads();
    // The barrier joins the block's stores to thread 0; acq_rel arrivals join the blocks; the release below passes all of it to the peers.
    if (threadIdx.x == 0) is_last = ptx::add_acq_rel_gpu(&context.state->arrivals[static_cast<int>(context.op)], 1) == gridDim.x - 1;
    __syncthreads();
    if (!is_last) return false;
    if (static_cast<int>(threadIdx.x) < domain.num_ranks) {
        const int peer = threadIdx.x;
        const uint32_t outcome = has_failed(context) ? kDoneFailed : kDoneGood;
        ptx::store_release_sys(domain.window.done(domain.arenas[peer], context.op, domain.rank), signal_word(context.epoch, outcome));
        const uint64_t* word = domain.window.done(domain.arenas[domain.rank], context.op, peer);
        uint32_t value = 0;
        // Acquires the peer's rows for whatever follows this kernel.
        if (wait_signal<true>(context, word, context.epoch, Phase::kDone, peer, &value) && value != kDoneGood)
            report_error(context, ErrorKind::kPeerFailed, Phase::kDone, peer, value, kDoneGood, 0);
    }
    __syncthreads();
    return true;
}

// By one thread.
__device__ __forceinline__ void end_operation(const WaitContext& context) {
    ptx::store_relaxed_gpu(&context.state->arrivals[static_cast<int>(context.op)], 0);
    ptx::store_relaxed_gpu(&context.state->epochs[static_cast<int>(context.op)], context.epoch);
}

}  // namespace deepep::nvlink
