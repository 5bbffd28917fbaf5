"""The entry point of the backend ``nvlink``: what it can do, whether it can do it here, and how a buffer is opened."""

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

MAX_RANKS = 8


def load_extension() -> ModuleType:
    """The native extension. Raises `BackendUnavailableError` with the loader's own words if it does not load."""
    try:
        return importlib.import_module("deepep_nvshmem._nvlink")
    except ImportError as error:
        raise BackendUnavailableError(
            f"the native extension of deepep-nvshmem does not load: {error}. Reinstall the package on this machine; "
            "building it needs nvcc."
        ) from error


class NvlinkBackend(Backend):
    """Normal mode among up to 8 GPUs of one host that reach each other's memory. Needs no NVSHMEM and no NIC."""

    name: ClassVar[str] = "nvlink"
    capabilities: ClassVar[Capabilities] = Capabilities(
        modes=frozenset({"normal"}),
        devices=frozenset({"cuda"}),
        priority=100,
        max_ranks=MAX_RANKS,
        collective_refusal=frozenset({"dispatch"}),
        cuda_graphs=True,
        symmetric_memory=True,
    )

    @classmethod
    def probe(cls, environment: Environment) -> list[Obstacle]:
        found: list[Obstacle] = []
        try:
            load_extension()
        except BackendUnavailableError as error:
            found.append(Obstacle(cause=str(error).split(". ")[0], cure="Reinstall deepep-nvshmem with nvcc present"))
        devices = environment.device_of_rank or ()
        if -1 in devices:
            found.append(
                Obstacle(
                    cause=f"rank {devices.index(-1)} sees no GPU", cure="Give every rank a GPU (CUDA_VISIBLE_DEVICES)"
                )
            )
        if found or environment.num_gpus == 0:
            return found
        for a in sorted(set(devices)):
            for b in sorted(set(devices)):
                visible = a < environment.num_gpus and b < environment.num_gpus
                if a != b and visible and not torch.cuda.can_device_access_peer(a, b):
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
        from .normal import NvlinkNormal

        return Opened(normal=NvlinkNormal(facts, options) if "normal" in modes else None)
