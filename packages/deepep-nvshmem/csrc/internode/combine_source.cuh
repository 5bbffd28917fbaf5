#pragma once
// Collecting: this rank's tokens. Block b is a run of tokens; it uses slot b % num_slots of every other node's ring.
//
// Source warps take blocks whose answers have come, with all that is to be known of their rows, from the request warp (combine_requests.cuh), and never wait for another rank.
// A token's result: biases and partial sums, node by node. That of the own node is made on the way, of the rows at its ranks.
// Bulk loads bring what is to be added up into a warp's stages, part of a row by part of a row. Without bulk copies, and for tokens of more addends than there are
// stages, it is loaded where it is used.
#include "combine_requests.cuh"
#include "combine_stages.cuh"
#include "internode/trace.cuh"

namespace deepep::internode {
namespace {

// What a token's result is made of: biases, then, node by node, the partial sums of other nodes and the rows of this one, which make a partial sum of their own.
struct TokenAddends {
    const uint8_t* rows[kNumBiases + kMaxCombineNodes + kMaxNodeRanks];
    const float* weights[kMaxCombineNodes + kMaxNodeRanks];  // of what comes behind the biases
};

// What a source warp keeps, in shared memory: of its next token, and of the oldest part in its stages.
struct SourceScratch {
    TokenAddends addends;
    const uint8_t* staged[kMaxAddendStages];
};

// Part of a result, in as many stages as it has addends.
struct alignas(16) ResultPart {
    uint8_t* out;
    int32_t num_bytes;
    int16_t num_addends;
    int16_t own_first;  // those of them that are rows of this node
    int16_t num_own;
    int16_t is_last;    // of its block
    int32_t place;      // the block's slot, as this SM counts them, and how often it was used before
    int32_t round;
};

class SourceWarp {
public:
    __device__ SourceWarp(const CombineArgs& args, const WaitContext& context, const nvlink::Handshake& handshake, SourceScratch& scratch,
                          const Collection& collection, const BlockSlots& slots, const AddendStages& stages, ResultPart* parts)
        : args_(args), context_(context), handshake_(handshake), scratch_(scratch), collection_(collection), slots_(slots),
          stream_(Stream::of(args.geometry, args.num_tokens)), stages_(stages), parts_(parts), lane_(threadIdx.x % 32), num_nodes_(args.domain.group.num_nodes()),
          own_node_(args.domain.group.node()) {}

    // No deadline: the warp that looks for answers has one, and says so.
    __device__ void run() {
        constexpr unsigned kIdleNs = 50;
#if DEEPEP_HAS_BULK
        if (has_stages()) {
            ptx::fence_async_global();  // READY, acquired by this block, permits the bulk loads of all lanes
            stages_.prepare();
        }
#endif
        while (true) {
            const bool is_over = collection_.queue.has_ended();
            bool has_moved = false;
            while ((token_ < end_ || next_block()) && load_part()) has_moved = true;
            DEEPEP_TRACE(if (lane_ == 0) spans_.spend(kLoading));
            if (stages_.num_in_flight > 0) {
                sum_part();
                DEEPEP_TRACE(if (lane_ == 0) spans_.spend(kPassing));
            } else if (!has_moved) {
                if (is_over) return;
                __nanosleep(kIdleNs);
                DEEPEP_TRACE(if (lane_ == 0) spans_.spend(kIdling));
            }
        }
    }

private:
    __device__ bool has_stages() const { return args_.collect.num_stages > 0; }

    // --- blocks -----------------------------------------------------------------------------------------------------

    __device__ bool next_block() {
        place_ = collection_.queue.take();
        if (place_ < 0) return false;
        round_ = peek_as_warp(collection_.asked + place_) - 1;
        slot_ = slots_.slot(place_);
        const int64_t block = slot_ + static_cast<int64_t>(round_) * args_.geometry.num_slots;
        token_ = begin_ = stream_.first_row(block);
        end_ = begin_ + stream_.rows_of(block);
        is_token_open_ = false;
#if DEEPEP_HAS_BULK
        ptx::fence_async_global();  // FULL, acquired by the request warp and joined by the queue, permits bulk loads
#endif
        return true;
    }

    // By the whole warp, which has loaded all of the block.
    __device__ void finish_block(int place, int round) const {
        __syncwarp();
        if (lane_ == 0) {
            __threadfence_block();  // joins the loads of the slot to the request warp's fence
            poke(collection_.finished + place, round + 1);
            DEEPEP_TRACE(stamp_first(kBlockCollected), stamp_last(kBlockCollected), count_moved(kMovedByReceivers));
        }
    }

