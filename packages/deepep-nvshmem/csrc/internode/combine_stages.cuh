#pragma once
// A forward warp's stages in shared memory: where peers are reached by stores, answers are put together there, part of a row by part of a row, and put
// from there. An SM's loads from device memory wait behind its own stores to other GPUs, and a put out of the send ring is made of such loads.
//
//   stage   byte [part bytes]    part of a row | behind the last part of a row: weights float32 [K], and the padding of the message
//
// One stage: the rows that are to be added are read by ordinary loads, and their sum is written into the stage.
// Several: a ring. Bulk loads bring the addends of a part, each into a stage of its own, as many parts ahead as there is room for; the sum is written over
// the first addend and put from there. Nothing is under way behind the last part of an answer.
#include "combine_parts.cuh"
#include "deepep/ptx/bulk.cuh"

namespace deepep::internode {
namespace {

struct StageState {
    uint64_t barrier;      // the bulk loads into the stage have landed; one phase for each use
    int32_t num_addends;   // of the part whose first addend is in the stage
    int32_t padding;
};

class ForwardStages {
public:
    // A part of an answer, in shared memory.
    struct Part {
        const uint8_t* from;
        int64_t offset;  // in the chunk
        int64_t num_bytes;
        bool is_last;
    };

    // `memory`: this warp's, in shared memory.
    __device__ ForwardStages(const CombineArgs& args, const WaitContext& context, const nvlink::Handshake& handshake, PartialAddends& addends, uint8_t* memory)
        : args_(args), context_(context), handshake_(handshake), addends_(addends), stages_(memory), lane_(threadIdx.x % 32) {
#if DEEPEP_HAS_BULK
        if (!has_loads()) return;
        if (lane_ == 0) {
            for (int stage = 0; stage < args_.num_stages; ++stage) ptx::mbarrier_init(&state_of(stage).barrier, 1);
            ptx::fence_mbarrier_init();
        }
        ptx::fence_async_global();  // READY, acquired by this block before its barrier, permits this lane's bulk loads
        __syncwarp();
#endif
    }

    // The next answer: `num_rows` (1 or more) rows of send_nvl_head from `first_row` on.
    __device__ void begin(int64_t first_row, int num_rows) {
        num_rows_ = num_rows;
        row_ = part_ = load_row_ = load_part_ = num_used_ = stage_ = 0;
        // The put of the answer before has joined the lanes, which have read its heads.
        for (int i = lane_; i < num_rows * kMaxNodeRanks; i += 32) heads()[i] = args_.send_nvl_head[first_row * kMaxNodeRanks + i];
        __syncwarp();
#if DEEPEP_HAS_BULK
        if (has_loads()) load_head_ = held_head(args_, context_, handshake_, head_of_row(0));
#endif
    }

    // Sums the next part of the answer. It stays where it is until the next call; the caller's put of the part before has read its stage by then, and joined
    // the lanes. The lanes' stores to this one are joined by the put that reads them.
    __device__ Part next() {
        const RowParts& parts = args_.parts;
        const bool ends_row = part_ + 1 == parts.num_parts;
        const int64_t begin = parts.begin(part_), num_message_bytes = args_.geometry.num_message_bytes;
        const int num_bytes = parts.num_bytes(part_);
        const uint8_t* from = stages_;
#if DEEPEP_HAS_BULK
        if (has_loads()) {
            from = sum_loaded(num_bytes, ends_row);
        } else
#endif
        {
            const int num_addends = list_over_node(args_, context_, handshake_, addends_, head_of_row(row_), begin);
            sum_listed(args_, addends_, num_addends, num_bytes, stages_, ends_row ? reinterpret_cast<float*>(stages_ + num_bytes) : nullptr);
        }
        const Part part{from, row_ * num_message_bytes + begin, ends_row ? num_message_bytes - begin : num_bytes, ends_row && row_ + 1 == num_rows_};
        part_ = ends_row ? 0 : part_ + 1;
        if (ends_row) ++row_;
        return part;
    }

private:
    __device__ bool has_loads() const { return args_.num_stages > 1; }

    // Behind the stages and their states: the answer's rows of send_nvl_head.
    __device__ StageState* states() const { return reinterpret_cast<StageState*>(stages_ + args_.num_stages * args_.num_stage_bytes); }
    __device__ int32_t* heads() const { return reinterpret_cast<int32_t*>(states() + args_.num_stages); }
    __device__ StageState& state_of(int stage) const { return states()[stage]; }
    __device__ int32_t head_of_row(int row) const { return lane_ < kMaxNodeRanks ? heads()[row * kMaxNodeRanks + lane_] : -1; }

#if DEEPEP_HAS_BULK
    __device__ int wrapped(int stage) const { return stage < args_.num_stages ? stage : stage - args_.num_stages; }
    __device__ uint8_t* stage_at(int stage) const { return stages_ + stage * args_.num_stage_bytes; }

