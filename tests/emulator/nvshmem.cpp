// NVSHMEM with all PEs in one process. A put reads its source and lands in pieces, at any time and in any order; its signal follows its bytes, and
// nothing orders puts or signals among each other. Heaps may also be reached by stores, as over NVLink: bytes then land at once, and signals late. What is
// under way when a run ends lands in a later one, or in nvshmem_quiet.
#include <sys/mman.h>

#include <cstring>
#include <memory>
#include <string>
#include <vector>

#include "emulator.hpp"

namespace emulator {

void put_later(void* to, const void* from, size_t num_bytes, uint64_t* word, uint64_t value, int pe);

namespace {

// The heaps of a group of PEs, one behind the other with a gap that nobody may touch.
struct Heaps {
    uint8_t* base;
    size_t num_bytes;  // of one
    size_t stride;
    int num_pes;
    bool has_stores;

    // The PE whose heap holds these bytes, or -1.
    int owner(const void* address, size_t num) const {
        const auto* at = static_cast<const uint8_t*>(address);
        if (at < base || at >= base + stride * num_pes) return -1;
        const size_t offset = (at - base) % stride;
        return offset <= num_bytes && num <= num_bytes - offset ? static_cast<int>((at - base) / stride) : -1;
    }
    template <class T>
    T* at_pe(T* address, int pe) const {
        return reinterpret_cast<T*>(base + pe * stride + (reinterpret_cast<uint8_t*>(address) - base) % stride);
    }
};

struct Piece {
    size_t offset, num_bytes;
    bool is_read;
};

struct Put {
    const Heaps* heaps;
    uint8_t* to;
    const uint8_t* from;
    uint64_t* word;
    uint64_t value;
    int slowness;  // one of so many looks moves it on
    std::vector<uint8_t> bytes;
    std::vector<Piece> pieces;
};

std::vector<std::unique_ptr<Heaps>> groups;
std::vector<std::unique_ptr<Put>> puts;

// True when it has landed.
bool advance(Put& put) {
    if (put.pieces.empty()) {
        *const_cast<volatile uint64_t*>(put.word) = put.value;
        landed();
        return true;
    }
    const size_t i = random_number() % put.pieces.size();
    Piece& piece = put.pieces[i];
    if (!piece.is_read) {
        piece.is_read = true;
        // The bytes were noted when the put was made.
        if (std::memcmp(put.bytes.data() + piece.offset, put.from + piece.offset, piece.num_bytes) != 0) note("the source of a put is written before it has been read");
        return false;
    }
    std::memcpy(put.to + piece.offset, put.bytes.data() + piece.offset, piece.num_bytes);
    put.pieces.erase(put.pieces.begin() + static_cast<std::ptrdiff_t>(i));
    return false;
}

bool advance_some() {
    for (size_t i = puts.size(); i-- > 0;) {
        if (random_number() % puts[i]->slowness != 0 || !advance(*puts[i])) continue;
        std::swap(puts[i], puts.back());
        puts.pop_back();
    }
    return !puts.empty();
}

bool overlaps(const uint8_t* a, size_t num_a, const uint8_t* b, size_t num_b) { return num_a > 0 && num_b > 0 && a < b + num_b && b < a + num_a; }

// Those that hold the bytes; null: none do.
const Heaps* heaps_of(const void* address, size_t num_bytes, int pe) {
    for (const auto& group : groups) {
        if (group->owner(address, num_bytes) < 0) continue;
        if (pe < 0 || pe >= group->num_pes) fail("a put goes to PE " + std::to_string(pe) + " of " + std::to_string(group->num_pes));
        return group.get();
    }
    return nullptr;
}

}  // namespace

void* stored_at(const void* address, size_t num_bytes, int pe) {
    const Heaps* heaps = heaps_of(address, num_bytes, pe);
    if (heaps == nullptr) fail("a put goes to no symmetric heap, or leaves it");
    return heaps->has_stores ? heaps->at_pe(static_cast<uint8_t*>(const_cast<void*>(address)), pe) : nullptr;
}

void put_later(void* to, const void* from, size_t num_bytes, uint64_t* word, uint64_t value, int pe) {
    const Heaps* heaps = heaps_of(word, 8, pe);
    if (heaps == nullptr) fail("a signal's word lies in no symmetric heap");
    const int own = heaps->owner(word, 8);
    if (reinterpret_cast<uintptr_t>(word) % 8 != 0) fail("a signal's word is not aligned");
    if (num_bytes > 0 && (heaps->owner(to, num_bytes) != own || heaps->owner(from, num_bytes) != own)) fail("a put leaves the symmetric heap of its PE");
    auto put = std::make_unique<Put>();
    put->heaps = heaps;
    put->word = heaps->at_pe(word, pe);
    for (const auto& other : puts)
        if (other->word == put->word) fail("two signals to the same word are under way");
    put->value = value;
    constexpr int kSlowness[] = {1, 2, 8, 64};
    put->slowness = kSlowness[random_number() % 4];
    if (num_bytes > 0) {
        put->to = heaps->at_pe(static_cast<uint8_t*>(to), pe);
        put->from = static_cast<const uint8_t*>(from);
        put->bytes.assign(put->from, put->from + num_bytes);
        for (const auto& other : puts)
            if (overlaps(put->to, num_bytes, other->to, other->bytes.size())) fail("two puts to the same bytes are under way");
        const size_t num_pieces = 1 + random_number() % 3;
        for (size_t i = 0; i < num_pieces; ++i) {
            const size_t begin = num_bytes * i / num_pieces, end = num_bytes * (i + 1) / num_pieces;
            if (begin < end) put->pieces.push_back({begin, end - begin, false});
        }
    }
    puts.push_back(std::move(put));
    network = &advance_some;
    stored();
}

}  // namespace emulator

