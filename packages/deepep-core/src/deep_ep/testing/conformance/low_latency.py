"""Conformance of the low-latency mode: dispatch to experts, combine with weights, hooks, masks."""

from __future__ import annotations

import threading
import time
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch

from deep_ep import BufferStateError
from deep_ep.launch import RankContext

from ..formats import bf16_bits, bf16_to_float32
from ..inputs import Case
from ..routing import PATTERNS, Pattern, Routing, uneven_tokens
from .base import MAX_TOKENS, Conformance, Run, Setup, at_least
from .low_latency_calls import (
    CASTS,
    COMPLETIONS,
    Cast,
    Completion,
    LowLatencyOptions,
    check_combined,
    check_dispatch,
    combine,
    complete,
    dispatch,
    start_combine,
    start_dispatch,
)

# --- functions that run on every rank -------------------------------------------------------------------------------


def round_trip(context: RankContext, setup: Setup, case: Case, options: LowLatencyOptions) -> int:
    """Dispatch and combine; returns the rows received."""
    buffer = setup.buffer(context, low_latency=True, ll_reduce=options.ll_reduce)
    dispatched = dispatch(buffer, case, context, options)
    combine(buffer, case, context, options, dispatched)
    buffer.destroy()
    return sum(case.low_latency().num_received(context.rank))


def two_dispatches_in_flight(context: RankContext, setup: Setup, cases: list[Case], reverse: bool) -> None:
    """Two micro-batches overlap: both dispatches are sent before either is received, then both combines."""
    buffer = setup.buffer(context, low_latency=True)
    options = LowLatencyOptions(completion="hook", cast="fp8")
    for _ in range(3):
        started = [start_dispatch(buffer, case, context, options) for case in cases]
        order = list(zip(cases, started, strict=True))
        for _case, one in reversed(order) if reverse else order:
            one.pending[1]()
        for case, one in order:
            check_dispatch(one, case, context, options, case.low_latency())
        combining = [start_combine(buffer, case, context, options, one.dispatched) for case, one in order]
        results = list(zip(cases, combining, strict=True))
        for _case, (_, (_, hook)) in reversed(results) if reverse else results:
            hook()
        for case, (combined, _) in results:
            check_combined(combined, case, context, options, case.low_latency())
    buffer.destroy()


def dispatch_and_combine_in_flight(context: RankContext, setup: Setup, cases: list[Case]) -> None:
    """One micro-batch's combine and the other's dispatch overlap."""
    buffer = setup.buffer(context, low_latency=True)
    options = LowLatencyOptions(completion="hook")
    first = dispatch(buffer, cases[0], context, options)
    combined, (_, combine_hook) = start_combine(buffer, cases[0], context, options, first)
    second = start_dispatch(buffer, cases[1], context, options)
    combine_hook()
    check_combined(combined, cases[0], context, options, cases[0].low_latency())
    second.pending[1]()
    dispatched = check_dispatch(second, cases[1], context, options, cases[1].low_latency())
    combine(buffer, cases[1], context, options, dispatched)
    buffer.destroy()


def two_dispatches_then_two_combines(context: RankContext, setup: Setup, case: Case, completion: Completion) -> None:
    """Calls are not strictly paired: one handle is combined twice, also after a later dispatch."""
    buffer = setup.buffer(context, low_latency=True)
    options = LowLatencyOptions(completion=completion)
    first = dispatch(buffer, case, context, options)
    second = dispatch(buffer, case, context, replace(options, cast="fp8"))
    for dispatched in (second, first, first):
        combine(buffer, case, context, options, dispatched)
    buffer.destroy()


def hooks_from_another_thread(context: RankContext, setup: Setup, case: Case) -> None:
    """A hook may be called from a thread other than the caller's, after the caller let its inputs go."""
    buffer = setup.buffer(context, low_latency=True)
    options = LowLatencyOptions(completion="hook", into_out=True)
    started = start_dispatch(buffer, case, context, options)
    run_in_thread(started.pending[1])
    dispatched = check_dispatch(started, case, context, options, case.low_latency())
    combined, (_, hook) = start_combine(buffer, case, context, options, dispatched)
    run_in_thread(hook)
    check_combined(combined, case, context, options, case.low_latency())
    buffer.destroy()


def run_in_thread(function: Any) -> None:
    errors: list[BaseException] = []

    def guarded() -> None:
        try:
            function()
        except BaseException as error:
            errors.append(error)

    thread = threading.Thread(target=guarded)
    thread.start()
    thread.join(60.0)
    assert not thread.is_alive(), "the hook did not return in another thread"
    if errors:
        raise errors[0]


