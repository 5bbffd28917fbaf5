"""The entry points of the backends: what each can do, whether it can do it here, and how a buffer is opened."""

from __future__ import annotations

import importlib
import os
import sys
from collections.abc import Callable
from types import ModuleType
from typing import ClassVar

import torch

from deep_ep import nvshmem_runtime
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
"""Ranks of one node."""


def load_extension() -> ModuleType:
    """The native extension of ``nvlink``, with the memory that both backends use.

    Raises `BackendUnavailableError` with the loader's own words if it does not load.
    """
    return _import("_nvlink", "Reinstall the package on this machine; building it needs nvcc.")


def load_internode_extension() -> ModuleType:
    """The native extension of ``nvshmem``. NVSHMEM has to be loaded before."""
    previous = sys.getdlopenflags()
    # It is not linked to NVSHMEM, whose functions are looked up when they are called first.
    sys.setdlopenflags(os.RTLD_LAZY | os.RTLD_LOCAL)
    try:
        return _import(
            "_nvshmem",
            "It is built where NVSHMEM's headers are: install its wheel (nvidia-nvshmem-cu13 or -cu12) or set "
            "NVSHMEM_DIR, and build deepep-nvshmem again.",
        )
    finally:
        sys.setdlopenflags(previous)


def _import(module: str, cure: str) -> ModuleType:
    try:
        return importlib.import_module(f"deepep_nvshmem.{module}")
    except ImportError as error:
        raise BackendUnavailableError(
            f"the native extension {module} of deepep-nvshmem does not load: {error}. {cure}"
        ) from error


def _loading_obstacles(*loaders: Callable[[], object]) -> list[Obstacle]:
    """What the first loader that fails says; those behind it need what it loads."""
    for load in loaders:
        try:
            load()
        except BackendUnavailableError as error:
            cause, _, cure = str(error).partition(". ")
            return [Obstacle(cause=cause, cure=cure.rstrip("."))]
    return []


def _gpu_obstacles(environment: Environment) -> list[Obstacle]:
    """What is wrong with the GPUs of the ranks: one is missing, or one cannot reach another one of its node."""
    devices = environment.device_of_rank or ()
    if -1 in devices:
        rank = devices.index(-1)
        return [Obstacle(cause=f"rank {rank} sees no GPU", cure="Give every rank a GPU (CUDA_VISIBLE_DEVICES)")]
    num_gpus = environment.num_gpus
    ranks_per_node = len(devices) // (environment.num_nodes or 1)
    for first in range(0, len(devices), max(ranks_per_node, 1)):
        node = sorted({device for device in devices[first : first + ranks_per_node] if device < num_gpus})
        for a in node:
            for b in node:
                if a != b and not torch.cuda.can_device_access_peer(a, b):
                    return [
                        Obstacle(
                            cause=f"GPU {a} cannot reach the memory of GPU {b}",
                            cure="Use GPUs joined by NVLink (`nvidia-smi topo -m` shows them)",
                        )
                    ]
    return []


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
        return _loading_obstacles(load_extension) + _gpu_obstacles(environment)

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


class NvshmemBackend(Backend):
    """Normal mode across nodes of up to 8 GPUs each: over NVLink inside a node, by NVSHMEM between nodes.

    A token crosses to another node once, to the rank of the same local number there, which passes it on. A single node
    is left to `NvlinkBackend`.
    """

    name: ClassVar[str] = "nvshmem"
    capabilities: ClassVar[Capabilities] = Capabilities(
        modes=frozenset({"normal"}),
        devices=frozenset({"cuda"}),
        priority=90,
        multi_node=True,
        collective_refusal=frozenset({"dispatch"}),
        cuda_graphs=True,
        symmetric_memory=True,
    )

    @classmethod
    def probe(cls, environment: Environment) -> list[Obstacle]:
        # Before anything is loaded: a group of one node should not pay for NVSHMEM.
        if environment.num_nodes == 1:
            return [Obstacle(cause="the group is one node", cure="Use the backend 'nvlink', which needs no NVSHMEM")]
        if environment.num_ranks and environment.num_nodes:
            ranks_per_node = environment.num_ranks // environment.num_nodes
            if ranks_per_node > MAX_RANKS:
                return [
                    Obstacle(
                        cause=f"nodes have {ranks_per_node} ranks, it serves at most {MAX_RANKS} on each",
                        cure=f"Set DEEPEP_RANKS_PER_NODE to {MAX_RANKS} or fewer",
                    )
                ]
        needed = (nvshmem_runtime.load_library, load_extension, load_internode_extension)
        return _loading_obstacles(*needed) + _gpu_obstacles(environment)

    @classmethod
    def is_sm90_compiled(cls) -> bool:
        # Both extensions are of one build, and this one loads without NVSHMEM.
        return NvlinkBackend.is_sm90_compiled()

    @classmethod
    def open(cls, facts: GroupFacts, options: BufferOptions, modes: RequestedModes) -> Opened:
        from .internode import NvshmemNormal

        return Opened(normal=NvshmemNormal(facts, options) if "normal" in modes else None)
