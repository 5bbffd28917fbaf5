"""Times dispatch, combine and the calls around them on 2 or 4 GPUs driven by one process, beside the link's limits.

A figure is the median over repetitions of (a chain of launches without host synchronisation) / (its length); the
slowest rank counts. Rates are bytes that leave a GPU over the links.
"""

from __future__ import annotations

import argparse
import statistics
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from typing import Any

import torch
from world import Case, Rank, World, allocate, combine, dispatch, layout, make_back, make_rank, native, notify

Launch = Callable[[], object]


def timed_us(world: World, start: Callable[[], None], length: int, repetitions: int) -> float:
    times = []
    for repetition in range(repetitions):
        world.sync()
        begin = [torch.cuda.Event(enable_timing=True) for _ in world.streams]
        end = [torch.cuda.Event(enable_timing=True) for _ in world.streams]
        for event, stream in zip(begin, world.streams, strict=True):
            event.record(stream)
        start()
        for event, stream in zip(end, world.streams, strict=True):
            event.record(stream)
        world.sync()
        if repetition:  # the first one warms up
            times.append(max(b.elapsed_time(e) for b, e in zip(begin, end, strict=True)) * 1000 / length)
    return statistics.median(times)


def chain_us(world: World, launch: Launch, length: int = 20, repetitions: int = 4) -> float:
    def start() -> None:
        for _ in range(length):
            launch()

    return timed_us(world, start, length, repetitions)


def graph_us(world: World, launch: Launch, length: int = 20, repetitions: int = 6) -> float:
    """The same with each rank's chain captured in a CUDA graph, so that the host's launch rate does not count."""
    graphs = [torch.cuda.CUDAGraph() for _ in world.streams]
    world.sync()
    for rank, graph in enumerate(graphs):
        world.only = rank
        with (
            torch.cuda.device(world.devices[rank]),
            torch.cuda.graph(graph, stream=world.streams[rank], capture_error_mode="thread_local"),
        ):
            for _ in range(length):
                launch()
    world.only = None

    def start() -> None:
        for rank, graph in enumerate(graphs):
            with torch.cuda.device(world.devices[rank]), torch.cuda.stream(world.streams[rank]):
                graph.replay()

    return timed_us(world, start, length, repetitions)


def fabric(world: World, direction: str, num_sms: int, row_bytes: int = 7168) -> float:
    """GB/s out of (push) or into (pull) each GPU."""
    rows = (128 << 20) // row_bytes
    num_bytes = (world.num_ranks - 1) * rows * row_bytes
    local = [torch.empty(num_bytes, dtype=torch.uint8, device=f"cuda:{d}") for d in world.devices]
    pointers = [arena.data_ptr() + world.window_bytes for arena in world.arenas]

    def launch() -> None:
        for rank, stream in enumerate(world.streams):
            with torch.cuda.device(world.devices[rank]):
                native().fabric_limit(
                    direction=direction,
                    rank=rank,
                    arena_ptrs=pointers,
                    local=local[rank].data_ptr(),
                    num_rows=rows,
                    num_row_bytes=row_bytes,
                    num_sms=num_sms,
                    stream=stream.cuda_stream,
                )

    return num_bytes / chain_us(world, launch, length=4) / 1e3


