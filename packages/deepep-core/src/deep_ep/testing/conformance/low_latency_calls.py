"""One low-latency dispatch or combine on one rank, called in any of its ways and compared with the oracle."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import torch

from deep_ep import Buffer
from deep_ep.backend import LowLatencyReduce
from deep_ep.launch import RankContext

from ..formats import (
    bf16_tensor,
    e4m3_tensor,
    float32_to_bf16,
    pack_ue8m0,
    quantise_fp8,
)
from ..inputs import Case
from ..numeric import assert_bitwise_equal, assert_within
from ..oracle import LowLatencyOracle
from .base import wait_for

Cast = Literal["bf16", "fp8", "fp8_rounded", "ue8m0"]
CASTS: tuple[Cast, ...] = ("bf16", "fp8", "fp8_rounded", "ue8m0")
Completion = Literal["synchronous", "hook", "async"]
COMPLETIONS: tuple[Completion, ...] = ("synchronous", "hook", "async")

# A LogFMT code has 9 bits of magnitude, equal steps of the logarithm over at most a factor of 2**32: values lie within
# one step of 2**(32 / 510) of what they were, and what is smaller than the largest by more than the range is lost.
LOGFMT_STEP = 2.0 ** (32 / 510) - 1
LOGFMT_RANGE = 2.0**-32
BF16_ROUNDING = 2.0**-8


@dataclass(frozen=True, kw_only=True)
class LowLatencyOptions:
    """How a case is called.

    Attributes:
        cast: what dispatch sends; ``fp8_rounded`` has scales that are powers of two, ``ue8m0`` packs those.
        completion: of dispatch and combine.
        ll_reduce: of the buffer.
        index_dtype: of the top-k indices.
        num_spare_tokens: the most tokens of a rank exceed the most that any has by this.
        into_out: pass ``out=`` to combine.
        zero_copy: write expert outputs to the backend's buffer.
        logfmt: let combine travel in LogFMT.
        with_statistics: pass all three statistics tensors.
        weights_in_dispatch: pass the weights to dispatch too.
    """

    cast: Cast = "bf16"
    completion: Completion = "synchronous"
    ll_reduce: LowLatencyReduce = "rank"
    index_dtype: Literal["int64", "int32"] = "int64"
    num_spare_tokens: int = 0
    into_out: bool = False
    zero_copy: bool = False
    logfmt: bool = False
    with_statistics: bool = False
    weights_in_dispatch: bool = False


@dataclass(frozen=True, kw_only=True)
class Dispatched:
    """A dispatch that was compared, ready to be combined."""

    handle: tuple[Any, ...]
    topk_idx: torch.Tensor
    topk_weights: torch.Tensor


def max_tokens(case: Case, options: LowLatencyOptions) -> int:
    return max(1, max(case.routing.num_tokens) + options.num_spare_tokens)


def completion_arguments(completion: Completion) -> dict[str, Any]:
    return {"return_recv_hook": completion == "hook", "async_finish": completion == "async"}


def complete(event: Any, hook: Any, completion: Completion) -> None:
    """Run the hook, or wait, as the kind of call asks for."""
    assert (hook is not None) == (completion == "hook"), f"hook is {hook!r} for a {completion} call"
    if hook is not None:
        hook()
    else:
        wait_for(event, is_async=completion == "async")


# --- dispatch -------------------------------------------------------------------------------------------------------


def dispatch(
    buffer: Buffer,
    case: Case,
    context: RankContext,
    options: LowLatencyOptions,
    *,
    oracle: LowLatencyOracle | None = None,
) -> Dispatched:
    started = start_dispatch(buffer, case, context, options)
    complete(*started.pending, options.completion)
    return check_dispatch(started, case, context, options, oracle or case.low_latency())


@dataclass(frozen=True, kw_only=True)
class Started:
    """A dispatch that was called and perhaps not received."""

    received: Any
    counts: torch.Tensor
    dispatched: Dispatched
    pending: tuple[Any, Any]
    statistics: torch.Tensor
    waits: torch.Tensor


def start_dispatch(buffer: Buffer, case: Case, context: RankContext, options: LowLatencyOptions) -> Started:
    rank, routing = context.rank, case.routing
    topk_idx = torch.from_numpy(routing.topk_idx(rank)).to(getattr(torch, options.index_dtype)).to(context.device)
    weights = torch.from_numpy(routing.topk_weights(rank)).to(context.device)
    statistics = torch.full((routing.num_local_experts,), 1000, dtype=torch.int32, device=context.device)
    waits = torch.full((case.num_ranks,), 7, dtype=torch.int64, device=context.device)
    arguments: dict[str, Any] = {}
    if options.with_statistics:
        arguments |= {"cumulative_local_expert_recv_stats": statistics, "dispatch_wait_recv_cost_stats": waits}
    if options.weights_in_dispatch:
        arguments["topk_weights"] = weights
    received, counts, handle, event, hook = buffer.low_latency_dispatch(
        bf16_tensor(case.x(rank), context.device),
        topk_idx,
        max_tokens(case, options),
        routing.num_experts,
        use_fp8=options.cast != "bf16",
        round_scale=options.cast in ("fp8_rounded", "ue8m0"),
        use_ue8m0=options.cast == "ue8m0",
        **completion_arguments(options.completion),
        **arguments,
    )
    return Started(
        received=received,
        counts=counts,
        dispatched=Dispatched(handle=handle, topk_idx=topk_idx, topk_weights=weights),
        pending=(event, hook),
        statistics=statistics,
        waits=waits,
    )


def check_dispatch(
    started: Started, case: Case, context: RankContext, options: LowLatencyOptions, oracle: LowLatencyOracle
) -> Dispatched:
    """Counts, handle, strides, and every row that a source sent; the order inside one source's rows is free."""
    rank, handle = context.rank, started.dispatched.handle
    num_local, num_rows = case.routing.num_local_experts, case.num_ranks * max_tokens(case, options)
    data, scales = started.received if isinstance(started.received, tuple) else (started.received, None)
    assert tuple(data.shape) == (num_local, num_rows, case.hidden), f"rank {rank}: recv_x has shape {data.shape}"
    counts = np.array(oracle.num_received(rank), dtype=np.int32)
    assert_bitwise_equal(started.counts, counts, "recv_count", rank=rank, axes=("local expert",))
    if options.with_statistics:
        assert_bitwise_equal(started.statistics, counts + np.int32(1000), "statistics", rank=rank, axes=("expert",))
        assert bool((started.waits >= 7).all()), f"rank {rank}: waits {started.waits.tolist()} went below their start"
    else:
        assert bool((started.waits == 7).all())
    assert type(handle) is tuple and len(handle) == 5
    assert handle[2:] == (max_tokens(case, options), case.hidden, case.routing.num_experts)
    assert (scales is None) == (options.cast == "bf16")
    if scales is not None:
        check_scale_layout(scales, case, num_local, num_rows, packed=options.cast == "ue8m0")
    data, src_info, ranges = data.cpu(), handle[0].cpu().numpy(), handle[1].cpu().numpy()
    scales = None if scales is None else scales.cpu()
    for local_expert in range(num_local):
        covered = np.zeros(num_rows, dtype=bool)
        for source in range(case.num_ranks):
            begin, count = int(ranges[local_expert, source] >> 32), int(ranges[local_expert, source] & 0xFFFFFFFF)
            where = f"expert {rank * num_local + local_expert}, rows of rank {source}"
            assert begin + count <= counts[local_expert], f"rank {rank}: {where}: {begin}+{count} beyond the count"
            assert not covered[begin : begin + count].any(), f"rank {rank}: {where}: overlap with another rank's"
            covered[begin : begin + count] = True
            tokens = src_info[local_expert, begin : begin + count].astype(np.int64)
            expected = oracle.tokens(rank, local_expert, source)
            assert np.array_equal(np.sort(tokens), expected), (
                f"rank {rank}: {where}: tokens {tokens.tolist()}, expected {expected.tolist()} in any order"
            )
            rows = slice(begin, begin + count)
            part = None if scales is None else scales[local_expert, rows]
            check_rows(data[local_expert, rows], part, case.x(source)[tokens], options, where, rank)
    return started.dispatched


