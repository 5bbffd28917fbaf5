#pragma once
// Answers to sources that are reached by stores: a forward warp puts them together in shared memory, part of a row by part of a row, and puts them from there.
// An SM's loads from device memory wait behind its own stores to other GPUs, and a put out of the send ring is made of such loads.
//
//   stage   byte [part bytes]    part of a row | behind the last part of a row: weights float32 [K], and the padding of the message
#include "combine_parts.cuh"

namespace deepep::internode {
namespace {

class DirectAnswer {
public:
    // A part of an answer, in shared memory.
    struct Part {
        const uint8_t* from;
        int64_t offset;  // in the chunk
        int64_t num_bytes;
        bool is_last;
    };

    // `memory`: this warp's, in shared memory.
    __device__ DirectAnswer(const CombineArgs& args, const WaitContext& context, const nvlink::Handshake& handshake, PartialAddends& addends, uint8_t* memory)
        : args_(args), context_(context), handshake_(handshake), addends_(addends), stage_(memory), lane_(threadIdx.x % 32) {}

    // The next answer: `num_rows` (1 or more) rows of send_nvl_head from `first_row` on.
    __device__ void begin(int64_t first_row, int num_rows) {
        num_rows_ = num_rows;
        row_ = part_ = 0;
        // The put of the answer before has joined the lanes, which have read its heads.
        for (int i = lane_; i < num_rows * kMaxNodeRanks; i += 32) heads()[i] = args_.send_nvl_head[first_row * kMaxNodeRanks + i];
        __syncwarp();
    }

    // Sums the next part of the answer. It stays where it is until the next call; the caller's put of the part before has read the stage by then, and joined
    // the lanes. The lanes' stores to this one are joined by the put that reads them.
    __device__ Part next() {
        const RowParts& parts = args_.parts;
        const bool ends_row = part_ + 1 == parts.num_parts;
        const int64_t begin = parts.begin(part_), num_message_bytes = args_.geometry.num_message_bytes;
        const int num_bytes = parts.num_bytes(part_);
        const int num_addends = list_over_node(args_, context_, handshake_, addends_, lane_ < kMaxNodeRanks ? heads()[row_ * kMaxNodeRanks + lane_] : -1, begin);
        sum_listed(args_, addends_, num_addends, num_bytes, stage_, ends_row ? reinterpret_cast<float*>(stage_ + num_bytes) : nullptr);
        const Part part{stage_, row_ * num_message_bytes + begin, ends_row ? num_message_bytes - begin : num_bytes, ends_row && row_ + 1 == num_rows_};
        part_ = ends_row ? 0 : part_ + 1;
        if (ends_row) ++row_;
        return part;
    }

private:
    // Behind the stage: the answer's rows of send_nvl_head.
    __device__ int32_t* heads() const { return reinterpret_cast<int32_t*>(stage_ + args_.num_stage_bytes); }

    const CombineArgs& args_;
    const WaitContext& context_;
    const nvlink::Handshake& handshake_;
    PartialAddends& addends_;
    uint8_t* stage_;
    const int lane_;
    int num_rows_ = 0;
    int row_ = 0;
    int part_ = 0;
};

}  // namespace
}  // namespace deepep::internode
