"""Who sends what to whom, as tensors.

Symbols: ``T`` tokens of this rank, ``K`` choices per token, ``N`` ranks, ``D`` nodes, ``E`` experts, ``L = E / N``.
"""

from __future__ import annotations

import torch

from deep_ep.backend import DispatchLayout


def layout_of(topk_idx: torch.Tensor, *, num_experts: int, num_ranks: int, ranks_per_node: int) -> DispatchLayout:
    """Count the routes of ``topk_idx`` ``[T, K]``.

    A token goes once to each rank that holds at least one of its experts, and counts for each of its choices at the
    chosen expert. For ``N = 2``, ``E = 4``: ``topk_idx = [[0, 1], [1, 3], [-1, 2]]`` gives
    ``is_token_in_rank = [[1, 0], [1, 1], [0, 1]]``, ``num_tokens_per_rank = [2, 2]``,
    ``num_tokens_per_expert = [1, 2, 1, 1]``.
    """
    is_used = topk_idx >= 0
    rank_of_choice = topk_idx.long() // (num_experts // num_ranks)
    # Unused choices mark an extra column, which is then dropped.
    is_in = torch.zeros((topk_idx.shape[0], num_ranks + 1), dtype=torch.bool, device=topk_idx.device)
    is_in.scatter_(1, torch.where(is_used, rank_of_choice, num_ranks), True)
    is_token_in_rank = is_in[:, :num_ranks].contiguous()
    # Likewise an extra expert: masking would make the host wait for the number of used choices.
    expert_of_choice = torch.where(is_used, topk_idx.long(), num_experts).flatten()
    per_expert = torch.zeros(num_experts + 1, dtype=torch.int32, device=topk_idx.device)
    per_expert.index_add_(0, expert_of_choice, torch.ones_like(expert_of_choice, dtype=torch.int32))
    return DispatchLayout(
        num_tokens_per_rank=is_token_in_rank.sum(dim=0, dtype=torch.int32),
        num_tokens_per_rdma_rank=(
            is_token_in_node(is_token_in_rank, ranks_per_node).sum(dim=0, dtype=torch.int32)
            if ranks_per_node < num_ranks
            else None
        ),
        num_tokens_per_expert=per_expert[:num_experts].clone(),
        is_token_in_rank=is_token_in_rank,
    )


def is_token_in_node(is_token_in_rank: torch.Tensor, ranks_per_node: int) -> torch.Tensor:
    """bool ``[T, D]``: does the token go to any rank of the node."""
    return is_token_in_rank.unflatten(1, (-1, ranks_per_node)).any(dim=2)


def tokens_by_destination(is_token_in: torch.Tensor) -> torch.Tensor:
    """Token numbers in the order in which they travel: by column (destination), then by token.

    ``[[1, 0], [1, 1], [0, 1]]`` gives ``[0, 1, 1, 2]``.
    """
    return is_token_in.t().nonzero()[:, 1]


def position_at_destination(is_token_in: torch.Tensor, first: torch.Tensor) -> torch.Tensor:
    """int32 like ``is_token_in``: row of each token at each destination, ``-1`` where it does not go.

    Args:
        is_token_in: bool ``[T, columns]``.
        first: ``[columns]``, the row of this rank's first token at each destination.
    """
    row = is_token_in.cumsum(dim=0) - 1 + first.to(is_token_in.device)
    return torch.where(is_token_in, row, -1).to(torch.int32)


def exclusive_sum(counts: torch.Tensor, dim: int = 0) -> torch.Tensor:
    """Sums of everything before each element: ``[2, 3, 4]`` gives ``[0, 2, 5]``."""
    return counts.cumsum(dim=dim) - counts


def local_choices(
    topk_idx: torch.Tensor, topk_weights: torch.Tensor | None, *, rank: int, num_local_experts: int
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """Choices as ``rank`` sees them: its own experts numbered from 0, ``-1`` and weight 0 for all others."""
    local = topk_idx - rank * num_local_experts
    is_own = (local >= 0) & (local < num_local_experts) & (topk_idx >= 0)
    weights = torch.where(is_own, topk_weights, 0.0) if topk_weights is not None else None
    return torch.where(is_own, local, -1), weights
