#pragma once
// The emulator's loads, stores, fences and atomics. Relaxed stores are late; what releases comes after all stores of its block, and scopes are one.
#include <cstdint>
#include <cstring>

#include "emulator.hpp"

namespace deepep::ptx {

namespace emulated {

inline uint64_t mixed(uint64_t value) { return value; }
inline uint64_t mixed(uint4 v) {
    return (v.x * 0x9e3779b97f4a7c15ull) ^ (v.y * 0xc2b2ae3d27d4eb4full) ^ (v.z * 0x165667b19e3779f9ull) ^ (v.w * 0x27d4eb2f165667c5ull);
}
template <class T>
T read(const T* address) {
    return *const_cast<const volatile T*>(address);
}
inline uint4 read(const uint4* address) {
    const volatile uint32_t* words = reinterpret_cast<const volatile uint32_t*>(address);
    return make_uint4(words[0], words[1], words[2], words[3]);
}
template <class T>
T load(const T* address) {
    for (size_t offset = 0; offset < sizeof(T); offset += 8) emulator::settle(reinterpret_cast<const uint8_t*>(address) + offset);
    const T value = read(address);
    bool look_again;
    emulator::loaded(address, mixed(value), &look_again);
    return look_again ? read(address) : value;
}
template <class T>
void store_relaxed(T* address, T value) {
    static_assert(sizeof(T) == 4 || sizeof(T) == 8);
    emulator::store_late(address, value, sizeof(T));
}
template <class T>
void store_release(T* address, T value) {
    emulator::settle_all();
    *const_cast<volatile T*>(address) = value;
    emulator::stored();
}
// Host threads may change the same words.
template <class T, class Change>
T change(T* address, Change changed) {
    emulator::settle(address);
    T before = __atomic_load_n(address, __ATOMIC_SEQ_CST);
    while (!__atomic_compare_exchange_n(address, &before, changed(before), false, __ATOMIC_SEQ_CST, __ATOMIC_SEQ_CST)) {
    }
    emulator::stored();
    return before;
}

}  // namespace emulated

inline uint64_t load_relaxed_sys(const uint64_t* address) { return emulated::load(address); }
inline uint64_t load_acquire_sys(const uint64_t* address) { return emulated::load(address); }
inline uint32_t load_relaxed_sys(const uint32_t* address) { return emulated::load(address); }
inline uint32_t load_relaxed_gpu(const uint32_t* address) { return emulated::load(address); }
inline void store_relaxed_sys(uint64_t* address, uint64_t value) { emulated::store_relaxed(address, value); }
inline void store_relaxed_sys(uint32_t* address, uint32_t value) { emulated::store_relaxed(address, value); }
inline void store_release_sys(uint64_t* address, uint64_t value) { emulated::store_release(address, value); }
inline void store_release_sys(uint32_t* address, uint32_t value) { emulated::store_release(address, value); }
inline void store_relaxed_gpu(uint32_t* address, uint32_t value) { emulated::store_relaxed(address, value); }
inline uint32_t add_acq_rel_gpu(uint32_t* address, uint32_t value) {
    emulator::settle_all();
    return emulated::change(address, [=](uint32_t before) { return before + value; });
}
inline uint32_t add_relaxed_gpu(uint32_t* address, uint32_t value) {
    return emulated::change(address, [=](uint32_t before) { return before + value; });
}
inline uint32_t increment_relaxed_gpu(uint32_t* address, uint32_t largest) {
    return emulated::change(address, [=](uint32_t before) { return before >= largest ? 0 : before + 1; });
}
inline uint32_t exchange_relaxed_gpu(uint32_t* address, uint32_t value) {
    return emulated::change(address, [=](uint32_t) { return value; });
}
inline void fence_acq_rel_sys() { emulator::settle_all(); }
inline uint64_t global_timer_ns() { return emulator::now_ns(); }
inline uint32_t clock_ordered() { return static_cast<uint32_t>(emulator::tick()); }
inline uint32_t load_acquire_cta_shared(const uint32_t* address) {
    __builtin_assume(__isShared(address));
    return *reinterpret_cast<const volatile uint32_t*>(address);
}

}  // namespace deepep::ptx
