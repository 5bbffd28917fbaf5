#pragma once
#include "memory.cuh"

namespace deepep::ptx {

inline uint64_t load_relaxed_gpu(const uint64_t* address) { return emulated::load(address); }
inline uint64_t load_acquire_gpu(const uint64_t* address) { return emulated::load(address); }
inline uint32_t load_acquire_sys(const uint32_t* address) { return emulated::load(address); }
inline void store_relaxed_gpu(uint64_t* address, uint64_t value) { emulated::store_relaxed(address, value); }
inline void store_release_gpu(uint64_t* address, uint64_t value) { emulated::store_release(address, value); }
inline void store_release_gpu(uint32_t* address, uint32_t value) { emulated::store_release(address, value); }
inline uint64_t compare_exchange_acq_rel_gpu(uint64_t* address, uint64_t expected, uint64_t desired) {
    emulator::settle_all();
    return emulated::change(address, [=](uint64_t before) { return before == expected ? desired : before; });
}
inline uint32_t exchange_acquire_gpu(uint32_t* address, uint32_t value) { return exchange_relaxed_gpu(address, value); }
inline uint64_t add_relaxed_sys(uint64_t* address, uint64_t value) {
    return emulated::change(address, [=](uint64_t before) { return before + value; });
}
inline void max_release_gpu(uint64_t* address, uint64_t value) {
    emulator::settle_all();
    emulated::change(address, [=](uint64_t before) { return before < value ? value : before; });
}

}  // namespace deepep::ptx
