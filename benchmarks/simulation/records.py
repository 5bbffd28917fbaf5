"""What was measured (records of ``deepep bench``) and what others have published, beside model and simulation."""

from __future__ import annotations

import json
from collections.abc import Iterable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

import numpy as np

from deep_ep.internode_model import H200_400G, H200_VIRTUAL_NODES, Estimate, Machine, Operation, Shape, estimate

from .cluster import BEFORE, COMBINE_BEFORE, EARLIER, Kernel, Scenario

RESULTS = Path(__file__).resolve().parents[1] / "results"


@dataclass(frozen=True, kw_only=True)
class Measured:
    """One row of a record, as a case for model and simulation.

    Attributes:
        to: nodes that tokens go to.
    """

    record: str
    operation: Operation
    shape: Shape
    kernel: Kernel
    seconds: float
    machine: Machine = H200_VIRTUAL_NODES
    to: Literal["all", "own", "next"] = "all"

    @property
    def num_sms(self) -> int:
        return self.kernel.num_sms

    @property
    def scenario(self) -> Scenario:
        return Scenario(operation=self.operation, shape=self.shape, machine=self.machine, kernel=self.kernel)

    def routing(self) -> Any:
        """As `simulate` takes it; ``None``: drawn. Where tokens go to one node only, a node is one rank."""
        if self.to == "all":
            return None
        num_ranks, step = self.shape.num_ranks, 0 if self.to == "own" else 1
        found = np.zeros((num_ranks, self.shape.num_tokens, num_ranks, 1), dtype=bool)
        for rank in range(num_ranks):
            found[rank, :, (rank + step) % num_ranks] = True
        return found


def measured_in(record: dict[str, Any], name: str) -> list[Measured]:
    """The rows of a record that the model speaks of: dispatch by a known handle and combine, uniform, on given SMs."""
    facts = record["shape"]
    if facts["mode"] != "normal" or facts.get("routing", "uniform") != "uniform":
        return []
    if record["hardware"]["hosts"] != 1 or "H200" not in record["hardware"]["device"]:
        return []
    shape = Shape(
        num_nodes=record["num_ranks"] // record["ranks_per_node"],
        ranks_per_node=record["ranks_per_node"],
        num_tokens=facts["tokens"],
        hidden=facts["hidden"],
        num_topk=facts["topk"],
        num_experts=facts["experts"],
        is_fp8=facts["dtype"] == "fp8",
        is_cached=True,
        num_groups=facts.get("num_groups", 1),
        num_topk_groups=facts.get("num_topk_groups", 1),
    )
    # Until then every block of dispatch sent and delivered, and of combine forwarded and collected.
    is_earlier = name.startswith(("2026-11-20", "2026-11-21"))
    kernel = Kernel(num_team_senders=0, times=EARLIER, combine_times=None) if is_earlier else Kernel()
    return [
        Measured(
            record=name,
            operation=row["operation"],
            shape=shape,
            kernel=replace(kernel, num_sms=row["num_sms"]),
            seconds=row["seconds"],
        )
        for row in record["measurements"]
        if row["contender"] == "deep_ep" and row["operation"] in ("dispatch", "combine") and row["num_sms"]
    ]


def load(paths: Iterable[Path] | None = None) -> list[Measured]:
    """All rows of the JSON records below ``benchmarks/results``, or of these files."""
    found = []
    for path in sorted(RESULTS.glob("*/*.json")) if paths is None else paths:
        found += measured_in(json.loads(path.read_text()), f"{path.parent.name}/{path.stem}")
    return found


def _printed(
    record: str,
    us: float,
    *,
    operation: Operation = "dispatch",
    nodes: tuple[int, int] = (2, 1),
    push_gbps: float = 323,
    to: Literal["all", "own", "next"] = "all",
    is_grouped: bool = False,
    bf16: bool = False,
    **kernel: Any,
) -> Measured:
    """``nodes`` of so many ranks each on H200s that push so much on 24 SMs; ``is_grouped``: four groups of eight."""
    groups = {"num_groups": 8, "num_topk_groups": 4} if is_grouped else {}
    shape = Shape(num_nodes=nodes[0], ranks_per_node=nodes[1], is_fp8=not bf16, is_cached=True, **groups)
    return Measured(
        record=record,
        operation=operation,
        shape=shape,
        kernel=Kernel(**kernel),
        seconds=us / 1e6,
        machine=replace(H200_VIRTUAL_NODES, nvlink_push_gbps=push_gbps),
        to=to,
    )


