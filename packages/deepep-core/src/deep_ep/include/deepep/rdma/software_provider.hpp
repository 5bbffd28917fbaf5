#pragma once
// Queue pairs and keys from a software NIC, as a provider. Host only.
#include <cstdint>
#include <string>
#include <vector>

#include "software_nic.hpp"

namespace deepep::rdma {

template <class Mover = MemcpyMover>
class SoftwareProvider final : public QueuePairProvider {
public:
    struct Shape {
        int32_t rank;  // this rank gets no queue pair to itself
        int32_t num_peers;
        int32_t num_queue_pairs;  // for each peer
        uint32_t depth;
        std::vector<bool> is_remote = {};  // by peer: which ones get queue pairs; empty: all but this rank

        bool has_pairs(int32_t peer) const { return peer != rank && (is_remote.empty() || is_remote.at(peer)); }
        int64_t num_pairs() const { return static_cast<int64_t>(num_peers) * num_queue_pairs; }
        int64_t num_queue_bytes() const { return num_pairs() * QueueMemory{depth}.num_bytes(); }
    };

    // queue_memory: shape.num_queue_bytes(), read and written by posters and the NIC; states [shape.num_pairs()]: by posters only.
    SoftwareProvider(SoftwareNic<Mover>& nic, const Shape& shape, uint8_t* queue_memory, QueuePairState* states)
        : nic_(nic), shape_(shape), remote_(shape.num_peers), remote_keys_(shape.num_peers) {
        for (int32_t peer = 0; peer < shape.num_peers; ++peer)
            for (int32_t lane = 0; lane < shape.num_queue_pairs; ++lane) {
                const int64_t i = static_cast<int64_t>(pairs_.size());
                QueuePair pair = {};
                if (shape.has_pairs(peer))
                    pair = nic.create_queue_pair(peer, shape.depth, queue_memory + i * QueueMemory{shape.depth}.num_bytes(), states + i);
                pairs_.push_back(pair);
            }
    }
    ~SoftwareProvider() override {
        for (const Be32 key : local_keys_) nic_.deregister_memory(key);
        for (const auto& keys : remote_keys_)
            for (const Be32 key : keys) nic_.deregister_memory(key);
    }

    // This rank's memory: `base` is its address as posters name it, `mapped` as this process reaches it.
    void set_local(uint64_t base, uint8_t* mapped, int64_t num_bytes, int64_t chunk_bytes) {
        local_ = set(SoftwareNic<Mover>::kLocal, base, mapped, num_bytes, chunk_bytes, local_keys_);
    }
    void set_remote(int32_t peer, uint64_t base, uint8_t* mapped, int64_t num_bytes, int64_t chunk_bytes) {
        remote_.at(peer) = set(peer, base, mapped, num_bytes, chunk_bytes, remote_keys_.at(peer));
    }

    const char* name() const override { return "software NIC"; }
    RdmaView view() const override { return {shape_.num_peers, shape_.num_queue_pairs, pairs_.data(), local_, remote_.data()}; }
    QueueFault first_fault(uint32_t queue_pair) const override { return nic_.first_fault(queue_pair); }
    void reset() override {
        for (const QueuePair& pair : pairs_)
            if (pair.depth != 0) nic_.reset_queue_pair(pair.number);
    }

private:
    MemoryKeys set(int32_t peer, uint64_t base, uint8_t* mapped, int64_t num_bytes, int64_t chunk_bytes, std::vector<Be32>& keys) {
        if (num_bytes <= 0 || chunk_bytes <= 0)
            throw ArgumentError("memory of " + std::to_string(num_bytes) + " bytes in chunks of " + std::to_string(chunk_bytes) +
                                " cannot be registered; both must be positive.");
        for (const Be32 key : keys) nic_.deregister_memory(key);
        keys.clear();
        for (int64_t offset = 0; offset < num_bytes; offset += chunk_bytes)
            keys.push_back(nic_.register_memory(peer, base + offset, mapped + offset, min_of(chunk_bytes, num_bytes - offset)));
        return {base, num_bytes, chunk_bytes, 0, keys.data()};
    }

    SoftwareNic<Mover>& nic_;
    const Shape shape_;
    std::vector<QueuePair> pairs_;
    MemoryKeys local_ = {};
    std::vector<Be32> local_keys_;
    std::vector<MemoryKeys> remote_;
    std::vector<std::vector<Be32>> remote_keys_;
};

}  // namespace deepep::rdma
