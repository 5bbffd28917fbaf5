"""Dispatch and combine as differentiable functions (normal mode).

Symbols: ``T`` tokens of this rank, ``K`` choices per token, ``H`` hidden size, ``E`` experts, ``R`` received rows.

Dispatch copies a token's row to every rank that holds one of its experts, so its gradient is the sum of the rows'
gradients over those ranks: a combine. Combine sums rows over ranks, so its gradient goes to each of those rows
unchanged: a dispatch by the same handle. Gradients of rows travel in bf16, gradients of top-k weights in float32.

Both directions are collective in the backward pass too. Every rank has to run it, also one that received no row: keep
the graph connected by computing on empty tensors rather than skipping the computation.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch.autograd.function import once_differentiable

if TYPE_CHECKING:
    from ..buffer import Buffer
    from ..config import Config
    from ..handles import Parts


@dataclass(frozen=True, kw_only=True)
class Dispatched:
    """What arrived on this rank.

    Attributes:
        recv_x: bf16 ``[R, H]``, by source rank, then by source token; differentiable.
        recv_topk_idx: int64 ``[R, K]``, numbers of this rank's experts, ``-1`` elsewhere.
        recv_topk_weights: float32 ``[R, K]``, 0 where ``recv_topk_idx`` is ``-1``; differentiable.
        num_recv_tokens_per_expert: one int per expert of this rank.
        handle: to be given to `combine`.
    """

    recv_x: torch.Tensor
    recv_topk_idx: torch.Tensor
    recv_topk_weights: torch.Tensor
    num_recv_tokens_per_expert: list[int]
    handle: Parts


class _Dispatch(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        x: torch.Tensor,
        topk_weights: torch.Tensor,
        topk_idx: torch.Tensor,
        num_experts: int,
        buffer: Buffer,
        config: Config | None,
        undifferentiated: dict[str, Any],
    ) -> tuple[torch.Tensor, torch.Tensor]:
        per_rank, per_node, per_expert, in_rank, _ = buffer.get_dispatch_layout(topk_idx, num_experts)
        recv_x, recv_topk_idx, recv_topk_weights, num_per_expert, handle, _ = buffer.dispatch(
            x.contiguous(),
            num_tokens_per_rank=per_rank,
            num_tokens_per_rdma_rank=per_node,
            is_token_in_rank=in_rank,
            num_tokens_per_expert=per_expert,
            topk_idx=topk_idx,
            topk_weights=topk_weights.contiguous(),
            config=config,
        )
        undifferentiated.update(recv_topk_idx=recv_topk_idx, num_per_expert=num_per_expert, handle=handle)
        ctx.buffer, ctx.handle, ctx.recv_topk_idx = buffer, handle, recv_topk_idx
        assert isinstance(recv_x, torch.Tensor)
        assert recv_topk_weights is not None
        return recv_x, recv_topk_weights

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_recv_x: torch.Tensor, grad_recv_topk_weights: torch.Tensor) -> tuple[Any, ...]:
        # Columns that belong to other ranks hold a constant 0; whatever flowed into them must not be summed in.
        grad_weights = grad_recv_topk_weights.masked_fill(ctx.recv_topk_idx < 0, 0.0)
        grad_x, grad_topk_weights, _ = ctx.buffer.combine(
            grad_recv_x.contiguous(), ctx.handle, topk_weights=grad_weights.contiguous()
        )
        return grad_x, grad_topk_weights, None, None, None, None, None


class _Combine(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, handle: Parts, buffer: Buffer, config: Config | None) -> torch.Tensor:
        ctx.buffer, ctx.handle = buffer, handle
        combined_x: torch.Tensor = buffer.combine(x.contiguous(), handle, config=config)[0]
        return combined_x

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_combined_x: torch.Tensor) -> tuple[Any, ...]:
        return ctx.buffer.dispatch(grad_combined_x.contiguous(), handle=ctx.handle)[0], None, None, None


def dispatch(
    buffer: Buffer,
    x: torch.Tensor,
    topk_idx: torch.Tensor,
    topk_weights: torch.Tensor,
    *,
    num_experts: int,
    config: Config | None = None,
) -> Dispatched:
    """Send each token's row to the ranks that hold its experts. Collective, forward and backward.

    Args:
        buffer: serves normal mode.
        x: bf16 ``[T, H]``; differentiable.
        topk_idx: int64 ``[T, K]``, global expert of each choice, ``-1`` for an unused one.
        topk_weights: float32 ``[T, K]``; differentiable.
        num_experts: ``E``, a multiple of the number of ranks.
        config: how to use the machine; the buffer's default if ``None``.

    Raises what `Buffer.dispatch` raises.
    """
    rest: dict[str, Any] = {}
    recv_x, recv_topk_weights = _Dispatch.apply(x, topk_weights, topk_idx, num_experts, buffer, config, rest)
    return Dispatched(
        recv_x=recv_x,
        recv_topk_idx=rest["recv_topk_idx"],
        recv_topk_weights=recv_topk_weights,
        num_recv_tokens_per_expert=rest["num_per_expert"],
        handle=rest["handle"],
    )


def combine(buffer: Buffer, x: torch.Tensor, handle: Parts, *, config: Config | None = None) -> torch.Tensor:
    """Bring rows back to their tokens and sum them over ranks. Collective, forward and backward.

    Args:
        buffer: the one that dispatched.
        x: bf16 ``[R, H]``, one row for each received row, top-k weights already applied; differentiable.
        handle: `Dispatched.handle`.
        config: how to use the machine; the buffer's default if ``None``.

    Returns:
        bf16 ``[T, H]``: the sum over ranks; zeros for a token that went nowhere.

    Raises what `Buffer.combine` raises.
    """
    combined: torch.Tensor = _Combine.apply(x, handle, buffer, config)
    return combined
