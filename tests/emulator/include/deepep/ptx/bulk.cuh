#pragma once
#include "emulator.hpp"

namespace deepep::ptx {

inline void mbarrier_init(uint64_t* barrier, int num_arrivals) { emulator::mbarrier_init(barrier, num_arrivals); }
inline void fence_mbarrier_init() {}
inline void mbarrier_arrive(uint64_t* barrier) { emulator::mbarrier_arrive(barrier, 0); }
inline void mbarrier_arrive_expect(uint64_t* barrier, int num_bytes) { emulator::mbarrier_arrive(barrier, num_bytes); }
inline void mbarrier_wait(uint64_t* barrier, uint32_t parity) { emulator::mbarrier_wait(barrier, parity); }
inline void bulk_load(void* shared, const void* global, int num_bytes, uint64_t* barrier) {
    emulator::copy_later(emulator::CopyKind::kBulk, shared, global, num_bytes, barrier);
}
inline void bulk_store(void* global, const void* shared, int num_bytes) {
    emulator::copy_later(emulator::CopyKind::kBulk, global, shared, num_bytes, nullptr);
}
inline void bulk_commit() { emulator::commit_copies(emulator::CopyKind::kBulk); }
template <int kPending>
void bulk_wait_read() {
    emulator::wait_copies(emulator::CopyKind::kBulk, kPending, true);
}
template <int kPending>
void bulk_wait() {
    emulator::wait_copies(emulator::CopyKind::kBulk, kPending, false);
}
inline void fence_async_global() {}
inline void fence_async_shared() {}

}  // namespace deepep::ptx
