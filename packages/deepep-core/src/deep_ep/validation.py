"""Argument checks: everything a call can know to be wrong is found here, before any state changes.

Each function takes what the user passed and returns the request for the backend, or raises `ArgumentError` saying what
was given, what is accepted, where, and what to do.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from .backend import (
    CombineRequest,
    DispatchLayout,
    DispatchRequest,
    LowLatencyCombineRequest,
    LowLatencyDispatchRequest,
)
from .errors import ArgumentError
from .handles import InternodeHandle, IntranodeHandle, LowLatencyHandle

MAX_TOPK = 32
ROW_ALIGNMENT_BYTES = 16
FP8_BLOCK = 128


def tensor(
    value: Any, name: str, where: str, *, dims: int, dtypes: Sequence[torch.dtype] | None = None
) -> torch.Tensor:
    """``value`` as a tensor of ``dims`` dimensions and one of ``dtypes``."""
    if not isinstance(value, torch.Tensor):
        raise ArgumentError(f"{where}: {name} is a {type(value).__name__}; it has to be a torch.Tensor.")
    if value.dim() != dims:
        raise ArgumentError(f"{where}: {name} has shape {tuple(value.shape)}; it has to have {dims} dimension(s).")
    if dtypes is not None and value.dtype not in dtypes:
        accepted = " or ".join(_short(d) for d in dtypes)
        raise ArgumentError(f"{where}: {name} has dtype {_short(value.dtype)}; accepted: {accepted}.")
    return value


def _short(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def _shape(value: torch.Tensor, name: str, where: str, shape: tuple[int, ...], why: str) -> None:
    if value.shape != shape:
        raise ArgumentError(f"{where}: {name} has shape {tuple(value.shape)}; it has to be {shape} ({why}).")


def _contiguous(value: torch.Tensor, name: str, where: str) -> None:
    if not value.is_contiguous():
        raise ArgumentError(
            f"{where}: {name} has strides {tuple(value.stride())} for shape {tuple(value.shape)}; it has to "
            "be contiguous. "
            f"Pass {name}.contiguous()."
        )


def _same_device(where: str, device: torch.device, **tensors: torch.Tensor | None) -> None:
    for name, value in tensors.items():
        if value is not None and value.device != device:
            raise ArgumentError(f"{where}: {name} is on {value.device} but x is on {device}. Move it there.")


def integer(value: Any, name: str, where: str, *, least: int) -> int:
    """``value`` as an int of at least ``least``."""
    if isinstance(value, bool) or not isinstance(value, int) or value < least:
        raise ArgumentError(f"{where}: {name} is {value!r}; it has to be an int of at least {least}.")
    return value


def experts(num_experts: Any, num_ranks: int, where: str) -> int:
    """``num_experts`` as a positive multiple of the group's size."""
    integer(num_experts, "num_experts", where, least=1)
    if num_experts % num_ranks:
        raise ArgumentError(f"{where}: num_experts is {num_experts}; it has to be a multiple of the {num_ranks} ranks.")
    return int(num_experts)


def topk_indices(
    topk_idx: Any, where: str, *, num_experts: int, num_tokens: int | None = None, check_values: bool = False
) -> torch.Tensor:
    """``[T, K]`` int64 or int32, made contiguous; values are checked on the CPU, and on CUDA with ``check_values``."""
    idx = tensor(topk_idx, "topk_idx", where, dims=2, dtypes=(torch.int64, torch.int32))
    if not 1 <= idx.shape[1] <= MAX_TOPK:
        raise ArgumentError(
            f"{where}: topk_idx has {idx.shape[1]} columns; accepted: 1 to {MAX_TOPK} choices per token."
        )
    if num_tokens is not None and idx.shape[0] != num_tokens:
        raise ArgumentError(f"{where}: topk_idx has {idx.shape[0]} rows but x has {num_tokens} tokens.")
    if idx.numel() and (check_values or not idx.is_cuda):
        wrong = (idx < -1) | (idx >= num_experts)
        if bool(wrong.any()):
            token, column = (int(v) for v in wrong.nonzero()[0])
            raise ArgumentError(
                f"{where}: topk_idx[{token}, {column}] is {int(idx[token, column])}; accepted: -1 (unused) "
                "and experts 0 "
                f"to {num_experts - 1}."
            )
    return idx.contiguous()


