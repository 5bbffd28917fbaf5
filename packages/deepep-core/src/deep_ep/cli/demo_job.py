"""The demo on one rank: text through a mixture-of-experts layer, and the check on rank 0.

Symbols: ``T`` tokens (bytes) of this rank, ``H`` hidden size, ``N`` ranks, ``E`` experts, ``X`` tokens of a rank's
micro-batch in low-latency mode.
"""

from __future__ import annotations

import os
import time
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.distributed as dist

from .. import nn
from ..buffer import Buffer
from ..launch import RankContext
from . import ranks

NUM_CONTEXT_BYTES = 4  # a byte is embedded together with the three before it, so that equal bytes may part ways
HEAD_SIZE = 64


@dataclass(frozen=True, kw_only=True)
class DemoSettings:
    """What to run.

    Attributes:
        text: at most this is used, split evenly over the ranks.
        tokens: the most bytes of a rank.
        hidden, width, num_experts, num_topk, num_groups, num_selected_groups: of the layer.
        low_latency_tokens: ``X``, the size of each of the two micro-batches.
        backend: a backend's name; ``None`` for the library's choice.
        seed: of all weights.
        plant: number of a token whose combined row gets one wrong value, to see the check find it.
    """

    text: bytes
    tokens: int
    hidden: int
    width: int
    num_experts: int
    num_topk: int
    num_groups: int
    num_selected_groups: int
    low_latency_tokens: int
    backend: str | None = None
    seed: int = 0
    plant: int | None = None


@dataclass(frozen=True, kw_only=True)
class Check:
    """One comparison with the layer computed in one process.

    ``rows`` is what a row of the compared tensor is (``token`` or ``expert``), ``count`` how many values were compared.
    """

    mode: str
    what: str
    rows: str
    count: int
    difference: nn.Difference
    first: int | None = None

    @property
    def agrees(self) -> bool:
        return self.difference.agrees


@dataclass(kw_only=True)
class DemoReport:
    """What rank 0 has to show. Times are milliseconds of the slowest rank; the matrices are nested lists by rank."""

    num_ranks: int
    device: str
    backends: dict[str, str]
    num_tokens: list[int]
    sent: list[list[int]]  # rows from source rank (outer) to destination rank (inner)
    row_bytes: int
    expert_load: list[int]
    times_ms: dict[str, float]
    checks: list[Check] = field(default_factory=list)

    @property
    def agrees(self) -> bool:
        return all(check.agrees for check in self.checks)

    @property
    def first_token(self) -> Check | None:
        """The failed check with the lowest token number; else any failed check."""
        failed = [check for check in self.checks if not check.agrees]
        of_tokens = [check for check in failed if check.rows == "token"]
        return min(of_tokens, key=lambda check: check.first or 0) if of_tokens else next(iter(failed), None)


def token_range(num_bytes: int, num_ranks: int, tokens: int, rank: int) -> tuple[int, int]:
    """First and one-past-last byte of a rank; ranks differ by at most one."""
    used = min(num_bytes, num_ranks * tokens)
    return used * rank // num_ranks, used * (rank + 1) // num_ranks


class Embedding:
    """Bytes to bf16 rows ``[T, H]``; the same on every rank. Row ``t`` depends on bytes ``t - 3 .. t``."""

    def __init__(self, settings: DemoSettings) -> None:
        generator = torch.Generator().manual_seed(settings.seed + 17)
        self.tables = torch.randn(NUM_CONTEXT_BYTES, 256, settings.hidden, generator=generator)

    def rows(self, text: bytes, begin: int, end: int) -> torch.Tensor:
        padded = torch.frombuffer(bytearray(bytes(NUM_CONTEXT_BYTES - 1) + text), dtype=torch.uint8).long()
        total = torch.zeros(end - begin, self.tables.shape[-1])
        for back in range(NUM_CONTEXT_BYTES):
            first = begin + NUM_CONTEXT_BYTES - 1 - back
            total += self.tables[back][padded[first : first + end - begin]] * 0.5**back
        return normalised(total).to(torch.bfloat16)


def normalised(x: torch.Tensor) -> torch.Tensor:
    """Rows scaled to a root mean square of 1."""
    return x * torch.rsqrt(x.square().mean(-1, keepdim=True) + 1e-6)


