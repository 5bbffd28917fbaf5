// Random schedules of posters, NIC and faults, single-threaded: each seed is one schedule and replays exactly.
//
// A message is a few data writes and then, on the same queue pair, the write (or atomic) of its signal. Whenever a signal is seen, the data
// before it must be there. Each poster must end well or with the right named error; none may hang.
//
//   fault_schedules FIRST_SEED NUM_SCHEDULES      prints what happened, as "name count" lines
//
// -DMUTANT_SIGNAL_FIRST posts the signal before the data, -DMUTANT_NO_FAULTS never draws a fault: the program must then fail.
#include <algorithm>
#include <cstring>
#include <map>
#include <memory>
#include <string>

#include "check.hpp"
#include "deepep/layout/signal.hpp"
#include "deepep/rdma/software_nic.hpp"

namespace rdma = deepep::rdma;
using rdma::Outcome;
using rdma::Syndrome;

namespace {

constexpr uint32_t kMaxPairs = 3, kMaxPosters = 3, kMaxMessages = 4, kMaxWrites = 3, kRowBytes = 32;
constexpr uint64_t kRemoteBase = 0x7000000000;  // peers' memory has other addresses than here: nothing may write past the NIC
std::map<std::string, uint64_t> tally;

// Memory of one poster at its peer, and where its writes come from.
struct Rows {
    uint8_t data[kMaxMessages][kMaxWrites][kRowBytes];
    alignas(8) uint64_t signal;
};

struct World;

// The deadline of a poster that may wait: others and the NIC get their turn; when nothing can move any more, time is up.
struct Turns {
    World& world;
    bool may_wait;
    rdma::WaitVerdict operator()();
};

enum class Phase { kReserve, kWrite, kSubmit, kComplete, kDone };

struct Poster {
    rdma::QueuePair pair;
    Rows* source;
    const Rows* target;
    uint64_t remote;  // address of its rows at the peer
    bool uses_atomic;
    bool has_bad_request = false;
    uint32_t num_messages, num_writes[kMaxMessages];
    uint32_t message = 0, num_checked = 0;
    Phase phase = Phase::kReserve;
    bool is_running = false;
    uint64_t begin = 0;
    rdma::QueueStatus status = {};

    uint32_t count() const { return num_writes[message] + 1; }
};

struct Queue {
    rdma::QueuePair pair;
    rdma::Be32 key;
    uint64_t base;  // of the peer's memory
    uint64_t first_index;
    std::map<uint16_t, Syndrome> bad_requests;
};

struct World {
    rdma::Random random;
    rdma::FaultPlan plan;
    std::unique_ptr<rdma::SoftwareNic<>> nic;
    uint32_t num_pairs, num_posters, depth;
    Queue queues[kMaxPairs];
    Poster posters[kMaxPairs * kMaxPosters];
    Rows sources[kMaxPairs * kMaxPosters];
    Rows targets[kMaxPairs][kMaxPosters];
    uint64_t atomic_results[kMaxPairs * kMaxPosters];
    alignas(64) uint8_t memory[kMaxPairs][rdma::kWqeBlockBytes * 16 + 192];
    rdma::QueuePairState states[kMaxPairs];
    rdma::Be32 source_key, result_key;
    uint32_t num_idle = 0;
    bool is_faulty;

    explicit World(uint64_t seed) : random(seed) {
        is_faulty = random.below(4) != 0;
        plan.seed = random.next();
        plan.max_delay_steps = 1 + random.below(20);
        plan.dead_link_steps = random.below(2) * (1 + random.below(30));
#ifndef MUTANT_NO_FAULTS
        if (is_faulty)
            for (uint32_t& chance : plan.per_million) chance = random.below(2) * random.below(40000);
#endif
        nic = std::make_unique<rdma::SoftwareNic<>>(plan);
        num_pairs = 1 + random.below(kMaxPairs);
        depth = 4u << random.below(3);
        memset(targets, 0, sizeof(targets));
        for (Rows& rows : sources) {
            for (auto& message : rows.data)
                for (auto& row : message)
                    for (size_t i = 0; i < kRowBytes; i += 8) {
                        const uint64_t word = random.next() | 1;  // never what the target holds before
                        memcpy(row + i, &word, 8);
                    }
        }
        source_key = nic->register_memory(nic->kLocal, address(sources), bytes(sources), sizeof(sources), rdma::kLocalRead);
        result_key = nic->register_memory(nic->kLocal, address(atomic_results), bytes(atomic_results), sizeof(atomic_results));
        num_posters = 0;
        for (uint32_t q = 0; q < num_pairs; ++q) make_queue(q);
    }

