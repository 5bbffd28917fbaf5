"""Times dispatch and combine between virtual nodes, and says where the time of their blocks goes.

Needs GPUs of one host. A figure is the median over calls of the slowest rank's time; the floor is what two hops have
to move out of the busiest rank at the rate at which this machine was found to push. Calls differ in their rows, so
that none finds its own in a cache. A tuning is a list of ``name=value`` for the extension's call, joined by commas;
``--trace`` needs the extension built with ``DEEPEP_NVSHMEM_TRACE=1``.
"""

from __future__ import annotations

import argparse
import itertools
import statistics
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist

from deep_ep import ArgumentError, Buffer
from deep_ep.cli.bench_data import Shape, as_bf16, choice_weights, choices, payload, rows
from deep_ep.cli.bench_floor import two_hop_bytes
from deep_ep.launch import RankContext, RankPool

OPERATIONS = ("dispatch", "fresh", "combine")  # a cached dispatch; layout, counts and dispatch; combine
NUM_SETS = 3
# The points of csrc/internode/kernels.hpp.
POINTS = {
    "dispatch": ("handshake over", "chunk sent", "sending over", "row delivered", "delivering over", "credits over"),
    "combine": ("handshake over", "answer sent", "forwarding over", "block summed", "summing over", "requests over"),
}
MOVED = {"dispatch": ("chunks sent", "rows delivered"), "combine": ("answers sent", "blocks summed")}
SPANS = ("finding", "loading", "awaiting", "passing on", "idle", "chunks without credit", "credits held back")
NEVER = 0xFFFFFFFF


@dataclass(frozen=True, kw_only=True)
class Task:
    """What is measured in one topology."""

    shape: Shape
    ranks_per_node: int
    operations: tuple[str, ...]
    sms: tuple[int, ...]
    tunings: dict[str, tuple[str, ...]]  # of each kernel
    num_calls: int
    has_trace: bool
    megahertz: float
    nodes: str  # that tokens go to: all, the own one, or the next one


class Tuned:
    """The runtime of a backend, with more arguments for its dispatch and combine."""

    def __init__(self, runtime: Any) -> None:
        self._runtime = runtime
        self.more: dict[str, dict[str, int]] = {"dispatch": {}, "combine": {}}

    def __getattr__(self, name: str) -> Any:
        return getattr(self._runtime, name)

    def dispatch(self, **arguments: Any) -> Any:
        return self._runtime.dispatch(**arguments, **self.more["dispatch"])

    def combine(self, **arguments: Any) -> Any:
        return self._runtime.combine(**arguments, **self.more["combine"])


def kernel_of(operation: str) -> str:
    return "combine" if operation == "combine" else "dispatch"


def parsed(tuning: str) -> dict[str, int]:
    return {name: int(value) for name, _, value in (part.partition("=") for part in tuning.split(",") if part)}


def restricted(chosen: torch.Tensor, task: Task, rank: int) -> torch.Tensor:
    """Choices of experts on this rank's node only, or on the next node only."""
    if task.nodes == "all":
        return chosen
    shape = task.shape
    num_node_experts = shape.experts // shape.num_ranks * task.ranks_per_node
    node = rank // task.ranks_per_node + (1 if task.nodes == "next" else 0)
    return chosen % num_node_experts + node * num_node_experts % shape.experts