def hook_called_twice(context: RankContext, setup: Setup, case: Case) -> None:
    buffer = setup.buffer(context, low_latency=True)
    options = LowLatencyOptions(completion="hook", with_statistics=True)
    started = start_dispatch(buffer, case, context, options)
    started.pending[1]()
    started.pending[1]()
    check_dispatch(started, case, context, options, case.low_latency())
    buffer.destroy()


def results_outlive_their_buffer(context: RankContext, setup: Setup, case: Case) -> None:
    """Results are tensors of their own: later calls, other sizes and the buffer's end do not change them."""
    buffer = setup.buffer(context, low_latency=True)
    options = LowLatencyOptions()
    started = start_dispatch(buffer, case, context, options)
    other = replace(case, hidden=2 * case.hidden, routing=replace(case.routing, seed=case.routing.seed + 1))
    later = dispatch(buffer, other, context, options)
    combine(buffer, other, context, options, later)
    buffer.destroy()
    check_dispatch(started, case, context, options, case.low_latency())


def third_operation_in_flight(context: RankContext, setup: Setup, case: Case) -> None:
    buffer = setup.buffer(context, low_latency=True)
    options = LowLatencyOptions(completion="hook")
    started = [start_dispatch(buffer, case, context, options) for _ in range(2)]
    with pytest.raises(BufferStateError):
        start_dispatch(buffer, case, context, options)
    for one in started:
        one.pending[1]()
        combine(buffer, case, context, options, check_dispatch(one, case, context, options, case.low_latency()))
    buffer.destroy()


def dropped_hooks(context: RankContext, setup: Setup, case: Case) -> None:
    """A hook that is dropped uncalled ends its operation: the buffer does not fill up with abandoned ones."""
    buffer = setup.buffer(context, low_latency=True)
    options = LowLatencyOptions(completion="hook")
    for _ in range(5):
        start_dispatch(buffer, case, context, options)
    combine(buffer, case, context, options, dispatch(buffer, case, context, options))
    buffer.destroy()


def late_rank(context: RankContext, setup: Setup, case: Case, late: int, seconds: float) -> list[int]:
    """How long each rank waited for each other in a dispatch to which one rank comes late."""
    buffer = setup.buffer(context, low_latency=True)
    options = LowLatencyOptions(with_statistics=True)
    dispatch(buffer, case, context, options)
    if context.rank == late:
        time.sleep(seconds)
    started = start_dispatch(buffer, case, context, options)
    complete(*started.pending, options.completion)
    waits: list[int] = (started.waits - 7).tolist()
    buffer.destroy()
    return waits


def masked_rank(context: RankContext, setup: Setup, case: Case, masked: int) -> None:
    """The masked rank makes no calls; the others go on without it, and later with it."""
    buffer = setup.buffer(context, low_latency=True, enable_shrink=True)
    options = LowLatencyOptions()
    combine(buffer, case, context, options, dispatch(buffer, case, context, options))
    status = torch.full((case.num_ranks,), 9, dtype=torch.int32, device=context.device)
    buffer.low_latency_query_mask_buffer(status)
    assert status.tolist() == [0] * case.num_ranks
    if context.rank != masked:
        buffer.low_latency_update_mask_buffer(masked, True)
        buffer.low_latency_query_mask_buffer(status)
        assert status.tolist() == [int(rank == masked) for rank in range(case.num_ranks)]
        oracle = case.low_latency(masked=[masked])
        for completion in COMPLETIONS:
            now = replace(options, completion=completion)
            dispatched = dispatch(buffer, case, context, now, oracle=oracle)
            combine(buffer, case, context, now, dispatched, oracle=oracle)
        buffer.low_latency_update_mask_buffer(masked, False)
        buffer.low_latency_update_mask_buffer(masked, True)
        buffer.low_latency_clean_mask_buffer()
        buffer.low_latency_query_mask_buffer(status)
        assert status.tolist() == [0] * case.num_ranks
    combine(buffer, case, context, options, dispatch(buffer, case, context, options))
    buffer.destroy()


def logfmt_loses_less_than_its_step(context: RankContext, setup: Setup, case: Case, ll_reduce: Any) -> float:
    """Returns the largest relative error seen, so that the caller can tell that the format was really used."""
    options = LowLatencyOptions(logfmt=True, ll_reduce=ll_reduce)
    buffer = setup.buffer(context, low_latency=True, ll_reduce=ll_reduce)
    dispatched = dispatch(buffer, case, context, options)
    combined, (event, hook) = start_combine(buffer, case, context, options, dispatched)
    complete(event, hook, options.completion)
    oracle, rank = case.low_latency(), context.rank
    check_combined(combined, case, context, options, oracle)
    weights = case.routing.topk_weights(rank)
    expected = oracle.combine(rank, case.expert_rows, weights, reduce=ll_reduce)
    magnitude = oracle.magnitude(rank, case.expert_rows, weights)
    buffer.destroy()
    given = bf16_to_float32(bf16_bits(combined))
    return float(np.max(np.abs(given - expected) / np.maximum(magnitude, 1e-30), initial=0.0))


