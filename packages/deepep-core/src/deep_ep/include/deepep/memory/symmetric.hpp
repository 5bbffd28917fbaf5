#pragma once
// Symmetric memory: every rank reserves an arena of one size, backs it with physical memory, sends a POSIX file descriptor for each piece to its
// peers and maps theirs. Header-only, for every kernel package. Needs CUDA's headers; the driver is found at run time, so nothing links
// against it and an extension that includes this file loads on a machine without a GPU. Multicast objects are never created.
#include <cuda.h>
#include <cuda_runtime.h>
#include <unistd.h>

#include <cstdint>
#include <string>
#include <vector>

#include "../common/exceptions.hpp"

namespace deepep {

// The driver's calls that symmetric memory and its users need, looked up once.
class DriverApi {
public:
    static const DriverApi& get() {
        static const DriverApi api;
        return api;
    }

    decltype(&::cuGetErrorString) get_error_string;
    decltype(&::cuMemAddressReserve) address_reserve;
    decltype(&::cuMemAddressFree) address_free;
    decltype(&::cuMemCreate) create;
    decltype(&::cuMemRelease) release;
    decltype(&::cuMemMap) map;
    decltype(&::cuMemUnmap) unmap;
    decltype(&::cuMemSetAccess) set_access;
    decltype(&::cuMemGetAllocationGranularity) get_granularity;
    decltype(&::cuMemExportToShareableHandle) export_handle;
    decltype(&::cuMemImportFromShareableHandle) import_handle;

    void check(CUresult result, const std::string& action) const {
        if (result == CUDA_SUCCESS) return;
        const char* text = nullptr;
        get_error_string(result, &text);
        throw DriverError(action + ": the CUDA driver answered " + std::to_string(static_cast<int>(result)) + " (" +
                          (text != nullptr ? text : "no description") + ").");
    }

private:
    DriverApi() {
        find("cuGetErrorString", get_error_string);
        find("cuMemAddressReserve", address_reserve);
        find("cuMemAddressFree", address_free);
        find("cuMemCreate", create);
        find("cuMemRelease", release);
        find("cuMemMap", map);
        find("cuMemUnmap", unmap);
        find("cuMemSetAccess", set_access);
        find("cuMemGetAllocationGranularity", get_granularity);
        find("cuMemExportToShareableHandle", export_handle);
        find("cuMemImportFromShareableHandle", import_handle);
    }

public:
    // A call by its name without version suffix, for those who need others than these.
    template <class Function>
    static void find(const char* name, Function& function) {
        void* address = nullptr;
        cudaDriverEntryPointQueryResult found = cudaDriverEntryPointSymbolNotFound;
#if CUDART_VERSION >= 12050
        const cudaError_t status = cudaGetDriverEntryPointByVersion(name, &address, 12000, cudaEnableDefault, &found);
#else
        const cudaError_t status = cudaGetDriverEntryPoint(name, &address, cudaEnableDefault, &found);
#endif
        if (status != cudaSuccess)
            throw DriverError(std::string("looking up ") + name + ": " + cudaGetErrorString(status) +
                              ". Symmetric memory needs an NVIDIA driver with CUDA 12 or newer.");
        if (found != cudaDriverEntryPointSuccess || address == nullptr)
            throw DriverError(std::string("the CUDA driver has no ") + name + "; symmetric memory needs a driver with CUDA 12 or newer.");
        function = reinterpret_cast<Function>(address);
    }
};

inline void check_runtime(cudaError_t status, const std::string& action) {
    if (status == cudaSuccess) return;
    static_cast<void>(cudaGetLastError());  // a refused call must not surface again in somebody else's check
    throw DriverError(action + ": CUDA answered " + cudaGetErrorName(status) + " (" + cudaGetErrorString(status) + ").");
}

// A range of device addresses with physical segments mapped one behind the other.
class MappedRange {
public:
    MappedRange(int device, uint64_t num_reserved_bytes) : device_(device) {
        check_runtime(cudaSetDevice(device), "selecting CUDA device " + std::to_string(device));
        check_runtime(cudaFree(nullptr), "initialising CUDA device " + std::to_string(device));
        const auto& driver = DriverApi::get();
        const CUmemAllocationProp property = allocation_property();
        size_t granularity = 0;
        driver.check(driver.get_granularity(&granularity, &property, CU_MEM_ALLOC_GRANULARITY_RECOMMENDED), "asking for the allocation granularity");
        granularity_ = granularity;
        num_reserved_bytes_ = round_up(num_reserved_bytes);
        if (num_reserved_bytes_ == 0) throw ArgumentError("symmetric memory: num_reserved_bytes is 0; reserve at least one byte.");
        driver.check(driver.address_reserve(&base_, num_reserved_bytes_, granularity_, 0, 0),
                     "reserving " + std::to_string(num_reserved_bytes_) + " bytes of device addresses");
    }
    MappedRange(const MappedRange&) = delete;
    MappedRange& operator=(const MappedRange&) = delete;
    ~MappedRange() { close(); }

    int device() const { return device_; }
    uint64_t base() const { return base_; }
    uint64_t num_bytes() const { return num_mapped_bytes_; }
    uint64_t num_reserved_bytes() const { return num_reserved_bytes_; }
    uint64_t granularity() const { return granularity_; }
    size_t num_segments() const { return segments_.size(); }
    uint64_t segment_bytes(size_t segment) const { return segments_.at(segment).num_bytes; }

