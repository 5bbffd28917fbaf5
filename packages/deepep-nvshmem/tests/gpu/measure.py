"""Times dispatch, combine and the calls around them on 2 or 4 GPUs driven by one process, beside the push and pull limit of the same run.

A figure is the median over repetitions of (chain of launches without host synchronisation) / (launches), the slowest rank counting.
"""

from __future__ import annotations

import argparse
import dataclasses
import statistics
from collections.abc import Callable

import torch
from world import Case, World, _nvlink, allocate, combine, dispatch, layout, make_back, make_rank, notify


def chain_us(world: World, launch: Callable[[], object], iterations: int = 20, repetitions: int = 4) -> float:
    times = []
    for repetition in range(repetitions):
        world.sync()
        begin = [torch.cuda.Event(enable_timing=True) for _ in world.streams]
        end = [torch.cuda.Event(enable_timing=True) for _ in world.streams]
        for event, stream in zip(begin, world.streams, strict=True):
            event.record(stream)
        for _ in range(iterations):
            launch()
        for event, stream in zip(end, world.streams, strict=True):
            event.record(stream)
        world.sync()
        if repetition:
            times.append(max(b.elapsed_time(e) for b, e in zip(begin, end, strict=True)) * 1000 / iterations)
    return statistics.median(times)


def graph_us(world: World, launch: Callable[[], object], iterations: int = 20, repetitions: int = 6) -> float:
    """The same with the launches of each rank captured in one CUDA graph, so that the host's launch rate does not count."""
    graphs = [torch.cuda.CUDAGraph() for _ in world.streams]
    runtimes, streams = world.runtimes, world.streams
    world.sync()
    for rank, graph in enumerate(graphs):
        with torch.cuda.device(world.devices[rank]), torch.cuda.graph(graph, stream=streams[rank], capture_error_mode="thread_local"):
            world.only = rank
            for _ in range(iterations):
                launch()
    world.only = None
    times = []
    for repetition in range(repetitions):
        world.sync()
        begin = [torch.cuda.Event(enable_timing=True) for _ in streams]
        end = [torch.cuda.Event(enable_timing=True) for _ in streams]
        for rank, graph in enumerate(graphs):
            with torch.cuda.device(world.devices[rank]), torch.cuda.stream(streams[rank]):
                begin[rank].record()
                graph.replay()
                end[rank].record()
        world.sync()
        if repetition:
            times.append(max(b.elapsed_time(e) for b, e in zip(begin, end, strict=True)) * 1000 / iterations)
    assert len(runtimes) == world.num_ranks
    return statistics.median(times)


