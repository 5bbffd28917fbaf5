#pragma once
// How a kernel's beginning overlaps the end of the kernels before it in its stream, and what it may do meanwhile. PTX ISA: griddepcontrol (from SM90).
#include "../common/macros.hpp"

namespace deepep::ptx {

// Until the kernels before have ended and all they stored is visible. Nothing in global memory may be touched before. Kernels that are not launched
// with programmatic serialization pass at once; code without the instruction may not be launched with it.
__device__ __forceinline__ void wait_for_prerequisites() {
#if DEEPEP_HAS_BULK
    asm volatile("griddepcontrol.wait;" ::: "memory");
#endif
}

}  // namespace deepep::ptx
