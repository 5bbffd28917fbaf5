#pragma once
// CUDA kernels on the CPU, for tests: every device thread is a fiber of one host thread, so a run is repeatable and whoever waits for what is known.
//
// What a kernel can do is kept to what CUDA promises: threads of a warp run apart until an operation joins them; whoever misses such an
// operation is named instead of waited for. Stores through ptx:: that release nothing are seen late and out of order, so that a missing fence can
// show; ordinary stores are seen at once, and loads are never early. Asynchronous copies happen late, so that a missing wait shows. Time jumps when
// nobody gets on, and hardly passes before.
#include <cstddef>
#include <cstdint>
#include <functional>
#include <string>

#define EXPORTED extern "C" __attribute__((visibility("default")))

namespace emulator {

struct Index3 {
    unsigned x, y, z;
    constexpr Index3(unsigned x = 1, unsigned y = 1, unsigned z = 1) : x(x), y(y), z(z) {}
};

// Of the running thread.
extern Index3 thread_index, block_index, block_size, grid_size;

// --- host side ---
// A kernel or a piece of host work, after everything that its stream holds already. Runs in run().
void enqueue_kernel(void* stream, const std::string& name, Index3 grid, Index3 block, size_t num_dynamic_bytes, std::function<void()> thread);
void enqueue_work(void* stream, std::function<void()> work);
// Until every stream is empty, or nobody can go on. Returns what went wrong ("" if nothing); the kernels involved are then gone.
const std::string& run();
// For a host thread that waits for a kernel: as run(), but what went wrong is said by the next run().
void host_waits();
// A function that the extension itself exports by this name, or null.
void* own_symbol(const char* name);

// --- by the running thread ---
// Before a value is used that others may change: a thread that sees what it has seen already is polling, and lets everybody else go first.
void loaded(const volatile void* address, uint64_t value, bool* look_again);
// After a store or an atomic: others may go on from here.
void stored();
// A relaxed store to what others look at: they see it later, and stores to different places in any order. It comes before whatever its
// block's threads fence off or release afterwards; that they had to meet at a barrier first is not looked at.
void store_late(void* address, uint64_t value, int num_bytes);
void settle(const volatile void* address);  // what the running block has stored at this place is seen from now on
void settle_all();                          // all it has stored
void pause();  // __nanosleep
uint64_t now_ns();
uint64_t tick();
void* dynamic_shared();
// The block's variable that belongs to this tag.
void* shared(const void* tag, size_t num_bytes);
bool is_shared(const void* address);  // of the running block

enum class WarpOp : uint8_t { kSync, kShuffle, kBallot, kAny, kAll, kMatchAny, kMaxUnsigned, kMinUnsigned, kAddUnsigned, kOr, kAnd, kMaxSigned, kMinSigned };
// Joins the lanes of `mask`; each gets its own answer. `source`: the lane that a shuffle reads. Stricter than CUDA, lanes have to meet in one line of
// the source: those that meet by chance elsewhere are lanes that have lost each other.
uint64_t warp_op(WarpOp op, uint32_t mask, uint64_t value, int source, const char* file, int line);
// num_threads 0: all of the block that have not ended. True if any thread said so.
bool barrier(int number, int num_threads, bool waits, bool value);

void mbarrier_init(uint64_t* barrier, int num_arrivals);
void mbarrier_arrive(uint64_t* barrier, int num_expected_bytes);
void mbarrier_wait(uint64_t* barrier, uint32_t parity);

// Copies of the running thread, in groups. A null barrier: the copy belongs to the thread's next group.
enum class CopyKind : uint8_t { kBulk, kVector };
void copy_later(CopyKind kind, void* to, const void* from, int num_bytes, uint64_t* barrier);
void commit_copies(CopyKind kind);
void wait_copies(CopyKind kind, int num_pending, bool only_read);

// For what is under way outside of the kernels: moves it on, and says whether anything is left. Null: nothing.
extern bool (*network)();
void landed();  // it has changed what somebody may wait for
uint64_t random_number();
void note(const std::string& text);  // ends the run when the running thread stops

[[noreturn]] void fail(const std::string& text);

}  // namespace emulator
