#pragma once
#include <cstdint>

#include "../common/macros.hpp"

namespace deepep {

// A signal word: 64 bits, stored at once, so that a reader which sees the epoch also has the value.
//
//    63            32 31             0
//   +----------------+----------------+
//   |     epoch      |     value      |
//   +----------------+----------------+
//
// The writer stores it once per operation (storing it again changes nothing) and nobody clears it. Epochs count operations from 1 and
// may wrap: a word is rewritten by every operation, so what a reader can find is this operation's epoch or the one before.
DEEPEP_HOST_DEVICE constexpr uint64_t signal_word(uint32_t epoch, uint32_t value) {
    return (static_cast<uint64_t>(epoch) << 32) | value;
}
DEEPEP_HOST_DEVICE constexpr uint32_t signal_epoch(uint64_t word) { return static_cast<uint32_t>(word >> 32); }
DEEPEP_HOST_DEVICE constexpr uint32_t signal_value(uint64_t word) { return static_cast<uint32_t>(word); }

// A 64-bit quantity sent as two signal values.
DEEPEP_HOST_DEVICE constexpr uint32_t low_half(int64_t value) { return static_cast<uint32_t>(static_cast<uint64_t>(value)); }
DEEPEP_HOST_DEVICE constexpr uint32_t high_half(int64_t value) {
    return static_cast<uint32_t>(static_cast<uint64_t>(value) >> 32);
}
DEEPEP_HOST_DEVICE constexpr int64_t join_halves(uint32_t low, uint32_t high) {
    return static_cast<int64_t>((static_cast<uint64_t>(high) << 32) | low);
}

}  // namespace deepep