    // --- tokens -----------------------------------------------------------------------------------------------------

    __device__ uint8_t* out_row() const { return args_.out + token_ * args_.message.num_row_bytes; }

    // Lists what the next token's result is made of.
    __device__ void open_token() {
        const int at = static_cast<int>(token_ - begin_), num_ranks = args_.domain.group.ranks_per_node;
        const NodeRows* node_rows = collection_.node_rows(args_, place_);
        TokenAddends& addends = scratch_.addends;
        const int num_biases = (args_.bias_0 != nullptr) + (args_.bias_1 != nullptr);
        __syncwarp();  // the list of the token before has been read
        if (lane_ < num_biases)
            addends.rows[lane_] = (lane_ == 0 && args_.bias_0 != nullptr ? args_.bias_0 : args_.bias_1) + token_ * args_.message.num_row_bytes;
        const int32_t held = held_head(args_, context_, handshake_, lane_ < num_ranks ? collection_.heads(args_, place_)[at * num_ranks + lane_] : -1);
        const uint32_t holders = __ballot_sync(~0u, held >= 0);
        num_own_ = __popc(holders);
        own_first_ = num_biases;
        int num_listed = num_biases;
        for (int first = 0; first < num_nodes_; first += 32) {
            const int node = first + lane_;
            const int32_t row = node < num_nodes_ && node != own_node_ ? collection_.rows(args_, place_)[at * num_nodes_ + node] : -1;
            const int64_t index = row < 0 ? 0 : static_cast<int64_t>(row) - node_rows[node].begin;
            const bool is_good = row >= 0 && index >= 0 && index < node_rows[node].count;
            if (row >= 0 && !is_good)  // the handle's rows do not rise by one
                report_error(context_, ErrorKind::kBadCount, Phase::kRows, args_.domain.group.peer_of(node), row, node_rows[node].begin, 0);
            const uint32_t mask = __ballot_sync(~0u, is_good), mask_before_own = __ballot_sync(~0u, is_good && node < own_node_);
            if (is_good) {
                const int place = num_listed + __popc(mask & ((1u << lane_) - 1)) + (node > own_node_ ? num_own_ : 0);
                const uint8_t* message = args_.domain.window.receive_ring(args_.domain.network, own_node_, node) + args_.geometry.slot_offset(slot_) +
                                         index * args_.geometry.num_message_bytes;
                addends.rows[place] = message;
                addends.weights[place - num_biases] = reinterpret_cast<const float*>(message + args_.message.weights_offset());
            }
            num_listed += __popc(mask);
            own_first_ += __popc(mask_before_own);
        }
        if (held >= 0) {
            const nvlink::Grant& grant = handshake_.grants[lane_ % kMaxNodeRanks];
            const int place = own_first_ + __popc(holders & ((1u << lane_) - 1));
            addends.rows[place] = grant.rows + held * args_.message.num_row_bytes;
            addends.weights[place - num_biases] = reinterpret_cast<const float*>(grant.weights) + static_cast<int64_t>(held) * args_.num_topk;
        }
        num_addends_ = num_listed + num_own_;
        first_weight_ = num_biases;
        part_ = 0;
        is_token_open_ = true;
        __syncwarp();
    }

    // Lane = choice. The own node's weights make a partial sum first, as its rows do.
    __device__ void sum_token_weights() const {
        if (lane_ >= args_.num_topk) return;
        const float* const* list = scratch_.addends.weights;
        const int own_first = own_first_ - first_weight_, own_end = own_first + num_own_;
        float sum = 0.0f, own = 0.0f;
        for (int i = 0; i < num_addends_ - first_weight_; ++i) {
            const float weight = list[i][lane_];
            if (i >= own_first && i < own_end) own = __fadd_rn(own, weight);
            if (i < own_first || i >= own_end)
                sum = __fadd_rn(sum, weight);
            else if (i + 1 == own_end)
                sum = __fadd_rn(sum, own);
        }
        args_.out_topk_weights[token_ * args_.num_topk + lane_] = sum;
    }

