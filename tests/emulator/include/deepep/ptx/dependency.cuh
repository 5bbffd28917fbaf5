#pragma once
namespace deepep::ptx {

// Kernels of a stream follow one another.
inline void wait_for_prerequisites() {}

}  // namespace deepep::ptx
