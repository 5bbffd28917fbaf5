"""The kernels across nodes against plain tensor arithmetic, bit for bit, on emulated GPUs and an emulated network."""

from __future__ import annotations

import random
from dataclasses import replace
from typing import Any

import pytest
import torch
from internode_oracle import check_combine, check_dispatch, check_routing, row_counts
from internode_steps import (
    WORLDS,
    Step,
    after_dispatch,
    back,
    cached,
    dispatched,
    round_trips,
    world_of,
)
from internode_world import (
    LEAST_RING_BYTES,
    Case,
    World,
    combine,
    dispatch,
    layout,
    machine,
    make_combined,
    make_ranks,
    make_received,
    notify,
    obstacle_to_emulation,
    poisoned,
)

if obstacle := obstacle_to_emulation():
    pytest.skip(obstacle, allow_module_level=True)


# --- shapes ---------------------------------------------------------------------------------------------------------

FP8 = {"dtype": torch.uint8, "hidden_bytes": 1024, "num_scales": 8}
GROUPS = [
    Case(num_tokens=(3, 2), ranks_per_node=1, hidden_bytes=16, num_topk=1, num_experts=2),
    Case(num_tokens=(5, 6, 7, 8)),
    Case(num_tokens=(9, 8, 7, 10), ranks_per_node=1),
    Case(num_tokens=(7, 9, 8, 11, 6, 10), num_experts=12),
    Case(num_tokens=(7, 9, 8, 11, 6, 10), ranks_per_node=3, num_experts=12, num_topk=3),
    Case(num_tokens=(12,) * 8, ranks_per_node=4, num_topk=6, num_experts=32),
    Case(num_tokens=(11,) * 8, num_topk=6, num_experts=32),
    Case(num_tokens=(9,) * 8, ranks_per_node=1, num_topk=6, num_experts=32),
    Case(num_tokens=(5,) * 16, ranks_per_node=8, num_topk=8, num_experts=64),
    Case(num_tokens=(4,) * 12, ranks_per_node=1, num_topk=4, num_experts=24, hidden_bytes=64, num_sms=2),
]
ROUTINGS = [
    Case(num_tokens=(0, 0, 0, 0)),
    Case(num_tokens=(0, 30, 0, 0)),
    Case(num_tokens=(120, 1, 0, 3), num_experts=8),
    Case(num_tokens=(40, 30, 50, 20), routing="to_rank_0"),
    Case(num_tokens=(30, 30, 30, 30), routing="other_nodes"),
    Case(num_tokens=(30, 30, 30, 30), routing="own_node"),
    Case(num_tokens=(20,) * 6, ranks_per_node=2, routing="one_group", num_experts=24),
    Case(num_tokens=(20, 21, 22, 23), ranks_per_node=1, routing="one_group"),
    Case(num_tokens=(20, 25, 30, 35), routing="some_unused", num_biases=2, index_bits=32),
    Case(num_tokens=(20, 20, 20, 20), routing="none", num_biases=1),
    Case(num_tokens=(20, 20, 20, 20), routing="bad"),
    Case(num_tokens=(33, 32), ranks_per_node=1, num_topk=32, num_experts=64),
]
ROWS = [
    Case(num_tokens=(6, 7, 8, 9), hidden_bytes=16, num_topk=1, num_experts=4),
    Case(num_tokens=(6, 7, 8, 9), hidden_bytes=112, num_topk=3),
    Case(num_tokens=(5, 4, 3, 2), hidden_bytes=14336, num_topk=8, num_experts=64, num_biases=1),
    Case(num_tokens=(3, 2, 1, 2), hidden_bytes=32784),
    Case(num_tokens=(9, 8, 7, 6), **FP8),
    Case(num_tokens=(9, 8, 7, 6), ranks_per_node=1, scales_layout="column", alignment=16, **FP8),
    Case(num_tokens=(9, 8, 7, 6), scales_layout="sparse", **FP8),
    Case(num_tokens=(9, 8, 7, 6), dtype=torch.uint8, hidden_bytes=640, num_scales=5),
    Case(num_tokens=(9, 8, 7, 6), dtype=torch.uint8, hidden_bytes=128, num_scales=1, num_topk=7),
    Case(num_tokens=(5, 4, 3, 2), dtype=torch.uint8, hidden_bytes=7168, num_scales=56, num_topk=8, num_experts=64),
    Case(num_tokens=(3, 4), ranks_per_node=1, dtype=torch.uint8, hidden_bytes=16384, num_scales=300),
]


