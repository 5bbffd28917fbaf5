"""From what a kernel reported to the exception that the user sees."""

from __future__ import annotations

from typing import Any

from deep_ep.errors import (
    ArgumentError,
    BufferStateError,
    DeepEPError,
    PeerError,
    PeerLostError,
    PeersDisagreeError,
    PeerTimeoutError,
)

_CALLS = {"dispatch": "low_latency_dispatch", "combine": "low_latency_combine"}


def failure(extension: Any, record: Any) -> DeepEPError:
    """The exception for an error record. All of them leave the buffer unusable until it was reset."""
    elapsed_s = record.elapsed_ns / 1e9
    where = f"{_CALLS.get(record.op, record.op)}: rank {record.rank}"
    values = f"saw {record.seen}, expected {record.expected}"
    what = f"{record.phase}, sequence {record.epoch}: {values} after {elapsed_s:.3f} s"
    about: dict[str, Any] = {"ranks": [record.peer], "phase": record.phase}
    if record.kind == "timeout":
        return PeerTimeoutError(
            f"{where} waited {elapsed_s:.1f} s for rank {record.peer} ({what}). Either rank {record.peer} is late "
            "(raise the deadline: DEEPEP_TIMEOUT_S), or it made no such call, or it is gone.",
            waited_s=elapsed_s,
            **about,
        )
    if record.kind == "aborted":
        return BufferStateError(f"{where}: aborted while it waited for rank {record.peer} ({what}).")
    if record.kind == "mismatch":
        return PeersDisagreeError(
            f"{where} and rank {record.peer} made calls that differ ({what}). hidden, top-k, num_experts, "
            "num_max_dispatch_tokens_per_rank, the cast and whether weights are given have to be the same everywhere.",
            **about,
        )
    if record.kind == "peer_failed":
        cause = extension.describe_rdma_failure(peer=record.peer, seen=record.seen, expected=record.expected)
        return PeerLostError(f"{where} cannot send to rank {record.peer}: {cause}", **about)
    if record.kind == "overflow":
        return ArgumentError(f"{where}: more arrived from rank {record.peer} than this call has room for ({what}).")
    return PeerError(f"{where} got numbers from rank {record.peer} that cannot be: {record.kind} ({what}).", **about)
