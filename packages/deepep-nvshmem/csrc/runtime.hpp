#pragma once
// One rank of the domain: its view of every arena, its pinned status page, and the calls that check arguments and launch kernels.
#include <cuda_runtime_api.h>

#include <cstdint>
#include <memory>
#include <optional>
#include <string>
#include <vector>

#include "host_support.hpp"
#include "kernels/kernels.hpp"

namespace deepep::nvlink {

struct Counts {
    int64_t num_recv_tokens;
    std::vector<int32_t> num_recv_tokens_per_expert;
    std::vector<std::vector<uint32_t>> headers;  // [rank][kNumHeaderWords]
    uint32_t mismatch_mask;
    uint32_t bad_count_mask;
};

struct RuntimeConfig {
    int rank;
    int num_ranks;
    int device;
    std::vector<uint64_t> arena_ptrs;
    int64_t num_arena_bytes;
    int max_local_experts;
    int64_t num_staging_bytes;
};

// What the caller asks of a kernel's shape; 0 means: choose.
struct Tuning {
    int num_sms;
    bool use_bulk;
    int num_warps;
    int num_stages;
    int num_side_warps;
};

// The counts that a dispatch waits for before it is launched; ticket 0: none.
struct AwaitedCounts {
    uint32_t ticket;
    int64_t least_rows;
    double timeout_s;
};

class Runtime {
public:
    explicit Runtime(const RuntimeConfig& config);
    Runtime(const Runtime&) = delete;
    Runtime& operator=(const Runtime&) = delete;

    static int64_t window_bytes(int num_ranks, int max_local_experts, int64_t num_staging_bytes);

    void set_arena_bytes(int64_t num_bytes);
    bool is_symmetric(uint64_t address, int64_t num_bytes) const;
    void set_timeout_ns(uint64_t timeout_ns) { page_.set_timeout_ns(timeout_ns); }
    void abort() { page_.set_aborted(true); }
    void clear_abort() { page_.set_aborted(false); }
    std::optional<ErrorRecord> error() const { return page_.error(); }
    void clear_error() { page_.clear_error(); }
    void reset(cudaStream_t stream);
    void close() noexcept { page_.close(); }

    // The structs arrive with the caller's pointers and sizes; the runtime adds the domain and everything it decides.
    void layout(LayoutArgs args, cudaStream_t stream);
    void notify(NotifyArgs args, cudaStream_t stream);
    std::optional<Counts> wait_counts(uint32_t ticket, double timeout_s) const;
    // How this rank's outputs are filled: "in_place" or "staged". With awaited counts it is launched as soon as they are there, if all ranks
    // agree, nothing went wrong and at least least_rows and at most args.capacity rows come here; else nullptr.
    const char* dispatch(DispatchArgs args, int64_t num_row_bytes, int num_experts, const Tuning& tuning, const AwaitedCounts& awaited, cudaStream_t stream);
    // How this rank's rows reach its peers: "pull", "relayed" or "staged".
    const char* combine(CombineArgs args, int64_t num_row_bytes, const Tuning& tuning, cudaStream_t stream);

private:
    int num_local_experts(int num_experts) const;
    bool wait_for_rows(const AwaitedCounts& awaited, int64_t capacity) const;

    RuntimeConfig config_;
    StatusPage page_;
    Domain domain_;
    int num_device_sms_ = 0;
    bool has_bulk_ = false;
    int num_dispatch_experts_ = 0;
};

}  // namespace deepep::nvlink
