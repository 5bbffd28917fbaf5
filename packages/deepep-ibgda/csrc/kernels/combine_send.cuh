#pragma once
// The sending half of combine: warps take parts of rows; each adds up what this rank's experts made of a source's token and stores the sum into
// the source's slot, or (ll_reduce = "expert") stores the rows as they are.
#include "combine_shared.cuh"

namespace deepep::ibgda {

// A warp's work: a part of a source's token. Items run through the sources first, so that all links are busy at once, then through the parts.
struct SendItem {
    int source;
    int token;
    int part;

    __device__ static SendItem of(const CombineArgs& args, int i, int num_parts) {
        const int num_ranks = args.domain.num_ranks, rest = i / num_ranks;
        return {(i + args.domain.rank + 1) % num_ranks, rest / num_parts, rest % num_parts};
    }
};

// Of choice k, in lane k: the row of x that belongs to it (-1: none here), and its weight as bits.
struct Choice {
    int32_t row = -1;
    uint32_t weight = 0;

    __device__ static Choice load(const CombineArgs& args, const SendItem& item) {
        Choice choice;
        const int lane = static_cast<int>(threadIdx.x) % 32;
        if (item.token >= args.max_tokens || lane >= args.num_topk) return choice;
        const int64_t i = (static_cast<int64_t>(item.source) * args.max_tokens + item.token) * args.num_topk + lane;
        choice.row = args.handle[args.handle_layout.routes() + i];
        choice.weight = static_cast<uint32_t>(args.handle[args.handle_layout.weights() + i]);
        return choice;
    }
};

// A weight that did not travel with dispatch: it goes to the rank of its choice, as a signal word of the operation's sequence.
struct Weight {
    int i;  // choice of all
    int64_t expert;
    float value;

    __device__ static Weight load(const CombineArgs& args, int i) {
        if (i >= args.num_tokens * args.num_topk) return {i, -1, 0};
        return {i, args.topk_idx[i], args.topk_weights[i]};
    }
    template <bool kRemote>
    __device__ void send(const CombineArgs& args, const Operation& operation) const {
        const Domain& domain = args.domain;
        if (expert < 0 || expert >= args.num_experts) return;
        const int rank = static_cast<int>(expert) / args.num_local_experts;
        const uint32_t sequence = operation.sequences[rank];
        if (sequence == 0 || is_remote<kRemote>(domain, rank)) return;
        ptx::store_relaxed_sys(domain.weights(operation.arenas[rank], sequence, domain.rank) + i, signal_word(sequence, __float_as_uint(value)));
    }
};

// Remote ranks get all weights, in one work request each. By a group of threads that `barrier` joins; thread 0 of it posts.
template <class Barrier>
__device__ __forceinline__ void post_weights(const CombineArgs& args, const Operation& operation, int thread, int num_threads, const Barrier& barrier) {
    const Domain& domain = args.domain;
    const int num_weights = args.num_tokens * args.num_topk;
#pragma unroll 1
    for (int rank = 0; rank < domain.num_ranks; ++rank) {
        const uint32_t sequence = operation.sequences[rank];
        if (sequence == 0 || !domain.remote.has(rank) || num_weights == 0) continue;
        uint8_t* table = outgoing_box<true>(domain, operation, rank) + domain.window.weights_in_box();
#pragma unroll 1
        for (int i = thread; i < num_weights; i += num_threads)
            ptx::store_relaxed_sys(reinterpret_cast<uint64_t*>(table) + i, signal_word(sequence, __float_as_uint(args.topk_weights[i])));
        barrier();
        if (thread == 0) post_outgoing(domain, operation, kCombine, rank, table, 8u * static_cast<uint32_t>(num_weights));
    }
}

// Lanes with a row look for its weight, for a while. By a whole warp.
__device__ __forceinline__ bool poll_weights(const CombineArgs& args, const CombineShared& shared, const SendItem& item, Choice& choice) {
    const Domain& domain = args.domain;
    const uint32_t sequence = shared.operation.sequences[item.source];
    const uint64_t* word = domain.weights(domain.own, sequence, item.source) + item.token * args.num_topk + static_cast<int>(threadIdx.x) % 32;
    bool is_missing = choice.row >= 0;
#pragma unroll 1
    for (int poll = 0; poll < kPollsPerCheck; ++poll) {
        if (is_missing) {
            const uint64_t seen = ptx::load_relaxed_sys(word);
            is_missing = signal_epoch(seen) != sequence;
            choice.weight = signal_value(seen);
        }
        if (!__any_sync(kAllLanes, is_missing)) return true;
    }
    return false;
}

// The shares of this rank's own weights may belong to blocks that are not resident, and the peer may wait for them: a block that waits for
// long sends all of them once (storing a word again changes nothing). `start`: of the wait, in lane 0.
__device__ __forceinline__ bool is_first_to_resend(CombineShared& shared, uint32_t start) {
    int is_first = 0;
    if (threadIdx.x % 32 == 0 && start != 0 && coarse_time() - start >= kPatience) is_first = atomicExch(&shared.has_resent, 1u) == 0;
    return __shfl_sync(kAllLanes, is_first, 0) != 0;
}

template <bool kRemote>
__device__ __noinline__ void send_all_weights(const CombineArgs& args, const CombineShared& shared) {
    const int lane = static_cast<int>(threadIdx.x) % 32;
#pragma unroll 1
    for (int i = lane; i < args.num_tokens * args.num_topk; i += 32) Weight::load(args, i).send<kRemote>(args, shared.operation);
    if constexpr (kRemote) post_weights(args, shared.operation, lane, 32, [] { __syncwarp(); });
}

template <class Format, bool kRemote>
struct Sender {
    using Row = typename Format::Row;
    static constexpr int kVectors = Format::kColumns == 8 ? 2 : 1;  // of a lane
    static constexpr int kRowsInFlight = 2;
    static constexpr int kPartColumns = 32 * Format::kColumns * kVectors;

