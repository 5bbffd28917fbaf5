#pragma once
// Stands in for rdma-core's header of this name where that is not installed: NVSHMEM's headers take from it the size of one structure (an
// address vector, which we never touch) and big-endian integers.
#include <linux/types.h>

struct mlx5_wqe_av {
    __be64 words[6];
};