    // Asks for the next part of the token, or adds it all up at once; false: it has to wait for what is in the stages.
    __device__ bool load_part() {
        if (!is_token_open_) open_token();
        bool is_last = true;
#if DEEPEP_HAS_BULK
        if (has_stages() && num_addends_ > 0 && num_addends_ <= args_.collect.num_stages) {
            if (!stages_.has_room(num_addends_)) return false;
            const RowParts& parts = args_.collect.parts;
            const int num_bytes = parts.num_bytes(part_);
            const int64_t offset = parts.begin(part_);
            is_last = part_ + 1 == parts.num_parts;
            if (lane_ < num_addends_) stages_.load(lane_, scratch_.addends.rows[lane_] + offset, num_bytes, nullptr, 0);
            if (lane_ == 0)
                parts_[stages_.load_stage] = {out_row() + offset, num_bytes, static_cast<int16_t>(num_addends_), static_cast<int16_t>(own_first_),
                                              static_cast<int16_t>(num_own_), static_cast<int16_t>(is_last && token_ + 1 == end_), place_, round_};
            __syncwarp();  // the part is there for all lanes
            stages_.loaded(num_addends_);
            ++part_;
        } else if (stages_.num_in_flight > 0) {
            return false;  // blocks are finished behind their last token
        } else {
            sum_token();
        }
#else
        sum_token();
#endif
        if (is_last) {
            if (args_.num_topk > 0) sum_token_weights();
            if (stages_.num_in_flight == 0 && token_ + 1 == end_) finish_block(place_, round_);
            ++token_;
            is_token_open_ = false;
        }
        return true;
    }

    // The own node's rows in a list have become one, their sum. Returns how many are left.
    __device__ int join_own(const uint8_t** list, int num_listed, int own_first, int num_own, const uint8_t* sum) const {
        const int num_left = num_listed - num_own + 1;
        __syncwarp();
        if (lane_ == 0) list[own_first] = sum;
        for (int first = own_first + 1; first < num_left; first += 32) {
            const uint8_t* moved = first + lane_ < num_left ? list[first + lane_ + num_own - 1] : nullptr;
            __syncwarp();
            if (first + lane_ < num_left) list[first + lane_] = moved;
        }
        __syncwarp();
        return num_left;
    }

    __device__ void sum_token() {
        const uint8_t** list = scratch_.addends.rows;
        const int num_bytes = static_cast<int>(args_.message.num_row_bytes);
        int num_left = num_addends_;
        if (num_own_ > 1) {
            sum_rows(list + own_first_, num_own_, num_bytes, out_row());
            if (num_own_ == num_addends_) return;  // it is the result
            num_left = join_own(list, num_addends_, own_first_, num_own_, out_row());
        }
        sum_rows(list, num_left, num_bytes, out_row());
    }

#if DEEPEP_HAS_BULK
    // The oldest part, once its addends are there.
    __device__ void sum_part() {
        const ResultPart part = parts_[stages_.take_stage];
        uint8_t* own_sum = stages_.at(stages_.behind(stages_.take_stage, part.own_first));
        const uint8_t** list = scratch_.staged;
        stages_.wait(part.num_addends, list);
        DEEPEP_TRACE(if (lane_ == 0) spans_.spend(kAwaiting));
        __syncwarp();
        int num_left = part.num_addends;
        if (part.num_own > 1) {
            sum_staged<true>(list + part.own_first, part.num_own, part.num_bytes, own_sum);
            num_left = join_own(list, num_left, part.own_first, part.num_own, own_sum);
        }
        sum_staged<false>(list, num_left, part.num_bytes, part.out);
        stages_.taken(part.num_addends);
        if (part.is_last) finish_block(part.place, part.round);
    }
#else
    __device__ void sum_part() {}
#endif

    const CombineArgs& args_;
    const WaitContext& context_;
    const nvlink::Handshake& handshake_;
    SourceScratch& scratch_;
    const Collection& collection_;
    const BlockSlots slots_;
    const Stream stream_;
    AddendStages stages_;
    ResultPart* parts_;
    const int lane_;
    const int num_nodes_;
    const int own_node_;
    // the block that is being loaded
    int place_ = 0;
    int round_ = 0;
    int slot_ = 0;
    int64_t begin_ = 0;
    int64_t end_ = 0;
    int64_t token_ = 0;
    bool is_token_open_ = false;
    int part_ = 0;
    int num_addends_ = 0;
    int own_first_ = 0;
    int num_own_ = 0;
    int first_weight_ = 0;
    DEEPEP_TRACE(SpanClock spans_;)
};

}  // namespace
}  // namespace deepep::internode