def check_scale_layout(scales: torch.Tensor, case: Case, num_local: int, num_rows: int, *, packed: bool) -> None:
    """Shape, dtype, and the strides that grouped matrix products read without a copy."""
    num_scales = case.hidden // (512 if packed else 128)
    assert scales.dtype == (torch.int32 if packed else torch.float32)
    assert tuple(scales.shape) == (num_local, num_rows, num_scales)
    strides = scales.stride()
    assert num_rows == 1 or strides[1] == 1, f"scales have strides {strides}; the middle one has to be 1"
    assert num_scales == 1 or strides[2] == num_rows, f"scales have strides {strides}; the last has to be {num_rows}"
    assert num_local == 1 or strides[0] == num_rows * num_scales, f"scales have strides {strides}"


def check_rows(
    rows: torch.Tensor, scales: torch.Tensor | None, sent: Any, options: LowLatencyOptions, where: str, rank: int
) -> None:
    axes = ("row", "column")
    if scales is None:
        assert_bitwise_equal(rows, bf16_tensor(sent), f"recv_x of {where}", rank=rank, axes=axes)
        return
    codes, expected = quantise_fp8(sent, round_scale=options.cast in ("fp8_rounded", "ue8m0"))
    packed = pack_ue8m0(expected) if options.cast == "ue8m0" else expected
    assert_bitwise_equal(scales, packed, f"scales of {where}", rank=rank, axes=("row", "block"))
    assert_bitwise_equal(rows, e4m3_tensor(codes), f"recv_x of {where}", rank=rank, axes=axes)


