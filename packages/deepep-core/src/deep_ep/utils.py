"""V1's module of helpers."""

from __future__ import annotations

import torch

from .errors import BackendUnavailableError
from .events import EventHandle, EventOverlap

__all__ = ["EventHandle", "EventOverlap", "check_nvlink_connections"]


def check_nvlink_connections(group: torch.distributed.ProcessGroup) -> None:
    """Raise unless every pair of GPUs of a small group of PCIe cards can reach each other directly.

    Args:
        group: process group, one GPU per rank.

    Raises:
        BackendUnavailableError: naming the first pair of GPUs without direct access.
    """
    if not torch.cuda.is_available() or "PCIE" not in torch.cuda.get_device_name().upper():
        return
    num_gpus = torch.cuda.device_count()
    for a in range(num_gpus):
        for b in range(num_gpus):
            if a != b and not torch.cuda.can_device_access_peer(a, b):
                raise BackendUnavailableError(
                    f"GPU {a} cannot reach the memory of GPU {b} (group of {torch.distributed.get_world_size(group)} "
                    "ranks on PCIe cards). Use GPUs joined by NVLink, or the backend 'reference'."
                )
