"""Float32 sums in a fixed order. Every addition and every multiplication rounds on its own: no fused multiply-add."""

from __future__ import annotations

from collections.abc import Callable, Sequence

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
    node's partial is the sum of its ranks ascending, from +0, rounded to ``dtype``. One rounding to ``dtype`` at the
    end.

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


def sum_over_choices(
    rows: torch.Tensor,
    row_of_choice: torch.Tensor,
    weights: torch.Tensor,
    *,
    travelled: Callable[[torch.Tensor], torch.Tensor],
) -> torch.Tensor:
    """The sum of low-latency combine with ``ll_reduce="expert"``: bf16 ``[T, H]``.

    From +0, column by column: weight times row. One rounding to bf16 at the end.

    Args:
        rows: bf16 ``[n, H]``, outputs of experts.
        row_of_choice: int64 ``[T, K]``, row of each choice, ``-1`` for none.
        weights: float32 ``[T, K]``.
        travelled: bf16 rows to the float32 values that their receiver sees.
    """
    total = torch.zeros((row_of_choice.shape[0], rows.shape[1]), dtype=torch.float32, device=rows.device)
    _add_products(total, travelled(rows), row_of_choice, weights, row_of_choice >= 0)
    return total.to(torch.bfloat16)


def sum_over_ranks_of_choices(
    rows: torch.Tensor,
    row_of_choice: torch.Tensor,
    weights: torch.Tensor,
    rank_of_choice: torch.Tensor,
    *,
    num_ranks: int,
    travelled: Callable[[torch.Tensor], torch.Tensor],
) -> torch.Tensor:
    """The sum of low-latency combine with ``ll_reduce="rank"``: bf16 ``[T, H]``.

    Each rank's partial is the sum of weight times row over the choices that are on that rank, column by column, from
    +0, rounded to bf16. Partials add from +0 by ascending rank. One rounding to bf16 at the end.

    Args:
        rank_of_choice: ``[T, K]``, the rank that holds the chosen expert.

    The rest as in `sum_over_choices`.
    """
    total = torch.zeros((row_of_choice.shape[0], rows.shape[1]), dtype=torch.float32, device=rows.device)
    values = rows.float()
    for rank in range(num_ranks):
        is_there = (rank_of_choice == rank) & (row_of_choice >= 0)
        partial = torch.zeros_like(total)
        _add_products(partial, values, row_of_choice, weights, is_there)
        # A token without a choice on this rank adds +0, which changes no sum that started from +0.
        total = total + travelled(partial.to(torch.bfloat16))
    return total.to(torch.bfloat16)


def _add_products(
    total: torch.Tensor,
    values: torch.Tensor,
    row_of_choice: torch.Tensor,
    weights: torch.Tensor,
    is_selected: torch.Tensor,
) -> None:
    """``total[t] += weights[t, k] * values[row_of_choice[t, k]]`` for the selected choices, by ascending column."""
    for column in range(row_of_choice.shape[1]):
        tokens = is_selected[:, column].nonzero().flatten()
        # Two statements, two roundings: the product is a float32 tensor of its own before it is added.
        product = weights[tokens, column, None] * values[row_of_choice[tokens, column]]
        total[tokens] = total[tokens] + product
