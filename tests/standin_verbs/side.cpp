// See cases.hpp.
#include "cases.hpp"

#include <dlfcn.h>
#include <sys/mman.h>
#include <unistd.h>

#include <cerrno>
#include <chrono>
#include <cstring>
#include <thread>

bool is_on_gpu = false;

uint8_t* new_memory(size_t num_bytes) {
    if (is_on_gpu) {
        void* const driver = dlopen(std::getenv("STANDIN_VERBS_CUDA"), RTLD_NOW);
        CHECK(driver != nullptr, "%s", dlerror());
        return static_cast<uint8_t*>(reinterpret_cast<void* (*)(size_t)>(dlsym(driver, "fake_device_memory"))(num_bytes));
    }
    return static_cast<uint8_t*>(mmap(nullptr, num_bytes, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0));
}

void Side::open() {
    int count = 0;
    ibv_device** const list = ibv_get_device_list(&count);
    CHECK(count == 1, "%d devices", count);
    context = ibv_open_device(list[0]);
    ibv_free_device_list(list);
    CHECK(context != nullptr, "no device");
    pd = ibv_alloc_pd(context);
    memory = new_memory(kBytes);
    region = ibv_reg_mr(pd, memory, kBytes, kAllRights);
    read_only = ibv_reg_mr(pd, memory, kBytes, IBV_ACCESS_REMOTE_READ);
    CHECK(region != nullptr && read_only != nullptr, "no memory");
    local_key = region->lkey;
    sent = ibv_create_cq(context, 4096, nullptr, nullptr, 0);
    received = ibv_create_cq(context, 4096, nullptr, nullptr, 0);
    ibv_srq_init_attr attributes{};
    attributes.attr.max_wr = 64, attributes.attr.max_sge = 1;
    receives = ibv_create_srq(pd, &attributes);
    CHECK(sent != nullptr && received != nullptr && receives != nullptr, "no queues");
}

void Side::close() {
    for (ibv_qp* pair : pairs_) CHECK(ibv_destroy_qp(pair) == 0, "a pair stays");
    CHECK(ibv_destroy_srq(receives) == 0 && ibv_destroy_cq(sent) == 0 && ibv_destroy_cq(received) == 0, "queues stay");
    CHECK(ibv_dereg_mr(region) == 0 && ibv_dereg_mr(read_only) == 0 && ibv_dealloc_pd(pd) == 0, "memory stays");
    CHECK(ibv_close_device(context) == 0, "the device stays");
}

ibv_qp* Side::make_pair(uint32_t depth, bool is_shared_receive) {
    ibv_qp_init_attr attributes{};
    attributes.send_cq = sent, attributes.recv_cq = received;
    attributes.srq = is_shared_receive ? receives : nullptr;
    attributes.cap.max_send_wr = depth, attributes.cap.max_recv_wr = is_shared_receive ? 0 : depth;
    attributes.cap.max_send_sge = 4, attributes.cap.max_recv_sge = 1, attributes.cap.max_inline_data = 128;
    attributes.qp_type = IBV_QPT_RC;
    ibv_qp* const pair = ibv_create_qp(pd, &attributes);
    CHECK(pair != nullptr, "no pair: %s", std::strerror(errno));
    ibv_qp_attr change{};
    change.qp_state = IBV_QPS_INIT, change.port_num = 1, change.qp_access_flags = kAllRights;
    CHECK(ibv_modify_qp(pair, &change, IBV_QP_STATE | IBV_QP_PKEY_INDEX | IBV_QP_PORT | IBV_QP_ACCESS_FLAGS) == 0, "init");
    return pair;
}

void Side::connect(ibv_qp* pair, uint32_t remote_number, uint8_t receiver_retries) {
    ibv_qp_attr change{};
    change.qp_state = IBV_QPS_RTR, change.path_mtu = IBV_MTU_4096, change.dest_qp_num = remote_number;
    change.max_dest_rd_atomic = 16, change.min_rnr_timer = 12, change.ah_attr.port_num = 1;
    CHECK(ibv_modify_qp(pair, &change,
                        IBV_QP_STATE | IBV_QP_AV | IBV_QP_PATH_MTU | IBV_QP_DEST_QPN | IBV_QP_RQ_PSN | IBV_QP_MAX_DEST_RD_ATOMIC |
                            IBV_QP_MIN_RNR_TIMER) == 0,
          "ready to receive");
    change = {};
    change.qp_state = IBV_QPS_RTS, change.timeout = 20, change.retry_cnt = 7, change.rnr_retry = receiver_retries;
    change.max_rd_atomic = 16;
    CHECK(ibv_modify_qp(pair, &change,
                        IBV_QP_STATE | IBV_QP_SQ_PSN | IBV_QP_TIMEOUT | IBV_QP_RETRY_CNT | IBV_QP_RNR_RETRY | IBV_QP_MAX_QP_RD_ATOMIC) == 0,
          "ready to send");
}

