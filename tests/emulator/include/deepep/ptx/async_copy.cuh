#pragma once
#include "emulator.hpp"

namespace deepep::ptx {

inline void async_copy_16(void* shared, const void* global) { emulator::copy_later(emulator::CopyKind::kVector, shared, global, 16, nullptr); }
template <int kNumBytes>
void async_copy(void* shared, const void* global) {
    emulator::copy_later(emulator::CopyKind::kVector, shared, global, kNumBytes, nullptr);
}
inline void async_commit() { emulator::commit_copies(emulator::CopyKind::kVector); }
template <int kPending>
void async_wait() {
    emulator::wait_copies(emulator::CopyKind::kVector, kPending, false);
}

}  // namespace deepep::ptx
