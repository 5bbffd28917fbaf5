#include "memory.hpp"

#include <dlfcn.h>

#include <atomic>
#include <cstdlib>
#include <cstring>
#include <map>

#include "log.hpp"

namespace standin {
namespace {

// The few calls of the CUDA driver that are needed, declared here: the build needs no CUDA.
struct Driver {
    using Status = int;
    using Handle = void*;
    using Address = unsigned long long;
    Status (*pointer_attribute)(void* data, int attribute, Address);
    Status (*device_get)(int* device, int ordinal);
    Status (*primary_context)(Handle* context, int device);
    Status (*set_context)(Handle context);
    Status (*current_context)(Handle* context);
    Status (*stream_create)(Handle* stream, unsigned flags);
    Status (*stream_synchronize)(Handle stream);
    Status (*to_device)(Address destination, const void* source, size_t, Handle stream);
    Status (*from_device)(void* destination, Address source, size_t, Handle stream);
    Status (*pin)(void* address, size_t, unsigned flags);

    // nullptr: this machine has none.
    static const Driver* get() {
        static const Driver* const driver = load();
        return driver;
    }

  private:
    static const Driver* load() {
        const char* name = std::getenv("STANDIN_VERBS_CUDA");
        void* const library = dlopen(name != nullptr ? name : "libcuda.so.1", RTLD_NOW | RTLD_LOCAL);
        if (library == nullptr) return nullptr;
        auto* const driver = new Driver;
        bool is_complete = true;
        const auto find = [&](auto* function, const char* symbol) {
            *reinterpret_cast<void**>(function) = dlsym(library, symbol);
            is_complete &= *function != nullptr;
        };
        find(&driver->pointer_attribute, "cuPointerGetAttribute");
        find(&driver->device_get, "cuDeviceGet");
        find(&driver->primary_context, "cuDevicePrimaryCtxRetain");
        find(&driver->set_context, "cuCtxSetCurrent");
        find(&driver->current_context, "cuCtxGetCurrent");
        find(&driver->stream_create, "cuStreamCreate");
        find(&driver->stream_synchronize, "cuStreamSynchronize");
        find(&driver->to_device, "cuMemcpyHtoDAsync_v2");
        find(&driver->from_device, "cuMemcpyDtoHAsync_v2");
        find(&driver->pin, "cuMemHostRegister_v2");
        if (!is_complete) say("the CUDA driver lacks a call; memory of GPUs is not reached");
        return is_complete ? driver : nullptr;
    }
};

constexpr int kMemoryType = 2, kDeviceOrdinal = 9;     // CU_POINTER_ATTRIBUTE_...
constexpr unsigned kDeviceMemory = 2;                  // CU_MEMORYTYPE_DEVICE
constexpr unsigned kNonBlocking = 1, kPortable = 1;    // CU_STREAM_NON_BLOCKING, CU_MEMHOSTREGISTER_PORTABLE

struct Gpu {
    Driver::Handle context = nullptr, stream = nullptr;
};
std::mutex gpus_mutex;
std::map<int, Gpu>& gpus() {
    static auto* const all = new std::map<int, Gpu>;  // never destroyed: the agent outlives static objects
    return *all;
}

// The caller's context is again the current one at the end.
class ContextGuard {
  public:
    ContextGuard(const Driver& driver, Driver::Handle context) : driver_(driver) {
        driver_.current_context(&before_);
        status = driver_.set_context(context);
    }
    ~ContextGuard() { driver_.set_context(before_); }
    Driver::Status status;