def topk_weights(weights: Any, where: str, *, shape: tuple[int, ...], why: str) -> torch.Tensor:
    """float32 of ``shape``, made contiguous."""
    value = tensor(weights, "topk_weights", where, dims=2, dtypes=(torch.float32,))
    _shape(value, "topk_weights", where, shape, why)
    return value.contiguous()


def _rows(x: Any, where: str) -> tuple[torch.Tensor, torch.Tensor | None]:
    """``x`` or ``(x, scales)`` of normal mode."""
    scales: torch.Tensor | None = None
    if isinstance(x, (tuple, list)):
        if len(x) != 2:
            raise ArgumentError(f"{where}: x is a tuple of {len(x)}; accepted: a tensor, or (x, scales).")
        x, scales = x
        scales = tensor(scales, "scales", where, dims=2, dtypes=(torch.float32, torch.int32))
    rows = tensor(x, "x", where, dims=2)
    if scales is None and rows.dtype is not torch.bfloat16:
        raise ArgumentError(
            f"{where}: x has dtype {_short(rows.dtype)}; accepted: bfloat16, or a 1-byte type as (x, scales)."
        )
    if scales is not None:
        if rows.element_size() != 1:
            raise ArgumentError(
                f"{where}: x has dtype {_short(rows.dtype)} and comes with scales; with scales x has to be a "
                "1-byte type."
            )
        if scales.shape[0] != rows.shape[0]:
            raise ArgumentError(f"{where}: scales have {scales.shape[0]} rows but x has {rows.shape[0]} tokens.")
        if scales.shape[1] < 1:
            raise ArgumentError(f"{where}: scales have 0 columns; pass x alone if there are none.")
        _same_device(where, rows.device, scales=scales)
    _contiguous(rows, "x", where)
    row_bytes = rows.shape[1] * rows.element_size()
    if row_bytes == 0 or row_bytes % ROW_ALIGNMENT_BYTES:
        raise ArgumentError(
            f"{where}: a row of x has {row_bytes} bytes (hidden {rows.shape[1]}); it has to be a positive multiple of "
            f"{ROW_ALIGNMENT_BYTES}. Pad the hidden size."
        )
    return rows, scales


