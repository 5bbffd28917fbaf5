#pragma once
// A NIC in software: it takes work requests out of queue pairs in host memory and executes them as an mlx5 NIC would, in order on each
// queue pair, with checks of keys and bounds, completions, error completions, and faults on request. Host only.
//
// step() executes at most one request, in an order that the seed decides: tests replay schedules with it, single-threaded. start() runs the
// same steps on a thread, for posters on other threads or on a GPU (queue memory: pinned and mapped).
//
// What it reads and when: the doorbell; if that has changed, the doorbell record; then the requests that the record covers.
#include <atomic>
#include <chrono>
#include <cstdint>
#include <cstring>
#include <deque>
#include <functional>
#include <mutex>
#include <string>
#include <thread>
#include <unordered_map>
#include <utility>
#include <vector>

#include "../common/exceptions.hpp"
#include "faults.hpp"
#include "provider.hpp"

namespace deepep::rdma {

enum class Progress { kPending, kDone, kFailed };

// How bytes move is a policy, a mover. Its moves take effect in the order of the calls, now or later: each belongs to a batch, and
// progress() says when the moves of a batch, and of those before it, have landed. The NIC completes no request before.
//
//   copy(destination, source, num_bytes)                memory to memory
//   copy_inline(destination, data, num_bytes)           bytes out of a request; `data` is read before the call returns
//   fetch_add(destination, result, addend)              8 bytes, at once with regard to other atomics there
//   batch(), progress(batch)                            the batch of the last move; whether it has landed
//   drain()                                             waits for all of them
//   failure()                                           why moves fail, or nothing
//   store_state(state, value)                           the posters' counters, wherever they lie; has landed when it returns
//
// This one moves bytes of ordinary host memory, and has always landed.
struct MemcpyMover {
    // Eight aligned bytes land at once and behind everything that landed before: a signal word needs that.
    void copy(uint8_t* destination, const uint8_t* source, uint32_t num_bytes) {
        if (num_bytes == 8 && reinterpret_cast<uintptr_t>(destination) % 8 == 0) {
            uint64_t word;
            memcpy(&word, source, 8);
            __atomic_store_n(reinterpret_cast<uint64_t*>(destination), word, __ATOMIC_RELEASE);
        } else {
            memcpy(destination, source, num_bytes);
        }
    }
    void copy_inline(uint8_t* destination, const uint8_t* data, uint32_t num_bytes) { copy(destination, data, num_bytes); }
    void fetch_add(uint8_t* destination, uint8_t* result, uint64_t addend) {
        const uint64_t before = __atomic_fetch_add(reinterpret_cast<uint64_t*>(destination), addend, __ATOMIC_ACQ_REL);
        copy(result, reinterpret_cast<const uint8_t*>(&before), 8);
    }
    uint64_t batch() const { return 0; }
    Progress progress(uint64_t) { return Progress::kDone; }
    void drain() {}
    std::string failure() const { return {}; }
    void store_state(QueuePairState* state, const QueuePairState& value) { *state = value; }
};

enum Access : uint32_t { kLocalRead = 1, kLocalWrite = 2, kRemoteWrite = 4, kRemoteAtomic = 8, kAllAccess = 15 };

struct NicCounters {
    uint64_t num_steps = 0;
    uint64_t num_writes = 0;
    uint64_t num_inline_writes = 0;
    uint64_t num_atomics = 0;
    uint64_t num_bytes = 0;        // payload written to peers
    uint64_t num_doorbells = 0;    // noticed; several may be noticed as one
    uint64_t num_completions = 0;  // written without error
    uint64_t num_errors = 0;       // requests that failed, not counting those flushed behind them
    uint64_t num_flushed = 0;
    uint64_t num_faults[kNumFaults] = {};
};

template <class Mover = MemcpyMover>
class SoftwareNic {
public:
    static constexpr int32_t kLocal = -1;

