"""Float32 sums in a fixed order. Every addition and every multiplication rounds on its own: no fused multiply-add."""

from __future__ import annotations

from collections.abc import Sequence

import torch


def add_at(total: torch.Tensor, tokens: torch.Tensor, rows: torch.Tensor) -> None:
    """``total[tokens] += rows`` in float32; each token at most once in ``tokens``."""
    total[tokens] = total[tokens] + rows.float()


def sum_over_ranks(
    rows: Sequence[torch.Tensor],
    tokens: Sequence[torch.Tensor],
    *,
    num_tokens: int,
    ranks_per_node: int,
    biases: Sequence[torch.Tensor] = (),
    dtype: torch.dtype,
) -> torch.Tensor:
    """The sum that normal combine makes: ``[T, width]`` of ``dtype``.

    From +0: first the biases, then, on one node, the ranks ascending; on several nodes the nodes ascending, where each
    node's partial is the sum of its ranks ascending, from +0, rounded to ``dtype``. One rounding to ``dtype`` at the end.

    Args:
        rows: for each rank, the rows ``[n, width]`` that came back from it.
        tokens: for each rank, the token of each of these rows.
        biases: ``[T, width]`` each.
        dtype: bfloat16 for rows, float32 for weights (where rounding changes nothing).
    """
    width, device = rows[0].shape[1], rows[0].device
    total = torch.zeros((num_tokens, width), dtype=torch.float32, device=device)
    for bias in biases:
        total = total + bias.float()
    num_ranks = len(rows)
    if ranks_per_node == num_ranks:
        for rank in range(num_ranks):
            add_at(total, tokens[rank], rows[rank])
        return total.to(dtype)
    for first in range(0, num_ranks, ranks_per_node):
        partial = torch.zeros((num_tokens, width), dtype=torch.float32, device=device)
        for rank in range(first, first + ranks_per_node):
            add_at(partial, tokens[rank], rows[rank])
        # Tokens without a row on this node add +0, which changes no sum that started from +0.
        total = total + partial.to(dtype).float()
    return total.to(dtype)
