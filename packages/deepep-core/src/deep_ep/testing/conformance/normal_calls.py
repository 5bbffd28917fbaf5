"""One layout, dispatch, replay or combine on one rank, called in any of its ways and compared with the oracle."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal, get_args

import numpy as np
import torch

from deep_ep import Buffer, EventOverlap
from deep_ep.launch import RankContext

from ..formats import bf16_tensor, bf16_to_float32, e4m3_tensor, float32_to_bf16
from ..inputs import Case
from ..numeric import assert_bitwise_equal
from .base import wait_for

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
    arguments: dict[Overlap, dict[str, Any]] = {
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
    }
    return arguments[overlap]


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


# --- calls, compared ------------------------------------------------------------------------------------------------


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
    assert_bitwise_equal(in_rank, oracle.is_token_in_rank(rank), "is_token_in_rank", rank=rank, axes=("token", "rank"))
    if oracle.num_nodes == 1:
        assert per_node is None, "num_tokens_per_rdma_rank has to be None on one node"
    else:
        expected = oracle.num_tokens_per_node(rank).astype(np.int32)
        assert_bitwise_equal(per_node, expected, "num_tokens_per_rdma_rank", rank=rank, axes=("node",))
    assert in_rank is not None and in_rank.device.type == context.device.type
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