@pytest.mark.parametrize("case", GROUPS + ROUTINGS, ids=lambda case: case.name)
def test_dispatch_and_combine_agree_with_tensor_arithmetic(case: Case) -> None:
    round_trips(case)


@pytest.mark.parametrize(
    ("use_bulk", "has_stores"), [(True, False), (False, False), (True, True)], ids=["bulk", "plain", "stores"]
)
@pytest.mark.parametrize("case", ROWS, ids=lambda case: case.name)
def test_rows_of_any_size_with_any_scales_travel(case: Case, use_bulk: bool, has_stores: bool) -> None:
    round_trips(replace(case, use_bulk=use_bulk, has_stores=has_stores))


def test_each_choice_of_an_expert_that_is_named_again_counts() -> None:
    round_trips(Case(num_tokens=(20, 20, 20, 20), routing="repeated", num_topk=6))


# Rings that hold few messages: every slot is used many times.
TIGHT = {"hidden_bytes": 2048, "num_topk": 3}
WINDOWS = [
    Case(num_tokens=(24, 25, 26, 27), num_ring_messages=2, **TIGHT),
    Case(num_tokens=(24, 25, 26, 27), ranks_per_node=1, num_ring_messages=2, num_sms=1, **TIGHT),
    Case(num_tokens=(60, 0, 3, 0), num_ring_messages=2, num_sms=5, **TIGHT),
    Case(num_tokens=(30, 31, 29, 28), num_ring_messages=3, **TIGHT),
    Case(num_tokens=(20,) * 6, num_experts=12, num_ring_messages=5, num_sms=2, **TIGHT),
    Case(num_tokens=(24, 20, 9, 30), routing="to_rank_0", num_ring_messages=2, **TIGHT),
    Case(num_tokens=(24, 20, 9, 30), routing="one_group", num_ring_messages=4, **TIGHT),
    Case(num_tokens=(90, 91, 92, 10), num_ring_messages=34, num_topk=2),
    Case(num_tokens=(150, 20, 0, 160), num_ring_messages=70, hidden_bytes=128),
    Case(num_tokens=(150, 20, 0, 160), num_ring_messages=500, hidden_bytes=128, chunk_bytes=1),
    Case(num_tokens=(40, 41, 42, 43), num_ring_messages=16, dtype=torch.uint8, hidden_bytes=512, num_scales=4),
]


@pytest.mark.parametrize("order", [1, 2])
@pytest.mark.parametrize("case", WINDOWS, ids=lambda case: case.name)
def test_a_window_of_few_slots_carries_many_rows(case: Case, order: int) -> None:
    round_trips(replace(case, use_bulk=order == 1, has_stores=order == 2), order=order)


@pytest.mark.parametrize(
    ("num_sms", "num_warps", "num_stages", "num_send_warps", "num_forward_warps"),
    [(1, 1, 2, 1, 1), (7, 1, 2, 1, 1), (2, 2, 3, 2, 14), (1, 12, 2, 3, 0), (3, 1, 8, 14, 9)],
)
def test_any_number_of_warps_and_blocks_gives_the_same_bits(
    num_sms: int, num_warps: int, num_stages: int, num_send_warps: int, num_forward_warps: int
) -> None:
    tuning = {"num_warps": num_warps, "num_stages": num_stages, "num_send_warps": num_send_warps}
    case = Case(num_tokens=(30, 21, 7, 40), num_ring_messages=6, num_sms=num_sms, **TIGHT)
    round_trips(replace(case, tuning=tuple(tuning.items()), num_forward_warps=num_forward_warps))


@pytest.mark.parametrize("most", [1, 2])
@pytest.mark.parametrize("case", [WINDOWS[0], WINDOWS[3], GROUPS[2]], ids=lambda case: case.name)
def test_a_gpu_with_room_for_few_blocks_gets_on(case: Case, most: int) -> None:
    machine().set_resident(most)
    round_trips(replace(case, num_sms=5, use_bulk=most == 1), order=most)


