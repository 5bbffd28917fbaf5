"""The entry point: what the reference backend can do, and how it is opened."""

from __future__ import annotations

from typing import ClassVar, get_args

import torch.distributed as dist

from deep_ep.backend import (
    Backend,
    BufferOptions,
    Capabilities,
    Environment,
    GroupFacts,
    Obstacle,
    Opened,
    Operation,
    RequestedModes,
)

from .low_latency import ReferenceLowLatency
from .mesh import open_mesh
from .normal import ReferenceNormal
from .session import Session
from .transport import Transport, open_whole_group


class ReferenceBackend(Backend):
    """Dispatch and combine over ``torch.distributed``: slow, portable, and the numbers all other backends reproduce."""

    name: ClassVar[str] = "reference"
    capabilities: ClassVar[Capabilities] = Capabilities(
        modes=frozenset({"normal", "low_latency"}),
        devices=frozenset({"cpu", "cuda"}),
        priority=0,
        multi_node=True,
        max_ranks=None,
        collective_refusal=frozenset(get_args(Operation)),
        rank_masks=True,
        logfmt=True,
    )

    @classmethod
    def probe(cls, environment: Environment) -> list[Obstacle]:
        if not dist.is_available():
            return [
                Obstacle(
                    cause="this torch was built without torch.distributed",
                    cure="Install a build of torch with it (the wheels on the package index have it).",
                )
            ]
        return []

    @classmethod
    def open(cls, facts: GroupFacts, options: BufferOptions, modes: RequestedModes) -> Opened:
        # With ranks that may be missing, everything goes pairwise; else whole-group collectives are simpler and faster.
        transport: Transport = (
            open_mesh(facts, timeout_s=options.timeout_s)
            if options.enable_shrink
            else open_whole_group(facts, timeout_s=options.timeout_s)
        )
        session = Session(facts, options, transport)
        return Opened(
            normal=ReferenceNormal(session) if "normal" in modes else None,
            low_latency=ReferenceLowLatency(session) if "low_latency" in modes else None,
        )
