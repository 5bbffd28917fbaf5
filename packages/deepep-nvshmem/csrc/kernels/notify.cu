// Notify: the ranks of the domain tell each other what they are about to do and how much they will send.
//
// Every word of the exchange is a signal word, so that a value is valid as soon as it is seen: no fence, one flight over the link. Each block
// posts all of this rank's words (posting twice changes nothing), so that no block depends on another one being resident; then
//   block r < N   numbers the tokens that go to rank r (send_head);
//   block N       publishes the counts for the host and writes rank_prefix and the expert counts.
// The words live twice, by parity of the epoch: a rank ends its call only after every peer has posted, so it can be one call ahead, never two.
#include "deepep/ptx/memory.cuh"
#include "deepep/sync/wait.cuh"
#include "kernels.hpp"
#include "token_tile.cuh"

namespace deepep::nvlink {
namespace {

constexpr int kNumThreads = 512;
using Tile = TokenTile<kNumThreads>;
static_assert(kMaxRanks * (kNumHeaderWords + kMaxRanks) <= kNumThreads, "one thread polls each header word and rank count");

struct Shared {
    uint32_t headers[kMaxRanks][kNumHeaderWords];
    int32_t counts[kMaxRanks][kMaxRanks];  // [source][destination]
    int32_t prefix[kMaxRanks][kMaxRanks];  // inclusive over sources
    uint32_t mismatch_mask;
    uint32_t bad_count_mask;
    int32_t warp_sums[Tile::kNumWarps];
    uint32_t is_last;
};

__device__ uint32_t header_word(const NotifyArgs& args, int word) {
    switch (word) {
        case kHeaderStatus: return args.status;
        case kHeaderNumExperts: return static_cast<uint32_t>(args.num_experts);
        case kHeaderNumBadIndices: return args.num_bad_indices == nullptr ? 0 : static_cast<uint32_t>(*args.num_bad_indices);
        case kHeaderReason: return args.reason;
        default: return args.fields[word - kHeaderFields];
    }
}

__device__ void post_counts(const NotifyArgs& args, uint32_t epoch) {
    const Domain& domain = args.domain;
    const int num_local_experts = args.num_experts / domain.num_ranks;
    const bool is_valid = args.status == kStatusValid;
    // Header and rank counts always go out, so that peers can wait for both at once; a refused call sends nothing to anybody.
    const int num_words = kNumHeaderWords + domain.num_ranks + (is_valid ? num_local_experts : 0);
    for (int i = threadIdx.x; i < domain.num_ranks * num_words; i += kNumThreads) {
        const int dst_rank = i / num_words;
        const int word = i % num_words;
        uint32_t value;
        if (word < kNumHeaderWords)
            value = header_word(args, word);
        else if (word < kNumHeaderWords + domain.num_ranks)
            value = is_valid ? static_cast<uint32_t>(args.num_tokens_per_rank[word - kNumHeaderWords]) : 0;
        else
            value = static_cast<uint32_t>(
                args.num_tokens_per_expert[dst_rank * num_local_experts + word - kNumHeaderWords - domain.num_ranks]);
        uint64_t* words = domain.window.counts(domain.arenas[dst_rank], epoch, domain.rank);
        ptx::store_relaxed_sys(words + word, signal_word(epoch, value));
    }
}

// Everybody's header and rank counts into shared memory, and whether they may be used. All blocks read the same words and so decide alike.
__device__ void collect_counts(const NotifyArgs& args, const WaitContext& context, Shared& shared) {
    const Domain& domain = args.domain;
    const int num_ranks = domain.num_ranks;
    const int num_words = kNumHeaderWords + num_ranks;  // of each rank: header, then rank counts
    const int tid = static_cast<int>(threadIdx.x);
    if (tid < num_ranks * num_words) {
        const int src_rank = tid / num_words;
        const int word = tid % num_words;
        const uint64_t* words = domain.window.counts(domain.arenas[domain.rank], context.epoch, src_rank);
        uint32_t value = 0;
        const bool came = wait_signal<false>(context, words + word, context.epoch, Phase::kHeader, src_rank, &value);
        if (word < kNumHeaderWords) {
            shared.headers[src_rank][word] = came ? value : (word == kHeaderStatus ? kStatusInvalid : 0);
            const bool is_shared_fact = word >= kHeaderFields || word == kHeaderNumExperts;
            const bool differs = (word == kHeaderStatus && value != kStatusValid) || (is_shared_fact && value != header_word(args, word));
            if (!came || differs) atomicOr(&shared.mismatch_mask, 1u << src_rank);
        } else {
            // Sums of eight such counts stay below 2^31.
            if (value >= (1u << 28)) {
                report_error(context, ErrorKind::kBadCount, Phase::kCounts, src_rank, value, 0, 0);
                atomicOr(&shared.bad_count_mask, 1u << src_rank);
                value = 0;
            }
            if (!came) atomicOr(&shared.mismatch_mask, 1u << src_rank);
            shared.counts[src_rank][word - kNumHeaderWords] = static_cast<int32_t>(value);
        }
    }
    __syncthreads();
    const bool is_usable = shared.mismatch_mask == 0 && shared.bad_count_mask == 0;
    if (tid < num_ranks) {
        int32_t sum = 0;
        for (int src_rank = 0; src_rank < num_ranks; ++src_rank) {
            sum += is_usable ? shared.counts[src_rank][tid] : 0;
            shared.prefix[src_rank][tid] = sum;
        }
    }
    if (tid == 0 && static_cast<int>(blockIdx.x) == num_ranks && shared.mismatch_mask != 0) {
        const int peer = __ffs(static_cast<int>(shared.mismatch_mask)) - 1;
        report_error(context, ErrorKind::kMismatch, Phase::kHeader, peer, shared.mismatch_mask, 0, 0);
    }
    __syncthreads();
}

// Sums for this rank's experts, rank_prefix, and the host's copy of it all.
__device__ void publish_counts(const NotifyArgs& args, const WaitContext& context, Shared& shared) {
    const Domain& domain = args.domain;
    const int num_ranks = domain.num_ranks;
    const int num_local_experts = args.num_experts / num_ranks;
    const int tid = static_cast<int>(threadIdx.x);
    const bool is_usable = shared.mismatch_mask == 0 && shared.bad_count_mask == 0;
    CountsRecord* record = &domain.host->counts;
    for (int expert = tid; expert < num_local_experts; expert += kNumThreads) {
        int64_t sum = 0;
        for (int src_rank = 0; is_usable && src_rank < num_ranks; ++src_rank) {
            const uint64_t* words = domain.window.counts(domain.arenas[domain.rank], context.epoch, src_rank);
            uint32_t value = 0;
            wait_signal<false>(context, words + kNumHeaderWords + num_ranks + expert, context.epoch, Phase::kCounts, src_rank, &value);
            // A token may choose an expert several times, and each choice counts.
            if (value > static_cast<uint64_t>(kMaxTopk) * static_cast<uint32_t>(shared.counts[src_rank][domain.rank])) {
                report_error(context, ErrorKind::kBadCount, Phase::kCounts, src_rank, value, shared.counts[src_rank][domain.rank], 0);
                atomicOr(&shared.bad_count_mask, 1u << src_rank);
                value = 0;
            }
            sum += value;
        }
        const int32_t rounded = static_cast<int32_t>(align_up(sum, args.expert_alignment));
        if (args.recv_tokens_per_expert != nullptr) args.recv_tokens_per_expert[expert] = rounded;
        if (args.ticket != 0) domain.host_experts[expert] = rounded;
    }
    if (args.rank_prefix != nullptr && tid < num_ranks * num_ranks)
        args.rank_prefix[tid] = shared.prefix[tid / num_ranks][tid % num_ranks];
    if (args.first_rows != nullptr && tid < num_ranks) args.first_rows[tid] = tid == 0 ? 0 : shared.prefix[tid - 1][domain.rank];
    if (args.ticket == 0) return;
    if (tid < num_ranks * kNumHeaderWords)
        record->headers[tid / kNumHeaderWords][tid % kNumHeaderWords] = shared.headers[tid / kNumHeaderWords][tid % kNumHeaderWords];
    __syncthreads();
    if (tid == 0) {
        record->num_recv_tokens = shared.prefix[num_ranks - 1][domain.rank];
        record->mismatch_mask = shared.mismatch_mask;
        record->bad_count_mask = shared.bad_count_mask;
        // The barrier joined the block's stores to this thread; the release passes them to the host.
        ptx::store_release_sys(&record->ticket, args.ticket);
    }
}

// The tile's tokens that go to dst_rank.
__device__ Tile scan_tile(const NotifyArgs& args, Shared& shared, int64_t first, int dst_rank) {
    return Tile::scan(shared.warp_sums, first, args.num_tokens,
                      [&](int64_t token) { return args.is_token_in_rank[token * args.domain.num_ranks + dst_rank]; });
}

// Numbers the tokens that go to dst_rank in token order, behind the rows of the sources before this rank. The first tile was scanned while the
// counts were on their way.
__device__ void number_tokens(const NotifyArgs& args, const WaitContext& context, Shared& shared, int dst_rank, Tile tile) {
    const int num_ranks = args.domain.num_ranks;
    const int rank = args.domain.rank;
    const int32_t end = shared.prefix[rank][dst_rank];
    int32_t next = rank == 0 ? 0 : shared.prefix[rank - 1][dst_rank];
    for (int64_t begin = 0; begin < args.num_tokens; begin += Tile::kNumTokens) {
        const int64_t first = begin + static_cast<int64_t>(threadIdx.x) * Tile::kTokensPerThread;
        if (begin > 0) tile = scan_tile(args, shared, first, dst_rank);
        int32_t row = next + tile.before;
#pragma unroll
        for (int i = 0; i < Tile::kTokensPerThread; ++i) {
            const bool is_in = tile.mask >> i & 1;
            // Rows beyond the announced number belong to somebody else; they are never used.
            if (first + i < args.num_tokens) args.send_head[(first + i) * num_ranks + dst_rank] = is_in && row < end ? row : -1;
            row += is_in;
        }
        next += tile.total;
    }
    const bool is_usable = shared.mismatch_mask == 0 && shared.bad_count_mask == 0;
    if (threadIdx.x == 0 && is_usable && next != end)
        report_error(context, ErrorKind::kLayoutMismatch, Phase::kRows, dst_rank, next, end, 0);
}

__global__ void __launch_bounds__(kNumThreads, 1) exchange_counts_kernel(const __grid_constant__ NotifyArgs args) {
    __shared__ Shared shared;
    const Domain& domain = args.domain;
    DeviceState* state = domain.state();
    constexpr int kOp = static_cast<int>(Op::kNotify);
    const WaitContext context{domain.host, state, Op::kNotify, domain.rank, ptx::load_relaxed_gpu(&state->epochs[kOp]) + 1};

    const int dst_rank = blockIdx.x;
    const bool is_valid = args.status == kStatusValid;
    if (threadIdx.x == 0) shared.mismatch_mask = shared.bad_count_mask = 0;
    post_counts(args, context.epoch);
    Tile tile{};
    const bool is_numberer = dst_rank < domain.num_ranks && is_valid;
    if (is_numberer) tile = scan_tile(args, shared, static_cast<int64_t>(threadIdx.x) * Tile::kTokensPerThread, dst_rank);
    __syncthreads();
    collect_counts(args, context, shared);
    if (is_numberer)
        number_tokens(args, context, shared, dst_rank, tile);
    else if (dst_rank == domain.num_ranks)
        publish_counts(args, context, shared);

    // The last block that has read the epoch moves it on.
    __syncthreads();
    if (threadIdx.x == 0 && ptx::add_acq_rel_gpu(&state->arrivals[kOp], 1) == gridDim.x - 1) {
        ptx::store_relaxed_gpu(&state->arrivals[kOp], 0);
        ptx::store_relaxed_gpu(&state->epochs[kOp], context.epoch);
    }
}

}  // namespace

cudaError_t launch_notify(const NotifyArgs& args, cudaStream_t stream) {
    exchange_counts_kernel<<<args.domain.num_ranks + 1, kNumThreads, 0, stream>>>(args);
    return cudaGetLastError();
}

cudaError_t prepare_notify() {
    cudaFuncAttributes attributes;
    return cudaFuncGetAttributes(&attributes, exchange_counts_kernel);
}

}  // namespace deepep::nvlink
