#pragma once
// What the two halves of combine share within a block.
#include "control.cuh"
#include "row_formats.cuh"
#include "trace.cuh"

namespace deepep::ibgda {

// Choice k of a token that a warp will take (or send) next, by its lane k; as it lies in memory.
struct alignas(16) ChoiceWords {
    int64_t index;
    float weight;
    int32_t row;
};

// Of a warp: the piece of a row that it is adding up.
struct alignas(16) SentPiece {
    uint8_t* place;  // in the slot
    int32_t source;
    int32_t token;
};

struct CombineShared {
    ChoiceWords choices[kNumWarps][32];
    ChoiceWords next_choices[kNumWarps][32];
    SentPiece sent[kNumWarps];
    Operation operation;
    int32_t num_tokens[kMaxWindowRanks];  // of every source; -1 where it takes no part, or took none in dispatch
    int32_t most_tokens;                  // of any source
    uint32_t has_weights;                 // they came with dispatch
    uint32_t has_resent;                  // this block has sent all of this rank's weights
    int32_t next_part;                    // to receive: of those of this block, the first one that no warp has claimed
};

constexpr int kWorkerWarps = kNumWorkers / 32;
constexpr int kMostSenders = kNumWarps - 1;  // warps that send a block's own share, where the receivers do, too

// Among a block's warps that send rows. The control warp, which stands between the workers and the receivers, is none.
__device__ __forceinline__ int sender_number() { return static_cast<int>(threadIdx.x) / 32 - (is_receiver() ? 1 : 0); }

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
        shared.next_part = 0;
    }
};

// Where a row lies in a box: one row for each token (ll_reduce = "rank"), or one for each choice.
template <bool kAtSource>
__device__ __forceinline__ uint64_t slot_offset(const CombineArgs& args, int token, int choice) {
    return row_offset(kAtSource ? token * args.num_topk + choice : token, args.plan.slot_stride);
}

// Where the handle's tables speak of a token's first choice.
__device__ __forceinline__ int64_t route_of(const CombineArgs& args, int source, int token) {
    return static_cast<int64_t>(source * args.max_tokens + token) * args.num_topk;
}

__device__ __forceinline__ bool is_expert_row(const CombineArgs& args, int32_t row) {
    return static_cast<uint32_t>(row) < static_cast<uint32_t>(args.plan.num_expert_rows);
}
__device__ __forceinline__ const uint8_t* expert_row(const CombineArgs& args, int32_t row) { return args.x + row * args.num_row_bytes; }

// Parts of a token's rows at this rank, added up with the weights in the order of the choices. A lane has kVectors times Format::kColumns columns,
// `step` bytes of x apart. `rows`: the lanes that hold a row and its weight; `row_of` and
// `weight_of` say them, given a lane.
template <class Format, int kVectors>
class WeightedSum {
public:
    static constexpr int kRowsInFlight = 2;
    using Row = typename Format::Row;

    __device__ WeightedSum() {
#pragma unroll
        for (auto& sum : sums_) sum = Sum<Format::kColumns>::zero();
    }
    // Loads the next rows, and adds them up if then their weights are there (`is_ready`). `begin`: of the lane's first columns in a row, bytes.
    // `inside`: bit j: the row has the j-th columns. Returns the rows that are left.
    template <class RowOf, class WeightOf, class IsReady>
    __device__ unsigned add(const CombineArgs& args, unsigned rows, const RowOf& row_of, const WeightOf& weight_of, uint32_t begin, uint32_t step, unsigned inside,
                            const IsReady& is_ready) {
        Row v[kRowsInFlight][kVectors];
        unsigned rest = rows;
#pragma unroll
        for (int r = 0; r < kRowsInFlight; ++r) {
            if (rest == 0) break;
            const uint8_t* columns = expert_row(args, row_of(__ffs(static_cast<int>(rest)) - 1)) + begin;
#pragma unroll
            for (int j = 0; j < kVectors; ++j)
                v[r][j] = (inside >> j & 1) != 0 ? Format::load_row(reinterpret_cast<const Row*>(columns + j * step)) : Row{};
            rest &= rest - 1;
        }
        if (!is_ready()) return rows;
#pragma unroll
        for (int r = 0; r < kRowsInFlight; ++r) {
            if (rows == 0) break;
            const float factor = __uint_as_float(weight_of(__ffs(static_cast<int>(rows)) - 1));
            rows &= rows - 1;
#pragma unroll
            for (int j = 0; j < kVectors; ++j) {
                float columns[Format::kColumns];
                Format::columns(v[r][j], columns);
                sums_[j].add_product(factor, columns);
            }
        }
        return rows;
    }
    __device__ Row rounded(int j) const { return Format::rounded(sums_[j]); }

private:
    Sum<Format::kColumns> sums_[kVectors];
};

}  // namespace deepep::ibgda