    explicit SoftwareNic(const FaultPlan& plan = {}, Mover mover = {}) : plan_(plan), random_(plan.seed), mover_(std::move(mover)) {}
    ~SoftwareNic() { stop(); }
    SoftwareNic(const SoftwareNic&) = delete;
    SoftwareNic& operator=(const SoftwareNic&) = delete;

    // Registers memory. Requests name it by `base`; here it is at `mapped`. peer: kLocal for memory that requests read from and get results
    // in, else the rank that owns it: only queue pairs to that rank may write there.
    Be32 register_memory(int32_t peer, uint64_t base, uint8_t* mapped, uint64_t num_bytes, uint32_t access = kAllAccess) {
        const Visit visit(*this);
        ++num_keys_;
        const uint32_t key = num_keys_ << 8 | (num_keys_ * 37 & 0xff);  // an index, and a tag in the low byte, as the NIC's keys
        regions_[key] = {peer, base, mapped, num_bytes, access};
        return Be32::of(key);
    }
    void deregister_memory(Be32 key) {
        const Visit visit(*this);
        regions_.erase(key.value());
    }

    // Makes a queue pair in `memory` (QueueMemory{depth}.num_bytes(), aligned to its kAlignment); `state` is the posters' side of it.
    QueuePair create_queue_pair(int32_t peer, uint32_t depth, uint8_t* memory, QueuePairState* state, uint64_t first_index = 0) {
        if (depth == 0 || depth > kMaxDepth || (depth & (depth - 1)) != 0)
            throw ArgumentError("queue pair depth is " + std::to_string(depth) + "; it must be a power of two up to " +
                                std::to_string(kMaxDepth) + ".");
        const Visit visit(*this);
        const QueueMemory layout{depth};
        Queue queue;
        queue.pair = {layout.requests(memory),
                      layout.completion(memory),
                      layout.record(memory),
                      layout.doorbell(memory),
                      state,
                      kFirstNumber + static_cast<uint32_t>(queues_.size()),
                      depth,
                      peer};
        queue.completion = layout.completion(memory);
        queue.served = queue.rung = first_index;
        reset_memory(queue.pair, queue.completion, first_index);
        mover_.store_state(state, initial_state(first_index));
        queues_.push_back(queue);
        return queue.pair;
    }

    // As new, requests numbered from 0. No poster is at work on it.
    void reset_queue_pair(uint32_t number) {
        const Visit visit(*this);
        Queue& queue = queue_of(number);
        mover_.drain();  // what was taken from the ring before may still be read from there
        reset_memory(queue.pair, queue.completion);
        mover_.store_state(queue.pair.state, initial_state());
        Queue fresh;
        fresh.pair = queue.pair;
        fresh.completion = queue.completion;
        queue = fresh;
    }

    // A fault at a named request of a queue pair, besides those of the plan (not for kReorder). `syndrome`: of kErrorCompletion.
    void inject(uint32_t number, uint64_t request, Fault fault, Syndrome syndrome = Syndrome::kRemoteOperation) {
        const Visit visit(*this);
        queue_of(number).injected[request] = {fault, syndrome};
    }
    // The same at the next request that is still to be judged; returns its number.
    uint64_t inject_next(uint32_t number, Fault fault, Syndrome syndrome = Syndrome::kRemoteOperation) {
        const Visit visit(*this);
        Queue& queue = queue_of(number);
        const uint64_t request = queue.served + (queue.judged == queue.served ? 1 : 0);
        queue.injected[request] = {fault, syndrome};
        return request;
    }

    // True when something was done or is still to be done.
    bool step() {
        const std::lock_guard<std::mutex> lock(mutex_);
        ++counters_.num_steps;
        for (Queue& queue : queues_) notice_doorbell(queue);
        bool is_busy = false;
        for (Queue& queue : queues_) is_busy |= exhaust_retries(queue) || (queue.served != queue.rung && !is_silent(queue));
        Queue* const chosen = choose();
        if (chosen != nullptr) serve(*chosen);
        for (Queue& queue : queues_) is_busy |= complete_landed(queue);
        return is_busy;
    }

