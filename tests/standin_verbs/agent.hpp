#pragma once
// The thread of this process that moves all bytes: what its queue pairs send, and what others send to them.
#include <atomic>
#include <map>
#include <memory>
#include <mutex>
#include <string>
#include <thread>

#include "pair.hpp"

namespace standin {

class Agent {
  public:
    // Never destroyed: the thread may outlive static objects.
    static Agent& get();

    // The first opens, the last closes. False, with the reason on stderr, if there is no shared segment.
    bool open();
    void close();

    // While it is held the agent makes no pass, and all copies have landed.
    class Hold {
      public:
        explicit Hold(Agent& agent);
        ~Hold() { agent_.mutex_.unlock(); }
        Hold(const Hold&) = delete;

      private:
        Agent& agent_;
    };

    Shared& shared() { return shared_; }
    // Those that follow need a Hold.
    Pair* add_pair(uint32_t send_depth, uint32_t receive_depth);
    void remove_pair(Pair* pair);

  private:
    void run();
    bool pass();

    std::mutex mutex_;
    std::atomic<int> num_waiting_ = 0, num_opened_ = 0;
    std::mutex opening_;
    std::atomic<bool> stops_ = false;
    std::thread thread_;
    Shared shared_;
    std::map<uint32_t, std::unique_ptr<Pair>> pairs_;
    uint32_t changes_seen_ = 0;
};

}  // namespace standin
