"""How fast this machine can push to all peers at once, measured: what a dispatch can at best reach."""

from __future__ import annotations

import statistics
import struct
from typing import Any

import torch

from deep_ep.backend import GroupFacts

from .arena import SymmetricArena

_OFFSET, _SECONDS = struct.Struct("<q"), struct.Struct("<d")
# Large enough that launches and tails do not count, small enough for the heap.
_ROWS, _ROW_BYTES, _LAUNCHES, _REPETITIONS = 4096, 7168, 10, 5


def measure_push_limit(
    extension: Any, facts: GroupFacts, arena: SymmetricArena, *, num_sms: int, timeout_s: float
) -> float | None:
    """GB/s of egress per rank, ``None`` for a single rank. Collective, on the current stream."""
    if facts.num_ranks == 1:
        return None
    num_ranks, channel, device = facts.num_ranks, facts.channel, facts.device
    num_bytes = _ROWS * _ROW_BYTES
    with arena.allocate_here():
        landing = torch.empty(num_ranks * num_bytes, dtype=torch.uint8, device=device)
    source = torch.randint(0, 256, ((num_ranks - 1) * num_bytes,), dtype=torch.uint8, device=device)
    own_offset = landing.data_ptr() - arena.arena_ptrs[facts.rank]
    record = _OFFSET.pack(own_offset)
    offsets = channel.all_gather(record, phase="push limit", timeout_s=timeout_s)
    targets = [p + _OFFSET.unpack(o)[0] for p, o in zip(arena.arena_ptrs, offsets, strict=True)]
    stream = torch.cuda.current_stream(device.index).cuda_stream
    seconds: list[float] = []
    for _ in range(_REPETITIONS):
        torch.cuda.synchronize()
        channel.all_agree(True, phase="push limit", timeout_s=timeout_s)
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        begin.record()
        for _ in range(_LAUNCHES):
            extension.fabric_limit(
                direction="push",
                rank=facts.rank,
                arena_ptrs=targets,
                local=source.data_ptr(),
                num_rows=_ROWS,
                num_row_bytes=_ROW_BYTES,
                num_sms=num_sms,
                stream=stream,
            )
        end.record()
        end.synchronize()
        own = _SECONDS.pack(begin.elapsed_time(end) * 1e-3 / _LAUNCHES)
        everybody = channel.all_gather(own, phase="push limit", timeout_s=timeout_s)
        seconds.append(max(_SECONDS.unpack(s)[0] for s in everybody))
    return (num_ranks - 1) * num_bytes / statistics.median(seconds) / 1e9
