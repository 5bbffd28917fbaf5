#pragma once
// Dispatch, sending to peers that are reached by stores: bulk loads bring rows into a warp's stages ahead of their use, and the warp puts them out of there.
// An SM's loads from device memory wait behind its own stores to other GPUs: the copies into and out of the send ring would take most of the time.
//
// A chunk is complete at the peer when FULL says so. Whoever has put its last row leaves that to the credit warp (watch_credits), which fences once for all
// chunks that are complete: a fence for the whole system waits for what the SM has under way, and the warps that put have better things to do.
#include "deepep/ptx/bulk.cuh"
#include "internode/dispatch_send.cuh"
#include "internode/dispatch_side.cuh"
#include "internode/stages.cuh"
#include "internode/trace.cuh"

namespace deepep::internode {
namespace {

#if DEEPEP_HAS_BULK
class DirectSendWarp {
public:
    __device__ DirectSendWarp(const WaitContext& context, const BlockContexts& contexts, const SendClaims& claims, StageRing& ring)
        : args_(contexts.args), context_(context), contexts_(contexts), claims_(claims), ring_(ring), lane_(threadIdx.x % 32) {}

    // The stages are empty when it begins, and when it ends. While no chunk can go, it calls `help(most)` to deliver some own rows, which says whether more may
    // be left.
    template <class Help>
    __device__ void run(const Help& help) {
        constexpr int kRowsPerHelp = 4;
        Patience patience;
        while (true) {
            Waiting waiting;
            SendClaims::Found found = SendClaims::Found::kMoved;
            while (true) {
                // Also where no stage is free: the list of the chunk's rows is then on its way while the rows before are put.
                if (next_row_ == num_rows_) {
                    found = open_chunk(waiting);
                    DEEPEP_TRACE(if (lane_ == 0) spans_.spend(kFinding));
                    if (found != SendClaims::Found::kChunk) break;
                }
                if (ring_.num_in_flight == args_.num_stages) break;
                load();
                DEEPEP_TRACE(if (lane_ == 0) spans_.spend(kLoading));
            }
            if (ring_.num_in_flight > 0) {
                put();
                DEEPEP_TRACE(if (lane_ == 0) spans_.spend(kPassing));
                patience.renew();
            } else if (found == SendClaims::Found::kOver) {
                return;
            } else if (found == SendClaims::Found::kNothing) {
                if (help(kRowsPerHelp))
                    patience.renew();
                else if (is_exhausted(patience, context_, Phase::kCredit, waiting))
                    return;
            } else {
                patience.renew();
            }
            DEEPEP_TRACE(if (lane_ == 0) spans_.spend(kIdling));
        }
    }

private:
    __device__ SendClaims::Found open_chunk(Waiting& waiting) {
        const SendClaims::Found found = claims_.look(claim_, waiting);
        if (found == SendClaims::Found::kChunk) {
            next_row_ = 0;
            num_rows_ = claims_.num_rows(claim_.node, claim_.chunk);
            tokens_ = claims_.token(claim_.node, claim_.chunk);
            peer_ = args_.peer_of(claim_.node);
            to_ = claims_.target(claim_.node, claim_.slot);
        }
        return found;
    }

    __device__ void load() {
        const DispatchMessage& message = args_.message;
        const int64_t token = __shfl_sync(~0u, tokens_, next_row_);
        const bool is_known = token >= 0 && token < args_.num_tokens;
        uint8_t* stage = ring_.stage_to_load();
        uint8_t* side = stage + message.side_offset();
        if (args_.writes_own_side) SidePart(args_, claim_.node, token, !args_.loads_scales).store(side);
        if (lane_ == 0) {
            uint64_t* barrier = ring_.barrier_to_load();
            ring_.item_to_load().to_put = {to_, peer_, next_row_ + 1 == num_rows_ ? claim_.index : -1, claim_.chunk};
            const int num_row_bytes = is_known ? static_cast<int>(message.num_row_bytes) : 0, num_scale_bytes = is_known ? args_.num_own_side_bytes : 0;
            ptx::mbarrier_arrive_expect(barrier, num_row_bytes + num_scale_bytes);
            if (num_row_bytes > 0) ptx::bulk_load(stage, args_.x + token * message.num_row_bytes, num_row_bytes, barrier);
            if (num_scale_bytes > 0) ptx::bulk_load(side, args_.scales + token * args_.scales_stride_token, num_scale_bytes, barrier);
        }
        __syncwarp();  // the item and the side part are there for all lanes
        ring_.loaded();
        ++next_row_;
        to_ += args_.geometry.num_message_bytes;
    }

    __device__ void put() {
        const uint8_t* stage = ring_.wait_for_stage();
        DEEPEP_TRACE(if (lane_ == 0) spans_.spend(kAwaiting));
        const ToPut item = ring_.item_to_take().to_put;
        const int64_t num_bytes = args_.message.num_row_bytes + args_.num_sent_side_bytes;
        network::put_part(item.to, stage, num_bytes, item.peer);
        ptx::fence_async_shared();  // these ordinary reads come before the next bulk load into the stage
        __syncwarp();
        if (item.completed >= 0) claims_.complete(item.completed, item.chunk);
        ring_.taken();
    }

    const DispatchArgs& args_;
    const WaitContext& context_;
    const BlockContexts& contexts_;
    SendClaims claims_;
    StageRing& ring_;
    const int lane_;
    Claim claim_ = {};  // of the rows that are being loaded
    int peer_ = 0;
    uint8_t* to_ = nullptr;  // where its next row goes
    int next_row_ = 0;
    int num_rows_ = 0;
    int32_t tokens_ = -1;
    DEEPEP_TRACE(SpanClock spans_;)
};
#endif

}  // namespace
}  // namespace deepep::internode
