// Small cases of queue pairs and the software NIC, each to be checked by hand. One argument: the case's name.
#include <cstring>
#include <functional>
#include <map>
#include <string>

#include "check.hpp"
#include "deepep/rdma/host_wait.hpp"
#include "deepep/rdma/software_provider.hpp"

namespace rdma = deepep::rdma;
using rdma::Outcome;
using rdma::Syndrome;

namespace {

// One queue pair of depth 4 to rank 1, whose 64 bytes the NIC knows at 0x10000; 64 bytes of this rank. Deadlines run out after 100 steps.
struct Bench {
    alignas(64) uint8_t memory[rdma::kWqeBlockBytes * 4 + 192];
    rdma::QueuePairState state;
    alignas(8) uint8_t local[64] = {};
    alignas(8) uint8_t remote[64] = {};
    rdma::SoftwareNic<> nic;
    rdma::QueuePair pair;
    rdma::Be32 local_key, remote_key;

    struct Steps {
        rdma::SoftwareNic<>& nic;
        int num_left = 100;
        rdma::WaitVerdict operator()() {
            nic.step();
            return num_left-- > 0 ? rdma::WaitVerdict::kGoOn : rdma::WaitVerdict::kTimeout;
        }
    };

    explicit Bench(const rdma::FaultPlan& plan = {}, uint32_t remote_access = rdma::kAllAccess) : nic(plan) {
        pair = nic.create_queue_pair(1, 4, memory, &state);
        local_key = nic.register_memory(nic.kLocal, address(local), local, sizeof(local));
        remote_key = nic.register_memory(1, 0x10000, remote, sizeof(remote), remote_access);
    }
    static uint64_t address(const void* pointer) { return reinterpret_cast<uint64_t>(pointer); }