    // `prepare` runs first on the new thread (a mover may want the thread's device set). A running NIC is left alone.
    void start(const std::function<void()>& prepare = {}) {
        if (thread_.joinable()) return;
        is_running_.store(true);
        thread_ = std::thread([this, prepare] {
            if (prepare) prepare();
            int num_idle = 0;
            while (is_running_.load(std::memory_order_relaxed)) {
                while (num_visitors_.load(std::memory_order_relaxed) != 0) std::this_thread::yield();
                if (step()) {
                    num_idle = 0;
                } else if (++num_idle < kIdleStepsAwake) {
                    std::this_thread::yield();
                } else {
                    std::this_thread::sleep_for(kNap);
                }
            }
        });
    }
    // What was posted and is not served yet stays so.
    void stop() {
        is_running_.store(false);
        if (thread_.joinable()) thread_.join();
    }

    NicCounters counters() const {
        const Visit visit(*this);
        return counters_;
    }
    QueueFault first_fault(uint32_t number) const {
        const Visit visit(*this);
        return queue_of(number).fault;
    }
    // Something that was posted has not been executed and landed yet.
    bool has_work() {
        const Visit visit(*this);
        bool has_some = mover_.progress(mover_.batch()) == Progress::kPending;
        for (Queue& queue : queues_) {
            notice_doorbell(queue);
            has_some |= queue.served != queue.rung || !queue.unreported.empty();
        }
        return has_some;
    }
    bool has_failed() const {
        const Visit visit(*this);
        for (const Queue& queue : queues_)
            if (queue.is_in_error) return true;
        return false;
    }
    // The last request that was executed had its completion dropped: nothing tells the posters of it until a later one completes.
    bool is_last_completion_lost(uint32_t number) const {
        const Visit visit(*this);
        return queue_of(number).is_last_completion_lost;
    }
    bool is_link_dead(uint32_t number) const {
        const Visit visit(*this);
        return queue_of(number).is_link_dead;
    }

    // Why bytes can no longer be moved; empty while they can.
    std::string moving_failure() const {
        const Visit visit(*this);
        return mover_.failure();
    }

private:
    static constexpr uint32_t kFirstNumber = 0x40;
    static constexpr int kIdleStepsAwake = 20000;  // then the thread naps: posters that are not at work should not cost a core
    static constexpr std::chrono::microseconds kNap{50};

    // Access from another thread than the one that steps, which would take the mutex again before anybody else were awake.
    class Visit {
    public:
        explicit Visit(const SoftwareNic& nic) : nic_(nic) {
            nic_.num_visitors_.fetch_add(1, std::memory_order_relaxed);
            nic_.mutex_.lock();
        }
        ~Visit() {
            nic_.mutex_.unlock();
            nic_.num_visitors_.fetch_sub(1, std::memory_order_relaxed);
        }
        Visit(const Visit&) = delete;
        Visit& operator=(const Visit&) = delete;

    private:
        const SoftwareNic& nic_;
    };

    struct Region {
        int32_t peer;
        uint64_t base;
        uint8_t* mapped;
        uint64_t num_bytes;
        uint32_t access;
    };
    struct Injected {
        Fault fault;
        Syndrome syndrome;
    };
    // A request that was taken from the ring and asks for a completion, or failed; reported when its moves, and those of the requests
    // before it, have landed.
    struct Unreported {
        uint64_t request;
        uint64_t batch;
        Syndrome syndrome;
    };
    struct Queue {
        QueuePair pair = {};
        CompletionEntry* completion = nullptr;
        uint64_t served = 0;  // requests taken from the ring
        uint64_t rung = 0;    // requests that the doorbell record covers
        uint64_t last_doorbell = 0;
        uint64_t waiting_since = 0;  // order in which queue pairs came to have work
        uint64_t delayed_until = 0;
        uint64_t judged = ~0ull;  // request whose chance of delay and death has been drawn
        uint64_t dead_since = 0;
        bool is_link_dead = false;
        bool is_in_error = false;
        bool is_moving_lost = false;  // the mover failed with requests that had been accepted
        bool is_last_completion_lost = false;
        QueueFault fault = {};
        std::unordered_map<uint64_t, Injected> injected;
        std::deque<Unreported> unreported;
    };

