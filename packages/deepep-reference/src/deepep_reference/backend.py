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
from .normal import ReferenceNormal
from .session import Session
from .transport import open_transport


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
        session = Session(facts, options, open_transport(facts, timeout_s=options.timeout_s))
        return Opened(
            normal=ReferenceNormal(session) if "normal" in modes else None,
        )
