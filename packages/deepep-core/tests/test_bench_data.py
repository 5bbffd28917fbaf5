"""The benchmark's routings are what their names say."""

from __future__ import annotations

import pytest
import torch

from deep_ep.cli.bench_data import Routing, Shape, choices


def _shape(num_ranks: int, topk: int, routing: Routing) -> Shape:
    return Shape(
        mode="normal",
        tokens=4096,
        hidden=128,
        topk=topk,
        experts=64 * num_ranks,
        dtype="bf16",
        num_ranks=num_ranks,
        routing=routing,
    )


def _share_of_rank_0(shape: Shape) -> float:
    """Of all rows that rank 1 sends, one per token and rank."""
    ranks = choices(shape, 1, seed=5) // 64
    in_rank = torch.zeros((shape.tokens, shape.num_ranks), dtype=torch.bool).scatter_(1, ranks, True)
    return float(in_rank[:, 0].sum() / in_rank.sum())


@pytest.mark.parametrize(("num_ranks", "topk"), [(4, 8), (8, 8), (4, 2), (3, 1)])
def test_a_skewed_routing_sends_half_of_all_rows_to_rank_0(num_ranks: int, topk: int) -> None:
    assert _share_of_rank_0(_shape(num_ranks, topk, "skewed")) == pytest.approx(0.5, abs=0.02)


@pytest.mark.parametrize(("num_ranks", "topk"), [(4, 8), (8, 8), (2, 4)])
def test_a_uniform_routing_favours_no_rank(num_ranks: int, topk: int) -> None:
    assert _share_of_rank_0(_shape(num_ranks, topk, "uniform")) == pytest.approx(1 / num_ranks, abs=0.02)


def test_a_token_names_no_expert_twice() -> None:
    idx = choices(_shape(4, 8, "skewed"), 0, seed=1).sort(dim=1).values
    assert bool((idx[:, 1:] != idx[:, :-1]).all())
