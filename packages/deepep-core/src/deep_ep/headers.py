"""The header that opens every collective call: what this rank is about to do, as one fixed-layout record.

Ranks exchange headers, and every rank judges all of them by the same rule, so that every rank raises the same error:
another call, an argument that has to agree and does not, or a rank that refused its own arguments.
"""

from __future__ import annotations

import struct
from dataclasses import dataclass, fields
from typing import get_args

import torch

from .backend import Operation
from .errors import PeerRefusedError, PeersDisagreeError

_OPERATIONS: tuple[str, ...] = get_args(Operation)
_DTYPES: tuple[torch.dtype, ...] = (
    torch.bfloat16,
    torch.float8_e4m3fn,
    torch.float8_e5m2,
    torch.float8_e4m3fnuz,
    torch.float8_e5m2fnuz,
    torch.uint8,
    torch.int8,
    torch.float32,
    torch.int32,
)

_MAGIC = 0xDEE9_0001
_REASON_BYTES = 400
_LAYOUT = struct.Struct(f"<II q 12q {_REASON_BYTES}s")
RECORD_BYTES = _LAYOUT.size


def dtype_code(dtype: torch.dtype | None) -> int:
    """A small positive number for each dtype that travels; 0 for none."""
    return 0 if dtype is None else _DTYPES.index(dtype) + 1


def _dtype_name(code: int) -> str:
    return "none" if code == 0 else str(_DTYPES[code - 1]) if code <= len(_DTYPES) else f"unknown dtype {code}"


@dataclass(frozen=True, kw_only=True)
class CallHeader:
    """One rank's side of one collective call.

    Attributes:
        operation: which call.
        sequence: how many collective calls this buffer had begun before.
        hidden, dtype: of the rows; dtype as `dtype_code`.
        num_scales, scale_dtype: of the scales, 0 without.
        num_experts, num_topk: 0 where the call has none.
        has_weights: 1 if top-k weights travel.
        expert_alignment, num_worst_tokens, max_tokens: as in the call.
        flags: mode bits of the call (cast, rounding, LogFMT and the like).
        num_tokens: this rank's own; need not agree.
        refusal: empty, or why this rank refused its own arguments.
    """

    operation: str
    sequence: int
    hidden: int = 0
    dtype: int = 0
    num_scales: int = 0
    scale_dtype: int = 0
    num_experts: int = 0
    num_topk: int = 0
    has_weights: int = 0
    expert_alignment: int = 0
    num_worst_tokens: int = 0
    max_tokens: int = 0
    flags: int = 0
    num_tokens: int = 0
    refusal: str = ""

    def pack(self) -> bytes:
        """``RECORD_BYTES`` bytes."""
        reason = self.refusal.encode()[:_REASON_BYTES]
        numbers = [getattr(self, name) for name in _NUMBERS]
        return _LAYOUT.pack(_MAGIC, _OPERATIONS.index(self.operation), self.sequence, *numbers, reason)

    @staticmethod
    def unpack(record: bytes) -> CallHeader:
        """Raises `PeersDisagreeError` if the record is not one of ours."""
        if len(record) != RECORD_BYTES:
            raise PeersDisagreeError(f"a call header has {len(record)} bytes, expected {RECORD_BYTES}")
        magic, operation, sequence, *numbers, reason = _LAYOUT.unpack(record)
        if magic != _MAGIC or operation >= len(_OPERATIONS):
            raise PeersDisagreeError(
                f"a call header starts with {magic:#x}, expected {_MAGIC:#x}. All ranks need the same deepep-core."
            )
        return CallHeader(
            operation=_OPERATIONS[operation],
            sequence=sequence,
            refusal=reason.rstrip(b"\0").decode(errors="replace"),
            **dict(zip(_NUMBERS, numbers, strict=True)),
        )


_NUMBERS = [f.name for f in fields(CallHeader) if f.name not in ("operation", "sequence", "refusal")]
_MUST_AGREE = [name for name in _NUMBERS if name != "num_tokens"]


def _by_value(ranks: list[int], values: list[object]) -> str:
    """``ranks 0, 1, 3: 7168; rank 2: 4096``"""
    groups: dict[object, list[int]] = {}
    for rank, value in zip(ranks, values, strict=True):
        groups.setdefault(value, []).append(rank)
    return "; ".join(
        f"rank{'s' if len(group) > 1 else ''} {', '.join(map(str, group))}: {value}" for value, group in groups.items()
    )


def _minority(values: list[object]) -> list[int]:
    """The ranks that do not hold the most frequent value; all of them on a tie."""
    counts = {value: values.count(value) for value in values}
    most = max(counts.values())
    winners = [value for value, count in counts.items() if count == most]
    return [r for r, value in enumerate(values) if len(winners) > 1 or value != winners[0]]


def judge(headers: list[CallHeader], ranks: list[int] | None = None) -> None:
    """Raise what these headers call for; the same on every rank. Returns if the call may go on.

    Args:
        headers: one for each taking part, ordered by rank.
        ranks: their rank numbers, if not 0, 1, 2, ...

    Raises:
        PeersDisagreeError: different calls, or arguments that have to agree and do not.
        PeerRefusedError: a rank refused its own arguments.
    """
    numbers = ranks if ranks is not None else list(range(len(headers)))

    def named(positions: list[int]) -> list[int]:
        return [numbers[p] for p in positions]

    def listing(values: list[object]) -> str:
        return _by_value(numbers, values)

    operations: list[object] = [h.operation for h in headers]
    if len(set(operations)) > 1:
        raise PeersDisagreeError(
            f"ranks are in different calls ({listing(operations)}). All ranks of a buffer make the same calls in the "
            "same order.",
            ranks=named(_minority(operations)),
            phase="call order",
        )
    operation = headers[0].operation
    refused = [p for p, h in enumerate(headers) if h.refusal]
    if refused:
        first = headers[refused[0]]
        raise PeerRefusedError(
            f"{operation}: rank {numbers[refused[0]]} refused its arguments, so the call did not take place "
            "on any rank. "
            f"Its reason: {first.refusal}",
            ranks=named(refused),
            phase=operation,
        )
    for name in _MUST_AGREE:
        values: list[object] = [getattr(h, name) for h in headers]
        if len(set(values)) > 1:
            shown = [_dtype_name(int(str(v))) for v in values] if name in ("dtype", "scale_dtype") else values
            raise PeersDisagreeError(
                f"{operation}: ranks disagree on {name} ({listing(list(shown))}). Pass the same on every rank.",
                ranks=named(_minority(values)),
                phase=operation,
            )
    sequences: list[object] = [h.sequence for h in headers]
    if len(set(sequences)) > 1:
        raise PeersDisagreeError(
            f"{operation}: ranks have made different numbers of calls on this buffer ({listing(sequences)}).",
            ranks=named(_minority(sequences)),
            phase="call order",
        )