# What stands as text in the records: the first kernels in teams and undivided, those before one warp found the chunks
# that have come, and the present ones.
_TODAY, _BEFORE = "2026-11-22-h200-x2", "2026-11-21-h200-x2"
_TODAY_X4 = "2026-11-22-h200-x4"
_LATER_X4 = f"{_TODAY_X4}, later"
_UNDIVIDED: dict[str, Any] = {"num_team_senders": 0, "times": BEFORE}
# Blocks of teams as they were; of rows in bf16 as many fit as today.
_TEAMS: dict[str, Any] = {"deliver_warps": 14, "deliver_stages": 2, "times": BEFORE}
_BF16_TEAMS: dict[str, Any] = {"deliver_warps": 7, "deliver_stages": 2, "times": BEFORE}
# Push limits of the runs themselves: 313 to 321 GB/s on four GPUs, and 304 where few SMs were tried.
_X4: dict[str, Any] = {"push_gbps": 317}
_FEW: dict[str, Any] = {"push_gbps": 304}
# Of the window that an only other node has: 546 slots of two rows.
_WIDE: dict[str, Any] = {"operation": "combine", "ring_bytes": 546 * 2 * 14464}
_SUMS_BEFORE: dict[str, Any] = {"combine_times": COMBINE_BEFORE}
_MORE_WARPS: dict[str, Any] = {"forward_warps": 7, "forward_stages": 4, "source_warps": 7, **_SUMS_BEFORE}
_FIRST: dict[str, Any] = {"times": EARLIER}
PRINTED = (
    _printed(f"{_TODAY}, undivided", 340, num_sms=12, **_UNDIVIDED),
    *(_printed(_TODAY, us, num_sms=n, **_TEAMS) for n, us in ((16, 210), (24, 160), (32, 149))),
    _printed(f"{_TODAY}, own node", 55, to="own", **_TEAMS),
    _printed(f"{_TODAY}, other node", 142, to="next", **_TEAMS),
    _printed(f"{_TODAY}, bf16", 287, bf16=True, **_BF16_TEAMS),
    _printed(f"{_TODAY}, bf16, ring", 387, bf16=True, may_send_directly=False, **_BF16_TEAMS),
)
# Measured after the simulation knew dispatch in teams: nothing of it was changed for these.
PRINTED_LATER = (
    _printed(_TODAY_X4, 350, nodes=(2, 2), **_X4, **_TEAMS),
    _printed(_TODAY_X4, 318, nodes=(2, 2), is_grouped=True, **_X4, **_TEAMS),
    _printed(_TODAY_X4, 343, nodes=(4, 1), **_X4, **_TEAMS),
    _printed(_TODAY_X4, 298, nodes=(4, 1), is_grouped=True, **_X4, **_TEAMS),
    _printed(f"{_TODAY_X4}, undivided", 340, nodes=(2, 2), **_X4, **_UNDIVIDED),
    _printed(f"{_TODAY_X4}, undivided", 439, nodes=(4, 1), **_X4, **_UNDIVIDED),
    *(_printed(f"{_TODAY}, few", us, num_sms=n, **_FEW, **_TEAMS) for n, us in ((4, 670), (8, 362), (12, 250))),
    *(
        _printed(f"{_TODAY}, few, undivided", us, num_sms=n, **_FEW, **_UNDIVIDED)
        for n, us in ((4, 884), (8, 459), (12, 337))
    ),
    _printed(f"{_LATER_X4}, 63a3c4e", 161, **_TEAMS),
)
# Teams of a forwarder and a collector; groups were measured shortly before, on 2 x 2 with other numbers of warps.
PRINTED_COMBINE = (
    _printed(_TODAY, 262, **_WIDE, **_SUMS_BEFORE),
    _printed(_TODAY_X4, 637, nodes=(2, 2), **_X4, **_WIDE, **_SUMS_BEFORE),
    _printed(_TODAY_X4, 684, nodes=(4, 1), operation="combine", **_X4, **_SUMS_BEFORE),
    _printed(_TODAY_X4, 616, nodes=(4, 1), operation="combine", is_grouped=True, **_X4, **_SUMS_BEFORE),
    _printed(f"{_TODAY_X4}, 7 warps", 694, nodes=(2, 2), **_X4, **_WIDE, **_MORE_WARPS),
    _printed(f"{_TODAY_X4}, 7 warps", 634, nodes=(2, 2), is_grouped=True, **_X4, **_WIDE, **_MORE_WARPS),
)
# Of the kernels of 13a35ca. Pushes reached 319 to 327 GB/s, so a rate of 323 serves all.
PRINTED_NOW = (
    *(
        _printed(f"{_LATER_X4}, {n} x {m}", us, nodes=nodes, is_grouped=True, deliver_warps=n, deliver_stages=m)
        for nodes, rows in (
            ((2, 2), ((7, 4, 296), (10, 2, 302), (12, 2, 305), (14, 2, 307))),
            ((4, 1), ((12, 2, 297), (14, 2, 302), (10, 2, 307), (7, 4, 332))),
        )
        for n, m, us in rows
    ),
    _printed(f"{_LATER_X4}, 14 x 2", 148, deliver_warps=14, deliver_stages=2),
    _printed(_LATER_X4, 583, nodes=(2, 2), is_grouped=True, **_WIDE),
    _printed(_LATER_X4, 610, nodes=(4, 1), operation="combine", is_grouped=True),
    _printed(_LATER_X4, 634, nodes=(2, 2), **_WIDE),
    _printed(_LATER_X4, 687, nodes=(4, 1), operation="combine"),
    _printed(_LATER_X4, 261, **_WIDE),
)
PRINTED_BEFORE = (
    *(
        _printed(f"{_BEFORE}, undivided", us, num_sms=n, **(_UNDIVIDED | _FIRST))
        for n, us in ((8, 604), (12, 423), (16, 368), (24, 290), (32, 239))
    ),
    _printed(f"{_BEFORE}, teams", 185, **(_TEAMS | _FIRST)),
    _printed(f"{_BEFORE}, teams, ring", 229, may_send_directly=False, **(_TEAMS | _FIRST)),
)


