#pragma once
#include <cstdint>
#include <map>
#include <mutex>
#include <string>

#include "../common/exceptions.hpp"

namespace deepep {

// First-fit allocator over an address range that somebody else owns. It hands out addresses and never touches the memory, so it serves
// device memory; torch's caching allocator sits on top of it and asks for large blocks only.
class Heap {
public:
    Heap(uint64_t base, uint64_t num_bytes, uint64_t granule) : base_(base), num_bytes_(0), granule_(granule) {
        if (granule == 0 || (granule & (granule - 1)) != 0)
            throw ArgumentError("heap granule is " + std::to_string(granule) + " bytes; it must be a power of two.");
        if (base % granule != 0) throw ArgumentError("heap base " + std::to_string(base) + " is not a multiple of its granule.");
        extend(num_bytes);
    }

    // 0 when no free range is long enough.
    uint64_t allocate(uint64_t num_bytes) {
        const std::lock_guard<std::mutex> lock(mutex_);
        if (num_bytes == 0) num_bytes = 1;
        if (num_bytes > num_bytes_) return 0;
        const uint64_t wanted = round_up(num_bytes);
        for (auto range = free_.begin(); range != free_.end(); ++range) {
            if (range->second < wanted) continue;
            const auto [address, length] = *range;
            free_.erase(range);
            if (length > wanted) free_[address + wanted] = length - wanted;
            used_[address] = wanted;
            return address;
        }
        return 0;
    }

    void free(uint64_t address) {
        const std::lock_guard<std::mutex> lock(mutex_);
        const auto block = used_.find(address);
        if (block == used_.end()) throw ArgumentError("heap free: " + std::to_string(address) + " is not an allocated address.");
        const uint64_t length = block->second;
        used_.erase(block);
        insert_free(address, length);
    }

    // The range has grown at its end.
    void extend(uint64_t num_bytes) {
        const std::lock_guard<std::mutex> lock(mutex_);
        num_bytes = num_bytes / granule_ * granule_;
        if (num_bytes == 0) return;
        insert_free(base_ + num_bytes_, num_bytes);
        num_bytes_ += num_bytes;
    }

    bool contains(uint64_t address) const { return address >= base_ && address - base_ < num_bytes_; }
    uint64_t base() const { return base_; }
    uint64_t num_bytes() const { return num_bytes_; }
    uint64_t num_free_bytes() const {
        const std::lock_guard<std::mutex> lock(mutex_);
        uint64_t total = 0;
        for (const auto& range : free_) total += range.second;
        return total;
    }
    uint64_t num_largest_free_bytes() const {
        const std::lock_guard<std::mutex> lock(mutex_);
        uint64_t largest = 0;
        for (const auto& range : free_) largest = range.second > largest ? range.second : largest;
        return largest;
    }

private:
    uint64_t round_up(uint64_t num_bytes) const { return (num_bytes + granule_ - 1) / granule_ * granule_; }

    // Adds a free range and joins it with its neighbours. The lock is held.
    void insert_free(uint64_t address, uint64_t length) {
        auto next = free_.lower_bound(address);
        if (next != free_.end() && address + length == next->first) {
            length += next->second;
            next = free_.erase(next);
        }
        if (next != free_.begin()) {
            auto previous = next;
            --previous;
            if (previous->first + previous->second == address) {
                previous->second += length;
                return;
            }
        }
        free_[address] = length;
    }

    const uint64_t base_;
    uint64_t num_bytes_;
    const uint64_t granule_;
    mutable std::mutex mutex_;
    std::map<uint64_t, uint64_t> free_;  // address -> length
    std::map<uint64_t, uint64_t> used_;
};

}  // namespace deepep
