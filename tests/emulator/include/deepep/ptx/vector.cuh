#pragma once
#include "memory.cuh"

namespace deepep::ptx {

inline uint4 load_relaxed_sys(const uint4* address) { return emulated::load(address); }
// Words are seen apart; mostly two at a time, because that is quicker.
inline void store_relaxed_sys(uint4* address, uint4 value) {
    uint64_t* halves = reinterpret_cast<uint64_t*>(address);
    if (emulator::random_number() % 4 != 0) {
        emulated::store_relaxed(halves, static_cast<uint64_t>(value.y) << 32 | value.x);
        emulated::store_relaxed(halves + 1, static_cast<uint64_t>(value.w) << 32 | value.z);
        return;
    }
    uint32_t* words = reinterpret_cast<uint32_t*>(address);
    emulated::store_relaxed(words, value.x);
    emulated::store_relaxed(words + 1, value.y);
    emulated::store_relaxed(words + 2, value.z);
    emulated::store_relaxed(words + 3, value.w);
}
inline uint4 load_streaming(const uint4* address) { return *address; }
inline uint4 load_shared(const uint4* address) {
    __builtin_assume(__isShared(address));
    return *address;
}
inline void prefetch_l2(const void*) {}

}  // namespace deepep::ptx