@dataclass(frozen=True, kw_only=True)
class Published:
    """A figure of another project: GB/s to all nodes, the own one included, per rank.

    Attributes:
        num_sms: of its kernel, ``None`` if not said.
        machine: on which the model is asked.
    """

    who: str
    operation: Operation
    num_nodes: int
    gbps: float
    num_sms: int | None
    machine: Machine

    def estimate(self) -> Estimate:
        """The model's answer for its routing: a token chooses among the four best nodes, if there are more."""
        groups = self.num_nodes
        shape = Shape(num_nodes=self.num_nodes, num_groups=groups, num_topk_groups=min(4, groups), is_cached=True)
        return estimate(self.operation, shape, self.machine)


# 7/8 of what V1 itself reaches in one node of H800s, 153 and 158 GB/s with the own rank's share counted.
_H800_V1 = Machine(**(vars(H200_400G) | {"nvlink_push_gbps": 153 * 7 / 8, "nvlink_pull_gbps": 158 * 7 / 8}))

_V1: tuple[tuple[Operation, tuple[int, ...]], ...] = (("dispatch", (43, 58, 51)), ("combine", (43, 57, 50)))
PUBLISHED = (
    *(
        Published(who="DeepEP V1, H800", operation=op, num_nodes=n, gbps=gbps, num_sms=24, machine=_H800_V1)
        for op, figures in _V1
        for n, gbps in zip((2, 4, 8), figures, strict=True)
    ),
    Published(who="DeepEP V2, SM90", operation="dispatch", num_nodes=2, gbps=90, num_sms=12, machine=H200_400G),
    Published(who="DeepEP V2, SM90", operation="combine", num_nodes=2, gbps=81, num_sms=12, machine=H200_400G),
    Published(who="DeepEP V2, SM90", operation="dispatch", num_nodes=4, gbps=61, num_sms=6, machine=H200_400G),
    Published(who="DeepEP V2, SM90", operation="combine", num_nodes=4, gbps=61, num_sms=6, machine=H200_400G),
    Published(who="Tencent, H20", operation="dispatch", num_nodes=2, gbps=89.5, num_sms=12, machine=H200_400G),
    Published(who="Tencent, H20", operation="combine", num_nodes=2, gbps=82.3, num_sms=12, machine=H200_400G),
    Published(who="Hybrid-EP, H100", operation="dispatch", num_nodes=2, gbps=62, num_sms=8, machine=H200_400G),
    Published(who="Hybrid-EP, H100", operation="combine", num_nodes=2, gbps=68, num_sms=8, machine=H200_400G),
)


@dataclass(frozen=True, kw_only=True)
class PublishedLatency:
    """A low-latency call of DeepEP V1, 128 tokens. Here the model gives a lower bound, the NIC's time for the rows."""

    operation: Operation
    num_nodes: int
    us: float

    def nic_us(self) -> float:
        """A copy for each choice, of which those to other nodes leave through the NIC."""
        row = Shape(num_nodes=self.num_nodes).row_bytes(self.operation)
        return 128 * 8 * (1 - 1 / self.num_nodes) * row / ((H200_400G.nic_gbps or 0) * 1e3)


_LATENCIES: tuple[tuple[Operation, tuple[int, ...]], ...] = (
    ("dispatch", (118, 155, 173, 192, 194)),
    ("combine", (195, 273, 314, 369, 360)),
)
PUBLISHED_LATENCIES = tuple(
    PublishedLatency(operation=op, num_nodes=n, us=us)
    for op, figures in _LATENCIES
    for n, us in zip((2, 4, 8, 16, 32), figures, strict=True)
)