    static uint8_t* bytes(void* pointer) { return static_cast<uint8_t*>(pointer); }
    static uint64_t address(const void* pointer) { return reinterpret_cast<uint64_t>(pointer); }

    void make_queue(uint32_t q) {
        Queue& queue = queues[q];
        queue.first_index = random.below(2) != 0 ? 0 : 65536 - random.below(40);
        queue.pair = nic->create_queue_pair(static_cast<int32_t>(q), depth, memory[q], &states[q], queue.first_index);
        queue.base = kRemoteBase + q * 0x100000;
        queue.key = nic->register_memory(static_cast<int32_t>(q), queue.base, bytes(targets[q]), sizeof(targets[q]));
        const uint32_t num_here = 1 + random.below(kMaxPosters);
        for (uint32_t p = 0; p < num_here; ++p) {
            Poster& poster = posters[num_posters];
            poster = {};
            poster.pair = queue.pair;
            poster.source = &sources[num_posters];
            poster.target = &targets[q][p];
            poster.remote = queue.base + p * sizeof(Rows);
            poster.uses_atomic = random.below(2) != 0;
            poster.has_bad_request = is_faulty && random.below(24) == 0;
            poster.num_messages = 1 + random.below(kMaxMessages);
            for (uint32_t& n : poster.num_writes) n = 1 + random.below(kMaxWrites);
            ++num_posters;
        }
    }

    // One request of another kind of wrong, and the syndrome that it deserves.
    void write_bad(Poster& poster, uint64_t index) {
        Queue& queue = queues[poster.pair.peer];
        const rdma::Location local = {address(poster.source), source_key}, remote = {poster.remote, queue.key};
        const rdma::Location result = {address(atomic_results), result_key};
        rdma::WqeBlock* slot = poster.pair.slot(index);
        const rdma::WqePlace place = poster.pair.place(index, false);
        Syndrome expected = Syndrome::kRemoteAccess;
        const uint32_t kind = random.below(8);
        if (kind >= 4 && kind < 7) expected = Syndrome::kLocalProtection;
        if (kind == 7) expected = Syndrome::kRemoteInvalidRequest;
        switch (kind) {
            case 0: rdma::write_rdma_write(slot, place, local, {remote.address, rdma::Be32::of(queue.key.value() + 1)}, 8); break;
            case 1: rdma::write_rdma_write(slot, place, local, {queue.base - 8, queue.key}, 16); break;
            case 2: rdma::write_rdma_write(slot, place, local, {queue.base + sizeof(targets[0]) - 8, queue.key}, 9); break;
            case 3: {  // memory of another peer, or our own
                const Queue& other = queues[(poster.pair.peer + 1) % num_pairs];
                rdma::write_inline_word(slot, place, num_pairs > 1 ? rdma::Location{other.base, other.key} : result, 1);
                break;
            }
            case 4: rdma::write_rdma_write(slot, place, remote, remote, 8); break;  // the peer's memory as a source
            case 5: rdma::write_rdma_write(slot, place, local, remote, sizeof(sources) + 1); break;
            case 6: rdma::write_atomic_add(slot, place, local, remote, 1); break;  // a result into memory that is read-only
            case 7: rdma::write_atomic_add(slot, place, result, {remote.address + 4, remote.key}, 1); break;
        }
        queue.bad_requests[static_cast<uint16_t>(index)] = expected;
        ++tally["bad_requests"];
    }

    void write_message(Poster& poster) {
        const uint32_t message = poster.message, num_writes = poster.num_writes[message];
        const bool is_bad = poster.has_bad_request && message + 1 == poster.num_messages;
        for (uint32_t i = 0; i <= num_writes; ++i) {
#ifdef MUTANT_SIGNAL_FIRST
            const uint32_t what = i == 0 ? num_writes : i - 1;
#else
            const uint32_t what = i;
#endif
            const uint64_t index = poster.begin + i;
            const rdma::WqePlace place = poster.pair.place(index, i == num_writes || random.below(4) == 0);
            const rdma::Be32 key = queues[poster.pair.peer].key;
            if (what == num_writes) {
                const rdma::Location signal = {poster.remote + offsetof(Rows, signal), key};
                const rdma::Location result = {address(&atomic_results[&poster - posters]), result_key};
                if (poster.uses_atomic)
                    rdma::write_atomic_add(poster.pair.slot(index), place, result, signal, deepep::signal_word(1, 0));
                else
                    rdma::write_inline_word(poster.pair.slot(index), place, signal, deepep::signal_word(message + 1, num_writes));
                continue;
            }
            const size_t offset = (message * kMaxWrites + what) * kRowBytes;
            const rdma::Location remote = {poster.remote + offset, key};
            const uint8_t* row = poster.source->data[message][what];
            if (is_bad && what == 0)
                write_bad(poster, index);
            else if (row[0] % 4 == 0)
                rdma::write_inline(poster.pair.slot(index), place, remote, row, num_bytes(row));
            else
                rdma::write_rdma_write(poster.pair.slot(index), place, {address(row), source_key}, remote, num_bytes(row));
        }
    }
    static uint32_t num_bytes(const uint8_t* row) { return 1 + row[1] % rdma::kMaxInlineBytes; }

