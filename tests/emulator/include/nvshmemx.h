#pragma once
#include <nvshmem.h>

#include <algorithm>
#include <cstring>
#include <string>

#include "cuda_runtime_api.h"

namespace emulator {

// By the running thread. The caller's PE is the one in whose heap its addresses lie.
void put_later(void* to, const void* from, size_t num_bytes, uint64_t* word, uint64_t value, int pe);
// Where `address` of this PE's heap lies at another one that is reached by loads and stores; null where it is not.
void* stored_at(const void* address, size_t num_bytes, int pe);

template <class... Parts>
void agree(Parts... parts) {
    uint64_t mixed = 0;
    for (const uint64_t part : {(uint64_t)parts...}) mixed = (mixed ^ part) * 0x9e3779b97f4a7c15ull;
    if (__match_any_sync(~0u, mixed) != ~0u) fail("the lanes of a warp do not agree in what they put");
}

// By a whole warp, with ordinary stores, whatever memory they come from.
inline void store_as_warp(void* at, const void* from, size_t num_bytes) {
    for (size_t i = 16 * lane(); i < num_bytes; i += 16 * 32) std::memcpy(static_cast<uint8_t*>(at) + i, static_cast<const uint8_t*>(from) + i, std::min<size_t>(16, num_bytes - i));
    stored();
    __syncwarp();
}

}  // namespace emulator

// By a whole warp, whose lanes have to agree in everything. Joins what they stored to `from`; nothing joins them afterwards.
inline void nvshmemx_putmem_signal_nbi_warp(void* to, const void* from, size_t num_bytes, uint64_t* word, uint64_t value, int /*operation*/, int pe) {
    emulator::agree(to, from, num_bytes, word, value, pe);
    if (void* at = emulator::stored_at(to, num_bytes, pe)) {
        emulator::store_as_warp(at, from, num_bytes);
        if (emulator::lane() == 0) emulator::put_later(nullptr, nullptr, 0, word, value, pe);
    } else if (emulator::lane() == 0) {
        emulator::put_later(to, from, num_bytes, word, value, pe);
    }
}
// Likewise, without a signal: only where stores do it.
inline void nvshmemx_putmem_nbi_warp(void* to, const void* from, size_t num_bytes, int pe) {
    emulator::agree(to, from, num_bytes, pe);
    void* at = emulator::stored_at(to, num_bytes, pe);
    if (at == nullptr) emulator::fail("a put without a signal, and no stores to PE " + std::to_string(pe));
    emulator::store_as_warp(at, from, num_bytes);
}
// By one thread. Ordered behind nothing.
inline void nvshmemx_signal_op(uint64_t* word, uint64_t value, int /*operation*/, int pe) { emulator::put_later(nullptr, nullptr, 0, word, value, pe); }
