#pragma once
#include <nvshmem.h>

#include "cuda_runtime_api.h"

namespace emulator {

// By the running thread. The caller's PE is the one in whose heap its addresses lie.
void put_later(void* to, const void* from, size_t num_bytes, uint64_t* word, uint64_t value, int pe);

}  // namespace emulator

// By a whole warp, whose lanes have to agree in everything. Joins what they stored to `from`; nothing joins them afterwards.
inline void nvshmemx_putmem_signal_nbi_warp(void* to, const void* from, size_t num_bytes, uint64_t* word, uint64_t value, int /*operation*/, int pe) {
    uint64_t mixed = 0;
    for (uint64_t part : {reinterpret_cast<uint64_t>(to), reinterpret_cast<uint64_t>(from), static_cast<uint64_t>(num_bytes), reinterpret_cast<uint64_t>(word), value,
                          static_cast<uint64_t>(pe)})
        mixed = (mixed ^ part) * 0x9e3779b97f4a7c15ull;
    if (__match_any_sync(~0u, mixed) != ~0u) emulator::fail("the lanes of a warp do not agree in what they put");
    if (emulator::lane() == 0) emulator::put_later(to, from, num_bytes, word, value, pe);
}
// By one thread. Ordered behind nothing.
inline void nvshmemx_signal_op(uint64_t* word, uint64_t value, int /*operation*/, int pe) { emulator::put_later(nullptr, nullptr, 0, word, value, pe); }