    const CombineArgs& args;
    CombineShared& shared;

    __device__ const Row* row_of(int32_t row, int column) const { return reinterpret_cast<const Row*>(args.x + row * args.num_row_bytes + column * 2); }

    // The next rows of `rows`, or as many as there are.
    __device__ void load_rows(Row (&v)[kRowsInFlight][kVectors], const Choice& choice, unsigned rows, int column) const {
#pragma unroll
        for (int r = 0; r < kRowsInFlight; ++r) {
            const int32_t row = __shfl_sync(kAllLanes, choice.row, rows != 0 ? __ffs(static_cast<int>(rows)) - 1 : 0);
#pragma unroll
            for (int j = 0; j < kVectors; ++j)
                if (rows != 0 && column + 32 * Format::kColumns * j < args.hidden) v[r][j] = Format::load_row(row_of(row, column + 32 * Format::kColumns * j));
            rows &= rows - 1;
        }
    }

    // This rank's sum for one part of a token's row. False: the weights did not come.
    __device__ bool send_sum(const SendItem& item, Choice& choice, unsigned rows, uint8_t* slot) const {
        const int column = item.part * kPartColumns + static_cast<int>(threadIdx.x) % 32 * Format::kColumns;
        Row v[kRowsInFlight][kVectors] = {};
        load_rows(v, choice, rows, column);  // under way before anything is waited for
        if (shared.has_weights == 0) {
            uint32_t start = 0;
            while (!poll_weights(args, shared, item, choice)) {
                const Verdict verdict = judge_as_warp(args.domain, shared.operation, kCombine, item.source, &start);
                if (verdict == Verdict::kReport && threadIdx.x % 32 == 0)
                    fail(args.domain, shared.operation, kCombine, Phase::kWeights, item.source, 0, shared.operation.sequences[item.source], start);
                if (verdict != Verdict::kGoOn) return false;
                if (is_first_to_resend(shared, start)) send_all_weights<kRemote>(args, shared);
                load_rows(v, choice, rows, column);
            }
        }
        Sum<Format::kColumns> sums[kVectors];
#pragma unroll
        for (auto& sum : sums) sum = Sum<Format::kColumns>::zero();
        while (true) {
#pragma unroll
            for (int r = 0; r < kRowsInFlight; ++r) {
                if (rows == 0) break;
                const float weight = __uint_as_float(__shfl_sync(kAllLanes, choice.weight, __ffs(static_cast<int>(rows)) - 1));
                rows &= rows - 1;
#pragma unroll
                for (int j = 0; j < kVectors; ++j) {
                    float columns[Format::kColumns];
                    Format::columns(v[r][j], columns);
                    sums[j].add_product(weight, columns);
                }
            }
            if (rows == 0) break;
            load_rows(v, choice, rows, column);
        }
        uint8_t* target = slot + slot_offset<false>(args, item.token, 0) + item.part * (kVectors * Format::kPartBytes);
#pragma unroll
        for (int j = 0; j < kVectors; ++j)
            if (column + 32 * Format::kColumns * j < args.hidden) Format::store(target + j * Format::kPartBytes, Format::encode(Format::rounded(sums[j])));
        return true;
    }

