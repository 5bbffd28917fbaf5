#pragma once
// Arenas of ordinary memory, shared between the processes of a host like symmetric memory of GPUs: file descriptors stand for segments.
#include <sys/mman.h>
#include <unistd.h>

#include <cuda.h>
#include <cuda_runtime.h>

#include <cstdint>
#include <string>
#include <vector>

#include "../common/exceptions.hpp"

namespace deepep {

inline void check_runtime(cudaError_t status, const std::string& action) {
    if (status != cudaSuccess) throw DriverError(action + ": the emulator answered " + std::to_string(static_cast<int>(status)) + ".");
}

// The driver's calls by name: the only one that anybody asks for.
class DriverApi {
public:
    static const DriverApi& get() {
        static const DriverApi api;
        return api;
    }
    void check(CUresult, const std::string&) const {}
    static void find(const char*, decltype(&::cuFuncGetModule)& function) { function = &::cuFuncGetModule; }
};

class MappedRange {
public:
    MappedRange(int device, uint64_t num_reserved_bytes) : device_(device), num_reserved_bytes_(round_up(num_reserved_bytes)) {
        if (num_reserved_bytes_ == 0) throw ArgumentError("symmetric memory: num_reserved_bytes is 0; reserve at least one byte.");
        void* base = mmap(nullptr, num_reserved_bytes_, PROT_NONE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
        if (base == MAP_FAILED) throw DriverError("reserving addresses failed.");
        base_ = reinterpret_cast<uint64_t>(base);
    }
    MappedRange(const MappedRange&) = delete;
    MappedRange& operator=(const MappedRange&) = delete;
    ~MappedRange() { close(); }

    int device() const { return device_; }
    uint64_t base() const { return base_; }
    uint64_t num_bytes() const { return num_mapped_bytes_; }
    uint64_t num_reserved_bytes() const { return num_reserved_bytes_; }
    uint64_t granularity() const { return kGranularity; }
    size_t num_segments() const { return segments_.size(); }
    uint64_t segment_bytes(size_t segment) const { return segments_.at(segment).num_bytes; }

    void close() noexcept {
        if (base_ == 0) return;
        munmap(reinterpret_cast<void*>(base_), num_reserved_bytes_);
        for (const Segment& segment : segments_) ::close(segment.fd);
        segments_.clear();
        base_ = num_mapped_bytes_ = 0;
    }

protected:
    static constexpr uint64_t kGranularity = 2 << 20;
    struct Segment {
        int fd;
        uint64_t num_bytes;
    };

    static uint64_t round_up(uint64_t num_bytes) { return (num_bytes + kGranularity - 1) / kGranularity * kGranularity; }
    void require_open() const {
        if (base_ == 0) throw ArgumentError("symmetric memory: this range has been closed.");
    }
    void require_room(uint64_t num_bytes) const {
        require_open();
        if (num_bytes > num_reserved_bytes_ - num_mapped_bytes_)
            throw ArgumentError("symmetric memory: " + std::to_string(num_bytes) + " more bytes do not fit behind " + std::to_string(num_mapped_bytes_) + " of " +
                                std::to_string(num_reserved_bytes_) + " reserved bytes. Reserve more at construction.");
    }
    void append(int fd, uint64_t num_bytes) {
        void* const at = reinterpret_cast<void*>(base_ + num_mapped_bytes_);
        if (mmap(at, num_bytes, PROT_READ | PROT_WRITE, MAP_SHARED | MAP_FIXED, fd, 0) == MAP_FAILED) throw DriverError("mapping a segment failed.");
        segments_.push_back({fd, num_bytes});
        num_mapped_bytes_ += num_bytes;
    }

    int device_;
    uint64_t base_ = 0, num_reserved_bytes_, num_mapped_bytes_ = 0;
    std::vector<Segment> segments_;
};

class Arena : public MappedRange {
public:
    using MappedRange::MappedRange;

    size_t grow(uint64_t num_bytes) {
        num_bytes = round_up(num_bytes);
        require_room(num_bytes);
        const int fd = memfd_create("arena", MFD_CLOEXEC);
        if (fd < 0 || ftruncate(fd, static_cast<off_t>(num_bytes)) != 0) throw DriverError("allocating a segment failed.");
        append(fd, num_bytes);
        return segments_.size() - 1;
    }
    int export_fd(size_t segment) const {
        require_open();
        return dup(segments_.at(segment).fd);
    }
};

class PeerArena : public MappedRange {
public:
    using MappedRange::MappedRange;

    void map_fd(int fd, uint64_t num_bytes) {
        require_room(num_bytes);
        append(dup(fd), num_bytes);
    }
};

}  // namespace deepep
