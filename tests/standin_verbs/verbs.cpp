// The entry points of libibverbs.so.1 that a user of reliable connections needs, over the agent.
#include <infiniband/verbs.h>

#include <algorithm>
#include <cerrno>
#include <chrono>
#include <cstddef>
#include <cstring>
#include <string>

#include "agent.hpp"
#include "device.hpp"
#include "log.hpp"

#undef ibv_query_port
#undef ibv_reg_mr
#undef ibv_reg_mr_iova

using standin::Agent;
using standin::CompletionQueue;
using standin::Pair;
using standin::Region;
using standin::SharedReceiveQueue;

namespace {

constexpr int kMaxDepth = 32768, kMaxCompletions = 1 << 18;
constexpr uint64_t kGuid = 0x0200000000000001;
constexpr auto kDrainTime = std::chrono::seconds(2);

ibv_device& device() {
    static auto* const only = [] {
        auto* const made = new ibv_device{};
        made->node_type = IBV_NODE_CA;
        made->transport_type = IBV_TRANSPORT_IB;
        std::strcpy(made->name, standin::kDeviceName);
        std::strcpy(made->dev_name, "uverbs0");
        std::strcpy(made->dev_path, "/sys/class/infiniband_verbs/uverbs0");
        std::strcpy(made->ibdev_path, (std::string("/sys/class/infiniband/") + standin::kDeviceName).c_str());
        return made;
    }();
    return *only;
}

struct QueuePair : ibv_qp {
    Pair* pair;
};

Pair& pair_of(ibv_qp* verbs) { return *static_cast<QueuePair*>(verbs)->pair; }
CompletionQueue* queue_of(ibv_cq* verbs) { return static_cast<CompletionQueue*>(verbs); }
SharedReceiveQueue* queue_of(ibv_srq* verbs) { return static_cast<SharedReceiveQueue*>(verbs); }

template <class Result>
Result* fail(int error) {
    errno = error;
    return nullptr;
}

// --- what the inline functions of <infiniband/verbs.h> call through the context ---------------------------------------

int post_send(ibv_qp* verbs, ibv_send_wr* request, ibv_send_wr** bad) {
    Pair& pair = pair_of(verbs);
    for (; request != nullptr; request = request->next) {
        const ibv_qp_state state = pair.state();
        // As of a NIC: a pair in error takes requests, and completes them with an error.
        const int status = state == IBV_QPS_RTS || state == IBV_QPS_ERR ? pair.sends.post(*request) : EINVAL;
        if (status != 0) {
            *bad = request;
            return status;
        }
    }
    return 0;
}

int post_recv(ibv_qp* verbs, ibv_recv_wr* request, ibv_recv_wr** bad) {
    if (verbs->srq != nullptr) return *bad = request, EINVAL;
    return pair_of(verbs).own_receives.post(request, bad);
}

int post_srq_recv(ibv_srq* verbs, ibv_recv_wr* request, ibv_recv_wr** bad) { return queue_of(verbs)->queue.post(request, bad); }

int poll_cq(ibv_cq* verbs, int count, ibv_wc* completions) { return queue_of(verbs)->poll(count, completions); }

int req_notify_cq(ibv_cq*, int) { return EOPNOTSUPP; }

ibv_mr* register_memory(ibv_pd* pd, void* local, size_t num_bytes, uint64_t start, int access) {
    // As the kernel has it: who may write from afar may write here.
    if ((access & (IBV_ACCESS_REMOTE_WRITE | IBV_ACCESS_REMOTE_ATOMIC)) != 0 && (access & IBV_ACCESS_LOCAL_WRITE) == 0)
        return fail<ibv_mr>(EINVAL);
    Agent& agent = Agent::get();
    const int on = standin::device_of(local);
    standin::Segment& segment = agent.shared().membership.segment();
    standin::Copier::prepare(on, &segment, sizeof(segment));
    Region* const region = agent.shared().regions.add(pd, local, start, num_bytes, access, on);
    if (region == nullptr) return fail<ibv_mr>(ENOMEM);
    standin::say("memory at %p, %zu bytes, as %lx on %s %d: key %x", local, num_bytes, start, on == standin::kHost ? "host" : "GPU",
                 on, region->lkey);
    return region;
}

// Attributes that a change of state has to bring, and the states that it may start from.
struct Transition {
    ibv_qp_state to;
    int attributes;
    unsigned from;  // bits
};
constexpr unsigned bit(ibv_qp_state state) { return 1u << state; }
constexpr unsigned kAnyState = ~0u;
constexpr Transition kTransitions[] = {
    {IBV_QPS_RESET, 0, kAnyState},
    {IBV_QPS_INIT, IBV_QP_PKEY_INDEX | IBV_QP_PORT | IBV_QP_ACCESS_FLAGS, bit(IBV_QPS_RESET) | bit(IBV_QPS_INIT)},
    {IBV_QPS_RTR,
     IBV_QP_AV | IBV_QP_PATH_MTU | IBV_QP_DEST_QPN | IBV_QP_RQ_PSN | IBV_QP_MAX_DEST_RD_ATOMIC | IBV_QP_MIN_RNR_TIMER,
     bit(IBV_QPS_INIT)},
    {IBV_QPS_RTS, IBV_QP_TIMEOUT | IBV_QP_RETRY_CNT | IBV_QP_RNR_RETRY | IBV_QP_SQ_PSN | IBV_QP_MAX_QP_RD_ATOMIC,
     bit(IBV_QPS_RTR)},
    {IBV_QPS_ERR, 0, kAnyState},
};

}  // namespace