    // May be called twice; never throws. The caller has made sure that no kernel uses the range any more.
    void close() noexcept {
        if (base_ == 0) return;
        try {
            const auto& driver = DriverApi::get();
            static_cast<void>(cudaSetDevice(device_));
            uint64_t offset = 0;
            for (const auto& segment : segments_) {
                driver.unmap(base_ + offset, segment.num_bytes);
                driver.release(segment.handle);
                offset += segment.num_bytes;
            }
            driver.address_free(base_, num_reserved_bytes_);
        } catch (const NativeError&) {
            // Without a driver there is nothing to give back.
        }
        segments_.clear();
        base_ = 0;
        num_mapped_bytes_ = 0;
    }

protected:
    struct Segment {
        CUmemGenericAllocationHandle handle;
        uint64_t num_bytes;
    };

    CUmemAllocationProp allocation_property() const {
        CUmemAllocationProp property = {};
        property.type = CU_MEM_ALLOCATION_TYPE_PINNED;
        property.location.type = CU_MEM_LOCATION_TYPE_DEVICE;
        property.location.id = device_;
        property.requestedHandleTypes = CU_MEM_HANDLE_TYPE_POSIX_FILE_DESCRIPTOR;
        return property;
    }
    uint64_t round_up(uint64_t num_bytes) const { return (num_bytes + granularity_ - 1) / granularity_ * granularity_; }

    void require_open() const {
        if (base_ == 0) throw ArgumentError("symmetric memory: this range has been closed.");
    }
    void require_room(uint64_t num_bytes) const {
        require_open();
        if (num_bytes > num_reserved_bytes_ - num_mapped_bytes_)
            throw ArgumentError("symmetric memory: " + std::to_string(num_bytes) + " more bytes do not fit behind " + std::to_string(num_mapped_bytes_) +
                                " of " + std::to_string(num_reserved_bytes_) + " reserved bytes. Reserve more at construction.");
    }

    // Takes over the handle: maps it behind the others and lets this device read and write it.
    void append(CUmemGenericAllocationHandle handle, uint64_t num_bytes) {
        const auto& driver = DriverApi::get();
        const CUdeviceptr address = base_ + num_mapped_bytes_;
        CUresult result = driver.map(address, num_bytes, 0, handle, 0);
        if (result != CUDA_SUCCESS) {
            driver.release(handle);
            driver.check(result, "mapping " + std::to_string(num_bytes) + " bytes of symmetric memory");
        }
        CUmemAccessDesc access = {};
        access.location.type = CU_MEM_LOCATION_TYPE_DEVICE;
        access.location.id = device_;
        access.flags = CU_MEM_ACCESS_FLAGS_PROT_READWRITE;
        result = driver.set_access(address, num_bytes, &access, 1);
        if (result != CUDA_SUCCESS) {
            driver.unmap(address, num_bytes);
            driver.release(handle);
            driver.check(result, "letting CUDA device " + std::to_string(device_) + " access symmetric memory");
        }
        segments_.push_back({handle, num_bytes});
        num_mapped_bytes_ += num_bytes;
    }

    int device_;
    CUdeviceptr base_ = 0;
    uint64_t granularity_ = 0;
    uint64_t num_reserved_bytes_ = 0;
    uint64_t num_mapped_bytes_ = 0;
    std::vector<Segment> segments_;
};

// This rank's own arena.
class Arena : public MappedRange {
public:
    using MappedRange::MappedRange;

    // Backs the next num_bytes (rounded up to the granularity) with physical memory; returns the segment's number.
    size_t grow(uint64_t num_bytes) {
        num_bytes = round_up(num_bytes);
        require_room(num_bytes);
        const auto& driver = DriverApi::get();
        check_runtime(cudaSetDevice(device_), "selecting CUDA device " + std::to_string(device_));
        const CUmemAllocationProp property = allocation_property();
        CUmemGenericAllocationHandle handle = 0;
        driver.check(driver.create(&handle, num_bytes, &property, 0), "allocating " + std::to_string(num_bytes) + " bytes of symmetric memory");
        append(handle, num_bytes);
        return segments_.size() - 1;
    }

    // A file descriptor that stands for the segment; the caller closes it once it has been sent.
    int export_fd(size_t segment) const {
        require_open();
        const auto& driver = DriverApi::get();
        int fd = -1;
        driver.check(driver.export_handle(&fd, segments_.at(segment).handle, CU_MEM_HANDLE_TYPE_POSIX_FILE_DESCRIPTOR, 0),
                     "exporting symmetric memory as a file descriptor");
        return fd;
    }
};

// A peer's arena as this rank sees it. Its memory stays alive while it is mapped here, even when the peer's process has ended.
class PeerArena : public MappedRange {
public:
    using MappedRange::MappedRange;

    // Maps the peer's next segment; num_bytes as the peer's segment_bytes says. The file descriptor stays the caller's.
    void map_fd(int fd, uint64_t num_bytes) {
        if (num_bytes == 0 || num_bytes != round_up(num_bytes))
            throw ArgumentError("symmetric memory: a peer's segment has " + std::to_string(num_bytes) + " bytes, which is no multiple of " +
                                std::to_string(granularity_) + ".");
        require_room(num_bytes);
        const auto& driver = DriverApi::get();
        check_runtime(cudaSetDevice(device_), "selecting CUDA device " + std::to_string(device_));
        CUmemGenericAllocationHandle handle = 0;
        driver.check(driver.import_handle(&handle, reinterpret_cast<void*>(static_cast<uintptr_t>(fd)), CU_MEM_HANDLE_TYPE_POSIX_FILE_DESCRIPTOR),
                     "importing a peer's symmetric memory");
        append(handle, num_bytes);
    }
};

}  // namespace deepep
