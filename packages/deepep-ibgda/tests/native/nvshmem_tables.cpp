// NVSHMEM's device state, made up in host memory, and the tables that come of it. One argument: the case's name.
#include <cstring>
#include <map>
#include <string>
#include <vector>

#include "../../../deepep-core/tests/native/check.hpp"
#include "deepep/rdma/host_wait.hpp"
#include "deepep/rdma/software_nic.hpp"
#include "provider/nvshmem_tables.hpp"

namespace rdma = deepep::rdma;
using namespace deepep::ibgda;

namespace {

constexpr int kNumRanks = 3, kNumLanes = 3, kNumNics = 2, kLog2Chunk = 16, kNumChunks = 80;
constexpr int64_t kChunkBytes = 1 << kLog2Chunk;
constexpr uint64_t kHeap = 1ull << 40;
constexpr uint32_t kDepth = 8;
constexpr uint64_t kNumPosted = 65530;  // six requests before the wrap

// Key of a chunk at a rank as its NIC sees it; rank kNumRanks: this rank's own.
uint32_t key_of(int64_t chunk, int rank, int nic) { return static_cast<uint32_t>((chunk * 16 + rank) * 16 + nic); }

// Rank 0 of three; rank 2 is remote, two of its three queue pairs are asked for.
struct Sample {
    IbgdaState ibgda = {};
    NvshmemState state = {};
    NvshmemRequest request = {0, kNumRanks, {false, false, true}, 2, kHeap + 10 * kChunkBytes + 4096, 60 * kChunkBytes};
    std::vector<IbgdaQueuePair> pairs{kNumRanks * kNumLanes * kNumNics};
    std::vector<IbgdaCompletionQueue> queues{pairs.size()};
    std::vector<IbgdaKey> local_keys, remote_keys;
    std::vector<void*> bases;
    alignas(64) uint8_t memory[rdma::kWqeBlockBytes * kDepth + 192] = {};

    Sample() {
        nvshmemi_init_ibgda_device_state(ibgda);
        state.version = (1 << 16) + sizeof(NvshmemState);
        state.mype = 0;
        state.npes = kNumRanks;
        state.heap_base = reinterpret_cast<void*>(kHeap);
        state.heap_size = kNumChunks * kChunkBytes;
        state.ibgda_is_initialized = true;
        ibgda.num_rc_per_pe = kNumLanes;
        ibgda.num_devices_initialized = kNumNics;
        ibgda.log2_cumem_granularity = kLog2Chunk;
        ibgda.use_async_postsend = false;
        for (int64_t chunk = 0; chunk < kNumChunks; ++chunk)
            for (int nic = 0; nic < kNumNics; ++nic) local_keys.push_back({key_of(chunk, kNumRanks, nic), 0});
        for (int64_t chunk = 0; chunk < kNumChunks; ++chunk)
            for (int rank = 0; rank < kNumRanks; ++rank)
                for (int nic = 0; nic < kNumNics; ++nic) remote_keys.push_back({key_of(chunk, rank, nic), 0});
        memcpy(ibgda.constmem.lkeys, local_keys.data(), sizeof(ibgda.constmem.lkeys));
        memcpy(ibgda.constmem.rkeys, remote_keys.data(), sizeof(ibgda.constmem.rkeys));
        ibgda.globalmem.lkeys = local_keys.data() + NVSHMEMI_IBGDA_MAX_CONST_LKEYS;
        ibgda.globalmem.rkeys = remote_keys.data() + NVSHMEMI_IBGDA_MAX_CONST_RKEYS;
        for (int rank = 0; rank < kNumRanks; ++rank) bases.push_back(reinterpret_cast<void*>((rank + 2ull) << 40));
        state.peer_heap_base_remote = bases.data();
        const rdma::QueueMemory layout{kDepth};
        for (size_t i = 0; i < pairs.size(); ++i) {
            IbgdaQueuePair& pair = pairs[i];
            nvshmemi_init_ibgda_device_qp(pair);
            nvshmemi_init_ibgda_device_cq(queues[i]);
            pair.qp_type = NVSHMEMI_IBGDA_DEVICE_QP_TYPE_RC;
            pair.qpn = queues[i].qpn = 0x100 + static_cast<uint32_t>(i);
            pair.dev_idx = i % kNumNics;
            pair.tx_wq.nwqes = kDepth;
            pair.tx_wq.wqe = layout.requests(memory);
            pair.tx_wq.dbrec = layout.record(memory);
            pair.tx_wq.bf = layout.doorbell(memory);
            pair.tx_wq.cq = &queues[i];
            queues[i].cqe = layout.completion(memory);
            auto& counters = pair.mvars.tx_wq;
            counters.resv_head = counters.ready_head = counters.prod_idx = counters.cons_idx = kNumPosted + i;
        }
        ibgda.globalmem.rcs = pairs.data();
    }
    static size_t index_of(int rank, int lane) { return (static_cast<size_t>(rank) * kNumLanes + lane) * kNumNics; }

