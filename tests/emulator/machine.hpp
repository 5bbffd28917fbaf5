#pragma once
// The emulator's own view: threads, blocks, kernels, and what is under way.
#include <cstdlib>
#include <deque>
#include <map>
#include <memory>
#include <random>
#include <string>
#include <unordered_map>
#include <vector>

#include "emulator.hpp"

namespace emulator {

constexpr size_t kStackBytes = 64 << 10;
constexpr int kNumRemembered = 64;             // loads that a thread remembers to notice that it polls
constexpr uint64_t kRoundNs = 1000;            // a round in which somebody got on
constexpr uint64_t kQuietRoundNs = 2'000'000;  // a round after many in which nobody did: only time can help
constexpr int kQuietRounds = 300;              // more than a wait polls between two looks at the clock
constexpr int kHopelessRounds = 200'000;       // whoever still waits has no deadline
constexpr int kTurnsOfRound = 2048;            // of warps: some spin without saying so, and those who poll have to look again
constexpr int kSpunRounds = 1000;              // such rounds without a store: whoever spins waits, and does not work
constexpr uint64_t kSpunRoundNs = 20'000'000;  // each of those that follow
constexpr int kHopelessSpunRounds = 10'000;
constexpr uint8_t kPoison = 0xfd;              // large and negative as a number of any kind

enum class State : uint8_t { kReady, kPolling, kBlocked, kDone };

struct Block;
struct Fiber;
struct Kernel;

struct Copy {
    Block* block;
    CopyKind kind;
    void* to;
    const void* from;
    int num_bytes;
    uint64_t* barrier;
    Fiber* owner;  // null: the block has ended
    int group;
    int slowness;  // one of so many looks moves it on
    bool is_read = false;
    std::vector<uint8_t> bytes;
};

struct CopyGroups {
    int next_group = 0;
    std::map<int, int> unread, unwritten;  // by group, those with any; the open one too
};

struct Fiber {
    void* stack_pointer = nullptr;
    uint8_t* stack = nullptr;
    Block* block = nullptr;
    int thread = 0;
    State state = State::kReady;
    const char* where = "";  // what it waits for
    // warp operation
    WarpOp op{};
    uint32_t mask = 0;
    uint64_t value = 0, answer = 0;
    int source = 0;
    const char* file = "";
    int line = 0;
    bool in_warp_op = false;
    int barrier = -1;
    uint64_t num_stores = 0;
    uint64_t remembered[kNumRemembered] = {};  // loads since its last store
    CopyGroups copies[2];
};

struct Barrier {
    int num_arrived = 0;
    int num_threads = 0;
    bool any = false;
    std::vector<Fiber*> waiting;
};

struct Mbarrier {
    int num_arrivals, num_pending;
    int64_t num_bytes = 0;  // expected less arrived
    uint32_t phase = 0;
    std::vector<Fiber*> waiting;
};

struct Free {
    void operator()(void* memory) const { std::free(memory); }
};
using Memory = std::unique_ptr<uint8_t, Free>;

struct LateStore {
    void* address;
    uint64_t value;
    int num_bytes;  // 4 or 8
};

struct Block {
    Kernel* kernel;
    Index3 index;
    std::vector<Fiber> fibers;
    struct Variable {
        Memory memory;
        size_t num_bytes;
    };
    std::unordered_map<const void*, Variable> statics;  // __shared__ variables
    Memory dynamic;
    std::map<int, Barrier> barriers;
    std::unordered_map<uint64_t*, Mbarrier> mbarriers;
    std::unordered_map<uintptr_t, std::vector<LateStore>> late_stores;  // by their address, oldest first
    int num_copies = 0;  // on their way
    int num_alive = 0;
    struct Warp {
        uint32_t alive, in_op;  // lanes
        bool is_listed;         // among those with threads that can go on
    };
    std::vector<Warp> warps;
};

struct Kernel {
    std::string name;
    Index3 grid, block;
    size_t num_dynamic_bytes;
    std::function<void()> thread;
    std::vector<std::unique_ptr<Block>> blocks;
    int num_alive = 0;  // blocks that run, or whose copies are on their way
    int num_resident = 0;
};

struct Item {
    std::unique_ptr<Kernel> kernel;
    std::function<void()> work;
};

struct WarpRef {
    Block* block;
    int warp;
};

struct Machine {
    std::map<void*, std::deque<Item>> streams;
    std::vector<WarpRef> ready;    // warps with threads that can go on
    std::vector<Fiber*> pollers;
    std::vector<Block*> not_started;
    int most_resident = 0;  // blocks of a kernel that run at once; 0: all
    std::vector<std::unique_ptr<Copy>> copies;  // on their way
    std::vector<Block*> late_blocks;            // with late stores
    std::vector<uint8_t*> stacks;
    Fiber* current = nullptr;
    void* scheduler = nullptr;
    std::string failure;
    uint64_t clock_ns = 1'000'000'000, num_ticks = 0;
    uint64_t num_stores = 0;
    bool is_alone = true;  // no host thread changes what kernels wait for
    std::mt19937_64 random{1};
};
extern Machine machine;

// --- threads (emulator.cpp) ---
void list_ready(Fiber* fiber);     // it goes on some time
void to_scheduler();               // the running thread stops, as its state says
void block_at(const char* where);  // until somebody lists it

// --- warp operations and barriers (operations.cpp) ---
void finish_warp_op(Block* block, int warp, const Fiber& first);  // if all lanes that `first` waits for have come
void finish_barrier(Block* block, Barrier& barrier);
void flip(Mbarrier& barrier);

// --- memory (memory.cpp) ---
Memory allocate_poisoned(size_t num_bytes);
bool is_overrun(const Memory& memory, size_t num_bytes);  // somebody has written behind its end
void advance_some_copies();
bool advance_copies_alone();
void settle_block(Block* block);
bool settle_some();

// --- report.cpp ---
std::string describe(const Kernel& kernel);

}  // namespace emulator
