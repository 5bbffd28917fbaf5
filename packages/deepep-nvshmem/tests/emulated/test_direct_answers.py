"""Combine in teams: forwarders that answer out of shared memory, collectors that add up what bulk loads bring."""

from __future__ import annotations

import random
from dataclasses import replace

import pytest
import torch
from internode_oracle import check_combine
from internode_steps import back, dispatched, round_trips, world_of
from internode_world import Case, combine, machine, make_combined, obstacle_to_emulation
from test_internode_kernels import generated

from deepep_nvshmem.internode import default_window_mb

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


@pytest.mark.parametrize("has_stores", [False, True], ids=["network", "stores"])
@pytest.mark.parametrize("num_stages", [1, 2, 3])
@pytest.mark.parametrize("case", [CASES[1], CASES[3], CASES[6]], ids=lambda case: case.name)
def test_tokens_of_more_addends_than_there_are_stages(case: Case, num_stages: int, has_stores: bool) -> None:
    """They are added up where they lie, in turn with those that fit."""
    tuning = (("num_source_stages", num_stages), ("num_source_warps", 2))
    round_trips(replace(case, has_stores=has_stores, combine_tuning=tuning), order=num_stages)


@pytest.mark.parametrize("num_sms", [1, 2, 3, 5])
@pytest.mark.parametrize("has_teams", [0, 1], ids=["undivided", "teams"])
@pytest.mark.parametrize("case", [CASES[1], CASES[2]], ids=lambda case: case.name)
def test_teams_give_the_bits_of_undivided_blocks(case: Case, has_teams: int, num_sms: int) -> None:
    case = replace(case, has_stores=True, num_sms=num_sms, combine_tuning=(("has_teams", has_teams),))
    round_trips(case, order=num_sms)


@pytest.mark.parametrize("order", range(4))
@pytest.mark.parametrize("most", [1, 2, 3])
def test_a_forwarder_collects_where_its_collector_finds_no_room(most: int, order: int) -> None:
    machine().set_resident(most)
    round_trips(replace(CASES[2], has_stores=order % 2 == 0, num_sms=6), order=order)


@pytest.mark.parametrize("num_tokens", [(70, 30), (500, 450)])
@pytest.mark.parametrize("num_sms", [1, 2])
def test_many_slots_of_many_small_rows_fit_into_few_blocks(num_sms: int, num_tokens: tuple[int, int]) -> None:
    case = Case(num_tokens=num_tokens, ranks_per_node=1, hidden_bytes=16, num_topk=2, num_sms=num_sms)
    round_trips(replace(case, num_ring_messages=30000, has_stores=True))


@pytest.mark.parametrize("seed", range(40))
def test_generated_shapes_and_tunings_agree_with_tensor_arithmetic(seed: int) -> None:
    draw = random.Random(seed + 9000)
    case = generated(seed + 500)
    num_ranks = case.ranks_per_node
    tuning = {
        "has_teams": draw.choice([0, 1, 1, 1]),
        "num_stages": draw.choice([0, num_ranks, num_ranks + 1, 16]),
        "num_source_warps": draw.choice([0, 1, 3, 15]),
        "num_source_stages": draw.choice([0, 1, 2, 4, 9]),
    }
    case = replace(case, has_stores=draw.random() < 0.7, num_sms=draw.choice([1, 2, 3, 4, 7]))
    round_trips(replace(case, combine_tuning=tuple(tuning.items())), order=seed)


@pytest.mark.parametrize("seed", range(12))
def test_generated_shapes_through_the_usual_window(seed: int) -> None:
    """Rings as large as a buffer's, through which small rows travel in slots of many rows."""
    draw = random.Random(seed + 7000)
    ranks_per_node, num_nodes = draw.choice([(1, 2), (1, 4), (2, 2)])
    num_ranks = ranks_per_node * num_nodes
    num_experts, most = num_ranks * draw.randint(1, 8), draw.choice([3, 40, 90])
    case = Case(
        num_tokens=tuple(draw.randint(0, most) for _ in range(num_ranks)),
        ranks_per_node=ranks_per_node,
        hidden_bytes=draw.randint(1, 260) * 16,
        num_topk=draw.randint(1, min(32, num_experts)),
        num_experts=num_experts,
        num_sms=draw.choice([2, 8, 20]),
        num_biases=draw.randint(0, 2),
        has_stores=draw.random() < 0.8,
        tuning=(),
    )
    window_bytes = int(default_window_mb(num_nodes) * (1 << 20))
    num_messages = window_bytes // 2 // (case.ring_bytes // 400)
    round_trips(replace(case, num_ring_messages=num_messages), order=seed)