def generated(seed: int) -> Case:
    draw = random.Random(seed)
    num_nodes, p = draw.choice([(2, 1), (2, 2), (3, 1), (4, 1), (3, 2), (2, 3), (4, 2), (2, 4)])
    n = num_nodes * p
    num_experts = n * draw.randint(1, 8)
    num_topk = draw.randint(1, min(num_experts, 12))
    most = draw.choice([2, 12, 40])
    is_fp8 = draw.random() < 0.4
    return Case(
        num_tokens=tuple(0 if draw.random() < 0.15 else draw.randint(0, most) for _ in range(n)),
        ranks_per_node=p,
        hidden_bytes=16 * draw.choice([1, draw.randint(1, 140), draw.randint(100, 200)]),
        dtype=torch.uint8 if is_fp8 else torch.bfloat16,
        num_scales=draw.randint(1, 40) if is_fp8 else 0,
        scales_layout=draw.choice(["row", "column", "sparse"]),
        num_topk=num_topk,
        num_experts=num_experts,
        routing=draw.choice(["random", "random", "some_unused", "to_rank_0", "other_nodes", "one_group", "bad"]),
        index_bits=draw.choice([32, 64]),
        alignment=draw.choice([1, 4, 128]),
        num_biases=draw.randint(0, 2),
        num_ring_messages=draw.choice([0, 2, 3, 7, 20, 60]),
        chunk_bytes=draw.choice([0, 0, 1, 3000]),
        num_sms=draw.choice([1, 2, 3, 6]),
        use_bulk=draw.random() < 0.7,
        num_forward_warps=draw.choice([0, 0, 1, 5, 14]),
        has_stores=draw.random() < 0.5,
        seed=seed,
    )


@pytest.mark.parametrize("seed", range(24))
def test_generated_shapes_agree_with_tensor_arithmetic(seed: int) -> None:
    round_trips(generated(seed), order=seed)


# --- without the host ------------------------------------------------------------------------------------------------


def launched_blindly(world: World, case: Case) -> list[Step]:
    """Layout to combine with worst-case sizes: nothing waits for a count."""
    ranks = make_ranks(case)
    worst = sum(case.num_tokens) + 3
    for r in ranks:
        r.send_nvl_head = poisoned((worst * case.ranks_per_node, 8), torch.int32)
    layout(world, case, ranks)
    notify(world, case, ranks, has_ticket=False)
    received = make_received(world, case, [worst] * case.num_ranks)
    dispatch(world, case, ranks, received, fill=True)
    return after_dispatch(world, case, ranks, received, [worst] * case.num_ranks)


BLIND = [
    Case(num_tokens=(12, 20, 0, 9)),
    Case(num_tokens=(12, 20, 0, 9), ranks_per_node=1, num_ring_messages=2, **TIGHT),
    Case(num_tokens=(6, 1, 0, 9, 7, 8), num_experts=24, routing="some_unused", use_bulk=False),
    Case(num_tokens=(10, 9, 3, 12), num_ring_messages=3, use_bulk=False, num_sms=2, **TIGHT),
]


@pytest.mark.parametrize("order", range(2))
@pytest.mark.parametrize("case", BLIND, ids=lambda case: case.name)
def test_calls_launched_one_after_the_other_do_not_disturb_each_other(case: Case, order: int) -> None:
    """Some ranks are whole operations ahead of others; late puts of one operation meet the next one."""
    case = replace(case, has_stores=order == 1)
    world = world_of(case, order=order)
    steps = []
    for _ in range(2):
        steps += launched_blindly(world, case)
        case = case.next()
    world.check()
    for step in steps:
        step.check()


@pytest.mark.parametrize("order", range(3))
@pytest.mark.parametrize(("ranks_per_node", "num_ring_messages"), [(1, 2), (2, 2), (1, 20)])
def test_dispatches_follow_one_another(ranks_per_node: int, num_ring_messages: int, order: int) -> None:
    """Nothing between them makes the ranks of different nodes wait for each other."""
    shape = {"ranks_per_node": ranks_per_node, "num_ring_messages": num_ring_messages}
    case = Case(num_tokens=(12, 0, 14, 5), num_sms=1, **shape, **TIGHT)
    world = world_of(case, order=order)
    ranks, received, rows = dispatched(world, case)
    steps = [Step(case, ranks, received=received)]
    steps += [cached(world, case, ranks, rows, seed=seed, is_unlisted=False) for seed in range(5)]
    world.check()
    for step in steps:
        step.check()


