#include "provider/probe.hpp"

#include <cstring>

#include "deepep/memory/symmetric.hpp"
#include "remote.cuh"

namespace deepep::ibgda {
namespace {

constexpr int kNumThreads = 32;

DEEPEP_HOST_DEVICE uint64_t probe_word(uint32_t nonce, int source, int lane) {
    return static_cast<uint64_t>(nonce) << 32 | static_cast<uint32_t>(source + 1) << 8 | static_cast<uint32_t>(lane);
}

// Every thread has queue pairs of its own; all words are under way before the first completion is waited for.
__global__ void post_words(const __grid_constant__ RemotePeers remote, const __grid_constant__ WaitContext context, uint32_t nonce) {
    const int num_lanes = remote.view.num_queue_pairs;
    const int num_pairs = remote.view.num_peers * num_lanes;
    for (int i = static_cast<int>(threadIdx.x); i < num_pairs; i += kNumThreads) {
        const int peer = i / num_lanes, lane = i % num_lanes;
        if (!remote.has(peer)) continue;
        const uint64_t word = probe_word(nonce, context.rank, lane);
        const uint32_t words[2] = {static_cast<uint32_t>(word), static_cast<uint32_t>(word >> 32)};
        if (!post_inline(remote, context, peer, lane, int64_t{8} * (context.rank * num_lanes + lane), words, 2)) return;
    }
    for (int i = static_cast<int>(threadIdx.x); i < num_pairs; i += kNumThreads)
        if (remote.has(i / num_lanes) && !wait_posted(remote, context, i / num_lanes, i % num_lanes)) return;
}

// Everything that a probe needs, given back whatever happens.
struct Resources {
    HostControl* host = nullptr;
    DeviceState* state = nullptr;
    cudaStream_t stream = nullptr;

    explicit Resources(int device) {
        check_runtime(cudaSetDevice(device), "selecting CUDA device " + std::to_string(device));
        check_runtime(cudaHostAlloc(&host, sizeof(HostControl), cudaHostAllocPortable | cudaHostAllocMapped), "allocating a pinned page");
        check_runtime(cudaMalloc(&state, sizeof(DeviceState)), "allocating a probe's state");
        check_runtime(cudaStreamCreateWithFlags(&stream, cudaStreamNonBlocking), "making a stream");
        std::memset(static_cast<void*>(host), 0, sizeof(HostControl));
        check_runtime(cudaMemsetAsync(state, 0, sizeof(DeviceState), stream), "clearing a probe's state");
    }
    Resources(const Resources&) = delete;
    Resources& operator=(const Resources&) = delete;
    ~Resources() {
        if (stream != nullptr) static_cast<void>(cudaStreamDestroy(stream));
        if (state != nullptr) static_cast<void>(cudaFree(state));
        if (host != nullptr) static_cast<void>(cudaFreeHost(host));
    }
};

}  // namespace

std::string post_probe(const Probe& probe, double timeout_s) {
    if (!probe.remote.any()) return "";
    const Resources resources(probe.device);
    resources.host->timeout_ns = static_cast<uint64_t>(timeout_s * 1e9);
    const WaitContext context = {resources.host, resources.state, Op::kDispatch, probe.rank, 1};
    post_words<<<1, kNumThreads, 0, resources.stream>>>(probe.remote, context, probe.nonce);
    check_runtime(cudaGetLastError(), "launching a probe of the queue pairs");
    check_runtime(cudaStreamSynchronize(resources.stream), "running a probe of the queue pairs");
    const ErrorRecord& error = resources.host->error;
    return error.generation == 0 ? "" : describe_failure(error.peer, error.seen, error.expected);
}

std::vector<std::pair<int, int>> missing_of_probe(const Probe& probe) {
    std::vector<std::pair<int, int>> missing;
    if (!probe.remote.any()) return missing;
    std::vector<uint64_t> words(static_cast<size_t>(probe.num_bytes() / 8));
    const Resources resources(probe.device);
    check_runtime(cudaMemcpyAsync(words.data(), probe.arena, words.size() * 8, cudaMemcpyDeviceToHost, resources.stream), "reading a probe");
    check_runtime(cudaStreamSynchronize(resources.stream), "reading a probe");
    const int num_lanes = probe.remote.view.num_queue_pairs;
    for (int peer = 0; peer < probe.remote.view.num_peers; ++peer)
        for (int lane = 0; lane < num_lanes; ++lane)
            if (probe.remote.has(peer) && words[static_cast<size_t>(peer) * num_lanes + lane] != probe_word(probe.nonce, peer, lane))
                missing.emplace_back(peer, lane);
    return missing;
}

}  // namespace deepep::ibgda
