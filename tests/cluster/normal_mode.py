"""The flow of normal mode that `intranode.py` and `internode.py` share: check every way to call, measure, repeat.

Experts are stand-ins: each rank multiplies what it received by a factor of its own (`NormalMode.experts`), so that a
row that comes back from the wrong rank, twice, or in another order of summation shows in the bits.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import partial
from itertools import product
from typing import Any

import torch
from common import Digest, Inputs, Options, Report, expect_refusal, print_times, sm_choices, time_us

from deep_ep import Buffer, Config
from deep_ep.launch import RankContext
from deep_ep.testing.numeric import assert_bitwise_equal
from deep_ep.testing.oracle import NormalOracle

Scaled = tuple[torch.Tensor, torch.Tensor]
ALIGNMENT = 16


@dataclass(frozen=True, kw_only=True)
class Call:
    """One way to call: the kind of rows, and the three choices about order."""

    payload: str
    with_topk: bool
    async_finish: bool
    with_previous_event: bool

    def __str__(self) -> str:
        parts = [self.payload, "top-k" if self.with_topk else "no top-k", "async" if self.async_finish else "sync"]
        return ", ".join(parts + ["previous event"] * self.with_previous_event)

    def order(self) -> dict[str, Any]:
        """The keywords about order that all normal-mode calls share."""
        return {
            "previous_event": Buffer.capture() if self.with_previous_event else None,
            "async_finish": self.async_finish,
            "allocate_on_comm_stream": self.async_finish and self.with_previous_event,
        }


ALL_CALLS = tuple(
    Call(payload=payload, with_topk=topk, async_finish=asynchronous, with_previous_event=previous)
    for previous, asynchronous, payload, topk in product((False, True), (False, True), ("bf16", "fp8"), (False, True))
)


class NormalMode:
    """All checks of one rank for one seed; collective, like the calls they make."""

    def __init__(self, context: RankContext, buffer: Buffer, inputs: Inputs, ranks_per_node: int) -> None:
        self.context = context
        self.buffer = buffer
        self.inputs = inputs
        self.ranks_per_node = ranks_per_node
        self.rank = context.rank
        all_topk_idx = [inputs.topk_idx(rank) for rank in range(inputs.num_ranks)]
        self.topk_idx = all_topk_idx[self.rank]
        self.topk_weights = inputs.topk_weights(self.rank)
        self.x = inputs.x(self.rank)
        self.oracle = NormalOracle(
            [idx.cpu().numpy() for idx in all_topk_idx], inputs.num_experts, ranks_per_node=ranks_per_node
        )
        sources = torch.from_numpy(self.oracle.sources(self.rank))
        self.expected_rows = inputs.rows(sources[:, 0], sources[:, 1])
        self.origins = sources.tolist()
        self.layout = self.buffer.get_dispatch_layout(self.topk_idx, inputs.num_experts)

    @property
    def num_received(self) -> int:
        return len(self.origins)

    # --- calls

    def fresh(self, call: Call, **more: Any) -> tuple[Any, ...]:
        per_rank, per_node, per_expert, in_rank, _ = self.layout
        topk: dict[str, Any] = {"topk_idx": self.topk_idx, "topk_weights": self.topk_weights} if call.with_topk else {}
        return self._wait(
            call,
            self.buffer.dispatch(
                self.payload(call.payload, self.x),
                num_tokens_per_rank=per_rank,
                num_tokens_per_rdma_rank=per_node,
                num_tokens_per_expert=per_expert,
                is_token_in_rank=in_rank,
                **topk,
                **call.order(),
                **more,
            ),
        )

    def cached(self, call: Call, handle: tuple[Any, ...], **more: Any) -> tuple[Any, ...]:
        rows = self.payload(call.payload, self.x)
        return self._wait(call, self.buffer.dispatch(rows, handle=handle, **call.order(), **more))

    def combine(self, call: Call, x: torch.Tensor, handle: tuple[Any, ...], **more: Any) -> tuple[Any, ...]:
        return self._wait(call, self.buffer.combine(x, handle, **call.order(), **more))

    def _wait(self, call: Call, results: tuple[Any, ...]) -> tuple[Any, ...]:
        """The results, once the current stream may use them."""
        event = results[-1]
        assert (event.event is not None) == call.async_finish, f"{call}: the event does not say how the call was made"
        if call.async_finish:
            event.current_stream_wait()
        return results

    # --- data

    def payload(self, kind: str, rows: torch.Tensor) -> torch.Tensor | Scaled:
        """What travels: bf16 rows as they are, or bytes made of them with column-major scales."""
        if kind == "bf16":
            return rows
        codes = ((rows.view(torch.int16).int() * 37 >> 4) & 0xFF).to(torch.uint8).view(torch.float8_e4m3fn)
        num_scales = max(1, rows.shape[1] // 128)
        return codes, rows[:, :num_scales].float().t().contiguous().t()

    def experts(self, rows: torch.Tensor, rank: int) -> torch.Tensor:
        """The stand-in for the experts of ``rank``; bf16 to bf16.

        Of three neighbours the first is small and the others cancel: what is left of the small one depends on whether
        it was added before they cancelled, as ascending order wants it, or after.
        """
        return rows * (1 + rank // 3 / 8) * (1.0, 2.0**20, -(2.0**20))[rank % 3]

    def combined(self, biases: tuple[torch.Tensor, ...] = ()) -> torch.Tensor:
        """What this rank's tokens have to come back as, by the numerical contract: bf16 ``[T, H]``."""
        held = torch.from_numpy(self.oracle.is_token_in_rank(self.rank)).to(self.x.device)
        total = torch.zeros_like(self.x, dtype=torch.float32)
        for bias in biases:
            total = total + bias.float()
        num_ranks, per_node = self.inputs.num_ranks, self.ranks_per_node
        for first in range(0, num_ranks, per_node):
            one_node = per_node == num_ranks
            partial = total if one_node else torch.zeros_like(total)
            for rank in range(first, first + per_node):
                added = partial + self.experts(self.x, rank).float()
                partial = torch.where(held[:, rank, None], added, partial)
            total = partial if one_node else total + partial.bfloat16().float()
        return total.bfloat16()

    # --- checks

    def check_layout(self) -> None:
        per_rank, per_node, per_expert, in_rank, _ = self.layout
        oracle, rank = self.oracle, self.rank
        self._equal(per_rank, torch.from_numpy(oracle.num_tokens_per_rank(rank)).int(), "num_tokens_per_rank")
        self._equal(per_expert, torch.from_numpy(oracle.num_tokens_per_expert(rank)).int(), "num_tokens_per_expert")
        self._equal(in_rank, torch.from_numpy(oracle.is_token_in_rank(rank)), "is_token_in_rank")
        if oracle.num_nodes == 1:
            assert per_node is None, "num_tokens_per_rdma_rank has to be None on a single node"
        else:
            expected = torch.from_numpy(oracle.num_tokens_per_node(rank)).int()
            assert per_node is not None, "num_tokens_per_rdma_rank is None although there are several nodes"
            self._equal(per_node, expected, "num_tokens_per_rdma_rank")

    def check_rows(self, call: Call, received: torch.Tensor | Scaled) -> None:
        parts = received if isinstance(received, tuple) else (received,)
        payload = self.payload(call.payload, self.expected_rows)
        for part, expected, what in zip(
            parts, payload if isinstance(payload, tuple) else (payload,), ("recv_x", "recv_scales"), strict=False
        ):
            assert part.is_contiguous(), f"{what} is not row-major"
            self._equal(part[: self.num_received], expected, what, by_origin=True)

    def check_fresh(self, call: Call, results: tuple[Any, ...], *, alignment: int = 1) -> None:
        received, recv_idx, recv_weights, counts, handle, _ = results
        self.check_rows(call, received)
        assert len(handle) == (6 if self.oracle.num_nodes == 1 else 10), f"the handle has {len(handle)} parts"
        if counts or not isinstance(counts, list):
            expected_counts = self.oracle.num_received_per_expert(self.rank, alignment)
            assert counts == expected_counts, f"counts per expert are {counts}, expected {expected_counts}"
        if not call.with_topk:
            assert recv_idx is None and recv_weights is None, "there are top-k results although none were sent"
            return
        all_weights = [self.inputs.topk_weights(rank).cpu().numpy() for rank in range(self.inputs.num_ranks)]
        num = self.num_received
        self._equal(
            recv_idx[:num], torch.from_numpy(self.oracle.received_topk_idx(self.rank)), "recv_topk_idx", by_origin=True
        )
        expected = torch.from_numpy(self.oracle.received_topk_weights(self.rank, all_weights))
        self._equal(recv_weights[:num], expected, "recv_topk_weights", by_origin=True)
        assert bool((recv_idx[num:] == -1).all()), "padding rows claim to have experts"

    def check_combine(self, call: Call, received: torch.Tensor, recv_weights: Any, handle: tuple[Any, ...]) -> None:
        outputs = self.experts(received, self.rank)
        combined, weights, _ = self.combine(call, outputs, handle, topk_weights=recv_weights)
        self._equal(combined, self.combined(), "combined_x")
        if recv_weights is None:
            assert weights is None, "there are combined weights although none were sent"
        else:
            # Each choice lives on one rank; the sum of the others is 0.
            expected = torch.where(self.topk_idx >= 0, self.topk_weights, torch.zeros_like(self.topk_weights))
            self._equal(weights, expected, "combined_topk_weights")

    def check_call(self, call: Call, report: Report) -> None:
        """Dispatch, repeat it by its handle, and combine, all in this way to call."""
        with report.check(f"dispatch, cached dispatch, combine: {call}"):
            results = self.fresh(call)
            self.check_fresh(call, results)
            received, _, recv_weights, _, handle, _ = results
            again = self.cached(call, handle)
            self.check_rows(call, again[0])
            assert all(value is None for value in again[1:5]), "a cached dispatch returned more than rows"
            # FP8 goes forward only; what comes back is bf16, whatever went.
            rows = received if call.payload == "bf16" else self.expected_rows
            self.check_combine(call, rows, recv_weights, handle)

    def check_variants(self, report: Report) -> None:
        """What only some calls use: aligned counts, a fixed number of rows, biases, a handle rebuilt, refusals."""
        plain = Call(payload="bf16", with_topk=True, async_finish=False, with_previous_event=False)
        with report.check(f"counts rounded up to {ALIGNMENT}"):
            self.check_fresh(plain, self.fresh(plain, expert_alignment=ALIGNMENT), alignment=ALIGNMENT)
        with report.check("a fixed number of output rows"):
            worst = sum(self.inputs.num_tokens)
            results = self.fresh(plain, num_worst_tokens=worst)
            assert results[0].shape[0] == worst and results[3] == [], "num_worst_tokens did not fix the output"
            self.check_fresh(plain, results)
            self.check_combine(plain, results[0], results[2], results[4])
        received, _, _, _, handle, _ = self.fresh(plain)
        with report.check("combine with one and with two biases"):
            outputs = self.experts(received, self.rank)
            biases = (self.x * 3, self.x * -0.5)
            for given in (biases[:1], biases):
                combined = self.combine(plain, outputs, handle, bias=given if len(given) > 1 else given[0])[0]
                self._equal(combined, self.combined(given), f"combined_x with {len(given)} biases")
        with report.check("a handle put together anew from its parts"):
            rebuilt = tuple(part.clone() for part in handle)
            self.check_rows(plain, self.cached(plain, rebuilt)[0])
            self.check_combine(plain, received, None, rebuilt)
        with report.check("one rank's bad argument is refused on all, and the next call works"):
            per_rank, per_node, per_expert, in_rank, _ = self.layout
            x = self.x.float() if self.rank == self.inputs.num_ranks - 1 else self.x
            expect_refusal(
                lambda: self.buffer.dispatch(
                    x,
                    num_tokens_per_rank=per_rank,
                    num_tokens_per_rdma_rank=per_node,
                    num_tokens_per_expert=per_expert,
                    is_token_in_rank=in_rank,
                )
            )
            self.check_fresh(plain, self.fresh(plain))

    def digest(self) -> str:
        """One hash over everything that two rounds of calls return."""
        digest = Digest()
        for payload in ("bf16", "fp8"):
            call = Call(payload=payload, with_topk=True, async_finish=False, with_previous_event=False)
            received, recv_idx, recv_weights, _, handle, _ = self.fresh(call)
            again = self.cached(call, handle)[0]
            rows = received if payload == "bf16" else self.expected_rows
            combined, weights, _ = self.combine(call, self.experts(rows, self.rank), handle, topk_weights=recv_weights)
            for part in (received, again):
                digest.add(*(part if isinstance(part, tuple) else (part,)))
            digest.add(recv_idx, recv_weights, *handle, combined, weights)
        return str(digest)

    def measure(self, report: Report) -> None:
        """The tuning phase: dispatch and combine over SM counts, by handle, so that the host waits for no counts."""
        buffer, time_of = self.buffer, partial(time_us, self.context)
        configs = {f"{num_sms} SMs": Config(num_sms=num_sms) for num_sms in sm_choices(self.context)}
        handle: tuple[Any, ...] = ()
        for payload, bytes_per_value in (("fp8", 1 + 4 / 128), ("bf16", 2.0)):
            call = Call(payload=payload, with_topk=False, async_finish=False, with_previous_event=False)
            handle = self.fresh(call)[4]
            repeat = partial(buffer.dispatch, self.payload(payload, self.x), handle=handle)
            times = {name: time_of(partial(repeat, config=config)) for name, config in configs.items()}
            num_bytes = int(self.num_received * self.inputs.hidden * bytes_per_value)
            print_times(report, f"dispatch {payload}, cached", times, num_bytes)
        bring_back = partial(buffer.combine, self.experts(self.expected_rows, self.rank), handle)
        times = {name: time_of(partial(bring_back, config=config)) for name, config in configs.items()}
        print_times(report, "combine bf16", times, self.num_received * self.inputs.hidden * 2)
        count = partial(buffer.get_dispatch_layout, self.topk_idx, self.inputs.num_experts)
        report.note(f"layout: {time_of(count):.1f} us")

    def _equal(self, actual: torch.Tensor, expected: torch.Tensor, what: str, *, by_origin: bool = False) -> None:
        def origin(row: int) -> str:
            return "token {1} of rank {0}".format(*self.origins[row])

        axes = ("row", "column") if by_origin else ("token", "column")
        assert_bitwise_equal(actual, expected, what, rank=self.rank, axes=axes, origin=origin if by_origin else None)


def run_normal_mode(context: RankContext, buffer: Buffer, options: Options, inputs: Inputs, report: Report) -> None:
    """Layout, every way to call, variants, measurements, and the pressure test if it was asked for."""
    ranks_per_node = context.num_ranks // buffer.runtime.get_num_rdma_ranks()  # type: ignore[union-attr]
    mode = NormalMode(context, buffer, inputs, ranks_per_node)
    with report.check("layout"):
        mode.check_layout()
    for call in ALL_CALLS:
        mode.check_call(call, report)
    mode.check_variants(report)
    if options.tune:
        mode.measure(report)
    for round_number in range(options.pressure):
        seed = options.seed + 1 + round_number
        again = NormalMode(context, buffer, replace(inputs, seed=seed), ranks_per_node)
        with report.check(f"pressure: seed {seed} gives one hash in three runs"):
            hashes = [again.digest() for _ in range(3)]
            assert len(set(hashes)) == 1, f"rank {context.rank}: seed {seed} gave different results: {hashes}"