    static bool is_silent(const Queue& queue) { return queue.is_link_dead && !queue.is_in_error; }
    Queue& queue_of(uint32_t number) { return queues_.at(number - kFirstNumber); }
    const Queue& queue_of(uint32_t number) const { return queues_.at(number - kFirstNumber); }

    void notice_doorbell(Queue& queue) {
        const uint64_t doorbell = __atomic_load_n(queue.pair.doorbell, __ATOMIC_ACQUIRE);
        if (doorbell == queue.last_doorbell) return;
        queue.last_doorbell = doorbell;
        ++counters_.num_doorbells;
        const Be32 record{__atomic_load_n(queue.pair.record, __ATOMIC_ACQUIRE)};
        const auto num_new = static_cast<uint16_t>(record.value() - static_cast<uint16_t>(queue.rung));
        if (num_new == 0) return;
        if (queue.served == queue.rung) queue.waiting_since = ++num_arrivals_;
        queue.rung += num_new;
        const bool is_ours = Be32{static_cast<uint32_t>(doorbell >> 32)}.value() == queue.pair.number << 8;
        if (!is_ours || queue.rung - queue.served > queue.pair.depth) fail(queue, Syndrome::kLocalOperation);
    }

    bool exhaust_retries(Queue& queue) {
        if (!is_silent(queue) || plan_.dead_link_steps == 0) return false;
        if (counters_.num_steps - queue.dead_since >= plan_.dead_link_steps) fail(queue, Syndrome::kRetriesExhausted);
        return true;
    }

    // The queue pair that has waited longest, or by a fault another one.
    Queue* choose() {
        Queue* first = nullptr;
        eligible_.clear();
        for (Queue& queue : queues_) {
            if (queue.served == queue.rung || is_silent(queue) || queue.delayed_until > counters_.num_steps) continue;
            eligible_.push_back(&queue);
            if (first == nullptr || queue.waiting_since < first->waiting_since) first = &queue;
        }
        if (eligible_.size() < 2 || !random_.chance(plan_.per_million[static_cast<int>(Fault::kReorder)])) return first;
        Queue* other = eligible_[random_.below(static_cast<uint32_t>(eligible_.size()))];
        if (other != first) count(Fault::kReorder);
        return other;
    }

    bool draws(const Queue& queue, uint64_t request, Fault fault, Syndrome* syndrome = nullptr) {
        const auto found = queue.injected.find(request);
        if (found != queue.injected.end() && found->second.fault == fault) {
            if (syndrome != nullptr) *syndrome = found->second.syndrome;
            return true;
        }
        return random_.chance(plan_.per_million[static_cast<int>(fault)]);
    }
    void count(Fault fault) { ++counters_.num_faults[static_cast<int>(fault)]; }

    void serve(Queue& queue) {
        queue.waiting_since = ++num_arrivals_;
        if (queue.is_in_error) {
            report(queue, queue.served++, Syndrome::kFlushed);
            ++counters_.num_flushed;
            return;
        }
        if (queue.judged != queue.served) {
            queue.judged = queue.served;
            if (draws(queue, queue.served, Fault::kDelay)) {
                count(Fault::kDelay);
                queue.delayed_until = counters_.num_steps + 1 + random_.below(plan_.max_delay_steps);
                return;
            }
            if (draws(queue, queue.served, Fault::kDeadLink)) {
                count(Fault::kDeadLink);
                queue.is_link_dead = true;
                queue.dead_since = counters_.num_steps;
                return;
            }
        }
        Syndrome injected = Syndrome::kRemoteOperation;
        if (draws(queue, queue.served, Fault::kErrorCompletion, &injected)) {
            count(Fault::kErrorCompletion);
            return fail(queue, injected);
        }
        bool is_signalled = false;
        const Syndrome syndrome = execute(queue, &is_signalled);
        if (syndrome != Syndrome::kNone) return fail(queue, syndrome);
        const uint64_t request = queue.served++;
        if (!is_signalled) return;
        queue.is_last_completion_lost = draws(queue, request, Fault::kDropCompletion);
        if (queue.is_last_completion_lost) return count(Fault::kDropCompletion);
        report(queue, request, Syndrome::kNone);
    }

