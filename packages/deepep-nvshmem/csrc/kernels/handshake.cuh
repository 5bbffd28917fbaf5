#pragma once
// The start of dispatch and combine: every rank tells every other one where its memory for this operation lies, and reads the same from them.
#include "deepep/ptx/memory.cuh"
#include "deepep/sync/wait.cuh"
#include "kernels.hpp"

namespace deepep::nvlink {

// What one peer grants, checked against its arena.
struct Grant {
    bool is_staged;
    bool is_relayed;  // combine: rows appear at their place during the operation, chunk by chunk
    int64_t num_rows;         // that may be reached directly; 0 when the peer did not answer or granted nonsense
    int64_t num_staged_rows;  // that go through the staging window
    uint8_t* rows;
    uint8_t* scales;
    uint8_t* topk_idx;
    uint8_t* weights;
    uint8_t* src_idx;
};

struct Handshake {
    uint32_t words[kMaxRanks][kReadyStride];
    Grant grants[kMaxRanks];
    uint32_t is_failed;
    uint32_t has_staged;  // some rank (this one included) uses its staging window
};

// Bytes per row of each granted piece, for the bounds check; 0 where the operation does not use it.
struct GrantSizes {
    int64_t rows, scales, topk_idx, weights, src_idx;
};

__device__ __forceinline__ uint8_t* granted(const Domain& domain, int peer, const uint32_t* words, int word, int64_t num_rows,
                                            int64_t num_unit_bytes, bool* is_good) {
    const int64_t offset = join_halves(words[word], words[word + 1]);
    if (num_unit_bytes == 0) return nullptr;
    *is_good = *is_good && offset % 16 == 0 &&
               (num_rows == 0 || extent_fits(offset, num_rows, num_unit_bytes, domain.window.num_bytes(), domain.num_arena_bytes));
    return domain.arenas[peer] + offset;
}

// This rank's record: the pieces of its outputs or inputs, in the order of GrantSizes.
struct OwnGrant {
    ReadyKind kind;
    int64_t num_rows;
    uint8_t* pointers[5];
    const uint8_t* arena;

    __device__ uint32_t word(int index) const {
        if (index == kReadyKind) return kind;
        if (index == kReadyNumRows) return static_cast<uint32_t>(num_rows);
        const uint8_t* pointer = pointers[(index - kReadyRows) / 2];
        const int64_t offset = kind == kKindStaged || pointer == nullptr ? 0 : pointer - arena;
        return (index - kReadyRows) % 2 == 0 ? low_half(offset) : high_half(offset);
    }
};

// Called by all threads of every block (posting twice changes nothing, and no block then depends on another one being resident).
// Returns with the grants in shared memory and the block in step.
__device__ __forceinline__ void exchange_grants(const Domain& domain, const WaitContext& context, Handshake& shared, const GrantSizes& sizes,
                                                const OwnGrant& own) {
    const int num_words = domain.num_ranks * kNumReadyWords;
    if (threadIdx.x == 0) shared.is_failed = shared.has_staged = 0;
    // What this stream did before this kernel (readers of recycled outputs, writers of y) happened before the record.
    for (int i = threadIdx.x; i < num_words; i += blockDim.x) {
        if (i == static_cast<int>(threadIdx.x)) ptx::fence_acq_rel_sys();
        const int peer = i / kNumReadyWords, word = i % kNumReadyWords;
        uint64_t* words = domain.window.ready(domain.arenas[peer], context.op, domain.rank);
        ptx::store_relaxed_sys(words + word, signal_word(context.epoch, own.word(word)));
    }
    __syncthreads();
    for (int i = threadIdx.x; i < num_words; i += blockDim.x) {
        const int peer = i / kNumReadyWords, word = i % kNumReadyWords;
        uint32_t value = 0;
        // Acquires what the peer's stream did before its record.
        if (!wait_signal<true>(context, domain.window.ready(domain.arenas[domain.rank], context.op, peer) + word, context.epoch, Phase::kReady, peer,
                         &value))
            shared.is_failed = 1;
        shared.words[peer][word] = value;
    }
    __syncthreads();
    if (static_cast<int>(threadIdx.x) < domain.num_ranks) {
        const int peer = threadIdx.x;
        const uint32_t* words = shared.words[peer];
        Grant grant{};
        grant.is_staged = words[kReadyKind] == kKindStaged;
        grant.is_relayed = words[kReadyKind] == kKindRelayed;
        grant.num_rows = static_cast<int32_t>(words[kReadyNumRows]);
        if (!grant.is_staged && !shared.is_failed) {
            bool is_good = grant.num_rows >= 0;
            grant.rows = granted(domain, peer, words, kReadyRows, grant.num_rows, sizes.rows, &is_good);
            grant.scales = granted(domain, peer, words, kReadyScales, grant.num_rows, sizes.scales, &is_good);
            grant.topk_idx = granted(domain, peer, words, kReadyTopkIdx, grant.num_rows, sizes.topk_idx, &is_good);
            grant.weights = granted(domain, peer, words, kReadyWeights, grant.num_rows, sizes.weights, &is_good);
            grant.src_idx = granted(domain, peer, words, kReadySrcIdx, grant.num_rows, sizes.src_idx, &is_good);
            if (!is_good) {
                report_error(context, ErrorKind::kBadCount, Phase::kReady, peer, static_cast<uint64_t>(grant.num_rows), 0, 0);
                grant.num_rows = 0;
            }
        }
        if (grant.is_staged) {
            shared.has_staged = 1;
            grant.num_staged_rows = grant.num_rows;
            grant.num_rows = 0;
        }
        if (shared.is_failed) grant.num_rows = grant.num_staged_rows = 0;
        // This rank reaches its own memory wherever it is.
        if (peer == domain.rank && grant.is_staged) {
            grant.num_rows = grant.num_staged_rows;
            grant.rows = own.pointers[0];
            grant.scales = own.pointers[1];
            grant.topk_idx = own.pointers[2];
            grant.weights = own.pointers[3];
            grant.src_idx = own.pointers[4];
        }
        shared.grants[peer] = grant;
    }
    __syncthreads();
}

}  // namespace deepep::nvlink