def attention(x: torch.Tensor) -> torch.Tensor:
    """Causal self-attention of ``[X, H]`` rows on themselves, added to them and normalised, in float32 or float64."""
    head = HEAD_SIZE if x.shape[-1] % HEAD_SIZE == 0 else x.shape[-1]
    heads = x.unflatten(-1, (-1, head)).transpose(0, 1)
    mixed = torch.nn.functional.scaled_dot_product_attention(heads, heads, heads, is_causal=True)
    return normalised(x + mixed.transpose(0, 1).flatten(-2))


def build_gate(settings: DemoSettings) -> nn.Gate:
    """The gate of every rank, with a bias that moves some choices."""
    torch.manual_seed(settings.seed)
    gate = nn.Gate(
        hidden=settings.hidden,
        num_experts=settings.num_experts,
        num_topk=settings.num_topk,
        num_groups=settings.num_groups,
        num_selected_groups=settings.num_selected_groups,
        route_scale=2.5,
    )
    gate.bias += 0.05 * torch.randn(settings.num_experts)
    return gate


class _OneWrongValue:
    """A buffer whose combine gives one wrong value in the row of one of this rank's tokens."""

    def __init__(self, buffer: Buffer, row: int) -> None:
        self._buffer, self._row = buffer, row

    def __getattr__(self, name: str) -> Any:
        return getattr(self._buffer, name)

    def combine(self, x: torch.Tensor, handle: Any, topk_weights: Any = None, **rest: Any) -> Any:
        combined, weights, event = self._buffer.combine(x, handle, topk_weights, **rest)
        if topk_weights is None:  # the forward direction
            combined[self._row, -1] += 1 + combined[self._row, -1].abs()
        return combined, weights, event


def run_demo(context: RankContext, settings: DemoSettings) -> DemoReport | bool:
    """The whole demo on this rank: rank 0 returns the report, the others whether all agreed."""
    device = context.device
    begin, end = token_range(len(settings.text), context.num_ranks, settings.tokens, context.rank)
    gate = build_gate(settings).to(device)
    per_rank = settings.num_experts // context.num_ranks
    experts = nn.Experts(
        hidden=settings.hidden,
        width=settings.width,
        num_experts=per_rank,
        first_expert=context.rank * per_rank,
        seed=settings.seed,
    ).to(device)
    x = Embedding(settings).rows(settings.text, begin, end).to(device)
    buffer = Buffer.for_model(
        context.group,
        hidden=settings.hidden,
        num_experts=settings.num_experts,
        num_topk=settings.num_topk,
        max_tokens_per_rank=settings.low_latency_tokens,
        mode="both",
        backend=settings.backend,
    )
    try:
        facing: Any = buffer
        if settings.plant is not None and begin <= settings.plant < end:
            facing = _OneWrongValue(buffer, settings.plant - begin)
        layer = nn.MoELayer(facing, gate, experts, max_tokens=settings.low_latency_tokens)
        normal = _normal_mode(context, settings, layer, x)
        low_latency = _low_latency_mode(context, settings, layer, x)
        times = dict(
            zip(
                normal.times | low_latency.times,
                ranks.slowest(context, [*normal.times.values(), *low_latency.times.values()]),
                strict=True,
            )
        )
        report = DemoReport(
            num_ranks=context.num_ranks,
            device=torch.cuda.get_device_name(device) if device.type == "cuda" else "CPU",
            backends=dict(buffer.backends.items()),
            num_tokens=[int(t.shape[0]) for t in normal.gathered["output"]],
            sent=torch.stack(normal.gathered["sent"]).squeeze(1).tolist(),
            row_bytes=settings.hidden * 2,
            expert_load=torch.cat(normal.gathered["expert_load"]).tolist(),
            times_ms=times,
        )
        if context.rank == 0:
            torch.set_num_threads(min(8, os.cpu_count() or 1))  # the other ranks have nothing left to do
            report.checks = _checks(settings, context.num_ranks, normal, low_latency)
        failed = ranks.any_rank(context, not report.agrees)
        return report if context.rank == 0 else not failed
    finally:
        buffer.destroy()


@dataclass(kw_only=True)
class _Pass:
    """What one mode left on all ranks (``gathered``, lists by rank, CPU) and how long it took here."""

    gathered: dict[str, list[torch.Tensor]] = field(default_factory=dict)
    times: dict[str, float] = field(default_factory=dict)
    num_nodes: int = 1