class Bench:
    def __init__(self, context: RankContext, task: Task) -> None:
        self.context, self.task = context, task
        shape, rank, device = task.shape, context.rank, context.device
        self.buffer = Buffer(context.group, 1 << 28, backend="nvshmem", timeout_s=15.0)
        backend: Any = self.buffer._normal_backend
        self.tuned = backend._runtime = Tuned(backend._runtime)
        self.chosen = restricted(choices(shape, rank, seed=0), task, rank).to(device)
        self.weights = choice_weights(shape, rank, seed=0).to(device)
        tokens = torch.arange(shape.tokens, device=device)
        self.sent = [payload(shape, rows(shape, rank, tokens, seed)) for seed in range(NUM_SETS)]
        result = self.fresh(0)
        self.handle = result[4]
        received = as_bf16(result[0])
        with self.buffer.symmetric_memory():
            self.out = [received + seed for seed in range(NUM_SETS)]
        self.calls: dict[str, Callable[[int], Any]] = {
            "dispatch": lambda i: self.buffer.dispatch(self.sent[i], handle=self.handle),
            "fresh": self.fresh,
            "combine": lambda i: self.buffer.combine(self.out[i], self.handle),
        }
        self.expected: dict[str, list[torch.Tensor]] = {}

    def fresh(self, i: int) -> Any:
        layout = self.buffer.get_dispatch_layout(self.chosen, self.task.shape.experts)
        per_rank, per_node, per_expert, in_rank, _ = layout
        return self.buffer.dispatch(
            self.sent[i],
            num_tokens_per_rank=per_rank,
            num_tokens_per_rdma_rank=per_node,
            is_token_in_rank=in_rank,
            num_tokens_per_expert=per_expert,
            topk_idx=self.chosen,
            topk_weights=self.weights,
        )

    def check(self, operation: str) -> None:
        """However blocks share the work, the bits are those of the first tuning."""
        result = self.calls[operation](0)
        first = result[0] if isinstance(result[0], tuple) else (result[0],)
        found = [t.clone() for t in (*first, *(() if operation == "combine" else result[1:3])) if t is not None]
        for a, b in zip(found, self.expected.setdefault(operation, found), strict=True):
            assert torch.equal(a.view(torch.uint8), b.view(torch.uint8)), f"{operation} differs from the first one"

    def microseconds(self, operation: str) -> list[float]:
        call = self.calls[operation]
        for i in range(4):
            call(i % NUM_SETS)
        torch.cuda.synchronize()
        dist.barrier(self.context.group)
        events = [torch.cuda.Event(enable_timing=True) for _ in range(self.task.num_calls + 1)]
        torch.cuda._sleep(2_000_000 * self.task.num_calls)  # the host is ahead of the GPU, a slow one too
        events[0].record()
        for i, event in enumerate(events[1:]):
            call(i % NUM_SETS)
            event.record()
        torch.cuda.synchronize()
        times = torch.tensor([a.elapsed_time(b) * 1e3 for a, b in itertools.pairwise(events)])
        dist.all_reduce(times, op=dist.ReduceOp.MAX, group=self.context.group)
        return [float(t) for t in times]

    def trace(self, kernel: str, num_blocks: int) -> list[str]:
        from deepep_nvshmem.backend import load_internode_extension

        read = getattr(load_internode_extension(), "traces", None)
        if read is None:
            raise RuntimeError("This extension keeps no clocks. Build it with DEEPEP_NVSHMEM_TRACE=1.")
        torch.cuda.synchronize()
        return trace_lines(kernel, read(kernel)[:num_blocks], self.task.megahertz)


def trace_lines(kernel: str, blocks: list[tuple[Any, ...]], megahertz: float) -> list[str]:
    """When the blocks of a kernel came to which point, in microseconds since each began: blocks alike together."""
    begins, ends = [b[1] for b in blocks], [b[2] for b in blocks]
    whole, start = (max(ends) - min(begins)) / 1e3, (max(begins) - min(begins)) / 1e3
    lines = [f"kernel {whole:.1f} us by the GPU's timer; its blocks began within {start:.1f}"]
    alike: dict[tuple[bool, bool], list[tuple[Any, ...]]] = {}
    for block in blocks:
        alike.setdefault((block[4][0] > 0, block[4][1] > 0), []).append(block)
    for (has_sent, has_received), group in sorted(alike.items(), reverse=True):
        role = " and ".join(name for name, has in zip(MOVED[kernel], (has_sent, has_received), strict=True) if has)
        moved = ", ".join(f"{statistics.mean(b[4][kind] for b in group):.0f} {MOVED[kernel][kind]}" for kind in (0, 1))
        lines.append(f"{len(group)} blocks with {role or 'nothing moved'} (mean {moved}): minimum / median / maximum")
        for point, name in enumerate(POINTS[kernel]):
            firsts = [b[5][point] for b in group if b[5][point] != NEVER]
            lasts = [b[6][point] for b in group if b[6][point]]
            for which, ticks in (("first", firsts), ("last", lasts)):
                if ticks:
                    lines.append(f"  {which:5s} {name:16s} {_spread(ticks, megahertz)}  {len(ticks)} blocks")
        lines.append(f"  {'block over':22s} {_spread([b[3] for b in group], megahertz)}")
        spent = [statistics.mean(b[7][kind] for b in group) / megahertz for kind in range(len(SPANS))]
        if any(spent):
            parts = ", ".join(f"{name} {us:.0f}" for name, us in zip(SPANS, spent, strict=True))
            lines.append(f"  us of all warps of a block that move rows through stages, and of chunks: {parts}")
    return lines


