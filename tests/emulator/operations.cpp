// Operations that join the lanes of a warp or the threads of a block.
#include <algorithm>
#include <cstring>
#include <sstream>
#include <utility>

#include "machine.hpp"

namespace emulator {

// Answers a warp operation if all lanes of its mask that still run have come.
void finish_warp_op(Block* block, int warp, const Fiber& first) {
    const WarpOp op = first.op;
    const uint32_t mask = first.mask;
    const uint32_t wanted = mask & block->warps[warp].alive;
    if ((block->warps[warp].in_op & wanted) != wanted) return;
    Fiber* lanes[32];
    for (int lane = 0; lane < 32; ++lane) {
        lanes[lane] = nullptr;
        if ((wanted >> lane & 1) == 0) continue;
        Fiber* fiber = &block->fibers[32 * warp + lane];
        if (fiber->op != op || fiber->mask != mask || fiber->line != first.line || std::strcmp(fiber->file, first.file) != 0) return;
        lanes[lane] = fiber;
    }
    uint64_t all = 0;
    bool is_first = true;
    for (int lane = 0; lane < 32; ++lane) {
        if (lanes[lane] == nullptr) continue;
        const uint64_t value = lanes[lane]->value;
        const auto signed32 = [](uint64_t v) { return static_cast<int32_t>(static_cast<uint32_t>(v)); };
        switch (op) {
            case WarpOp::kBallot: all |= static_cast<uint64_t>(value != 0) << lane; break;
            case WarpOp::kAny: all |= value != 0; break;
            case WarpOp::kAll: all = (is_first || all != 0) && value != 0; break;
            case WarpOp::kMaxUnsigned: all = is_first ? value : std::max(all, value); break;
            case WarpOp::kMinUnsigned: all = is_first ? value : std::min(all, value); break;
            case WarpOp::kAddUnsigned: all = static_cast<uint32_t>(all + value); break;
            case WarpOp::kOr: all |= value; break;
            case WarpOp::kAnd: all = is_first ? value : all & value; break;
            case WarpOp::kMaxSigned: all = is_first || signed32(value) > signed32(all) ? value : all; break;
            case WarpOp::kMinSigned: all = is_first || signed32(value) < signed32(all) ? value : all; break;
            default: break;
        }
        is_first = false;
    }
    for (int lane = 0; lane < 32; ++lane) {
        Fiber* fiber = lanes[lane];
        if (fiber == nullptr) continue;
        if (op == WarpOp::kShuffle) {
            const Fiber* source = lanes[fiber->source & 31];
            if (source == nullptr) {
                std::ostringstream text;
                text << block->kernel->name << ", block " << block->index.x << ", thread " << fiber->thread << ": a shuffle reads lane " << fiber->source
                     << ", which takes no part (mask " << std::hex << mask << ")";
                note(text.str());
                fiber->answer = 0xdeadbeefdeadbeefull;
            } else {
                fiber->answer = source->value;
            }
        } else if (op == WarpOp::kMatchAny) {
            fiber->answer = 0;
            for (int other = 0; other < 32; ++other)
                if (lanes[other] != nullptr && lanes[other]->value == fiber->value) fiber->answer |= 1ull << other;
        } else {
            fiber->answer = all;
        }
    }
    for (Fiber* fiber : lanes) {
        if (fiber == nullptr) continue;
        fiber->in_warp_op = false;
        if (fiber != machine.current) list_ready(fiber);
    }
    block->warps[warp].in_op &= ~wanted;
}

void finish_barrier(Block* block, Barrier& barrier) {
    const int wanted = barrier.num_threads != 0 ? barrier.num_threads : block->num_alive;
    if (barrier.num_arrived < wanted || barrier.num_arrived == 0) return;
    const bool any = std::exchange(barrier.any, false);
    barrier.num_arrived = 0;
    std::vector<Fiber*> waiting;
    waiting.swap(barrier.waiting);
    for (Fiber* fiber : waiting) {
        fiber->barrier = -1;
        fiber->answer = any;
        if (fiber != machine.current) list_ready(fiber);
    }
}

void flip(Mbarrier& barrier) {
    if (barrier.num_pending != 0 || barrier.num_bytes != 0) return;
    barrier.num_pending = barrier.num_arrivals;
    ++barrier.phase;
    std::vector<Fiber*> waiting;
    waiting.swap(barrier.waiting);
    for (Fiber* fiber : waiting) list_ready(fiber);
}

Mbarrier& mbarrier_of(uint64_t* address) {
    auto& known = machine.current->block->mbarriers;
    const auto found = known.find(address);
    if (found == known.end()) fail("an mbarrier is used before it is initialised");
    return found->second;
}

uint64_t warp_op(WarpOp op, uint32_t mask, uint64_t value, int source, const char* file, int line) {
    Fiber* fiber = machine.current;
    const int lane = fiber->thread % 32;
    if ((mask >> lane & 1) == 0) fail(fiber->block->kernel->name + ": a lane calls a warp operation whose mask leaves it out");
    fiber->op = op;
    fiber->mask = mask;
    fiber->value = value;
    fiber->source = source;
    fiber->file = file;
    fiber->line = line;
    fiber->in_warp_op = true;
    fiber->block->warps[fiber->thread / 32].in_op |= 1u << lane;
    finish_warp_op(fiber->block, fiber->thread / 32, *fiber);
    if (fiber->in_warp_op) block_at("warp operation");
    return fiber->answer;
}

bool barrier(int number, int num_threads, bool waits, bool value) {
    Fiber* fiber = machine.current;
    Barrier& barrier = fiber->block->barriers[number];
    if (barrier.num_arrived > 0 && barrier.num_threads != num_threads) {
        fail(fiber->block->kernel->name + ": barrier " + std::to_string(number) + " is used for " + std::to_string(barrier.num_threads) + " and for " +
             std::to_string(num_threads) + " threads at once");
    }
    barrier.num_threads = num_threads;
    barrier.any = barrier.any || value;
    ++barrier.num_arrived;
    if (waits) {
        barrier.waiting.push_back(fiber);
        fiber->barrier = number;
    }
    finish_barrier(fiber->block, barrier);
    if (waits && fiber->barrier >= 0) block_at("barrier");
    return waits && fiber->answer != 0;
}

void mbarrier_init(uint64_t* address, int num_arrivals) {
    Mbarrier barrier{};
    barrier.num_arrivals = barrier.num_pending = num_arrivals;
    machine.current->block->mbarriers[address] = barrier;
}

void mbarrier_arrive(uint64_t* address, int num_expected_bytes) {
    Mbarrier& barrier = mbarrier_of(address);
    if (barrier.num_pending == 0) fail("an mbarrier gets more arrivals than it was made for");
    barrier.num_bytes += num_expected_bytes;
    --barrier.num_pending;
    flip(barrier);
}

void mbarrier_wait(uint64_t* address, uint32_t parity) {
    Mbarrier& barrier = mbarrier_of(address);
    // A waiter that misses a phase waits for the one after the next.
    while ((barrier.phase & 1) == (parity & 1)) {
        barrier.waiting.push_back(machine.current);
        block_at("mbarrier");
    }
}

}  // namespace emulator