    // One phase of one poster; true if it got further. Without may_wait it only tries.
    bool run(Poster& poster, bool may_wait) {
        Turns turns{*this, may_wait};
        const Phase before = poster.phase;
        poster.is_running = true;
        rdma::QueueStatus status = poster.pair.status(Outcome::kOk);
        switch (poster.phase) {
            case Phase::kReserve:
                status = rdma::reserve(poster.pair, poster.count(), turns, &poster.begin);
                if (status.ok()) poster.phase = Phase::kWrite;
                break;
            case Phase::kWrite:
                write_message(poster);
                poster.phase = Phase::kSubmit;
                break;
            case Phase::kSubmit:
                // Giving up here would leave a hole, so who may not wait does not begin.
                if (!may_wait && poster.pair.state->ready != poster.begin && poster.pair.state->failure == 0) break;
                status = rdma::submit(poster.pair, poster.begin, poster.count(), turns);
                if (!status.ok()) break;
                ++poster.message;
                poster.phase = poster.message == poster.num_messages ? Phase::kComplete : Phase::kReserve;
                break;
            case Phase::kComplete:
                status = rdma::wait_completed(poster.pair, poster.begin + poster.num_writes[poster.num_messages - 1] + 1, turns);
                if (status.ok()) poster.phase = Phase::kDone;
                break;
            case Phase::kDone: break;
        }
        poster.is_running = false;
        poster.status = status;
        const bool is_patient = status.outcome == Outcome::kTimeout && !may_wait;
        if (!status.ok() && !is_patient) poster.phase = Phase::kDone;
        if (!status.ok() && is_patient) ++tally["gave_up_and_came_back"];
        return poster.phase != before;
    }

    bool step_nic() {
        const bool is_busy = nic->step();
        for (uint32_t i = 0; i < num_posters; ++i) check_messages(posters[i]);
        return is_busy;
    }

    // The receiver: a signal that is seen vouches for the data before it.
    static void check_messages(Poster& poster) {
        const uint32_t epoch = deepep::signal_epoch(poster.target->signal);
        CHECK(epoch <= poster.num_messages, "signal %u of %u messages", epoch, poster.num_messages);
        for (; poster.num_checked < epoch; ++poster.num_checked) {
            const uint32_t m = poster.num_checked;
            const bool is_bad = poster.has_bad_request && m + 1 == poster.num_messages;
            CHECK(!is_bad, "the signal behind a request that failed was delivered");
            for (uint32_t i = 0; i < poster.num_writes[m]; ++i) {
                const uint8_t* row = poster.source->data[m][i];
                CHECK(memcmp(poster.target->data[m][i], row, num_bytes(row)) == 0, "data of message %u is later than its signal", m);
                CHECK(poster.target->data[m][i][num_bytes(row)] == 0, "message %u wrote behind its end", m);
            }
            ++tally["messages_checked"];
        }
    }

    // Gives somebody a turn. False when nothing can move any more.
    bool turn() {
        bool has_moved = false;
        if (random.below(3) != 0) has_moved = step_nic();
        Poster& poster = posters[random.below(num_posters)];
        if (!poster.is_running && poster.phase != Phase::kDone) has_moved |= run(poster, false);
        num_idle = has_moved ? 0 : num_idle + 1;
        if (num_idle < 8) return true;
        bool is_busy = step_nic();
        for (uint32_t i = 0; i < num_posters; ++i)
            if (!posters[i].is_running && posters[i].phase != Phase::kDone) is_busy |= run(posters[i], false);
        return is_busy;
    }

    void play() {
        uint64_t num_turns = 0;
        while (true) {
            Poster* next = nullptr;
            const uint32_t from = random.below(num_posters);
            for (uint32_t i = 0; i < num_posters && next == nullptr; ++i)
                if (posters[(from + i) % num_posters].phase != Phase::kDone) next = &posters[(from + i) % num_posters];
            if (next == nullptr) break;
            if (random.below(2) != 0) step_nic();
            run(*next, random.below(2) != 0);
            CHECK(++num_turns < 100000, "the schedule does not end");
        }
        for (int i = 0; i < 2000 && step_nic(); ++i) {}
    }

