#pragma once
// One rank of the group: its view of every arena, its pinned status page, and the calls that check arguments and launch kernels.
#include <cuda_runtime_api.h>

#include <cstdint>
#include <optional>
#include <string>
#include <vector>

#include "kernels/kernels.hpp"

namespace deepep::ibgda {

struct RuntimeConfig {
    int rank;
    int num_ranks;
    int device;
    std::vector<uint64_t> arena_ptrs;  // 0: reached by RDMA
    int64_t num_arena_bytes;
    std::string ll_reduce;
    bool enable_shrink;
    uint64_t rdma_view;
};

// The numbers that every rank gives alike.
struct CallShape {
    int hidden;
    int num_topk;
    int max_tokens;
    int num_experts;
};

class Runtime {
public:
    explicit Runtime(const RuntimeConfig& config);
    Runtime(const Runtime&) = delete;
    Runtime& operator=(const Runtime&) = delete;
    ~Runtime();

    static int64_t window_bytes(int num_ranks, const CallShape& shape, const std::string& ll_reduce, bool has_remote);
    static int64_t handle_words(int num_ranks, const CallShape& shape);

    void set_timeout_ns(uint64_t timeout_ns);
    void set_least_divided_blocks(int num_blocks);
    void abort();
    void clear_abort();
    std::optional<ErrorRecord> error() const;
    void clear_error();
    void reset(cudaStream_t stream);
    void close() noexcept;

    // The structs arrive with the caller's pointers and sizes; the runtime adds the domain and everything that follows from it.
    void dispatch(DispatchArgs args, int num_sms, cudaStream_t stream);
    void combine(CombineArgs args, int num_sms, cudaStream_t stream);

    void update_mask(int rank, bool is_masked, cudaStream_t stream);
    void query_mask(int32_t* out, cudaStream_t stream) const;
    void clean_mask(cudaStream_t stream);

private:
    void require_open() const;
    void require_masks() const;
    void require_call(const char* op, const CallShape& shape, int num_tokens, int phases) const;
    int num_blocks(int num_sms) const;
    void fill_window(cudaStream_t stream);

    RuntimeConfig config_;
    LowLatencyWindow window_;
    Domain domain_;
    int num_device_sms_ = 0;
};

}  // namespace deepep::ibgda
