// The arithmetic of windows, messages and handles, against exact (128-bit) arithmetic and small models. Built by g++ with sanitizers:
//   window_fuzz fuzz SEED NUM_ROUNDS
//   window_fuzz need NUM_RANKS MAX_TOKENS HIDDEN NUM_TOPK HAS_REMOTE    prints the bytes of an arena that calls of this shape need
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <random>
#include <utility>
#include <vector>

#include "kernels/window.hpp"

using namespace deepep;
using namespace deepep::ibgda;
using Exact = __int128;

namespace {

std::mt19937_64 generator;

int64_t pick(int64_t low, int64_t high) { return std::uniform_int_distribution<int64_t>(low, high)(generator); }
bool flip() { return pick(0, 1) == 1; }
// Every magnitude equally likely.
int64_t pick_magnitude(int64_t high) {
    int bits = 0;
    while (high >> bits != 0) ++bits;
    return pick(1, std::max<int64_t>(1, std::min(high, (int64_t{1} << pick(1, bits)) - 1)));
}

void expect(bool is_good, const char* what, int64_t a = 0, int64_t b = 0, int64_t c = 0, int64_t d = 0) {
    if (is_good) return;
    std::printf("%s: %lld %lld %lld %lld\n", what, static_cast<long long>(a), static_cast<long long>(b), static_cast<long long>(c), static_cast<long long>(d));
    std::exit(1);
}

struct Shape {
    int num_ranks, max_tokens, hidden, num_topk, num_experts;
    bool reduces_at_source, has_remote;
};

Shape pick_shape() {
    const int num_ranks = static_cast<int>(pick_magnitude(kMaxWindowRanks));
    const int num_local = static_cast<int>(pick_magnitude(std::min(kMaxLocalExperts, std::max(1, kMaxExperts / num_ranks))));
    return {num_ranks, static_cast<int>(pick_magnitude(kMaxTokens)), static_cast<int>(8 * pick_magnitude(kMaxHidden / 8)),
            static_cast<int>(pick(1, kMaxTopk)), num_ranks * num_local, flip(), flip()};
}

// A window whose parts are just large enough for the shape.
LowLatencyWindow tight(const Shape& s) {
    const int64_t num_part_bytes = LowLatencyWindow::needed_part_bytes(s.max_tokens, s.hidden, s.num_topk, s.reduces_at_source);
    return {s.num_ranks, LowLatencyWindow::share_of(s.reduces_at_source), num_part_bytes, s.has_remote};
}

void check_messages() {
    const Shape s = pick_shape();
    const bool use_fp8 = s.hidden % 128 == 0 && flip(), has_weights = flip();
    const RowMessage message = RowMessage::of(s.hidden, use_fp8, s.num_topk, has_weights);
    const Exact payload = use_fp8 ? s.hidden : 2 * static_cast<Exact>(s.hidden);
    const int num_scales = use_fp8 ? s.hidden / 128 : 0;
    expect(message.num_payload_bytes == payload && message.num_payload_bytes % 16 == 0, "payload", s.hidden, use_fp8);
    expect(message.scales_offset() == payload && message.header_offset() >= message.scales_offset() + 4 * num_scales, "scales", s.hidden);
    expect(message.header_offset() % 16 == 0 && message.header_offset() < message.scales_offset() + 4 * num_scales + 16, "header", s.hidden);
    const int words = 2 + s.num_topk * (has_weights ? 2 : 1);
    expect(message.num_bytes() >= message.header_offset() + 4 * words && message.num_bytes() % 16 == 0, "message", s.hidden, s.num_topk);
    expect(message.stride() % 128 == 0 && message.stride() >= message.num_bytes(), "message stride", s.hidden, s.num_topk);
    const CombineRow row = CombineRow::of(s.hidden, false);
    expect(row.num_bytes == 2 * s.hidden && row.stride() >= row.num_bytes && row.stride() % 128 == 0, "combine row", s.hidden);
    if (s.hidden % kLogfmtColumns == 0) {
        expect(CombineRow::of(s.hidden, true).stride() <= row.stride(), "compressed row", s.hidden);
        expect(3 * kLogfmtCodeWords >= kLogfmtColumns && kLogfmtWords > kLogfmtCodeWords, "LogFMT block");
    }
}

void check_messages_fit() {
    const Shape s = pick_shape();
    const LowLatencyWindow window = tight(s);
    const Exact rows = static_cast<Exact>(s.max_tokens) * RowMessage::of(s.hidden, false, s.num_topk, true).stride();
    const Exact back = static_cast<Exact>(s.max_tokens) * (s.reduces_at_source ? s.num_topk : 1) * CombineRow::of(s.hidden, false).stride();
    expect(rows <= window.num_dispatch_bytes(), "dispatched rows do not fit", s.max_tokens, s.hidden, s.num_topk);
    expect(back <= window.num_combine_bytes(), "combined rows do not fit", s.max_tokens, s.hidden, s.num_topk, s.reduces_at_source);
    expect(4 * static_cast<Exact>(s.max_tokens) * s.num_topk <= window.num_weight_bytes(), "weights do not fit", s.max_tokens, s.num_topk);
    expect(2 + s.num_experts / s.num_ranks <= kNumIndexWords, "the index does not fit", s.num_experts, s.num_ranks);
    // An arena of the size that the shape asks for holds parts as large as it asked for, and so does every larger one.
    const int64_t asked = window.num_bytes();
    for (const int64_t extra : {int64_t{0}, pick_magnitude(1 << 30)}) {
        const auto found = LowLatencyWindow::of(s.num_ranks, asked + extra, s.reduces_at_source, s.has_remote);
        expect(found.num_part_bytes >= window.num_part_bytes, "the asked size is too small", asked, extra, found.num_part_bytes, window.num_part_bytes);
        expect(found.num_bytes() <= asked + extra, "the window is larger than its arena", asked, extra, found.num_bytes());
    }
}

void check_window_grows_with_shape() {
    Shape small = pick_shape(), large = small;
    switch (pick(0, 3)) {
        case 0: large.max_tokens = static_cast<int>(pick(small.max_tokens, kMaxTokens)); break;
        case 1: large.hidden = static_cast<int>(8 * pick(small.hidden / 8, kMaxHidden / 8)); break;
        case 2: large.num_topk = static_cast<int>(pick(small.num_topk, kMaxTopk)); break;
        default: large.has_remote = true;
    }
    expect(tight(small).num_bytes() <= tight(large).num_bytes(), "a larger shape needs less", tight(small).num_bytes(), tight(large).num_bytes());
}

// All regions lie behind one another, aligned, in an arena of any size.
void check_regions() {
    const int num_ranks = static_cast<int>(pick_magnitude(kMaxWindowRanks));
    const int64_t num_arena_bytes = pick_magnitude(int64_t{1} << 36);
    const auto window = LowLatencyWindow::of(num_ranks, num_arena_bytes, flip(), flip());
    const std::vector<std::pair<int64_t, int64_t>> fixed = {
        {0, sizeof(DeviceState)},
        {window.launches_offset(), 4 * kNumDirections},
        {window.sends_offset(), 4 * kNumDirections},
        {window.readers_offset(), 4 * kNumDirections},
        {window.sequences_offset(), 4ll * kNumDirections * num_ranks},
        {window.consumed_offset(), 4ll * kNumDirections * kNumSlots * num_ranks},
        {window.broken_offset(), 4ll * kNumDirections * kNumSlots * num_ranks},
        {window.posted_offset(), 8ll * kNumDirections * num_ranks},
        {window.masked_offset(), 4ll * num_ranks},
        {window.verdicts_offset(), 4ll * num_ranks},
        {window.waits_offset(), 8ll * kNumDirections * num_ranks},
        {window.claims_offset(), 4ll * kNumDirections * kMaxBlocks},
        {window.draws_offset(), 2 * kNumDirections * LowLatencyWindow::kAlignment},
        {window.arenas_offset(), 8ll * num_ranks},
        {window.credits_offset(), 8ll * kNumDirections * num_ranks},
        {window.boxes_offset(), 0},
    };
    for (size_t i = 1; i < fixed.size(); ++i)
        expect(fixed[i - 1].first + fixed[i - 1].second <= fixed[i].first, "regions overlap", static_cast<int64_t>(i), fixed[i].first);
    expect(window.boxes_offset() % LowLatencyWindow::kAlignment == 0, "boxes are not aligned", window.boxes_offset());
    if (window.num_part_bytes == 0) return;
    expect(window.num_bytes() <= num_arena_bytes, "the window is larger than its arena", window.num_bytes(), num_arena_bytes);
    const int slot = static_cast<int>(pick(0, kNumSlots - 1)), writer = static_cast<int>(pick(0, num_ranks - 1));
    const int64_t index = window.index_offset(slot, writer), weights = window.weights_offset(slot, writer);
    const int64_t rows = window.rows_offset(kDispatch, slot, writer), back = window.rows_offset(kCombine, slot, writer);
    expect(index + 8 * kNumIndexWords <= weights && weights + window.num_weight_bytes() <= rows && rows + window.num_dispatch_bytes() <= back,
           "parts of a box overlap", index, weights, rows, back);
    const bool is_last = slot == kNumSlots - 1 && writer == num_ranks - 1;
    const int64_t end = is_last ? window.boxes_offset() + window.outbox_distance()
                                : window.index_offset(writer == num_ranks - 1 ? slot + 1 : slot, writer == num_ranks - 1 ? 0 : writer + 1);
    expect(back + window.num_combine_bytes() <= end, "boxes overlap", back, end, slot, writer);
    expect((window.has_outboxes ? 2 : 1) * window.outbox_distance() + window.boxes_offset() == window.num_bytes(), "boxes and outboxes", window.num_bytes());
    for (const int64_t offset : {index, weights, rows, back, window.outbox_distance()})
        expect(offset % LowLatencyWindow::kAlignment == 0, "a box is not aligned", offset);
}

// A sender and a receiver that take turns at random: a slot is granted exactly when the message that lay in it has been taken.
void check_credits() {
    uint32_t sent = 0, told[kNumSlots] = {};
    const auto offset = flip() ? 0u : static_cast<uint32_t>(pick(0, (int64_t{1} << 31)) / kNumSlots * kNumSlots);
    std::vector<uint32_t> waiting;
    sent = offset;
    for (uint32_t back = 0; back < kNumSlots && offset != 0; ++back) told[(offset - back) % kNumSlots] = offset - back;
    for (int step = 0; step < 64; ++step) {
        uint64_t credits = 0;
        for (int slot = 0; slot < kNumSlots; ++slot) credits |= credit_of(told[slot], slot);
        const uint32_t next = sent + 1;
        bool is_free = true;
        for (const uint32_t message : waiting) is_free &= message % kNumSlots != next % kNumSlots;
        expect(grants(credits, next) == is_free, "credit", next, static_cast<int64_t>(credits), is_free);
        if (is_free && flip()) {
            waiting.push_back(next);
            sent = next;
        } else if (!waiting.empty()) {
            const size_t taken = static_cast<size_t>(pick(0, static_cast<int64_t>(waiting.size()) - 1));  // in any order
            told[waiting[taken] % kNumSlots] = waiting[taken];
            waiting.erase(waiting.begin() + static_cast<int64_t>(taken));
        }
    }
}

void check_handles() {
    const Shape s = pick_shape();
    const HandleLayout handle{s.num_ranks, s.max_tokens, s.num_experts, s.num_topk};
    const Exact rows = static_cast<Exact>(s.num_experts) * s.max_tokens;
    const Exact choices = static_cast<Exact>(s.num_ranks) * s.max_tokens * s.num_topk;
    expect(handle.meta() >= rows && handle.tokens() >= handle.meta() + 1, "src_info", s.num_experts, s.max_tokens);
    expect(handle.ticket() >= handle.tokens() + s.num_ranks && handle.routes() >= handle.ticket() + s.num_ranks, "tokens and ticket", s.num_ranks);
    expect(handle.weights() >= handle.routes() + choices && handle.num_words() >= handle.weights() + choices, "routes and weights", s.num_ranks, s.max_tokens);
    for (const int64_t offset : {handle.meta(), handle.tokens(), handle.ticket(), handle.routes(), handle.weights(), handle.num_words()})
        expect(offset % 4 == 0, "a part of a handle is not aligned", offset);
}

}  // namespace

int main(int argc, char** argv) {
    if (argc == 7 && std::strcmp(argv[1], "need") == 0) {
        const Shape shape{std::atoi(argv[2]), std::atoi(argv[3]), std::atoi(argv[4]), std::atoi(argv[5]), 0, false, std::atoi(argv[6]) != 0};
        std::printf("%lld\n", static_cast<long long>(tight(shape).num_bytes()));
        return 0;
    }
    if (argc != 4) return 2;
    generator.seed(static_cast<uint64_t>(std::atoll(argv[2])));
    for (int64_t round = 0; round < std::atoll(argv[3]); ++round) {
        check_messages();
        check_messages_fit();
        check_window_grows_with_shape();
        check_regions();
        check_credits();
        check_handles();
    }
    return 0;
}
