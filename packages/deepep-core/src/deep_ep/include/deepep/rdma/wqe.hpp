#pragma once
// Work-queue and completion-queue entries of mlx5 NICs, byte for byte as the NIC reads and writes them, and what fills them in.
//
// One work request is one block of 64 bytes, a sequence of segments of 16 bytes each (inline data: 4 bytes of length, then the bytes):
//
//   RDMA WRITE          control | remote address | data                        48 bytes
//   inline RDMA WRITE   control | remote address | length, 1 to 28 bytes       48 or 64 bytes
//   ATOMIC fetch-add    control | remote address | atomic       | data         64 bytes; data says where the old value goes
//
// The names that rdma-core's mlx5dv.h gives to these structures stand beside each.
#include <cstdint>
#include <cstring>

#include "byte_order.hpp"

namespace deepep::rdma {

constexpr uint32_t kWqeBlockBytes = 64;          // MLX5_SEND_WQE_BB
constexpr uint32_t kOctowordBytes = 16;          // the unit of a work request's size
constexpr uint32_t kMaxInlineBytes = 28;         // one block, less control and remote address (32 bytes) and the length (4)
constexpr uint32_t kMaxWriteBytes = 0x7fffffff;  // a length of 0 in a data segment means 2^31
constexpr uint32_t kInlineFlag = 0x80000000u;    // MLX5_INLINE_SEG
constexpr uint32_t kSignalled = 2 << 2;          // MLX5_WQE_CTRL_CQ_UPDATE: the NIC writes a completion for this request
constexpr uint32_t kIndexMask = 0xffff;          // request numbers are 16 bits wide, whatever the ring's depth

enum class Opcode : uint8_t { kRdmaWrite = 0x08, kAtomicFetchAdd = 0x12 };  // MLX5_OPCODE_*

struct ControlSegment {       // mlx5_wqe_ctrl_seg
    Be32 opmod_index_opcode;  // modifier << 24 | request number << 8 | opcode
    Be32 qpn_ds;              // queue pair << 8 | size in octowords
    Be32 flags;               // signature << 24 | stream << 8 | fence, completion and event bits
    Be32 immediate;
};
struct RemoteAddressSegment {  // mlx5_wqe_raddr_seg
    Be64 address;
    Be32 key;
    Be32 reserved;
};
struct DataSegment {  // mlx5_wqe_data_seg
    Be32 num_bytes;
    Be32 key;
    Be64 address;
};
struct AtomicSegment {  // mlx5_wqe_atomic_seg
    Be64 addend;
    Be64 compare;
};

struct alignas(kOctowordBytes) WriteWqe {
    ControlSegment control;
    RemoteAddressSegment remote;
    DataSegment data;
};
struct alignas(kOctowordBytes) InlineWriteWqe {
    ControlSegment control;
    RemoteAddressSegment remote;
    Be32 num_bytes;  // mlx5_wqe_inl_data_seg
    uint32_t data[kMaxInlineBytes / 4];
};
struct alignas(kOctowordBytes) AtomicWqe {
    ControlSegment control;
    RemoteAddressSegment remote;
    AtomicSegment atomic;
    DataSegment data;
};
static_assert(sizeof(WriteWqe) == 48 && sizeof(InlineWriteWqe) == kWqeBlockBytes && sizeof(AtomicWqe) == kWqeBlockBytes,
              "a work request fits one block");

struct alignas(kWqeBlockBytes) WqeBlock {
    uint32_t words[kWqeBlockBytes / 4];
};

// A completion-queue entry (mlx5_cqe64; on errors mlx5_err_cqe). The queue has one entry, which the NIC overwrites ("collapsed").
struct alignas(64) CompletionEntry {
    uint8_t unused[52];
    Be32 error;           // on errors: vendor's syndrome << 8 | syndrome
    Be32 opcode_qpn;      // opcode of the request << 24 | queue pair
    Be32 counter_opcode;  // request number << 16 | signature << 8 | completion opcode << 4 | owner bit: one load has number and outcome
};
static_assert(sizeof(CompletionEntry) == 64, "the NIC writes 64 bytes");

enum class CompletionOpcode : uint8_t { kRequest = 0, kRequestError = 13, kResponderError = 14, kInvalid = 15 };  // MLX5_CQE_*

// Why a request failed: MLX5_CQE_SYNDROME_*.
enum class Syndrome : uint8_t {
    kNone = 0x00,
    kLocalLength = 0x01,
    kLocalOperation = 0x02,
    kLocalProtection = 0x04,
    kFlushed = 0x05,
    kWindowBind = 0x06,
    kBadResponse = 0x10,
    kLocalAccess = 0x11,
    kRemoteInvalidRequest = 0x12,
    kRemoteAccess = 0x13,
    kRemoteOperation = 0x14,
    kRetriesExhausted = 0x15,
    kReceiverNotReady = 0x16,
    kRemoteAborted = 0x22,
};

// Which request of which queue pair an entry is.
struct WqePlace {
    uint32_t queue_pair;
    uint64_t index;     // counts on beyond 16 bits; the entry takes the low 16
    bool is_signalled;  // the last request before a doorbell has to be
};
// Memory as a request names it; keys come from the provider in the NIC's byte order.
struct Location {
    uint64_t address;
    Be32 key;
};

DEEPEP_HOST_DEVICE ControlSegment control_segment(const WqePlace& place, Opcode opcode, uint32_t num_octowords) {
    return {.opmod_index_opcode = Be32::of((static_cast<uint32_t>(place.index) & kIndexMask) << 8 | static_cast<uint32_t>(opcode)),
            .qpn_ds = Be32::of(place.queue_pair << 8 | num_octowords),
            .flags = Be32::of(place.is_signalled ? kSignalled : 0),
            .immediate = {0}};
}
DEEPEP_HOST_DEVICE RemoteAddressSegment remote_segment(const Location& remote) {
    return {.address = Be64::of(remote.address), .key = remote.key, .reserved = {0}};
}
DEEPEP_HOST_DEVICE DataSegment data_segment(const Location& local, uint32_t num_bytes) {
    return {.num_bytes = Be32::of(num_bytes), .key = local.key, .address = Be64::of(local.address)};
}

// Writers fill a slot that the caller has reserved. Only the entry's own octowords are written.

// num_bytes: 1 to kMaxWriteBytes.
DEEPEP_HOST_DEVICE void write_rdma_write(WqeBlock* slot, const WqePlace& place, const Location& local, const Location& remote,
                                         uint32_t num_bytes) {
    *reinterpret_cast<WriteWqe*>(slot) = {
        .control = control_segment(place, Opcode::kRdmaWrite, 3), .remote = remote_segment(remote), .data = data_segment(local, num_bytes)};
}

// The value lands at `remote` in this machine's byte order; the slot holds it, so no memory is read later.
DEEPEP_HOST_DEVICE void write_inline_word(WqeBlock* slot, const WqePlace& place, const Location& remote, uint64_t value) {
    auto* wqe = reinterpret_cast<WriteWqe*>(slot);
    wqe->control = control_segment(place, Opcode::kRdmaWrite, 3);
    wqe->remote = remote_segment(remote);
    slot->words[8] = Be32::of(sizeof(value) | kInlineFlag).bits;
    slot->words[9] = static_cast<uint32_t>(value);
    slot->words[10] = static_cast<uint32_t>(value >> 32);
    slot->words[11] = 0;
}

// num_bytes: 1 to kMaxInlineBytes.
DEEPEP_HOST_DEVICE void write_inline(WqeBlock* slot, const WqePlace& place, const Location& remote, const void* data, uint32_t num_bytes) {
    const uint32_t num_octowords = 2 + (4 + num_bytes + kOctowordBytes - 1) / kOctowordBytes;
    InlineWriteWqe wqe = {.control = control_segment(place, Opcode::kRdmaWrite, num_octowords),
                          .remote = remote_segment(remote),
                          .num_bytes = Be32::of(num_bytes | kInlineFlag),
                          .data = {}};
    memcpy(wqe.data, data, num_bytes);
    memcpy(slot, &wqe, num_octowords * kOctowordBytes);
}

// Adds to the 8 bytes at `remote`, which must be 8-byte aligned; their value before goes to the 8 bytes at `result`.
DEEPEP_HOST_DEVICE void write_atomic_add(WqeBlock* slot, const WqePlace& place, const Location& result, const Location& remote,
                                         uint64_t addend) {
    *reinterpret_cast<AtomicWqe*>(slot) = {.control = control_segment(place, Opcode::kAtomicFetchAdd, 4),
                                           .remote = remote_segment(remote),
                                           .atomic = {.addend = Be64::of(addend), .compare = {0}},
                                           .data = data_segment(result, 8)};
}

// The doorbell record in memory: the number of the request after the last one that is ready.
DEEPEP_HOST_DEVICE Be32 doorbell_record(uint64_t next_index) { return Be32::of(static_cast<uint32_t>(next_index) & kIndexMask); }

// The doorbell itself, stored at once: the first half of a control segment.
DEEPEP_HOST_DEVICE uint64_t doorbell_word(uint32_t queue_pair, uint64_t next_index) {
    const uint32_t index = (static_cast<uint32_t>(next_index) & kIndexMask) << 8;
    return static_cast<uint64_t>(Be32::of(queue_pair << 8).bits) << 32 | Be32::of(index).bits;
}

}  // namespace deepep::rdma
