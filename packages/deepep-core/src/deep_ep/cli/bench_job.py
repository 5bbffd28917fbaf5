"""The benchmark on one rank.

A figure is the maximum over ranks of each iteration, and of those the median. Iterations follow one another without the
host waiting for the device; inputs rotate through more memory than the L2 cache holds. Low-latency calls, which take
less time on the device than Python does to launch them, are timed inside CUDA graphs where the backend can be captured.
What is timed is checked against plain arithmetic before and after.
"""

from __future__ import annotations

import contextlib
import os
import statistics
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from typing import Any

import torch
import torch.distributed as dist

from .. import registry
from ..buffer import Buffer
from ..channel import has_cuda_backend
from ..launch import RankContext
from . import bench_clock, bench_data, bench_floor, ranks
from .bench_data import InputSet, Shape
from .bench_rivals import AllGatherReduceScatter, AllToAll

_LOW_LATENCY_SMS = "DEEPEP_LOW_LATENCY_SMS"


@dataclass(frozen=True, kw_only=True)
class BenchSettings:
    """What to measure.

    Attributes:
        shape: what is moved; ``num_ranks`` is filled in by `run_bench`.
        num_sms: SM counts to measure at; empty for the backend's own choice.
        iterations: measured calls of each operation, after ``warmup`` calls.
        backend: a backend's name; ``None`` for the library's choice.
        ll_reduce: where low-latency combine sums.
        has_rivals: measure the two plain ways to do the same work as well.
        progress: show a progress bar on rank 0's standard error.
    """

    shape: Shape
    num_sms: tuple[int, ...] = ()
    iterations: int = 30
    warmup: int = 5
    backend: str | None = None
    ll_reduce: str = "rank"
    has_rivals: bool = True
    progress: bool = True


@dataclass(frozen=True, kw_only=True)
class Measurement:
    """One row of the table.

    Attributes:
        contender, operation: who does what.
        num_sms: SMs for communication kernels; ``None`` where that has no meaning or was the backend's choice.
        seconds: median over iterations of the maximum over ranks; ``fastest``, ``slowest``: 10th and 90th percentile.
        physical_bytes: what has to leave a rank for other ranks, mean over ranks: one copy of a row for each other rank
            that needs it (all-gather + reduce-scatter: every row to every other rank).
        logical_bytes: the same with the copies that stay on their own rank.
        calls_per_graph: calls in each replayed CUDA graph; 0 if the host launched them one by one.
        wire_efficiency: physical bytes per second as a share of the best push limit measured in this run, at whichever
            SM count; ``None`` unless the backend can measure it.
        two_hop_bytes: what two hops have to move out of the busiest rank, mean over input sets; ``None`` unless this is
            normal mode with several nodes on one host.
        two_hop_efficiency: the time that these bytes take at the push limit, as a share of the time measured.
        failure: why this contender could not run here; then there are no figures.
    """

    contender: str
    operation: str
    num_sms: int | None = None
    seconds: float = 0.0
    fastest: float = 0.0
    slowest: float = 0.0
    physical_bytes: float = 0.0
    logical_bytes: float = 0.0
    calls_per_graph: int = 0
    wire_efficiency: float | None = None
    two_hop_bytes: float | None = None
    two_hop_efficiency: float | None = None
    failure: str = ""

    @property
    def physical_gbps(self) -> float:
        return self.physical_bytes / self.seconds / 1e9 if self.seconds else 0.0

    @property
    def logical_gbps(self) -> float:
        return self.logical_bytes / self.seconds / 1e9 if self.seconds else 0.0


@dataclass(kw_only=True)
class BenchResult:
    """Everything rank 0 knows at the end; ``faults`` is empty if every check before and after held."""

    num_ranks: int
    ranks_per_node: int
    hosts: list[str]
    device: str
    backend: str
    push_limit_gbps: dict[int, float] = field(default_factory=dict)
    measurements: list[Measurement] = field(default_factory=list)
    faults: list[str] = field(default_factory=list)


