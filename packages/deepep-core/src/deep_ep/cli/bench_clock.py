"""How a call is timed: calls that follow one another, launched one by one or as a CUDA graph."""

from __future__ import annotations

import itertools
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist

from ..launch import RankContext
from . import ranks
from .bench_data import InputSet

Call = Callable[[InputSet], Any]

_MOST_CALLS_IN_A_GRAPH = 32
_NUM_KEPT = 2
_MEMORY_SHARE_OF_A_GRAPH = 8  # outputs of a graph's calls take at most one in so many bytes of the GPU's memory


@dataclass(frozen=True, kw_only=True)
class Timed:
    """What was measured on this rank.

    Attributes:
        seconds: of each iteration, for one call.
        calls_per_graph: 0 if the host launched each call.
        outputs: what the graph's last calls returned, with their inputs; empty without a graph.
    """

    seconds: list[float]
    calls_per_graph: int = 0
    outputs: tuple[tuple[InputSet, Any], ...] = ()


def time_calls(context: RankContext, call: Call, sets: list[InputSet], *, iterations: int, warmup: int) -> Timed:
    """Seconds of each of ``iterations`` calls that follow one another on rotating inputs. Collective."""
    for i in range(warmup):
        call(sets[i % len(sets)])
    start_together(context)
    if context.device.type != "cuda":
        stamps = [time.perf_counter()]
        for i in range(iterations):
            call(sets[i % len(sets)])
            stamps.append(time.perf_counter())
        return Timed(seconds=[b - a for a, b in itertools.pairwise(stamps)])
    events = [torch.cuda.Event(enable_timing=True) for _ in range(iterations + 1)]
    events[0].record()
    for i in range(iterations):
        call(sets[i % len(sets)])
        events[i + 1].record()
    ranks.synchronize(context.device)
    return Timed(seconds=[a.elapsed_time(b) * 1e-3 for a, b in itertools.pairwise(events)])


def time_graph(
    context: RankContext, call: Call, sets: list[InputSet], *, num_calls: int, iterations: int, warmup: int
) -> Timed:
    """Seconds per call of each of ``iterations`` replays of a graph of ``num_calls`` chained calls. Collective.

    This is how decoding runs: the host launches one graph, and no call waits for the next one's Python.
    """
    for i in range(warmup):
        call(sets[i % len(sets)])
    start_together(context)
    graph, outputs = torch.cuda.CUDAGraph(), []
    # Other threads of this process (NCCL's watchdog) go on talking to CUDA meanwhile.
    with torch.cuda.graph(graph, capture_error_mode="thread_local"):
        for i in range(num_calls):
            inputs = sets[i % len(sets)]
            outputs.append((inputs, call(inputs)))
    for _ in range(warmup):
        graph.replay()
    start_together(context)
    events = [torch.cuda.Event(enable_timing=True) for _ in range(iterations + 1)]
    events[0].record()
    for i in range(iterations):
        graph.replay()
        events[i + 1].record()
    ranks.synchronize(context.device)
    seconds = [a.elapsed_time(b) * 1e-3 / num_calls for a, b in itertools.pairwise(events)]
    # The outputs live in the graph's memory, which goes with the graph: what is kept is a copy.
    kept = tuple((inputs, _copy(output)) for inputs, output in outputs[-_NUM_KEPT:])
    return Timed(seconds=seconds, calls_per_graph=num_calls, outputs=kept)


def calls_in_a_graph(context: RankContext, output_bytes: int) -> int:
    """How many calls with outputs of this size go into one graph; a graph gives memory back only as a whole."""
    total: int = torch.cuda.get_device_properties(context.device).total_memory
    fitting = total // _MEMORY_SHARE_OF_A_GRAPH // max(1, output_bytes)
    return -int(ranks.slowest(context, [-float(min(_MOST_CALLS_IN_A_GRAPH, max(2, fitting)))])[0])


def start_together(context: RankContext) -> None:
    ranks.synchronize(context.device)
    if context.num_ranks > 1:
        dist.barrier(context.group)


def _copy(output: Any) -> Any:
    if isinstance(output, torch.Tensor):
        return output.clone()
    if isinstance(output, tuple):
        return tuple(map(_copy, output))
    return output