@pytest.mark.parametrize("order", range(3))
@pytest.mark.parametrize("ranks_per_node", [1, 2])
def test_combines_and_exchanges_of_counts_follow_one_another(ranks_per_node: int, order: int) -> None:
    case = Case(num_tokens=(12, 0, 14, 5), ranks_per_node=ranks_per_node, num_sms=1, num_ring_messages=20, **TIGHT)
    world = world_of(case, order=order)
    ranks, _, rows = dispatched(world, case)
    steps = [back(world, case, ranks, list(rows), seed=seed) for seed in range(5)]
    others = [make_ranks(replace(case, seed=seed)) for seed in range(4)]
    for other in others:
        layout(world, case, other)
    for other in others:
        notify(world, case, other, has_ticket=False)
    world.check()
    for step in steps:
        step.check()
    for other in others:
        check_routing(case, other)


@pytest.mark.parametrize("order", range(8))
def test_what_follows_on_a_stream_finds_rows_and_may_overwrite_expert_outputs(order: int) -> None:
    """Kernels that know of no other rank: here layout, which reads received rows as choices, and overwrites others."""
    case = Case(num_tokens=(12, 10, 14, 9), ranks_per_node=4 >> (order % 2 + 1), hidden_bytes=4096, num_sms=1)
    world = world_of(case, order=order)
    ranks = make_ranks(case)
    for rank, r in enumerate(ranks):
        g = torch.Generator().manual_seed(rank)
        r.x = torch.randint(0, case.num_experts, (r.x.shape[0], 512), generator=g).view(torch.bfloat16)
    layout(world, case, ranks)
    notify(world, case, ranks)
    world.check()
    rows, forwarded = row_counts(case, ranks)
    for r, count in zip(ranks, forwarded, strict=True):
        r.send_nvl_head = poisoned((count, 8), torch.int32)
    received = make_received(world, case, rows)
    combined = make_combined(world, case, list(rows))
    kept = [replace(c, y=c.y.clone()) for c in combined]
    seen = [torch.zeros(case.num_experts, dtype=torch.int32) for _ in ranks]
    dispatch(world, case, ranks, received)

    def follow(rank: int, num_topk: int, per_expert: torch.Tensor, in_rank: torch.Tensor) -> None:
        counts = poisoned((12,), torch.int32)
        world.launched.append(counts)
        world.runtimes[rank].layout(
            topk_idx=received[rank].x.data_ptr(),
            topk_idx_bits=64,
            num_tokens=rows[rank] * 512 // num_topk,
            num_topk=num_topk,
            num_experts=case.num_experts,
            num_tokens_per_rank=counts.data_ptr(),
            num_tokens_per_node=counts.data_ptr() + 16,
            num_tokens_per_expert=per_expert.data_ptr(),
            is_token_in_rank=in_rank.data_ptr(),
            num_bad_indices=0,
            stream=world.stream(rank),
        )

    scratch = [poisoned((count * 16 * 4,), torch.uint8) for count in rows]
    for rank in range(4):
        follow(rank, 32, seen[rank], scratch[rank])
    combine(world, case, ranks, combined)
    unused = poisoned((case.num_experts,), torch.int32)
    for rank in range(4):
        follow(rank, 1, unused, combined[rank].y)  # rows * 512 * 4 bytes: half of them
    world.check()
    check_dispatch(case, ranks, received)
    for rank, out in enumerate(received):
        expected = torch.bincount(out.x.view(torch.int64).flatten(), minlength=case.num_experts)
        assert seen[rank].tolist() == expected.tolist(), f"rank {rank} went on before its rows had come"
    check_combine(case, ranks, kept)


def test_worst_case_sizes_mark_unused_rows() -> None:
    case = Case(num_tokens=(12, 20, 0, 9))
    world = world_of(case)
    fresh = launched_blindly(world, case)[0]
    world.check()
    rows, forwarded = row_counts(case, fresh.ranks)
    for rank, (r, out) in enumerate(zip(fresh.ranks, fresh.received, strict=True)):
        assert (out.topk_idx[rows[rank] :] == -1).all() and (out.topk_weights[rows[rank] :] == 0).all()
        assert (out.src_meta[rows[rank] :] == -1).all() and (r.send_nvl_head[forwarded[rank] :] == -1).all()