def node_counts(is_token_in_rank: torch.Tensor, ranks_per_node: int) -> torch.Tensor:
    """int32 ``[D]``: tokens that go to at least one rank of each node."""
    num_tokens, num_ranks = is_token_in_rank.shape
    by_node = is_token_in_rank.view(num_tokens, num_ranks // ranks_per_node, ranks_per_node)
    return by_node.any(dim=2).sum(dim=0, dtype=torch.int32)


def fresh_dispatch(
    x: Any,
    *,
    num_ranks: int,
    ranks_per_node: int,
    num_tokens_per_rank: Any,
    num_tokens_per_rdma_rank: Any,
    is_token_in_rank: Any,
    num_tokens_per_expert: Any,
    topk_idx: Any,
    weights: Any,
    expert_alignment: Any,
    num_worst_tokens: Any,
    num_sms: int,
    num_sms_is_exact: bool,
    output_stream: torch.cuda.Stream | None = None,
    check_values: bool,
) -> DispatchRequest:
    """A dispatch without a handle."""
    where = "dispatch"
    rows, scales = _rows(x, where)
    num_tokens = rows.shape[0]
    for name, value in (
        ("num_tokens_per_rank", num_tokens_per_rank),
        ("is_token_in_rank", is_token_in_rank),
        ("num_tokens_per_expert", num_tokens_per_expert),
    ):
        if value is None:
            raise ArgumentError(
                f"{where}: {name} is None. A dispatch needs the results of get_dispatch_layout, or the handle of an "
                "earlier dispatch."
            )
    per_rank = tensor(num_tokens_per_rank, "num_tokens_per_rank", where, dims=1, dtypes=(torch.int32,))
    _shape(per_rank, "num_tokens_per_rank", where, (num_ranks,), "one count per rank")
    in_rank = tensor(is_token_in_rank, "is_token_in_rank", where, dims=2, dtypes=(torch.bool,))
    _shape(in_rank, "is_token_in_rank", where, (num_tokens, num_ranks), "tokens of x by ranks")
    per_expert = tensor(num_tokens_per_expert, "num_tokens_per_expert", where, dims=1, dtypes=(torch.int32,))
    num_experts = experts(per_expert.numel(), num_ranks, where)
    idx: torch.Tensor | None = None
    if (topk_idx is None) != (weights is None):
        given = "topk_idx" if weights is None else "topk_weights"
        raise ArgumentError(f"{where}: {given} is given alone; topk_idx and topk_weights go together.")
    if topk_idx is not None:
        idx = topk_indices(topk_idx, where, num_experts=num_experts, num_tokens=num_tokens, check_values=check_values)
        weights = topk_weights(weights, where, shape=tuple(idx.shape), why="the shape of topk_idx")
    integer(expert_alignment, "expert_alignment", where, least=1)
    integer(num_worst_tokens, "num_worst_tokens", where, least=0)
    _same_device(
        where,
        rows.device,
        num_tokens_per_rank=per_rank,
        is_token_in_rank=in_rank,
        num_tokens_per_expert=per_expert,
        topk_idx=idx,
        topk_weights=weights,
    )
    per_node: torch.Tensor | None = None
    if ranks_per_node < num_ranks:
        if num_tokens_per_rdma_rank is None:
            per_node = node_counts(in_rank, ranks_per_node)
        else:
            per_node = tensor(
                num_tokens_per_rdma_rank, "num_tokens_per_rdma_rank", where, dims=1, dtypes=(torch.int32,)
            )
            _shape(per_node, "num_tokens_per_rdma_rank", where, (num_ranks // ranks_per_node,), "one count per node")
    return DispatchRequest(
        x=rows,
        scales=scales,
        layout=DispatchLayout(
            num_tokens_per_rank=per_rank.contiguous(),
            num_tokens_per_rdma_rank=per_node,
            num_tokens_per_expert=per_expert.contiguous(),
            is_token_in_rank=in_rank.contiguous(),
        ),
        topk_idx=idx,
        topk_weights=weights,
        expert_alignment=expert_alignment,
        num_worst_tokens=num_worst_tokens,
        num_sms=num_sms,
        num_sms_is_exact=num_sms_is_exact,
        output_stream=output_stream,
    )


def normal_handle(handle: Any, where: str, *, num_ranks: int, ranks_per_node: int) -> IntranodeHandle | InternodeHandle:
    """The typed handle inside the tuple that a user passed."""
    if not isinstance(handle, (tuple, list)):
        raise ArgumentError(
            f"{where}: handle is a {type(handle).__name__}; it has to be the tuple that dispatch returned."
        )
    parts = tuple(handle)
    typed: IntranodeHandle | InternodeHandle
    if ranks_per_node < num_ranks:
        typed = InternodeHandle.from_tuple(parts)
    else:
        typed = IntranodeHandle.from_tuple(parts)
    in_rank = tensor(typed.is_token_in_rank, "handle's is_token_in_rank", where, dims=2, dtypes=(torch.bool,))
    if in_rank.shape[1] != num_ranks:
        raise ArgumentError(
            f"{where}: the handle is of a group of {in_rank.shape[1]} ranks, this buffer has {num_ranks}."
        )
    return typed


def cached_dispatch(
    x: Any,
    handle: Any,
    *,
    num_ranks: int,
    ranks_per_node: int,
    topk_idx: Any,
    weights: Any,
    num_sms: int,
    num_sms_is_exact: bool,
    output_stream: torch.cuda.Stream | None = None,
) -> DispatchRequest:
    """A dispatch that repeats the routing of an earlier one."""
    where = "dispatch (cached)"
    typed = normal_handle(handle, where, num_ranks=num_ranks, ranks_per_node=ranks_per_node)
    if topk_idx is not None or weights is not None:
        raise ArgumentError(f"{where}: topk_idx and topk_weights do not go with a handle; pass None for both.")
    rows, scales = _rows(x, where)
    if rows.shape[0] != typed.num_tokens:
        raise ArgumentError(f"{where}: x has {rows.shape[0]} tokens, the handle's dispatch had {typed.num_tokens}.")
    _same_device(where, rows.device, handle=typed.is_token_in_rank)
    return DispatchRequest(
        x=rows,
        scales=scales,
        handle=tuple(handle),
        num_sms=num_sms,
        num_sms_is_exact=num_sms_is_exact,
        output_stream=output_stream,
    )


def combine(
    x: Any,
    handle: Any,
    *,
    num_ranks: int,
    ranks_per_node: int,
    weights: Any,
    bias: Any,
    num_sms: int,
    num_sms_is_exact: bool,
    output_stream: torch.cuda.Stream | None = None,
) -> CombineRequest:
    """A normal-mode combine."""
    where = "combine"
    typed = normal_handle(handle, where, num_ranks=num_ranks, ranks_per_node=ranks_per_node)
    rows = tensor(x, "x", where, dims=2, dtypes=(torch.bfloat16,))
    rows, _ = _rows(rows, where)
    if rows.shape[0] != typed.num_recv_tokens:
        raise ArgumentError(
            f"{where}: x has {rows.shape[0]} rows, the handle's dispatch delivered {typed.num_recv_tokens}. "
            "Pass one row "
            "for each received row, in the same order."
        )
    if weights is not None:
        value = tensor(weights, "topk_weights", where, dims=2, dtypes=(torch.float32,))
        if not 1 <= value.shape[1] <= MAX_TOPK:
            raise ArgumentError(f"{where}: topk_weights has {value.shape[1]} columns; accepted: 1 to {MAX_TOPK}.")
        weights = topk_weights(value, where, shape=(rows.shape[0], value.shape[1]), why="one row per row of x")
    given = () if bias is None else (bias,) if isinstance(bias, torch.Tensor) else tuple(bias)
    if len(given) > 2:
        raise ArgumentError(f"{where}: bias has {len(given)} tensors; accepted: none, one or two.")
    biases: list[torch.Tensor] = []
    for i, value in enumerate(b for b in given if b is not None):
        name = f"bias[{i}]"
        one = tensor(value, name, where, dims=2, dtypes=(torch.bfloat16,))
        _shape(one, name, where, (typed.num_tokens, rows.shape[1]), "this rank's tokens by hidden")
        biases.append(one.contiguous())
    _same_device(
        where,
        rows.device,
        topk_weights=weights,
        handle=typed.is_token_in_rank,
        **{f"bias[{i}]": b for i, b in enumerate(biases)},
    )
    return CombineRequest(
        x=rows,
        handle=tuple(handle),
        topk_weights=weights,
        biases=tuple(biases),
        num_sms=num_sms,
        num_sms_is_exact=num_sms_is_exact,
        output_stream=output_stream,
    )


def _stats(
    value: Any, name: str, where: str, *, dtype: torch.dtype, size: int, device: torch.device
) -> torch.Tensor | None:
    if value is None:
        return None
    stats = tensor(value, name, where, dims=1, dtypes=(dtype,))
    _shape(stats, name, where, (size,), "one number each")
    _contiguous(stats, name, where)
    _same_device(where, device, **{name: stats})
    return stats


def low_latency_dispatch(
    x: Any,
    topk_idx: Any,
    *,
    num_ranks: int,
    max_tokens: Any,
    num_experts: Any,
    weights: Any,
    cumulative_local_expert_recv_stats: Any,
    wait_recv_cost_stats: Any,
    use_fp8: bool,
    round_scale: bool,
    use_ue8m0: bool,
    split: bool,
    check_values: bool,
) -> LowLatencyDispatchRequest:
    """A low-latency dispatch."""
    where = "low_latency_dispatch"
    rows = tensor(x, "x", where, dims=2, dtypes=(torch.bfloat16,))
    _contiguous(rows, "x", where)
    integer(max_tokens, "num_max_dispatch_tokens_per_rank", where, least=1)
    experts(num_experts, num_ranks, where)
    num_tokens, hidden = rows.shape
    multiple_of = FP8_BLOCK if use_fp8 else ROW_ALIGNMENT_BYTES // rows.element_size()
    if hidden == 0 or hidden % multiple_of:
        raise ArgumentError(
            f"{where}: hidden is {hidden}; with use_fp8={bool(use_fp8)} it has to be a positive multiple of "
            f"{multiple_of}."
        )
    if num_tokens > max_tokens:
        raise ArgumentError(
            f"{where}: x has {num_tokens} tokens; this call allows {max_tokens} (num_max_dispatch_tokens_per_rank)."
        )
    if use_ue8m0 and not (use_fp8 and round_scale):
        raise ArgumentError(
            f"{where}: use_ue8m0 needs use_fp8=True and round_scale=True (UE8M0 holds powers of two only)."
        )
    if use_ue8m0 and hidden % (4 * FP8_BLOCK):
        raise ArgumentError(f"{where}: hidden is {hidden}; with use_ue8m0 it has to be a multiple of {4 * FP8_BLOCK}.")
    idx = topk_indices(topk_idx, where, num_experts=num_experts, num_tokens=num_tokens, check_values=check_values)
    if weights is not None:
        weights = topk_weights(weights, where, shape=tuple(idx.shape), why="the shape of topk_idx")
    _same_device(where, rows.device, topk_idx=idx, topk_weights=weights)
    return LowLatencyDispatchRequest(
        x=rows,
        topk_idx=idx,
        topk_weights=weights,
        max_tokens=max_tokens,
        num_experts=num_experts,
        cumulative_local_expert_recv_stats=_stats(
            cumulative_local_expert_recv_stats,
            "cumulative_local_expert_recv_stats",
            where,
            dtype=torch.int32,
            size=num_experts // num_ranks,
            device=rows.device,
        ),
        wait_recv_cost_stats=_stats(
            wait_recv_cost_stats,
            "dispatch_wait_recv_cost_stats",
            where,
            dtype=torch.int64,
            size=num_ranks,
            device=rows.device,
        ),
        use_fp8=bool(use_fp8),
        round_scale=bool(round_scale),
        use_ue8m0=bool(use_ue8m0),
        split=split,
    )


def low_latency_handle(handle: Any, where: str, *, num_ranks: int) -> LowLatencyHandle:
    """The typed handle inside the tuple that a user passed."""
    if not isinstance(handle, (tuple, list)):
        raise ArgumentError(
            f"{where}: handle is a {type(handle).__name__}; it has to be the tuple that low_latency_dispatch returned."
        )
    typed = LowLatencyHandle.from_tuple(tuple(handle))
    experts(typed.num_experts, num_ranks, where)
    num_local = typed.num_experts // num_ranks
    _shape(typed.src_info, "handle[0]", where, (num_local, num_ranks * typed.max_tokens), "local experts by rows")
    _shape(typed.layout_range, "handle[1]", where, (num_local, num_ranks), "local experts by ranks")
    return typed


def low_latency_combine(
    x: Any,
    topk_idx: Any,
    weights: Any,
    handle: Any,
    *,
    num_ranks: int,
    use_logfmt: bool,
    zero_copy: bool,
    out: Any,
    wait_recv_cost_stats: Any,
    split: bool,
    check_values: bool,
) -> LowLatencyCombineRequest:
    """A low-latency combine."""
    where = "low_latency_combine"
    typed = low_latency_handle(handle, where, num_ranks=num_ranks)
    rows = tensor(x, "x", where, dims=3, dtypes=(torch.bfloat16,))
    shape = (typed.num_experts // num_ranks, num_ranks * typed.max_tokens, typed.hidden)
    _shape(rows, "x", where, shape, "as low_latency_dispatch returned it")
    if zero_copy and use_logfmt:
        raise ArgumentError(f"{where}: zero_copy and use_logfmt exclude each other.")
    if use_logfmt and typed.hidden % FP8_BLOCK:
        raise ArgumentError(
            f"{where}: hidden is {typed.hidden}; with use_logfmt it has to be a multiple of {FP8_BLOCK}."
        )
    if not zero_copy:
        _contiguous(rows, "x", where)
    idx = topk_indices(topk_idx, where, num_experts=typed.num_experts, check_values=check_values)
    if idx.shape[0] > typed.max_tokens:
        raise ArgumentError(
            f"{where}: topk_idx has {idx.shape[0]} tokens; the handle's dispatch allows {typed.max_tokens}."
        )
    weights = topk_weights(weights, where, shape=tuple(idx.shape), why="the shape of topk_idx")
    if out is not None:
        out = tensor(out, "out", where, dims=2, dtypes=(torch.bfloat16,))
        _shape(out, "out", where, (idx.shape[0], typed.hidden), "this rank's tokens by hidden")
        _contiguous(out, "out", where)
    _same_device(where, rows.device, topk_idx=idx, topk_weights=weights, out=out, handle=typed.src_info)
    return LowLatencyCombineRequest(
        x=rows,
        topk_idx=idx,
        topk_weights=weights,
        handle=typed.to_tuple(),
        use_logfmt=bool(use_logfmt),
        zero_copy=bool(zero_copy),
        out=out,
        wait_recv_cost_stats=_stats(
            wait_recv_cost_stats,
            "combine_wait_recv_cost_stats",
            where,
            dtype=torch.int64,
            size=num_ranks,
            device=rows.device,
        ),
        split=split,
    )
