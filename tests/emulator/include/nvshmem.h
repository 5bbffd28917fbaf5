#pragma once
// NVSHMEM as kernels see it, all PEs in one process: what they put lands late (nvshmem.cpp).
#include <cstddef>
#include <cstdint>

enum { NVSHMEM_SIGNAL_SET = 1 };