def test_many_rounds_give_the_same_bytes() -> None:
    """The same dispatch and combine again and again, every rank at its own pace."""
    case = Case(num_tokens=(9, 0, 14, 5), num_ring_messages=2, num_sms=2, **TIGHT)
    world = world_of(case, order=11)
    ranks, received, rows = dispatched(world, case)
    combined = make_combined(world, case, received)
    for _ in range(5):
        combine(world, case, ranks, combined)
        dispatch(world, case, ranks, received)
    combine(world, case, ranks, combined)
    world.check()
    check_dispatch(case, ranks, received)
    check_combine(case, ranks, combined)
    assert rows == [len(out.x) for out in received]


# --- errors ---------------------------------------------------------------------------------------------------------

MISSING = Case(num_tokens=(8, 7, 7, 6), num_sms=1, num_ring_messages=8, **TIGHT)


def errors_of(world: World) -> list[Any]:
    world.sync()
    return [runtime.error() for runtime in world.runtimes]


def recovers(world: World, case: Case) -> None:
    world.members = range(world.num_ranks)
    world.reset()
    world.used = [world.window_bytes] * world.num_ranks
    ranks, received, rows = dispatched(world, case)
    steps = after_dispatch(world, case, ranks, received, rows)
    world.check()
    for step in steps:
        step.check()


@pytest.mark.parametrize("missing", [0, 3])
def test_a_rank_that_sends_no_counts_is_named(missing: int) -> None:
    world = world_of(MISSING)
    ranks = make_ranks(MISSING)
    layout(world, MISSING, ranks)
    world.members = [rank for rank in range(4) if rank != missing]
    notify(world, MISSING, ranks)
    errors = errors_of(world)
    for rank in world.members:
        error = errors[rank]
        assert (error.kind, error.op, error.phase, error.rank, error.peer) == (
            "timeout",
            "notify",
            "header",
            rank,
            missing,
        )
        assert world.runtimes[rank].wait_counts(world.ticket, 1.0).mismatch_mask == 1 << missing
    recovers(world, MISSING)


@pytest.mark.parametrize(
    ("ranks_per_node", "operation", "missing", "use_bulk"),
    [
        (1, "dispatch", 0, True),
        (1, "dispatch", 3, False),
        (2, "dispatch", 3, True),
        (2, "dispatch", 1, False),
        (1, "combine", 0, True),
        (1, "combine", 2, True),
        (2, "combine", 0, True),
        (2, "combine", 3, True),
    ],
)
def test_a_rank_that_leaves_out_a_call_is_named(
    ranks_per_node: int, operation: str, missing: int, use_bulk: bool
) -> None:
    case = replace(MISSING, ranks_per_node=ranks_per_node, use_bulk=use_bulk)
    world = world_of(case)
    ranks, received, rows = dispatched(world, case)
    world.check()
    world.members = [rank for rank in range(4) if rank != missing]
    if operation == "dispatch":
        dispatch(world, case, ranks, received, is_cached=True)
    else:
        back(world, case, ranks, list(rows))
    errors = errors_of(world)
    assert errors[missing] is None
    for rank in world.members:
        assert errors[rank] is not None and errors[rank].op == operation and errors[rank].rank == rank
        assert errors[rank].kind in ("timeout", "peer_failed")
    # Whoever waits for that rank itself says so; others may wait for a rank that waits.
    assert any(e is not None and e.kind == "timeout" and e.peer == missing for e in errors)
    recovers(world, case)


def test_a_combine_of_few_slots_names_a_rank_that_others_wait_for() -> None:
    case = replace(MISSING, num_ring_messages=2)
    for order in range(3):
        world = world_of(case, order=order)
        ranks, _, rows = dispatched(world, case)
        world.check()
        world.members = [1, 2, 3]
        back(world, case, ranks, list(rows))
        errors = errors_of(world)
        assert all(errors[rank].peer != rank for rank in world.members)
        assert any(errors[rank].peer == 0 for rank in world.members)


def test_a_dispatch_of_many_slots_names_the_missing_rank() -> None:
    case = Case(num_tokens=(8, 7, 7, 6), ranks_per_node=1, num_sms=1, use_bulk=False)
    world = world_of(case)
    ranks, received, _ = dispatched(world, case)
    world.check()
    world.members = [1, 2, 3]
    dispatch(world, case, ranks, received, is_cached=True)
    errors = errors_of(world)
    assert [errors[rank].peer for rank in world.members] == [0, 0, 0]