    using Write = std::function<void(rdma::WqeBlock*, const rdma::WqePlace&)>;
    rdma::QueueStatus post(const Write& write, uint64_t* end = nullptr) {
        Steps steps{nic};
        uint64_t begin = 0;
        rdma::QueueStatus status = rdma::reserve(pair, 1, steps, &begin);
        if (!status.ok()) return status;
        write(pair.slot(begin), pair.place(begin, true));
        if (end != nullptr) *end = begin + 1;
        return rdma::submit(pair, begin, 1, steps);
    }
    rdma::QueueStatus wait(uint64_t end) {
        Steps steps{nic};
        return rdma::wait_completed(pair, end, steps);
    }
    rdma::QueueStatus post_and_wait(const Write& write) {
        uint64_t end = 0;
        const rdma::QueueStatus status = post(write, &end);
        return status.ok() ? wait(end) : status;
    }
    Write word(uint64_t value, uint64_t offset = 0) {
        return [=](rdma::WqeBlock* slot, const rdma::WqePlace& place) {
            rdma::write_inline_word(slot, place, {0x10000 + offset, remote_key}, value);
        };
    }
    // The same request again works after a reset.
    void expect_failure(const Write& write, Syndrome syndrome) {
        const rdma::QueueStatus status = post_and_wait(write);
        CHECK(status.outcome == Outcome::kCompletionError && status.syndrome == syndrome, "%s", rdma::describe(status).c_str());
        CHECK(status.queue_pair == pair.number && status.peer == 1, "%s", rdma::describe(status).c_str());
        CHECK(nic.first_fault(pair.number).syndrome == syndrome, "the NIC knows another cause");
        CHECK(post(word(1)).outcome == Outcome::kCompletionError, "a failed queue pair takes requests");
        nic.reset_queue_pair(pair.number);
        CHECK(post_and_wait(word(77, 56)).ok() && remote[56] == 77, "after a reset the queue pair serves again");
    }
};

void requests_do_what_they_say() {
    Bench bench;
    memcpy(bench.local, "expert parallel", 16);
    auto write = [&](rdma::WqeBlock* slot, const rdma::WqePlace& place) {
        rdma::write_rdma_write(slot, place, {Bench::address(bench.local), bench.local_key}, {0x10000, bench.remote_key}, 16);
    };
    CHECK(bench.post_and_wait(write).ok() && memcmp(bench.remote, bench.local, 16) == 0 && bench.remote[16] == 0, "write");
    auto inlined = [&](rdma::WqeBlock* slot, const rdma::WqePlace& place) {
        rdma::write_inline(slot, place, {0x10011, bench.remote_key}, "abc", 3);
    };
    CHECK(bench.post_and_wait(inlined).ok() && memcmp(bench.remote + 16, "\0abc\0", 5) == 0, "inline write");
    CHECK(bench.post_and_wait(bench.word(0x0102030405060708, 24)).ok() && bench.remote[24] == 8 && bench.remote[31] == 1, "inline word");
    auto atomic = [&](rdma::WqeBlock* slot, const rdma::WqePlace& place) {
        rdma::write_atomic_add(slot, place, {Bench::address(bench.local) + 32, bench.local_key}, {0x10018, bench.remote_key}, 5);
    };
    CHECK(bench.post_and_wait(atomic).ok() && bench.remote[24] == 13 && bench.local[32] == 8 && bench.local[39] == 1,
          "atomic and its result");
    const rdma::NicCounters counters = bench.nic.counters();
    CHECK(counters.num_writes == 1 && counters.num_inline_writes == 2 && counters.num_atomics == 1 && counters.num_bytes == 16 + 3 + 8 + 8,
          "counts");
    CHECK(counters.num_completions == 4 && bench.state.num_doorbells == 4, "completions and doorbells");
}

void wrong_requests_fail_with_their_syndrome() {
    const auto fails = [](Syndrome syndrome, const std::function<void(Bench&, rdma::WqeBlock*, const rdma::WqePlace&)>& write) {
        Bench bench;
        bench.expect_failure([&](rdma::WqeBlock* slot, const rdma::WqePlace& place) { write(bench, slot, place); }, syndrome);
    };
    const auto writes = [&](Syndrome syndrome, uint64_t local_offset, uint64_t remote_offset, uint32_t num_bytes, bool swap_keys) {
        fails(syndrome, [=](Bench& bench, rdma::WqeBlock* slot, const rdma::WqePlace& place) {
            rdma::write_rdma_write(slot, place,
                                   {Bench::address(bench.local) + local_offset, swap_keys ? bench.remote_key : bench.local_key},
                                   {0x10000 + remote_offset, bench.remote_key}, num_bytes);
        });
    };
    writes(Syndrome::kLocalProtection, 0, 0, 8, true);
    writes(Syndrome::kLocalProtection, 57, 0, 8, false);
    writes(Syndrome::kLocalProtection, 0, 0, 0, false);  // a length of 0 means 2^31
    writes(Syndrome::kRemoteAccess, 0, 57, 8, false);
    writes(Syndrome::kRemoteAccess, 0, ~0ull, 8, false);
    writes(Syndrome::kRemoteAccess, 0, ~0ull - 0xffff, 8, false);
    fails(Syndrome::kRemoteInvalidRequest, [](Bench& bench, rdma::WqeBlock* slot, const rdma::WqePlace& place) {
        rdma::write_atomic_add(slot, place, {Bench::address(bench.local), bench.local_key}, {0x10004, bench.remote_key}, 1);
    });
    fails(Syndrome::kLocalOperation, [](Bench& bench, rdma::WqeBlock* slot, rdma::WqePlace place) {
        place.index += 1;
        bench.word(1)(slot, place);
    });
    fails(Syndrome::kLocalOperation, [](Bench& bench, rdma::WqeBlock* slot, rdma::WqePlace place) {
        place.queue_pair += 1;
        bench.word(1)(slot, place);
    });
    fails(Syndrome::kLocalOperation, [](Bench& bench, rdma::WqeBlock* slot, const rdma::WqePlace& place) {
        bench.word(1)(slot, place);
        slot->words[0] = rdma::Be32::of(static_cast<uint32_t>(place.index) << 8 | 0x10).bits;  // RDMA READ is not served
    });
    fails(Syndrome::kLocalLength, [](Bench& bench, rdma::WqeBlock* slot, const rdma::WqePlace& place) {
        bench.word(1)(slot, place);
        slot->words[8] = rdma::Be32::of(rdma::kInlineFlag | 13).bits;
    });
}

void rights_are_those_of_the_registration() {
    Bench atomics_only({}, rdma::kRemoteAtomic);
    CHECK(atomics_only.post_and_wait(atomics_only.word(1)).syndrome == Syndrome::kRemoteAccess, "no right to write");
    Bench gone;
    gone.nic.deregister_memory(gone.remote_key);
    CHECK(gone.post_and_wait(gone.word(1)).syndrome == Syndrome::kRemoteAccess, "deregistered memory");
}

void injected_faults_end_as_they_should() {
    Bench dropped;
    dropped.nic.inject(dropped.pair.number, 0, rdma::Fault::kDropCompletion);
    uint64_t end = 0;
    CHECK(dropped.post(dropped.word(3), &end).ok() && dropped.wait(end).outcome == Outcome::kTimeout, "the completion is lost");
    CHECK(dropped.remote[0] == 3, "the request was executed");
    CHECK(dropped.post_and_wait(dropped.word(4)).ok() && dropped.wait(end).ok(), "the next completion covers both");
    Bench failed;
    failed.nic.inject(failed.pair.number, 1, rdma::Fault::kErrorCompletion, Syndrome::kReceiverNotReady);
    CHECK(failed.post_and_wait(failed.word(1)).ok(), "before the fault");
    failed.expect_failure(failed.word(1), Syndrome::kReceiverNotReady);
    Bench silent;
    silent.nic.inject(silent.pair.number, 0, rdma::Fault::kDeadLink);
    CHECK(silent.post_and_wait(silent.word(1)).outcome == Outcome::kTimeout && silent.remote[0] == 0, "a dead link is silent");
    rdma::FaultPlan plan;
    plan.dead_link_steps = 10;
    Bench dead(plan);
    dead.nic.inject(dead.pair.number, 0, rdma::Fault::kDeadLink);
    dead.expect_failure(dead.word(1), Syndrome::kRetriesExhausted);
    Bench delayed;
    delayed.nic.inject(delayed.pair.number, 0, rdma::Fault::kDelay);
    CHECK(delayed.post_and_wait(delayed.word(1)).ok(), "a delay is only a delay");
    for (const auto& [bench, fault] : std::map<Bench*, rdma::Fault>{{&dropped, rdma::Fault::kDropCompletion},
                                                                    {&failed, rdma::Fault::kErrorCompletion},
                                                                    {&dead, rdma::Fault::kDeadLink},
                                                                    {&delayed, rdma::Fault::kDelay}})
        CHECK(bench->nic.counters().num_faults[static_cast<int>(fault)] == 1, "%s", rdma::name_of(fault));
}

void flushed_requests_hide_the_cause_and_the_provider_knows_it() {
    Bench bench;
    bench.nic.inject(bench.pair.number, 0, rdma::Fault::kErrorCompletion, Syndrome::kRetriesExhausted);
    uint64_t end = 0;
    for (int i = 0; i < 3; ++i) CHECK(bench.post(bench.word(1), &end).ok(), "post");
    while (bench.nic.step()) {}
    const rdma::QueueStatus status = bench.wait(end);
    CHECK(status.outcome == Outcome::kCompletionError && status.syndrome == Syndrome::kFlushed && status.request == 2, "%s",
          rdma::describe(status).c_str());
    const rdma::QueueFault fault = bench.nic.first_fault(bench.pair.number);
    CHECK(fault.is_known && fault.syndrome == Syndrome::kRetriesExhausted && fault.request == 0, "the cause");
    CHECK(bench.nic.counters().num_flushed == 2, "two flushed");
}

void waits_end_and_say_why() {
    Bench bench;
    auto stop = [] { return rdma::WaitVerdict::kAborted; };
    uint64_t begin = 0, mine = 0;
    CHECK(rdma::reserve(bench.pair, 0, stop, &begin).outcome == Outcome::kBadBatch, "empty batch");
    CHECK(rdma::reserve(bench.pair, 5, stop, &begin).outcome == Outcome::kBadBatch, "batch above the depth");
    CHECK(rdma::reserve(bench.pair, 3, stop, &begin).ok() && begin == 0, "three slots");
    CHECK(rdma::reserve(bench.pair, 2, stop, &mine).outcome == Outcome::kAborted && bench.state.reserved == 3, "a refusal takes nothing");
    CHECK(rdma::reserve(bench.pair, 1, stop, &mine).ok() && mine == 3, "the last slot");
    // The first poster never publishes: the second gives up, and whoever comes later is told at once.
    CHECK(rdma::submit(bench.pair, mine, 1, stop).outcome == Outcome::kAborted, "second poster");
    const rdma::QueueStatus status = rdma::reserve(bench.pair, 1, stop, &begin);
    CHECK(status.outcome == Outcome::kLostPoster && status.request == 3, "%s", rdma::describe(status).c_str());
    CHECK(rdma::describe(status) == "queue pair 64 to rank 1: the requests before 3 were reserved and never published", "%s",
          rdma::describe(status).c_str());
    bench.nic.reset_queue_pair(bench.pair.number);
    const auto before = std::chrono::steady_clock::now();
    rdma::HostWait late = rdma::HostWait::within(std::chrono::milliseconds(5));
    CHECK(rdma::wait_completed(bench.pair, 1, late).outcome == Outcome::kTimeout, "nothing was posted");
    CHECK(std::chrono::steady_clock::now() - before >= std::chrono::milliseconds(5), "not before the deadline");
    const std::atomic<bool> is_aborted{true};
    rdma::HostWait aborted = rdma::HostWait::within(std::chrono::seconds(100), &is_aborted);
    CHECK(rdma::wait_completed(bench.pair, 1, aborted).outcome == Outcome::kAborted, "aborted");
}

void a_completion_that_nobody_asked_for_is_an_error() {
    Bench bench;
    auto* entry = const_cast<rdma::CompletionEntry*>(bench.pair.completion);
    entry->counter_opcode = rdma::Be32::of(9 << 16);
    const rdma::QueueStatus status = rdma::poll(bench.pair);
    CHECK(status.outcome == Outcome::kBadCompletion && status.request == 9, "%s", rdma::describe(status).c_str());
}

void one_doorbell_rings_for_all_that_is_ready() {
    Bench bench;
    auto stop = [] { return rdma::WaitVerdict::kAborted; };
    uint64_t begin = 0;
    CHECK(rdma::reserve(bench.pair, 2, stop, &begin).ok(), "reserve");
    for (uint64_t i = 0; i < 2; ++i) bench.word(i)(bench.pair.slot(i), bench.pair.place(i, true));
    bench.state.ready = 1;  // another poster has published the first and not yet rung
    CHECK(rdma::submit(bench.pair, 1, 1, stop).ok() && bench.state.rung == 2 && bench.state.num_doorbells == 1, "one doorbell for both");
    bench.state.is_ringing = 1;  // somebody holds the doorbell and does not come back
    uint64_t next = 0;
    CHECK(rdma::reserve(bench.pair, 1, stop, &next).ok() && rdma::submit(bench.pair, next, 1, stop).outcome == Outcome::kAborted,
          "bounded");
}

void keys_go_by_chunk_and_by_peer() {
    rdma::SoftwareNic<> nic;
    const rdma::SoftwareProvider<>::Shape shape = {0, 2, 2, 4};
    alignas(64) uint8_t memory[4 * (64 * 4 + 192)];
    CHECK(shape.num_queue_bytes() == sizeof(memory), "%lld", static_cast<long long>(shape.num_queue_bytes()));
    rdma::QueuePairState states[4];
    alignas(8) uint8_t local[100], remote[100] = {};
    rdma::SoftwareProvider<> provider(nic, shape, memory, states);
    provider.set_local(Bench::address(local), local, sizeof(local), sizeof(local));
    provider.set_remote(1, 0x5000, remote, sizeof(remote), 48);
    const rdma::RdmaView view = provider.view();
    CHECK(view.queue_pair(0, 0).depth == 0 && view.queue_pair(1, 0).number != view.queue_pair(1, 1).number, "pairs");
    CHECK(view.queue_pair(1, 3).number == view.queue_pair(1, 1).number && view.queue_pair(1, 1).peer == 1, "lanes wrap");
    const rdma::MemoryKeys& keys = view.remote[1];
    CHECK(keys.contiguous(0) == 48 && keys.contiguous(47) == 1 && keys.contiguous(96) == 4, "chunks");
    CHECK(keys.at(47).key.bits != keys.at(48).key.bits && keys.at(48).address == 0x5030, "a key for each chunk");
    const rdma::MemoryKeys inside = {0x5000, 52, 48, 40, keys.keys};  // begins 40 bytes inside its first chunk
    CHECK(inside.num_chunks() == 2 && keys.num_chunks() == 3 && rdma::MemoryKeys{}.num_chunks() == 0, "chunks in number");
    CHECK(inside.contiguous(0) == 8 && inside.contiguous(8) == 44, "chunks of memory that begins inside one");
    CHECK(inside.at(7).key.bits == keys.keys[0].bits && inside.at(8).key.bits == keys.keys[1].bits && inside.at(8).address == 0x5008, "keys");
    Bench::Steps steps{nic};
    const rdma::QueuePair pair = view.queue_pair(1, 1);
    const auto put = [&](int64_t offset) {
        uint64_t begin = 0;
        rdma::QueueStatus status = rdma::reserve(pair, 1, steps, &begin);
        if (!status.ok()) return status;
        rdma::write_inline(pair.slot(begin), pair.place(begin, true), keys.at(offset), "12345678", 8);
        status = rdma::submit(pair, begin, 1, steps);
        return status.ok() ? rdma::wait_completed(pair, begin + 1, steps) : status;
    };
    CHECK(put(40).ok() && put(48).ok() && memcmp(remote + 40, "1234567812345678", 16) == 0, "within chunks");
    CHECK(put(44).syndrome == Syndrome::kRemoteAccess, "across chunks");
    CHECK(provider.first_fault(pair.number).syndrome == Syndrome::kRemoteAccess, "cause");
    provider.reset();
    CHECK(put(0).ok(), "after a reset");
}

const std::map<std::string, void (*)()> kCases = {
#define CASE(name) {#name, name}
    CASE(requests_do_what_they_say),
    CASE(wrong_requests_fail_with_their_syndrome),
    CASE(rights_are_those_of_the_registration),
    CASE(injected_faults_end_as_they_should),
    CASE(flushed_requests_hide_the_cause_and_the_provider_knows_it),
    CASE(waits_end_and_say_why),
    CASE(a_completion_that_nobody_asked_for_is_an_error),
    CASE(one_doorbell_rings_for_all_that_is_ready),
    CASE(keys_go_by_chunk_and_by_peer),
};

}  // namespace

int main(int num_arguments, char** arguments) {
    const auto found = num_arguments == 2 ? kCases.find(arguments[1]) : kCases.end();
    CHECK(found != kCases.end(), "no such case");
    found->second();
}
