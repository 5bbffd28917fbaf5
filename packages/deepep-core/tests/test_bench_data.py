"""The benchmark's routings are what their names say."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from deep_ep.cli.bench_data import Routing, Shape, choices, ranks_of
from deep_ep.cli.bench_floor import two_hop_bytes, two_hop_rows
from deep_ep.internode_model import Shape as Model
from deep_ep.internode_model import fan_out


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


def test_a_grouped_routing_takes_the_best_experts_of_the_groups_with_the_best_two() -> None:
    shape = replace(_shape(4, 8, "uniform"), num_groups=8, num_topk_groups=3)
    appeal = torch.rand(shape.tokens, shape.experts, generator=torch.Generator().manual_seed((5 * 4099 + 1) * 2 + 1))
    for token, chosen in list(enumerate(choices(shape, 1, seed=5)))[:50]:
        groups = appeal[token].view(8, 32)
        order = sorted(range(8), key=lambda g: -groups[g].sort().values[-2:].sum())
        allowed = [e for g in order[:3] for e in range(g * 32, g * 32 + 32)]
        assert sorted(chosen.tolist()) == sorted(sorted(allowed, key=lambda e: -appeal[token, e])[:8])


def test_groups_of_one_expert_limit_nothing_that_the_best_do_not() -> None:
    shape = replace(_shape(4, 8, "uniform"), experts=16)
    grouped = replace(shape, num_groups=16, num_topk_groups=8)
    assert torch.equal(choices(grouped, 2, seed=1).sort().values, choices(shape, 2, seed=1).sort().values)


def _wanted(num_ranks: int, *rows: tuple[int, list[int]]) -> torch.Tensor:
    """One token of each of these sources, for these ranks."""
    wanted = torch.zeros((num_ranks, len(rows), num_ranks), dtype=torch.bool)
    for token, (source, ranks) in enumerate(rows):
        wanted[source, token, ranks] = True
    return wanted


@pytest.mark.parametrize(
    ("ranks_per_node", "source", "ranks", "out", "back"),
    [
        (2, 0, [1, 2, 3], [2, 0, 1, 0], [0, 1, 1, 1]),
        (2, 0, [0], [0, 0, 0, 0], [0, 0, 0, 0]),
        (2, 0, [3], [1, 0, 1, 0], [0, 0, 1, 1]),
        (2, 3, [0, 3], [0, 1, 0, 1], [1, 1, 0, 0]),
        (1, 1, [0, 1, 3], [0, 2, 0, 0], [1, 0, 0, 1]),
        (4, 1, [0, 1, 3], [0, 2, 0, 0], [1, 0, 0, 1]),
    ],
)
def test_rows_of_two_hops_by_hand(
    ranks_per_node: int, source: int, ranks: list[int], out: list[int], back: list[int]
) -> None:
    found = two_hop_rows(_wanted(4, (source, ranks)), ranks_per_node)
    assert (found.dispatch.tolist(), found.combine.tolist()) == (out, back)


def test_two_hops_move_as_many_rows_out_as_back_and_the_busiest_rank_counts() -> None:
    shape = replace(_shape(8, 8, "uniform"), tokens=1000, dtype="fp8")
    wanted = torch.stack([ranks_of(shape, choices(shape, rank, seed=0)) for rank in range(8)])
    rows = two_hop_rows(wanted, 4)
    assert rows.dispatch.sum() == rows.combine.sum()
    expected = fan_out(Model(num_nodes=2, ranks_per_node=4, num_experts=shape.experts))
    per_token = expected.nodes / 2 + expected.ranks * 3 / 4
    assert float(rows.dispatch.sum()) / 8000 == pytest.approx(per_token, rel=0.01)
    found = two_hop_bytes(shape, 4, 1)
    assert found["dispatch"] == float(rows.dispatch.max()) * (128 + 4)
    assert found["combine"] == float(rows.combine.max()) * 256
    assert found["pair"] == found["dispatch"] + found["combine"]
