"""Checks low-latency mode: ``python tests/cluster/low_latency.py``, or the same under torchrun.

Dispatch in every format and every way to wait, combine plain, zero-copy and in LogFMT; then times; with ``--pressure
ROUNDS`` also that each seed gives the same bits three times.

Experts are stand-ins: expert ``e`` multiplies what it received by ``1 + (e % 8) / 8``.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from itertools import product
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from common import Digest, Inputs, Options, Report, chosen_groups, launch, parse, print_times, time_us

from deep_ep import Buffer
from deep_ep.launch import RankContext
from deep_ep.testing.formats import bf16_bits, bf16_to_float32, e4m3_tensor, pack_ue8m0, quantise_fp8, round_to_bf16
from deep_ep.testing.numeric import assert_bitwise_equal, assert_within
from deep_ep.testing.oracle import LowLatencyOracle

FORMATS: dict[str, dict[str, Any]] = {
    "bf16": {"use_fp8": False},
    "fp8": {"use_fp8": True},
    "fp8, scales powers of two": {"use_fp8": True, "round_scale": True},
    "fp8, scales UE8M0": {"use_fp8": True, "round_scale": True, "use_ue8m0": True},
}
WAYS = ("sync", "async", "hook")
# LogFMT keeps a value of a 128-column block within about one of 511 logarithmic steps over at most 32 powers of two.
LOGFMT_TOLERANCE = 0.03


@dataclass(frozen=True, kw_only=True)
class Received:
    """What one dispatch delivered, and what is needed to bring it back."""

    rows: torch.Tensor
    scales: torch.Tensor | None
    count: torch.Tensor
    handle: tuple[Any, ...]


class LowLatencyMode:
    """All checks of one rank for one seed; collective, like the calls they make."""

    def __init__(self, context: RankContext, buffer: Buffer, options: Options, inputs: Inputs) -> None:
        self.context = context
        self.buffer = buffer
        self.inputs = inputs
        self.rank = context.rank
        self.max_tokens = options.tokens
        self.ll_reduce = options.ll_reduce
        self.num_local_experts = inputs.num_experts // inputs.num_ranks
        all_topk_idx = [inputs.topk_idx(rank) for rank in range(inputs.num_ranks)]
        self.oracle = LowLatencyOracle([idx.cpu().numpy() for idx in all_topk_idx], inputs.num_experts)
        self.topk_idx = all_topk_idx[self.rank]
        self.topk_weights = inputs.topk_weights(self.rank)
        self.x = inputs.x(self.rank)
        self.formats = [name for name in FORMATS if self._fits(name)]

    def _fits(self, name: str) -> bool:
        """Whether the hidden size allows this format: scale blocks of 128 columns, four of them to an int32."""
        columns = 1 if name == "bf16" else 512 if "UE8M0" in name else 128
        return self.inputs.hidden % columns == 0

    # --- calls

    def dispatch(self, name: str, way: str, **more: Any) -> Received:
        results = self.buffer.low_latency_dispatch(
            self.x,
            self.topk_idx,
            self.max_tokens,
            self.inputs.num_experts,
            async_finish=way == "async",
            return_recv_hook=way == "hook",
            **{**FORMATS[name], **more},
        )
        received, count, handle, event, hook = results
        self._wait(way, event, hook)
        rows, scales = received if isinstance(received, tuple) else (received, None)
        return Received(rows=rows, scales=scales, count=count, handle=handle)

    def combine(self, way: str, outputs: torch.Tensor, handle: tuple[Any, ...], **more: Any) -> torch.Tensor:
        combined, event, hook = self.buffer.low_latency_combine(
            outputs,
            self.topk_idx,
            self.topk_weights,
            handle,
            async_finish=way == "async",
            return_recv_hook=way == "hook",
            **more,
        )
        self._wait(way, event, hook)
        return combined

    def _wait(self, way: str, event: Any, hook: Callable[[], None] | None) -> None:
        assert (hook is not None) == (way == "hook"), f"{way}: hook is {hook}"
        if hook is not None:
            hook()
        elif way == "async":
            event.current_stream_wait()

    # --- what has to come out

    def sent_as(self, name: str, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor | None]:
        """Rows and scales that dispatch has to deliver for these rows."""
        if name == "bf16":
            return x.cpu(), None
        codes, scales = quantise_fp8(bf16_bits(x), round_scale=FORMATS[name].get("round_scale", False))
        packed = pack_ue8m0(scales) if FORMATS[name].get("use_ue8m0") else scales
        return e4m3_tensor(codes), torch.from_numpy(np.ascontiguousarray(packed))

    def as_bf16(self, name: str, x: torch.Tensor) -> torch.Tensor:
        """What an expert computes on: these rows after they travelled in this format; bf16 ``[T, H]``, CPU."""
        if name == "bf16":
            return x.cpu()
        codes, scales = quantise_fp8(bf16_bits(x), round_scale=FORMATS[name].get("round_scale", False))
        blocks = e4m3_tensor(codes).float().view(*scales.shape, 128)
        return (blocks * torch.from_numpy(scales)[:, :, None]).flatten(1).bfloat16()

    def factor(self, expert: int) -> float:
        return 1 + (expert % 8) / 8

    def outputs(self, name: str, received: Received) -> torch.Tensor:
        """Every expert's stand-in: bf16 ``[L, M, H]``; rows past the count hold NaN, which must not come back."""
        outputs = torch.full(received.rows.shape, float("nan"), dtype=torch.bfloat16, device=self.x.device)
        for expert in range(self.num_local_experts):
            number = self.rank * self.num_local_experts + expert
            for source, first, tokens in self._segments(expert, received.handle):
                rows = self.as_bf16(name, self.inputs.rows(torch.full_like(tokens, source), tokens))
                outputs[expert, first : first + len(tokens)] = (rows * self.factor(number)).to(self.x.device)
        return outputs

    def combined(self, name: str) -> npt.NDArray[np.float32]:
        """What this rank's tokens have to come back as, by the numerical contract: bf16 values ``[T, H]``."""
        return self.oracle.combine(
            self.rank, self._expert_rows(name), self.topk_weights.cpu().numpy(), reduce=self.ll_reduce
        )

    def _expert_rows(self, name: str) -> Callable[[int, int], npt.NDArray[np.float32]]:
        rows = self.as_bf16(name, self.x)
        return lambda expert, _: round_to_bf16(bf16_to_float32(bf16_bits(rows)) * np.float32(self.factor(expert)))

    def _segments(self, expert: int, handle: tuple[Any, ...]) -> list[tuple[int, int, torch.Tensor]]:
        """For one local expert: source rank, first row, and the source's token numbers in the order of arrival."""
        src_info, layout_range = handle[0].cpu(), handle[1].cpu()
        segments = []
        for source, packed in enumerate(layout_range[expert].tolist()):
            first, count = packed >> 32, packed & 0xFFFFFFFF
            segments.append((source, first, src_info[expert, first : first + count].long()))
        return segments

    # --- checks

    def check_dispatch(self, name: str, received: Received) -> None:
        assert received.count.tolist() == self.oracle.num_received(self.rank), (
            f"rank {self.rank}: recv_count is {received.count.tolist()}, expected {self.oracle.num_received(self.rank)}"
        )
        if received.scales is not None:
            strides = received.scales.stride()
            assert strides[1] == 1, f"scales have strides {strides}, expected 1 along rows"
        for expert in range(self.num_local_experts):
            taken: list[int] = []
            for source, first, tokens in self._segments(expert, received.handle):
                expected = self.oracle.tokens(self.rank, expert, source)
                assert sorted(tokens.tolist()) == expected.tolist(), (
                    f"rank {self.rank}: expert {expert} got tokens {sorted(tokens.tolist())} of rank {source}, "
                    f"expected {expected.tolist()}"
                )
                taken += range(first, first + len(tokens))
                rows, scales = self.sent_as(name, self.inputs.rows(torch.full_like(tokens, source), tokens))
                part = slice(first, first + len(tokens))
                what = f"of expert {expert} from rank {source}"
                assert_bitwise_equal(received.rows[expert, part], rows, f"recv_x {what}", rank=self.rank)
                if scales is not None:
                    assert received.scales is not None
                    assert_bitwise_equal(received.scales[expert, part], scales, f"scales {what}", rank=self.rank)
            assert sorted(taken) == list(range(int(received.count[expert]))), "the segments leave gaps or overlap"

    def check_combined(self, name: str, combined: torch.Tensor, what: str) -> None:
        expected = torch.from_numpy(self.combined(name)).bfloat16()
        assert_bitwise_equal(combined, expected, what, rank=self.rank, axes=("token", "column"))

    def check_all(self, report: Report) -> None:
        """Every format in every way to wait, then what only some calls use."""
        for name, way in product(self.formats, WAYS):
            with report.check(f"low-latency dispatch and combine: {name}, {way}"):
                received = self.dispatch(name, way)
                self.check_dispatch(name, received)
                outputs = self.outputs(name, received)
                self.check_combined(name, self.combine(way, outputs, received.handle), "combined_x")
        self.check_variants(report)

    def check_variants(self, report: Report) -> None:
        received = self.dispatch("bf16", "sync")
        outputs = self.outputs("bf16", received)
        with report.check("low-latency combine into a given tensor, twice by one handle"):
            for _ in range(2):
                out = torch.empty_like(self.x)
                assert self.combine("hook", outputs, received.handle, out=out) is out, "out= was not returned"
                self.check_combined("bf16", out, "out")
        with report.check("low-latency combine without a copy"):
            window = self.buffer.get_next_low_latency_combine_buffer(received.handle)
            window.copy_(outputs)
            self.check_combined("bf16", self.combine("sync", window, received.handle, zero_copy=True), "zero-copy")
        self.check_logfmt(report, received.handle, outputs)
        with report.check("weights that travel with dispatch, and statistics"):
            self.check_statistics()

    def check_logfmt(self, report: Report, handle: tuple[Any, ...], outputs: torch.Tensor) -> None:
        if self.inputs.hidden % 128:
            report.note("  --  LogFMT needs a hidden size that is a multiple of 128: left out")
            return
        with report.check("low-latency combine in LogFMT"):
            combined = self.combine("sync", outputs, handle, use_logfmt=True)
            rows, weights = self._expert_rows("bf16"), self.topk_weights.cpu().numpy()
            tolerance = LOGFMT_TOLERANCE * self.oracle.magnitude(self.rank, rows, weights)
            axes = ("token", "column")
            assert_within(combined, self.combined("bf16"), tolerance, "LogFMT", rank=self.rank, axes=axes)

    def check_statistics(self) -> None:
        stats = torch.zeros(self.num_local_experts, dtype=torch.int32, device=self.x.device)
        waits = torch.zeros(self.inputs.num_ranks, dtype=torch.int64, device=self.x.device)
        for round_number in (1, 2):
            received = self.dispatch(
                "bf16",
                "sync",
                topk_weights=self.topk_weights,
                cumulative_local_expert_recv_stats=stats,
                dispatch_wait_recv_cost_stats=waits,
            )
            expected = [round_number * count for count in self.oracle.num_received(self.rank)]
            assert stats.tolist() == expected, f"received rows add up to {stats.tolist()}, expected {expected}"
        assert bool((waits >= 0).all()), f"waited {waits.tolist()} ns"
        self.check_combined("bf16", self.combine("sync", self.outputs("bf16", received), received.handle), "combined_x")

    def digest(self) -> str:
        """One hash over a round of calls; the order of rows inside an expert is free, so received rows are left out."""
        digest = Digest()
        for name in self.formats:
            received = self.dispatch(name, "hook")
            digest.add(received.count, self.combine("hook", self.outputs(name, received), received.handle))
        return str(digest)

    def measure(self, report: Report) -> None:
        """Times of dispatch, of combine, and of the pair."""
        time_of = partial(time_us, self.context)
        for name, bytes_per_value in (("fp8", 1 + 4 / 128), ("bf16", 2.0)):
            if name not in self.formats:
                continue
            received = self.dispatch(name, "sync")
            outputs = self.outputs(name, received).nan_to_num(0.0)
            num_values = int(received.count.sum()) * self.inputs.hidden
            spent = time_of(partial(self.dispatch, name, "hook"))
            print_times(
                report, f"low-latency dispatch, {name}", {"with hook": spent}, int(num_values * bytes_per_value)
            )
            spent = time_of(partial(self.combine, "hook", outputs, received.handle))
            print_times(report, "low-latency combine, bf16", {"with hook": spent}, num_values * 2)
            spent = time_of(partial(self._there_and_back, name, outputs))
            report.note(f"low-latency dispatch ({name}) and combine: {spent:.1f} us")

    def _there_and_back(self, name: str, outputs: torch.Tensor) -> None:
        self.combine("hook", outputs, self.dispatch(name, "hook").handle)


