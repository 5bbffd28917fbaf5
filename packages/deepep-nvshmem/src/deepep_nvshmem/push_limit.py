"""How fast this machine can push to all peers at once, measured: what a dispatch can at best reach."""

from __future__ import annotations

import statistics
import struct
from typing import Any

import torch

from deep_ep.backend import GroupFacts
from deep_ep.errors import BackendUnavailableError
from deep_ep.symmetric import MappedArena, whole_granules
from deep_ep.topology import host_identity

from .arena import SymmetricArena
from .backend import MAX_RANKS

_OFFSET, _SECONDS = struct.Struct("<q"), struct.Struct("<d")
# Large enough that launches and tails do not count, small enough for the heap.
_ROWS, _ROW_BYTES, _LAUNCHES, _REPETITIONS = 4096, 7168, 10, 5


def measure_push_limit(
    extension: Any, facts: GroupFacts, arena: SymmetricArena, *, num_sms: int, timeout_s: float
) -> float | None:
    """GB/s of egress per rank, ``None`` for a single rank. Collective, on the current stream.

    ``arena`` is one that all ranks of the group have mapped.
    """
    if facts.num_ranks == 1:
        return None
    with arena.allocate_here():
        landing = torch.empty(facts.num_ranks * _ROWS * _ROW_BYTES, dtype=torch.uint8, device=facts.device)
    record = _OFFSET.pack(landing.data_ptr() - arena.arena_ptrs[facts.rank])
    offsets = facts.channel.all_gather(record, phase="push limit", timeout_s=timeout_s)
    targets = [p + _OFFSET.unpack(o)[0] for p, o in zip(arena.arena_ptrs, offsets, strict=True)]
    return _pushed_gbps(extension, facts, targets, num_sms=num_sms, timeout_s=timeout_s)


def measure_push_limit_of_host(
    extension: Any, facts: GroupFacts, *, num_sms: int, timeout_s: float, backend: str
) -> float | None:
    """The same for a group of several nodes that are parts of one host; ``None`` for any other. Collective.

    Everything is mapped for this measurement alone: the ranks of such nodes do not reach each other otherwise.
    """
    hosts = facts.channel.all_gather(host_identity(), phase="push limit", timeout_s=timeout_s)
    if len(set(hosts)) > 1 or not 1 < facts.num_ranks <= MAX_RANKS:
        return None
    try:
        mapped = MappedArena(
            extension,
            facts,
            num_bytes=whole_granules(facts.num_ranks * _ROWS * _ROW_BYTES),
            timeout_s=timeout_s,
            backend=backend,
            cure="",
        )
    except BackendUnavailableError:
        return None  # every rank's, in the same words
    try:
        return _pushed_gbps(extension, facts, mapped.arena_ptrs, num_sms=num_sms, timeout_s=timeout_s)
    finally:
        mapped.close()


def _pushed_gbps(extension: Any, facts: GroupFacts, targets: list[int], *, num_sms: int, timeout_s: float) -> float:
    """``targets``: where the rows of all ranks may land at each rank. At the end all of them have."""
    num_ranks, channel = facts.num_ranks, facts.channel
    num_bytes, device = _ROWS * _ROW_BYTES, facts.device
    source = torch.randint(0, 256, ((num_ranks - 1) * num_bytes,), dtype=torch.uint8, device=device)
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
