// Stands in for the CUDA driver: one GPU, whose memory is memory of the host that nobody takes for it. A copy on a stream happens when the
// stream is waited for, and no earlier.
#include <sys/mman.h>

#include <atomic>
#include <cstdint>
#include <cstring>
#include <functional>
#include <mutex>
#include <vector>

namespace {

std::mutex mutex;
std::vector<std::pair<uintptr_t, size_t>>& device_memory() {
    static auto* const all = new std::vector<std::pair<uintptr_t, size_t>>;
    return *all;
}
bool is_on_device(unsigned long long address) {
    const std::lock_guard lock(mutex);
    for (const auto& [start, size] : device_memory())
        if (address >= start && address < start + size) return true;
    return false;
}

struct Stream {
    std::vector<std::function<void()>> copies;
};
thread_local void* context = nullptr;
int primary_context;

void copy(void* destination, const void* source, size_t num_bytes) {
    if (num_bytes == 8 && reinterpret_cast<uintptr_t>(destination) % 8 == 0) {
        uint64_t word;
        std::memcpy(&word, source, 8);
        __atomic_store_n(static_cast<uint64_t*>(destination), word, __ATOMIC_RELEASE);
    } else {
        std::memcpy(destination, source, num_bytes);
    }
}

}  // namespace

extern "C" {

void* fake_device_memory(size_t num_bytes) {
    void* const memory = mmap(nullptr, num_bytes, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
    const std::lock_guard lock(mutex);
    device_memory().emplace_back(reinterpret_cast<uintptr_t>(memory), num_bytes);
    return memory;
}

int cuPointerGetAttribute(void* data, int attribute, unsigned long long address) {
    if (!is_on_device(address)) return 1;
    const int value = attribute == 2 ? 2 : 0;  // memory of a device; device 0
    std::memcpy(data, &value, sizeof(value));
    return 0;
}
int cuDeviceGet(int* device, int ordinal) { return *device = ordinal, 0; }
int cuDevicePrimaryCtxRetain(void** result, int device) { return *result = &primary_context, device; }
int cuCtxSetCurrent(void* next) { return context = next, 0; }
int cuCtxGetCurrent(void** current) { return *current = context, 0; }
int cuStreamCreate(void** stream, unsigned flags) {
    if (context != &primary_context || flags != 1) return 1;
    return *stream = new Stream, 0;
}
int cuStreamSynchronize(void* stream) {
    if (context != &primary_context) return 201;
    auto& copies = static_cast<Stream*>(stream)->copies;
    for (const auto& each : copies) each();
    copies.clear();
    return 0;
}
int cuMemcpyHtoDAsync_v2(unsigned long long destination, const void* source, size_t num_bytes, void* stream) {
    if (context != &primary_context || !is_on_device(destination)) return 1;
    static_cast<Stream*>(stream)->copies.push_back([=] { copy(reinterpret_cast<void*>(destination), source, num_bytes); });
    return 0;
}
int cuMemcpyDtoHAsync_v2(void* destination, unsigned long long source, size_t num_bytes, void* stream) {
    if (context != &primary_context || !is_on_device(source)) return 1;
    static_cast<Stream*>(stream)->copies.push_back([=] { copy(destination, reinterpret_cast<const void*>(source), num_bytes); });
    return 0;
}
int cuMemHostRegister_v2(void*, size_t, unsigned) { return 0; }

}  // extern "C"
