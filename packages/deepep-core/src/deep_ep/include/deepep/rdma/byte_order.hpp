#pragma once
#include <cstdint>

#include "../common/macros.hpp"

static_assert(__BYTE_ORDER__ == __ORDER_LITTLE_ENDIAN__, "GPUs and the hosts that carry them are little-endian.");

namespace deepep::rdma {

// Integers as the NIC reads and writes them: most significant byte first. A value goes in through `of` and comes out through `value`,
// so no code mixes the two orders unseen.
struct Be16 {
    uint16_t bits;
    DEEPEP_HOST_DEVICE static constexpr Be16 of(uint16_t value) { return {static_cast<uint16_t>(value << 8 | value >> 8)}; }
    DEEPEP_HOST_DEVICE constexpr uint16_t value() const { return of(bits).bits; }
};
struct Be32 {
    uint32_t bits;
    DEEPEP_HOST_DEVICE static constexpr Be32 of(uint32_t value) {
        return {value << 24 | (value & 0xff00u) << 8 | (value >> 8 & 0xff00u) | value >> 24};
    }
    DEEPEP_HOST_DEVICE constexpr uint32_t value() const { return of(bits).bits; }
};
struct Be64 {
    uint64_t bits;
    DEEPEP_HOST_DEVICE static constexpr Be64 of(uint64_t value) {
        return {static_cast<uint64_t>(Be32::of(static_cast<uint32_t>(value)).bits) << 32 |
                Be32::of(static_cast<uint32_t>(value >> 32)).bits};
    }
    DEEPEP_HOST_DEVICE constexpr uint64_t value() const { return of(bits).bits; }
};

}  // namespace deepep::rdma
