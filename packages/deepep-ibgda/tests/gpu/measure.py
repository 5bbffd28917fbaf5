"""Times dispatch, combine and the pair on 1, 2 or 4 GPUs driven by one process, each rank's chain in a CUDA graph.

A figure is the median over replays of (the time of a chain) / (its length); the slowest rank counts.
"""

from __future__ import annotations

import argparse
import statistics
from collections.abc import Callable
from dataclasses import replace
from functools import partial

import torch
from low_latency_world import Case, World, combine, dispatch, make_combining, make_inputs, make_received, native

Launch = Callable[[], object]


def graph_us(world: World, launches: list[Launch], length: int = 50, repetitions: int = 8) -> float:
    graphs = [torch.cuda.CUDAGraph() for _ in world.streams]
    world.sync()
    for rank, graph in enumerate(graphs):
        world.only = rank
        with (
            torch.cuda.device(world.devices[rank]),
            torch.cuda.graph(graph, stream=world.streams[rank], capture_error_mode="thread_local"),
        ):
            for _ in range(length):
                for launch in launches:
                    launch()
    world.only = None
    times = []
    for repetition in range(repetitions):
        world.sync()
        begin = [torch.cuda.Event(enable_timing=True) for _ in world.streams]
        end = [torch.cuda.Event(enable_timing=True) for _ in world.streams]
        for rank, graph in enumerate(graphs):
            with torch.cuda.device(world.devices[rank]), torch.cuda.stream(world.streams[rank]):
                begin[rank].record()
                graph.replay()
                end[rank].record()
        world.check()
        if repetition:  # the first one warms up
            times.append(max(b.elapsed_time(e) for b, e in zip(begin, end, strict=True)) * 1000 / length)
    return statistics.median(times)


STAMPS = {
    "dispatch": [
        "begun",
        "state read",
        "row cast",
        "barrier",
        "index stored",
        "payload stored",
        "scales stored",
        "shares done",
        "index read",
        "first row there",
        "first row taken",
        "all taken",
    ],
    "combine": [
        "begun",
        "state read",
        "handle read",
        "barrier",
        "weights sent",
        "single rows sent",
        "all sent",
        "receivers begun",
        "first part taken",
        "first piece drawn",
        "first sum sent",
        "all taken",
    ],
}


NUM_STAMPS = 14  # the last two in nanoseconds: begin, and end of the last warp


def print_gaps(world: World, num_blocks: int) -> None:
    """When the blocks of a chain's last pair began and ended (first, median, last); what lay between its kernels."""
    for rank in range(world.num_ranks):
        with torch.cuda.device(world.devices[rank]):
            d, c = (
                torch.tensor(native().stamps(op), dtype=torch.int64).view(-1, NUM_STAMPS)[:num_blocks, 12:]
                for op in ("dispatch", "combine")
            )
        columns = [stamps[:, i] - d[:, 0].min() for stamps in (d, c) for i in (0, 1)]
        # Blocks that only send leave no time of their end in dispatch: theirs is an old one, or none.
        points = [column[(column >= 0) & (column < 1_000_000)] for column in columns]
        text = " | ".join(f"{int(p.min())} {int(p.median())} {int(p.max())}" for p in points)
        between = int(points[2].min() - points[1].max())
        print(f"  rank {rank}, ns: dispatch begins | ends | combine begins | ends: {text}; between {between}")


def print_trace(world: World, op: str, num_blocks: int, megahertz: float = 1980.0) -> None:
    """When the blocks of each rank's last operation came to which point, in microseconds since they began."""
    for rank in (0, world.num_ranks - 1):
        with torch.cuda.device(world.devices[rank]):
            stamps = torch.tensor(native().stamps(op), dtype=torch.int64).view(-1, NUM_STAMPS)[:num_blocks]
        since = ((stamps - stamps[:, :1]) & 0xFFFFFFFF).float() / megahertz
        print(f"  {op}, rank {rank}: minimum / median / maximum over blocks (blocks that came there last time)")
        for point, name in enumerate(STAMPS[op]):
            column = since[:, point]
            column = column[column < 1e3]
            if name != "-" and point and len(column):
                low, high = float(column.min()), float(column.max())
                print(f"    {name:18s} {low:6.2f} {float(column.median()):6.2f} {high:6.2f}   {len(column)} blocks")


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--ranks", type=int, default=min(4, torch.cuda.device_count()))
    parser.add_argument("--tokens", type=int, nargs="*", default=[1, 8, 16, 64, 128, 256])
    parser.add_argument("--sms", type=int, nargs="*", default=[32, 64, 96, 128, 132])
    parser.add_argument("--casts", nargs="*", default=["fp8"])
    parser.add_argument("--ll-reduce", default="rank")
    parser.add_argument("--hidden", type=int, default=7168)
    parser.add_argument("--experts", type=int, default=288)
    parser.add_argument("--topk", type=int, default=8)
    parser.add_argument("--with-weights", action="store_true")
    parser.add_argument("--logfmt", action="store_true")
    parser.add_argument("--trace", action="store_true", help="needs a build with DEEPEP_LL_TRACE=1")
    args = parser.parse_args()
    world = World(args.ranks, 1 << 30, ll_reduce=args.ll_reduce)
    print(f"{args.ranks} ranks, hidden {args.hidden}, top-{args.topk} of {args.experts}, {args.ll_reduce}")
    print("microseconds: dispatch, combine, pair")
    for cast in args.casts:
        for tokens in args.tokens:
            base = Case(
                num_tokens=(tokens,) * args.ranks,
                hidden=args.hidden,
                num_topk=args.topk,
                num_experts=args.experts // args.ranks * args.ranks,
                cast=cast,
                with_weights=args.with_weights,
                use_logfmt=args.logfmt,
            )
            inputs, received, combining = (
                make_inputs(world, base),
                make_received(world, base),
                make_combining(world, base),
            )
            line = []
            for sms in args.sms:
                case = replace(base, num_sms=sms)
                out = partial(dispatch, world, case, inputs, received)
                back = partial(combine, world, case, inputs, received, combining)
                times = [graph_us(world, launch) for launch in ([out], [back], [out, back])]
                line.append(f"{sms} SMs " + " ".join(f"{us:5.1f}" for us in times))
            if args.trace:
                for op, launch in (("dispatch", out), ("combine", back)):
                    graph_us(world, [launch])
                    print_trace(world, op, args.sms[-1])
                graph_us(world, [out, back])
                print_gaps(world, args.sms[-1])
            print(f"{cast} {tokens:4d} tokens: " + " | ".join(line), flush=True)


if __name__ == "__main__":
    main()
