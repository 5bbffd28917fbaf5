#pragma once
// One rank of a group across nodes: its view of its node's arenas and of the network, its pinned status page, and the calls that check
// arguments and launch kernels.
#include <cuda_runtime_api.h>

#include <cstdint>
#include <optional>
#include <string>
#include <vector>

#include "host_support.hpp"
#include "internode/kernels.hpp"

namespace deepep::internode {

struct Counts {
    int64_t num_recv_tokens;
    int64_t num_forward_rows;
    std::vector<int32_t> num_recv_tokens_per_expert;
    std::vector<std::vector<uint32_t>> headers;  // [rank][kNumHeaderWords]
    std::vector<uint32_t> mismatch_mask;         // a bit for each rank
    std::vector<uint32_t> bad_count_mask;
};

struct RuntimeConfig {
    Group group;
    int device;
    std::vector<uint64_t> arena_ptrs;  // of this node's ranks
    int64_t num_arena_bytes;
    uint64_t network_ptr;
    int max_local_experts;
    int64_t num_ring_bytes;
    int64_t num_chunk_bytes;  // 0: chosen
};

// The counts that a dispatch waits for before it is launched; ticket 0: none.
struct AwaitedCounts {
    uint32_t ticket;
    int64_t least_rows;
    double timeout_s;
};

// NVSHMEM's host library tells the kernels of this extension where its memory and its queues are; returns its status. NativeError where the
// library is not in the process.
int attach_network(int device);
// The host waits until everything that this rank has put is delivered.
void quiet_network();

class Runtime {
public:
    explicit Runtime(const RuntimeConfig& config);
    Runtime(const Runtime&) = delete;
    Runtime& operator=(const Runtime&) = delete;
    ~Runtime() { close(); }

    static int64_t window_bytes(int ranks_per_node);
    static int64_t network_bytes(int num_ranks, int ranks_per_node, int max_local_experts, int64_t num_ring_bytes);
    static int64_t least_ring_bytes(int64_t num_row_bytes, int num_scales, int num_topk, int ranks_per_node);

    bool is_symmetric(uint64_t address, int64_t num_bytes) const;
    void set_timeout_ns(uint64_t timeout_ns) { page_.set_timeout_ns(timeout_ns); }
    void abort() { page_.set_aborted(true); }
    void clear_abort() { page_.set_aborted(false); }
    std::optional<ErrorRecord> error() const;
    void clear_error() { page_.clear_error(); }
    void reset(cudaStream_t stream);
    void close() noexcept;

    // The structs arrive with the caller's pointers and sizes; the runtime adds the domain and everything it decides.
    void layout(LayoutArgs args, cudaStream_t stream);
    void notify(NotifyArgs args, PlanArgs plan, cudaStream_t stream);
    void refuse(NotifyArgs args, cudaStream_t stream);
    std::optional<Counts> wait_counts(uint32_t ticket, double timeout_s) const;
    // False: with awaited counts, when they did not come, something is wrong with them, or the rows do not fit. Where
    // tokens_to_node is still to be made (a cached dispatch), `unlisted_rdma_head` is the handle's send_rdma_head; else null.
    bool dispatch(DispatchArgs args, const int32_t* unlisted_rdma_head, const Tuning& tuning, const AwaitedCounts& awaited, cudaStream_t stream);
    void combine(CombineArgs args, int64_t num_row_bytes, const CombineTuning& tuning, cudaStream_t stream);

private:
    void clear_memory(cudaStream_t stream) const;
    void require_experts(int num_experts) const;
    void require_sms(const char* op, int num_sms) const;
    ChunkGeometry geometry_of(const char* op, int64_t num_message_bytes, bool is_combine) const;
    bool rows_fit(const AwaitedCounts& awaited, int64_t capacity, int64_t num_forward_capacity) const;

    RuntimeConfig config_;
    StatusPage page_;
    Domain domain_{};
    void* private_memory_ = nullptr;  // PrivateState, then what dispatch expects, then layout's histogram
    int64_t num_private_bytes_ = 0;
    int num_device_sms_ = 0;
    bool has_bulk_ = false;
    int num_shared_bytes_ = 0;  // that a block may have
    int num_dispatch_experts_ = 0;
};

}  // namespace deepep::internode
