// Several poster threads on each queue pair, receiver threads, and the software NIC on its own thread. Meant to run under ThreadSanitizer
// and AddressSanitizer: what a thread reads was published to it, or the sanitizer says so.
//
//   threaded_rings NUM_MESSAGES      messages of each poster of the first queue pair
#include <array>
#include <memory>
#include <vector>

#include "check.hpp"
#include "deepep/layout/signal.hpp"
#include "deepep/rdma/host_wait.hpp"
#include "deepep/rdma/software_provider.hpp"

namespace rdma = deepep::rdma;

namespace {

constexpr int kNumPosters = 3, kNumSlots = 4, kNumPeers = 2, kNumWords = 8;
constexpr uint32_t kDepth = 8;
constexpr auto kPatience = std::chrono::seconds(250);  // what stands still does so for ever
// Requests of the first queue pair that one thread posts and serves before the others begin: these pass the wrap of request numbers, and
// not by many requests, each of which costs a busy machine several changes of threads.
constexpr uint64_t kNumBefore = 62000;

struct Slot {
    uint64_t data[kNumWords];
    uint64_t signal;  // written by the poster's peer write behind `data`; the receiver may then read `data`
};
using Rows = std::array<std::array<Slot, kNumSlots>, kNumPosters>;

uint64_t pattern(int peer, int poster, uint32_t message, int word) {
    return (static_cast<uint64_t>(message) * kNumPosters + poster) * 1000003 + peer * 31 + word;
}

struct Setup {
    rdma::SoftwareNic<> nic;
    std::vector<uint8_t> storage;
    std::vector<rdma::QueuePairState> states;
    std::unique_ptr<rdma::SoftwareProvider<>> provider;
    std::array<Rows, kNumPeers> sources = {}, targets = {};
    // Messages that a receiver has used up, by poster: the poster may overwrite that slot. (In a real program a signal the other way.)
    std::array<std::array<std::atomic<uint32_t>, kNumPosters>, kNumPeers> consumed = {};
    std::atomic<bool> is_aborted{false};
    std::atomic<uint64_t> num_full{0}, num_errors{0};

    explicit Setup(const rdma::FaultPlan& plan, uint64_t num_before = 0) : nic(plan) {
        const rdma::SoftwareProvider<>::Shape shape = {-1, kNumPeers, 1, kDepth};
        storage.resize(shape.num_queue_bytes() + 64);
        states.resize(shape.num_pairs());
        auto* memory = reinterpret_cast<uint8_t*>((reinterpret_cast<uintptr_t>(storage.data()) + 63) / 64 * 64);
        provider = std::make_unique<rdma::SoftwareProvider<>>(nic, shape, memory, states.data());
        provider->set_local(address(&sources), bytes(&sources), sizeof(sources), sizeof(sources));
        for (int peer = 0; peer < kNumPeers; ++peer)
            provider->set_remote(peer, remote_base(peer), bytes(&targets[peer]), sizeof(Rows), sizeof(Rows));
        post_alone(num_before);
        nic.start();
    }
    ~Setup() { nic.stop(); }

    static uint64_t address(const void* pointer) { return reinterpret_cast<uint64_t>(pointer); }
    static uint8_t* bytes(void* pointer) { return static_cast<uint8_t*>(pointer); }
    static uint64_t remote_base(int peer) { return (peer + 1ull) << 40; }

    void post_alone(uint64_t num_requests) {
        const rdma::RdmaView view = provider->view();
        const rdma::QueuePair pair = view.queue_pair(0, 0);
        auto serve = [&] {
            nic.step();
            return rdma::WaitVerdict::kGoOn;
        };
        for (uint64_t begin = 0, request = 0; request < num_requests; ++request) {
            CHECK(rdma::reserve(pair, 1, serve, &begin).ok() && begin == request, "reserve");
            rdma::write_inline_word(pair.slot(begin), pair.place(begin, true), view.remote[0].at(0), 0);
            CHECK(rdma::submit(pair, begin, 1, serve).ok(), "submit");
        }
        CHECK(rdma::wait_completed(pair, num_requests, serve).ok(), "completed");
    }

    rdma::HostWait patience() const { return rdma::HostWait::within(kPatience, &is_aborted); }

