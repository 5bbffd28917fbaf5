#pragma once
// Dispatch, arrivals: which chunks have come from other nodes. One warp of a block that delivers looks for them, claims them, and posts them to the block's deliver
// warps: looks take a way to the L2 cache and back, and an acquire empties the SM's L1 cache.
//
//   FULL  {epoch, chunk + 1}  sender -> forwarder, behind the chunk's bytes. Acquired before the chunk is posted.
// Who takes a chunk is settled in device memory, because two blocks may deliver for one place.
#include "internode/dispatch_streams.cuh"

namespace deepep::internode {
namespace {

// Chunks that have come, in shared memory. A context has one at a time: the next one comes only after this one's credit.
struct Arrivals {
    static constexpr int32_t kAllPosted = 1, kRelieved = 2;  // why the queue has ended

    int32_t* chunks;  // of each context: the chunk that was posted last
    WorkQueue queue;  // of contexts
};

class ArrivalWarp {
public:
    __device__ ArrivalWarp(const DispatchArgs& args, const WaitContext& context, const BlockContexts& contexts, const Arrivals& arrivals, const StreamShape* received)
        : args_(args), context_(context), contexts_(contexts), arrivals_(arrivals), received_(received), lane_(threadIdx.x % 32) {}

    // Looks once around all contexts and posts what has come. False: it has posted the last one, or waits in vain.
    __device__ bool look() {
        if (contexts_.places.role == BlockRole::kSender && is_relieved(contexts_, context_.epoch)) return end(Arrivals::kRelieved);
        const int count = contexts_.count();
        bool is_over = true, has_moved = false;
        Waiting waiting;
        Asked asked = ask(lane_);
        for (int index = lane_; index - lane_ < count; index += 32) {
            const Asked next = ask(index + 32);  // under way while these are taken
            const int chunk = chunk_of(index, asked.entry);
            const bool is_there = chunk >= 0 && asked.word == chunk_word(context_.epoch, chunk);
            is_over = is_over && !__any_sync(~0u, chunk >= 0);
            if (chunk >= 0 && !is_there) waiting = {args_.peer_of(contexts_.node_of(index)), asked.word, chunk_word(context_.epoch, chunk)};
            if (__any_sync(~0u, is_there)) {
                const bool is_mine = is_there && claim(index, asked.entry, chunk);
                has_moved = __any_sync(~0u, is_mine) || has_moved;
                arrivals_.queue.post(is_mine, index);
            }
            asked = next;
        }
        if (is_over) return end(Arrivals::kAllPosted);
        if (has_moved || !__any_sync(~0u, waiting.peer >= 0))
            patience_.renew();
        else if (is_exhausted(patience_, context_, Phase::kWindow, waiting))
            return end(Arrivals::kAllPosted);
        return true;
    }

    // No chunk will be posted any more.
    __device__ bool end(int32_t why) const {
        arrivals_.queue.end(why);
        return false;
    }

private:
    // An entry, and the word of its context. A word stays as it is until its chunk has been credited, so one that was read before its entry is at worst not there yet.
    struct Asked {
        unsigned long long entry;
        uint64_t word;
    };
    __device__ unsigned long long* entry(int index) const { return args_.domain.next_chunks + contexts_.entry_of(index); }
    __device__ Asked ask(int index) const {
        if (index >= contexts_.count()) return {0, 0};
        return {peek(entry(index)), ptx::load_relaxed_sys(contexts_.full_word(index))};
    }
    // The chunk that is expected in a context; -1: none any more. An entry of another operation stands for the first one.
    __device__ int chunk_of(int index, uint64_t entry) const {
        if (index >= contexts_.count()) return -1;
        const int named = static_cast<int>(signal_value(entry)) - 1;
        const int chunk = signal_epoch(entry) == context_.epoch && named >= 0 ? named : contexts_.slot_of(index);
        return chunk < received_[contexts_.node_of(index)].num_chunks ? chunk : -1;
    }
    // By one lane. The next chunk of the context comes only after this one's credit, so it may be named at once.
    __device__ bool claim(int index, unsigned long long seen, int chunk) const {
        if (atomicCAS(entry(index), seen, chunk_word(context_.epoch, chunk + args_.geometry.num_slots)) != seen) return false;
        static_cast<void>(ptx::load_acquire_sys(contexts_.full_word(index)));  // what the look has seen; it stays until this chunk is credited
        poke(arrivals_.chunks + index, chunk);
        return true;
    }

    const DispatchArgs& args_;
    const WaitContext& context_;
    const BlockContexts& contexts_;
    const Arrivals& arrivals_;
    const StreamShape* received_;
    const int lane_;
    Patience patience_;
};

}  // namespace
}  // namespace deepep::internode
