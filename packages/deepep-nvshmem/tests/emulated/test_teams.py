"""Teams of blocks that send or deliver, on the emulator."""

from __future__ import annotations

import random
from dataclasses import replace

import pytest
import test_internode_kernels as t
from internode_world import Case


def with_team(case: Case, senders: int, num_sms: int, warps: int = 3, sends: int = 4) -> Case:
    tuning = {"num_team_senders": senders, "num_send_warps": sends}
    if case.use_bulk and warps:
        tuning["num_warps"] = warps
    return replace(case, num_sms=num_sms, tuning=tuple(tuning.items()))


@pytest.mark.parametrize("has_stores", [False, True], ids=["network", "stores"])
@pytest.mark.parametrize("senders,num_sms", [(1, 1), (1, 2), (1, 3), (2, 3), (2, 5), (3, 3), (7, 9), (1, 8)])
@pytest.mark.parametrize("case", [t.WINDOWS[0], t.WINDOWS[7], t.GROUPS[2], t.ROUTINGS[2]], ids=lambda c: c.name)
def test_teams_of_any_size_give_the_same_bits(case: Case, senders: int, num_sms: int, has_stores: bool) -> None:
    use_bulk = has_stores or num_sms % 2 == 0
    case = replace(case, use_bulk=use_bulk, has_stores=has_stores)
    t.round_trips(with_team(case, senders, num_sms), order=senders * 10 + num_sms)


@pytest.mark.parametrize("seed", range(40))
def test_generated_shapes_and_teams_agree_with_tensor_arithmetic(seed: int) -> None:
    d = random.Random(seed + 5000)
    case = t.generated(seed)
    team = with_team(
        case,
        d.choice([1, 1, 2, 3, 5, 7]),
        d.choice([1, 2, 3, 4, 6, 9]),
        warps=d.choice([0, 1, 3]),
        sends=d.choice([0, 1, 5]),
    )
    t.round_trips(team, order=seed)


@pytest.mark.parametrize("order", range(3))
@pytest.mark.parametrize("case", t.BLIND, ids=lambda c: c.name)
def test_calls_launched_one_after_the_other_do_not_disturb_each_other(case: Case, order: int) -> None:
    case = replace(case, has_stores=order == 1)
    world = t.world_of(case, order=order)
    case = with_team(case, 1 + order, 2 * order + 2)
    steps = []
    for _ in range(2):
        steps += t.launched_blindly(world, case)
        case = case.next()
    world.check()
    for step in steps:
        step.check()


@pytest.mark.parametrize("most", [1, 2, 3])
@pytest.mark.parametrize("senders,num_sms", [(1, 4), (2, 6), (3, 8)])
@pytest.mark.parametrize("case", [t.WINDOWS[0], t.GROUPS[2], t.WINDOWS[7]], ids=lambda c: c.name)
def test_a_gpu_with_room_for_few_blocks_gets_on(case: Case, senders: int, num_sms: int, most: int) -> None:
    t.machine().set_resident(most)
    t.round_trips(
        with_team(replace(case, use_bulk=(senders + most) % 2 == 0), senders, num_sms), order=senders * 10 + most
    )


@pytest.mark.parametrize("missing", [0, 3])
@pytest.mark.parametrize("ranks_per_node", [1, 2])
def test_a_missing_rank_is_named_and_reset_repairs(ranks_per_node: int, missing: int) -> None:
    case = with_team(replace(t.MISSING, ranks_per_node=ranks_per_node), 1, 4)
    world = t.world_of(case)
    ranks, received, _ = t.dispatched(world, case)
    world.check()
    world.members = [rank for rank in range(4) if rank != missing]
    t.dispatch(world, case, ranks, received, is_cached=True)
    errors = t.errors_of(world)
    assert any(e is not None and e.kind == "timeout" and e.peer == missing for e in errors)
    t.recovers(world, case)
