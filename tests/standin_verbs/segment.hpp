#pragma once
// What the processes of one host share: who is there, the queue pairs with their packets, and memory for packets that do not fit in a line.
//
//   Segment    | magic | changes | processes[16] | pairs[1024] | chunks[16 processes][16 chunks of 128 KiB] |
//   SharedPair | number, owner, remote, state | sent | answered | packets[16] |
//
// A message is cut into packets. The process that owns a pair writes packets and counts them in `sent`; the process that owns the remote
// pair executes them in order, writes their answers into them and counts them in `answered`. A packet is written again, and its chunk used
// again, only when the owner has taken its answer.
#include <infiniband/verbs.h>

#include <atomic>
#include <cstddef>
#include <cstdint>
#include <string>

namespace standin {

constexpr uint32_t kMaxProcesses = 16, kMaxPairs = 1024, kWindow = 16;
constexpr uint32_t kChunks = 16, kChunkBytes = 128 << 10, kPayloadBytes = 256;
constexpr uint32_t kEndless = 7;  // as a number of retries
constexpr int32_t kNoChunk = -1;  // the data are in the packet itself

struct Packet {
    ibv_wr_opcode opcode;
    bool is_first, is_last, has_immediate;
    __be32 immediate;
    uint32_t remote_key;
    uint64_t remote_address;  // of this packet's first byte
    uint64_t offset, message_bytes;
    uint32_t num_bytes;
    int32_t chunk;  // of the owner of the pair
    uint64_t compare_or_add, swap;
    // The answer.
    ibv_wc_status status;
    uint64_t word_before;  // of an atomic
    alignas(16) uint8_t payload[kPayloadBytes];
};

struct SharedPair {
    std::atomic<uint32_t> number;  // 0: the place is free. Written by the owner, as all of this line
    std::atomic<uint32_t> generation, owner, remote, state;
    std::atomic<uint32_t> access, receiver_retries;
    alignas(64) std::atomic<uint64_t> sent;      // by the owner, release: the packets before are written
    alignas(64) std::atomic<uint64_t> answered;  // by the remote pair's process, release: the packets before have landed
    alignas(64) Packet packets[kWindow];
};

struct Process {
    std::atomic<int32_t> pid;  // 0: the place is free
};

struct alignas(4096) Chunk {
    uint8_t bytes[kChunkBytes];
};

struct Segment {
    std::atomic<uint64_t> magic;
    std::atomic<uint32_t> changes;  // of pairs, by anybody: whoever keeps a list of them makes it anew
    std::atomic<uint32_t> next_pair;
    Process processes[kMaxProcesses];
    SharedPair pairs[kMaxPairs];
    Chunk chunks[kMaxProcesses][kChunks];
};

static_assert(std::atomic<uint64_t>::is_always_lock_free && std::atomic<uint32_t>::is_always_lock_free);

// This process's place in the segment that STANDIN_VERBS_SHM names.
class Membership {
  public:
    // Joins; `error` says why not. A segment whose processes are all dead is used afresh.
    bool join(std::string* error);
    // Leaves; the last one removes the name.
    void leave();
    bool is_member() const { return segment_ != nullptr; }
    Segment& segment() const { return *segment_; }
    uint32_t process() const { return process_; }
    bool is_alive(uint32_t process) const;

    // A free place for a queue pair; nullptr if all are taken. Its number is unique while the segment lives.
    SharedPair* take_pair();
    // The place of the pair of this number, or nullptr if there is none any more.
    SharedPair* find_pair(uint32_t number) const;

  private:
    bool open(std::string* error);
    Segment* segment_ = nullptr;
    uint32_t process_ = 0;
    int file_ = -1;
};

}  // namespace standin
