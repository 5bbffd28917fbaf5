// Fibers, and the order in which they run.
#include <dlfcn.h>
#include <sys/mman.h>
#include <unistd.h>

#include <algorithm>
#include <cstring>
#include <utility>

#include "machine.hpp"

// Saves what the callee has to keep, and continues on another stack.
#if defined(__x86_64__)
asm(R"(
.text
.globl emulator_switch
.hidden emulator_switch
.type emulator_switch, @function
emulator_switch:
    pushq %rbp
    pushq %rbx
    pushq %r12
    pushq %r13
    pushq %r14
    pushq %r15
    movq %rsp, (%rdi)
    movq %rsi, %rsp
    popq %r15
    popq %r14
    popq %r13
    popq %r12
    popq %rbx
    popq %rbp
    ret
)");
#else
#error "The emulator switches stacks on x86-64 only."
#endif
extern "C" void emulator_switch(void** save, void* to);

namespace emulator {

Index3 thread_index, block_index, block_size, grid_size;
bool (*network)() = nullptr;
Machine machine;

uint8_t* take_stack() {
    if (machine.stacks.empty()) {
        constexpr int kNumAtOnce = 1024;
        void* memory = mmap(nullptr, kStackBytes * kNumAtOnce, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
        if (memory == MAP_FAILED) throw std::bad_alloc();
        for (int i = 0; i < kNumAtOnce; ++i) machine.stacks.push_back(static_cast<uint8_t*>(memory) + kStackBytes * i);
    }
    uint8_t* stack = machine.stacks.back();
    machine.stacks.pop_back();
    return stack;
}

void list_ready(Fiber* fiber) {
    fiber->state = State::kReady;
    Block* block = fiber->block;
    const int warp = fiber->thread / 32;
    if (block->warps[warp].is_listed) return;
    block->warps[warp].is_listed = true;
    machine.ready.push_back({block, warp});
}

void to_scheduler() {
    Fiber* fiber = machine.current;
    emulator_switch(&fiber->stack_pointer, machine.scheduler);
}

void block_at(const char* where) {
    machine.current->state = State::kBlocked;
    machine.current->where = where;
    to_scheduler();
}

void end_fiber() {
    Fiber* fiber = machine.current;
    Block* block = fiber->block;
    fiber->state = State::kDone;
    --block->num_alive;
    const int warp = fiber->thread / 32;
    block->warps[warp].alive &= ~(1u << fiber->thread % 32);
    for (int lane = 0; lane < 32; ++lane) {
        if ((block->warps[warp].in_op >> lane & 1) == 0) continue;
        finish_warp_op(block, warp, block->fibers[32 * warp + lane]);
    }
    for (auto& [number, barrier] : block->barriers)
        if (barrier.num_threads == 0) finish_barrier(block, barrier);
    ++machine.num_stores;
}

void fiber_main() {
    machine.current->block->kernel->thread();
    end_fiber();
    to_scheduler();
    std::abort();
}

void start_block(Block* block) {
    const int num_threads = static_cast<int>(block->kernel->block.x);
    block->fibers = std::vector<Fiber>(num_threads);
    block->num_alive = num_threads;
    for (int first = 0; first < num_threads; first += 32)
        block->warps.push_back({num_threads - first >= 32 ? 0xffffffffu : (1u << (num_threads - first)) - 1, 0, false});
    block->dynamic = allocate_poisoned(block->kernel->num_dynamic_bytes);
    for (int thread = 0; thread < num_threads; ++thread) {
        Fiber& fiber = block->fibers[thread];
        fiber.block = block;
        fiber.thread = thread;
        fiber.stack = take_stack();
        // Stacks begin apart within their pages, lest all of them want the same lines of the cache.
        void** top = reinterpret_cast<void**>(fiber.stack + kStackBytes - thread % 61 * 256);
        *--top = nullptr;  // keeps the stack aligned as a call would
        *--top = reinterpret_cast<void*>(&fiber_main);
        for (int i = 0; i < 6; ++i) *--top = nullptr;
        fiber.stack_pointer = top;
        list_ready(&fiber);
    }
}

void start_kernel(Kernel* kernel) {
    const int num_blocks = static_cast<int>(kernel->grid.x);
    kernel->num_alive = num_blocks;
    for (int i = 0; i < num_blocks; ++i) {
        auto block = std::make_unique<Block>();
        block->kernel = kernel;
        block->index = Index3(static_cast<unsigned>(i), 0, 0);
        machine.not_started.push_back(block.get());
        kernel->blocks.push_back(std::move(block));
    }
}

// The stacks of what was given up are not unwound: kernels own nothing.
void drop_block(Block* block) {
    for (Fiber& fiber : block->fibers) machine.stacks.push_back(fiber.stack);
    block->fibers.clear();
}

// Stores may still be on their way to global memory then.
void end_block(Block* block) {
    const char* fault = nullptr;
    if (is_overrun(block->dynamic, block->kernel->num_dynamic_bytes)) fault = " has written behind its dynamic shared memory";
    for (const auto& [tag, variable] : block->statics)
        if (is_overrun(variable.memory, variable.num_bytes)) fault = " has written behind one of its shared variables";
    for (const auto& copy : machine.copies) {
        if (copy->block != block) continue;
        if (copy->barrier != nullptr || copy->kind == CopyKind::kVector)
            fault = " ends before its copies have reached its shared memory";
        else if (!copy->is_read)
            fault = " ends before its copies have read their source";
        copy->owner = nullptr;
    }
    if (fault != nullptr) note(block->kernel->name + ", block " + std::to_string(block->index.x) + fault);
    drop_block(block);
    --block->kernel->num_resident;
    if (block->num_copies == 0) --block->kernel->num_alive;
}

// Starts what its stream holds next; true if anything was there.
bool start_streams() {
    bool is_any = false;
    for (auto& [stream, items] : machine.streams) {
        while (!items.empty()) {
            Item& item = items.front();
            is_any = true;
            if (item.kernel == nullptr) {
                item.work();
            } else if (item.kernel->blocks.empty()) {
                start_kernel(item.kernel.get());
                break;
            } else if (item.kernel->num_alive > 0) {
                break;
            } else {
                for (auto& block : item.kernel->blocks) settle_block(block.get());
                settle_some();  // forgets the blocks, which go now
            }
            items.pop_front();
        }
    }
    return is_any;
}

void resume(Fiber* fiber) {
    machine.current = fiber;
    thread_index = Index3(static_cast<unsigned>(fiber->thread), 0, 0);
    block_index = fiber->block->index;
    block_size = fiber->block->kernel->block;
    grid_size = fiber->block->kernel->grid;
    emulator_switch(&machine.scheduler, fiber->stack_pointer);
    machine.current = nullptr;
}

void run_warp(WarpRef ref) {
    Block* block = ref.block;
    const int first = 32 * ref.warp, count = std::min<int>(32, static_cast<int>(block->fibers.size()) - first);
    const int offset = static_cast<int>(machine.random() % count);  // no lane is always first
    // Now and then only some lanes get on: a warp's lanes run apart.
    const int num_now = machine.random() % 16 == 0 ? 1 + static_cast<int>(machine.random() % count) : count;
    for (int i = 0; i < num_now && machine.failure.empty(); ++i) {
        Fiber* fiber = &block->fibers[first + (i + offset) % count];
        if (fiber->state == State::kReady) resume(fiber);
    }
    block->warps[ref.warp].is_listed = false;  // only now: a warp that has ended is not listed
    for (int i = 0; i < count; ++i)
        if (block->fibers[first + i].state == State::kReady) list_ready(&block->fibers[first + i]);
    if (block->num_alive == 0 && !block->fibers.empty()) end_block(block);
}

void drop_all() {
    for (auto& [stream, items] : machine.streams) {
        for (Item& item : items)
            if (item.kernel != nullptr)
                for (auto& block : item.kernel->blocks) drop_block(block.get());
        items.clear();
    }
    machine.ready.clear();
    machine.pollers.clear();
    machine.not_started.clear();
    machine.copies.clear();
    machine.late_blocks.clear();
}

void give_up(const std::string& reason) {
    std::string text = reason;
    for (auto& [stream, items] : machine.streams)
        if (!items.empty() && items.front().kernel != nullptr) text += describe(*items.front().kernel);
    drop_all();
    machine.failure = text;
}

// Where there is room for another block of its kernel.
bool may_start(const Block* block) { return machine.most_resident == 0 || block->kernel->num_resident < machine.most_resident; }

// Some block that may start, if there is one.
Block* take_block() {
    const size_t num = machine.not_started.size(), first = machine.random() % num;
    for (size_t i = 0; i < num; ++i) {
        Block*& found = machine.not_started[(first + i) % num];
        if (!may_start(found)) continue;
        std::swap(found, machine.not_started.back());
        Block* block = machine.not_started.back();
        machine.not_started.pop_back();
        return block;
    }
    return nullptr;
}

void run_streams() {
    if (!machine.failure.empty()) return drop_all();  // what has gone wrong is still to be said
    int num_quiet = 0, num_spun = 0;
    uint64_t stores_before = 0;
    while (start_streams()) {
        // Blocks start one after another, in any order, while others run.
        while (!machine.not_started.empty() && (machine.ready.empty() || machine.random() % 4 == 0)) {
            Block* block = take_block();
            if (block == nullptr) break;
            ++block->kernel->num_resident;
            start_block(block);
        }
        int num_turns = 0;
        while (!machine.ready.empty() && machine.failure.empty() && num_turns < kTurnsOfRound) {
            std::swap(machine.ready[machine.random() % machine.ready.size()], machine.ready.back());
            const WarpRef next = machine.ready.back();
            machine.ready.pop_back();
            run_warp(next);
            if (++num_turns % 16 == 0) {
                machine.clock_ns += 100;
                advance_some_copies();
                if (network != nullptr) network();
            }
            if (num_turns % 256 == 0) settle_some();
            if (num_turns % 64 == 0 && std::any_of(machine.not_started.begin(), machine.not_started.end(), may_start)) break;
        }
        if (!machine.failure.empty()) return give_up(machine.failure);
        const bool has_spun = num_turns == kTurnsOfRound;
        if (!has_spun && (!machine.ready.empty() || std::any_of(machine.not_started.begin(), machine.not_started.end(), may_start))) continue;
        if (!has_spun && advance_copies_alone()) continue;
        // What the network carries takes its time: those who poll look in between.
        const bool is_late = settle_some(), is_under_way = (network != nullptr && network()) || is_late || !machine.copies.empty();
        if (!machine.failure.empty()) return give_up(machine.failure);
        if (!has_spun && machine.pollers.empty()) {
            if (is_under_way) continue;
            bool is_running = false;
            for (auto& [stream, items] : machine.streams)
                is_running = is_running || (!items.empty() && items.front().kernel != nullptr && items.front().kernel->num_alive > 0);
            if (!is_running) continue;
            return give_up("nobody can go on:");
        }
        if (num_quiet > kHopelessRounds || num_spun > kHopelessSpunRounds) return give_up("nobody gets on, and somebody waits without a deadline:");
        // A round of those who poll.
        const bool is_quiet = machine.num_stores == stores_before && !is_under_way;
        num_quiet = is_quiet ? num_quiet + (has_spun ? 0 : 1) : 0;
        num_spun = is_quiet ? num_spun + (has_spun ? 1 : 0) : 0;
        stores_before = machine.num_stores;
        if (machine.is_alone) {
            machine.clock_ns += num_quiet > kQuietRounds ? kQuietRoundNs : num_spun > kSpunRounds ? kSpunRoundNs : kRoundNs;
        } else {
            machine.clock_ns += 20'000;
            if (num_quiet > kQuietRounds) usleep(20);
        }
        std::vector<Fiber*> pollers;
        pollers.swap(machine.pollers);
        for (Fiber* fiber : pollers) list_ready(fiber);
    }
}

void landed() { ++machine.num_stores; }
uint64_t random_number() { return machine.random(); }
void note(const std::string& text) {
    if (machine.failure.empty()) machine.failure = text;
}

void fail(const std::string& text) {
    note(text);
    to_scheduler();
    std::abort();
}

void enqueue_kernel(void* stream, const std::string& name, Index3 grid, Index3 block, size_t num_dynamic_bytes, std::function<void()> thread) {
    auto kernel = std::make_unique<Kernel>();
    kernel->name = name;
    kernel->grid = grid;
    kernel->block = block;
    kernel->num_dynamic_bytes = num_dynamic_bytes;
    kernel->thread = std::move(thread);
    machine.streams[stream].push_back({std::move(kernel), nullptr});
}

void enqueue_work(void* stream, std::function<void()> work) {
    machine.streams[stream].push_back({nullptr, std::move(work)});
}

const std::string& run() {
    static std::string said;
    run_streams();
    said = std::exchange(machine.failure, {});
    return said;
}

void host_waits() { run_streams(); }

void* own_symbol(const char* name) {
    Dl_info library;
    if (dladdr(reinterpret_cast<void*>(&own_symbol), &library) == 0) return nullptr;
    void* const handle = dlopen(library.dli_fname, RTLD_LAZY | RTLD_NOLOAD);
    void* const symbol = handle == nullptr ? nullptr : dlsym(handle, name);
    if (handle != nullptr) dlclose(handle);  // it was open before
    return symbol;
}

void pause() {
    Fiber* fiber = machine.current;
    fiber->state = State::kPolling;
    machine.pollers.push_back(fiber);
    to_scheduler();
}

uint64_t now_ns() { return machine.clock_ns; }
uint64_t tick() { return ++machine.num_ticks; }
void* dynamic_shared() { return machine.current->block->dynamic.get(); }

}  // namespace emulator

EXPORTED const char* emulator_run() { return emulator::run().c_str(); }
EXPORTED void emulator_seed(uint64_t seed) { emulator::machine.random.seed(seed); }
EXPORTED void emulator_copy_behind(void* stream, void* to, const void* from, size_t num_bytes) {
    emulator::enqueue_work(stream, [=] { std::memcpy(to, from, num_bytes); });
}
// How many blocks of a kernel may run at once, 0: all. They start in any order.
EXPORTED void emulator_set_resident(int most) { emulator::machine.most_resident = most; }
// Whether some thread of the host (a software NIC) may change what kernels wait for: then time is not skipped.
EXPORTED void emulator_set_alone(int is_alone) { emulator::machine.is_alone = is_alone != 0; }
