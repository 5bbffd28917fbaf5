"""Calls of a case, launched on all ranks of a world, and what each of them is compared with."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import Any

import torch
from internode_oracle import (
    check_combine,
    check_dispatch,
    check_forwarding,
    check_layout,
    check_lists,
    check_routing,
    row_counts,
)
from internode_world import (
    Case,
    Combined,
    Rank,
    Received,
    World,
    combine,
    dispatch,
    layout,
    machine,
    make_combined,
    make_ranks,
    make_received,
    notify,
    poisoned,
    random_rows,
)

WORLDS: list[World] = []


def world_of(case: Case, *, order: int = 1, arena_bytes: int = 24 << 20) -> World:
    """``order`` is the seed by which threads take turns and what is put lands."""
    machine().seed(order)
    world = World(
        case.num_ranks,
        case.ranks_per_node,
        ring_bytes=case.ring_bytes,
        chunk_bytes=case.chunk_bytes,
        max_local_experts=case.num_experts // case.num_ranks,
        arena_bytes=arena_bytes,
        has_stores=case.has_stores,
    )
    WORLDS.append(world)
    return world


@dataclass
class Step:
    """A dispatch or a combine that has been launched, and what it is to be compared with."""

    case: Case
    ranks: list[Rank]
    received: list[Received] = field(default_factory=list)
    combined: list[Combined] = field(default_factory=list)
    is_cached: bool = False

    def check(self) -> None:
        if self.received:
            check_dispatch(self.case, self.ranks, self.received, is_cached=self.is_cached)
        if self.combined:
            check_combine(self.case, self.ranks, self.combined)


def cached(world: World, case: Case, ranks: list[Rank], rows: list[int], *, seed: int, is_unlisted: bool) -> Step:
    """A cached dispatch of other data along the same routing."""
    g = torch.Generator().manual_seed(seed)
    fresh = [
        replace(
            r,
            x=random_rows((r.x.shape[0], case.hidden_bytes), case.dtype, g),
            scales=None if r.scales is None else torch.rand(r.scales.shape, generator=g),
        )
        for r in ranks
    ]
    received = make_received(world, case, rows)
    dispatch(world, case, fresh, received, is_cached=True, is_unlisted=is_unlisted)
    return Step(case, fresh, received=received, is_cached=True)


def back(world: World, case: Case, ranks: list[Rank], sources: list[Any], **how: Any) -> Step:
    combined = make_combined(world, case, sources, **how)
    combine(world, case, ranks, combined)
    return Step(case, ranks, combined=combined)


def after_dispatch(
    world: World, case: Case, ranks: list[Rank], received: list[Received], rows: list[int]
) -> list[Step]:
    """What may follow a fresh dispatch, launched without waiting for anything."""
    steps = [Step(case, ranks, received=received)]
    # Rows that come late are missed by a combine of what was received, not by a look at the end.
    steps.append(back(world, case, ranks, received if case.dtype == torch.bfloat16 else rows))
    other = replace(case, use_bulk=not case.use_bulk, num_biases=2 - case.num_biases)
    steps.append(cached(world, other, ranks, rows, seed=1, is_unlisted=case.use_bulk))
    steps.append(back(world, other, ranks, rows, weights=case.num_biases == 0, seed=1))
    return steps


def dispatched(world: World, case: Case) -> tuple[list[Rank], list[Received], list[int]]:
    """A fresh dispatch whose row counts the host has waited for; not run yet."""
    ranks = make_ranks(case)
    layout(world, case, ranks)
    notify(world, case, ranks)
    world.check()
    check_layout(case, ranks)
    check_routing(case, ranks)
    rows, forwarded = row_counts(case, ranks)
    for rank, runtime in enumerate(world.runtimes):
        counts = runtime.wait_counts(world.ticket, 1.0)
        assert (counts.num_recv_tokens, counts.num_forward_rows) == (rows[rank], forwarded[rank])
        assert counts.num_recv_tokens_per_expert == ranks[rank].expert_counts.tolist()
        assert counts.mismatch_mask == counts.bad_count_mask == 0
        ranks[rank].send_nvl_head = poisoned((forwarded[rank], 8), torch.int32)
    received = make_received(world, case, rows)
    how = {"ticket": world.ticket, "least_rows": 0, "timeout_s": 1.0}
    assert all(dispatch(world, case, ranks, received, **how))
    return ranks, received, rows


def round_trips(case: Case, *, order: int = 1, num: int = 1) -> World:
    world = world_of(case, order=order)
    for _ in range(num):
        world.used = [world.window_bytes] * world.num_ranks
        ranks, received, rows = dispatched(world, case)
        steps = after_dispatch(world, case, ranks, received, rows)
        world.check()
        for step in steps:
            step.check()
        check_forwarding(case, ranks)
        for rank, r in enumerate(ranks):
            check_lists(case, rank, r)
        case = case.next()
    return world