// The heap of PE 0; that of PE r lies r strides further.
EXPORTED void* emulator_open_heaps(int num_pes, size_t num_bytes, int has_stores, size_t* stride) {
    constexpr size_t kPage = 4096;
    const size_t rounded = (num_bytes + kPage - 1) / kPage * kPage;
    *stride = rounded + 16 * kPage;
    void* base = mmap(nullptr, *stride * num_pes, PROT_NONE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
    if (base == MAP_FAILED) return nullptr;
    for (int pe = 0; pe < num_pes; ++pe) {
        uint8_t* heap = static_cast<uint8_t*>(base) + *stride * pe;
        if (mprotect(heap, rounded, PROT_READ | PROT_WRITE) != 0) return nullptr;
        std::memset(heap, 0xa5, rounded);
    }
    emulator::groups.push_back(std::make_unique<emulator::Heaps>(emulator::Heaps{static_cast<uint8_t*>(base), num_bytes, *stride, num_pes, has_stores != 0}));
    return base;
}

// What is under way to these heaps is lost.
EXPORTED void emulator_close_heaps(void* base) {
    using emulator::groups, emulator::puts;
    for (size_t i = groups.size(); i-- > 0;) {
        const emulator::Heaps* heaps = groups[i].get();
        if (heaps->base != base) continue;
        for (size_t k = puts.size(); k-- > 0;)
            if (puts[k]->heaps == heaps) puts.erase(puts.begin() + static_cast<std::ptrdiff_t>(k));
        munmap(heaps->base, heaps->stride * heaps->num_pes);
        groups.erase(groups.begin() + static_cast<std::ptrdiff_t>(i));
    }
}

// --- NVSHMEM's host library, which is found by name ------------------------------------------------------------------

EXPORTED int nvshmemx_cumodule_init(void*) { return 0; }
EXPORTED void* nvshmem_ptr(const void* address, int pe) { return emulator::stored_at(address, 1, pe); }
EXPORTED void nvshmem_quiet() {
    for (auto& put : emulator::puts)
        while (!emulator::advance(*put)) {
        }
    emulator::puts.clear();
}