@dataclass(frozen=True, kw_only=True)
class Operation:
    """Something to time: ``call`` works on one input set; bytes are this rank's.

    With ``in_graph`` it is captured and replayed; ``fault`` then says what is wrong with what a replay left, if
    anything, and each of a graph's calls leaves ``output_bytes``.
    """

    contender: str
    name: str
    call: Callable[[InputSet], Any]
    physical_bytes: float = 0.0
    logical_bytes: float = 0.0
    in_graph: bool = False
    output_bytes: int = 0
    fault: Callable[[InputSet, Any], str] | None = None


def rated(m: Measurement, limit_gbps: float | None, two_hop_bytes: float | None) -> Measurement:
    """The measurement beside what the links would allow."""
    if limit_gbps is None or not m.seconds:
        return replace(m, two_hop_bytes=two_hop_bytes)
    return replace(
        m,
        wire_efficiency=m.physical_gbps / limit_gbps,
        two_hop_bytes=two_hop_bytes,
        two_hop_efficiency=None if two_hop_bytes is None else two_hop_bytes / (limit_gbps * 1e9) / m.seconds,
    )


def run_bench(context: RankContext, settings: BenchSettings) -> BenchResult:
    """Measure on this rank together with the others. Every rank returns the same result."""
    shape = settings.shape
    buffer = build_buffer(context, settings)
    assert buffer.runtime is not None
    num_nodes = buffer.runtime.get_num_rdma_ranks()
    result = BenchResult(
        num_ranks=context.num_ranks,
        ranks_per_node=context.num_ranks // num_nodes,
        hosts=_hosts(context),
        device=torch.cuda.get_device_name(context.device) if context.device.type == "cuda" else "CPU",
        backend=dict(buffer.backends)[shape.mode],
    )
    session = Session(context, settings, buffer, result.ranks_per_node)
    try:
        session.run(result)
    finally:
        session.buffer.destroy()
    return result


def run_benches(context: RankContext, each: list[BenchSettings]) -> list[BenchResult]:
    """One after the other."""
    return [run_bench(context, settings) for settings in each]


def build_buffer(context: RankContext, settings: BenchSettings) -> Buffer:
    """The buffer to measure. Collective."""
    shape = settings.shape
    return Buffer.for_model(
        context.group,
        hidden=shape.hidden,
        num_experts=shape.experts,
        num_topk=shape.topk,
        max_tokens_per_rank=_room(shape),
        mode=shape.mode,
        backend=settings.backend,
        ll_reduce=settings.ll_reduce,  # type: ignore[arg-type]
    )


def _room(shape: Shape) -> int:
    """``X`` of low-latency calls: the tokens, rounded up to a multiple of 4."""
    return (shape.tokens + 3) // 4 * 4


