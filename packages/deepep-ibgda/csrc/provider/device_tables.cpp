#include "provider/device_tables.hpp"

#include <cstring>
#include <string>
#include <vector>

#include "deepep/memory/symmetric.hpp"

namespace deepep::ibgda {
namespace {

// Lays arrays one behind the other in a host image of the device's memory.
class Image {
public:
    template <class T>
    size_t append(const T* values, int64_t count) {
        const size_t offset = (bytes_.size() + 15) / 16 * 16;
        bytes_.resize(offset + sizeof(T) * static_cast<size_t>(count));
        if (count != 0) std::memcpy(bytes_.data() + offset, values, sizeof(T) * static_cast<size_t>(count));
        return offset;
    }
    const std::vector<uint8_t>& bytes() const { return bytes_; }

private:
    std::vector<uint8_t> bytes_;
};

}  // namespace

DeviceTables::DeviceTables(int device) : device_(device) {
    check_runtime(cudaSetDevice(device), "selecting CUDA device " + std::to_string(device));
    check_runtime(cudaStreamCreateWithFlags(&stream_, cudaStreamNonBlocking), "making a stream to fill tables of queue pairs");
}

DeviceTables::~DeviceTables() {
    static_cast<void>(cudaSetDevice(device_));
    static_cast<void>(cudaStreamDestroy(stream_));
    static_cast<void>(cudaFree(memory_));
}

void DeviceTables::update(const rdma::RdmaView& host) {
    if (host.num_peers > kMaxPeers)
        throw ArgumentError("queue pairs to " + std::to_string(host.num_peers) + " ranks were asked for; at most " + std::to_string(kMaxPeers) +
                            " are supported.");
    const int64_t num_pairs = static_cast<int64_t>(host.num_peers) * host.num_queue_pairs;
    Image image;
    const size_t pairs_at = image.append(host.queue_pairs, num_pairs);
    const size_t local_keys_at = image.append(host.local.keys, host.local.num_chunks());
    std::vector<size_t> keys_at;
    for (int peer = 0; peer < host.num_peers; ++peer) keys_at.push_back(image.append(host.remote[peer].keys, host.remote[peer].num_chunks()));

    // The table of keys holds addresses, so the memory comes before it is filled in.
    std::vector<rdma::MemoryKeys> remote(host.remote, host.remote + host.num_peers);
    const size_t remote_at = image.append(remote.data(), host.num_peers);
    check_runtime(cudaSetDevice(device_), "selecting CUDA device " + std::to_string(device_));
    if (image.bytes().size() > num_bytes_) {
        check_runtime(cudaFree(memory_), "freeing tables of queue pairs");
        memory_ = nullptr;
        num_bytes_ = 0;
        check_runtime(cudaMalloc(&memory_, image.bytes().size()), "allocating tables of queue pairs");
        num_bytes_ = image.bytes().size();
    }
    for (int peer = 0; peer < host.num_peers; ++peer) remote[peer].keys = reinterpret_cast<const rdma::Be32*>(memory_ + keys_at[peer]);
    const auto copy = [&](size_t at, const void* source, size_t num_bytes) {
        check_runtime(cudaMemcpyAsync(memory_ + at, source, num_bytes, cudaMemcpyHostToDevice, stream_), "filling tables of queue pairs");
    };
    copy(0, image.bytes().data(), image.bytes().size());
    copy(remote_at, remote.data(), sizeof(rdma::MemoryKeys) * remote.size());
    check_runtime(cudaStreamSynchronize(stream_), "filling tables of queue pairs");

    peers_ = {};
    peers_.view = {host.num_peers, host.num_queue_pairs, reinterpret_cast<const rdma::QueuePair*>(memory_ + pairs_at), host.local,
                   reinterpret_cast<const rdma::MemoryKeys*>(memory_ + remote_at)};
    peers_.view.local.keys = reinterpret_cast<const rdma::Be32*>(memory_ + local_keys_at);
    for (int peer = 0; peer < host.num_peers; ++peer)
        if (host.queue_pair(peer, 0).depth != 0) peers_.is_remote[peer / 32] |= 1u << peer % 32;
}

}  // namespace deepep::ibgda
