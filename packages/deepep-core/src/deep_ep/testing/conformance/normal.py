"""Conformance of the normal mode: layout, dispatch, replay, combine."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal, get_args

import numpy as np
import pytest
import torch

from deep_ep import Buffer, Config, EventOverlap
from deep_ep.launch import RankContext

from ..formats import bf16_tensor, bf16_to_float32, e4m3_tensor, float32_to_bf16
from ..inputs import Case
from ..numeric import assert_bitwise_equal
from ..routing import PATTERNS, Pattern, Routing, uneven_tokens
from .base import MAX_TOKENS, Conformance, Run, Setup, wait_for

Overlap = Literal["synchronous", "event", "empty_event", "async", "async_event", "comm_stream"]
OVERLAPS: tuple[Overlap, ...] = get_args(Overlap)


@dataclass(frozen=True, kw_only=True)
class NormalOptions:
    """How a case is called.

    Attributes:
        dtype: of the rows; ``fp8`` comes with scales.
        scales: ``row_major`` and ``column_major`` are float32, ``packed`` is int32.
        num_scales: columns of the scales.
        with_topk: pass top-k indices and weights to dispatch.
        index_dtype: of the top-k indices.
        with_combine_weights: pass weights to combine.
        num_biases: 0 to 2.
        expert_alignment: as in dispatch.
        num_spare_rows: ``num_worst_tokens`` is this more than what arrives; ``None``: exact counts.
        overlap: how calls are ordered among streams.
        replay_hidden: repeat the dispatch by handle with the other dtype and this hidden size; ``None``: do not.
    """

    dtype: Literal["bf16", "fp8"] = "bf16"
    scales: Literal["none", "row_major", "column_major", "packed"] = "none"
    num_scales: int = 2
    with_topk: bool = True
    index_dtype: Literal["int64", "int32"] = "int64"
    with_combine_weights: bool = True
    num_biases: int = 0
    expert_alignment: int = 1
    num_spare_rows: int | None = None
    overlap: Overlap = "synchronous"
    replay_hidden: int | None = None


def overlap_arguments(overlap: Overlap) -> dict[str, Any]:
    """The three stream arguments of a normal-mode call."""
    return {
        "synchronous": {},
        "event": {"previous_event": Buffer.capture()},
        "empty_event": {"previous_event": EventOverlap(None)},
        "async": {"async_finish": True},
        "async_event": {"previous_event": Buffer.capture(), "async_finish": True},
        "comm_stream": {
            "previous_event": Buffer.capture(),
            "async_finish": True,
            "allocate_on_comm_stream": True,
        },
    }[overlap]


def is_async(overlap: Overlap) -> bool:
    return overlap in ("async", "async_event", "comm_stream")


def rows_of(
    case: Case, rank: int, options: NormalOptions, *, hidden: int | None = None, salt: int = 0
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """Rows and scales of one rank, on the CPU."""
    if options.dtype == "bf16":
        return bf16_tensor(case.x(rank, hidden=hidden, salt=salt)), None
    rows = e4m3_tensor(case.x_codes(rank, hidden=hidden, salt=salt))
    if options.scales == "packed":
        return rows, torch.from_numpy(case.packed_scales(rank, options.num_scales, salt=salt))
    return rows, torch.from_numpy(case.scales(rank, options.num_scales, salt=salt))


def as_argument(
    rows: torch.Tensor, scales: torch.Tensor | None, options: NormalOptions, device: torch.device
) -> torch.Tensor | tuple[torch.Tensor, torch.Tensor]:
    """``x`` as dispatch takes it, the scales laid out as asked for."""
    if scales is None:
        return rows.to(device)
    if options.scales == "column_major":
        return rows.to(device), scales.to(device).t().contiguous().t()
    return rows.to(device), scales.to(device)


def check_rows(
    received: Any, case: Case, rank: int, options: NormalOptions, *, hidden: int | None = None, salt: int = 0
) -> None:
    """Rows, and scales where there are some, are those of the sources in order; spare rows are not looked at."""
    per_rank = [rows_of(case, source, options, hidden=hidden, salt=salt) for source in range(case.num_ranks)]
    data, scales = received if isinstance(received, tuple) else (received, None)
    count = len(case.normal.sources(rank))

    def expected(parts: Sequence[torch.Tensor]) -> torch.Tensor:
        mine = [torch.from_numpy(case.normal.is_token_in_rank(s)[:, rank]) for s in range(case.num_ranks)]
        return torch.cat([_bytes(part)[chosen] for part, chosen in zip(parts, mine, strict=True)])

    assert data.dtype == per_rank[0][0].dtype, f"rank {rank}: recv_x has dtype {data.dtype}"
    assert data.is_contiguous(), f"rank {rank}: recv_x has strides {data.stride()}"
    assert_bitwise_equal(
        _bytes(data)[:count],
        expected([rows for rows, _ in per_rank]),
        "recv_x (bytes)",
        rank=rank,
        axes=("row", "byte"),
        origin=lambda row: case.origin(rank, row),
    )
    assert (scales is None) == (options.dtype == "bf16"), f"rank {rank}: scales came or stayed out against the input"
    if scales is not None:
        assert scales.dtype == per_rank[0][1].dtype, f"rank {rank}: scales have dtype {scales.dtype}"  # type: ignore[union-attr]
        assert scales.is_contiguous(), f"rank {rank}: scales have strides {scales.stride()}"
        assert len(scales) == len(data)
        assert_bitwise_equal(
            _bytes(scales)[:count],
            expected([s for _, s in per_rank if s is not None]),
            "recv scales (bytes)",
            rank=rank,
            axes=("row", "byte"),
            origin=lambda row: case.origin(rank, row),
        )


def _bytes(tensor: torch.Tensor) -> torch.Tensor:
    num_rows, num_columns = tensor.shape
    if not tensor.numel():  # tensors without elements come with odd strides
        return torch.empty((num_rows, num_columns * tensor.element_size()), dtype=torch.uint8)
    return tensor.detach().cpu().contiguous().view(torch.uint8)


# --- functions that run on every rank -------------------------------------------------------------------------------


def layout_of(buffer: Buffer, case: Case, context: RankContext, options: NormalOptions) -> tuple[Any, ...]:
    """Call get_dispatch_layout and compare all it returns."""
    oracle, rank = case.normal, context.rank
    topk_idx = torch.from_numpy(case.routing.topk_idx(rank)).to(getattr(torch, options.index_dtype)).to(context.device)
    *layout, event = buffer.get_dispatch_layout(
        topk_idx, case.routing.num_experts, **overlap_arguments(options.overlap)
    )
    wait_for(event, is_async=is_async(options.overlap))
    per_rank, per_node, per_expert, in_rank = layout
    expected = oracle.num_tokens_per_rank(rank).astype(np.int32)
    assert_bitwise_equal(per_rank, expected, "num_tokens_per_rank", rank=rank, axes=("rank",))
    expected = oracle.num_tokens_per_expert(rank).astype(np.int32)
    assert_bitwise_equal(per_expert, expected, "num_tokens_per_expert", rank=rank, axes=("expert",))
    assert_bitwise_equal(
        in_rank, oracle.is_token_in_rank(rank), "is_token_in_rank", rank=rank, axes=("token", "rank")
    )
    if oracle.num_nodes == 1:
        assert per_node is None, "num_tokens_per_rdma_rank has to be None on one node"
    else:
        expected = oracle.num_tokens_per_node(rank).astype(np.int32)
        assert_bitwise_equal(per_node, expected, "num_tokens_per_rdma_rank", rank=rank, axes=("node",))
    assert per_rank.device.type == context.device.type
    return tuple(layout)


def dispatch(
    buffer: Buffer, case: Case, context: RankContext, options: NormalOptions, *, salt: int = 0, **extra: Any
) -> tuple[Any, ...]:
    """Layout and a fresh dispatch, everything returned compared; gives what dispatch returned, waited for."""
    oracle, rank, routing = case.normal, context.rank, case.routing
    per_rank, per_node, per_expert, in_rank = layout_of(buffer, case, context, options)
    arguments: dict[str, Any] = {}
    if options.with_topk:
        dtype = getattr(torch, options.index_dtype)
        arguments["topk_idx"] = torch.from_numpy(routing.topk_idx(rank)).to(dtype).to(context.device)
        arguments["topk_weights"] = torch.from_numpy(routing.topk_weights(rank)).to(context.device)
    if options.num_spare_rows is not None:
        most = max(len(oracle.sources(r)) for r in range(case.num_ranks))
        arguments["num_worst_tokens"] = max(1, most + options.num_spare_rows)
    result = buffer.dispatch(
        as_argument(*rows_of(case, rank, options, salt=salt), options, context.device),
        num_tokens_per_rank=per_rank,
        num_tokens_per_rdma_rank=per_node,
        is_token_in_rank=in_rank,
        num_tokens_per_expert=per_expert,
        expert_alignment=options.expert_alignment,
        **arguments,
        **overlap_arguments(options.overlap),
        **extra,
    )
    recv_x, recv_topk_idx, recv_topk_weights, counts, handle, event = result
    wait_for(event, is_async=is_async(options.overlap))
    check_rows(recv_x, case, rank, options, salt=salt)
    data = recv_x[0] if isinstance(recv_x, tuple) else recv_x
    count = len(oracle.sources(rank))
    assert len(data) == arguments.get("num_worst_tokens", count), f"rank {rank}: recv_x has {len(data)} rows"
    assert type(counts) is list and all(type(n) is int for n in counts)
    if options.num_spare_rows is None:
        expected = oracle.num_received_per_expert(rank, options.expert_alignment)
        assert counts == expected, f"rank {rank}: rows per expert {counts}, expected {expected}"
    else:
        assert counts == [], f"rank {rank}: counts {counts} although the host must not wait"
    if options.with_topk:
        spare = len(data) - count
        idx = np.pad(oracle.received_topk_idx(rank), ((0, spare), (0, 0)), constant_values=-1)
        weights = oracle.received_topk_weights(rank, routing.all_topk_weights())
        weights = np.pad(weights, ((0, spare), (0, 0)))
        named: dict[str, Any] = {
            "rank": rank, "axes": ("row", "choice"), "origin": lambda row: case.origin(rank, row),
        }  # fmt: skip
        assert_bitwise_equal(recv_topk_idx, idx, "recv_topk_idx", **named)
        assert_bitwise_equal(recv_topk_weights, weights, "recv_topk_weights", **named)
    else:
        assert recv_topk_idx is None and recv_topk_weights is None
    check_handle(handle, case, rank)
    return result


def check_handle(handle: Any, case: Case, rank: int) -> None:
    """The parts that clients look into, and the number of parts."""
    prefix = case.normal.rank_prefix_matrix().astype(np.int32)
    assert type(handle) is tuple
    assert all(part is None or isinstance(part, torch.Tensor) for part in handle), "clients save handles for backward"
    if case.normal.num_nodes == 1:
        assert len(handle) == 6
        assert_bitwise_equal(handle[0], prefix, "handle[0]", rank=rank, axes=("source rank", "destination rank"))
    else:
        assert len(handle) == 10
        assert_bitwise_equal(handle[-4], prefix[:, rank].copy(), "handle[-4]", rank=rank, axes=("source rank",))


def replay(
    buffer: Buffer, case: Case, context: RankContext, options: NormalOptions, handle: Any, *, hidden: int, salt: int
) -> None:
    """Dispatch other rows along the handle; the four results of routing are None."""
    x = as_argument(*rows_of(case, context.rank, options, hidden=hidden, salt=salt), options, context.device)
    recv_x, *routing, event = buffer.dispatch(x, handle=handle, **overlap_arguments(options.overlap))
    wait_for(event, is_async=is_async(options.overlap))
    assert routing == [None] * 4
    check_rows(recv_x, case, context.rank, options, hidden=hidden, salt=salt)


def combine(
    buffer: Buffer, case: Case, context: RankContext, options: NormalOptions, handle: Any, num_rows: int, **extra: Any
) -> None:
    """Combine rows that each rank makes up, and compare sums bit for bit. Rows beyond the received ones are NaN."""
    oracle, rank = case.normal, context.rank
    rows = float32_to_bf16(case.rank_rows(rank))
    spare = ((0, num_rows - len(rows)), (0, 0))
    arguments: dict[str, Any] = {}
    if options.with_combine_weights:
        weights = np.pad(case.rank_weights(rank), spare, constant_values=np.nan)
        arguments["topk_weights"] = torch.from_numpy(weights).to(context.device)
    biases = [case.bias(rank, number) for number in range(options.num_biases)]
    if biases:
        tensors = tuple(bf16_tensor(bias, context.device) for bias in biases)
        arguments["bias"] = tensors[0] if len(tensors) == 1 else tensors
    combined, combined_weights, event = buffer.combine(
        bf16_tensor(np.pad(rows, spare, constant_values=0x7FC0), context.device),
        handle,
        **arguments,
        **overlap_arguments(options.overlap),
        **extra,
    )
    wait_for(event, is_async=is_async(options.overlap))
    everybody = [case.rank_rows(r) for r in range(case.num_ranks)]
    expected = oracle.combine(rank, everybody, [bf16_to_float32(bias) for bias in biases])
    assert_bitwise_equal(
        combined, bf16_tensor(float32_to_bf16(expected)), "combined_x", rank=rank, axes=("token", "column")
    )
    if options.with_combine_weights:
        sums = oracle.combine_weights(rank, [case.rank_weights(r) for r in range(case.num_ranks)])
        assert_bitwise_equal(combined_weights, sums, "combined_topk_weights", rank=rank, axes=("token", "choice"))
    else:
        assert combined_weights is None


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
    assert recv_idx is None and recv_weights is None
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
    _, recv_idx, recv_weights, *_ = buffer.dispatch(
        x, None, per_rank, per_node, in_rank, per_expert, topk_idx, weights
    )
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


__all__ = ["OVERLAPS", "NormalModeConformance", "NormalOptions", "Overlap", "round_trip"]
