#pragma once
// How kernels reach a peer outside the NVLink domain: work requests, posted by single threads. Nothing else touches such a peer's memory.
//
// Whoever posts has stored the bytes itself, or a block barrier has joined it to those that have. No fence is needed between: the doorbell is
// a release at system scope (queue_pair.hpp), so the NIC reads what was there before the barrier.
//
// Requests for one (peer, lane) land in the order in which they were posted; between lanes there is no order.
//
// Functions that post return false when they could not; an error record then names the peer, and the operation is marked as failed. They are
// not inlined: a kernel that holds them for rare peers keeps its registers for what it does all the time.
#include <cstdint>

#include "deepep/sync/wait.cuh"
#include "remote_peers.hpp"

namespace deepep::ibgda {

// Gives up with the operation: at its deadline, when the host aborts it, or when another wait of it has ended badly.
struct PostingWait {
    const WaitContext& context;
    int peer;
    uint64_t number;
    uint64_t start_ns = 0;
    int num_looks = 0;

    __device__ rdma::WaitVerdict operator()() {
        // Most looks in vain read across PCIe already; the host's page is read more rarely.
        if (++num_looks % 16 != 0) return rdma::WaitVerdict::kGoOn;
        return wait_is_hopeless(context, Phase::kPost, peer, 0, number, &start_ns) ? rdma::WaitVerdict::kTimeout : rdma::WaitVerdict::kGoOn;
    }
};

// Says that a queue pair has failed; a wait that gave up has said so itself.
__device__ __noinline__ inline bool passed(const WaitContext& context, const rdma::QueuePair& pair, const rdma::QueueStatus& status) {
    if (status.ok()) return true;
    if (status.outcome == rdma::Outcome::kTimeout || status.outcome == rdma::Outcome::kAborted) return false;
    const uint64_t failure = rdma::pack_failure(status.outcome, status.syndrome, status.vendor_syndrome, status.request);
    report_error(context, ErrorKind::kPeerFailed, Phase::kPost, pair.peer, failure, pair.number, 0);
    mark_failed(context);
    return false;
}

// Posts one request, which `write(slot, place)` fills in.
template <class Write>
__device__ __forceinline__ bool post_one(const WaitContext& context, const rdma::QueuePair& pair, const Write& write) {
    PostingWait wait{context, pair.peer, pair.number};
    uint64_t begin = 0;
    rdma::QueueStatus status = rdma::reserve(pair, 1, wait, &begin);
    if (status.ok()) {
        write(pair.slot(begin), pair.place(begin, true));
        status = rdma::submit(pair, begin, 1, wait);
    }
    return passed(context, pair, status);
}

// Writes bytes of this rank's memory to the peer's. They may be overwritten once the peer has answered to them (its credit), or when
// wait_posted has returned.
__device__ __noinline__ inline bool post_write(const RemotePeers& remote, const WaitContext& context, int peer, int lane, int64_t local_offset,
                                               int64_t remote_offset, uint32_t num_bytes) {
    const rdma::QueuePair pair = remote.view.queue_pair(peer, lane);
    const rdma::MemoryKeys target = remote.view.remote[peer];
    while (num_bytes != 0) {  // once, unless the bytes cross a seam between keys
        const int64_t num_contiguous = min_of(remote.view.local.contiguous(local_offset), target.contiguous(remote_offset));
        const uint32_t num_now = num_contiguous < num_bytes ? static_cast<uint32_t>(num_contiguous) : num_bytes;
        const bool is_posted = post_one(context, pair, [&](rdma::WqeBlock* slot, const rdma::WqePlace& place) {
            rdma::write_rdma_write(slot, place, remote.view.local.at(local_offset), target.at(remote_offset), num_now);
        });
        if (!is_posted) return false;
        local_offset += num_now;
        remote_offset += num_now;
        num_bytes -= num_now;
    }
    return true;
}

// Writes 1 to kMaxInlineWords words to 4-byte aligned memory that one key covers. The request holds them; `words` are free on return.
__device__ __noinline__ inline bool post_inline(const RemotePeers& remote, const WaitContext& context, int peer, int lane,
                                                int64_t remote_offset, const uint32_t* words, uint32_t num_words) {
    const rdma::QueuePair pair = remote.view.queue_pair(peer, lane);
    const rdma::Location target = remote.view.remote[peer].at(remote_offset);
    return post_one(context, pair, [&](rdma::WqeBlock* slot, const rdma::WqePlace& place) {
        rdma::write_inline(slot, place, target, words, num_words * 4);
    });
}

// Adds to 8 aligned bytes of the peer's memory; what was there before lands in 8 bytes of this rank's memory.
__device__ __noinline__ inline bool post_add(const RemotePeers& remote, const WaitContext& context, int peer, int lane, int64_t result_offset,
                                             int64_t remote_offset, uint64_t addend) {
    const rdma::QueuePair pair = remote.view.queue_pair(peer, lane);
    const rdma::Location target = remote.view.remote[peer].at(remote_offset);
    return post_one(context, pair, [&](rdma::WqeBlock* slot, const rdma::WqePlace& place) {
        rdma::write_atomic_add(slot, place, remote.view.local.at(result_offset), target, addend);
    });
}

// Waits until everything that this rank has posted on the queue pair is complete: the NIC reads none of it any more.
__device__ __noinline__ inline bool wait_posted(const RemotePeers& remote, const WaitContext& context, int peer, int lane) {
    const rdma::QueuePair pair = remote.view.queue_pair(peer, lane);
    PostingWait wait{context, pair.peer, pair.number};
    return passed(context, pair, rdma::wait_completed(pair, rdma::load_acquire_gpu(&pair.state->ready), wait));
}

// Called by one warp, once per operation: who never waits for completions would not hear that a queue pair has failed. Returns a peer whose
// queue pair has failed, the same on all lanes of the warp, and -1 when all are healthy.
__device__ __noinline__ inline int poll_all(const RemotePeers& remote, const WaitContext& context) {
    const int num_pairs = remote.view.num_peers * remote.view.num_queue_pairs;
    int failed_peer = -1;
    for (int i = static_cast<int>(threadIdx.x % 32); i < num_pairs && failed_peer < 0; i += 32) {
        const rdma::QueuePair pair = remote.view.queue_pairs[i];
        if (pair.depth == 0) continue;
        if (!passed(context, pair, rdma::poll(pair))) failed_peer = pair.peer;
    }
    const unsigned failed = __ballot_sync(0xffffffffu, failed_peer >= 0);
    return failed == 0 ? -1 : __shfl_sync(0xffffffffu, failed_peer, __ffs(static_cast<int>(failed)) - 1);
}

}  // namespace deepep::ibgda