# --- combine --------------------------------------------------------------------------------------------------------


def expert_outputs(case: Case, context: RankContext, handle: tuple[Any, ...]) -> torch.Tensor:
    """``[L, M, H]``: what each expert makes of each row it got; NaN in rows that hold none."""
    rank, num_local = context.rank, case.routing.num_local_experts
    src_info, ranges = handle[0].cpu().numpy(), handle[1].cpu().numpy()
    outputs = np.full((*src_info.shape, case.hidden), 0x7FC0, dtype=np.uint16)
    for local_expert in range(num_local):
        for source in range(case.num_ranks):
            begin, count = int(ranges[local_expert, source] >> 32), int(ranges[local_expert, source] & 0xFFFFFFFF)
            tokens = src_info[local_expert, begin : begin + count]
            rows = case.expert_rows(rank * num_local + local_expert, source)[tokens]
            outputs[local_expert, begin : begin + count] = float32_to_bf16(rows)
    return bf16_tensor(outputs, context.device)


def combine(
    buffer: Buffer,
    case: Case,
    context: RankContext,
    options: LowLatencyOptions,
    dispatched: Dispatched,
    *,
    oracle: LowLatencyOracle | None = None,
) -> None:
    started = start_combine(buffer, case, context, options, dispatched)
    complete(*started[1], options.completion)
    check_combined(started[0], case, context, options, oracle or case.low_latency())


def start_combine(
    buffer: Buffer, case: Case, context: RankContext, options: LowLatencyOptions, dispatched: Dispatched
) -> tuple[torch.Tensor, tuple[Any, Any]]:
    y = expert_outputs(case, context, dispatched.handle)
    arguments: dict[str, Any] = {}
    if options.zero_copy:
        place = buffer.get_next_low_latency_combine_buffer(dispatched.handle)
        assert place.shape == y.shape and place.dtype == y.dtype and place.stride(-1) == 1
        place.copy_(y)
        y = torch.full_like(y, float("nan"))  # what stands in its place is not looked at
    out = torch.full((case.num_tokens(context.rank), case.hidden), float("nan"), dtype=torch.bfloat16)
    out = out.to(context.device)
    if options.into_out:
        arguments["out"] = out
    waits = torch.zeros(case.num_ranks, dtype=torch.int64, device=context.device)
    if options.with_statistics:
        arguments["combine_wait_recv_cost_stats"] = waits
    combined, event, hook = buffer.low_latency_combine(
        y,
        dispatched.topk_idx,
        dispatched.topk_weights,
        dispatched.handle,
        use_logfmt=options.logfmt,
        zero_copy=options.zero_copy,
        **completion_arguments(options.completion),
        **arguments,
    )
    if options.into_out:
        assert combined.data_ptr() == out.data_ptr(), "combine did not return out"
        return out, (event, hook)
    return combined, (event, hook)


def check_combined(
    combined: torch.Tensor, case: Case, context: RankContext, options: LowLatencyOptions, oracle: LowLatencyOracle
) -> None:
    rank = context.rank
    weights = case.routing.topk_weights(rank)
    expected = oracle.combine(rank, case.expert_rows, weights, reduce=options.ll_reduce)
    axes = ("token", "column")
    if not options.logfmt:
        assert_bitwise_equal(combined, bf16_tensor(float32_to_bf16(expected)), "combined_x", rank=rank, axes=axes)
        return
    magnitude = oracle.magnitude(rank, case.expert_rows, weights)
    largest = magnitude.max(axis=1, keepdims=True, initial=0.0) if magnitude.size else magnitude
    # Two more roundings to bf16 than the exact sum: of a rank's partial and of the code's value.
    tolerance = magnitude * (LOGFMT_STEP + 3 * BF16_ROUNDING) + largest * 2 * LOGFMT_RANGE
    assert_within(combined, expected, tolerance, "combined_x (LogFMT)", rank=rank, axes=axes)
