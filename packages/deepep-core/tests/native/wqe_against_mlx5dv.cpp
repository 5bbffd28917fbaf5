// Our work requests and completions against rdma-core's header: its structures, its constants and its own inline setters.
#include <infiniband/mlx5dv.h>

#include <cstddef>
#include <cstring>

#include "check.hpp"
#include "deepep/rdma/queue_pair.hpp"
#include "deepep/rdma/software_nic.hpp"

namespace rdma = deepep::rdma;

static_assert(sizeof(rdma::ControlSegment) == sizeof(mlx5_wqe_ctrl_seg));
static_assert(sizeof(rdma::RemoteAddressSegment) == sizeof(mlx5_wqe_raddr_seg));
static_assert(sizeof(rdma::DataSegment) == sizeof(mlx5_wqe_data_seg));
static_assert(sizeof(rdma::AtomicSegment) == sizeof(mlx5_wqe_atomic_seg));
static_assert(sizeof(rdma::CompletionEntry) == sizeof(mlx5_cqe64) && sizeof(mlx5_cqe64) == sizeof(mlx5_err_cqe));
static_assert(offsetof(rdma::InlineWriteWqe, num_bytes) == sizeof(mlx5_wqe_ctrl_seg) + sizeof(mlx5_wqe_raddr_seg));
static_assert(offsetof(rdma::InlineWriteWqe, data) - offsetof(rdma::InlineWriteWqe, num_bytes) == sizeof(mlx5_wqe_inl_data_seg));
static_assert(offsetof(rdma::CompletionEntry, opcode_qpn) == offsetof(mlx5_cqe64, sop_drop_qpn));
static_assert(offsetof(rdma::CompletionEntry, opcode_qpn) == offsetof(mlx5_err_cqe, s_wqe_opcode_qpn));
static_assert(offsetof(rdma::CompletionEntry, counter_opcode) == offsetof(mlx5_cqe64, wqe_counter));
static_assert(offsetof(rdma::CompletionEntry, counter_opcode) == offsetof(mlx5_err_cqe, wqe_counter));
static_assert(rdma::kWqeBlockBytes == MLX5_SEND_WQE_BB && rdma::kInlineFlag == static_cast<uint32_t>(MLX5_INLINE_SEG));
static_assert(rdma::kSignalled == MLX5_WQE_CTRL_CQ_UPDATE);
static_assert(static_cast<int>(rdma::Opcode::kRdmaWrite) == MLX5_OPCODE_RDMA_WRITE);
static_assert(static_cast<int>(rdma::Opcode::kAtomicFetchAdd) == MLX5_OPCODE_ATOMIC_FA);
static_assert(static_cast<int>(rdma::CompletionOpcode::kRequest) == MLX5_CQE_REQ);
static_assert(static_cast<int>(rdma::CompletionOpcode::kRequestError) == MLX5_CQE_REQ_ERR);
static_assert(static_cast<int>(rdma::CompletionOpcode::kResponderError) == MLX5_CQE_RESP_ERR);
static_assert(static_cast<int>(rdma::CompletionOpcode::kInvalid) == MLX5_CQE_INVALID);
#define SAME_SYNDROME(ours, theirs) static_assert(static_cast<int>(rdma::Syndrome::ours) == MLX5_CQE_SYNDROME_##theirs)
SAME_SYNDROME(kLocalLength, LOCAL_LENGTH_ERR);
SAME_SYNDROME(kLocalOperation, LOCAL_QP_OP_ERR);
SAME_SYNDROME(kLocalProtection, LOCAL_PROT_ERR);
SAME_SYNDROME(kFlushed, WR_FLUSH_ERR);
SAME_SYNDROME(kWindowBind, MW_BIND_ERR);
SAME_SYNDROME(kBadResponse, BAD_RESP_ERR);
SAME_SYNDROME(kLocalAccess, LOCAL_ACCESS_ERR);
SAME_SYNDROME(kRemoteInvalidRequest, REMOTE_INVAL_REQ_ERR);
SAME_SYNDROME(kRemoteAccess, REMOTE_ACCESS_ERR);
SAME_SYNDROME(kRemoteOperation, REMOTE_OP_ERR);
SAME_SYNDROME(kRetriesExhausted, TRANSPORT_RETRY_EXC_ERR);
SAME_SYNDROME(kReceiverNotReady, RNR_RETRY_EXC_ERR);
SAME_SYNDROME(kRemoteAborted, REMOTE_ABORTED_ERR);

