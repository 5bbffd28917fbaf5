// The software NIC over a mover whose moves land later, when the test says so, as copies on a GPU do. One argument: the case's name.
#include <deque>
#include <functional>
#include <map>
#include <memory>
#include <string>

#include "check.hpp"
#include "deepep/rdma/host_wait.hpp"
#include "deepep/rdma/software_provider.hpp"

namespace rdma = deepep::rdma;
using rdma::Outcome;
using rdma::Progress;
using rdma::Syndrome;

namespace {

// Every move is a batch of its own.
struct LateMover {
    struct Moves {
        std::deque<std::function<void()>> waiting;
        uint64_t num_begun = 0, num_landed = 0, num_drained = 0;
        bool has_failed = false;

        void land(int count = 1) {
            for (; count > 0 && !waiting.empty(); --count, ++num_landed) {
                waiting.front()();
                waiting.pop_front();
            }
        }
    };
    std::shared_ptr<Moves> moves = std::make_shared<Moves>();
    rdma::MemcpyMover now = {};

    void begin(std::function<void()> move) {
        moves->waiting.push_back(std::move(move));
        ++moves->num_begun;
    }
    void copy(uint8_t* destination, const uint8_t* source, uint32_t num_bytes) {
        begin([=]() mutable { now.copy(destination, source, num_bytes); });
    }
    void copy_inline(uint8_t* destination, const uint8_t* data, uint32_t num_bytes) {
        begin([=, bytes = std::string(reinterpret_cast<const char*>(data), num_bytes)]() mutable {
            now.copy(destination, reinterpret_cast<const uint8_t*>(bytes.data()), num_bytes);
        });
    }
    void fetch_add(uint8_t* destination, uint8_t* result, uint64_t addend) {
        begin([=]() mutable { now.fetch_add(destination, result, addend); });
    }
    uint64_t batch() const { return moves->num_begun; }
    Progress progress(uint64_t batch) {
        if (batch <= moves->num_landed) return Progress::kDone;
        return moves->has_failed ? Progress::kFailed : Progress::kPending;
    }
    void drain() {
        moves->num_drained += moves->waiting.size();
        moves->land(static_cast<int>(moves->waiting.size()));
    }
    std::string failure() const { return moves->has_failed ? "the cable is out" : ""; }
    void store_state(rdma::QueuePairState* state, const rdma::QueuePairState& value) { *state = value; }
};
using Nic = rdma::SoftwareNic<LateMover>;

// One queue pair of depth 4 to rank 1, whose 64 bytes the NIC knows at 0x10000.
struct Bench {
    alignas(64) uint8_t memory[rdma::kWqeBlockBytes * 4 + 192];
    rdma::QueuePairState state;
    alignas(8) uint8_t local[64] = {};
    alignas(8) uint8_t remote[64] = {};
    LateMover mover;
    Nic nic{{}, mover};
    LateMover::Moves& moves = *mover.moves;
    rdma::QueuePair pair;
    rdma::Be32 local_key, remote_key;

    Bench() {
        pair = nic.create_queue_pair(1, 4, memory, &state);
        local_key = nic.register_memory(Nic::kLocal, reinterpret_cast<uint64_t>(local), local, sizeof(local));
        remote_key = nic.register_memory(1, 0x10000, remote, sizeof(remote));
    }
    rdma::Location at(uint64_t offset) const { return {0x10000 + offset, remote_key}; }
    rdma::Location here(uint64_t offset) const { return {reinterpret_cast<uint64_t>(local) + offset, local_key}; }

