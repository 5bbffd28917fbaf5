"""The words for what a kernel reported."""

from __future__ import annotations

from typing import Any

from deep_ep.errors import ArgumentError, BufferStateError, DeepEPError, PeersDisagreeError, PeerTimeoutError

HARMLESS = ("mismatch", "bad_count", "layout_mismatch", "overflow")
"""Kinds of error after which the ranks are still in step: nothing was written that should not be."""


def exception_for(record: Any, ranks_per_node: int | None = None) -> DeepEPError:
    """The exception for an ``ErrorRecord``; with ``ranks_per_node`` it names the nodes of the ranks too."""

    def named(rank: int) -> str:
        return f"rank {rank}" if ranks_per_node is None else f"rank {rank} (node {rank // ranks_per_node})"

    elapsed_s = record.elapsed_ns / 1e9
    where, peer = f"{record.op}: {named(record.rank)}", named(record.peer)
    seen = f"saw {record.seen}, expected {record.expected}"
    what = f"{record.phase}, epoch {record.epoch}: {seen} after {elapsed_s:.3f} s"
    if record.kind == "timeout":
        return PeerTimeoutError(
            f"{where} waited {elapsed_s:.1f} s for {peer} ({what}). Either rank {record.peer} is late "
            "(raise the deadline: DEEPEP_TIMEOUT_S), or it made no such call, or it is gone.",
            ranks=[record.peer],
            phase=record.phase,
            waited_s=elapsed_s,
        )
    if record.kind == "overflow":
        return ArgumentError(
            f"{where}: more rows came from {peer} than the output holds ({what}). "
            "Pass a larger num_worst_tokens; if that is not used, a rank ran out of symmetric memory "
            "(DEEPEP_SYMMETRIC_HEAP_MB)."
        )
    if record.kind == "aborted":
        return BufferStateError(f"{where}: aborted while it waited for {peer} ({what}).")
    return PeersDisagreeError(
        f"{where} and {peer} disagree: {record.kind} ({what}).",
        ranks=[record.peer],
        phase=record.phase,
    )
