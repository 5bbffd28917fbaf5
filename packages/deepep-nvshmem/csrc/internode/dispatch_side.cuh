#pragma once
// Dispatch: the side part of a row, as messages bring it: scales, choices, weights, destination rows, token.
#include "internode/kernels.hpp"

namespace deepep::internode {
namespace {

// The side part of a row for a node, as it travels; scales only if `has_scales`. By the whole warp, without a barrier. Loads come before stores, so that
// what the caller does in between hides them.
class SidePart {
public:
    __device__ SidePart(const DispatchArgs& args, int node, int64_t token, bool has_scales) : args_(args), token_(token), lane_(threadIdx.x % 32) {
        const DispatchMessage& message = args.message;
        const bool is_known = token >= 0 && token < args.num_tokens;
        num_scales_ = is_known && has_scales ? message.num_scales : 0;
        if (is_known && !message.is_cached) {
            if (lane_ < message.num_topk) {
                const int64_t chosen = args.topk_idx[token * message.num_topk + lane_];
                if (chosen >= 0 && chosen < args.num_experts) expert_ = static_cast<int32_t>(chosen);
                weight_ = args.topk_weights[token * message.num_topk + lane_];
            }
            if (lane_ < message.num_heads) head_ = args.dst_rows[token * args.domain.group.num_ranks + node * message.num_heads + lane_];
        }
#pragma unroll
        for (int i = 0; i < kEarly; ++i)
            if (lane_ + i * 32 < num_scales_) early_[i] = scales()[(lane_ + i * 32) * args.scales_stride_col];
    }

    __device__ void store(uint8_t* side) const {
        const DispatchMessage& message = args_.message;
#pragma unroll
        for (int i = 0; i < kEarly; ++i)
            if (lane_ + i * 32 < num_scales_) reinterpret_cast<uint32_t*>(side)[lane_ + i * 32] = early_[i];
        for (int col = lane_ + kEarly * 32; col < num_scales_; col += 32) reinterpret_cast<uint32_t*>(side)[col] = scales()[col * args_.scales_stride_col];
        if (message.is_cached) return;
        if (lane_ < message.num_topk) {
            reinterpret_cast<int32_t*>(side + args_.side.topk_idx)[lane_] = expert_;
            reinterpret_cast<float*>(side + args_.side.weights)[lane_] = weight_;
        }
        if (lane_ < message.num_heads) reinterpret_cast<int32_t*>(side + args_.side.heads)[lane_] = head_;
        if (lane_ == 0) *reinterpret_cast<int32_t*>(side + args_.side.token) = static_cast<int32_t>(token_);
    }

private:
    static constexpr int kEarly = 2;
    __device__ const uint32_t* scales() const { return args_.scales + token_ * args_.scales_stride_token; }

    const DispatchArgs& args_;
    const int64_t token_;
    const int lane_;
    int num_scales_ = 0;
    int32_t expert_ = -1;
    int32_t head_ = -1;
    float weight_ = 0.0f;
    uint32_t early_[kEarly];
};

}  // namespace
}  // namespace deepep::internode