    // Returns how the poster ended.
    rdma::QueueStatus post(int peer, int poster, uint32_t num_messages) {
        const rdma::RdmaView view = provider->view();
        const rdma::QueuePair pair = view.queue_pair(peer, 0);
        uint64_t ends[kNumSlots] = {}, begin = 0;
        rdma::QueueStatus status = pair.status(rdma::Outcome::kOk);
        for (uint32_t message = 0; message < num_messages; ++message) {
            const int s = message % kNumSlots;
            rdma::HostWait wait = patience();
            if (message >= kNumSlots) {
                status = rdma::wait_completed(pair, ends[s], wait);  // the NIC no longer reads our slot
                if (!status.ok()) return status;
                while (consumed[peer][poster].load(std::memory_order_acquire) + kNumSlots <= message)
                    if (wait() != rdma::WaitVerdict::kGoOn) return pair.status(rdma::Outcome::kAborted);
            }
            Slot& slot = sources[peer][poster][s];
            for (int w = 0; w < kNumWords; ++w) slot.data[w] = pattern(peer, poster, message, w);
            const int64_t offset = bytes(&slot) - bytes(&sources[peer]);
            rdma::HostWait room = patience();
            status = rdma::reserve(pair, 2, room, &begin);
            num_full += room.num_calls != 0;
            if (!status.ok()) return status;
            const rdma::Location local = view.local.at(bytes(&slot) - bytes(&sources)), remote = view.remote[peer].at(offset);
            rdma::write_rdma_write(pair.slot(begin), pair.place(begin, false), local, remote, sizeof(slot.data));
            rdma::write_inline_word(pair.slot(begin + 1), pair.place(begin + 1, true), {remote.address + sizeof(slot.data), remote.key},
                                    deepep::signal_word(message + 1, 0));
            status = rdma::submit(pair, begin, 2, wait);
            if (!status.ok()) return status;
            ends[s] = begin + 2;
        }
        rdma::HostWait wait = patience();
        return rdma::wait_completed(pair, begin + 2, wait);
    }

