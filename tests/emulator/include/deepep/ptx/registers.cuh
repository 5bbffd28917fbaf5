#pragma once

namespace deepep::ptx {

inline int unknown_zero() { return 0; }

}  // namespace deepep::ptx