    // Begins the loads of as many parts as there is room for; at least of the next one, because a part has no more addends than there are stages.
    __device__ void load_ahead() {
        // What this lane has read and written in the stages that are free again comes before the bulk loads into them, whichever lane begins those.
        ptx::fence_async_shared();
        __syncwarp();
        while (load_row_ < num_rows_) {
            const uint32_t mask = __ballot_sync(~0u, load_head_ >= 0);
            const int num_taken = max(1, __popc(mask));  // a row that nobody holds is a stage of zeros
            if (num_used_ + num_taken > args_.num_stages) return;
            load_part(mask);
            num_used_ += num_taken;
            if (++load_part_ < args_.parts.num_parts) continue;
            load_part_ = 0;
            if (++load_row_ < num_rows_) load_head_ = held_head(args_, context_, handshake_, head_of_row(load_row_));
        }
    }

    // Lane = local rank: each brings the addend of its rank.
    __device__ void load_part(uint32_t mask) {
        const RowParts& parts = args_.parts;
        const int load_stage = wrapped(stage_ + num_used_);
        const int num_addends = __popc(mask), place = __popc(mask & ((1u << lane_) - 1)), num_bytes = parts.num_bytes(load_part_);
        const bool ends_row = load_part_ + 1 == parts.num_parts;
        if (load_head_ >= 0 || (mask == 0 && lane_ == 0)) {
            const int stage = wrapped(load_stage + place), num_weight_bytes = ends_row && args_.loads_weights ? args_.num_topk * 4 : 0;
            StageState& state = state_of(stage);
            uint64_t* barrier = &state.barrier;
            state.num_addends = num_addends;
            ptx::mbarrier_arrive_expect(barrier, load_head_ >= 0 ? num_bytes + num_weight_bytes : 0);
            if (load_head_ >= 0) {
                const nvlink::Grant& grant = handshake_.grants[lane_ % kMaxNodeRanks];
                ptx::bulk_load(stage_at(stage), grant.rows + load_head_ * parts.num_row_bytes + parts.begin(load_part_), num_bytes, barrier);
                if (num_weight_bytes > 0)
                    ptx::bulk_load(stage_at(stage) + num_bytes, grant.weights + static_cast<int64_t>(load_head_) * num_weight_bytes, num_weight_bytes, barrier);
            }
        }
        if (!ends_row || args_.loads_weights) return;
        // Weights that no bulk copy can bring: lane = choice, here and where they are added up.
        for (int i = 0; i < num_addends; ++i, mask &= mask - 1) {
            const int local_rank = __ffs(static_cast<int>(mask)) - 1;
            const int64_t head = __shfl_sync(~0u, load_head_, local_rank);
            if (lane_ < args_.num_topk)
                reinterpret_cast<float*>(stage_at(wrapped(load_stage + i)) + num_bytes)[lane_] =
                    reinterpret_cast<const float*>(handshake_.grants[local_rank].weights)[head * args_.num_topk + lane_];
        }
    }

    __device__ const uint8_t* sum_loaded(int num_bytes, bool ends_row) {
        load_ahead();
        __syncwarp();  // joins the count below to the lane that wrote it
        const int first = stage_, num_addends = state_of(first).num_addends, num_taken = max(1, num_addends);
        for (int i = 0; i < num_taken; ++i) {
            ptx::mbarrier_wait(&state_of(stage_).barrier, parities_ >> stage_ & 1);  // by every lane: all read what has landed
            parities_ ^= 1u << stage_;
            stage_ = wrapped(stage_ + 1);
        }
        num_used_ -= num_taken;  // used again only in the next call
        if (lane_ < num_addends) addends_.rows[lane_] = stage_at(wrapped(first + lane_));
        if (ends_row && lane_ < args_.num_topk) {
            float sum = 0.0f;
            for (int i = 0; i < num_addends; ++i) sum = __fadd_rn(sum, reinterpret_cast<const float*>(stage_at(wrapped(first + i)) + num_bytes)[lane_]);
            reinterpret_cast<float*>(stage_at(first) + num_bytes)[lane_] = sum;
        }
        __syncwarp();  // the list is complete
        sum_rows(addends_.rows, num_addends, num_bytes, stage_at(first));
        return stage_at(first);
    }
#endif

    const CombineArgs& args_;
    const WaitContext& context_;
    const nvlink::Handshake& handshake_;
    PartialAddends& addends_;
    uint8_t* stages_;
    const int lane_;
    // the answer, and its next part
    int num_rows_ = 0;
    int row_ = 0;
    int part_ = 0;
    // the ring: the stage of the next part that is summed, and how many are taken from there on
    int stage_ = 0;
    int num_used_ = 0;
    uint32_t parities_ = 0;  // of each stage's next phase
    // the next part that is loaded, and the row at this lane's rank
    int32_t load_head_ = -1;
    int load_row_ = 0;
    int load_part_ = 0;
};

}  // namespace
}  // namespace deepep::internode