    void judge() {
        for (uint32_t i = 0; i < num_posters; ++i) judge(posters[i]);
        const rdma::NicCounters counters = nic->counters();
        for (int f = 0; f < rdma::kNumFaults; ++f)
            tally[std::string("fault: ") + rdma::name_of(static_cast<rdma::Fault>(f))] += counters.num_faults[f];
        tally["requests"] += counters.num_writes + counters.num_inline_writes + counters.num_atomics;
        tally["flushed"] += counters.num_flushed;
    }

    void judge(const Poster& poster) {
        const rdma::QueueStatus& status = poster.status;
        const Queue& queue = queues[poster.pair.peer];
        const uint32_t number = poster.pair.number;
        const rdma::QueueFault fault = nic->first_fault(number);
        const std::string text = rdma::describe(status);
        CHECK(status.queue_pair == number && status.peer == poster.pair.peer, "%s names another queue pair", text.c_str());
        if (fault.is_known) check_cause(queue, fault);
        ++tally["outcome: " + std::string(status.ok()                           ? "ok"
                                          : status.outcome == Outcome::kTimeout ? "timeout"
                                                                                : rdma::name_of(status.syndrome))];
        const uint64_t end = poster.begin + (poster.message == 0 ? 0 : poster.num_writes[poster.num_messages - 1] + 1);
        const uint64_t failed_at = queue.first_index + static_cast<uint16_t>(fault.request - static_cast<uint16_t>(queue.first_index));
        switch (status.outcome) {
            case Outcome::kOk:
                CHECK(!fault.is_known || end <= failed_at, "ended well although request %u failed", fault.request);
                CHECK(poster.num_checked == poster.num_messages, "ended well with %u of %u messages", poster.num_checked,
                      poster.num_messages);
                break;
            case Outcome::kTimeout:
                CHECK(!fault.is_known && (nic->is_link_dead(number) || nic->is_last_completion_lost(number)), "%s, for no reason",
                      text.c_str());
                break;
            case Outcome::kCompletionError:
                CHECK(fault.is_known, "%s, but nothing failed", text.c_str());
                CHECK(status.syndrome == fault.syndrome || status.syndrome == Syndrome::kFlushed, "%s, the NIC says %s", text.c_str(),
                      rdma::name_of(fault.syndrome));
                CHECK(status.syndrome == Syndrome::kFlushed || status.request == fault.request, "%s, the NIC says request %u", text.c_str(),
                      fault.request);
                break;
            default: CHECK(false, "%s", text.c_str());
        }
    }

    // A failure has one of the causes that this schedule contains, and the syndrome that belongs to it.
    void check_cause(const Queue& queue, const rdma::QueueFault& fault) {
        const auto bad = queue.bad_requests.find(fault.request);
        if (bad != queue.bad_requests.end() && fault.syndrome == bad->second) return;
        const rdma::NicCounters counters = nic->counters();
        if (fault.syndrome == Syndrome::kRemoteOperation)
            CHECK(counters.num_faults[static_cast<int>(rdma::Fault::kErrorCompletion)] > 0, "no such fault");
        else if (fault.syndrome == Syndrome::kRetriesExhausted)
            CHECK(nic->is_link_dead(queue.pair.number) && plan.dead_link_steps > 0, "the link is up");
        else
            CHECK(false, "request %u failed with %s for no reason", fault.request, rdma::name_of(fault.syndrome));
    }
};

rdma::WaitVerdict Turns::operator()() {
    if (!may_wait) return rdma::WaitVerdict::kTimeout;
    return world.turn() ? rdma::WaitVerdict::kGoOn : rdma::WaitVerdict::kTimeout;
}

}  // namespace

int main(int num_arguments, char** arguments) {
    CHECK(num_arguments == 3, "usage: fault_schedules FIRST_SEED NUM_SCHEDULES");
    const uint64_t first = std::strtoull(arguments[1], nullptr, 10), count = std::strtoull(arguments[2], nullptr, 10);
    for (uint64_t seed = first; seed < first + count; ++seed) {
        tally["schedules"] += 1;
        const auto world = std::make_unique<World>(seed);
        world->play();
        world->judge();
    }
    for (int f = 0; f < rdma::kNumFaults; ++f) {
        const std::string name = std::string("fault: ") + rdma::name_of(static_cast<rdma::Fault>(f));
        CHECK(tally[name] > 0, "%s never took effect", name.c_str());
    }
    for (const char* name : {"bad_requests", "flushed", "gave_up_and_came_back", "outcome: timeout"})
        CHECK(tally[name] > 0, "%s never happened", name);
    for (const auto& [name, value] : tally) std::printf("%s\t%llu\n", name.c_str(), static_cast<unsigned long long>(value));
}