    // Checks and executes the request that is next; says why it cannot be.
    Syndrome execute(Queue& queue, bool* is_signalled) {
        const WqeBlock* slot = &queue.pair.requests[queue.served & (queue.pair.depth - 1)];
        AtomicWqe wqe = {};  // the longest
        memcpy(&wqe.control, slot, sizeof(ControlSegment));
        const uint32_t size = (wqe.control.qpn_ds.value() & 0xff) * kOctowordBytes;
        const uint32_t head = wqe.control.opmod_index_opcode.value();
        const uint32_t expected_head = (static_cast<uint32_t>(queue.served) & kIndexMask) << 8 | (head & 0xff);
        if (head != expected_head || wqe.control.qpn_ds.value() >> 8 != queue.pair.number || size < sizeof(WriteWqe) || size > sizeof(wqe))
            return Syndrome::kLocalOperation;
        memcpy(&wqe, slot, size);
        *is_signalled = (wqe.control.flags.value() & kSignalled) != 0;
        switch (static_cast<Opcode>(head & 0xff)) {
            case Opcode::kRdmaWrite: return execute_write(queue, wqe, size);
            case Opcode::kAtomicFetchAdd: return size == sizeof(AtomicWqe) ? execute_atomic(queue, wqe) : Syndrome::kLocalOperation;
        }
        return Syndrome::kLocalOperation;
    }

    Syndrome execute_write(Queue& queue, const AtomicWqe& block, uint32_t size) {
        InlineWriteWqe wqe;
        memcpy(&wqe, &block, sizeof(wqe));
        const uint8_t* source = reinterpret_cast<const uint8_t*>(wqe.data);
        uint32_t num_bytes = wqe.num_bytes.value();
        const bool is_inline = (num_bytes & kInlineFlag) != 0;
        if (is_inline) {
            num_bytes &= ~kInlineFlag;
            if (sizeof(ControlSegment) + sizeof(RemoteAddressSegment) + 4 + num_bytes > size) return Syndrome::kLocalLength;
        } else {
            DataSegment data;
            memcpy(&data, &wqe.num_bytes, sizeof(data));
            if (size != sizeof(WriteWqe)) return Syndrome::kLocalOperation;
            if (num_bytes == 0) num_bytes = kMaxWriteBytes + 1;
            source = translate(data.key, kLocal, data.address.value(), num_bytes, kLocalRead);
            if (source == nullptr) return Syndrome::kLocalProtection;
        }
        uint8_t* destination = translate(wqe.remote.key, queue.pair.peer, wqe.remote.address.value(), num_bytes, kRemoteWrite);
        if (destination == nullptr) return Syndrome::kRemoteAccess;
        if (is_inline) {
            mover_.copy_inline(destination, source, num_bytes);
        } else {
            mover_.copy(destination, source, num_bytes);
        }
        counters_.num_bytes += num_bytes;
        ++(is_inline ? counters_.num_inline_writes : counters_.num_writes);
        return Syndrome::kNone;
    }

    Syndrome execute_atomic(Queue& queue, const AtomicWqe& wqe) {
        if (wqe.data.num_bytes.value() != 8) return Syndrome::kLocalLength;
        uint8_t* result = translate(wqe.data.key, kLocal, wqe.data.address.value(), 8, kLocalWrite);
        if (result == nullptr) return Syndrome::kLocalProtection;
        if (wqe.remote.address.value() % 8 != 0) return Syndrome::kRemoteInvalidRequest;
        uint8_t* destination = translate(wqe.remote.key, queue.pair.peer, wqe.remote.address.value(), 8, kRemoteAtomic);
        if (destination == nullptr) return Syndrome::kRemoteAccess;
        mover_.fetch_add(destination, result, wqe.atomic.addend.value());
        counters_.num_bytes += 8;
        ++counters_.num_atomics;
        return Syndrome::kNone;
    }

