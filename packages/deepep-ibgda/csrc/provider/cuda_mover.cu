// See cuda_mover.hpp. Inline bytes and atomics are kernels of one thread: their words land whole, and their operands travel as arguments.
#include <cstring>

#include "deepep/memory/symmetric.hpp"
#include "deepep/ptx/atomics.cuh"
#include "deepep/ptx/memory.cuh"
#include "provider/cuda_mover.hpp"

namespace deepep::ibgda {
namespace {

struct InlineBytes {
    uint64_t words[rdma::kMaxInlineBytes / 8 + 1];
    uint32_t num_bytes;
};

// Eight aligned bytes land at once, and so does every aligned word of longer data: a reader may poll each word.
__global__ void store_inline(uint8_t* destination, const InlineBytes data) {
    const auto address = reinterpret_cast<uintptr_t>(destination);
    if (data.num_bytes == 8 && address % 8 == 0) {
        ptx::store_relaxed_sys(reinterpret_cast<uint64_t*>(destination), data.words[0]);
        return;
    }
    uint32_t i = 0;
    if (address % 4 == 0)
        for (; i + 4 <= data.num_bytes; i += 4)
            ptx::store_relaxed_sys(reinterpret_cast<uint32_t*>(destination + i), static_cast<uint32_t>(data.words[i / 8] >> i % 8 * 8));
    for (; i < data.num_bytes; ++i) destination[i] = static_cast<uint8_t>(data.words[i / 8] >> i % 8 * 8);
}

__global__ void fetch_and_add(uint64_t* destination, uint64_t* result, uint64_t addend) {
    *result = ptx::add_relaxed_sys(destination, addend);
}

}  // namespace

CudaMover::Resources::~Resources() {
    static_cast<void>(cudaSetDevice(device));
    if (stream != nullptr) {
        static_cast<void>(cudaStreamSynchronize(stream));
        static_cast<void>(cudaStreamDestroy(stream));
    }
    if (landed != nullptr) static_cast<void>(cudaEventDestroy(landed));
    if (scratch != nullptr) static_cast<void>(cudaFree(scratch));
}

CudaMover::CudaMover(int device) : resources_(std::make_unique<Resources>()) {
    resources_->device = device;
    check_runtime(cudaSetDevice(device), "selecting CUDA device " + std::to_string(device));
    int least = 0, greatest = 0;
    check_runtime(cudaDeviceGetStreamPriorityRange(&least, &greatest), "asking for stream priorities");
    check_runtime(cudaStreamCreateWithPriority(&resources_->stream, cudaStreamNonBlocking, greatest), "making the software NIC's stream");
    check_runtime(cudaEventCreateWithFlags(&resources_->landed, cudaEventDisableTiming), "making the software NIC's event");
    // Run once now: code that is loaded on first use could wait for a kernel that waits for us.
    check_runtime(cudaMalloc(&resources_->scratch, 32), "allocating memory to try the software NIC's kernels");
    uint64_t* const scratch = resources_->scratch;
    store_inline<<<1, 1, 0, resources_->stream>>>(reinterpret_cast<uint8_t*>(scratch), InlineBytes{{}, 8});
    check_runtime(cudaGetLastError(), "loading the software NIC's kernels");
    fetch_and_add<<<1, 1, 0, resources_->stream>>>(scratch, scratch + 1, 1);
    check_runtime(cudaGetLastError(), "loading the software NIC's kernels");
    check_runtime(cudaMemcpyAsync(scratch + 2, scratch, 16, cudaMemcpyDefault, resources_->stream), "trying the software NIC's copies");
    check_runtime(cudaStreamSynchronize(resources_->stream), "running the software NIC's kernels");
}

CudaMover::~CudaMover() = default;

// The first refusal is kept.
void CudaMover::keep(cudaError_t status, const char* what) {
    if (status == cudaSuccess || !failure_.empty()) return;
    static_cast<void>(cudaGetLastError());
    failure_ = std::string(what) + ": CUDA answered " + cudaGetErrorName(status) + " (" + cudaGetErrorString(status) + ")";
}

void CudaMover::began(cudaError_t status, const char* what) {
    batches_.add_move();
    keep(status, what);
}

void CudaMover::copy(uint8_t* destination, const uint8_t* source, uint32_t num_bytes) {
    began(cudaMemcpyAsync(destination, source, num_bytes, cudaMemcpyDefault, resources_->stream), "copying a row");
}

void CudaMover::copy_inline(uint8_t* destination, const uint8_t* data, uint32_t num_bytes) {
    InlineBytes bytes = {{}, num_bytes};
    memcpy(bytes.words, data, num_bytes);
    store_inline<<<1, 1, 0, resources_->stream>>>(destination, bytes);
    began(cudaGetLastError(), "storing inline data");
}

void CudaMover::fetch_add(uint8_t* destination, uint8_t* result, uint64_t addend) {
    fetch_and_add<<<1, 1, 0, resources_->stream>>>(reinterpret_cast<uint64_t*>(destination), reinterpret_cast<uint64_t*>(result), addend);
    began(cudaGetLastError(), "adding");
}

rdma::Progress CudaMover::progress(uint64_t batch) {
    if (batches_.has_landed(batch)) return rdma::Progress::kDone;
    if (!failure_.empty()) return rdma::Progress::kFailed;
    const bool has_landed = batches_.look(
        batch, [this] { keep(cudaEventRecord(resources_->landed, resources_->stream), "recording an event"); },
        [this] {
            if (!failure_.empty()) return false;  // an event that was not recorded looks as if it had happened
            const cudaError_t status = cudaEventQuery(resources_->landed);
            if (status != cudaErrorNotReady) keep(status, "moving bytes");
            return status == cudaSuccess;
        });
    if (has_landed) return rdma::Progress::kDone;
    return failure_.empty() ? rdma::Progress::kPending : rdma::Progress::kFailed;
}

void CudaMover::drain() {
    static_cast<void>(cudaSetDevice(resources_->device));
    keep(cudaStreamSynchronize(resources_->stream), "waiting for the software NIC's stream");
    if (failure_.empty()) batches_.land_all();
}

void CudaMover::store_state(rdma::QueuePairState* state, const rdma::QueuePairState& value) {
    static_cast<void>(cudaSetDevice(resources_->device));
    check_runtime(cudaMemcpyAsync(state, &value, sizeof(value), cudaMemcpyDefault, resources_->stream), "setting a queue pair's counters");
    check_runtime(cudaStreamSynchronize(resources_->stream), "setting a queue pair's counters");
}

}  // namespace deepep::ibgda
