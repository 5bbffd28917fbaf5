"""The entry point of the backend ``ibgda``: what it can do, whether it can do it here, and how a buffer is opened."""

from __future__ import annotations

import importlib
from types import ModuleType
from typing import ClassVar

import torch

from deep_ep.backend import (
    Backend,
    BufferOptions,
    Capabilities,
    Environment,
    GroupFacts,
    Obstacle,
    Opened,
    RequestedModes,
)
from deep_ep.errors import BackendUnavailableError


def load_extension() -> ModuleType:
    """The native extension. Raises `BackendUnavailableError` with the loader's own words if it does not load."""
    try:
        return importlib.import_module("deepep_ibgda._ibgda")
    except ImportError as error:
        raise BackendUnavailableError(
            f"the native extension of deepep-ibgda does not load: {error}. Reinstall the package on this machine; "
            "building it needs nvcc."
        ) from error


class IbgdaBackend(Backend):
    """Low-latency mode. Peers of the own node are written to over NVLink, others by RDMA that the GPU posts itself.

    Nodes of one host (``DEEPEP_RANKS_PER_NODE``) can be served without a NIC: a thread of each process then executes
    what the GPU posts. Ranks on several hosts need a NIC.
    """

    name: ClassVar[str] = "ibgda"
    capabilities: ClassVar[Capabilities] = Capabilities(
        modes=frozenset({"low_latency"}),
        devices=frozenset({"cuda"}),
        priority=100,
        multi_node=True,
        cuda_graphs=True,
        rank_masks=True,
        logfmt=True,
    )

    @classmethod
    def probe(cls, environment: Environment) -> list[Obstacle]:
        found: list[Obstacle] = []
        try:
            load_extension()
        except BackendUnavailableError as error:
            found.append(Obstacle(cause=str(error).split(". ")[0], cure="Reinstall deepep-ibgda with nvcc present"))
        devices = environment.device_of_rank or ()
        if -1 in devices:
            found.append(
                Obstacle(
                    cause=f"rank {devices.index(-1)} sees no GPU", cure="Give every rank a GPU (CUDA_VISIBLE_DEVICES)"
                )
            )
        if found or environment.num_gpus == 0:
            return found
        visible = sorted({device for device in devices if device < environment.num_gpus})
        for a in visible:
            for b in visible:
                if a != b and not torch.cuda.can_device_access_peer(a, b):
                    return [
                        Obstacle(
                            cause=f"GPU {a} cannot reach the memory of GPU {b}",
                            cure="Use GPUs joined by NVLink (`nvidia-smi topo -m` shows them)",
                        )
                    ]
        return found

    @classmethod
    def is_sm90_compiled(cls) -> bool:
        try:
            return bool(load_extension().is_sm90_compiled())
        except BackendUnavailableError:
            return False

    @classmethod
    def open(cls, facts: GroupFacts, options: BufferOptions, modes: RequestedModes) -> Opened:
        from .low_latency import IbgdaLowLatency

        return Opened(low_latency=IbgdaLowLatency(facts, options) if "low_latency" in modes else None)