ibv_qp* Side::connected(uint32_t depth, uint8_t receiver_retries) {
    ibv_qp* const pair = make_pair(depth);
    remote = exchange(Card{pair->qp_num, region->rkey, read_only->rkey, reinterpret_cast<uint64_t>(memory)});
    remote_key = remote.key;
    connect(pair, remote.number, receiver_retries);
    pairs_.push_back(pair);
    meet();
    return pair;
}

void Side::transfer(const void* own, void* theirs, size_t num_bytes) {
    CHECK(write(socket_, own, num_bytes) == static_cast<ssize_t>(num_bytes), "the other side is gone");
    size_t got = 0;
    while (got < num_bytes) {
        const ssize_t count = read(socket_, static_cast<uint8_t*>(theirs) + got, num_bytes - got);
        if (count <= 0) std::_Exit(3);  // the other side says why
        got += static_cast<size_t>(count);
    }
}

int Side::post(ibv_qp* pair, ibv_wr_opcode opcode, uint64_t id, size_t offset, uint32_t num_bytes, size_t remote_offset,
               unsigned flags) {
    ibv_sge sge{reinterpret_cast<uint64_t>(memory) + offset, num_bytes, (flags & IBV_SEND_INLINE) ? 0 : local_key};
    ibv_send_wr request{}, *bad = nullptr;
    request.wr_id = id, request.sg_list = &sge, request.num_sge = 1, request.opcode = opcode, request.send_flags = flags;
    request.imm_data = immediate;
    request.wr.rdma.remote_addr = remote.address + remote_offset, request.wr.rdma.rkey = remote_key;
    return ibv_post_send(pair, &request, &bad);
}

int Side::post_atomic(ibv_qp* pair, ibv_wr_opcode opcode, uint64_t id, size_t offset, size_t remote_offset, uint64_t compare_or_add,
                      uint64_t swap, unsigned flags) {
    ibv_sge sge{reinterpret_cast<uint64_t>(memory) + offset, 8, local_key};
    ibv_send_wr request{}, *bad = nullptr;
    request.wr_id = id, request.sg_list = &sge, request.num_sge = 1, request.opcode = opcode, request.send_flags = flags;
    request.wr.atomic.remote_addr = remote.address + remote_offset, request.wr.atomic.rkey = remote_key;
    request.wr.atomic.compare_add = compare_or_add, request.wr.atomic.swap = swap;
    return ibv_post_send(pair, &request, &bad);
}

void Side::post_receive(uint64_t id, size_t offset, uint32_t num_bytes) {
    ibv_sge sge{reinterpret_cast<uint64_t>(memory) + offset, num_bytes, region->lkey};
    ibv_recv_wr request{}, *bad = nullptr;
    request.wr_id = id, request.sg_list = &sge, request.num_sge = 1;
    CHECK(ibv_post_srq_recv(receives, &request, &bad) == 0, "a receive request is refused");
}

ibv_wc Side::wait(ibv_cq* queue) {
    ibv_wc completion{};
    const auto deadline = std::chrono::steady_clock::now() + std::chrono::seconds(20);
    int count = 0;
    while ((count = ibv_poll_cq(queue, 1, &completion)) == 0) {
        CHECK(std::chrono::steady_clock::now() < deadline, "side %d: no completion in 20 s", which);
        std::this_thread::yield();
    }
    CHECK(count == 1, "polling gives %d", count);
    return completion;
}

void Side::expect(uint64_t id, ibv_wc_status status) {
    const ibv_wc completion = wait(sent);
    CHECK(completion.wr_id == id && completion.status == status, "side %d: request %lu with status %d, not %lu with %d", which,
          completion.wr_id, completion.status, id, status);
}

void Side::fill(size_t offset, size_t num_bytes, uint32_t seed) {
    for (size_t i = 0; i < num_bytes; ++i) memory[offset + i] = static_cast<uint8_t>((i * 2654435761u >> 11) + seed);
}

bool Side::is_filled(size_t offset, size_t num_bytes, uint32_t seed) {
    for (size_t i = 0; i < num_bytes; ++i)
        if (memory[offset + i] != static_cast<uint8_t>((i * 2654435761u >> 11) + seed)) return false;
    return true;
}