def low_latency_bytes(options: Options, num_ranks: int) -> int:
    """V1's size of a buffer for these calls."""
    return Buffer.get_low_latency_rdma_size_hint(options.tokens, options.hidden, num_ranks, options.experts)


def low_latency_inputs(context: RankContext, options: Options) -> Inputs:
    """Ranks hold different numbers of tokens, the last one none at all if there are several."""
    num_ranks = context.num_ranks
    tokens = tuple(max(1, options.tokens - 3 * rank) for rank in range(num_ranks))
    return Inputs(
        seed=options.seed,
        num_tokens=tokens if num_ranks == 1 else (*tokens[:-1], 0),
        hidden=options.hidden,
        num_topk=options.topk,
        num_experts=options.experts,
        num_groups=num_ranks,
        num_chosen_groups=chosen_groups(options, num_ranks),
        device=context.device,
    )


def check(context: RankContext, options: Options) -> None:
    num_ranks = context.num_ranks
    buffer = Buffer(
        context.group,
        num_rdma_bytes=low_latency_bytes(options, num_ranks),
        low_latency_mode=True,
        num_qps_per_rank=max(1, options.experts // num_ranks),
        explicitly_destroy=True,
        backend=options.backend,
        ll_reduce=options.ll_reduce,
    )
    report = Report(context)
    report.note(f"low latency: {num_ranks} ranks on {context.device.type}, backend {buffer.backends['low_latency']}")
    inputs = low_latency_inputs(context, options)
    mode = LowLatencyMode(context, buffer, options, inputs)
    mode.check_all(report)
    if options.tune:
        mode.measure(report)
    for round_number in range(options.pressure):
        seed = options.seed + 1 + round_number
        again = LowLatencyMode(context, buffer, options, replace(inputs, seed=seed))
        with report.check(f"pressure: seed {seed} gives one hash in three runs"):
            hashes = [again.digest() for _ in range(3)]
            assert len(set(hashes)) == 1, f"rank {context.rank}: seed {seed} gave different results: {hashes}"
    buffer.destroy()
    report.close("low latency")


if __name__ == "__main__":
    defaults = {"tokens": 128, "hidden": 7168, "topk": 8, "experts": 288, "groups": 0}
    sys.exit(launch(check, parse("Low-latency mode.", **defaults)))