    void receive(int peer, uint32_t num_messages) {
        uint32_t next[kNumPosters] = {};
        for (uint64_t num_left = static_cast<uint64_t>(num_messages) * kNumPosters; num_left != 0;) {
            bool has_received = false;
            for (int poster = 0; poster < kNumPosters; ++poster) {
                if (next[poster] == num_messages) continue;
                Slot& slot = targets[peer][poster][next[poster] % kNumSlots];
                if (deepep::signal_epoch(__atomic_load_n(&slot.signal, __ATOMIC_ACQUIRE)) != next[poster] + 1) continue;
                for (int w = 0; w < kNumWords; ++w)
                    CHECK(slot.data[w] == pattern(peer, poster, next[poster], w), "peer %d, poster %d, message %u, word %d", peer, poster,
                          next[poster], w);
                consumed[peer][poster].store(++next[poster], std::memory_order_release);
                has_received = true;
                --num_left;
            }
            if (!has_received) {
                if (is_aborted.load()) return;
                std::this_thread::yield();
            }
        }
    }
};

// Everything arrives, through the wrap of request numbers and with a ring that is full most of the time.
void all_messages_arrive(uint32_t num_messages) {
    rdma::FaultPlan plan;
    plan.per_million[static_cast<int>(rdma::Fault::kDelay)] = 2000;
    plan.per_million[static_cast<int>(rdma::Fault::kReorder)] = 20000;
    Setup setup(plan, kNumBefore);
    const uint64_t num_faults_before = setup.nic.counters().num_faults[0];
    const uint32_t num_here[kNumPeers] = {num_messages, num_messages / 8};
    std::vector<std::thread> threads;
    for (int peer = 0; peer < kNumPeers; ++peer) {
        threads.emplace_back([&, peer] { setup.receive(peer, num_here[peer]); });
        for (int poster = 0; poster < kNumPosters; ++poster)
            threads.emplace_back([&, peer, poster] {
                const rdma::QueueStatus status = setup.post(peer, poster, num_here[peer]);
                CHECK(status.ok(), "%s", rdma::describe(status).c_str());
            });
    }
    for (std::thread& thread : threads) thread.join();
    setup.nic.stop();
    const rdma::NicCounters counters = setup.nic.counters();
    CHECK(setup.states[0].completed == kNumBefore + 2ull * kNumPosters * num_messages, "%llu completed",
          static_cast<unsigned long long>(setup.states[0].completed));
    CHECK(setup.states[0].completed > 65536, "no wrap of request numbers");
    CHECK(setup.num_full > 0, "the ring was never full");
    CHECK(counters.num_faults[0] > num_faults_before, "no delay");
    CHECK(counters.num_errors == 0 && counters.num_flushed == 0, "errors");
    const uint32_t num_doorbells = setup.states[0].num_doorbells - static_cast<uint32_t>(kNumBefore);
    CHECK(num_doorbells > 0 && num_doorbells <= kNumPosters * num_messages, "%u doorbells", num_doorbells);
    std::printf("requests %llu, doorbells %u for %u batches, ring full %llu times\n",
                static_cast<unsigned long long>(setup.states[0].completed), num_doorbells, kNumPosters * num_messages,
                static_cast<unsigned long long>(setup.num_full.load()));
}

// One queue pair fails; all its posters learn it, and the other one goes on.
void failure_ends_every_poster_of_its_queue_pair() {
    constexpr uint32_t kNumHere = 300;
    Setup setup({});
    const uint32_t bad = setup.provider->view().queue_pair(1, 0).number;
    setup.nic.inject(bad, 501, rdma::Fault::kErrorCompletion, rdma::Syndrome::kRetriesExhausted);
    std::vector<std::thread> threads;
    threads.emplace_back([&] { setup.receive(0, kNumHere); });
    threads.emplace_back([&] { setup.receive(1, kNumHere); });
    for (int peer = 0; peer < kNumPeers; ++peer)
        for (int poster = 0; poster < kNumPosters; ++poster)
            threads.emplace_back([&, peer, poster] {
                const rdma::QueueStatus status = setup.post(peer, poster, kNumHere);
                if (peer == 0) {
                    CHECK(status.ok(), "%s", rdma::describe(status).c_str());
                    return;
                }
                // A poster that was waiting for its receiver hears of it when the whole operation is given up.
                CHECK(status.outcome == rdma::Outcome::kCompletionError || status.outcome == rdma::Outcome::kAborted, "poster %d: %s",
                      poster, rdma::describe(status).c_str());
                CHECK(status.queue_pair == bad && status.peer == 1, "%s", rdma::describe(status).c_str());
                if (status.outcome == rdma::Outcome::kCompletionError) ++setup.num_errors;
            });
    // The healthy queue pair finishes first; then those who wait for rows of the failed one are told.
    for (int poster = 0; poster < kNumPosters; ++poster) threads[2 + poster].join();
    threads[0].join();
    while (setup.num_errors == 0) std::this_thread::yield();
    setup.is_aborted = true;
    threads[1].join();
    for (size_t i = 2 + kNumPosters; i < threads.size(); ++i) threads[i].join();
    CHECK(setup.provider->first_fault(bad).syndrome == rdma::Syndrome::kRetriesExhausted, "the provider knows the cause");
}

// One thread publishes a request and is kept from the doorbell; another rings for both. What joins the two is `ready` alone.
void one_thread_rings_for_another() {
    Setup setup({});
    const rdma::RdmaView view = setup.provider->view();
    const rdma::QueuePair pair = view.queue_pair(0, 0);
    for (uint64_t round = 0; round < 200; ++round) {
        __atomic_store_n(&pair.state->is_ringing, 1, __ATOMIC_RELAXED);
        const auto post = [&](uint64_t order, auto wait) {
            auto turn = [&] {
                std::this_thread::yield();
                return rdma::WaitVerdict::kGoOn;
            };
            while (rdma::load_relaxed_gpu(&pair.state->reserved) != 2 * round + order) turn();
            uint64_t begin = 0;
            CHECK(rdma::reserve(pair, 1, turn, &begin).ok() && begin == 2 * round + order, "reserve");
            rdma::write_inline_word(pair.slot(begin), pair.place(begin, true), view.remote[0].at(8 * order), begin);
            return rdma::submit(pair, begin, 1, wait).outcome;
        };
        std::thread first([&] {
            const rdma::Outcome outcome = post(0, [] { return rdma::WaitVerdict::kAborted; });
            CHECK(outcome == rdma::Outcome::kAborted || outcome == rdma::Outcome::kOk, "outcome %d", static_cast<int>(outcome));
        });
        std::thread second([&] {
            const auto wait = [&] {  // called in vain: for the first request to be published, or for the doorbell, which is then given free
                if (rdma::load_relaxed_gpu(&pair.state->ready) == 2 * round + 2)
                    __atomic_store_n(&pair.state->is_ringing, 0, __ATOMIC_RELAXED);
                std::this_thread::yield();
                return rdma::WaitVerdict::kGoOn;
            };
            CHECK(post(1, wait) == rdma::Outcome::kOk, "the second poster");
        });
        first.join();
        second.join();
        rdma::HostWait wait = setup.patience();
        CHECK(rdma::wait_completed(pair, 2 * round + 2, wait).ok(), "both were rung");
    }
    CHECK(pair.state->num_doorbells < 300, "%u doorbells for 400 requests: nobody rang for another", pair.state->num_doorbells);
}

}  // namespace

int main(int num_arguments, char** arguments) {
    CHECK(num_arguments == 2, "usage: threaded_rings NUM_MESSAGES");
    all_messages_arrive(static_cast<uint32_t>(std::strtoul(arguments[1], nullptr, 10)));
    failure_ends_every_poster_of_its_queue_pair();
    one_thread_rings_for_another();
    std::printf("ok\n");
}