  private:
    const Driver& driver_;
    Driver::Handle before_ = nullptr;
};

}  // namespace

int device_of(const void* address) {
    const Driver* const driver = Driver::get();
    if (driver == nullptr) return kHost;
    unsigned type = 0;
    int ordinal = kHost;
    const auto number = reinterpret_cast<Driver::Address>(address);
    if (driver->pointer_attribute(&type, kMemoryType, number) != 0 || type != kDeviceMemory) return kHost;
    return driver->pointer_attribute(&ordinal, kDeviceOrdinal, number) == 0 ? ordinal : kHost;
}

void Copier::prepare(int device, void* shared, size_t num_bytes) {
    const std::lock_guard lock(gpus_mutex);
    if (device == kHost || gpus().count(device) != 0) return;
    const Driver& driver = *Driver::get();
    Gpu gpu;
    int handle = 0;
    if (driver.device_get(&handle, device) != 0 || driver.primary_context(&gpu.context, handle) != 0) {
        say("no context on GPU %d", device);
        return;
    }
    const ContextGuard guard(driver, gpu.context);
    if (driver.stream_create(&gpu.stream, kNonBlocking) != 0) {
        say("no stream on GPU %d", device);
        return;
    }
    static std::atomic<bool> is_pinned = false;
    if (!is_pinned.exchange(true)) {
        const int status = driver.pin(shared, num_bytes, kPortable);
        if (status != 0) say("the shared memory is not pinned (CUDA error %d): copies are slower", status);
    }
    gpus()[device] = gpu;
    say("GPU %d is ready", device);
}

void Copier::copy(int device, void* destination, const void* source, uint64_t num_bytes, bool is_to_device) {
    Gpu gpu;
    {
        const std::lock_guard lock(gpus_mutex);
        gpu = gpus()[device];
    }
    const Driver& driver = *Driver::get();
    int status = gpu.stream == nullptr ? -1 : driver.set_context(gpu.context);  // the thread is ours
    if (status == 0)
        status = is_to_device
                     ? driver.to_device(reinterpret_cast<Driver::Address>(destination), source, num_bytes, gpu.stream)
                     : driver.from_device(destination, reinterpret_cast<Driver::Address>(source), num_bytes, gpu.stream);
    if (status != 0) {
        if (!has_failed_) say("a copy of %lu bytes on GPU %d: CUDA error %d", num_bytes, device, status);
        has_failed_ = true;
        return;
    }
    for (int pending : pending_)
        if (pending == device) return;
    pending_.push_back(device);
}

void Copier::to_region(const Region& region, uint64_t address, const void* shared, uint64_t num_bytes) {
    uint8_t* const destination = region.at(address);
    if (num_bytes == 0) return;
    if (region.device != kHost) return copy(region.device, destination, shared, num_bytes, true);
    // Aligned words land whole and behind everything before: they may be flags.
    if (num_bytes == 8 && reinterpret_cast<uintptr_t>(destination) % 8 == 0) {
        uint64_t word;
        std::memcpy(&word, shared, 8);
        __atomic_store_n(reinterpret_cast<uint64_t*>(destination), word, __ATOMIC_RELEASE);
    } else if (num_bytes == 4 && reinterpret_cast<uintptr_t>(destination) % 4 == 0) {
        uint32_t word;
        std::memcpy(&word, shared, 4);
        __atomic_store_n(reinterpret_cast<uint32_t*>(destination), word, __ATOMIC_RELEASE);
    } else {
        std::memcpy(destination, shared, num_bytes);
    }
}

void Copier::from_region(const Region& region, uint64_t address, void* shared, uint64_t num_bytes) {
    if (num_bytes == 0) return;
    if (region.device != kHost) return copy(region.device, shared, region.at(address), num_bytes, false);
    std::memcpy(shared, region.at(address), num_bytes);
}

bool Copier::finish() {
    for (int device : pending_) {
        Gpu gpu;
        {
            const std::lock_guard lock(gpus_mutex);
            gpu = gpus()[device];
        }
        const Driver& driver = *Driver::get();
        int status = driver.set_context(gpu.context);
        if (status == 0) status = driver.stream_synchronize(gpu.stream);
        if (status != 0) {
            if (!has_failed_) say("waiting for copies on GPU %d: CUDA error %d", device, status);
            has_failed_ = true;
        }
    }
    pending_.clear();
    return !has_failed_;
}

// --- regions --------------------------------------------------------------------------------------------------------

Region* Regions::add(ibv_pd* pd, void* local, uint64_t start, uint64_t num_bytes, int access, int device) {
    const std::lock_guard lock(mutex_);
    size_t place = 1;  // no key is 0
    if (places_.empty()) places_.resize(1);
    while (place < places_.size() && places_[place].region != nullptr) ++place;
    if (place >= 1u << 20) return nullptr;
    if (place == places_.size()) places_.emplace_back();
    const uint32_t key = process_ << 28 | static_cast<uint32_t>(place) << 8 | ++places_[place].generation;
    auto* const region = new Region{};
    region->context = pd->context;
    region->pd = pd;
    region->addr = local;
    region->length = num_bytes;
    region->lkey = region->rkey = key;
    region->start = start;
    region->local = static_cast<uint8_t*>(local);
    region->num_bytes = num_bytes;
    region->access = access;
    region->device = device;
    places_[place].region = region;
    return region;
}

bool Regions::remove(const Region* region) {
    const std::lock_guard lock(mutex_);
    const size_t place = region->lkey >> 8 & 0xfffff;
    if (place >= places_.size() || places_[place].region != region) return false;
    delete places_[place].region;
    places_[place].region = nullptr;
    return true;
}

const Region* Regions::find(uint32_t key, uint64_t address, uint64_t num_bytes, int rights) const {
    const std::lock_guard lock(mutex_);
    const size_t place = key >> 8 & 0xfffff;
    if (place >= places_.size() || places_[place].region == nullptr) return nullptr;
    const Region& region = *places_[place].region;
    if (region.lkey != key || (region.access & rights) != rights) return nullptr;
    if (address < region.start || address - region.start > region.num_bytes) return nullptr;
    return num_bytes <= region.num_bytes - (address - region.start) ? &region : nullptr;
}

}  // namespace standin
