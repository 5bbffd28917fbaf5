#pragma once
// A team's forwarder that reaches all sources by stores. Bulk loads bring the rows of an answer into a warp's stages ahead of their use; the warp adds them up there, and puts the
// sum out of there: an SM's loads from device memory wait behind its own stores to other GPUs, and a put out of the send ring is made of such loads.
//
//   stage   byte [part bytes]   part of a rank's row, then of the sum | behind the last part: weights float32 [K]
//
// For the same reason one warp looks at the words of requests for all others, and brings what they need to know.
#include "combine_forward.cuh"
#include "combine_stages.cuh"

namespace deepep::internode {
namespace {

#if DEEPEP_HAS_BULK

// Requests that have come, in shared memory.
struct RequestTable {
    unsigned long long* words;  // of each context: its newest request; zero at the start
    int32_t* answered;          // of each context: its answer has been put, and waits for its word; zero at the start
    int32_t* heads;             // [contexts, rows of a slot, P]: its rows at the ranks of this node
    WorkQueue queue;            // of contexts: one stands there once at most

    __device__ int32_t* heads_of(const CombineArgs& args, int index) const {
        return heads + index * args.geometry.num_slot_rows * args.domain.group.ranks_per_node;
    }
};

// By one warp, until each context has had its last request. It also says which answers are complete, with one fence for all behind the stores of the warps that have put them: a fence for the
// whole system waits for what the SM has under way.
__device__ inline void watch_requests(const CombineArgs& args, const WaitContext& context, const ForwardFacts& facts, const BlockContexts& contexts, const RequestTable& requests) {
    const int lane = threadIdx.x % 32, num_contexts = contexts.count(), num_ranks = args.domain.group.ranks_per_node;
    uint64_t idle_since_ns = 0;
    for (uint32_t poll = 1;; ++poll) {
        bool has_moved = false, is_bad = false;
        int unfinished = -1;
        for (int first = 0; first < num_contexts; first += 32) {
            const int index = first + lane;
            bool is_request = false;
            const unsigned long long before = index < num_contexts ? requests.words[index] : 0;  // this lane's own
            const bool is_answered = index < num_contexts && peek(requests.answered + index) != 0;
            if (__any_sync(~0u, is_answered)) {
                has_moved = true;
                ptx::fence_acq_rel_sys();
                if (is_answered) {
                    poke(requests.answered + index, 0);  // the context's next request comes behind this word
                    contexts.set_answered(index, Request::of(before).begin);
                    DEEPEP_TRACE(stamp_first(kAnswerSent), stamp_last(kAnswerSent), count_moved(kMovedBySenders));
                }
            }
            if (index < num_contexts && (before == 0 || !Request::of(before).is_last)) {
                unfinished = index;
                const uint64_t* at = contexts.request_word(index);
                const unsigned long long word = ptx::load_relaxed_sys(at);
                if (Request::is_of(word, context.epoch) && word != before) {
                    static_cast<void>(ptx::load_acquire_sys(at));  // also a last one: it permits the next operation's stores to the slots
                    poke(requests.words + index, word);
                    has_moved = true;
                    const Request request = Request::of(word);
                    if (!request.is_last) {
                        is_request = facts.permits(args, context, contexts.node_of(index), request, true);
                        is_bad = is_bad || !is_request;
                        int32_t* heads = requests.heads_of(args, index);
                        for (int row = 0; is_request && row < request.count; ++row)
                            for (int rank = 0; rank < num_ranks; ++rank)
                                heads[row * num_ranks + rank] = args.send_nvl_head[(request.begin + row) * kMaxNodeRanks + rank];
                    }
                }
            }
            requests.queue.post(is_request, index);
        }
        if (__any_sync(~0u, is_bad) || !__any_sync(~0u, unfinished >= 0)) break;
        if (__any_sync(~0u, has_moved)) {
            idle_since_ns = 0;
            poll = 0;
        } else if (waits_in_vain(contexts, unfinished, poll, idle_since_ns)) {
            break;
        }
    }
    requests.queue.end();
}

// Part of an answer, in as many stages as it has addends (one, where it has none).
struct alignas(16) AnswerPart {
    uint8_t* to;
    int32_t num_addends;
    int32_t num_bytes;      // of the row
    int32_t num_put_bytes;  // and of the weights behind its last part
    int32_t completed;      // the answer's last part: its context, else -1
    int32_t peer;
};

class DirectForwardWarp {
public:
    // `parts`: what is in the stages.
    __device__ DirectForwardWarp(const CombineArgs& args, const WaitContext& context, const nvlink::Handshake& handshake, PartialAddends& addends,
                                 const RequestTable& requests, const BlockContexts& contexts, const AddendStages& stages, AnswerPart* parts)
        : args_(args), context_(context), handshake_(handshake), addends_(addends), requests_(requests), contexts_(contexts), stages_(stages), parts_(parts),
          lane_(threadIdx.x % 32) {}

    // No deadline: the warp that looks for requests has one, and says so.
    __device__ void run() {
        constexpr unsigned kIdleNs = 50;
        ptx::fence_async_global();  // READY, acquired by this block, permits the bulk loads of all lanes
        stages_.prepare();
        while (true) {
            const bool is_over = requests_.queue.has_ended();
            while ((row_ < num_rows_ || open_request()) && load_part()) continue;
            DEEPEP_TRACE(if (lane_ == 0) spans_.spend(kLoading));
            if (stages_.num_in_flight > 0) {
                put_part();
                DEEPEP_TRACE(if (lane_ == 0) spans_.spend(kPassing));
            } else if (is_over) {
                return;
            } else {
                __nanosleep(kIdleNs);
                DEEPEP_TRACE(if (lane_ == 0) spans_.spend(kIdling));
            }
        }
    }

private:
    __device__ bool open_request() {
        index_ = requests_.queue.take();
        if (index_ < 0) return false;
        const Request request = Request::of(peek_as_warp(requests_.words + index_));
        num_rows_ = request.count;
        row_ = part_ = 0;
        is_row_open_ = false;
        to_ = contexts_.target(index_);
        peer_ = contexts_.peer_of(index_);
        return true;
    }