    NvshmemTables read() const {
        return read_nvshmem_tables(ibgda, state, request, [](void* destination, const void* source, size_t num_bytes) {
            memcpy(destination, source, num_bytes);
        });
    }
};

void tables_say_what_the_state_says() {
    const Sample sample;
    const NvshmemTables tables = sample.read();
    CHECK(tables.pairs.size() == kNumRanks * 2, "%zu pairs", tables.pairs.size());
    for (int i = 0; i < 4; ++i) CHECK(tables.pairs[i].pair.depth == 0, "ranks of this node have no queue pairs");
    for (int lane = 0; lane < 2; ++lane) {
        const AdoptedPair& adopted = tables.pairs[4 + lane];
        const size_t index = Sample::index_of(2, lane);
        CHECK(adopted.pair.number == 0x100 + index && adopted.pair.peer == 2 && adopted.pair.depth == kDepth, "lane %d", lane);
        CHECK(adopted.next_request == kNumPosted + index, "requests go on where they are");
        CHECK(adopted.counters == reinterpret_cast<uint64_t>(&sample.pairs[index].mvars), "where the counters lie");
        const rdma::QueueMemory layout{kDepth};
        auto* memory = const_cast<uint8_t*>(sample.memory);
        CHECK(adopted.pair.requests == layout.requests(memory) && adopted.pair.completion == layout.completion(memory) &&
                  adopted.pair.record == layout.record(memory) && adopted.pair.doorbell == layout.doorbell(memory),
              "what posters and NIC share");
    }
}

void keys_and_addresses_fit_each_byte() {
    const Sample sample;
    const NvshmemTables tables = sample.read();
    CHECK(tables.local.num_chunks() == 61 && tables.remote[0].num_chunks() == 0, "an arena that begins inside a chunk touches one more");
    for (const int64_t offset : {int64_t{0}, kChunkBytes - 4097, kChunkBytes - 4096, 30 * kChunkBytes, 60 * kChunkBytes - 1}) {
        const int64_t chunk = (10 * kChunkBytes + 4096 + offset) >> kLog2Chunk;
        const rdma::Location local = tables.local.at(offset), remote = tables.remote[2].at(offset);
        CHECK(local.address == sample.request.arena + offset && local.key.bits == key_of(chunk, kNumRanks, 0), "local %lld",
              static_cast<long long>(offset));
        CHECK(remote.address == (4ull << 40) + 10 * kChunkBytes + 4096 + offset && remote.key.bits == key_of(chunk, 2, 0), "remote %lld",
              static_cast<long long>(offset));
    }
    CHECK(tables.remote[2].contiguous(0) == kChunkBytes - 4096 && tables.remote[2].contiguous(kChunkBytes - 4096) == kChunkBytes, "seams");
}

// Our posting code on a ring in which NVSHMEM has already posted: through the wrap of request numbers, with NVSHMEM's last completion gone.
void posting_goes_on_where_nvshmem_stopped() {
    Sample sample;
    rdma::QueuePairState nic_side = {};
    alignas(8) uint8_t target[64] = {};
    rdma::SoftwareNic<> nic;
    IbgdaQueuePair& from = sample.pairs[Sample::index_of(2, 0)];
    const uint64_t first = from.mvars.tx_wq.prod_idx;
    from.qpn = from.tx_wq.cq->qpn = nic.create_queue_pair(2, kDepth, sample.memory, &nic_side, first).number;
    const rdma::Be32 key = nic.register_memory(2, 0x1000, target, sizeof(target));
    const AdoptedPair adopted = sample.read().pairs[4];
    rdma::QueuePair pair = adopted.pair;
    rdma::QueuePairState state = rdma::initial_state(adopted.next_request);
    pair.state = &state;
    memset(const_cast<rdma::CompletionEntry*>(pair.completion), 0xff, sizeof(rdma::CompletionEntry));
    CHECK(rdma::poll(pair).ok() && state.completed == first, "all ones is no completion");
    int num_left = 1000;
    auto wait = [&] {
        nic.step();
        return num_left-- > 0 ? rdma::WaitVerdict::kGoOn : rdma::WaitVerdict::kTimeout;
    };
    for (uint64_t i = 0; i < 20; ++i) {
        uint64_t begin = 0;
        CHECK(rdma::reserve(pair, 1, wait, &begin).ok() && begin == first + i, "reserve");
        rdma::write_inline_word(pair.slot(begin), pair.place(begin, true), {0x1000 + 8 * (i % 8), key}, 100 + i);
        const rdma::QueueStatus status = rdma::submit(pair, begin, 1, wait);
        CHECK(status.ok(), "%s", rdma::describe(status).c_str());
    }
    const rdma::QueueStatus status = rdma::wait_completed(pair, first + 20, wait);
    CHECK(status.ok(), "%s", rdma::describe(status).c_str());
    CHECK(target[24] == 119 && target[0] == 116, "words");
}

void a_state_that_we_do_not_know_is_refused() {
    const auto refuses = [](const std::string& words, const std::function<void(Sample&)>& change) {
        Sample sample;
        change(sample);
        std::string said;
        try {
            sample.read();
        } catch (const deepep::DriverError& error) {
            said = error.what();
        }
        CHECK(said.find(words) != std::string::npos, "'%s' was to be refused with '%s'", said.c_str(), words.c_str());
    };
    const size_t used = Sample::index_of(2, 1);
    refuses("device state has version word", [](Sample& s) { s.state.version += 1; });
    refuses("IBGDA state has version word", [](Sample& s) { s.ibgda.version += 1 << 16; });
    refuses("did not come up", [](Sample& s) { s.state.ibgda_is_initialized = false; });
    refuses("NVSHMEM calls this process 1 of 3", [](Sample& s) { s.state.mype = 1; });
    refuses("NVSHMEM_IBGDA_NIC_HANDLER has to be gpu", [](Sample& s) { s.ibgda.use_async_postsend = true; });
    refuses("has no queue pairs", [](Sample& s) { s.ibgda.globalmem.rcs = nullptr; });
    refuses("1 queue pairs to each rank, and 2 were asked for", [](Sample& s) { s.ibgda.num_rc_per_pe = 1; });
    refuses("granularity is out of range", [](Sample& s) { s.ibgda.log2_cumem_granularity = 64; });
    refuses("not inside the symmetric heap", [](Sample& s) { s.request.num_arena_bytes = 70 * kChunkBytes; });
    refuses("not inside the symmetric heap", [](Sample& s) { s.request.arena = kHeap - 1; });
    refuses("table of keys is too short", [](Sample& s) { s.ibgda.globalmem.lkeys = nullptr; });
    refuses("table of keys is too short", [](Sample& s) { s.ibgda.globalmem.rkeys = nullptr; });
    refuses("a queue pair has version word", [=](Sample& s) { s.pairs[used].version = 0; });
    refuses("counters has version word", [=](Sample& s) { s.pairs[used].mvars.version = 0; });
    refuses("a completion queue has version word", [=](Sample& s) { s.queues[used].version = 0; });
    refuses("to rank 2: it is not of type RC", [=](Sample& s) { s.pairs[used].qp_type = NVSHMEMI_IBGDA_DEVICE_QP_TYPE_DCI; });
    refuses("it belongs to NIC 1", [=](Sample& s) { s.pairs[used].dev_idx = 1; });
    refuses("its depth is 24", [=](Sample& s) { s.pairs[used].tx_wq.nwqes = 24; });
    refuses("no ring, doorbell or completion queue", [=](Sample& s) { s.pairs[used].tx_wq.bf = nullptr; });
    refuses("belongs to another", [=](Sample& s) { s.queues[used].qpn += 1; });
    refuses("still has requests under way", [=](Sample& s) { s.pairs[used].mvars.tx_wq.resv_head += 1; });
    refuses("still has requests under way", [=](Sample& s) { s.pairs[used].mvars.tx_wq.cons_idx -= 1; });
    // What nobody asked for may be as it is.
    Sample sample;
    sample.pairs[Sample::index_of(1, 0)].version = 0;
    sample.pairs[Sample::index_of(2, 2)].version = 0;
    CHECK(sample.read().pairs.size() == 6, "pairs");
}

const std::map<std::string, void (*)()> kCases = {
#define CASE(name) {#name, name}
    CASE(tables_say_what_the_state_says),
    CASE(keys_and_addresses_fit_each_byte),
    CASE(posting_goes_on_where_nvshmem_stopped),
    CASE(a_state_that_we_do_not_know_is_refused),
};

}  // namespace

int main(int num_arguments, char** arguments) {
    const auto found = num_arguments == 2 ? kCases.find(arguments[1]) : kCases.end();
    CHECK(found != kCases.end(), "no such case");
    found->second();
}
