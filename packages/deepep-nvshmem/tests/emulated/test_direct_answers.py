"""Combine between ranks that reach each other by stores: answers are put together in shared memory."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from internode_oracle import check_combine
from internode_steps import back, dispatched, round_trips, world_of
from internode_world import Case, combine, make_combined, obstacle_to_emulation

if obstacle := obstacle_to_emulation():
    pytest.skip(obstacle, allow_module_level=True)

CASES = [
    Case(num_tokens=(30, 31), ranks_per_node=1, hidden_bytes=2048, num_topk=8, num_sms=1),
    Case(num_tokens=(9, 8, 7, 10), ranks_per_node=1, num_biases=2),
    Case(num_tokens=(20, 21, 22, 23), num_topk=3, num_ring_messages=6),
    Case(num_tokens=(12,) * 8, ranks_per_node=4, num_topk=6, num_experts=32),
    Case(num_tokens=(5,) * 16, ranks_per_node=8, num_topk=8, num_experts=64),
    # Rows of more bytes than a stage has, whose last part is shorter than the others.
    Case(num_tokens=(4, 6), ranks_per_node=1, hidden_bytes=14336, num_forward_warps=14),
    Case(num_tokens=(3, 2, 1, 2), hidden_bytes=32784, num_topk=5),
    Case(num_tokens=(6, 7), ranks_per_node=1, hidden_bytes=16, num_topk=1),
]


@pytest.mark.parametrize("is_direct", [True, False], ids=["direct", "ring"])
@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_answers_have_the_same_bits_either_way(case: Case, is_direct: bool) -> None:
    round_trips(replace(case, has_stores=True, answers_directly=is_direct))


@pytest.mark.parametrize("order", range(3))
@pytest.mark.parametrize("ranks_per_node", [1, 2])
def test_stages_are_used_again_by_one_combine_after_the_other(ranks_per_node: int, order: int) -> None:
    case = Case(num_tokens=(40, 0, 41, 5), ranks_per_node=ranks_per_node, num_sms=1, num_ring_messages=20)
    case = replace(case, hidden_bytes=2048, num_forward_warps=2, has_stores=True)
    world = world_of(case, order=order)
    ranks, _, rows = dispatched(world, case)
    steps = [back(world, case, ranks, list(rows), seed=seed) for seed in range(3)]
    world.check()
    for step in steps:
        step.check()


@pytest.mark.parametrize("is_direct", [True, False], ids=["direct", "ring"])
def test_zeros_come_back_without_a_sign(is_direct: bool) -> None:
    """The source's sum begins with +0, whatever the partial sum of a single row is."""
    case = Case(num_tokens=(5, 6), ranks_per_node=1, num_topk=1, routing="other_nodes")
    case = replace(case, has_stores=True, answers_directly=is_direct)
    world = world_of(case)
    ranks, _, rows = dispatched(world, case)
    combined = make_combined(world, case, list(rows))
    for c in combined:
        c.y.fill_(-0.0)
    combine(world, case, ranks, combined)
    world.check()
    check_combine(case, ranks, combined)
    assert all((c.out.view(torch.int16) == 0).all() for c in combined)
