"""Kernel backends for normal mode: ``nvlink`` for the GPUs of one NVLink domain, ``nvshmem`` for several nodes.

Importing this package is cheap and touches no CUDA state; native extensions and NVSHMEM load on first use.
"""

from .backend import NvlinkBackend, NvshmemBackend

__all__ = ["NvlinkBackend", "NvshmemBackend"]