def _spread(ticks: list[int], megahertz: float) -> str:
    us = [t / megahertz for t in ticks]
    return f"{min(us):7.1f} {statistics.median(us):7.1f} {max(us):7.1f}"


def measure(context: RankContext, task: Task) -> None:
    bench = Bench(context, task)
    floors = two_hop_bytes(task.shape, task.ranks_per_node, 1)

    def say(line: str) -> None:
        if context.rank == 0:
            print(line, flush=True)

    nodes = f"{context.num_ranks // task.ranks_per_node} x {task.ranks_per_node}"
    push = bench.buffer.push_limit_gbps(max(task.sms)) or 0.0
    say(f"{nodes}: pushes {push:.0f} GB/s")
    try:
        for operation in task.operations:
            kernel = kernel_of(operation)
            for sms in task.sms:
                Buffer.set_num_sms(sms)
                for tuning in task.tunings[kernel]:
                    bench.tuned.more[kernel] = parsed(tuning)
                    what = f"{nodes} {operation:8s} {sms:3d} SMs {tuning or 'as chosen':42s}"
                    try:
                        bench.check(operation)
                        times = bench.microseconds(operation)
                    except refusals() as refused:  # by every rank alike
                        say(f"{what} {refused}")
                        continue
                    us, floor = statistics.median(times), floors[kernel] / push / 1e3 if push else 0.0
                    share = f", floor {floor:6.1f}: {floor / us:.2f}" if task.nodes == "all" else ""
                    say(f"{what} {us:7.1f} us (largest {max(times):7.1f}){share}")
                    if task.has_trace:
                        for line in bench.trace(kernel, sms):
                            say("    " + line)
                bench.tuned.more[kernel] = {}
    finally:
        bench.buffer.destroy()


def refusals() -> tuple[type[Exception], ...]:
    from deepep_nvshmem.backend import load_internode_extension

    return ArgumentError, load_internode_extension().ArgumentError


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--ranks", type=int, default=4)
    parser.add_argument("--ranks-per-node", type=int, nargs="+", default=[2, 1])
    parser.add_argument("--tokens", type=int, default=4096)
    parser.add_argument("--hidden", type=int, default=7168)
    parser.add_argument("--dtype", choices=["fp8", "bf16"], default="fp8")
    parser.add_argument("--groups", type=int, default=1, help="8 with --topk-groups 4: as DeepSeek-V3 chooses")
    parser.add_argument("--topk-groups", type=int, default=1)
    parser.add_argument("--nodes", choices=["all", "own", "next"], default="all", help="tokens go to these nodes only")
    parser.add_argument("--what", nargs="+", choices=OPERATIONS, default=["dispatch", "combine"])
    parser.add_argument("--sms", type=int, nargs="+", default=[24])
    parser.add_argument("--tunings", nargs="+", default=[""], help="of dispatch; empty: what the library chooses")
    parser.add_argument("--combine-tunings", nargs="+", default=[""])
    parser.add_argument("--calls", type=int, default=20)
    parser.add_argument("--window-mb", type=int, help="DEEPEP_NVSHMEM_WINDOW_MB")
    parser.add_argument("--trace", action="store_true")
    parser.add_argument("--megahertz", type=float, default=1980.0, help="of the SMs, for --trace")
    options = parser.parse_args()
    shape = Shape(
        mode="normal",
        tokens=options.tokens,
        hidden=options.hidden,
        topk=8,
        experts=256,
        dtype=options.dtype,
        num_ranks=options.ranks,
        num_groups=options.groups,
        num_topk_groups=options.topk_groups,
    )
    with RankPool(options.ranks, device="cuda") as pool:
        for ranks_per_node in options.ranks_per_node:
            task = Task(
                shape=shape,
                ranks_per_node=ranks_per_node,
                operations=tuple(options.what),
                sms=tuple(options.sms),
                tunings={"dispatch": tuple(options.tunings), "combine": tuple(options.combine_tunings)},
                num_calls=options.calls,
                has_trace=options.trace,
                megahertz=options.megahertz,
                nodes=options.nodes,
            )
            environment = {"DEEPEP_RANKS_PER_NODE": str(ranks_per_node)}
            if options.window_mb:
                environment["DEEPEP_NVSHMEM_WINDOW_MB"] = str(options.window_mb)
            pool.run(measure, task, environment=environment, timeout_s=180.0)


if __name__ == "__main__":
    main()