    // Where the next row lies: of the rank that this lane stands for.
    __device__ void open_row() {
        const int num_ranks = args_.domain.group.ranks_per_node;
        const int32_t head = lane_ < num_ranks ? peek(requests_.heads_of(args_, index_) + row_ * num_ranks + lane_) : -1;
        held_ = held_head(args_, context_, handshake_, head);
        holders_ = __ballot_sync(~0u, held_ >= 0);
        is_row_open_ = true;
    }

    // Asks for the next part of the answer; false: too few stages are free.
    __device__ bool load_part() {
        if (!is_row_open_) open_row();
        const int num_addends = __popc(holders_), num_used = max_of(1, num_addends);
        if (!stages_.has_room(num_used)) return false;
        const RowParts& parts = args_.forward.parts;
        const bool ends_row = part_ + 1 == parts.num_parts;
        const int64_t offset = parts.begin(part_);
        const int num_bytes = parts.num_bytes(part_);
        if (held_ >= 0) {
            const nvlink::Grant& grant = handshake_.grants[lane_ % kMaxNodeRanks];
            const int num_weight_bytes = args_.num_topk * 4;
            stages_.load(__popc(holders_ & ((1u << lane_) - 1)), grant.rows + held_ * args_.message.num_row_bytes + offset, num_bytes,
                         grant.weights + static_cast<int64_t>(held_) * num_weight_bytes, ends_row && args_.loads_weights ? num_weight_bytes : 0);
        } else if (holders_ == 0 && lane_ == 0) {
            stages_.load_nothing();
        }
        if (ends_row && args_.num_topk > 0 && !args_.loads_weights) sum_weights_now(reinterpret_cast<float*>(stages_.at(stages_.load_stage) + num_bytes));
        if (lane_ == 0)
            parts_[stages_.load_stage] = {to_ + offset, num_addends, num_bytes, num_bytes + (ends_row ? static_cast<int>(align_up(4 * args_.num_topk, 16)) : 0),
                                          ends_row && row_ + 1 == num_rows_ ? index_ : -1, peer_};
        __syncwarp();  // the part is there for all lanes
        stages_.loaded(num_used);
        ++part_;
        if (ends_row) {
            ++row_;
            part_ = 0;
            is_row_open_ = false;
            to_ += args_.geometry.num_message_bytes;
        }
        return true;
    }

    // Weights that no bulk load can bring: lane = choice.
    __device__ void sum_weights_now(float* out) const {
        float sum = 0.0f;
        for (uint32_t left = holders_; left != 0; left &= left - 1) {
            const int rank = __ffs(static_cast<int>(left)) - 1;
            const int64_t row = __shfl_sync(~0u, held_, rank);
            if (lane_ < args_.num_topk) sum = __fadd_rn(sum, reinterpret_cast<const float*>(handshake_.grants[rank].weights)[row * args_.num_topk + lane_]);
        }
        if (lane_ < args_.num_topk) out[lane_] = sum;
    }

    // Puts the oldest part, once its rows are there.
    __device__ void put_part() {
        const AnswerPart part = parts_[stages_.take_stage];
        uint8_t* sum = stages_.at(stages_.take_stage);
        const int num_used = max_of(1, part.num_addends);
        stages_.wait(num_used, addends_.rows);
        DEEPEP_TRACE(if (lane_ == 0) spans_.spend(kAwaiting));
        // A single row is its own partial sum: rounding does not change it, and the source's sum, which starts from +0, does not tell -0 from +0.
        if (part.num_addends != 1) add_up(part, sum);
        __syncwarp();
        network::put_part(part.to, sum, part.num_put_bytes, part.peer);
        stages_.taken(num_used);  // a warp barrier
        if (part.completed >= 0 && lane_ == 0) {
            __threadfence_block();  // joins the warp's stores to the fence of the warp that says so
            poke(requests_.answered + part.completed, 1);
        }
    }

    __device__ void add_up(const AnswerPart& part, uint8_t* sum) const {
        __syncwarp();  // the list is complete
        sum_staged<true>(addends_.rows, part.num_addends, part.num_bytes, sum);
        if (part.num_put_bytes == part.num_bytes || !args_.loads_weights) return;
        if (lane_ < part.num_addends) addends_.weights[lane_] = reinterpret_cast<const float*>(addends_.rows[lane_] + part.num_bytes);
        __syncwarp();
        sum_weights(addends_.weights, part.num_addends, args_.num_topk, reinterpret_cast<float*>(sum + part.num_bytes));
    }

    const CombineArgs& args_;
    const WaitContext& context_;
    const nvlink::Handshake& handshake_;
    PartialAddends& addends_;
    const RequestTable& requests_;
    const BlockContexts& contexts_;
    AddendStages stages_;
    AnswerPart* parts_;
    const int lane_;
    // the answer that is being loaded
    int index_ = 0;
    int peer_ = 0;
    uint8_t* to_ = nullptr;  // where its next row goes
    int num_rows_ = 0;
    int row_ = 0;
    int part_ = 0;
    bool is_row_open_ = false;
    int32_t held_ = -1;
    uint32_t holders_ = 0;
    DEEPEP_TRACE(SpanClock spans_;)
};
#endif

}  // namespace
}  // namespace deepep::internode