    using Write = std::function<void(rdma::WqeBlock*, const rdma::WqePlace&)>;
    Write word(uint64_t value, uint64_t offset) {
        return [=](rdma::WqeBlock* slot, const rdma::WqePlace& place) { rdma::write_inline_word(slot, place, at(offset), value); };
    }
    Write row(uint64_t offset, uint32_t num_bytes) {
        return [=](rdma::WqeBlock* slot, const rdma::WqePlace& place) {
            rdma::write_rdma_write(slot, place, here(offset), at(offset), num_bytes);
        };
    }
    // Posts, and lets the NIC take everything that it can.
    void post(const Write& write) {
        auto stop = [] { return rdma::WaitVerdict::kAborted; };
        uint64_t begin = 0;
        CHECK(rdma::reserve(pair, 1, stop, &begin).ok(), "reserve");
        write(pair.slot(begin), pair.place(begin, true));
        CHECK(rdma::submit(pair, begin, 1, stop).ok(), "submit");
        serve();
    }
    void serve() {
        for (int i = 0; i < 20; ++i) nic.step();
    }
    // Lands moves one by one, the NIC at work between.
    void land(int count) {
        for (int i = 0; i < count; ++i) {
            moves.land();
            serve();
        }
    }
    uint64_t num_completed() {
        CHECK(rdma::poll(pair).ok(), "%s", rdma::describe(rdma::poll(pair)).c_str());
        return state.completed;
    }
};

void completions_wait_until_the_bytes_are_there() {
    Bench bench;
    memcpy(bench.local, "expert parallel", 16);
    bench.post(bench.row(0, 16));
    bench.post(bench.word(7, 24));
    CHECK(bench.moves.num_begun == 2, "both were taken from the ring");
    CHECK(bench.num_completed() == 0 && bench.remote[0] == 0 && bench.nic.step(), "nothing has landed, and the NIC knows");
    bench.land(1);
    CHECK(bench.num_completed() == 1 && memcmp(bench.remote, "expert parallel", 16) == 0 && bench.remote[24] == 0, "the row");
    bench.land(1);
    CHECK(bench.num_completed() == 2 && bench.remote[24] == 7, "the word");
    CHECK(!bench.nic.step() && !bench.nic.has_work(), "nothing is left to do");
    CHECK(bench.nic.counters().num_completions == 2, "completions");
}

void a_request_may_change_its_slot_once_it_is_complete_and_not_before() {
    Bench bench;
    for (uint64_t i = 0; i < 4; ++i) bench.post(bench.word(100 + i, 8 * i));
    auto stop = [] { return rdma::WaitVerdict::kAborted; };
    uint64_t begin = 0;
    CHECK(rdma::reserve(bench.pair, 1, stop, &begin).outcome == Outcome::kAborted, "the ring is full until something lands");
    bench.land(1);
    CHECK(rdma::reserve(bench.pair, 1, stop, &begin).ok() && begin == 4, "one slot is free");
    bench.land(3);
    for (uint64_t i = 0; i < 4; ++i) CHECK(bench.remote[8 * i] == 100 + i, "word %d", static_cast<int>(i));
}

void an_error_does_not_overtake_what_has_not_landed() {
    Bench bench;
    bench.post(bench.word(1, 0));
    bench.post(bench.word(2, 60));  // beyond the memory's end
    bench.post(bench.word(3, 8));   // flushed
    CHECK(bench.num_completed() == 0, "neither the first nor the error");
    CHECK(bench.nic.first_fault(bench.pair.number).request == 1, "the NIC knows already");
    bench.land(1);
    const rdma::QueueStatus status = rdma::poll(bench.pair);
    CHECK(status.outcome == Outcome::kCompletionError && status.syndrome == Syndrome::kFlushed && status.request == 2, "%s",
          rdma::describe(status).c_str());
    const rdma::NicCounters counters = bench.nic.counters();
    CHECK(bench.remote[0] == 1 && bench.remote[8] == 0 && counters.num_completions == 1, "what came before landed, what came after did not");
    CHECK(counters.num_errors == 1 && counters.num_flushed == 1, "counts");
}

void moves_that_fail_fail_their_requests() {
    Bench bench;
    for (uint64_t i = 0; i < 3; ++i) bench.post(bench.word(1, 8 * i));
    bench.land(1);
    CHECK(bench.num_completed() == 1, "the first");
    bench.moves.has_failed = true;
    bench.serve();
    const rdma::QueueStatus status = rdma::poll(bench.pair);
    CHECK(status.outcome == Outcome::kCompletionError && status.peer == 1, "%s", rdma::describe(status).c_str());
    const rdma::QueueFault fault = bench.nic.first_fault(bench.pair.number);
    CHECK(fault.is_known && fault.syndrome == Syndrome::kRemoteOperation && fault.request == 1, "the cause");
    CHECK(bench.nic.moving_failure() == "the cable is out", "in words");
    const rdma::NicCounters counters = bench.nic.counters();
    CHECK(counters.num_errors == 1 && counters.num_flushed == 1 && counters.num_completions == 1, "counts");
}

void a_reset_waits_for_what_was_taken() {
    Bench bench;
    bench.post(bench.word(5, 0));
    bench.nic.reset_queue_pair(bench.pair.number);
    CHECK(bench.moves.num_drained == 1 && bench.remote[0] == 5, "the old request has landed");
    CHECK(bench.num_completed() == 0 && bench.state.reserved == 0, "as new");
    bench.post(bench.word(6, 8));
    bench.land(1);
    CHECK(bench.num_completed() == 1 && bench.remote[8] == 6, "serves again");
}

void atomics_and_their_results_land_in_order() {
    Bench bench;
    for (uint64_t i = 0; i < 2; ++i)
        bench.post([&](rdma::WqeBlock* slot, const rdma::WqePlace& place) {
            rdma::write_atomic_add(slot, place, bench.here(8 * i), bench.at(16), 5);
        });
    bench.land(2);
    CHECK(bench.remote[16] == 10 && bench.local[0] == 0 && bench.local[8] == 5 && bench.num_completed() == 2, "atomics");
}

void the_next_request_can_be_named_without_its_number() {
    Bench bench;
    bench.post(bench.word(1, 0));
    CHECK(bench.nic.inject_next(bench.pair.number, rdma::Fault::kErrorCompletion, Syndrome::kReceiverNotReady) == 1, "request 1 is next");
    bench.post(bench.word(2, 8));
    bench.land(2);
    const rdma::QueueStatus status = rdma::poll(bench.pair);
    CHECK(status.syndrome == Syndrome::kReceiverNotReady && status.request == 1, "%s", rdma::describe(status).c_str());
    CHECK(bench.nic.counters().num_faults[static_cast<int>(rdma::Fault::kErrorCompletion)] == 1, "it took effect");
}

void only_remote_peers_get_queue_pairs() {
    Nic nic{{}, LateMover{}};
    const rdma::SoftwareProvider<LateMover>::Shape shape = {1, 4, 1, 4, {true, false, false, true}};
    alignas(64) uint8_t memory[4 * (64 * 4 + 192)];
    rdma::QueuePairState states[4];
    const rdma::SoftwareProvider<LateMover> provider(nic, shape, memory, states);
    for (int peer = 0; peer < 4; ++peer) CHECK((provider.view().queue_pair(peer, 0).depth != 0) == (peer == 0 || peer == 3), "peer %d", peer);
}

// Whoever takes the memory away asks first. Completions that were asked for and dropped, or never asked for, do not say enough.
void work_is_what_has_not_landed() {
    Bench bench;
    CHECK(!bench.nic.has_work() && !bench.nic.has_failed(), "nothing was posted");
    bench.nic.inject(bench.pair.number, 0, rdma::Fault::kDropCompletion);
    auto stop = [] { return rdma::WaitVerdict::kAborted; };
    uint64_t begin = 0;
    CHECK(rdma::reserve(bench.pair, 1, stop, &begin).ok(), "reserve");
    bench.word(1, 0)(bench.pair.slot(begin), bench.pair.place(begin, true));
    CHECK(rdma::submit(bench.pair, begin, 1, stop).ok(), "submit");
    CHECK(bench.nic.has_work(), "the doorbell was rung and not heard");
    bench.serve();
    CHECK(bench.nic.has_work(), "executed, not landed");
    bench.land(1);
    CHECK(!bench.nic.has_work() && bench.num_completed() == 0, "landed, and nobody was told");
    bench.post(bench.word(1, 60));
    CHECK(bench.nic.has_failed() && !bench.nic.has_work(), "a failure is an end too");
}

// The thread naps when nothing is to be done, wakes up for work, lets others look in meanwhile, and can be started again.
void the_thread_comes_and_goes() {
    Bench bench;
    rdma::HostWait wait = rdma::HostWait::within(std::chrono::seconds(60));
    const auto post = [&](uint64_t value) {
        uint64_t begin = 0;
        CHECK(rdma::reserve(bench.pair, 1, wait, &begin).ok(), "reserve");
        bench.word(value, 0)(bench.pair.slot(begin), bench.pair.place(begin, true));
        CHECK(rdma::submit(bench.pair, begin, 1, wait).ok(), "submit");
        return begin;
    };
    std::atomic<bool> is_prepared{false};
    bench.nic.start([&] { is_prepared = true; });
    bench.nic.start();  // a running one is left alone
    std::this_thread::sleep_for(std::chrono::milliseconds(100));
    post(1);
    while (bench.nic.counters().num_inline_writes != 1) CHECK(wait() == rdma::WaitVerdict::kGoOn, "asleep");
    CHECK(is_prepared, "prepared");
    bench.nic.stop();
    bench.nic.stop();
    post(2);
    CHECK(bench.nic.counters().num_inline_writes == 1, "nobody serves");
    bench.moves.land(1);
    bench.nic.start();
    while (bench.nic.counters().num_inline_writes != 2) CHECK(wait() == rdma::WaitVerdict::kGoOn, "started again");
    bench.nic.stop();
    bench.land(1);
    CHECK(bench.num_completed() == 2 && bench.remote[0] == 2, "both");
}

const std::map<std::string, void (*)()> kCases = {
#define CASE(name) {#name, name}
    CASE(completions_wait_until_the_bytes_are_there),
    CASE(a_request_may_change_its_slot_once_it_is_complete_and_not_before),
    CASE(an_error_does_not_overtake_what_has_not_landed),
    CASE(moves_that_fail_fail_their_requests),
    CASE(a_reset_waits_for_what_was_taken),
    CASE(atomics_and_their_results_land_in_order),
    CASE(the_next_request_can_be_named_without_its_number),
    CASE(only_remote_peers_get_queue_pairs),
    CASE(work_is_what_has_not_landed),
    CASE(the_thread_comes_and_goes),
};

}  // namespace

int main(int num_arguments, char** arguments) {
    const auto found = num_arguments == 2 ? kCases.find(arguments[1]) : kCases.end();
    CHECK(found != kCases.end(), "no such case");
    found->second();
}
