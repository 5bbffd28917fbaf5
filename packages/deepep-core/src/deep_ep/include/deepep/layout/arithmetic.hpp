#pragma once
#include <cstdint>

#include "../common/macros.hpp"

namespace deepep {

DEEPEP_HOST_DEVICE constexpr int64_t ceil_div(int64_t value, int64_t unit) { return (value + unit - 1) / unit; }
DEEPEP_HOST_DEVICE constexpr int64_t align_up(int64_t value, int64_t unit) { return ceil_div(value, unit) * unit; }
DEEPEP_HOST_DEVICE constexpr int64_t min_of(int64_t a, int64_t b) { return a < b ? a : b; }
DEEPEP_HOST_DEVICE constexpr int64_t max_of(int64_t a, int64_t b) { return a > b ? a : b; }

// True when [offset, offset + count * unit) lies in [begin, end); no product can overflow on the way.
DEEPEP_HOST_DEVICE constexpr bool extent_fits(int64_t offset, int64_t count, int64_t unit, int64_t begin, int64_t end) {
    if (offset < begin || offset > end || count < 0 || unit < 0) return false;
    return unit == 0 || count <= (end - offset) / unit;
}

}  // namespace deepep