class Bench:
    def __init__(self, num_ranks: int, num_tokens: int, sms: list[int]) -> None:
        self.world = World(num_ranks, 4 << 30)
        self.sms = sms
        self.push = 0.0  # GB/s, the best of this run
        base = Case(num_tokens=(num_tokens,) * num_ranks, num_topk=8, num_experts=256)
        self.fp8 = replace(base, hidden_bytes=7168, dtype=torch.uint8, num_scales=56)
        self.bf16 = replace(base, hidden_bytes=14336)

    def prepare(self, case: Case) -> tuple[list[Rank], list[int], int]:
        """Ranks with their routing exchanged and outputs allocated, rows of each, most rows that leave a rank."""
        world = self.world
        world.release()
        ranks = [make_rank(world, case, rank) for rank in range(case.num_ranks)]
        world.sync()
        layout(world, case, ranks)
        notify(world, case, ranks)
        rows = [runtime.wait_counts(world.ticket, 10.0).num_recv_tokens for runtime in world.runtimes]
        allocate(world, case, ranks, rows)
        world.check()
        heads = [r.send_head >= 0 for r in ranks]
        return ranks, rows, max(int(h.sum() - h[:, rank].sum()) for rank, h in enumerate(heads))

    def report(self, name: str, num_bytes: int, launch: Callable[[int], Launch]) -> None:
        for sms in self.sms:
            us = chain_us(self.world, launch(sms))
            share = f"  {num_bytes / us / 1e3 / self.push:.3f} of push" if self.push else ""
            print(f"{name:30s} {sms:3d} SMs {us:8.1f} us  {num_bytes / us / 1e3:6.1f} GB/s{share}", flush=True)
        self.world.check()

    def fabric(self) -> None:
        for sms in (8, 24, 64, 132):
            push, pull = fabric(self.world, "push", sms), fabric(self.world, "pull", sms)
            self.push = max(self.push, push)
            print(f"fabric {sms:3d} SMs: push {push:.0f} GB/s  pull {pull:.0f} GB/s", flush=True)

    def small(self) -> None:
        world, case = self.world, replace(self.fp8, num_sms=24)
        ranks, _, _ = self.prepare(case)

        def fresh() -> None:
            layout(world, case, ranks)
            notify(world, case, ranks, ticket=False)
            dispatch(world, case, ranks)

        figures = {
            "layout": partial(layout, world, case, ranks),
            "notify": partial(notify, world, case, ranks),
            "layout + notify + dispatch fp8, 24 SMs": fresh,
            "dispatch fp8 cached, 24 SMs": partial(dispatch, world, case, ranks, cached=True),
        }
        for name, launch in figures.items():
            print(f"{name}: {graph_us(world, launch):.1f} us (in a graph, no host)", flush=True)
        world.check()

    def dispatch(self, name: str, case: Case, *, cached: bool, **tuning: int) -> None:
        ranks, _, remote = self.prepare(case)
        self.report(
            f"dispatch {name}",
            remote * (case.hidden_bytes + 4 * case.num_scales),
            lambda sms: partial(dispatch, self.world, replace(case, num_sms=sms), ranks, cached=cached, **tuning),
        )

    def combine(self, name: str, case: Case, *, weights: bool = False, **tuning: int) -> None:
        ranks, rows, remote = self.prepare(case)
        backs = [make_back(self.world, case, rank, rows[rank]) for rank in range(case.num_ranks)]
        self.world.sync()
        self.report(
            f"combine {name}",
            remote * case.hidden_bytes,
            lambda sms: partial(
                combine, self.world, replace(case, num_sms=sms), ranks, backs, weights=weights, **tuning
            ),
        )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--ranks", type=int, default=4)
    parser.add_argument("--tokens", type=int, default=4096)
    parser.add_argument("--sms", type=int, nargs="+", default=[8, 10, 12, 16, 24])
    parts = ["fabric", "small", "fp8", "bf16", "combine", "relayed", "staged", "sweep"]
    parser.add_argument("--what", nargs="+", default=parts[:-1], choices=parts)
    options = parser.parse_args()
    bench = Bench(options.ranks, options.tokens, options.sms)
    staged: dict[str, Any] = {"staged": (True,) * options.ranks}
    for what in options.what:
        if what in ("fabric", "small"):
            getattr(bench, what)()
        elif what == "fp8":
            bench.dispatch("fp8 cached", bench.fp8, cached=True)
            bench.dispatch("fp8 with top-k", bench.fp8, cached=False)
            bench.dispatch("fp8 cached, scales by column", replace(bench.fp8, scales_layout="column"), cached=True)
        elif what == "bf16":
            bench.dispatch("bf16 cached", bench.bf16, cached=True)
            bench.dispatch("bf16 with top-k", bench.bf16, cached=False)
        elif what == "combine":
            bench.combine("", bench.bf16)
            bench.combine("with weights", bench.bf16, weights=True)
        elif what == "relayed":
            bench.combine("relayed", replace(bench.bf16, relay=True, **staged))
            bench.combine("relayed with weights", replace(bench.bf16, relay=True, **staged), weights=True)
        elif what == "staged":
            bench.combine("staged", replace(bench.bf16, **staged))
            bench.combine("staged with weights", replace(bench.bf16, **staged), weights=True)
            bench.dispatch("fp8 staged", replace(bench.fp8, **staged), cached=False)
            bench.dispatch("bf16 staged", replace(bench.bf16, **staged), cached=False)
        else:
            for warps, stages in ((7, 4), (7, 3), (7, 2), (4, 4)):
                name = f"fp8 {warps} warps x {stages} stages"
                bench.dispatch(name, bench.fp8, cached=False, num_warps=warps, num_stages=stages)
            for warps, stages in ((1, 7), (2, 7), (4, 7)):
                bench.combine(f"{warps} load warps, {stages} stages", bench.bf16, num_warps=warps, num_stages=stages)
            for stages in (3, 4, 5):
                bench.combine(f"staged, {stages} stages", replace(bench.bf16, **staged), num_stages=stages)


if __name__ == "__main__":
    main()