def _normal_mode(context: RankContext, settings: DemoSettings, layer: nn.MoELayer, x: torch.Tensor) -> _Pass:
    device, done = context.device, _Pass()
    x = x.detach().requires_grad_()
    generator = torch.Generator().manual_seed(settings.seed * 1009 + context.rank)
    direction = torch.randn(x.shape, generator=generator).to(device, torch.bfloat16)
    output = layer(x)
    output.backward(direction)
    assert x.grad is not None
    assert layer.gate.weight.grad is not None
    gate_gradient = layer.gate.weight.grad.cpu()
    if context.num_ranks > 1:
        dist.all_reduce(gate_gradient, group=context.group)
    routing = layer.gate(x)
    layout = layer.buffer.get_dispatch_layout(routing.topk_idx, settings.num_experts)
    done.num_nodes = 1 if layout[1] is None else int(layout[1].numel())
    local = {
        "x": x,
        "topk_idx": routing.topk_idx,
        "direction": direction,
        "output": output,
        "grad x": x.grad,
        "grad gate": gate_gradient,
        "grad gate_up": layer.experts.gate_up.grad,
        "grad down": layer.experts.down.grad,
        "sent": layout[0].unsqueeze(0),
    }
    # The same again in pieces, with a clock: the pass above has paid for whatever happens only once.
    timed = _Clock(context)
    layer.zero_grad()
    x.grad = None
    with timed("gate"):
        routing = layer.gate(x)
    with timed("dispatch"):
        arrived = nn.dispatch(layer.buffer, x, routing.topk_idx, routing.topk_weights, num_experts=settings.num_experts)
    with timed("experts"):
        y = layer.experts(arrived.recv_x, arrived.recv_topk_idx, arrived.recv_topk_weights).to(torch.bfloat16)
    with timed("combine"):
        again = nn.combine(layer.buffer, y, arrived.handle)
    with timed("backward"):
        again.backward(direction)
    local["expert_load"] = torch.tensor(arrived.num_recv_tokens_per_expert)
    done.times = timed.times
    done.gathered = {
        name: ranks.gather_rows(context, value) for name, value in local.items() if isinstance(value, torch.Tensor)
    }
    return done


