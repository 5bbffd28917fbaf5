#pragma once
#include "emulator.hpp"

namespace deepep::ptx {

inline void named_barrier(int number, int num_threads) { emulator::barrier(number, num_threads, true, false); }
inline void named_barrier_arrive(int number, int num_threads) { emulator::barrier(number, num_threads, false, false); }
inline bool named_barrier_or(int number, int num_threads, bool value) { return emulator::barrier(number, num_threads, true, value); }

}  // namespace deepep::ptx