extern "C" {

int ibv_fork_init() { return 0; }

// --- the device -----------------------------------------------------------------------------------------------------

ibv_device** ibv_get_device_list(int* count) {
    if (count != nullptr) *count = 1;
    return new ibv_device* [2] { &device(), nullptr };
}

void ibv_free_device_list(ibv_device** list) { delete[] list; }

const char* ibv_get_device_name(ibv_device* one) { return one->name; }

__be64 ibv_get_device_guid(ibv_device*) { return __builtin_bswap64(kGuid); }

ibv_context* ibv_open_device(ibv_device* one) {
    if (!Agent::get().open()) return fail<ibv_context>(EIO);
    auto* const context = new ibv_context{};
    context->device = one;
    context->ops.post_send = post_send;
    context->ops.post_recv = post_recv;
    context->ops.post_srq_recv = post_srq_recv;
    context->ops.poll_cq = poll_cq;
    context->ops.req_notify_cq = req_notify_cq;
    context->cmd_fd = context->async_fd = -1;
    context->num_comp_vectors = 1;
    return context;
}

int ibv_close_device(ibv_context* context) {
    delete context;
    Agent::get().close();
    return 0;
}

int ibv_query_device(ibv_context*, ibv_device_attr* attributes) {
    *attributes = {};
    std::strcpy(attributes->fw_ver, "1.0");
    attributes->node_guid = attributes->sys_image_guid = __builtin_bswap64(kGuid);
    attributes->vendor_id = 0x02c9;       // of mlx5 devices, and
    attributes->vendor_part_id = 0x101b;  // the part of a ConnectX-6: some users look
    attributes->max_mr_size = UINT64_MAX;
    attributes->page_size_cap = 0xfffff000;
    attributes->max_qp = standin::kMaxPairs;
    attributes->max_qp_wr = kMaxDepth;
    attributes->max_sge = attributes->max_sge_rd = standin::kMaxSges;
    attributes->max_cq = 1 << 16;
    attributes->max_cqe = kMaxCompletions;
    attributes->max_mr = 1 << 20;
    attributes->max_pd = 1 << 16;
    attributes->max_qp_rd_atom = attributes->max_qp_init_rd_atom = 16;
    attributes->max_res_rd_atom = 16 * standin::kMaxPairs;
    attributes->atomic_cap = IBV_ATOMIC_HCA;
    attributes->max_srq = 1 << 16;
    attributes->max_srq_wr = kMaxDepth;
    attributes->max_srq_sge = standin::kMaxSges;
    attributes->max_pkeys = 1;
    attributes->phys_port_cnt = 1;
    return 0;
}

int ibv_query_port(ibv_context*, uint8_t port, _compat_ibv_port_attr* part) {
    if (port != 1) return EINVAL;
    // Up to `flags`: a caller's structure may be of an age that ends there.
    auto* const attributes = reinterpret_cast<ibv_port_attr*>(part);
    std::memset(part, 0, offsetof(ibv_port_attr, flags) + 1);
    attributes->state = IBV_PORT_ACTIVE;
    attributes->max_mtu = attributes->active_mtu = IBV_MTU_4096;
    attributes->gid_tbl_len = 1;
    attributes->max_msg_sz = 1u << 31;
    attributes->pkey_tbl_len = 1;
    attributes->lid = attributes->sm_lid = 1;
    attributes->max_vl_num = 1;
    attributes->active_width = 2;  // 4x
    attributes->active_speed = 64;
    attributes->phys_state = 5;  // LinkUp
    attributes->link_layer = IBV_LINK_LAYER_INFINIBAND;
    return 0;
}

int ibv_query_gid(ibv_context*, uint8_t port, int index, ibv_gid* gid) {
    if (port != 1 || index != 0) return EINVAL;
    gid->global.subnet_prefix = __builtin_bswap64(0xfe80000000000000);
    gid->global.interface_id = __builtin_bswap64(kGuid);
    return 0;
}

int ibv_query_pkey(ibv_context*, uint8_t port, int index, __be16* key) {
    if (port != 1 || index != 0) return EINVAL;
    *key = 0xffff;
    return 0;
}

// --- memory ---------------------------------------------------------------------------------------------------------

ibv_pd* ibv_alloc_pd(ibv_context* context) {
    auto* const pd = new ibv_pd{};
    pd->context = context;
    return pd;
}

int ibv_dealloc_pd(ibv_pd* pd) {
    delete pd;
    return 0;
}

ibv_mr* ibv_reg_mr(ibv_pd* pd, void* address, size_t num_bytes, int access) {
    return register_memory(pd, address, num_bytes, reinterpret_cast<uint64_t>(address), access);
}

ibv_mr* ibv_reg_mr_iova(ibv_pd* pd, void* address, size_t num_bytes, uint64_t start, int access) {
    return register_memory(pd, address, num_bytes, start, access);
}

ibv_mr* ibv_reg_mr_iova2(ibv_pd* pd, void* address, size_t num_bytes, uint64_t start, unsigned access) {
    return register_memory(pd, address, num_bytes, start, static_cast<int>(access));
}

// The file says which memory it is, and not where this process has it: that is taken to be `start`, as for memory that is registered in the
// process that allocated it.
ibv_mr* ibv_reg_dmabuf_mr(ibv_pd* pd, uint64_t offset, size_t num_bytes, uint64_t start, int file, int access) {
    if (file < 0) return fail<ibv_mr>(EBADF);
    if (offset != 0) return fail<ibv_mr>(EOPNOTSUPP);
    return register_memory(pd, reinterpret_cast<void*>(start), num_bytes, start, access);
}

int ibv_dereg_mr(ibv_mr* memory) {
    const Agent::Hold hold(Agent::get());
    return Agent::get().shared().regions.remove(static_cast<Region*>(memory)) ? 0 : EINVAL;
}

// --- queues ---------------------------------------------------------------------------------------------------------

ibv_cq* ibv_create_cq(ibv_context* context, int depth, void* user, ibv_comp_channel* channel, int) {
    if (depth < 1 || depth > kMaxCompletions) return fail<ibv_cq>(EINVAL);
    if (channel != nullptr) return fail<ibv_cq>(EOPNOTSUPP);
    auto* const queue = new CompletionQueue;
    queue->context = context;
    queue->channel = nullptr;
    queue->cq_context = user;
    queue->cqe = depth;
    return queue;
}

int ibv_destroy_cq(ibv_cq* verbs) {
    delete queue_of(verbs);
    return 0;
}

ibv_srq* ibv_create_srq(ibv_pd* pd, ibv_srq_init_attr* attributes) {
    if (attributes->attr.max_wr > kMaxDepth || attributes->attr.max_sge > standin::kMaxSges) return fail<ibv_srq>(EINVAL);
    auto* const queue = new SharedReceiveQueue(attributes->attr.max_wr);
    queue->context = pd->context;
    queue->pd = pd;
    queue->srq_context = attributes->srq_context;
    return queue;
}

int ibv_destroy_srq(ibv_srq* verbs) {
    delete queue_of(verbs);
    return 0;
}

ibv_qp* ibv_create_qp(ibv_pd* pd, ibv_qp_init_attr* attributes) {
    const ibv_qp_cap& limits = attributes->cap;
    if (attributes->qp_type != IBV_QPT_RC) return fail<ibv_qp>(EOPNOTSUPP);
    if (attributes->send_cq == nullptr || attributes->recv_cq == nullptr || limits.max_send_wr > kMaxDepth ||
        limits.max_recv_wr > kMaxDepth || limits.max_send_sge > standin::kMaxSges || limits.max_recv_sge > standin::kMaxSges ||
        limits.max_inline_data > standin::kMaxInlineBytes)
        return fail<ibv_qp>(EINVAL);
    Agent& agent = Agent::get();
    const Agent::Hold hold(agent);
    Pair* const pair = agent.add_pair(std::max(limits.max_send_wr, 1u), limits.max_recv_wr);
    if (pair == nullptr) return fail<ibv_qp>(ENOMEM);
    pair->receives = attributes->srq != nullptr ? &queue_of(attributes->srq)->queue : &pair->own_receives;
    pair->send_completions = queue_of(attributes->send_cq);
    pair->receive_completions = queue_of(attributes->recv_cq);
    pair->completes_all = attributes->sq_sig_all != 0;
    auto* const verbs = new QueuePair{};
    verbs->context = pd->context;
    verbs->qp_context = attributes->qp_context;
    verbs->pd = pd;
    verbs->send_cq = attributes->send_cq;
    verbs->recv_cq = attributes->recv_cq;
    verbs->srq = attributes->srq;
    verbs->qp_num = pair->number();
    verbs->state = IBV_QPS_RESET;
    verbs->qp_type = IBV_QPT_RC;
    verbs->pair = pair;
    pair->verbs = verbs;
    return verbs;
}

int ibv_modify_qp(ibv_qp* verbs, ibv_qp_attr* attributes, int mask) {
    if ((mask & IBV_QP_STATE) == 0) return EOPNOTSUPP;
    const Agent::Hold hold(Agent::get());
    Pair& pair = pair_of(verbs);
    for (const Transition& transition : kTransitions) {
        if (transition.to != attributes->qp_state) continue;
        if ((mask & transition.attributes) != transition.attributes || (transition.from & bit(pair.state())) == 0) return EINVAL;
        if (mask & IBV_QP_PORT && attributes->port_num != 1) return EINVAL;
        if (mask & IBV_QP_ACCESS_FLAGS) pair.set_access(static_cast<uint32_t>(attributes->qp_access_flags));
        if (mask & IBV_QP_DEST_QPN) pair.connect(attributes->dest_qp_num);
        if (mask & IBV_QP_RNR_RETRY) pair.set_receiver_retries(attributes->rnr_retry);
        if (transition.to == IBV_QPS_RESET) pair.reset();
        pair.set_state(transition.to);
        return 0;
    }
    return EOPNOTSUPP;
}

// What was sent is executed first, for a while; completions that nobody has taken are forgotten.
int ibv_destroy_qp(ibv_qp* verbs) {
    Agent& agent = Agent::get();
    Pair* const pair = &pair_of(verbs);
    const auto deadline = std::chrono::steady_clock::now() + kDrainTime;
    bool is_idle = false, is_removed = false;
    while (!is_removed) {
        {
            const Agent::Hold hold(agent);
            if (pair->state() != IBV_QPS_RESET) pair->set_state(IBV_QPS_ERR);
            is_idle = pair->is_idle();
            if (is_idle || std::chrono::steady_clock::now() > deadline) {
                pair->send_completions->forget(pair->number());
                pair->receive_completions->forget(pair->number());
                agent.remove_pair(pair);
                is_removed = true;
            }
        }
        usleep(50);  // the agent's turn
    }
    if (!is_idle) standin::say("queue pair %u is destroyed while packets of it are under way", verbs->qp_num);
    delete static_cast<QueuePair*>(verbs);
    return 0;
}

// --- asked for by name, and of no use to reliable connections -----------------------------------------------------------

ibv_ah* ibv_create_ah(ibv_pd*, ibv_ah_attr*) { return fail<ibv_ah>(EOPNOTSUPP); }

int ibv_destroy_ah(ibv_ah*) { return EOPNOTSUPP; }

}  // extern "C"
