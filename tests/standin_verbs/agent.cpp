#include "agent.hpp"

#include <sched.h>
#include <unistd.h>

#include <cstdio>
#include <cstdlib>

#include "log.hpp"

namespace standin {
namespace {

constexpr int kIdlePasses = 2000;  // before the thread sleeps between passes
constexpr useconds_t kNap = 50;

void say_counts() {
    const auto& counts = Agent::get().shared().counts;
    say("executed for others: %lu write, %lu read, %lu atomic and %lu send packets, %lu bytes", counts.writes.load(),
        counts.reads.load(), counts.atomics.load(), counts.sends.load(), counts.bytes.load());
}

}  // namespace

Agent& Agent::get() {
    static auto* const agent = new Agent;
    return *agent;
}

bool Agent::open() {
    const std::lock_guard lock(opening_);
    if (num_opened_ == 0) {
        std::string error;
        if (!shared_.membership.join(&error)) {
            std::fprintf(stderr, "standin_verbs: %s\n", error.c_str());
            return false;
        }
        shared_.regions.set_process(shared_.membership.process());
        shared_.free_chunks.clear();
        for (uint32_t i = 0; i < kChunks; ++i) shared_.free_chunks.push_back(static_cast<int32_t>(i));
        static const int registered = std::atexit(say_counts);
        static_cast<void>(registered);
        stops_ = false;
        thread_ = std::thread([this] { run(); });
        say("process %u of the segment", shared_.membership.process());
    }
    ++num_opened_;
    return true;
}

void Agent::close() {
    const std::lock_guard lock(opening_);
    if (num_opened_ == 0 || --num_opened_ != 0) return;
    stops_ = true;
    thread_.join();
    for (auto& [number, pair] : pairs_) pair->place().number = 0;
    pairs_.clear();
    shared_.membership.leave();
}

Agent::Hold::Hold(Agent& agent) : agent_(agent) {
    ++agent_.num_waiting_;
    agent_.mutex_.lock();
    --agent_.num_waiting_;
}

Pair* Agent::add_pair(uint32_t send_depth, uint32_t receive_depth) {
    SharedPair* const place = shared_.membership.take_pair();
    if (place == nullptr) return nullptr;
    auto pair = std::make_unique<Pair>(shared_, *place, send_depth, receive_depth);
    return (pairs_[pair->number()] = std::move(pair)).get();
}

void Agent::remove_pair(Pair* pair) {
    pair->reset();
    pair->place().number = 0;
    ++shared_.membership.segment().changes;
    pairs_.erase(pair->number());
}

bool Agent::pass() {
    const uint32_t changes = shared_.membership.segment().changes;
    if (changes != changes_seen_)
        for (auto& [number, pair] : pairs_) pair->find_sender();
    changes_seen_ = changes;
    bool did_something = false;
    for (auto& [number, pair] : pairs_) {
        did_something |= pair->prepare_packets();
        did_something |= pair->execute();
        did_something |= pair->take_answers();
    }
    const bool have_landed = shared_.copier.finish();
    for (auto& [number, pair] : pairs_) pair->publish(have_landed);
    return did_something;
}

void Agent::run() {
    int idle_passes = 0;
    while (!stops_) {
        bool did_something = false;
        {
            const std::lock_guard lock(mutex_);
            did_something = pass();
        }
        while (num_waiting_ > 0) usleep(1);  // a mutex is not fair
        idle_passes = did_something ? 0 : idle_passes + 1;
        if (idle_passes > kIdlePasses)
            usleep(kNap);
        else if (!did_something)
            sched_yield();
    }
}

}  // namespace standin