    // The same part of each row as it is.
    __device__ void send_raw(const SendItem& item, const Choice& choice, unsigned rows, uint8_t* slot) const {
        const int column = item.part * kPartColumns + static_cast<int>(threadIdx.x) % 32 * Format::kColumns;
#pragma unroll 1
        for (; rows != 0; rows &= rows - 1) {
            const int k = __ffs(static_cast<int>(rows)) - 1;
            const int32_t row = __shfl_sync(kAllLanes, choice.row, k);
            uint8_t* target = slot + slot_offset<true>(args, item.token, k) + item.part * (kVectors * Format::kPartBytes);
            Row v[kVectors] = {};
#pragma unroll
            for (int j = 0; j < kVectors; ++j)
                if (column + 32 * Format::kColumns * j < args.hidden) v[j] = Format::load_row(row_of(row, column + 32 * Format::kColumns * j));
#pragma unroll
            for (int j = 0; j < kVectors; ++j)
                if (column + 32 * Format::kColumns * j < args.hidden) Format::store(target + j * Format::kPartBytes, Format::encode(v[j]));
        }
    }
};

// Sends an item if it has rows here. By a warp. `sent`: the choices whose rows have been stored. False: the weights did not come.
template <bool kAtSource, class Format, bool kRemote>
__device__ __forceinline__ bool send_item(const Sender<Format, kRemote>& sender, const SendItem& item, Choice& choice, unsigned* sent) {
    const CombineArgs& args = sender.args;
    const Domain& domain = args.domain;
    const Operation& operation = sender.shared.operation;
    *sent = 0;
    if (item.token >= sender.shared.num_tokens[item.source]) return true;
    if (choice.row >= args.num_local_experts * domain.num_ranks * args.max_tokens) choice.row = -1;
    unsigned rows = __ballot_sync(kAllLanes, choice.row >= 0);
    if (rows == 0) return true;
    uint8_t* slot = outgoing_rows<kRemote>(domain, operation, kCombine, item.source);
    if constexpr (kAtSource) {
        // Choices of one expert share a row.
        const unsigned same = __match_any_sync(kAllLanes, choice.row);
        rows &= __ballot_sync(kAllLanes, __ffs(static_cast<int>(same)) - 1 == static_cast<int>(threadIdx.x) % 32);
        sender.send_raw(item, choice, rows, slot);
    } else if (!sender.send_sum(item, choice, rows, slot)) {
        return false;
    }
    *sent = rows;
    return true;
}

// Rows for ranks outside the NVLink domain: the warps of a block share a row in the outbox, then it goes as one work request. By all threads.
template <bool kAtSource, class Format>
__device__ __forceinline__ void post_rows(const CombineArgs& args, CombineShared& shared, int share, int num_parts) {
    const Domain& domain = args.domain;
    const Sender<Format, true> sender{args, shared};
    const int warp = static_cast<int>(threadIdx.x) / 32;
#pragma unroll 1
    for (int i = share; i < shared.most_tokens * domain.num_ranks; i += static_cast<int>(gridDim.x)) {
        SendItem item{(i + domain.rank + 1) % domain.num_ranks, i / domain.num_ranks, 0};
        if (!domain.remote.has(item.source) || item.token >= shared.num_tokens[item.source]) continue;
        unsigned rows = 0;
        bool is_good = true;
#pragma unroll 1
        for (item.part = warp; item.part < num_parts && is_good; item.part += kNumWarps) {
            Choice choice = Choice::load(args, item);
            is_good = send_item<kAtSource>(sender, item, choice, &rows);
        }
        if (__syncthreads_or(!is_good)) continue;
        if (threadIdx.x != 0) continue;  // warp 0 has had a part of every row
        uint8_t* slot = outgoing_rows<true>(domain, shared.operation, kCombine, item.source);
#pragma unroll 1
        for (unsigned left = kAtSource ? rows : rows != 0; left != 0; left &= left - 1)
            post_outgoing(domain, shared.operation, kCombine, item.source, slot + slot_offset<kAtSource>(args, item.token, __ffs(static_cast<int>(left)) - 1),
                          static_cast<uint32_t>(args.row.num_bytes));
    }
}

// A share: every num_blocks-th item of each warp, and some of the weights. By all threads. `begins`: nothing has been read of this operation yet.
// kAtSource: the source adds up. Returns what next_share wants to know.
template <bool kAtSource, class Format, bool kRemote>
__device__ __forceinline__ uint32_t send_share(const CombineArgs& args, CombineShared& shared, int share, bool begins) {
    const Domain& domain = args.domain;
    const Operation& operation = shared.operation;
    const int thread = static_cast<int>(threadIdx.x), warp = thread / 32, num_shares = static_cast<int>(gridDim.x);
    const int num_parts = static_cast<int>(ceil_div(args.hidden, Sender<Format, kRemote>::kPartColumns));
    int i = warp * num_shares + share;
    Choice next = Choice::load(args, SendItem::of(args, i, num_parts));
    const int num_weights = args.num_tokens * args.num_topk, weight_step = num_shares * kNumThreads;
    Weight weight = Weight::load(args, kAtSource ? num_weights : share + thread * num_shares);
    if (begins) {
        Control<kRemote> control(domain, kCombine, shared.operation);
        if (warp == kControlWarp) {
            const HandleLane handle = HandleLane::load(args);
            control.begin_send(args.ticket);
            DEEPEP_STAMP(1, thread % 32 == 0);
            handle.note(args, shared);
            DEEPEP_STAMP(2, thread % 32 == 0);
        }
        __syncthreads();
        DEEPEP_STAMP(3, thread == 0);
        if (warp == kControlWarp) control.settle();
        if (!operation.is_claimed) return load_claim(domain, kCombine);
    }
    const uint32_t claim = load_claim(domain, kCombine);
    if (!kAtSource && shared.has_weights == 0) {
#pragma unroll 1
        for (; weight.i < num_weights; weight = Weight::load(args, weight.i + weight_step)) weight.send<kRemote>(args, operation);
        if (kRemote && share == 0) post_weights(args, operation, thread, kNumThreads, [] { __syncthreads(); });
    }
    DEEPEP_STAMP(4, thread == 0);
    if constexpr (kRemote) post_rows<kAtSource, Format>(args, shared, share, num_parts);
    const Sender<Format, kRemote> sender{args, shared};
    const int num_items = shared.most_tokens * num_parts * domain.num_ranks;
#pragma unroll 1
    while (i < num_items) {
        const SendItem item = SendItem::of(args, i, num_parts);
        Choice choice = next;
        i += num_shares * kNumWarps;
        next = Choice::load(args, SendItem::of(args, i, num_parts));
        if (is_remote<kRemote>(domain, item.source)) continue;
        unsigned sent;
        if (!send_item<kAtSource>(sender, item, choice, &sent) && !domain.enable_shrink) break;
        DEEPEP_STAMP(5, thread == 0 && i < 2 * num_shares * kNumWarps);
    }
    DEEPEP_STAMP(6, thread == 0);
    return claim;
}

}  // namespace deepep::ibgda
