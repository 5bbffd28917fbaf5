#pragma once
// The start of dispatch and combine: every rank tells every other one where its memory for this operation lies, and reads the same from them.
#include "deepep/ptx/memory.cuh"
#include "deepep/sync/wait.cuh"
#include "kernels.hpp"

namespace deepep::nvlink {

// What one peer grants, checked against its arena.
struct Grant {
    bool is_staged;
    int64_t num_rows;  // 0 when the peer did not answer or granted nonsense
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
};

// Bytes per row of each granted piece, for the bounds check; 0 where the operation does not use it.
struct GrantSizes {
    int64_t rows, scales, topk_idx, weights, src_idx;
};

__device__ __forceinline__ uint8_t* granted(const Domain& domain, int peer, const uint32_t* words, int word, int64_t num_rows,
                                            int64_t num_unit_bytes, bool* is_good) {
    const int64_t offset = join_halves(words[word], words[word + 1]);
    if (num_unit_bytes == 0) return nullptr;
    *is_good = *is_good && offset % 4 == 0 &&
               (num_rows == 0 || extent_fits(offset, num_rows, num_unit_bytes, domain.window.num_bytes(), domain.num_arena_bytes));
    return domain.arenas[peer] + offset;
}

// Called by all threads of every block (posting twice changes nothing, and no block then depends on another one being resident).
// `word_value(word)` is this rank's record. Returns with the grants in shared memory and the block in step.
template <class WordValue>
__device__ __forceinline__ void exchange_grants(const Domain& domain, const WaitContext& context, Handshake& shared, const GrantSizes& sizes,
                                                const WordValue& word_value) {
    const int num_words = domain.num_ranks * kNumReadyWords;
    if (threadIdx.x == 0) shared.is_failed = 0;
    // What this stream did before this kernel (readers of recycled outputs, writers of y) happened before the record.
    for (int i = threadIdx.x; i < num_words; i += blockDim.x) {
        if (i == static_cast<int>(threadIdx.x)) ptx::fence_acq_rel_sys();
        const int peer = i / kNumReadyWords, word = i % kNumReadyWords;
        uint64_t* words = domain.window.ready(domain.arenas[peer], context.op, domain.rank);
        ptx::store_relaxed_sys(words + word, signal_word(context.epoch, word_value(word)));
    }
    __syncthreads();
    for (int i = threadIdx.x; i < num_words; i += blockDim.x) {
        const int peer = i / kNumReadyWords, word = i % kNumReadyWords;
        uint32_t value = 0;
        if (!wait_signal(context, domain.window.ready(domain.arenas[domain.rank], context.op, peer) + word, context.epoch, Phase::kReady, peer,
                         &value))
            shared.is_failed = 1;
        shared.words[peer][word] = value;
        ptx::fence_acq_rel_sys();  // with the load above: acquires what the peer's stream did before its record
    }
    __syncthreads();
    if (static_cast<int>(threadIdx.x) < domain.num_ranks) {
        const int peer = threadIdx.x;
        const uint32_t* words = shared.words[peer];
        Grant grant{};
        grant.is_staged = words[kReadyKind] == kKindStaged;
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
        if (shared.is_failed) grant.num_rows = 0;
        shared.grants[peer] = grant;
    }
    __syncthreads();
}

// This rank's record for outputs or inputs in its arena.
struct OwnGrant {
    ReadyKind kind;
    int64_t num_rows, rows, scales, topk_idx, weights, src_idx;  // offsets in the arena

    __device__ uint32_t operator()(int word) const {
        switch (word) {
            case kReadyKind: return kind;
            case kReadyNumRows: return static_cast<uint32_t>(num_rows);
            case kReadyRows: return low_half(rows);
            case kReadyRows + 1: return high_half(rows);
            case kReadyScales: return low_half(scales);
            case kReadyScales + 1: return high_half(scales);
            case kReadyTopkIdx: return low_half(topk_idx);
            case kReadyTopkIdx + 1: return high_half(topk_idx);
            case kReadyWeights: return low_half(weights);
            case kReadyWeights + 1: return high_half(weights);
            case kReadySrcIdx: return low_half(src_idx);
            default: return high_half(src_idx);
        }
    }
};

__device__ __forceinline__ int64_t offset_in_arena(const Domain& domain, const void* pointer) {
    return pointer == nullptr ? 0 : static_cast<int64_t>(static_cast<const uint8_t*>(pointer) - domain.arenas[domain.rank]);
}

}  // namespace deepep::nvlink