# --- the tests ------------------------------------------------------------------------------------------------------


def _case(num_ranks: int, setup: Setup, *, hidden: int = 256, seed: int = 1, **routing: Any) -> Case:
    defaults: dict[str, Any] = {
        "num_tokens": uneven_tokens(num_ranks, MAX_TOKENS, seed=seed),
        "num_experts": 2 * num_ranks,
        "num_topk": 3,
        "drop_percent": 15,
        "seed": seed,
    }
    return Case(routing=Routing(**(defaults | routing)), hidden=hidden, ranks_per_node=setup.ranks_per_node)


class LowLatencyConformance(Conformance):
    """Low-latency dispatch and combine against plain arithmetic, bit for bit but for LogFMT."""

    mode = "low_latency"

    @pytest.mark.parametrize("pattern", PATTERNS)
    def test_round_trip_of_every_routing_pattern(
        self, run: Run, setup: Setup, num_ranks: int, pattern: Pattern
    ) -> None:
        case = _case(num_ranks, setup, pattern=pattern, target=num_ranks - 1, num_experts=4 * num_ranks)
        run(round_trip, case, LowLatencyOptions(), num_ranks=num_ranks)

    @pytest.mark.parametrize("completion", COMPLETIONS)
    @pytest.mark.parametrize("cast", CASTS)
    def test_every_cast_with_every_completion(
        self, run: Run, setup: Setup, num_ranks: int, cast: Cast, completion: Completion
    ) -> None:
        options = LowLatencyOptions(cast=cast, completion=completion, num_spare_tokens=2)
        run(round_trip, _case(num_ranks, setup, hidden=512), options, num_ranks=num_ranks)

    @pytest.mark.parametrize("zero_copy", [False, True], ids=["copied", "zero-copy"])
    @pytest.mark.parametrize("hidden", [8, 24, 1000])
    def test_bf16_rows_of_any_multiple_of_16_bytes(
        self, run: Run, setup: Setup, num_ranks: int, hidden: int, zero_copy: bool
    ) -> None:
        options = LowLatencyOptions(zero_copy=zero_copy)
        run(round_trip, _case(num_ranks, setup, hidden=hidden), options, num_ranks=num_ranks)

    @pytest.mark.parametrize("ll_reduce", ["rank", "expert"])
    @pytest.mark.parametrize("num_topk", [1, 8, 32])
    def test_sums_follow_the_chosen_tree(
        self, run: Run, setup: Setup, num_ranks: int, ll_reduce: Any, num_topk: int
    ) -> None:
        case = _case(num_ranks, setup, num_topk=num_topk, num_experts=8 * num_ranks, drop_percent=0, hidden=128)
        run(round_trip, case, LowLatencyOptions(ll_reduce=ll_reduce), num_ranks=num_ranks)

    @pytest.mark.parametrize("empty", ["first", "last", "all"])
    def test_ranks_without_tokens_take_part(self, run: Run, setup: Setup, num_ranks: int, empty: str) -> None:
        counts = list(uneven_tokens(num_ranks, MAX_TOKENS))
        for rank in {"first": [0], "last": [num_ranks - 1], "all": list(range(num_ranks))}[empty]:
            counts[rank] = 0
        options = LowLatencyOptions(cast="fp8", completion="hook")
        run(round_trip, _case(num_ranks, setup, num_tokens=tuple(counts)), options, num_ranks=num_ranks)

    def test_tokens_without_any_choice_come_back_as_zeros(self, run: Run, setup: Setup, num_ranks: int) -> None:
        case = _case(num_ranks, setup, drop_percent=100)
        assert run(round_trip, case, LowLatencyOptions(), num_ranks=num_ranks) == [0] * num_ranks

    @pytest.mark.parametrize(
        "options",
        [
            pytest.param(LowLatencyOptions(into_out=True), id="out"),
            pytest.param(LowLatencyOptions(into_out=True, completion="hook"), id="out-with-hook"),
            pytest.param(LowLatencyOptions(zero_copy=True), id="zero-copy"),
            pytest.param(LowLatencyOptions(zero_copy=True, into_out=True, completion="hook"), id="zero-copy-out-hook"),
            pytest.param(LowLatencyOptions(with_statistics=True, cast="fp8"), id="statistics"),
            pytest.param(LowLatencyOptions(with_statistics=True, completion="hook"), id="statistics-with-hook"),
            pytest.param(LowLatencyOptions(weights_in_dispatch=True), id="weights-in-dispatch"),
            pytest.param(LowLatencyOptions(index_dtype="int32"), id="int32-choices"),
        ],
    )
    def test_further_arguments(self, run: Run, setup: Setup, num_ranks: int, options: LowLatencyOptions) -> None:
        run(round_trip, _case(num_ranks, setup, seed=2), options, num_ranks=num_ranks)

    @pytest.mark.parametrize("reverse", [False, True], ids=["received-in-order", "received-in-reverse"])
    def test_two_dispatches_in_flight(self, run: Run, setup: Setup, num_ranks: int, reverse: bool) -> None:
        cases = [_case(num_ranks, setup, seed=seed, hidden=128 * seed) for seed in (1, 2)]
        run(two_dispatches_in_flight, cases, reverse, num_ranks=num_ranks)

    def test_combine_and_dispatch_in_flight(self, run: Run, setup: Setup, num_ranks: int) -> None:
        cases = [_case(num_ranks, setup, seed=seed) for seed in (3, 4)]
        run(dispatch_and_combine_in_flight, cases, num_ranks=num_ranks)

    @pytest.mark.parametrize("completion", COMPLETIONS)
    def test_one_handle_is_combined_repeatedly_and_out_of_order(
        self, run: Run, setup: Setup, num_ranks: int, completion: Completion
    ) -> None:
        run(two_dispatches_then_two_combines, _case(num_ranks, setup, seed=5), completion, num_ranks=num_ranks)

    def test_hooks_run_in_another_thread(self, run: Run, setup: Setup, num_ranks: int) -> None:
        run(hooks_from_another_thread, _case(num_ranks, setup, seed=6), num_ranks=num_ranks)

    def test_calling_a_hook_twice_receives_once(self, run: Run, setup: Setup, num_ranks: int) -> None:
        run(hook_called_twice, _case(num_ranks, setup, seed=7), num_ranks=num_ranks)

    def test_results_outlive_later_calls_and_the_buffer(self, run: Run, setup: Setup, num_ranks: int) -> None:
        run(results_outlive_their_buffer, _case(num_ranks, setup, seed=8), num_ranks=num_ranks)

    def test_third_operation_in_flight_is_refused(self, run: Run, setup: Setup, num_ranks: int) -> None:
        run(third_operation_in_flight, _case(num_ranks, setup, seed=9), num_ranks=num_ranks)

    def test_dropped_hooks_end_their_operations(self, run: Run, setup: Setup, num_ranks: int) -> None:
        run(dropped_hooks, _case(num_ranks, setup, seed=10), num_ranks=num_ranks)

    @at_least(2)
    def test_wait_statistics_show_the_late_rank(self, run: Run, setup: Setup, num_ranks: int) -> None:
        late = num_ranks - 1
        case = _case(num_ranks, setup, seed=11, drop_percent=0, num_topk=2 * num_ranks)
        # A busy machine may keep the others from waiting; then the late rank comes later.
        for seconds in (0.25, 1.0, 4.0):
            waits = run(late_rank, case, late, seconds, num_ranks=num_ranks)
            if all(of_rank[late] > 0.5e9 * seconds for of_rank in waits[:late]):
                return
        raise AssertionError(f"rank {late} was {seconds} s late; the ranks say that they waited, in ns: {waits}")

    @at_least(2)
    @pytest.mark.parametrize("which", ["first", "last"])
    def test_masked_rank_is_left_out_and_taken_in_again(
        self, run: Run, setup: Setup, num_ranks: int, which: str
    ) -> None:
        if not self.capabilities().rank_masks:
            pytest.skip(f"backend {self.backend!r} has no rank masks")
        masked = {"first": 0, "last": num_ranks - 1}[which]
        run(masked_rank, _case(num_ranks, setup, seed=12), masked, num_ranks=num_ranks)

    @pytest.mark.parametrize("ll_reduce", ["rank", "expert"])
    def test_logfmt_is_within_one_step(self, run: Run, setup: Setup, num_ranks: int, ll_reduce: Any) -> None:
        if not self.capabilities().logfmt:
            pytest.skip(f"backend {self.backend!r} has no LogFMT")
        case = _case(num_ranks, setup, seed=13, drop_percent=0)
        errors = run(logfmt_loses_less_than_its_step, case, ll_reduce, num_ranks=num_ranks)
        assert max(errors) > 2.0**-10 or num_ranks == 1, f"errors {errors}: nothing seems to have travelled in LogFMT"