def _low_latency_mode(context: RankContext, settings: DemoSettings, layer: nn.MoELayer, x: torch.Tensor) -> _Pass:
    done = _Pass()
    size = min(settings.low_latency_tokens, x.shape[0] // 2)
    first, second = x[:size], x[size : 2 * size]
    timed = _Clock(context)
    local = {"first": first, "second": second}
    for cast, use_fp8 in (("bf16", False), ("fp8", True)):
        for is_warm in (False, True):
            # The hook at work: the first micro-batch travels while the second one is in attention, and the other way.
            with timed(f"low-latency, 2 batches, {cast}, overlapped"):
                step = layer.low_latency(first, use_fp8=use_fp8)
                attended = attention(second.float()).to(torch.bfloat16)
                step.compute()
                other = layer.low_latency(attended, use_fp8=use_fp8)
                out_first = step.result()
                other.compute()
                out_second = other.result()
            with timed(f"low-latency, 2 batches, {cast}, in turn"):
                layer.low_latency(first, use_fp8=use_fp8).result()
                layer.low_latency(attention(second.float()).to(torch.bfloat16), use_fp8=use_fp8).result()
            if is_warm:
                local |= {f"first {cast}": out_first, f"second {cast}": out_second}
    with timed("low-latency, attention alone"):
        attended = attention(second.float()).to(torch.bfloat16)
    local |= {
        "attended": attended,
        "topk first": layer.gate(first).topk_idx,
        "topk second": layer.gate(attended).topk_idx,
    }
    done.times = timed.times
    done.gathered = {name: ranks.gather_rows(context, value) for name, value in local.items()}
    return done


class _Clock:
    """Milliseconds of named pieces of work, ranks starting together; a piece done again replaces its time."""

    def __init__(self, context: RankContext) -> None:
        self.context = context
        self.times: dict[str, float] = {}

    def __call__(self, name: str) -> _Piece:
        return _Piece(self, name)


class _Piece:
    def __init__(self, clock: _Clock, name: str) -> None:
        self.clock, self.name = clock, name

    def __enter__(self) -> None:
        ranks.synchronize(self.clock.context.device)
        if self.clock.context.num_ranks > 1:
            dist.barrier(self.clock.context.group)
        self.started = time.perf_counter()

    def __exit__(self, *_: object) -> None:
        ranks.synchronize(self.clock.context.device)
        self.clock.times[self.name] = (time.perf_counter() - self.started) * 1e3


def _checks(settings: DemoSettings, num_ranks: int, normal: _Pass, low_latency: _Pass) -> list[Check]:
    """Compare everything the ranks computed with the layer in this process (rank 0, CPU, float64)."""
    experts = nn.Experts(
        hidden=settings.hidden, width=settings.width, num_experts=settings.num_experts, seed=settings.seed
    )
    check = nn.OneProcessCheck(
        build_gate(settings), experts, num_ranks=num_ranks, ranks_per_node=num_ranks // normal.num_nodes
    )
    checks: list[Check] = []

    def compare(
        mode: str,
        what: str,
        expected: nn.Expected,
        actual: torch.Tensor,
        numbers: torch.Tensor | None = None,
        rows: str = "token",
    ) -> None:
        difference = expected.difference(actual)
        row = difference.first_row
        first = row if row is None or numbers is None else int(numbers[row])
        checks.append(Check(mode=mode, what=what, rows=rows, count=actual.numel(), difference=difference, first=first))

    def route(mode: str, what: str, x: torch.Tensor, topk_idx: torch.Tensor, numbers: torch.Tensor) -> None:
        wrong = check.misrouted(x, topk_idx)
        first = int(wrong[0]) if wrong.numel() else None
        error = float(wrong.numel() > 0)
        checks.append(
            Check(
                mode=mode,
                what=what,
                rows="token",
                count=topk_idx.numel(),
                difference=nn.Difference(max_error=error, max_share=error and float("inf"), first_row=first),
                first=None if first is None else int(numbers[first]),
            )
        )

    whole = {name: torch.cat(parts) for name, parts in normal.gathered.items() if name != "grad gate"}
    numbers = torch.arange(whole["x"].shape[0])
    embedded = Embedding(settings).rows(settings.text, 0, whole["x"].shape[0])
    exact = nn.Expected(value=embedded.double(), tolerance=torch.zeros(embedded.shape, dtype=torch.float64))
    compare("normal", "embedded bytes", exact, whole["x"], numbers)
    route("normal", "chosen experts", whole["x"], whole["topk_idx"], numbers)
    expected = check.normal(whole["x"], whole["topk_idx"], whole["direction"])
    compare("normal", "output", expected["output"], whole["output"], numbers)
    compare("normal", "gradient, tokens", expected["grad x"], whole["grad x"], numbers)
    compare("normal", "gradient, gate", expected["grad gate"], normal.gathered["grad gate"][0], rows="expert")
    for name in ("gate_up", "down"):
        compare("normal", f"gradient, experts' {name}", expected[f"grad {name}"], whole[f"grad {name}"], rows="expert")

    batches = {name: torch.cat(parts) for name, parts in low_latency.gathered.items()}
    starts = torch.tensor([0, *(t.shape[0] for t in normal.gathered["x"])]).cumsum(0)
    sizes = [t.shape[0] for t in low_latency.gathered["first"]]
    first_numbers = torch.cat([start + torch.arange(n) for start, n in zip(starts, sizes, strict=False)])
    second_numbers = torch.cat([start + n + torch.arange(n) for start, n in zip(starts, sizes, strict=False)])
    compare("low-latency", "attention, second batch", _attended(low_latency), batches["attended"], second_numbers)
    for which, of, at in (("first", "first", first_numbers), ("second", "attended", second_numbers)):
        route("low-latency", f"chosen experts, {which} batch", batches[of], batches[f"topk {which}"], at)
        for cast in ("bf16", "fp8"):
            wanted = check.low_latency(batches[of], batches[f"topk {which}"], use_fp8=cast == "fp8")
            compare("low-latency", f"output, {which} batch, {cast}", wanted, batches[f"{which} {cast}"], at)
    return checks


def _attended(low_latency: _Pass) -> nn.Expected:
    """The second micro-batch behind attention: float64, allowed one rounding to bf16 and float32's noise."""
    exact = torch.cat([attention(rows.double()) for rows in low_latency.gathered["second"]])
    rough = torch.cat([attention(rows.float()) for rows in low_latency.gathered["second"]])
    noise = nn.check.NOISE_FACTOR * float((rough - exact).abs().max()) if exact.numel() else 0.0
    return nn.Expected(value=exact, tolerance=nn.check.BF16_ROUNDING * exact.abs() + noise)
