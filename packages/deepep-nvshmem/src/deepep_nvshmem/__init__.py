"""Kernel backends for normal mode: ``nvlink`` for the GPUs of one NVLink domain.

Importing this package is cheap and touches no CUDA state; the native extension loads on first use.
"""

from .backend import NvlinkBackend

__all__ = ["NvlinkBackend"]
