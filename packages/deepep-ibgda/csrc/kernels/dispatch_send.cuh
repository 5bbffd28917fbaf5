#pragma once
// The sending half of dispatch: a block takes a token, or a part of its columns. Its workers cast the columns in registers and store them into the
// slots of the token's destinations; its control warp stores what the row needs beside: scales, header, and this block's words of the index.
#include "dispatch_header.cuh"

namespace deepep::ibgda {

__device__ __forceinline__ bool is_share_own(const Operation& operation, bool begins) { return !begins || operation.is_claimed != 0; }

// A share: every num_blocks-th unit, and the index messages to some ranks. `begins`: it is the block's own, and nothing has been read of this operation yet.
// All words of `named` are zero if it begins. Workers and the control warp meet at a barrier in each round: the row is cast, the destinations are known.
template <bool kFp8, bool kRemote>
__device__ __forceinline__ void send_share_as_worker(const DispatchArgs& args, DispatchShared& shared, uint32_t* named, int share, bool begins) {
    const DispatchPlan& plan = args.plan;
    const int thread = static_cast<int>(threadIdx.x), num_shares = plan.num_shares;
    if (!begins) {
#pragma unroll 1
        for (int i = thread; i < args.num_experts; i += kNumWorkers) named[i] = 0;
        worker_barrier();
    }
    int i = share < num_shares ? share : plan.num_units, round = 0;
#pragma unroll 1
    do {
        const Unit unit(plan, i);
        const Token& info = shared.tokens[round & 1];
        RowPart<kFp8> row;
        row.load(args, unit.token, unit.first, unit.end);
        if (round == 0) {
            // While the row is on its way. Shares without rows, and without an index message, need no counts.
            if (unit.is_there || share < args.domain.num_ranks) count_tokens(args, named, thread, args.num_tokens, kNumWorkers, unit.token, kNamedByAny);
            ptx::named_barrier_arrive(kTableCounted, kNumSendThreads);
        }
        bool needs_escape = false;
        if constexpr (kFp8) {
            row.cast(args, shared.scales[round & 1], unit.first, unit.end);
            DEEPEP_STAMP(2, thread == 0 && round == 0);
            send_barrier();
        } else {
            if (plan.parts_log2 == 0 ? row.has_empty_word() : unit.is_there && RowPart<kFp8>::finds_empty_word(args, unit.token)) shared.escaped_units[round & 1] = i;
            send_barrier();  // the other parity's word was read before the senders came here
            needs_escape = shared.escaped_units[round & 1] == i;
        }
        DEEPEP_STAMP(3, thread == 0 && round == 0);
        if (!is_share_own(shared.operation, begins)) return;
        if (!kFp8 && needs_escape) {
            const uint32_t escape = find_escape(args, shared, unit.token);
            if (thread == 0) shared.escape = escape;
            send_barrier();
            row.escape(escape);
        }
        i += num_shares;
        if (unit.is_there) row.store(args, info, unit.first, unit.end);
        DEEPEP_STAMP(5, thread == 0 && round == 0);
        if (i < plan.num_units) prefetch_row(args, i >> plan.parts_log2);
        if constexpr (kRemote) {
            send_barrier();
            if (unit.is_there) post_rows(args, shared.operation, info, unit);
        }
        ++round;
    } while (i < plan.num_units);
}

template <bool kFp8, bool kRemote>
__device__ __forceinline__ void send_share_as_control(const DispatchArgs& args, DispatchShared& shared, uint32_t* named, int share, bool begins) {
    const DispatchPlan& plan = args.plan;
    Operation& operation = shared.operation;
    const int num_shares = plan.num_shares;
    const bool receives = (args.phases & kReceive) != 0;
    Control<kRemote> control(args.domain, kDispatch, operation);
    int i = share < num_shares ? share : plan.num_units, round = 0, num_counted = 0;  // tokens whose choices are in the lower halves of `named`
#pragma unroll 1
    do {
        const Unit unit(plan, i);
        Token& info = shared.tokens[round & 1];
        ChoiceLane choice = {};
        choice.load(args, unit.token, unit.is_there);
        if (begins && round == 0) {
            control.begin_send(reinterpret_cast<uint32_t*>(args.handle + args.handle_layout.ticket()));
            if (receives) tell_receivers();
            DEEPEP_STAMP(1, threadIdx.x % 32 == 0);
        }
        const bool is_own = is_share_own(operation, begins), has_header = is_own && unit.is_there && unit.part == 0;
        // First what the others need first: nobody places a row before the counts are known.
        if (round == 0) {
            ptx::named_barrier(kTableCounted, kNumSendThreads);
            if (is_own && share < num_shares) store_index<kRemote>(args, operation, share, named);
            DEEPEP_STAMP(4, threadIdx.x % 32 == 0);
        } else {
            count_below(args, named, num_counted, unit.token);
        }
        num_counted = unit.token;
        choice.find_destinations(args, operation, info, unit.token);
        const auto send_header = [&](uint32_t flags, uint32_t escape) {
            if (!has_header) return;
            choice.write_header(args, named, info, flags, escape);
            store_header(args, info);
            store_absence<kRemote>(args, operation, info, unit.token);
        };
        if constexpr (kFp8) {
            send_header(kRowPresent, 0);
            send_barrier();
            if (is_own) store_scales(args, info, shared.scales[round & 1], unit.first, unit.end);
        } else {
            send_barrier();
            const bool needs_escape = shared.escaped_units[round & 1] == i;
            if (is_own && needs_escape) send_barrier();
            send_header(needs_escape ? kRowPresent | kRowEscaped : kRowPresent, needs_escape ? shared.escape : 0);
        }
        DEEPEP_STAMP(6, threadIdx.x % 32 == 0);
        if (begins && round == 0) control.settle(receives);
        if (!is_own) return;
        if constexpr (kRemote) {
            send_barrier();
            if (unit.is_there) post_rows(args, operation, info, unit);
        }
        i += num_shares;
        ++round;
    } while (i < plan.num_units);
}

// By all senders.
template <bool kFp8, bool kRemote>
__device__ __forceinline__ void send_rows(const DispatchArgs& args, DispatchShared& shared, uint32_t* named) {
    int share = static_cast<int>(blockIdx.x);
    bool begins = true;
    if (is_control_warp()) {
#pragma unroll 1
        do {
            send_share_as_control<kFp8, kRemote>(args, shared, named, share, begins);
            share = next_share_as_control(args.domain, kDispatch, shared.operation);
            begins = false;
        } while (share >= 0);
    } else {
#pragma unroll 1
        do {
            send_share_as_worker<kFp8, kRemote>(args, shared, named, share, begins);
            share = next_share_as_worker(shared.operation);
            begins = false;
        } while (share >= 0);
    }
}

}  // namespace deepep::ibgda
