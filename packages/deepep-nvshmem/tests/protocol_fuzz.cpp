// The arithmetic that hosts and kernels share, against exact (128-bit) arithmetic and small models. Built by g++ with sanitizers:
//   protocol_fuzz SEED NUM_ROUNDS
#include <cstdio>
#include <cstdlib>
#include <map>
#include <random>
#include <vector>

#include "deepep/layout/arithmetic.hpp"
#include "deepep/layout/routing.hpp"
#include "deepep/layout/signal.hpp"
#include "deepep/layout/window.hpp"
#include "deepep/memory/heap.hpp"

using namespace deepep;
using Exact = __int128;

namespace {

std::mt19937_64 generator;

int64_t pick(int64_t low, int64_t high) { return std::uniform_int_distribution<int64_t>(low, high)(generator); }
// Sizes from one to the largest, every magnitude equally likely.
int64_t pick_magnitude(int num_bits) {
    const int bits = static_cast<int>(pick(0, num_bits));
    return bits == 0 ? 0 : pick(0, (int64_t{1} << bits) - 1);
}

[[noreturn]] void fail(const char* what, int64_t a, int64_t b, int64_t c, int64_t d) {
    std::printf("%s: %lld %lld %lld %lld\n", what, static_cast<long long>(a), static_cast<long long>(b), static_cast<long long>(c), static_cast<long long>(d));
    std::exit(1);
}
void expect(bool is_good, const char* what, int64_t a = 0, int64_t b = 0, int64_t c = 0, int64_t d = 0) {
    if (!is_good) fail(what, a, b, c, d);
}

void check_extents() {
    const int64_t begin = pick_magnitude(40), end = begin + pick_magnitude(40);
    const int64_t offset = pick_magnitude(62), count = pick_magnitude(62), unit = pick_magnitude(62);
    const bool wanted = offset >= begin && offset <= end && static_cast<Exact>(offset) + static_cast<Exact>(count) * unit <= end;
    expect(extent_fits(offset, count, unit, begin, end) == wanted, "extent_fits", offset, count, unit, end);
    const int64_t near = begin + pick(0, end - begin);
    const int64_t some = pick_magnitude(20), size = pick_magnitude(20);
    expect(extent_fits(near, some, size, begin, end) == (static_cast<Exact>(near) + static_cast<Exact>(some) * size <= end), "extent_fits near", near, some, size, end);
}

void check_signals() {
    const auto epoch = static_cast<uint32_t>(generator()), value = static_cast<uint32_t>(generator());
    const uint64_t word = signal_word(epoch, value);
    expect(signal_epoch(word) == epoch && signal_value(word) == value, "signal word", epoch, value);
    const auto offset = static_cast<int64_t>(generator() >> 1);
    expect(join_halves(low_half(offset), high_half(offset)) == offset, "halves", offset);
}

void check_routing() {
    const int num_ranks = static_cast<int>(pick(1, kMaxRanks)), num_local = static_cast<int>(pick(1, 5000));
    const int64_t num_experts = static_cast<int64_t>(num_ranks) * num_local;
    int64_t expert = pick(-3, num_experts + 3);
    if (pick(0, 9) == 0) expert = static_cast<int64_t>(generator());  // whatever a broken caller may send
    int home = -1;
    for (int rank = 0; rank < num_ranks; ++rank) {
        const bool is_here = expert >= static_cast<Exact>(rank) * num_local && expert < static_cast<Exact>(rank + 1) * num_local && expert >= 0;
        if (is_here) home = rank;
        expect(localise_expert(expert, rank, num_local) == (is_here ? expert - static_cast<int64_t>(rank) * num_local : -1), "localise", expert, rank, num_local);
    }
    expect(rank_of_expert(expert, num_experts, num_local) == home, "rank_of_expert", expert, num_experts, num_local, home);
}

void check_parts() {
    const int64_t row = 16 * (1 + pick_magnitude(24)), largest = 16 * pick(16, 1024);
    const RowParts parts = RowParts::cut(row, largest);
    Exact covered = 0;
    expect(parts.num_parts >= 1 && parts.num_part_bytes % 16 == 0 && parts.num_part_bytes <= largest, "part size", row, largest, parts.num_parts, parts.num_part_bytes);
    for (int part = 0; part < parts.num_parts; ++part) {
        expect(parts.begin(part) == covered, "part begin", row, largest, part);
        const int32_t num_bytes = parts.num_bytes(part);
        expect(num_bytes > 0 && num_bytes % 16 == 0 && num_bytes <= parts.num_part_bytes, "part bytes", row, largest, part, num_bytes);
        covered += num_bytes;
    }
    expect(covered == row, "parts cover the row", row, largest, parts.num_parts);
}

void check_side_rows() {
    const SideRow side{static_cast<int32_t>(pick(0, 2000)), static_cast<int32_t>(pick(0, kMaxTopk)), static_cast<int32_t>(pick(0, 1))};
    expect(side.topk_idx_offset() % 8 == 0 && side.topk_idx_offset() >= 4 * side.num_scales, "top-k offset", side.num_scales, side.num_topk);
    expect(side.weights_offset() == side.topk_idx_offset() + 8 * side.num_topk, "weights offset", side.num_scales, side.num_topk);
    expect(side.src_idx_offset() == side.weights_offset() + 4 * side.num_topk, "source offset", side.num_scales, side.num_topk);
    expect(side.num_bytes() % 16 == 0 && side.num_bytes() >= side.src_idx_offset() + 4 * side.num_src_idx, "side bytes", side.num_scales, side.num_topk);
}

// Every region of the window lies behind the one before, and its last element inside it.
void check_window() {
    const int num_ranks = static_cast<int>(pick(1, kMaxRanks)), max_local = static_cast<int>(1 + pick_magnitude(20));
    const int64_t staging = num_ranks * kNumSlotBytes * (2 + pick_magnitude(24));
    const NormalWindow window = NormalWindow::of(num_ranks, max_local, staging);
    auto* arena = reinterpret_cast<uint8_t*>(uintptr_t{1} << 44);
    const auto offset_of = [&](const void* pointer) { return static_cast<int64_t>(static_cast<const uint8_t*>(pointer) - arena); };
    const int last = num_ranks - 1;
    const auto last_op = static_cast<Op>(kNumOps - 1);
    struct Region {
        const char* name;
        int64_t begin;
        int64_t first;
        int64_t last_end;
    };
    const std::vector<Region> regions = {
        {"state", window.state_offset(), offset_of(window.state(arena)), window.state_offset() + static_cast<int64_t>(sizeof(DeviceState))},
        {"histogram", window.histogram_offset(), offset_of(window.histogram(arena)), window.histogram_offset() + 4 * (static_cast<int64_t>(num_ranks) * max_local + num_ranks)},
        {"counts", window.counts_offset(), offset_of(window.counts(arena, 2, 0)), offset_of(window.counts(arena, 7, last) + kNumHeaderWords + num_ranks + max_local)},
        {"ready", window.ready_offset(), offset_of(window.ready(arena, Op::kNone, 0)), offset_of(window.ready(arena, last_op, last) + kNumReadyWords)},
        {"done", window.done_offset(), offset_of(window.done(arena, Op::kNone, 0)), offset_of(window.done(arena, last_op, last) + 1)},
        {"slot_full", window.slot_full_offset(), offset_of(window.slot_full(arena, Op::kNone, 0)), offset_of(window.slot_full(arena, last_op, last) + window.num_slots)},
        {"slot_free", window.slot_free_offset(), offset_of(window.slot_free(arena, Op::kNone, 0)), offset_of(window.slot_free(arena, last_op, last) + window.num_slots)},
        {"staging", window.staging_offset(), offset_of(window.staging(arena, 0)), offset_of(window.staging(arena, last)) + window.num_slots * kNumSlotBytes},
    };
    int64_t end = 0;
    for (const Region& region : regions) {
        expect(region.begin >= end && region.begin % NormalWindow::kAlignment == 0 && region.first == region.begin, region.name, num_ranks, max_local, region.begin, end);
        end = region.last_end;
    }
    expect(end <= window.num_bytes() && window.num_bytes() % NormalWindow::kAlignment == 0, "window bytes", num_ranks, max_local, end, window.num_bytes());
    expect(window.num_slots * kNumSlotBytes * num_ranks <= staging, "slots fit the staging bytes", num_ranks, staging, window.num_slots);
    expect(offset_of(window.counts(arena, 4, 0)) != offset_of(window.counts(arena, 5, 0)), "two copies of counts");
}

// Random blocks: never overlapping, never lost, joined again at the end.
void check_heap() {
    const uint64_t granule = uint64_t{1} << pick(9, 21), base = granule * static_cast<uint64_t>(pick(1, 1 << 20));
    uint64_t num_bytes = granule * static_cast<uint64_t>(pick(1, 200));
    Heap heap(base, num_bytes, granule);
    std::map<uint64_t, uint64_t> blocks;
    for (int step = 0; step < 200; ++step) {
        const int64_t action = pick(0, 9);
        if (action == 0) {
            heap.extend(granule);
            num_bytes += granule;
        } else if (action < 6 || blocks.empty()) {
            const uint64_t wanted = static_cast<uint64_t>(pick(1, static_cast<int64_t>(granule) * 12));
            const uint64_t largest = heap.num_largest_free_bytes();
            const uint64_t address = heap.allocate(wanted);
            expect((address == 0) == (largest < wanted), "heap gives what it has", static_cast<int64_t>(largest), static_cast<int64_t>(wanted));
            if (address == 0) continue;
            expect(address % granule == 0 && address >= base && address + wanted <= base + num_bytes, "heap block in range", static_cast<int64_t>(address), static_cast<int64_t>(wanted));
            const auto next = blocks.lower_bound(address);
            expect(next == blocks.end() || address + wanted <= next->first, "heap block overlaps the next");
            if (next != blocks.begin()) {
                auto previous = next;
                --previous;
                expect(previous->first + previous->second <= address, "heap block overlaps the one before");
            }
            blocks[address] = wanted;
        } else {
            auto block = blocks.begin();
            std::advance(block, pick(0, static_cast<int64_t>(blocks.size()) - 1));
            heap.free(block->first);
            bool was_refused = false;
            try {
                heap.free(block->first);
            } catch (const ArgumentError&) {
                was_refused = true;
            }
            expect(was_refused, "a second free is refused");
            blocks.erase(block);
        }
    }
    for (const auto& block : blocks) heap.free(block.first);
    expect(heap.num_free_bytes() == num_bytes && heap.num_largest_free_bytes() == num_bytes, "heap is whole again", static_cast<int64_t>(num_bytes));
}

}  // namespace

int main(int argc, char** argv) {
    if (argc != 3) {
        std::printf("usage: protocol_fuzz SEED NUM_ROUNDS\n");
        return 2;
    }
    generator.seed(std::strtoull(argv[1], nullptr, 10));
    const long num_rounds = std::strtol(argv[2], nullptr, 10);
    for (long round = 0; round < num_rounds; ++round) {
        check_extents();
        check_signals();
        check_routing();
        check_parts();
        check_side_rows();
        check_window();
        if (round % 20 == 0) check_heap();
    }
    std::printf("%ld rounds\n", num_rounds);
    return 0;
}
