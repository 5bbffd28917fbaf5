"""Kernel backend for low-latency mode: ``ibgda``, over NVLink and over RDMA requests that the GPU posts itself.

Importing this package is cheap and touches no CUDA state; the native extension loads on first use.
"""

from .backend import IbgdaBackend

__all__ = ["IbgdaBackend"]