    // Where the bytes are, or null when the key, the owner, the bounds or the rights do not fit.
    uint8_t* translate(Be32 key, int32_t peer, uint64_t address, uint64_t num_bytes, uint32_t access) const {
        const auto found = regions_.find(key.value());
        if (found == regions_.end()) return nullptr;
        const Region& region = found->second;
        if (region.peer != peer || (region.access & access) == 0 || address < region.base) return nullptr;
        const uint64_t offset = address - region.base;
        if (offset > region.num_bytes || num_bytes > region.num_bytes - offset) return nullptr;
        return region.mapped + offset;
    }

    // The request that is next fails, and the queue pair with it.
    void fail(Queue& queue, Syndrome syndrome) {
        queue.is_in_error = true;
        queue.fault = {true, syndrome, static_cast<uint16_t>(queue.served)};
        ++counters_.num_errors;
        report(queue, queue.served, syndrome);
        if (queue.served != queue.rung) ++queue.served;
    }
    void report(Queue& queue, uint64_t request, Syndrome syndrome) { queue.unreported.push_back({request, mover_.batch(), syndrome}); }

    // Writes completions in the order of the requests, as far as their moves have landed. True when some have not.
    bool complete_landed(Queue& queue) {
        while (!queue.unreported.empty()) {
            Unreported& next = queue.unreported.front();
            const Progress progress = mover_.progress(next.batch);
            if (progress == Progress::kPending) return true;
            if (progress == Progress::kFailed && next.syndrome == Syndrome::kNone) lose(queue, next);
            if (next.syndrome == Syndrome::kNone) {
                ++counters_.num_completions;
                write_completion(queue, next.request, CompletionOpcode::kRequest);
            } else {
                __atomic_store_n(&queue.completion->error.bits, Be32::of(static_cast<uint32_t>(next.syndrome)).bits, __ATOMIC_RELAXED);
                write_completion(queue, next.request, CompletionOpcode::kRequestError);
            }
            queue.unreported.pop_front();
        }
        return false;
    }
    // A request was accepted, and its bytes could not be moved after all. It is the first to fail, or has followed one that was lost so.
    void lose(Queue& queue, Unreported& request) {
        request.syndrome = queue.is_moving_lost ? Syndrome::kFlushed : Syndrome::kRemoteOperation;
        ++(queue.is_moving_lost ? counters_.num_flushed : counters_.num_errors);
        if (!queue.is_moving_lost) queue.fault = {true, request.syndrome, static_cast<uint16_t>(request.request)};
        queue.is_moving_lost = queue.is_in_error = true;
    }
    // The last four bytes last, at once: who sees them may use the rest, and what the request moved.
    void write_completion(Queue& queue, uint64_t request, CompletionOpcode opcode) {
        const uint32_t head = queue.pair.requests[request & (queue.pair.depth - 1)].words[0];
        const uint32_t entry = static_cast<uint32_t>(request & kIndexMask) << 16 | static_cast<uint32_t>(opcode) << 4;
        __atomic_store_n(&queue.completion->opcode_qpn.bits, Be32::of(Be32{head}.value() << 24 | queue.pair.number).bits, __ATOMIC_RELAXED);
        __atomic_store_n(&queue.completion->counter_opcode.bits, Be32::of(entry).bits, __ATOMIC_RELEASE);
    }

    const FaultPlan plan_;
    Random random_;
    Mover mover_;
    mutable std::mutex mutex_;  // one step at a time; registration and counters from other threads
    mutable std::atomic<int> num_visitors_{0};
    std::deque<Queue> queues_;
    std::vector<Queue*> eligible_;
    std::unordered_map<uint32_t, Region> regions_;
    uint32_t num_keys_ = 0;
    uint64_t num_arrivals_ = 0;
    NicCounters counters_;
    std::thread thread_;
    std::atomic<bool> is_running_{false};
};

}  // namespace deepep::rdma
