// Shared memory, loads that poll, stores that come late, and asynchronous copies.
#include <algorithm>
#include <cstring>
#include <utility>

#include "machine.hpp"

namespace emulator {

// Always longer than what was asked for.
size_t rounded_up(size_t num_bytes) { return (num_bytes + 1024) / 1024 * 1024; }

// Shared memory begins with anything.
Memory allocate_poisoned(size_t num_bytes) {
    const size_t rounded = rounded_up(num_bytes);
    Memory memory(static_cast<uint8_t*>(std::aligned_alloc(1024, rounded)));
    std::memset(memory.get(), kPoison, rounded);
    return memory;
}

bool is_overrun(const Memory& memory, size_t num_bytes) {
    const uint8_t* const begin = memory.get();
    return std::any_of(begin + num_bytes, begin + rounded_up(num_bytes), [](uint8_t byte) { return byte != kPoison; });
}

void forget_one(std::map<int, int>& counts, int group) {
    if (--counts[group] == 0) counts.erase(group);
}

void wake_copier(Fiber* fiber) {
    if (fiber->state == State::kBlocked && std::strcmp(fiber->where, "copies") == 0) list_ready(fiber);
}

// A copy reads what it copies at one time, and writes it at another.
void advance(size_t i) {
    Copy& copy = *machine.copies[i];
    Block* block = copy.block;
    CopyGroups* groups = copy.owner == nullptr ? nullptr : &copy.owner->copies[static_cast<int>(copy.kind)];
    if (!copy.is_read) {
        copy.is_read = true;
        copy.bytes.assign(static_cast<const uint8_t*>(copy.from), static_cast<const uint8_t*>(copy.from) + copy.num_bytes);
        if (copy.barrier == nullptr) {
            forget_one(groups->unread, copy.group);
            wake_copier(copy.owner);
        }
        return;
    }
    std::memcpy(copy.to, copy.bytes.data(), copy.bytes.size());
    ++machine.num_stores;
    if (copy.barrier != nullptr) {
        Mbarrier& barrier = block->mbarriers.at(copy.barrier);
        barrier.num_bytes -= copy.num_bytes;
        flip(barrier);
    } else if (groups != nullptr) {
        forget_one(groups->unwritten, copy.group);
        wake_copier(copy.owner);
    }
    std::swap(machine.copies[i], machine.copies.back());
    machine.copies.pop_back();
    if (--block->num_copies == 0 && block->fibers.empty()) --block->kernel->num_alive;
}

void advance_some_copies() {
    for (size_t n = (machine.copies.size() + 7) / 8; n > 0 && !machine.copies.empty(); --n) {
        const size_t i = machine.random() % machine.copies.size();
        if (machine.random() % machine.copies[i]->slowness == 0) advance(i);
    }
}

// While nobody else gets on. Those who poll may look before all have come.
bool advance_copies_alone() {
    if (machine.copies.empty()) return false;
    for (size_t i = machine.copies.size(); i-- > 0;)
        if (machine.random() % machine.copies[i]->slowness == 0) advance(i);
    return machine.pollers.empty() || machine.random() % 4 != 0;
}

void settle_place(const std::vector<LateStore>& stores) {
    for (const LateStore& store : stores) {
        if (store.num_bytes == 8)
            __atomic_store_n(static_cast<uint64_t*>(store.address), store.value, __ATOMIC_RELEASE);
        else
            __atomic_store_n(static_cast<uint32_t*>(store.address), static_cast<uint32_t>(store.value), __ATOMIC_RELEASE);
        ++machine.num_stores;
    }
}

void settle_block(Block* block) {
    for (const auto& [place, stores] : block->late_stores) settle_place(stores);
    block->late_stores.clear();
}

// Some of what has been stored is seen.
bool settle_some() {
    for (Block* block : machine.late_blocks) {
        for (auto at = block->late_stores.begin(); at != block->late_stores.end();) {
            if (machine.random() % 2 == 0) {
                ++at;
                continue;
            }
            settle_place(at->second);
            at = block->late_stores.erase(at);
        }
    }
    auto& blocks = machine.late_blocks;
    blocks.erase(std::remove_if(blocks.begin(), blocks.end(), [](const Block* block) { return block->late_stores.empty(); }), blocks.end());
    return !blocks.empty();
}

void loaded(const volatile void* address, uint64_t value, bool* look_again) {
    Fiber* fiber = machine.current;
    *look_again = false;
    if (fiber == nullptr) return;
    const uint64_t key = (reinterpret_cast<uintptr_t>(address) + fiber->num_stores) * 0x9e3779b97f4a7c15ull ^ value * 0xc2b2ae3d27d4eb4full ^ 1;
    uint64_t& place = fiber->remembered[(key >> 20) % kNumRemembered];
    if (place != key) {
        place = key;
        return;
    }
    fiber->state = State::kPolling;
    machine.pollers.push_back(fiber);
    *look_again = true;
    to_scheduler();
}

void stored() {
    Fiber* fiber = machine.current;
    if (fiber == nullptr) return;
    ++machine.num_stores;
    ++fiber->num_stores;
    if (machine.random() % 32 == 0) {
        list_ready(fiber);
        to_scheduler();
    }
}

void settle_word(uintptr_t word, bool only_overlapping = false) {
    auto& stores = machine.current->block->late_stores;
    const auto found = stores.find(word);
    if (found == stores.end() || (only_overlapping && std::none_of(found->second.begin(), found->second.end(), [](const LateStore& s) { return s.num_bytes == 8; }))) return;
    settle_place(found->second);
    stores.erase(found);
}

void store_late(void* address, uint64_t value, int num_bytes) {
    const LateStore store{address, value, num_bytes};
    if (machine.current == nullptr) return settle_place({store});
    Block* block = machine.current->block;
    const uintptr_t word = reinterpret_cast<uintptr_t>(address) / 4;
    settle_word(word ^ 1, num_bytes != 8);  // what has been stored to the same bytes, as another number of them, comes first
    if (block->late_stores.empty() && std::find(machine.late_blocks.begin(), machine.late_blocks.end(), block) == machine.late_blocks.end())
        machine.late_blocks.push_back(block);
    block->late_stores[word].push_back(store);
    stored();
}

void settle(const volatile void* address) {
    if (machine.current == nullptr || machine.current->block->late_stores.empty()) return;
    const uintptr_t word = reinterpret_cast<uintptr_t>(address) / 4;
    settle_word(word);
    settle_word(word ^ 1);
}

void settle_all() {
    if (machine.current != nullptr) settle_block(machine.current->block);
}

void copy_later(CopyKind kind, void* to, const void* from, int num_bytes, uint64_t* barrier) {
    Fiber* fiber = machine.current;
    const int unit = kind == CopyKind::kVector ? std::min(num_bytes, 16) : 16;
    if (num_bytes % unit != 0 || reinterpret_cast<uintptr_t>(to) % unit != 0 || reinterpret_cast<uintptr_t>(from) % unit != 0)
        fail(fiber->block->kernel->name + ": an asynchronous copy of " + std::to_string(num_bytes) + " bytes is not aligned to " + std::to_string(unit));
    CopyGroups& groups = fiber->copies[static_cast<int>(kind)];
    auto copy = std::make_unique<Copy>();
    copy->block = fiber->block;
    copy->kind = kind;
    copy->to = to;
    copy->from = from;
    copy->num_bytes = num_bytes;
    copy->barrier = barrier;
    copy->owner = fiber;
    copy->group = groups.next_group;
    copy->slowness = machine.random() % 8 == 0 ? 32 : 1;
    if (barrier == nullptr) {
        ++groups.unread[copy->group];
        ++groups.unwritten[copy->group];
    }
    machine.copies.push_back(std::move(copy));
    ++fiber->block->num_copies;
    // From now on, some copies at once, and what a copy brings into shared memory is neither old nor new until it has come.
    if (barrier != nullptr || kind == CopyKind::kVector) std::memset(to, kPoison, static_cast<size_t>(num_bytes));
    if (const uint64_t how_soon = machine.random() % 8; how_soon < 2) {
        advance(machine.copies.size() - 1);
        if (how_soon == 0) advance(machine.copies.size() - 1);
    }
}

void commit_copies(CopyKind kind) { ++machine.current->copies[static_cast<int>(kind)].next_group; }

void wait_copies(CopyKind kind, int num_pending, bool only_read) {
    Fiber* fiber = machine.current;
    CopyGroups& groups = fiber->copies[static_cast<int>(kind)];
    const std::map<int, int>& counts = only_read ? groups.unread : groups.unwritten;
    // Groups older than the newest `num_pending` have to be done.
    while (!counts.empty() && counts.begin()->first < groups.next_group - num_pending) block_at("copies");
}

void* shared(const void* tag, size_t num_bytes) {
    auto& statics = machine.current->block->statics;
    auto found = statics.find(tag);
    if (found == statics.end()) found = statics.emplace(tag, Block::Variable{allocate_poisoned(num_bytes), num_bytes}).first;
    return found->second.memory.get();
}

bool is_shared(const void* address) {
    const Block& block = *machine.current->block;
    const auto lies_in = [&](const Memory& memory, size_t num_bytes) {
        const uint8_t* begin = memory.get();
        return begin != nullptr && address >= begin && address < begin + num_bytes;
    };
    if (lies_in(block.dynamic, block.kernel->num_dynamic_bytes)) return true;
    for (const auto& [tag, variable] : block.statics)
        if (lies_in(variable.memory, variable.num_bytes)) return true;
    return false;
}

}  // namespace emulator
