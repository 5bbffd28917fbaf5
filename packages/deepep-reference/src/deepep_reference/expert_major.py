"""The expert-major layout of low-latency mode, as index arithmetic.

Each local expert has ``M`` rows; the first of them are used: by source rank, then by source token.

Symbols: ``T`` tokens of this rank, ``K`` choices per token, ``N`` ranks, ``L`` experts of one rank, ``M`` rows of one
expert, ``R`` received rows.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from .routing import exclusive_sum

_BEGIN_SHIFT = 32
_COUNT_MASK = (1 << _BEGIN_SHIFT) - 1


def routes(topk_idx: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Experts and tokens of the rows that a rank sends, by expert, then by token, both int64 ``[n]``.

    A token travels once to each expert that it names, however often it names it. ``[[2, 0], [0, 0], [-1, 2]]`` gives
    experts ``[0, 0, 2, 2]`` and tokens ``[0, 1, 0, 2]``.
    """
    num_tokens = max(1, topk_idx.shape[0])
    key = _keys(topk_idx)[topk_idx >= 0].unique(sorted=True)
    return key // num_tokens, key % num_tokens


def row_of_choice(topk_idx: torch.Tensor, experts: torch.Tensor, tokens: torch.Tensor) -> torch.Tensor:
    """int64 ``[T, K]``: which of the rows, given by ``experts`` and ``tokens``, is each choice's; ``-1`` for none."""
    if experts.numel() == 0:
        return torch.full_like(topk_idx, -1, dtype=torch.int64)
    key, order = (experts * topk_idx.shape[0] + tokens).sort()
    wanted = _keys(topk_idx)
    position = torch.searchsorted(key, wanted).clamp(max=key.shape[0] - 1)
    is_there = (key[position] == wanted) & (topk_idx >= 0)
    return torch.where(is_there, order[position], -1)


def _keys(topk_idx: torch.Tensor) -> torch.Tensor:
    """int64 ``[T, K]``: a number for each pair of expert and token, ascending by expert, then by token."""
    num_tokens = topk_idx.shape[0]
    return topk_idx.long() * num_tokens + torch.arange(num_tokens, device=topk_idx.device)[:, None]


@dataclass(frozen=True, kw_only=True)
class ExpertMajor:
    """Where received rows lie.

    Attributes:
        order: int64 ``[R]``: the arrival number of each placed row.
        expert, row: int64 ``[R]``: where it is placed.
        begin, count: int64 ``[L, N]``: first row and number of rows of each source rank inside each expert.
    """

    order: torch.Tensor
    expert: torch.Tensor
    row: torch.Tensor
    begin: torch.Tensor
    count: torch.Tensor

    @property
    def layout_range(self) -> torch.Tensor:
        """int64 ``[L, N]``: ``begin << 32 | count``."""
        return self.begin << _BEGIN_SHIFT | self.count

    @property
    def recv_count(self) -> torch.Tensor:
        """int32 ``[L]``: rows of each expert."""
        return self.count.sum(dim=1, dtype=torch.int32)


def place(experts: torch.Tensor, src_ranks: torch.Tensor, *, num_local_experts: int, num_ranks: int) -> ExpertMajor:
    """Place rows that arrived by source rank, and from each source by token inside every expert.

    Args:
        experts: int64 ``[R]``, local expert of each row.
        src_ranks: int64 ``[R]``.
    """
    cell = experts * num_ranks + src_ranks
    order = cell.argsort(stable=True)
    count = cell.bincount(minlength=num_local_experts * num_ranks).view(num_local_experts, num_ranks)
    placed_expert = experts[order]
    first_of_expert = exclusive_sum(count.sum(dim=1))
    return ExpertMajor(
        order=order,
        expert=placed_expert,
        row=torch.arange(order.shape[0], device=order.device) - first_of_expert[placed_expert],
        begin=exclusive_sum(count, dim=1),
        count=count,
    )


def rows_by_source(layout_range: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Source rank, local expert and row, int64 ``[R]`` each, of all received rows: by source, then expert, then row."""
    begin, count = unpack_range(layout_range)
    num_local_experts = count.shape[0]
    cell_count = count.t().flatten()
    cell = torch.repeat_interleave(torch.arange(cell_count.shape[0], device=count.device), cell_count)
    offset = torch.arange(cell.shape[0], device=count.device) - exclusive_sum(cell_count)[cell]
    return cell // num_local_experts, cell % num_local_experts, begin.t().flatten()[cell] + offset


def unpack_range(layout_range: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """``begin`` and ``count`` of a ``layout_range``."""
    return layout_range >> _BEGIN_SHIFT, layout_range & _COUNT_MASK
