#pragma once
// The heap that torch's MemPool allocates from: torch's pluggable allocator takes plain functions without a context, so the heap in use is
// kept per thread, and frees find their heap by address.
#include <memory>

#include "deepep/memory/heap.hpp"

namespace deepep::nvlink {

// Makes `heap` (or none) the one that this thread's pool allocations come from; returns the one before.
std::shared_ptr<Heap> set_current_heap(std::shared_ptr<Heap> heap);

// A heap is known to frees from its registration until its last block has been returned.
std::shared_ptr<Heap> make_heap(uint64_t base, uint64_t num_bytes, uint64_t granule);

}  // namespace deepep::nvlink