def test_an_abort_ends_a_wait_on_another_node() -> None:
    world = world_of(MISSING)
    ranks, received, _ = dispatched(world, MISSING)
    world.check()
    world.members = [0, 1]
    for rank in world.members:
        world.runtimes[rank].set_timeout_ns(10**15)
        world.runtimes[rank].abort()
    dispatch(world, MISSING, ranks, received)
    errors = errors_of(world)
    assert all(errors[rank].kind in ("aborted", "peer_failed") for rank in (0, 1)) and errors[0].op == "dispatch"
    recovers(world, MISSING)


def test_a_refusing_rank_is_seen_by_all() -> None:
    world = world_of(MISSING)
    ranks = make_ranks(MISSING)
    layout(world, MISSING, ranks)
    world.members = [0, 1, 2]
    notify(world, MISSING, ranks)
    world.runtimes[3].refuse(fields=[], num_experts=0, reason=42, ticket=world.ticket, stream=world.stream(3))
    world.sync()
    for rank in range(3):
        counts = world.runtimes[rank].wait_counts(world.ticket, 1.0)
        assert counts.mismatch_mask == 8 and counts.headers[3][0] == 1 and counts.headers[3][3] == 42
    recovers(world, MISSING)


@pytest.mark.parametrize("use_bulk", [True, False], ids=["bulk", "plain"])
def test_too_small_a_capacity_is_reported_and_writes_nothing_beyond_it(use_bulk: bool) -> None:
    case = Case(num_tokens=(30, 20, 10, 25), use_bulk=use_bulk)
    world = world_of(case)
    ranks = make_ranks(case)
    for r in ranks:
        r.send_nvl_head = poisoned((400, 8), torch.int32)
    layout(world, case, ranks)
    notify(world, case, ranks, has_ticket=False)
    received = make_received(world, case, [20] * 4)
    guards = [world.tensor(rank, (1 << 18,), torch.uint8) for rank in range(4)]
    dispatch(world, case, ranks, received, fill=True)
    errors = errors_of(world)
    assert any(error is not None and error.kind == "overflow" for error in errors)
    assert all((guard == 0xFF).all() for guard in guards)
    recovers(world, case)


def test_counts_for_which_there_is_no_room_are_declined() -> None:
    case = Case(num_tokens=(30, 20, 10, 25))
    world = world_of(case)
    ranks = make_ranks(case)
    layout(world, case, ranks)
    notify(world, case, ranks)
    world.check()
    rows, forwarded = row_counts(case, ranks)
    how = {"ticket": world.ticket, "timeout_s": 1.0}
    for short in (0, 1):
        for r, count in zip(ranks, forwarded, strict=True):
            r.send_nvl_head = poisoned((count - short, 8), torch.int32)
        small = make_received(world, case, [count - 1 + short for count in rows])
        assert dispatch(world, case, ranks, small, least_rows=0, **how) == [False] * 4
    exact = make_received(world, case, rows)
    for r, count in zip(ranks, forwarded, strict=True):
        r.send_nvl_head = poisoned((count, 8), torch.int32)
    assert dispatch(world, case, ranks, exact, least_rows=max(rows) + 1, **how) == [False] * 4
    assert dispatch(world, case, ranks, exact, least_rows=0, **how) == [True] * 4
    world.check()
    check_dispatch(case, ranks, exact)


def test_a_routing_that_contradicts_its_counts_is_reported() -> None:
    case = Case(num_tokens=(30, 20, 10, 25))
    world = world_of(case)
    ranks = make_ranks(case)
    layout(world, case, ranks)
    world.check()
    ranks[2].layout["is_token_in_rank"][3:7] = 1
    notify(world, case, ranks)
    errors = errors_of(world)
    assert errors[2].kind == "layout_mismatch" and errors[2].op == "notify"
    recovers(world, case)


def test_the_smallest_ring_is_that_of_two_messages() -> None:
    case = Case(num_tokens=(6, 7, 8, 9), num_ring_messages=2, **TIGHT)
    assert case.ring_bytes > LEAST_RING_BYTES
    machine().seed(1)
    world = World(4, 2, ring_bytes=case.ring_bytes - 128, max_local_experts=4)
    WORLDS.append(world)
    ranks = make_ranks(case)
    with pytest.raises(Exception, match="two messages have to fit"):
        dispatch(world, case, ranks, make_received(world, case, [1] * 4))
