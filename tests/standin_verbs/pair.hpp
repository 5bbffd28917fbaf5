#pragma once
// A queue pair of this process, in both its roles. As requester it cuts its send requests into packets and completes them by the answers;
// as responder it executes the packets of the remote pair. Only the agent's thread calls this, a pass at a time:
//
//   every pair: prepare_packets, execute, take_answers     copies may be under way
//   all copies have landed
//   every pair: publish                                    packets, answers and completions become visible
#include <chrono>
#include <cstdint>
#include <optional>
#include <vector>

#include "memory.hpp"
#include "queues.hpp"
#include "segment.hpp"

namespace standin {

// What the pairs of a process have in common.
struct Shared {
    Membership membership;
    Regions regions;
    Copier copier;
    std::vector<int32_t> free_chunks;  // of this process
    struct Counts {
        std::atomic<uint64_t> writes, reads, atomics, sends, bytes;  // executed here
    } counts{};

    uint8_t* chunk(uint32_t process, int32_t index) { return membership.segment().chunks[process][index].bytes; }
    // As of the last look, 20 ms ago at most: looking is a system call.
    bool is_alive(uint32_t process) {
        const auto now = std::chrono::steady_clock::now();
        if (now - looked_at[process] > std::chrono::milliseconds(20)) {
            looked_at[process] = now;
            was_alive[process] = membership.is_alive(process);
        }
        return was_alive[process];
    }
    std::chrono::steady_clock::time_point looked_at[kMaxProcesses]{};
    bool was_alive[kMaxProcesses]{};
};

class Pair {
  public:
    Pair(Shared& shared, SharedPair& place, uint32_t send_depth, uint32_t receive_depth)
        : sends(send_depth), own_receives(receive_depth), place_(place), shared_(shared), number_(place.number) {}

    ibv_qp* verbs = nullptr;  // what the caller holds
    SendQueue sends;
    ReceiveQueue own_receives;
    ReceiveQueue* receives = nullptr;  // ours or a shared one
    CompletionQueue *send_completions = nullptr, *receive_completions = nullptr;
    bool completes_all = false;

    uint32_t number() const { return number_; }
    ibv_qp_state state() const { return static_cast<ibv_qp_state>(place_.state.load()); }
    void set_state(ibv_qp_state state);
    void connect(uint32_t remote) { place_.remote = remote; }
    void set_access(uint32_t access) { place_.access = access; }
    uint32_t access() const { return place_.access; }
    void set_receiver_retries(uint32_t retries) { place_.receiver_retries = retries; }
    SharedPair& place() { return place_; }
    // Forgets all requests and packets; the remote pair is reset as well before both are used again.
    void reset();

    // The pair whose packets this one executes, if that one is connected with this one.
    void find_sender();
    bool is_idle() const { return taken_ == prepared_; }

    // Each says whether there was something to do.
    bool prepare_packets();
    bool execute();
    bool take_answers();
    void publish(bool have_landed);

  private:
    struct Sent {  // what a packet of ours was for
        uint64_t request, offset;
        uint32_t num_bytes;
        bool is_last;
        int32_t chunk;
    };
    struct Received {  // a message that is being received
        Receive receive;
        bool has_failed;
    };
    using Clock = std::chrono::steady_clock;

    void note_remote(bool is_there);
    bool can_reach_remote();
    ibv_wc_status check_local(const Send& send) const;
    bool prepare_one(const Send& send);
    uint8_t* data_of(Packet& packet, uint32_t owner);
    // Copies between the bytes [offset, offset + num_bytes) of a scatter list and shared memory.
    bool scatter(const ibv_sge* sges, uint32_t num_sges, uint64_t offset, uint8_t* data, uint64_t num_bytes, bool is_to_region);
    enum class Executed { kNow, kLater };
    Executed execute_one(Packet& packet);
    ibv_wc_status execute_write(Packet& packet, uint8_t* data);
    ibv_wc_status execute_read(Packet& packet, uint8_t* data);
    ibv_wc_status execute_atomic(Packet& packet);
    ibv_wc_status execute_send(Packet& packet, uint8_t* data);
    void complete(uint64_t request, ibv_wc_status status);
    void flush();

    SharedPair& place_;
    Shared& shared_;
    const uint32_t number_;

    // Requester. Requests: completed <= next <= posted. Packets: taken <= sent <= prepared.
    uint64_t next_ = 0, next_offset_ = 0;
    uint64_t prepared_ = 0, taken_ = 0;
    Sent sent_[kWindow]{};
    uint64_t done_until_ = 0;                     // requests that are complete when all copies have landed
    ibv_wc_status failure_ = IBV_WC_SUCCESS;      // of request `done_until_`
    std::vector<int32_t> chunks_to_free_;
    std::optional<Clock::time_point> waits_since_;

    // Responder.
    SharedPair* sender_ = nullptr;
    uint32_t sender_process_ = 0;
    uint64_t executed_ = 0;
    bool has_refused_ = false;
    std::optional<Received> receiving_;
    std::vector<ibv_wc> receive_done_;
    std::optional<Clock::time_point> lacks_receive_since_;
};

}  // namespace standin