namespace {

// What the program draws for one case.
struct Case {
    uint32_t queue_pair;
    uint64_t index;
    bool is_signalled;
    rdma::Location local, remote;
    uint32_t num_bytes;
    uint64_t value;
    uint8_t data[rdma::kMaxInlineBytes];
};

uint32_t host_key(rdma::Be32 key) { return be32toh(key.bits); }

// The same request by rdma-core's structures. Returns its size in bytes.
size_t head(uint8_t* block, const Case& c, uint8_t opcode, uint8_t num_octowords) {
    auto* control = reinterpret_cast<mlx5_wqe_ctrl_seg*>(block);
    mlx5dv_set_ctrl_seg(control, static_cast<uint16_t>(c.index), opcode, 0, c.queue_pair, c.is_signalled ? MLX5_WQE_CTRL_CQ_UPDATE : 0,
                        num_octowords, 0, 0);
    mlx5_wqe_raddr_seg remote = {htobe64(c.remote.address), htobe32(host_key(c.remote.key)), 0};
    memcpy(block + sizeof(*control), &remote, sizeof(remote));
    return num_octowords * 16u;
}
size_t expected_write(uint8_t* block, const Case& c) {
    const size_t size = head(block, c, MLX5_OPCODE_RDMA_WRITE, 3);
    mlx5dv_set_data_seg(reinterpret_cast<mlx5_wqe_data_seg*>(block + 32), c.num_bytes, host_key(c.local.key), c.local.address);
    return size;
}
size_t expected_inline(uint8_t* block, const Case& c, const void* data, uint32_t num_bytes) {
    const size_t size = head(block, c, MLX5_OPCODE_RDMA_WRITE, static_cast<uint8_t>(2 + (4 + num_bytes + 15) / 16));
    mlx5_wqe_inl_data_seg length = {htobe32(num_bytes | MLX5_INLINE_SEG)};
    memcpy(block + 32, &length, sizeof(length));
    memcpy(block + 36, data, num_bytes);
    return size;
}
size_t expected_atomic(uint8_t* block, const Case& c) {
    const size_t size = head(block, c, MLX5_OPCODE_ATOMIC_FA, 4);
    mlx5_wqe_atomic_seg atomic = {htobe64(c.value), 0};
    memcpy(block + 32, &atomic, sizeof(atomic));
    mlx5dv_set_data_seg(reinterpret_cast<mlx5_wqe_data_seg*>(block + 48), 8, host_key(c.local.key), c.local.address);
    return size;
}

// Our request into a block of 0xaa: its own bytes as expected, those behind it untouched.
template <class Expect, class Write>
void compare(const char* what, Expect expect, Write write) {
    alignas(64) uint8_t expected[64] = {};
    rdma::WqeBlock ours;
    memset(&ours, 0xaa, sizeof(ours));
    const size_t size = expect(expected);
    memset(expected + size, 0xaa, sizeof(expected) - size);
    write(&ours);
    for (size_t i = 0; i < sizeof(expected); ++i) {
        const auto byte = reinterpret_cast<const uint8_t*>(&ours)[i];
        CHECK(byte == expected[i], "%s: byte %zu is %02x, rdma-core has %02x", what, i, byte, expected[i]);
    }
}

void check_requests(rdma::Random& random, uint64_t index) {
    Case c;
    c.queue_pair = static_cast<uint32_t>(random.next()) & 0xffffff;
    c.index = index;
    c.is_signalled = random.below(2) != 0;
    c.local = {random.next(), rdma::Be32::of(static_cast<uint32_t>(random.next()))};
    c.remote = {random.next(), rdma::Be32::of(static_cast<uint32_t>(random.next()))};
    c.num_bytes = 1 + random.below(rdma::kMaxWriteBytes);
    c.value = random.next();
    for (uint8_t& byte : c.data) byte = static_cast<uint8_t>(random.next());
    const uint32_t num_inline = 1 + random.below(rdma::kMaxInlineBytes);
    const rdma::WqePlace place = {c.queue_pair, c.index, c.is_signalled};
    compare(
        "write", [&](uint8_t* block) { return expected_write(block, c); },
        [&](rdma::WqeBlock* slot) { rdma::write_rdma_write(slot, place, c.local, c.remote, c.num_bytes); });
    compare(
        "inline write", [&](uint8_t* block) { return expected_inline(block, c, c.data, num_inline); },
        [&](rdma::WqeBlock* slot) { rdma::write_inline(slot, place, c.remote, c.data, num_inline); });
    compare(
        "inline word", [&](uint8_t* block) { return expected_inline(block, c, &c.value, 8); },
        [&](rdma::WqeBlock* slot) { rdma::write_inline_word(slot, place, c.remote, c.value); });
    compare(
        "atomic", [&](uint8_t* block) { return expected_atomic(block, c); },
        [&](rdma::WqeBlock* slot) { rdma::write_atomic_add(slot, place, c.local, c.remote, c.value); });

    const uint32_t record = rdma::doorbell_record(index).bits;
    CHECK(record == htobe32(static_cast<uint16_t>(index)), "doorbell record is %08x", record);
    mlx5_wqe_ctrl_seg control;
    mlx5dv_set_ctrl_seg(&control, static_cast<uint16_t>(index), 0, 0, c.queue_pair, 0, 0, 0, 0);
    const uint64_t doorbell = rdma::doorbell_word(c.queue_pair, index);
    CHECK(memcmp(&doorbell, &control, 8) == 0, "doorbell is %016llx", static_cast<unsigned long long>(doorbell));
}

// rdma-core's view of a completion that the software NIC wrote, and our view of one that rdma-core's structures describe.
void check_completions() {
    alignas(64) static uint8_t memory[rdma::QueueMemory{4}.depth * 64 + 192];
    rdma::QueuePairState state;
    rdma::SoftwareNic<> nic;
    const rdma::QueuePair pair = nic.create_queue_pair(0, 4, memory, &state, 0x1fffe);
    alignas(8) uint64_t target = 0;
    const rdma::Be32 key = nic.register_memory(0, 0x1000, reinterpret_cast<uint8_t*>(&target), 8);
    auto no_wait = [] { return rdma::WaitVerdict::kTimeout; };
    auto post = [&](rdma::Be32 remote_key) {
        uint64_t begin = 0;
        CHECK(rdma::reserve(pair, 1, no_wait, &begin).ok(), "reserve");
        rdma::write_inline_word(pair.slot(begin), pair.place(begin, true), {0x1000, remote_key}, begin);
        CHECK(rdma::submit(pair, begin, 1, no_wait).ok(), "submit");
        nic.step();
    };
    auto* theirs = reinterpret_cast<mlx5_cqe64*>(const_cast<rdma::CompletionEntry*>(pair.completion));
    CHECK(mlx5dv_get_cqe_opcode(theirs) == MLX5_CQE_INVALID, "fresh entry has opcode %d", mlx5dv_get_cqe_opcode(theirs));
    post(key);
    CHECK(mlx5dv_get_cqe_opcode(theirs) == MLX5_CQE_REQ && be16toh(theirs->wqe_counter) == 0xfffe, "first completion");
    CHECK(be32toh(theirs->sop_drop_qpn) == (static_cast<uint32_t>(MLX5_OPCODE_RDMA_WRITE) << 24 | pair.number), "opcode and queue pair");
    post(rdma::Be32::of(key.value() + 1));
    auto* error = reinterpret_cast<mlx5_err_cqe*>(theirs);
    CHECK(error->op_own >> 4 == MLX5_CQE_REQ_ERR && be16toh(error->wqe_counter) == 0xffff, "error completion");
    CHECK(error->syndrome == MLX5_CQE_SYNDROME_REMOTE_ACCESS_ERR, "syndrome is %02x", error->syndrome);
    error->vendor_err_synd = 0x88;
    const rdma::QueueStatus status = rdma::poll(pair);
    CHECK(status.outcome == rdma::Outcome::kCompletionError && status.syndrome == rdma::Syndrome::kRemoteAccess &&
              status.vendor_syndrome == 0x88 && status.request == 0xffff && status.queue_pair == pair.number,
          "%s", rdma::describe(status).c_str());
}

}  // namespace

int main() {
    rdma::Random random(1);
    for (uint64_t index = 0; index < 70000; ++index) check_requests(random, index);  // through the wrap of 16 bits
    for (int i = 0; i < 1000; ++i) check_requests(random, random.next() >> 8);
    check_completions();
    std::printf("ok\n");
}
