"""Conformance of the normal mode: layout, dispatch, replay, combine."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch

from deep_ep import Buffer, Config
from deep_ep.launch import RankContext

from ..formats import bf16_tensor, float32_to_bf16
from ..inputs import Case
from ..numeric import assert_bitwise_equal
from ..routing import PATTERNS, Pattern, Routing, uneven_tokens
from .base import MAX_TOKENS, Conformance, Run, Setup
from .normal_calls import (
    OVERLAPS,
    NormalOptions,
    Overlap,
    check_rows,
    combine,
    dispatch,
    layout_of,
    replay,
    rows_of,
)

# --- functions that run on every rank -------------------------------------------------------------------------------


def round_trip(context: RankContext, setup: Setup, case: Case, options: NormalOptions) -> int:
    """Layout, dispatch, replay if asked for, combine; returns the rows received."""
    buffer = setup.buffer(context)
    recv_x, *_, handle, _ = dispatch(buffer, case, context, options)
    if options.replay_hidden is not None:
        other = options_with_other_dtype(options)
        replay(buffer, case, context, other, handle, hidden=options.replay_hidden, salt=1)
    num_rows = len(recv_x[0] if isinstance(recv_x, tuple) else recv_x)
    combine(buffer, case, context, options, handle, num_rows)
    buffer.destroy()
    return num_rows


def options_with_other_dtype(options: NormalOptions) -> NormalOptions:
    if options.dtype == "bf16":
        return replace(options, dtype="fp8", scales="row_major")
    return replace(options, dtype="bf16", scales="none")


def several_dispatches_before_their_combines(context: RankContext, setup: Setup, cases: list[Case]) -> None:
    buffer = setup.buffer(context)
    options = NormalOptions()
    results = [dispatch(buffer, case, context, options) for case in cases]
    for case, result in reversed(list(zip(cases, results, strict=True))):
        combine(buffer, case, context, options, result[4], len(result[0]))
    buffer.destroy()


def saved_parts_of_a_handle(context: RankContext, setup: Setup, case: Case, rebuilt: type) -> None:
    buffer = setup.buffer(context)
    options = NormalOptions()
    recv_x, *_, handle, _ = dispatch(buffer, case, context, options)
    parts = [part if part is None else part.clone() for part in handle]
    del handle
    replay(buffer, case, context, options, rebuilt(parts), hidden=case.hidden, salt=1)
    combine(buffer, case, context, options, rebuilt(parts), len(recv_x))
    buffer.destroy()


def sm_count_changes_within_a_handle(context: RankContext, setup: Setup, case: Case) -> None:
    buffer = setup.buffer(context)
    options = NormalOptions()
    before = Buffer.num_sms
    try:
        Buffer.set_num_sms(24)
        recv_x, *_, handle, _ = dispatch(buffer, case, context, options, config=Config(8, 4, 64))
        buffer.set_num_sms(12)
        combine(buffer, case, context, options, handle, len(recv_x))
        combine(buffer, case, context, options, handle, len(recv_x), config=Buffer.get_combine_config(case.num_ranks))
    finally:
        Buffer.set_num_sms(before)
    buffer.destroy()


def rows_in_symmetric_memory(context: RankContext, setup: Setup, case: Case) -> None:
    buffer = setup.buffer(context)
    options = NormalOptions()
    with buffer.symmetric_memory():
        recv_x, *_, handle, _ = dispatch(buffer, case, context, options)
        combine(buffer, case, context, options, handle, len(recv_x))
    assert all(isinstance(v, str) for pair in buffer.placement().items() for v in pair)
    buffer.destroy()


def results_belong_to_the_caller(context: RankContext, setup: Setup, case: Case) -> None:
    """Clients empty and overwrite what they got: that must touch neither later results nor the handle."""
    buffer = setup.buffer(context)
    options = NormalOptions()
    first = dispatch(buffer, case, context, options)
    recv_x, recv_idx, recv_weights = first[:3]
    recv_x.fill_(float("nan"))
    recv_idx.fill_(77)
    recv_weights.fill_(float("nan"))
    first[3].clear()
    recv_x.set_()
    second = dispatch(buffer, case, context, options)
    for a, b in zip(first[:3], second[:3], strict=True):
        assert a is not b and (not b.numel() or a.data_ptr() != b.data_ptr())
    combine(buffer, case, context, options, first[4], len(second[0]))
    buffer.destroy()


def repeated_dispatch(context: RankContext, setup: Setup, case: Case) -> None:
    """Two equal dispatches give equal bits (both are compared with the same expectation), on one and on two buffers."""
    first, second = setup.buffer(context), setup.buffer(context)
    for buffer in (first, first, second):
        dispatch(buffer, case, context, NormalOptions())
    second.destroy()
    first.destroy()


def names_for_several_nodes(context: RankContext, setup: Setup, case: Case) -> None:
    buffer = setup.buffer(context)
    options = NormalOptions()
    per_rank, per_node, per_expert, in_rank = layout_of(buffer, case, context, options)
    x, _ = rows_of(case, context.rank, options)
    config = Buffer.get_dispatch_config(case.num_ranks)
    recv_x, recv_idx, recv_weights, _, handle, _ = buffer.internode_dispatch(
        x.to(context.device), None, per_rank, per_node, in_rank, per_expert, None, None, 1, 0, config
    )
    assert recv_idx is None and recv_weights is None and handle is not None
    check_rows(recv_x, case, context.rank, options)
    y = bf16_tensor(float32_to_bf16(case.rank_rows(context.rank)), context.device)
    combined, _, _ = buffer.internode_combine(y, handle, None, None, config)
    expected = case.normal.combine(context.rank, [case.rank_rows(r) for r in range(case.num_ranks)])
    assert_bitwise_equal(
        combined, bf16_tensor(float32_to_bf16(expected)), "combined_x", rank=context.rank, axes=("token", "column")
    )
    buffer.destroy()


def strided_weights(context: RankContext, setup: Setup, case: Case) -> None:
    """Weights and indices need not be contiguous."""
    buffer, rank = setup.buffer(context), context.rank
    topk_idx = torch.from_numpy(case.routing.topk_idx(rank)).to(context.device).t().contiguous().t()
    weights = torch.from_numpy(case.routing.topk_weights(rank)).to(context.device).t().contiguous().t()
    per_rank, per_node, per_expert, in_rank, _ = buffer.get_dispatch_layout(topk_idx, case.routing.num_experts)
    x = bf16_tensor(case.x(rank), context.device)
    _, recv_idx, recv_weights, *_ = buffer.dispatch(x, None, per_rank, per_node, in_rank, per_expert, topk_idx, weights)
    assert_bitwise_equal(recv_idx, case.normal.received_topk_idx(rank), "recv_topk_idx", rank=rank)
    expected = case.normal.received_topk_weights(rank, case.routing.all_topk_weights())
    assert_bitwise_equal(recv_weights, expected, "recv_topk_weights", rank=rank)
    buffer.destroy()


# --- the tests ------------------------------------------------------------------------------------------------------


def _case(num_ranks: int, setup: Setup, *, hidden: int = 64, seed: int = 1, **routing: Any) -> Case:
    defaults: dict[str, Any] = {
        "num_tokens": uneven_tokens(num_ranks, MAX_TOKENS, seed=seed),
        "num_experts": 4 * num_ranks,
        "num_topk": 4,
        "drop_percent": 15,
        "seed": seed,
    }
    return Case(routing=Routing(**(defaults | routing)), hidden=hidden, ranks_per_node=setup.ranks_per_node)


class NormalModeConformance(Conformance):
    """Layout, fresh and cached dispatch and combine against plain arithmetic, bit for bit."""

    mode = "normal"

    @pytest.mark.parametrize("pattern", PATTERNS)
    def test_round_trip_of_every_routing_pattern(
        self, run: Run, setup: Setup, num_ranks: int, pattern: Pattern
    ) -> None:
        case = _case(num_ranks, setup, pattern=pattern, target=num_ranks - 1)
        received = run(round_trip, case, NormalOptions(), num_ranks=num_ranks)
        assert received == [len(case.normal.sources(rank)) for rank in range(num_ranks)]

    @pytest.mark.parametrize("scales", ["none", "row_major", "column_major", "packed"])
    def test_rows_and_scales_of_every_kind_move_unchanged(
        self, run: Run, setup: Setup, num_ranks: int, scales: Any
    ) -> None:
        options = NormalOptions(dtype="bf16" if scales == "none" else "fp8", scales=scales, num_scales=3)
        run(round_trip, _case(num_ranks, setup, seed=2), options, num_ranks=num_ranks)

    @pytest.mark.parametrize("num_biases", [0, 1, 2])
    @pytest.mark.parametrize("weights", [True, False], ids=["weights", "no-weights"])
    def test_combine_adds_biases_first_then_ranks_ascending(
        self, run: Run, setup: Setup, num_ranks: int, num_biases: int, weights: bool
    ) -> None:
        options = NormalOptions(num_biases=num_biases, with_combine_weights=weights)
        run(round_trip, _case(num_ranks, setup, seed=3, drop_percent=0), options, num_ranks=num_ranks)

    @pytest.mark.parametrize("expert_alignment", [4, 128])
    def test_counts_are_rounded_up_to_the_alignment(
        self, run: Run, setup: Setup, num_ranks: int, expert_alignment: int
    ) -> None:
        options = NormalOptions(expert_alignment=expert_alignment)
        run(round_trip, _case(num_ranks, setup, seed=4), options, num_ranks=num_ranks)

    @pytest.mark.parametrize("spare", [0, 7], ids=["exact", "spare-rows"])
    def test_worst_case_rows_are_fixed_and_marked_unused(
        self, run: Run, setup: Setup, num_ranks: int, spare: int
    ) -> None:
        case = _case(num_ranks, setup, seed=5)
        run(round_trip, case, NormalOptions(num_spare_rows=spare, replay_hidden=32), num_ranks=num_ranks)

    def test_dispatch_without_choices_returns_rows_and_counts(self, run: Run, setup: Setup, num_ranks: int) -> None:
        options = NormalOptions(with_topk=False, with_combine_weights=False)
        run(round_trip, _case(num_ranks, setup, seed=6), options, num_ranks=num_ranks)

    @pytest.mark.parametrize("overlap", OVERLAPS)
    def test_every_way_to_order_streams(self, run: Run, setup: Setup, num_ranks: int, overlap: Overlap) -> None:
        options = NormalOptions(overlap=overlap, num_biases=1, replay_hidden=64)
        run(round_trip, _case(num_ranks, setup, seed=7), options, num_ranks=num_ranks)

    @pytest.mark.parametrize("dtype", ["bf16", "fp8"])
    def test_replay_takes_the_other_dtype_and_another_hidden_size(
        self, run: Run, setup: Setup, num_ranks: int, dtype: Any
    ) -> None:
        options = NormalOptions(dtype=dtype, scales="none" if dtype == "bf16" else "packed", replay_hidden=112)
        run(round_trip, _case(num_ranks, setup, seed=8, hidden=32), options, num_ranks=num_ranks)

    @pytest.mark.parametrize("rebuilt", [tuple, list])
    def test_parts_of_a_handle_are_all_that_is_needed(
        self, run: Run, setup: Setup, num_ranks: int, rebuilt: type
    ) -> None:
        run(saved_parts_of_a_handle, _case(num_ranks, setup, seed=9), rebuilt, num_ranks=num_ranks)

    @pytest.mark.parametrize("empty", ["first", "last", "all"])
    def test_ranks_without_tokens_take_part(self, run: Run, setup: Setup, num_ranks: int, empty: str) -> None:
        counts = list(uneven_tokens(num_ranks, MAX_TOKENS))
        for rank in {"first": [0], "last": [num_ranks - 1], "all": list(range(num_ranks))}[empty]:
            counts[rank] = 0
        run(round_trip, _case(num_ranks, setup, num_tokens=tuple(counts)), NormalOptions(), num_ranks=num_ranks)

    def test_tokens_without_any_choice_come_back_as_zeros(self, run: Run, setup: Setup, num_ranks: int) -> None:
        case = _case(num_ranks, setup, drop_percent=100)
        assert run(round_trip, case, NormalOptions(num_biases=1), num_ranks=num_ranks) == [0] * num_ranks

    @pytest.mark.parametrize("num_topk", [1, 9, 32])
    def test_up_to_32_choices(self, run: Run, setup: Setup, num_ranks: int, num_topk: int) -> None:
        case = _case(num_ranks, setup, num_topk=num_topk, num_experts=16 * num_ranks)
        run(round_trip, case, NormalOptions(), num_ranks=num_ranks)

    def test_one_expert_for_each_rank(self, run: Run, setup: Setup, num_ranks: int) -> None:
        run(round_trip, _case(num_ranks, setup, num_experts=num_ranks), NormalOptions(), num_ranks=num_ranks)

    def test_int32_choices_are_taken_and_int64_returned(self, run: Run, setup: Setup, num_ranks: int) -> None:
        run(round_trip, _case(num_ranks, setup), NormalOptions(index_dtype="int32"), num_ranks=num_ranks)

    @pytest.mark.parametrize("hidden", [8, 24, 1000])
    def test_hidden_of_any_multiple_of_16_bytes(self, run: Run, setup: Setup, num_ranks: int, hidden: int) -> None:
        run(round_trip, _case(num_ranks, setup, hidden=hidden), NormalOptions(), num_ranks=num_ranks)

    def test_more_tokens_than_the_byte_hints_pay_for(self, run: Run, setup: Setup, num_ranks: int) -> None:
        case = _case(num_ranks, setup, num_tokens=(1500,) + (9,) * (num_ranks - 1), hidden=512)
        run(round_trip, case, NormalOptions(), num_ranks=num_ranks, timeout_s=180.0)

    def test_several_dispatches_before_their_combines(self, run: Run, setup: Setup, num_ranks: int) -> None:
        cases = [_case(num_ranks, setup, seed=seed, hidden=8 * seed) for seed in (1, 2, 3)]
        run(several_dispatches_before_their_combines, cases, num_ranks=num_ranks)

    def test_sm_count_may_change_between_dispatch_and_combine(self, run: Run, setup: Setup, num_ranks: int) -> None:
        run(sm_count_changes_within_a_handle, _case(num_ranks, setup), num_ranks=num_ranks)

    def test_tensors_in_symmetric_memory_give_the_same_bits(self, run: Run, setup: Setup, num_ranks: int) -> None:
        run(rows_in_symmetric_memory, _case(num_ranks, setup), num_ranks=num_ranks)

    def test_results_belong_to_the_caller(self, run: Run, setup: Setup, num_ranks: int) -> None:
        run(results_belong_to_the_caller, _case(num_ranks, setup), num_ranks=num_ranks)

    def test_repeated_dispatch_gives_the_same_bits(self, run: Run, setup: Setup, num_ranks: int) -> None:
        run(repeated_dispatch, _case(num_ranks, setup), num_ranks=num_ranks)

    def test_names_for_several_nodes_do_the_same(self, run: Run, setup: Setup, num_ranks: int) -> None:
        run(names_for_several_nodes, _case(num_ranks, setup), num_ranks=num_ranks)

    def test_strided_choices_and_weights(self, run: Run, setup: Setup, num_ranks: int) -> None:
        run(strided_weights, _case(num_ranks, setup), num_ranks=num_ranks)