def _num_sets(device: torch.device, shape: Shape) -> int:
    """Input sets to rotate through: together more than twice the L2 cache, at least 2 and at most 16."""
    if device.type != "cuda":
        return 2
    set_bytes = shape.tokens * shape.hidden * 2 * 3  # rows out, rows in (at least as many), rows back
    cache: int = torch.cuda.get_device_properties(device).L2_cache_size
    return min(16, max(2, -(-2 * cache // set_bytes)))


def _hosts(context: RankContext) -> list[str]:
    import socket

    name = torch.zeros(1, 64, dtype=torch.uint8)
    encoded = socket.gethostname().encode()[:64]
    name[0, : len(encoded)] = torch.tensor(list(encoded), dtype=torch.uint8)
    gathered = ranks.gather_rows(context, name)
    return list(dict.fromkeys(bytes(row[0].tolist()).rstrip(b"\0").decode(errors="replace") for row in gathered))


class Session:
    """One buffer, one shape, all contenders."""

    def __init__(
        self,
        context: RankContext,
        settings: BenchSettings,
        buffer: Buffer,
        ranks_per_node: int,
    ) -> None:
        self.context, self.settings, self.shape = context, settings, settings.shape
        self.buffer, self.ranks_per_node = buffer, ranks_per_node
        self.sets = [
            bench_data.make_inputs(self.shape, context.rank, seed, context.device)
            for seed in range(_num_sets(context.device, self.shape))
        ]
        self.all_to_all = AllToAll(context.group, context.rank, self.shape)
        self.all_gather = AllGatherReduceScatter(context.group, context.rank, self.shape)
        self._faults_in_graphs: list[str] = []

    def run(self, result: BenchResult) -> None:
        self.prepare()
        result.faults += self.faults("before")
        sm_counts: tuple[int | None, ...] = self.settings.num_sms or (None,)
        ours, rivals = self._operations(), self._rival_operations() if self.settings.has_rivals else []
        with self.progress(len(ours) * len(sm_counts) + len(rivals)) as advance:
            for num_sms in sm_counts:
                if num_sms is not None:
                    self._use_sms(num_sms)
                limit = self._push_limit(num_sms)
                if limit is not None:
                    result.push_limit_gbps[num_sms or Buffer.num_sms] = limit
                for operation in ours:
                    advance(f"{operation.contender}: {operation.name}")
                    result.measurements.append(self.measure(operation, num_sms))
            for operation in rivals:
                advance(f"{operation.contender}: {operation.name}")
                result.measurements.append(self.measure(operation, None))
        limit = max(result.push_limit_gbps.values(), default=None)
        floors: dict[str, float] = {}
        if self.shape.mode == "normal" and len(result.hosts) == 1 and result.ranks_per_node < result.num_ranks:
            floors = bench_floor.two_hop_bytes(self.shape, result.ranks_per_node, len(self.sets))
        result.measurements = [
            rated(m, limit, floors.get(m.operation.partition(",")[0])) if m.contender == "deep_ep" else m
            for m in result.measurements
        ]
        result.faults += self.faults("after")
        result.faults += self._faults_in_graphs

    def _use_sms(self, num_sms: int) -> None:
        """From here on kernels get this many SMs. Collective in low-latency mode, where a buffer keeps its number."""
        if self.shape.mode == "normal":
            Buffer.set_num_sms(num_sms)
            return
        self.buffer.destroy()
        before = os.environ.get(_LOW_LATENCY_SMS)
        os.environ[_LOW_LATENCY_SMS] = str(num_sms)
        try:
            self.buffer = build_buffer(self.context, self.settings)
        finally:
            del os.environ[_LOW_LATENCY_SMS]
            if before is not None:
                os.environ[_LOW_LATENCY_SMS] = before
        self.prepare()

    # --- what is timed ------------------------------------------------------------------------------------------------

    def _operations(self) -> list[Operation]:
        shape = self.shape
        # Rows over all ranks' choices; every input set has nearly as many, the mean is reported.
        logical = statistics.mean(int(s.in_rank.sum()) for s in self.sets)
        physical = logical - statistics.mean(int(s.in_rank[:, self.context.rank].sum()) for s in self.sets)
        out, back = shape.dispatch_row_bytes, shape.combine_row_bytes

        def operation(name: str, call: Callable[[InputSet], Any], row_bytes: int, **how: Any) -> Operation:
            return Operation(
                contender="deep_ep",
                name=name,
                call=call,
                physical_bytes=physical * row_bytes,
                logical_bytes=logical * row_bytes,
                **how,
            )

        if shape.mode == "low_latency":
            return self._low_latency_operations(operation)
        return [
            operation("pair", lambda s: (self._cached(s), self._combine(s)), out + back),
            operation("dispatch", self._cached, out),
            operation("combine", self._combine, back),
            operation("dispatch, uncached", self._fresh, out),
            *(
                [operation("combine, outputs anywhere", self._combine_anywhere, back)]
                if self.buffer.placement()
                else []
            ),
        ]

    def _low_latency_operations(self, operation: Callable[..., Operation]) -> list[Operation]:
        shape = self.shape
        out, back = shape.dispatch_row_bytes, shape.combine_row_bytes
        backend = registry.load(self.buffer.backends["low_latency"])
        if not (backend.capabilities.cuda_graphs and self.context.device.type == "cuda"):
            return [
                operation("pair", self._low_latency_pair, out + back),
                operation("dispatch", self._low_latency_dispatch, out),
                operation("combine", self._low_latency_combine, back),
            ]
        rows = shape.experts * _room(shape)
        of_dispatch, of_combine = rows * shape.dispatch_row_bytes, shape.tokens * shape.combine_row_bytes
        captured: dict[str, Any] = {"in_graph": True, "output_bytes": of_dispatch + of_combine}
        fault = self._combine_fault
        return [
            operation("pair", self._low_latency_pair, out + back, **captured, fault=lambda s, o: fault(s, o[1])),
            operation(
                "pair, weights in dispatch",
                lambda s: self._low_latency_pair(s, weights_in_dispatch=True),
                out + back,
                **captured,
                fault=lambda s, o: fault(s, o[1]),
            ),
            operation("dispatch", self._low_latency_dispatch, out, **captured, fault=self._dispatch_fault),
            operation("combine", self._low_latency_combine, back, **captured, fault=fault),
            operation("pair, without a graph", self._low_latency_pair, out + back),
        ]

    def _rival_operations(self) -> list[Operation]:
        shape, found = self.shape, []
        # NCCL's collectives can be captured too, and have the same to gain.
        in_graph = shape.mode == "low_latency" and self.context.num_ranks > 1 and has_cuda_backend(self.context.group)
        out, back = shape.dispatch_row_bytes, shape.combine_row_bytes
        for rival, kept in ((self.all_to_all, None), (self.all_gather, shape.tokens)):
            physical = statistics.mean(rival.egress_rows(s) for s in self.sets)
            own = kept if kept is not None else statistics.mean(int(s.in_rank.sum()) for s in self.sets) - physical
            for name, call, row_bytes in (
                ("pair", lambda s, rival=rival: (rival.dispatch(s), rival.combine(s)), out + back),
                ("dispatch", rival.dispatch, out),
                ("combine", rival.combine, back),
            ):
                found.append(
                    Operation(
                        contender=rival.name,
                        name=name,
                        call=call,
                        physical_bytes=physical * row_bytes,
                        logical_bytes=(physical + own) * row_bytes,
                        in_graph=in_graph,
                        output_bytes=shape.num_ranks * shape.tokens * row_bytes,
                    )
                )
        return found

    def _fresh(self, inputs: InputSet) -> tuple[Any, ...]:
        per_rank, per_node, per_expert, in_rank, _ = self.buffer.get_dispatch_layout(
            inputs.topk_idx, self.shape.experts
        )
        return self.buffer.dispatch(
            inputs.sent,
            num_tokens_per_rank=per_rank,
            num_tokens_per_rdma_rank=per_node,
            is_token_in_rank=in_rank,
            num_tokens_per_expert=per_expert,
            topk_idx=inputs.topk_idx,
            topk_weights=inputs.topk_weights,
        )

    def _cached(self, inputs: InputSet) -> Any:
        return self.buffer.dispatch(inputs.sent, handle=inputs.handle)[0]

    def _combine(self, inputs: InputSet) -> torch.Tensor:
        assert inputs.expert_out is not None
        combined: torch.Tensor = self.buffer.combine(inputs.expert_out, inputs.handle)[0]
        return combined

    def _combine_anywhere(self, inputs: InputSet) -> torch.Tensor:
        assert inputs.rival_out is not None
        combined: torch.Tensor = self.buffer.combine(inputs.rival_out, inputs.handle)[0]
        return combined

    def _low_latency_pair(self, inputs: InputSet, weights_in_dispatch: bool = False) -> tuple[Any, torch.Tensor]:
        arrived = self._low_latency_dispatch(inputs, inputs.topk_weights if weights_in_dispatch else None)
        if weights_in_dispatch:
            return arrived, self._low_latency_combine(inputs, arrived[1])
        return arrived, self._low_latency_combine(inputs)

    def _low_latency_dispatch(
        self, inputs: InputSet, topk_weights: torch.Tensor | None = None
    ) -> tuple[Any, tuple[Any, ...]]:
        received, _, handle, _, _ = self.buffer.low_latency_dispatch(
            inputs.x,
            inputs.topk_idx,
            _room(self.shape),
            self.shape.experts,
            use_fp8=self.shape.dtype == "fp8",
            topk_weights=topk_weights,
        )
        return received, handle

    def _low_latency_combine(self, inputs: InputSet, handle: tuple[Any, ...] | None = None) -> torch.Tensor:
        assert inputs.expert_out is not None
        combined: torch.Tensor = self.buffer.low_latency_combine(
            inputs.expert_out, inputs.topk_idx, inputs.topk_weights, handle or inputs.handle
        )[0]
        return combined

    def _push_limit(self, num_sms: int | None) -> float | None:
        if self.shape.mode != "normal":
            return None
        return self.buffer.push_limit_gbps(num_sms or Buffer.num_sms)

    # --- the clock ----------------------------------------------------------------------------------------------------

    def measure(self, operation: Operation, num_sms: int | None) -> Measurement:
        """Time one operation. Collective; the same result on every rank."""
        failure = ""
        timed = bench_clock.Timed(seconds=[])
        try:
            timed = self._time(operation)
        except (RuntimeError, ValueError, NotImplementedError) as error:
            if operation.contender == "deep_ep":
                raise
            failure = (str(error).splitlines() or [type(error).__name__])[0][:160]
        if ranks.any_rank(self.context, bool(failure)):
            return Measurement(
                contender=operation.contender, operation=operation.name, failure=failure or "another rank could not"
            )
        times = ranks.slowest(self.context, timed.seconds)
        if operation.fault is not None:
            faults = [operation.fault(inputs, output) for inputs, output in timed.outputs]
            what = f"{operation.name} in a graph"
            self._faults_in_graphs += self._told_to_all(next(filter(None, faults), ""), what)
        together = torch.tensor([operation.physical_bytes, operation.logical_bytes], dtype=torch.float64)
        if self.context.num_ranks > 1:
            dist.all_reduce(together, group=self.context.group)
        physical, logical = (together / self.context.num_ranks).tolist()
        seconds = statistics.median(times)
        tenths = statistics.quantiles(times, n=10, method="inclusive") if len(times) > 1 else [seconds] * 9
        return Measurement(
            contender=operation.contender,
            operation=operation.name,
            num_sms=num_sms,
            seconds=seconds,
            fastest=tenths[0],
            slowest=tenths[-1],
            physical_bytes=physical,
            logical_bytes=logical,
            calls_per_graph=timed.calls_per_graph,
        )

    def _time(self, operation: Operation) -> bench_clock.Timed:
        context, iterations, warmup = self.context, self.settings.iterations, self.settings.warmup
        if not operation.in_graph:
            return bench_clock.time_calls(context, operation.call, self.sets, iterations=iterations, warmup=warmup)
        num_calls = bench_clock.calls_in_a_graph(context, operation.output_bytes)
        return bench_clock.time_graph(
            context, operation.call, self.sets, num_calls=num_calls, iterations=iterations, warmup=warmup
        )

    # --- the checks ---------------------------------------------------------------------------------------------------

    def prepare(self) -> None:
        """Fill in handles and expert outputs, and tell the all-to-all its counts."""
        for inputs in self.sets:
            from_each = [
                int(
                    bench_data.ranks_of(self.shape, bench_data.choices(self.shape, source, inputs.seed))[
                        :, self.context.rank
                    ].sum()
                )
                for source in range(self.context.num_ranks)
            ]
            self.all_to_all.prepare(inputs, from_each)
            expected = bench_data.expected_dispatch(self.shape, self.context.rank, inputs.seed, self.context.device)
            inputs.rival_out = bench_data.stand_in_for_experts(expected, self.context.rank)
            if self.shape.mode == "normal":
                received, _, _, _, inputs.handle, _ = self._fresh(inputs)
                outputs = bench_data.stand_in_for_experts(received, self.context.rank)
                with self.buffer.symmetric_memory():
                    inputs.expert_out = outputs.clone()
            else:
                received, inputs.handle = self._low_latency_dispatch(inputs)
                inputs.expert_out = bench_data.stand_in_for_low_latency_experts(self.shape, received, self.context.rank)

    def faults(self, when: str) -> list[str]:
        """What is wrong on any rank, in words; the same on every rank."""
        mine = ""
        for inputs in self.sets:
            fault = self._fault(inputs)  # collective, so also after a first fault
            mine = mine or fault
        return self._told_to_all(mine, when)

    def _told_to_all(self, fault: str, when: str) -> list[str]:
        """Every rank's fault, with its rank. Collective."""
        row = torch.zeros(1, 200, dtype=torch.uint8)
        encoded = fault.encode()[:200]
        row[0, : len(encoded)] = torch.tensor(list(encoded), dtype=torch.uint8)
        found = [bytes(r[0].tolist()).rstrip(b"\0").decode() for r in ranks.gather_rows(self.context, row)]
        return [f"{when}, rank {rank}: {text}" for rank, text in enumerate(found) if text]

    def _fault(self, inputs: InputSet) -> str:
        """What is wrong with this input set on this rank. All calls are made before anything is compared."""
        shape, rank = self.shape, self.context.rank
        if shape.mode == "normal":
            received = {"dispatch": self._fresh(inputs)[0], "cached dispatch": self._cached(inputs)}
            combined = self._combine(inputs)
            combined_elsewhere = self._combine_anywhere(inputs)
            expected = bench_data.expected_dispatch(shape, rank, inputs.seed, self.context.device)
            wrong = [f"{name} did not deliver what it had to" for name, x in received.items() if not _same(x, expected)]
            if not bench_data.same_bits(combined_elsewhere, combined):
                wrong.append("combine of outputs in ordinary memory differs from the other")
            wanted = bench_data.expected_combine(shape, inputs, self.ranks_per_node)
        else:
            arrived, inputs.handle = self._low_latency_dispatch(inputs)
            inputs.expert_out = bench_data.stand_in_for_low_latency_experts(shape, arrived, rank)
            combined = self._low_latency_combine(inputs)
            wrong = [fault] if (fault := self._dispatch_fault(inputs, (arrived, inputs.handle))) else []
            wanted = bench_data.expected_low_latency_combine(shape, inputs, self.settings.ll_reduce)
        if not bench_data.same_bits(combined, wanted):
            wrong.append("combine differs from plain arithmetic")
        if self.settings.has_rivals:
            wrong += self._rival_fault(inputs, wanted)
        return "; ".join(wrong)

    def _dispatch_fault(self, inputs: InputSet, output: tuple[Any, tuple[Any, ...]]) -> str:
        """What is wrong with the result of a low-latency dispatch."""
        fault = bench_data.check_low_latency_dispatch(self.shape, self.context.rank, inputs.seed, *output)
        return f"dispatch: {fault}" if fault else ""

    def _combine_fault(self, inputs: InputSet, combined: torch.Tensor) -> str:
        """What is wrong with the result of a low-latency combine."""
        wanted = bench_data.expected_low_latency_combine(self.shape, inputs, self.settings.ll_reduce)
        return "" if bench_data.same_bits(combined, wanted) else "combine differs from plain arithmetic"

    def _rival_fault(self, inputs: InputSet, wanted: torch.Tensor) -> list[str]:
        """All-to-all has to do the same work, or comparing times with it means nothing."""
        try:
            received, combined = self.all_to_all.dispatch(inputs), self.all_to_all.combine(inputs)
        except RuntimeError:
            return []  # it cannot run here; the table says so
        expected = bench_data.expected_dispatch(self.shape, self.context.rank, inputs.seed, self.context.device)
        wrong = [] if _same(received, expected) else ["all-to-all did not deliver what it had to"]
        if self.shape.mode == "normal" and self.ranks_per_node == self.shape.num_ranks:
            # In float32 these sums of a few short numbers are exact, so their order does not show.
            wrong += [] if bench_data.same_bits(combined, wanted) else ["all-to-all's combine differs"]
        return wrong

    # --- the bar ------------------------------------------------------------------------------------------------------

    @contextlib.contextmanager
    def progress(self, total: int) -> Iterator[Callable[[str], None]]:
        if not self.settings.progress or self.context.rank != 0:
            yield lambda _text: None
            return
        from rich.console import Console
        from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

        columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
        with Progress(*columns, console=Console(stderr=True), transient=True) as progress:
            task = progress.add_task("measuring", total=total)
            started = False

            def advance(text: str) -> None:
                nonlocal started
                progress.update(task, description=text, advance=1 if started else 0)
                started = True

            yield advance


def _same(received: Any, expected: Any) -> bool:
    if isinstance(expected, tuple):
        return all(bench_data.same_bits(a, b) for a, b in zip(received, expected, strict=True))
    return bench_data.same_bits(received, expected)
