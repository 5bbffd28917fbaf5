"""The words for what a kernel reported."""

from __future__ import annotations

from typing import Any

from deep_ep.errors import ArgumentError, BufferStateError, DeepEPError, PeersDisagreeError, PeerTimeoutError

HARMLESS = ("mismatch", "bad_count", "layout_mismatch", "overflow")
"""Kinds of error after which the ranks are still in step: nothing was written that should not be."""


def exception_for(record: Any) -> DeepEPError:
    """The exception for an ``ErrorRecord``."""
    elapsed_s = record.elapsed_ns / 1e9
    where = f"{record.op}: rank {record.rank}"
    seen = f"saw {record.seen}, expected {record.expected}"
    what = f"{record.phase}, epoch {record.epoch}: {seen} after {elapsed_s:.3f} s"
    if record.kind == "timeout":
        return PeerTimeoutError(
            f"{where} waited {elapsed_s:.1f} s for rank {record.peer} ({what}). Either rank {record.peer} is late "
            "(raise the deadline: DEEPEP_TIMEOUT_S), or it made no such call, or it is gone.",
            ranks=[record.peer],
            phase=record.phase,
            waited_s=elapsed_s,
        )
    if record.kind == "overflow":
        return ArgumentError(
            f"{where}: more rows came from rank {record.peer} than the output holds ({what}). "
            "Pass a larger num_worst_tokens."
        )
    if record.kind == "aborted":
        return BufferStateError(f"{where}: aborted while it waited for rank {record.peer} ({what}).")
    return PeersDisagreeError(
        f"{where} and rank {record.peer} disagree: {record.kind} ({what}).",
        ranks=[record.peer],
        phase=record.phase,
    )
