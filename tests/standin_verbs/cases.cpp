// cases CASE [GPU]: one case, in two processes. With a second argument the memory is that of the GPU that fake_cuda.cpp plays.
#include "cases.hpp"

#include <fcntl.h>
#include <sys/socket.h>
#include <sys/wait.h>
#include <unistd.h>

#include <algorithm>
#include <atomic>
#include <cerrno>
#include <chrono>
#include <cstring>
#include <functional>
#include <random>
#include <string>
#include <thread>

// --- cases ----------------------------------------------------------------------------------------------------------

namespace {

constexpr size_t kFar = 2 << 20;  // the half that others write
constexpr uint32_t kSizes[] = {0, 1, 8, 255, 256, 257, 4096, 128 << 10, (128 << 10) + 1, (1 << 20) + 3};

void writes_arrive(Side& side) {
    ibv_qp* const pair = side.connected();
    for (uint32_t size : kSizes) {
        std::memset(side.memory + kFar, 0xee, size + 1);
        side.fill(0, size, size + side.which);
        side.meet();
        CHECK(side.post(pair, IBV_WR_RDMA_WRITE, size, 0, size, kFar) == 0, "refused");
        side.expect(size);
        side.meet();
        CHECK(side.is_filled(kFar, size, size + 1 - side.which), "%u bytes are wrong", size);
        CHECK(side.memory[kFar + size] == 0xee, "%u bytes and one more", size);
    }
}

void requests_may_come_as_a_list(Side& side) {
    constexpr uint64_t kRequests = 100;
    ibv_qp* const pair = side.connected(kRequests);
    for (uint64_t round = 0; round < 50; ++round) {
        ibv_sge parts[kRequests];
        ibv_send_wr requests[kRequests] = {}, *bad = nullptr;
        for (uint64_t i = 0; i < kRequests; ++i) {
            side.word(i * 8) = round << 32 | i;
            parts[i] = {reinterpret_cast<uint64_t>(side.memory) + i * 8, 8, side.local_key};
            requests[i].next = i + 1 < kRequests ? &requests[i + 1] : nullptr;
            requests[i].wr_id = i, requests[i].sg_list = &parts[i], requests[i].num_sge = 1;
            requests[i].opcode = IBV_WR_RDMA_WRITE, requests[i].send_flags = i + 1 < kRequests ? 0 : IBV_SEND_SIGNALED;
            requests[i].wr.rdma.remote_addr = side.remote.address + kFar + i * 8, requests[i].wr.rdma.rkey = side.remote_key;
        }
        CHECK(ibv_post_send(pair, requests, &bad) == 0, "request %lu is refused", bad->wr_id);
        side.expect(kRequests - 1);
        side.meet();
        for (uint64_t i = 0; i < kRequests; ++i) CHECK(side.load(kFar + i * 8) == (round << 32 | i), "round %lu, word %lu", round, i);
        side.meet();
    }
}

void reads_bring_bytes(Side& side) {
    ibv_qp* const pair = side.connected();
    for (uint32_t size : kSizes) {
        std::memset(side.memory, 0xee, size + 1);
        side.fill(kFar, size, size + side.which);
        side.meet();
        CHECK(side.post(pair, IBV_WR_RDMA_READ, size, 0, size, kFar) == 0, "refused");
        side.expect(size);
        CHECK(side.is_filled(0, size, size + 1 - side.which), "%u bytes are wrong", size);
        CHECK(side.memory[size] == 0xee, "%u bytes and one more", size);
        side.meet();
    }
}

void inline_data_are_taken_at_once(Side& side) {
    if (is_on_gpu) return;  // inline data are the host's
    ibv_qp* const pair = side.connected();
    for (uint32_t size : {0u, 1u, 8u, 128u}) {
        side.fill(0, size, size + side.which);
        CHECK(side.post(pair, IBV_WR_RDMA_WRITE, size, 0, size, kFar, IBV_SEND_SIGNALED | IBV_SEND_INLINE) == 0, "refused");
        std::memset(side.memory, 0, size);
        side.expect(size);
        side.meet();
        CHECK(side.is_filled(kFar, size, size + 1 - side.which), "%u bytes are wrong", size);
        side.meet();
    }
    CHECK(side.post(pair, IBV_WR_RDMA_WRITE, 0, 0, 4096, kFar, IBV_SEND_INLINE) == EINVAL, "too long to be inline");
    CHECK(side.post(pair, IBV_WR_RDMA_READ, 0, 0, 8, kFar, IBV_SEND_INLINE) == EINVAL, "reads are not inline");
}

void atomics_add_and_swap(Side& side) {
    ibv_qp* const pair = side.connected();
    constexpr uint64_t kTimes = 500;
    // Both add to one word of side 0: side 0 by a connection to itself.
    ibv_qp* const own = side.make_pair(64);
    side.connect(own, own->qp_num);
    const Card theirs = side.remote;
    ibv_qp* const adder = side.which == 0 ? own : pair;
    if (side.which == 0) side.remote.address = reinterpret_cast<uint64_t>(side.memory), side.remote_key = side.region->rkey;
    uint64_t last = 0;
    for (uint64_t i = 0; i < kTimes; ++i) {
        CHECK(side.post_atomic(adder, IBV_WR_ATOMIC_FETCH_AND_ADD, i, 64, kFar, i % 2 ? 3 : uint64_t(-1)) == 0, "refused");
        side.expect(i);
        last = side.word(64);
    }
    side.meet();
    if (side.which == 0) CHECK(side.load(kFar) == kTimes * 2, "the sum is %lu", side.load(kFar));
    CHECK(last <= kTimes * 2 + 3 || last >= uint64_t(-2), "brought back %lu", last);
    side.meet();
    side.remote = theirs, side.remote_key = theirs.key;
    side.word(kFar + 64) = 7;
    side.meet();
    CHECK(side.post_atomic(pair, IBV_WR_ATOMIC_CMP_AND_SWP, 1, 64, kFar + 64, 6, 100) == 0, "refused");
    side.expect(1);
    CHECK(side.word(64) == 7, "compared with %lu", side.word(64));
    side.meet();
    CHECK(side.load(kFar + 64) == 7, "swapped against the comparison");
    side.meet();
    CHECK(side.post_atomic(pair, IBV_WR_ATOMIC_CMP_AND_SWP, 2, 64, kFar + 64, 7, 100) == 0, "refused");
    side.expect(2);
    CHECK(side.word(64) == 7, "compared with %lu", side.word(64));
    side.meet();
    CHECK(side.load(kFar + 64) == 100, "not swapped");
    side.meet();
    CHECK(ibv_destroy_qp(own) == 0, "the pair stays");
}

void sends_meet_receives(Side& side) {
    ibv_qp* const pair = side.connected();
    for (uint32_t size : kSizes) {
        side.fill(0, size, size + side.which);
        // Sent before there is anywhere to put it.
        side.immediate = size + 5;
        CHECK(side.post(pair, size % 2 ? IBV_WR_SEND_WITH_IMM : IBV_WR_SEND, size, 0, size, 0) == 0, "refused");
        std::this_thread::sleep_for(std::chrono::milliseconds(5));
        side.post_receive(1000 + size, kFar, size + 10);
        const ibv_wc completion = side.wait(side.received);
        CHECK(completion.wr_id == 1000 + size && completion.status == IBV_WC_SUCCESS && completion.opcode == IBV_WC_RECV,
              "receive %lu, status %d, opcode %d", completion.wr_id, completion.status, completion.opcode);
        CHECK(completion.byte_len == size && completion.qp_num == pair->qp_num, "%u bytes on %u", completion.byte_len, completion.qp_num);
        CHECK((completion.wc_flags & IBV_WC_WITH_IMM) == (size % 2 ? unsigned(IBV_WC_WITH_IMM) : 0u), "flags %x", completion.wc_flags);
        if (size % 2) CHECK(completion.imm_data == size + 5, "immediate %u", completion.imm_data);
        CHECK(side.is_filled(kFar, size, size + 1 - side.which), "%u bytes are wrong", size);
        side.expect(size);
        side.meet();
    }
    // An immediate value behind a write, as the answers of atomics are sent.
    side.fill(0, 300000, side.which);
    side.immediate = 77;
    side.post_receive(1, 0, 0);
    side.meet();
    CHECK(side.post(pair, IBV_WR_RDMA_WRITE_WITH_IMM, 2, 0, 300000, kFar) == 0, "refused");
    const ibv_wc completion = side.wait(side.received);
    CHECK(completion.wr_id == 1 && completion.opcode == IBV_WC_RECV_RDMA_WITH_IMM && completion.imm_data == 77, "opcode %d",
          completion.opcode);
    CHECK(side.is_filled(kFar, 300000, 1 - side.which), "the bytes come after their immediate value");
    side.expect(2);
    side.meet();
}

void a_send_may_give_up_on_receives(Side& side) {
    ibv_qp* const pair = side.connected(64, 1);
    if (side.which == 0) {
        CHECK(side.post(pair, IBV_WR_SEND, 9, 0, 8, 0) == 0, "refused");
        side.expect(9, IBV_WC_RNR_RETRY_EXC_ERR);
    }
    side.meet();
}

void a_send_does_not_overrun_a_receive(Side& side) {
    ibv_qp* const pair = side.connected();
    if (side.which == 1) side.post_receive(1, kFar, 10);
    side.meet();
    if (side.which == 0) {
        CHECK(side.post(pair, IBV_WR_SEND, 9, 0, 11, 0) == 0, "refused");
        side.expect(9, IBV_WC_REM_INV_REQ_ERR);
    } else {
        CHECK(side.wait(side.received).status == IBV_WC_LOC_LEN_ERR, "received");
        CHECK(side.word(kFar) == 0, "overrun");
    }
    side.meet();
}

// Rounds of data and, behind them, their flag, on the same pair; nothing is waited for between.
void flags_come_behind_their_data(Side& side) {
    ibv_qp* const pair = side.connected(512);
    constexpr uint64_t kRounds = 300;
    constexpr uint32_t kBytes = 6000;
    constexpr size_t kFlag = kFar + (1 << 20), kFlags = 1 << 20;
    if (side.which == 0) {
        for (uint64_t round = 1; round <= kRounds; ++round) {
            // One place per round: what is sent may be read until it is complete.
            const size_t place = (round % 64) * 8192;
            if (round > 64) side.expect(round - 64);
            side.fill(place, kBytes, static_cast<uint32_t>(round));
            side.word(kFlags + round % 64 * 8) = round;
            CHECK(side.post(pair, IBV_WR_RDMA_WRITE, 0, place, kBytes, kFar + place, 0) == 0, "refused");
            if (round % 3 == 0)
                CHECK(side.post_atomic(pair, IBV_WR_ATOMIC_FETCH_AND_ADD, round, (1 << 20) + 4096, kFlag, 1) == 0, "refused");
            else
                CHECK(side.post(pair, IBV_WR_RDMA_WRITE, round, kFlags + round % 64 * 8, 8, kFlag) == 0, "refused");
        }
        for (uint64_t round = kRounds - 63; round <= kRounds; ++round) side.expect(round);
    } else {
        uint64_t seen = 0;
        while (seen < kRounds) {
            const uint64_t round = side.load(kFlag);
            CHECK(round >= seen && round <= kRounds, "flag %lu after %lu", round, seen);
            // Only the latest is sure not to be written again meanwhile: look again if it moved on.
            if (round != seen) {
                const bool is_right = side.is_filled(kFar + (round % 64) * 8192, kBytes, static_cast<uint32_t>(round));
                CHECK(is_right || side.load(kFlag) >= round + 63, "round %lu: the flag came before its data", round);
            }
            seen = round;
        }
    }
    side.meet();
}

void queues_wrap(Side& side) {
    ibv_qp* const pair = side.connected(8);
    constexpr uint64_t kTimes = 30000;
    uint64_t posted = 0, completed = 0, refused = 0;
    while (completed < kTimes) {
        if (posted < kTimes) {
            side.word(posted % 8 * 8) = posted;
            const int status = side.post(pair, IBV_WR_RDMA_WRITE, posted, posted % 8 * 8, 8, kFar + posted % 512 * 8);
            CHECK(status == 0 || status == ENOMEM, "status %d", status);
            posted += status == 0, refused += status != 0;
            if (status == 0 && posted - completed < 8) continue;
        }
        side.expect(completed++);
    }
    side.meet();
    for (uint64_t i = kTimes - 512; i < kTimes; ++i) CHECK(side.load(kFar + i % 512 * 8) == i, "word %lu", i);
    // More than the queue holds at once.
    std::this_thread::sleep_for(std::chrono::milliseconds(1));
    uint64_t held = 0;
    while (side.post(pair, IBV_WR_RDMA_WRITE, held, 0, 1 << 20, kFar) == 0) CHECK(++held < 1000, "endless");
    CHECK(held >= 8, "a queue of 8 holds %lu", held);
    for (uint64_t i = 0; i < held; ++i) side.expect(i);
    side.meet();
}

void completions_are_in_order_and_on_request(Side& side) {
    ibv_qp* const pair = side.connected(256);
    for (uint64_t i = 0; i < 200; ++i) {
        const unsigned flags = i % 5 == 4 ? IBV_SEND_SIGNALED : 0;
        const bool is_read = i % 3 == 1;
        CHECK(side.post(pair, is_read ? IBV_WR_RDMA_READ : IBV_WR_RDMA_WRITE, i, is_read ? 400000 : 0, i % 2 ? 200000 : 8,
                        is_read ? kFar + 400000 : kFar, flags) == 0,
              "refused");
    }
    for (uint64_t i = 4; i < 200; i += 5) side.expect(i);
    ibv_wc completion;
    CHECK(ibv_poll_cq(side.sent, 1, &completion) == 0, "more completions than were asked for");
    side.meet();
}

// What a read brings is sent back by the next request, which may not start before it is there.
void a_fence_waits_for_reads(Side& side) {
    ibv_qp* const pair = side.connected();
    constexpr uint32_t kBytes = 400000;
    for (uint32_t round = 0; round < 20; ++round) {
        side.fill(kFar, kBytes, 2 * round + static_cast<uint32_t>(side.which));
        side.meet();
        CHECK(side.post(pair, IBV_WR_RDMA_READ, 1, 0, kBytes, kFar, 0) == 0, "refused");
        CHECK(side.post(pair, IBV_WR_RDMA_WRITE, 2, 0, kBytes, kFar + kBytes, IBV_SEND_SIGNALED | IBV_SEND_FENCE) == 0, "refused");
        side.expect(2);
        side.meet();
        CHECK(side.is_filled(kFar + kBytes, kBytes, 2 * round + static_cast<uint32_t>(side.which)), "round %u", round);
        side.meet();
    }
}

void scattered_memory_is_gathered(Side& side) {
    ibv_qp* const pair = side.connected();
    side.fill(0, 400000, side.which);
    side.meet();
    const auto base = reinterpret_cast<uint64_t>(side.memory);
    ibv_sge parts[3] = {{base + 300000, 100000, side.local_key}, {base, 7, side.local_key}, {base + 1000, 200000, side.local_key}};
    ibv_send_wr request{}, *bad = nullptr;
    request.sg_list = parts, request.num_sge = 3, request.opcode = IBV_WR_RDMA_WRITE, request.send_flags = IBV_SEND_SIGNALED;
    request.wr.rdma.remote_addr = side.remote.address + kFar, request.wr.rdma.rkey = side.remote_key;
    CHECK(ibv_post_send(pair, &request, &bad) == 0, "refused");
    side.expect(0);
    side.meet();
    std::vector<uint8_t> own(400000);
    side.fill(0, 400000, 1 - side.which);  // what the other side had
    std::memcpy(own.data(), side.memory, own.size());
    CHECK(std::memcmp(side.memory + kFar, own.data() + 300000, 100000) == 0, "first part");
    CHECK(std::memcmp(side.memory + kFar + 100000, own.data(), 7) == 0, "second part");
    CHECK(std::memcmp(side.memory + kFar + 100007, own.data() + 1000, 200000) == 0, "third part");
    side.meet();
}

// A connection to oneself; NVSHMEM reads a word onto itself there, to order what it received.
void a_read_onto_itself_changes_nothing(Side& side) {
    ibv_qp* const own = side.make_pair(64);
    side.connect(own, own->qp_num);
    side.remote.address = reinterpret_cast<uint64_t>(side.memory), side.remote_key = side.region->rkey;
    std::atomic<bool> has_read = false;
    std::thread counter([&] {
        for (uint64_t i = 1; !has_read; ++i) {
            const uint64_t before = __atomic_exchange_n(&side.word(0), i, __ATOMIC_ACQ_REL);
            CHECK(before == i - 1, "%lu came back after %lu", before, i);
        }
    });
    for (uint64_t i = 0; i < 500; ++i) {
        CHECK(side.post(own, IBV_WR_RDMA_READ, i, 0, 8, 0) == 0, "refused");
        side.expect(i);
    }
    has_read = true;
    counter.join();
    side.fill(0, 300000, 5);
    CHECK(side.post(own, IBV_WR_RDMA_WRITE, 1, 0, 300000, kFar) == 0, "refused");
    side.expect(1);
    CHECK(side.is_filled(kFar, 300000, 5), "bytes to oneself");
    CHECK(ibv_destroy_qp(own) == 0, "the pair stays");
}

// Each kind of request that the remote side must refuse: error, then flushes, and its memory is as it was.
void bad_requests_fail_and_flush(Side& side) {
    const struct {
        const char* what;
        std::function<int(Side&, ibv_qp*)> post;
        ibv_wc_status status;
    } kinds[] = {
        {"a key that nobody has",
         [](Side& s, ibv_qp* p) { return s.remote_key ^= 0x100, s.post(p, IBV_WR_RDMA_WRITE, 1, 0, 8, kFar); }, IBV_WC_REM_ACCESS_ERR},
        {"a key of the wrong process",
         [](Side& s, ibv_qp* p) { return s.remote_key = s.region->rkey, s.post(p, IBV_WR_RDMA_WRITE, 1, 0, 8, kFar); },
         IBV_WC_REM_ACCESS_ERR},
        {"bytes past the end", [](Side& s, ibv_qp* p) { return s.post(p, IBV_WR_RDMA_WRITE, 1, 0, 16, Side::kBytes - 8); },
         IBV_WC_REM_ACCESS_ERR},
        {"bytes before the start", [](Side& s, ibv_qp* p) { return s.post(p, IBV_WR_RDMA_READ, 1, 0, 16, size_t(0) - 8); },
         IBV_WC_REM_ACCESS_ERR},
        {"a write where one may read",
         [](Side& s, ibv_qp* p) { return s.remote_key = s.remote.read_only_key, s.post(p, IBV_WR_RDMA_WRITE, 1, 0, 8, kFar); },
         IBV_WC_REM_ACCESS_ERR},
        {"an atomic where one may read",
         [](Side& s, ibv_qp* p) {
             return s.remote_key = s.remote.read_only_key, s.post_atomic(p, IBV_WR_ATOMIC_FETCH_AND_ADD, 1, 0, kFar, 1);
         },
         IBV_WC_REM_ACCESS_ERR},
        {"an atomic that is not aligned",
         [](Side& s, ibv_qp* p) { return s.post_atomic(p, IBV_WR_ATOMIC_FETCH_AND_ADD, 1, 0, kFar + 4, 1); }, IBV_WC_REM_INV_REQ_ERR},
        {"a local key that nobody has",
         [](Side& s, ibv_qp* p) { return s.local_key ^= 0x100, s.post(p, IBV_WR_RDMA_WRITE, 1, 0, 8, kFar); }, IBV_WC_LOC_PROT_ERR},
        {"a read into memory that is read only",
         [](Side& s, ibv_qp* p) { return s.local_key = s.read_only->lkey, s.post(p, IBV_WR_RDMA_READ, 1, 0, 8, kFar); },
         IBV_WC_LOC_PROT_ERR},
    };
    for (const auto& kind : kinds) {
        ibv_qp* const pair = side.connected();
        if (side.which == 0) {
            side.word(0) = 1;
            CHECK(side.post(pair, IBV_WR_RDMA_WRITE, 0, 0, 8, kFar + 8) == 0, "refused");
            CHECK(kind.post(side, pair) == 0, "%s is refused", kind.what);
            side.remote_key = side.remote.key, side.local_key = side.region->lkey;
            CHECK(side.post(pair, IBV_WR_RDMA_WRITE, 2, 0, 8, kFar) == 0, "refused");
            side.expect(0);
            const ibv_wc completion = side.wait(side.sent);
            CHECK(completion.wr_id == 1 && completion.status == kind.status, "%s: request %lu ends with %d", kind.what,
                  completion.wr_id, completion.status);
            side.expect(2, IBV_WC_WR_FLUSH_ERR);
            CHECK(side.post(pair, IBV_WR_RDMA_WRITE, 3, 0, 8, kFar) == 0, "a pair in error takes requests");
            side.expect(3, IBV_WC_WR_FLUSH_ERR);
            CHECK(pair->state == IBV_QPS_ERR, "state %d", pair->state);
        }
        side.meet();
        CHECK(side.load(kFar) == 0, "%s has written", kind.what);
        side.meet();
    }
}

void deregistered_memory_is_out_of_reach(Side& side) {
    ibv_qp* const pair = side.connected();
    uint8_t* const memory = new_memory(4096);
    ibv_mr* const region = ibv_reg_mr(side.pd, memory, 4096, Side::kAllRights);
    const Card card = side.exchange(Card{0, region->rkey, 0, reinterpret_cast<uint64_t>(memory)});
    side.remote = card, side.remote_key = card.key;
    CHECK(side.post(pair, IBV_WR_RDMA_WRITE, 1, 0, 8, 0) == 0, "refused");
    side.expect(1);
    side.meet();
    CHECK(ibv_dereg_mr(region) == 0, "stays");
    side.meet();
    if (side.which == 0) {
        CHECK(side.post(pair, IBV_WR_RDMA_WRITE, 2, 0, 8, 0) == 0, "refused");
        side.expect(2, IBV_WC_REM_ACCESS_ERR);
    }
    side.meet();
}

// A region may have other addresses for the other side than here; and a GPU's memory may come as a file.
void regions_have_their_own_addresses(Side& side) {
    ibv_qp* const pair = side.connected();
    ibv_mr* const elsewhere = ibv_reg_mr_iova(side.pd, side.memory + kFar, 4096, 0x10000, Side::kAllRights);
    const int file = open("/dev/null", O_RDONLY);
    ibv_mr* const as_file =
        ibv_reg_dmabuf_mr(side.pd, 0, 4096, reinterpret_cast<uint64_t>(side.memory) + kFar + 8192, file, Side::kAllRights);
    CHECK(elsewhere != nullptr && as_file != nullptr, "no region");
    const Card first = side.exchange(Card{0, elsewhere->rkey, 0, 0x10000});
    const Card second = side.exchange(Card{0, as_file->rkey, 0, reinterpret_cast<uint64_t>(side.memory) + kFar + 8192});
    side.fill(0, 4096, side.which);
    for (const Card& card : {first, second}) {
        side.remote = card, side.remote_key = card.key;
        CHECK(side.post(pair, IBV_WR_RDMA_WRITE, 1, 0, 4096, 0) == 0, "refused");
        side.expect(1);
    }
    side.meet();
    CHECK(side.is_filled(kFar, 4096, 1 - side.which) && side.is_filled(kFar + 8192, 4096, 1 - side.which), "bytes are elsewhere");
    CHECK(ibv_dereg_mr(elsewhere) == 0 && ibv_dereg_mr(as_file) == 0, "stay");
    ::close(file);
    side.meet();
}

// Many pairs both ways, each with its own part of memory: what arrived is what a model says.
void pairs_do_not_mix(Side& side) {
    constexpr int kPairs = 24;
    constexpr size_t kPart = 65536;
    std::vector<ibv_qp*> pairs;
    for (int i = 0; i < kPairs; ++i) pairs.push_back(side.connected(64));
    std::mt19937 random(static_cast<unsigned>(7 + side.which));
    std::vector<std::vector<uint8_t>> model(kPairs, std::vector<uint8_t>(kPart));
    std::vector<int> outstanding(kPairs);
    side.fill(0, kFar, static_cast<uint32_t>(side.which));
    side.meet();
    const auto take = [&] {
        const ibv_wc completion = side.wait(side.sent);
        CHECK(completion.status == IBV_WC_SUCCESS, "status %d", completion.status);
        --outstanding[completion.wr_id];
    };
    for (int i = 0; i < 6000; ++i) {
        const int pair = static_cast<int>(random() % kPairs);
        while (outstanding[pair] >= 60) take();
        const auto size = static_cast<uint32_t>(random() % (i % 7 ? 300 : kPart)), from = static_cast<uint32_t>(random() % kPart);
        const auto to = static_cast<uint32_t>(random() % (kPart - size));
        std::memcpy(model[pair].data() + to, side.memory + from, size);
        CHECK(side.post(pairs[pair], IBV_WR_RDMA_WRITE, static_cast<uint64_t>(pair), from, size, kFar + pair * kPart + to) == 0, "refused");
        ++outstanding[pair];
    }
    while (std::any_of(outstanding.begin(), outstanding.end(), [](int count) { return count > 0; })) take();
    side.meet();
    // Bring the other side's part here to compare it with what we meant to be there.
    for (int pair = 0; pair < kPairs; ++pair) {
        CHECK(side.post(pairs[pair], IBV_WR_RDMA_READ, 0, 0, kPart, kFar + pair * kPart) == 0, "refused");
        side.expect(0);
        CHECK(std::memcmp(side.memory, model[pair].data(), kPart) == 0, "pair %d", pair);
    }
    side.meet();
}

void pairs_come_and_go(Side& side) {
    ibv_qp* const pair = side.connected();
    for (uint64_t i = 0; i < 2500; ++i) {
        ibv_qp* const other = side.make_pair(4);
        if (i % 50 == 0) {
            const uint32_t number = side.exchange(other->qp_num);
            side.connect(other, number);
            side.meet();
            side.word(0) = i + 1;
            CHECK(side.post(other, IBV_WR_RDMA_WRITE, i, 0, 8, kFar) == 0, "refused");
            side.expect(i);
            side.meet();
            CHECK(side.load(kFar) == i + 1, "word %lu", side.load(kFar));
            side.meet();
        }
        CHECK(ibv_destroy_qp(other) == 0, "the pair stays");
    }
    side.meet();
    CHECK(side.post(pair, IBV_WR_RDMA_WRITE, 1, 0, 8, kFar) == 0, "refused");
    side.expect(1);
    side.meet();
}

void a_dead_peer_is_an_error(Side& side) {
    ibv_qp* const pair = side.connected();
    if (side.which == 1) std::_Exit(0);
    while (true) {
        std::this_thread::sleep_for(std::chrono::milliseconds(20));
        CHECK(side.post(pair, IBV_WR_RDMA_WRITE, 1, 0, 200000, kFar) == 0, "refused");
        const ibv_wc completion = side.wait(side.sent);
        if (completion.status == IBV_WC_SUCCESS) continue;  // not dead yet
        CHECK(completion.status == IBV_WC_RETRY_EXC_ERR, "status %d", completion.status);
        std::_Exit(0);
    }
}

struct Case {
    const char* name;
    void (*run)(Side&);
};
#define CASE(name) {#name, name}
constexpr Case kCases[] = {
    CASE(writes_arrive),
    CASE(requests_may_come_as_a_list),
    CASE(reads_bring_bytes),
    CASE(inline_data_are_taken_at_once),
    CASE(atomics_add_and_swap),
    CASE(sends_meet_receives),
    CASE(a_send_may_give_up_on_receives),
    CASE(a_send_does_not_overrun_a_receive),
    CASE(flags_come_behind_their_data),
    CASE(queues_wrap),
    CASE(completions_are_in_order_and_on_request),
    CASE(a_fence_waits_for_reads),
    CASE(scattered_memory_is_gathered),
    CASE(a_read_onto_itself_changes_nothing),
    CASE(bad_requests_fail_and_flush),
    CASE(deregistered_memory_is_out_of_reach),
    CASE(regions_have_their_own_addresses),
    CASE(pairs_do_not_mix),
    CASE(pairs_come_and_go),
    CASE(a_dead_peer_is_an_error),
};

}  // namespace

int main(int count, char** arguments) {
    CHECK(count >= 2, "which case?");
    is_on_gpu = count > 2;
    for (const Case& one : kCases) {
        if (std::string(arguments[1]) != one.name) continue;
        int sockets[2];
        CHECK(socketpair(AF_UNIX, SOCK_STREAM, 0, sockets) == 0, "no sockets");
        const pid_t child = fork();
        Side side(child == 0 ? 1 : 0, sockets[child == 0 ? 1 : 0]);
        close(sockets[child == 0 ? 0 : 1]);
        side.open();
        one.run(side);
        side.meet();
        side.close();
        if (child == 0) std::_Exit(0);
        int status = 0;
        CHECK(waitpid(child, &status, 0) == child && WIFEXITED(status) && WEXITSTATUS(status) == 0, "the other side: status %x", status);
        return 0;
    }
    std::fprintf(stderr, "no case %s\n", arguments[1]);
    return 2;
}
