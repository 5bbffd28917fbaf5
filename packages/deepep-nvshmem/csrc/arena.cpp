#include "arena.hpp"

#include <cstdint>
#include <mutex>
#include <vector>

namespace deepep::nvlink {
namespace {

thread_local std::shared_ptr<Heap> current_heap;

// Every heap ever made stays known: torch may return a block long after the buffer that owned the heap has gone, from any thread.
// A heap is some hundred bytes of bookkeeping; it holds no device memory.
std::mutex registry_mutex;
std::vector<std::shared_ptr<Heap>>& registry() {
    static auto* heaps = new std::vector<std::shared_ptr<Heap>>();  // never destroyed: torch frees during interpreter shutdown
    return *heaps;
}

}  // namespace

std::shared_ptr<Heap> set_current_heap(std::shared_ptr<Heap> heap) {
    std::swap(current_heap, heap);
    return heap;
}

std::shared_ptr<Heap> make_heap(uint64_t base, uint64_t num_bytes, uint64_t granule) {
    auto heap = std::make_shared<Heap>(base, num_bytes, granule);
    const std::lock_guard<std::mutex> lock(registry_mutex);
    registry().push_back(heap);
    return heap;
}

}  // namespace deepep::nvlink

// What torch.cuda.memory.CUDAPluggableAllocator looks up by name. Streams do not matter: torch's caching allocator orders reuse.
extern "C" __attribute__((visibility("default"))) void* deepep_heap_alloc(int64_t num_bytes, int /*device*/, void* /*stream*/) {
    if (!deepep::nvlink::current_heap || num_bytes < 0) return nullptr;
    return reinterpret_cast<void*>(deepep::nvlink::current_heap->allocate(static_cast<uint64_t>(num_bytes)));
}

extern "C" __attribute__((visibility("default"))) void deepep_heap_free(void* pointer, int64_t /*num_bytes*/, int /*device*/, void* /*stream*/) {
    const uint64_t address = reinterpret_cast<uint64_t>(pointer);
    const std::lock_guard<std::mutex> lock(deepep::nvlink::registry_mutex);
    // The newest heap first: an address range may have been closed and reserved again.
    auto& heaps = deepep::nvlink::registry();
    for (auto heap = heaps.rbegin(); heap != heaps.rend(); ++heap) {
        if (!(*heap)->contains(address)) continue;
        try {
            (*heap)->free(address);
            return;
        } catch (const deepep::NativeError&) {
            continue;  // not a block of this heap
        }
    }
}
