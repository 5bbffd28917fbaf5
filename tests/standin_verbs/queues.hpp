#pragma once
// The queues of one process: completions, receive requests and send requests. Posters and the agent's thread meet here.
#include <infiniband/verbs.h>

#include <atomic>
#include <cerrno>
#include <cstdint>
#include <cstring>
#include <deque>
#include <mutex>
#include <optional>
#include <vector>

#include "segment.hpp"

namespace standin {

constexpr uint32_t kMaxSges = 4, kMaxInlineBytes = kPayloadBytes;

struct CompletionQueue : ibv_cq {
    void push(const ibv_wc& completion) {
        const std::lock_guard lock(mutex_);
        if (entries_.size() >= static_cast<size_t>(cqe))
            has_overflown_ = true;
        else
            entries_.push_back(completion);
    }
    // -1 once it has overflown, as the queue is in error then.
    int poll(int count, ibv_wc* completions) {
        const std::lock_guard lock(mutex_);
        if (has_overflown_) return -1;
        int taken = 0;
        for (; taken < count && !entries_.empty(); ++taken) {
            completions[taken] = entries_.front();
            entries_.pop_front();
        }
        return taken;
    }
    void forget(uint32_t number) {
        const std::lock_guard lock(mutex_);
        for (auto entry = entries_.begin(); entry != entries_.end();)
            entry = entry->qp_num == number ? entries_.erase(entry) : entry + 1;
    }

  private:
    std::mutex mutex_;
    std::deque<ibv_wc> entries_;
    bool has_overflown_ = false;
};

struct Receive {
    uint64_t id;
    uint32_t num_sges;
    ibv_sge sges[kMaxSges];
};

class ReceiveQueue {
  public:
    explicit ReceiveQueue(uint32_t depth) : depth_(depth) {}

    int post(ibv_recv_wr* request, ibv_recv_wr** bad) {
        const std::lock_guard lock(mutex_);
        for (; request != nullptr; request = request->next) {
            if (entries_.size() >= depth_ || request->num_sge < 0 || static_cast<uint32_t>(request->num_sge) > kMaxSges) {
                *bad = request;
                return entries_.size() >= depth_ ? ENOMEM : EINVAL;
            }
            Receive receive{request->wr_id, static_cast<uint32_t>(request->num_sge), {}};
            for (uint32_t i = 0; i < receive.num_sges; ++i) receive.sges[i] = request->sg_list[i];
            entries_.push_back(receive);
        }
        return 0;
    }
    std::optional<Receive> take() {
        const std::lock_guard lock(mutex_);
        if (entries_.empty()) return std::nullopt;
        const Receive receive = entries_.front();
        entries_.pop_front();
        return receive;
    }

  private:
    std::mutex mutex_;
    std::deque<Receive> entries_;
    const uint32_t depth_;
};

struct SharedReceiveQueue : ibv_srq {
    explicit SharedReceiveQueue(uint32_t depth) : ibv_srq{}, queue(depth) {}
    ReceiveQueue queue;
};

struct Send {
    uint64_t id;
    ibv_wr_opcode opcode;
    unsigned flags;
    __be32 immediate;
    uint64_t remote_address;
    uint32_t remote_key;
    uint64_t compare_or_add, swap;
    uint64_t num_bytes;
    uint32_t num_sges;
    ibv_sge sges[kMaxSges];
    uint8_t inline_data[kMaxInlineBytes];

    bool is_inline() const { return (flags & IBV_SEND_INLINE) != 0; }
    bool is_read() const { return opcode == IBV_WR_RDMA_READ; }
    bool is_atomic() const { return opcode == IBV_WR_ATOMIC_FETCH_AND_ADD || opcode == IBV_WR_ATOMIC_CMP_AND_SWP; }
    bool brings_data_back() const { return is_read() || is_atomic(); }
};

// Posters write at `posted`, one at a time; the agent completes in order. A place is used again when its request is complete.
class SendQueue {
  public:
    explicit SendQueue(uint32_t depth) : places_(depth) {}

    uint64_t posted() const { return posted_.load(std::memory_order_acquire); }
    uint64_t completed() const { return completed_.load(std::memory_order_relaxed); }
    const Send& at(uint64_t index) const { return places_[index % places_.size()]; }
    void complete_until(uint64_t index) { completed_.store(index, std::memory_order_release); }

    int post(const ibv_send_wr& request) {
        const std::lock_guard lock(mutex_);
        const uint64_t index = posted_.load(std::memory_order_relaxed);
        if (index - completed_.load(std::memory_order_acquire) >= places_.size()) return ENOMEM;
        if (request.num_sge < 0 || static_cast<uint32_t>(request.num_sge) > kMaxSges) return EINVAL;
        Send& send = places_[index % places_.size()];
        send.id = request.wr_id;
        send.opcode = request.opcode;
        send.flags = request.send_flags;
        send.immediate = request.imm_data;
        send.num_sges = static_cast<uint32_t>(request.num_sge);
        send.num_bytes = 0;
        for (uint32_t i = 0; i < send.num_sges; ++i) {
            send.sges[i] = request.sg_list[i];
            send.num_bytes += send.sges[i].length;
        }
        switch (send.opcode) {
            case IBV_WR_RDMA_WRITE:
            case IBV_WR_RDMA_WRITE_WITH_IMM:
            case IBV_WR_RDMA_READ:
                send.remote_address = request.wr.rdma.remote_addr;
                send.remote_key = request.wr.rdma.rkey;
                break;
            case IBV_WR_ATOMIC_FETCH_AND_ADD:
            case IBV_WR_ATOMIC_CMP_AND_SWP:
                if (send.num_bytes != 8) return EINVAL;
                send.remote_address = request.wr.atomic.remote_addr;
                send.remote_key = request.wr.atomic.rkey;
                send.compare_or_add = request.wr.atomic.compare_add;
                send.swap = request.wr.atomic.swap;
                break;
            case IBV_WR_SEND:
            case IBV_WR_SEND_WITH_IMM:
                break;
            default:
                return EOPNOTSUPP;
        }
        if (send.is_inline()) {  // the caller's memory is the caller's again when we return
            if (send.brings_data_back() || send.num_bytes > kMaxInlineBytes) return EINVAL;
            uint8_t* destination = send.inline_data;
            for (uint32_t i = 0; i < send.num_sges; ++i) {
                std::memcpy(destination, reinterpret_cast<const void*>(send.sges[i].addr), send.sges[i].length);
                destination += send.sges[i].length;
            }
        }
        posted_.store(index + 1, std::memory_order_release);
        return 0;
    }

  private:
    std::mutex mutex_;
    std::vector<Send> places_;
    std::atomic<uint64_t> posted_ = 0, completed_ = 0;
};

}  // namespace standin
