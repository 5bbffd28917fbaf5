"""What a normal-mode call costs the host: ``python benchmarks/profile_host.py --ranks 1 --backend nvlink``.

For each kind of call: host microseconds while the device is idle (median and 90th percentile), microseconds per call
when calls follow one another (as `deepep bench` times them), and the functions that take most of the host's time
(native calls may count as their caller's own). On GPUs also what the device does in a fresh call: its kernels and the
gaps between them. Rank 0 prints its own figures.
"""

from __future__ import annotations

import argparse
import cProfile
import io
import itertools
import pstats
import re
import statistics
import time
from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist

from deep_ep import Buffer
from deep_ep.launch import RankContext, join_external, launched_externally, run_ranks


class Calls:
    """The calls that are timed, on one set of inputs."""

    def __init__(self, context: RankContext, options: argparse.Namespace) -> None:
        self.buffer = Buffer(context.group, backend=options.backend)
        self.num_experts = options.experts
        torch.manual_seed(context.rank)
        device, shape = context.device, (options.tokens, options.hidden)
        self.x: Any = torch.randn(shape, device=device).bfloat16()
        if options.fp8:
            scales = torch.rand((options.tokens, options.hidden // 128), device=device)
            self.x = (self.x.to(torch.float8_e4m3fn), scales)
        scores = torch.rand((options.tokens, options.experts), device=device)
        self.topk_weights, self.topk_idx = scores.topk(options.topk)
        received, *_, self.handle, _ = self.fresh()
        rows = received[0] if isinstance(received, tuple) else received
        with self.buffer.symmetric_memory():
            self.expert_out = torch.zeros(rows.shape, dtype=torch.bfloat16, device=device)

    def layout(self) -> tuple[Any, ...]:
        return self.buffer.get_dispatch_layout(self.topk_idx, self.num_experts)

    def fresh(self) -> tuple[Any, ...]:
        per_rank, per_node, per_expert, in_rank, _ = self.layout()
        return self.buffer.dispatch(
            self.x,
            num_tokens_per_rank=per_rank,
            num_tokens_per_rdma_rank=per_node,
            is_token_in_rank=in_rank,
            num_tokens_per_expert=per_expert,
            topk_idx=self.topk_idx,
            topk_weights=self.topk_weights,
        )

    def cached(self) -> Any:
        return self.buffer.dispatch(self.x, handle=self.handle)

    def combine(self) -> Any:
        return self.buffer.combine(self.expert_out, self.handle)


def measure(context: RankContext, options: argparse.Namespace) -> str:
    """The report. Collective."""
    calls = Calls(context, options)
    operations: dict[str, Callable[[], Any]] = {
        "layout": calls.layout,
        "layout + fresh dispatch": calls.fresh,
        "cached dispatch": calls.cached,
        "combine": calls.combine,
    }
    lines = [
        f"{context.num_ranks} ranks, {options.tokens} tokens of {options.hidden}, top {options.topk} of "
        f"{options.experts}, backend {calls.buffer.backends['normal']}, torch {torch.__version__}",
        f"{'':26} {'host us':>9} {'p90':>9} {'chained us':>11}",
    ]
    for name, call in operations.items():
        _together(context)
        alone = [_timed(context, call) for _ in range(options.rounds)]
        tenths = statistics.quantiles(alone, n=10, method="inclusive")
        chained = _chained(context, call, options.rounds)
        lines.append(f"{name:26} {statistics.median(alone):9.1f} {tenths[-1]:9.1f} {chained:11.1f}")
    if context.device.type == "cuda":
        lines += ["", "device, one fresh call after another:", *_kernels(context, calls.fresh)]
    for name, call in operations.items():
        lines += ["", f"{name}: host time by function, us per call", *_profile(context, call, options)]
    calls.buffer.destroy()
    return "\n".join(lines)


def _finish(context: RankContext) -> None:
    if context.device.type == "cuda":
        torch.cuda.synchronize(context.device)


def _together(context: RankContext) -> None:
    _finish(context)
    if context.num_ranks > 1:
        dist.all_reduce(torch.zeros(1), group=context.group)


def _timed(context: RankContext, call: Callable[[], Any]) -> float:
    """Host microseconds of one call that finds the device idle."""
    _finish(context)
    begin = time.perf_counter()
    result = call()
    end = time.perf_counter()
    del result
    return (end - begin) * 1e6


def _chained(context: RankContext, call: Callable[[], Any], rounds: int) -> float:
    """Median microseconds per call of calls that follow one another: between events on a GPU, else of the host."""
    _together(context)
    if context.device.type != "cuda":
        stamps = [time.perf_counter()]
        for _ in range(rounds):
            call()
            stamps.append(time.perf_counter())
        return statistics.median((b - a) * 1e6 for a, b in itertools.pairwise(stamps))
    events = [torch.cuda.Event(enable_timing=True) for _ in range(rounds + 1)]
    events[0].record()
    for event in events[1:]:
        call()
        event.record()
    _together(context)
    return statistics.median(a.elapsed_time(b) * 1e3 for a, b in itertools.pairwise(events))


def _kernels(context: RankContext, call: Callable[[], Any], num_calls: int = 20) -> list[str]:
    """Median duration of each kernel, and of the gap before it, in the order of one call."""
    from torch.profiler import ProfilerActivity, profile

    _together(context)
    with profile(activities=[ProfilerActivity.CUDA]) as profiler:
        for _ in range(num_calls):
            call()
        _together(context)
    found = sorted(
        (e.time_range.start, e.time_range.end, kernel[0])
        for e in profiler.events() or []
        if e.device_type == torch.autograd.DeviceType.CUDA and (kernel := re.search(r"\w*kernel\w*", e.name))
    )
    figures: dict[str, tuple[list[float], list[float]]] = {}
    for (_, before, _), (begin, end, name) in itertools.pairwise(found):
        gaps, times = figures.setdefault(name, ([], []))
        gaps.append(begin - before)
        times.append(end - begin)
    return [
        f"  {name:40} gap before {statistics.median(gaps):7.1f} us, runs {statistics.median(times):7.1f} us"
        for name, (gaps, times) in figures.items()
    ]


def _profile(context: RankContext, call: Callable[[], Any], options: argparse.Namespace) -> list[str]:
    """The functions with the most time of their own. The profiler makes every call slower; look at proportions."""
    profiler = cProfile.Profile()
    _together(context)
    for _ in range(options.rounds):
        _finish(context)
        profiler.enable()
        call()
        profiler.disable()
    stats = pstats.Stats(profiler, stream=io.StringIO())
    rows = sorted(
        ((own, total, count, where) for where, (_, count, own, total, _) in stats.stats.items()),  # type: ignore[attr-defined]
        reverse=True,
    )
    scale = 1e6 / options.rounds
    lines = [f"  {'own':>7} {'all':>7} {'calls':>6}"]
    for own, total, count, (file, line, name) in rows[: options.top]:
        place = name if file == "~" else f"{'/'.join(file.split('/')[-2:])}:{line} {name}"
        lines.append(f"  {own * scale:7.1f} {total * scale:7.1f} {count / options.rounds:6.1f} {place}")
    return lines


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--ranks", type=int, default=1, help="local processes; torchrun brings its own")
    parser.add_argument("--tokens", type=int, default=128)
    parser.add_argument("--hidden", type=int, default=7168)
    parser.add_argument("--experts", type=int, default=256)
    parser.add_argument("--topk", type=int, default=8)
    parser.add_argument("--bf16", dest="fp8", action="store_false", help="send bf16 rows instead of FP8 and scales")
    parser.add_argument("--rounds", type=int, default=300)
    parser.add_argument("--top", type=int, default=20, help="functions to list for each call")
    parser.add_argument("--backend", default=None, help="the fastest that can serve if not given")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    options = parser.parse_args()
    if launched_externally():
        context = join_external(options.device)
        report = measure(context, options)
        if context.rank == 0:
            print(report)
        dist.destroy_process_group()
    else:
        print(run_ranks(measure, options, num_ranks=options.ranks, device=options.device)[0])


if __name__ == "__main__":
    main()