def fabric(world: World, direction: str, num_sms: int, row_bytes: int = 7168) -> float:
    """GB/s out of (push) or into (pull) each GPU."""
    rows = (128 << 20) // row_bytes
    local = [torch.empty((world.num_ranks - 1) * rows * row_bytes, dtype=torch.uint8, device=f"cuda:{d}") for d in world.devices]
    pointers = [arena.data_ptr() + world.window_bytes for arena in world.arenas]

    def launch() -> None:
        for rank, stream in enumerate(world.streams):
            with torch.cuda.device(world.devices[rank]):
                _nvlink.fabric_limit(direction=direction, rank=rank, arena_ptrs=pointers, local=local[rank].data_ptr(), num_rows=rows, num_row_bytes=row_bytes, num_sms=num_sms, stream=stream.cuda_stream)

    return (world.num_ranks - 1) * rows * row_bytes / chain_us(world, launch, iterations=4) / 1e3


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--ranks", type=int, default=4)
    parser.add_argument("--tokens", type=int, default=4096)
    parser.add_argument("--sms", type=int, nargs="+", default=[6, 8, 10, 12, 16, 20, 24, 32])
    parser.add_argument("--what", nargs="+", default=["fabric", "small", "fp8", "bf16", "combine", "staged"])
    parser.add_argument("--warps", type=int, default=0)
    parser.add_argument("--stages", type=int, default=0)
    options = parser.parse_args()
    world = World(options.ranks, 4 << 30)
    push = 0.0
    if "fabric" in options.what:
        for sms in (8, 24, 64, 132):
            values = {d: fabric(world, d, sms) for d in ("push", "pull")}
            push = max(push, values["push"])
            print(f"fabric {sms:3d} SMs: " + "  ".join(f"{d} {v:.0f} GB/s" for d, v in values.items()), flush=True)
    tokens = (options.tokens,) * options.ranks
    base = Case(num_tokens=tokens, num_topk=8, num_experts=256)
    fp8 = dataclasses.replace(base, hidden_bytes=7168, dtype=torch.uint8, num_scales=56)
    column = dataclasses.replace(fp8, scales_layout="column")
    bf16 = dataclasses.replace(base, hidden_bytes=14336)

    def prepare(case: Case):
        world.release()
        ranks = [make_rank(world, case, rank) for rank in range(case.num_ranks)]
        world.sync()
        layout(world, case, ranks)
        notify(world, case, ranks)
        counts = [runtime.wait_counts(world.ticket, 10.0) for runtime in world.runtimes]
        rows = [c.num_recv_tokens for c in counts]
        allocate(world, case, ranks, rows)
        world.check()
        heads = [r.send_head >= 0 for r in ranks]
        remote = max(int(h.sum() - h[:, rank].sum()) for rank, h in enumerate(heads))
        return ranks, rows, remote

    def report(name: str, sms: int, us: float, num_bytes: float) -> None:
        rate = num_bytes / us / 1e3
        share = f"  {rate / push:.3f} of push" if push else ""
        print(f"{name:34s} {sms:3d} SMs {us:8.1f} us  {rate:6.1f} GB/s{share}", flush=True)

    if "small" in options.what:
        ranks, rows, remote = prepare(fp8)
        print(f"layout {graph_us(world, lambda: layout(world, fp8, ranks)):.1f} us  notify {graph_us(world, lambda: notify(world, fp8, ranks, ticket=False)):.1f} us  notify publishing {graph_us(world, lambda: notify(world, fp8, ranks)):.1f} us (graphs)")
        at = dataclasses.replace(fp8, num_sms=24)

        def fresh() -> None:
            layout(world, at, ranks)
            notify(world, at, ranks, ticket=False)
            dispatch(world, at, ranks)

        print(f"layout + notify + dispatch fp8, no host {graph_us(world, fresh):.1f} us, dispatch cached {graph_us(world, lambda: dispatch(world, at, ranks, cached=True)):.1f} us (graphs, 24 SMs)")
        world.check()
    if "sweep" in options.what:
        for name, case, cached, shapes in (
            ("fp8", fp8, True, [(7, 3, 2)]),
            ("fp8 with topk", fp8, False, [(7, 3, 1), (7, 3, 2), (7, 3, 4)]),
        ):
            ranks, rows, remote = prepare(case)
            for warps, stages, side in shapes:
                line = f"{name} {warps:2d} warps x {stages} stages, {side} side:"
                for sms in options.sms:
                    at = dataclasses.replace(case, num_sms=sms)
                    line += f"  {sms}: {chain_us(world, lambda at=at, cached=cached: dispatch(world, at, ranks, cached=cached, num_warps=warps, num_stages=stages, num_side_warps=side), 12, 4):.1f}"
                print(line, flush=True)
            world.check()
        ranks, rows, remote = prepare(bf16)
        backs = [make_back(world, bf16, rank, rows[rank]) for rank in range(bf16.num_ranks)]
        world.sync()
        for stages in (7, 5, 4):
            line = f"combine {stages} stages:"
            for sms in options.sms:
                at = dataclasses.replace(bf16, num_sms=sms)
                line += f"  {sms}: {chain_us(world, lambda at=at: combine(world, at, ranks, backs, weights=False, num_stages=stages), 12, 4):.1f}"
            print(line, flush=True)
        world.check()
    tuning = {key: value for key, value in (("num_warps", options.warps), ("num_stages", options.stages)) if value}
    for name, case, cached in (("fp8", fp8, True), ("fp8", fp8, False), ("fp8", column, True), ("bf16", bf16, True), ("bf16", bf16, False)):
        if name not in options.what:
            continue
        ranks, rows, remote = prepare(case)
        row_bytes = case.hidden_bytes + 4 * case.num_scales
        for sms in options.sms:
            at = dataclasses.replace(case, num_sms=sms)
            us = chain_us(world, lambda at=at, ranks=ranks, cached=cached: dispatch(world, at, ranks, cached=cached, **tuning))
            report(f"dispatch {name} {'cached' if cached else 'with topk'} {case.scales_layout if case.num_scales else ''}", sms, us, remote * row_bytes)
        world.check()
    for name, staged, weights in (("combine", False, False), ("combine", False, True), ("staged", True, False)):
        if name not in options.what:
            continue
        case = dataclasses.replace(bf16, staged=(staged,) * options.ranks)
        ranks, rows, remote = prepare(case)
        backs = [make_back(world, case, rank, rows[rank]) for rank in range(case.num_ranks)]
        for sms in options.sms:
            at = dataclasses.replace(case, num_sms=sms)
            us = chain_us(world, lambda at=at, ranks=ranks, backs=backs, weights=weights: combine(world, at, ranks, backs, weights=weights))
            report(f"{name} {'weights' if weights else ''}", sms, us, remote * 14336)
        world.check()
    if "staged" in options.what:
        for name, source in (("fp8", fp8), ("bf16", bf16)):
            case = dataclasses.replace(source, staged=(True,) * options.ranks)
            ranks, rows, remote = prepare(case)
            for sms in options.sms:
                at = dataclasses.replace(case, num_sms=sms)
                us = chain_us(world, lambda at=at, ranks=ranks: dispatch(world, at, ranks))
                report(f"dispatch {name} staged", sms, us, remote * (case.hidden_bytes + 4 * case.num_scales))
            world.check()


if __name__ == "__main__":
    main()
