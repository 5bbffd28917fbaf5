"""The kernels against plain tensor arithmetic, bit for bit, on 1, 2 and 4 GPUs (or all ranks on one, or emulated)."""

from __future__ import annotations

import random
import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest

torch = pytest.importorskip("torch")
sys.path.insert(0, str(Path(__file__).resolve().parent))
from low_latency_oracle import check_combine, check_dispatch  # noqa: E402
from low_latency_world import (  # noqa: E402
    CASTS,
    EMULATED,
    RECEIVE,
    SEND,
    SHARED_GPUS,
    Case,
    World,
    combine,
    dispatch,
    emulator,
    machine,
    make_combining,
    make_inputs,
    make_received,
)

if obstacle := emulator.obstacle_to("_ibgda", "deepep_ibgda"):
    pytest.skip(obstacle, allow_module_level=True)
NUM_GPUS = torch.cuda.device_count()
AVAILABLE = 8 if EMULATED else 4 if SHARED_GPUS else NUM_GPUS
# Up to four ranks that share GPUs have to fit on them side by side.
MOST_SMS = 5 if EMULATED else min(128, 32 * NUM_GPUS) if SHARED_GPUS else 128
ARENA_BYTES = (64 if EMULATED else 512) << 20
WORLDS: dict[tuple[int, str, bool, int], World] = {}


@pytest.fixture(scope="module", autouse=True)
def _worlds_end_with_the_module() -> Iterator[None]:
    yield
    for world in WORLDS.values():
        world.close()
    WORLDS.clear()


def world_of(num_ranks: int, ll_reduce: str = "rank", *, enable_shrink: bool = False, ranks_per_node: int = 0) -> World:
    if num_ranks > AVAILABLE:
        pytest.skip(f"needs {num_ranks} GPUs, found {AVAILABLE}")
    key = (num_ranks, ll_reduce, enable_shrink, ranks_per_node)
    if key not in WORLDS:
        WORLDS[key] = World(
            num_ranks, ARENA_BYTES, ll_reduce=ll_reduce, enable_shrink=enable_shrink, ranks_per_node=ranks_per_node
        )
    if WORLDS[key].errors():  # of the test before
        WORLDS[key].reset()
    return WORLDS[key]


def round_trip(world: World, case: Case) -> None:
    case = replace(case, num_sms=min(case.num_sms, MOST_SMS))
    inputs, received, combining = make_inputs(world, case), make_received(world, case), make_combining(world, case)
    world.sync()
    dispatch(world, case, inputs, received)
    combine(world, case, inputs, received, combining)
    world.check()
    check_dispatch(case, inputs, received)
    check_combine(case, inputs, combining, world.ll_reduce)


SHAPES = [
    Case(num_tokens=(1,)),
    Case(num_tokens=(5,), cast="bf16", num_topk=1, num_experts=1, hidden=8),
    Case(num_tokens=(40,), num_topk=8, num_experts=32, cast="ue8m0", hidden=512),
    Case(num_tokens=(3, 2)),
    Case(num_tokens=(16, 0), cast="bf16", hidden=264),
    Case(num_tokens=(0, 0)),
    Case(num_tokens=(64, 33), max_tokens=100, num_topk=8, num_experts=64, cast="fp8_round", index_bits=32, num_sms=16),
    Case(num_tokens=(17, 31), num_topk=2, num_experts=4, cast="ue8m0", hidden=1536, num_sms=1),
    Case(num_tokens=(9, 8), routing="repeated", num_topk=6),
    Case(num_tokens=(9, 8), routing="repeated", num_topk=6, cast="bf16", with_weights=True),
    Case(num_tokens=(12, 12), routing="none"),
    Case(num_tokens=(12, 7), routing="to_rank_0", cast="bf16"),
    Case(num_tokens=(20, 20), specials=True),
    Case(num_tokens=(20, 20), specials=True, cast="bf16", hidden=2048),
    Case(num_tokens=(6, 5), specials=True, cast="bf16", hidden=16384, num_sms=4),
    Case(num_tokens=(6, 5), hidden=16384, with_weights=True, num_sms=4),
    Case(num_tokens=(50, 60), num_topk=32, num_experts=64, with_weights=True),
    Case(num_tokens=(8, 8, 8, 8), num_topk=8, num_experts=288, hidden=7168, num_sms=128),
    Case(num_tokens=(8, 8, 8, 8), num_topk=8, num_experts=288, hidden=7168, num_sms=24, cast="bf16", padding=64),
    Case(
        num_tokens=(128, 127, 1, 0),
        max_tokens=128,
        num_topk=8,
        num_experts=256,
        hidden=2048,
        with_stats=True,
        num_sms=32,
    ),
    Case(num_tokens=(30, 10, 20, 25), max_tokens=64, routing="some_unused", with_weights=True, cast="bf16", num_sms=3),
    Case(num_tokens=(600, 600), num_topk=8, num_experts=16, hidden=128, num_sms=16),
    # Enough tokens and blocks that blocks either send or receive; where a rank has few tokens, its blocks do both.
    Case(num_tokens=(128, 100, 66, 3), num_topk=8, num_experts=64, hidden=1024, num_sms=128),
    Case(num_tokens=(128, 127, 90, 70), routing="repeated", num_topk=6, cast="bf16", with_weights=True, num_sms=96),
    Case(num_tokens=(128, 90, 128), num_topk=4, num_experts=18, cast="ue8m0", hidden=1536, with_stats=True, num_sms=96),
    Case(num_tokens=(128, 90, 70, 0), use_logfmt=True, hidden=2048, num_topk=8, num_experts=64, num_sms=128),
    Case(num_tokens=(260, 200, 250, 259), num_topk=8, num_experts=32, hidden=512, num_sms=128),
    # Of these one rank sends nearly all rows, and pieces of rows are drawn in parts that do not fill a warp.
    Case(
        num_tokens=(50, 64, 48, 60), routing="uneven", num_topk=8, num_experts=64, hidden=776, cast="bf16", num_sms=96
    ),
    Case(
        num_tokens=(50, 49, 60),
        routing="uneven",
        num_topk=6,
        num_experts=24,
        hidden=1280,
        with_weights=True,
        num_sms=96,
    ),
    Case(num_tokens=(60, 50, 64, 48), routing="to_rank_0", num_experts=32, hidden=1536, num_sms=96),
    Case(num_tokens=(20,), use_logfmt=True, num_topk=8),
    Case(num_tokens=(20, 19), use_logfmt=True, routing="repeated", cast="bf16"),
    Case(num_tokens=(9, 8, 30, 0), use_logfmt=True, hidden=7168, num_topk=8, num_experts=64, with_weights=True),
    # Rows in more pieces than there are blocks: a warp holds several of one row.
    Case(num_tokens=(1, 0), max_tokens=30, num_topk=2, num_experts=8, hidden=7168, num_sms=1),
    Case(num_tokens=(1, 0, 2), max_tokens=9, num_topk=3, num_experts=9, hidden=7168, num_sms=3, use_logfmt=True),
]


@pytest.mark.parametrize("ll_reduce", ["rank", "expert"])
@pytest.mark.parametrize("case", SHAPES, ids=lambda case: case.name)
def test_a_round_trip_equals_plain_arithmetic(case: Case, ll_reduce: str) -> None:
    world = world_of(case.num_ranks, ll_reduce)
    is_long = EMULATED and sum(case.num_tokens) * case.num_topk * case.hidden * (1 + 2 * case.use_logfmt) > 1 << 20
    for _ in range(1 if is_long else 4):  # once more than there are slots
        round_trip(world, case)
        case = case.next()


def generated(seed: int) -> Case:
    draw = random.Random(seed)
    num_ranks = draw.choice([n for n in (1, 2, 3, 4, 5, 8) if n <= AVAILABLE])
    cast = draw.choice(CASTS)
    unit = {"bf16": 8, "ue8m0": 512}.get(cast, 128)
    use_logfmt = draw.random() < 0.2
    if use_logfmt:
        unit = max(unit, 128)
    most = draw.choice([1, 3, 9, 24])
    routing = draw.choice(["random", "random", "some_unused", "none", "to_rank_0", "repeated"])
    num_experts = num_ranks * draw.choice([1, 2, 5, 8])
    return Case(
        num_tokens=tuple(draw.choice([0, most, draw.randint(0, most)]) for _ in range(num_ranks)),
        max_tokens=most + draw.choice([0, 0, 7]),
        hidden=unit * draw.randint(1, max(1, draw.choice([300, 1000, 2600]) // unit)),
        num_topk=draw.randint(1, min(32 if routing == "random" else 8, num_experts)),
        num_experts=num_experts,
        cast=cast,
        routing=routing,
        with_weights=draw.random() < 0.4,
        specials=draw.random() < 0.2,
        use_logfmt=use_logfmt,
        index_bits=draw.choice([32, 64]),
        num_sms=draw.choice([1, 2, 3, 4, 5, 24]),
        with_stats=draw.random() < 0.2,
        padding=draw.choice([0, 0, 64]),
        seed=seed,
    )


@pytest.mark.parametrize("seed", range(60))
def test_a_generated_shape_equals_plain_arithmetic(seed: int) -> None:
    case = generated(seed)
    if EMULATED:
        machine().seed(seed)
    world = world_of(case.num_ranks, ("rank", "expert")[seed % 2])
    for _ in range(2):
        round_trip(world, case)
        case = case.next()


@pytest.mark.parametrize("ll_reduce", ["rank", "expert"])
@pytest.mark.parametrize(("num_ranks", "ranks_per_node"), [(2, 1), (4, 2), (4, 1)], ids=lambda number: str(number))
def test_ranks_of_other_nodes_are_reached_by_work_requests(num_ranks: int, ranks_per_node: int, ll_reduce: str) -> None:
    world = world_of(num_ranks, ll_reduce, ranks_per_node=ranks_per_node)
    before = [nic.counters()["writes"] for nic in world.nics]
    for seed, cast in enumerate(CASTS * 2):
        case = Case(
            num_tokens=tuple(3 + 4 * rank for rank in range(num_ranks)),
            max_tokens=20,
            cast=cast,
            num_experts=4 * num_ranks,
            routing=("random", "some_unused", "repeated")[seed % 3],
            with_weights=seed % 2 == 0,
            use_logfmt=seed == 5,
            num_sms=(4, 1, 16)[seed % 3],
            seed=seed,
        )
        round_trip(world, case)
    assert all(nic.counters()["writes"] > count for nic, count in zip(world.nics, before, strict=True))


@pytest.mark.parametrize("num_ranks", [1, 2, 4])
@pytest.mark.parametrize("cast", CASTS)
def test_calls_of_different_shapes_follow_each_other(num_ranks: int, cast: str) -> None:
    world = world_of(num_ranks)
    for i in range(12):
        tokens = tuple((7 * i + 5 * rank) % 40 for rank in range(num_ranks))
        hidden = (512, 1536, 3072)[i % 3]
        round_trip(
            world,
            Case(
                num_tokens=tokens,
                max_tokens=40 + 8 * (i % 2),
                hidden=hidden,
                cast=CASTS[(i + CASTS.index(cast)) % 4],
                num_experts=num_ranks * (4 + i % 5),
                num_topk=1 + i % 4,
                with_weights=i % 2 == 0,
                num_sms=1 + 5 * (i % 4),
                seed=i,
            ),
        )


@pytest.mark.parametrize("reverse", [False, True], ids=["in_order", "reversed"])
@pytest.mark.parametrize("num_ranks", [1, 2, 4])
@pytest.mark.parametrize("ll_reduce", ["rank", "expert"])
def test_two_operations_in_flight(num_ranks: int, reverse: bool, ll_reduce: str) -> None:
    world = world_of(num_ranks, ll_reduce)
    for start in range(0, 8, 2):
        cases = [
            Case(
                num_tokens=(20 - i,) * num_ranks,
                max_tokens=24,
                cast=CASTS[i],
                num_experts=4 * num_ranks,
                seed=start + i,
            )
            for i in range(2)
        ]
        inputs = [make_inputs(world, case) for case in cases]
        received = [make_received(world, case) for case in cases]
        combining = [make_combining(world, case) for case in cases]
        world.sync()
        order = [1, 0] if reverse else [0, 1]
        for i in range(2):
            dispatch(world, cases[i], inputs[i], received[i], SEND)
        for i in order:
            dispatch(world, cases[i], inputs[i], received[i], RECEIVE)
        for i in range(2):
            combine(world, cases[i], inputs[i], received[i], combining[i], SEND)
        for i in order:
            combine(world, cases[i], inputs[i], received[i], combining[i], RECEIVE)
        world.check()
        for i in range(2):
            check_dispatch(cases[i], inputs[i], received[i])
            check_combine(cases[i], inputs[i], combining[i], ll_reduce)


def test_an_operation_held_open_while_others_run() -> None:
    world = world_of(2)
    case = Case(num_tokens=(20, 21))
    inputs, received, combining = make_inputs(world, case), make_received(world, case), make_combining(world, case)
    world.sync()
    dispatch(world, case, inputs, received, SEND)
    for seed in range(2):
        round_trip(world, Case(num_tokens=(9, 30), cast="bf16", seed=10 + seed))
    dispatch(world, case, inputs, received, RECEIVE)
    combine(world, case, inputs, received, combining)
    world.check()
    check_dispatch(case, inputs, received)
    check_combine(case, inputs, combining, "rank")


@pytest.mark.parametrize("with_weights", [False, True])
def test_a_handle_is_combined_repeatedly_and_after_later_dispatches(with_weights: bool) -> None:
    world = world_of(2)
    case = Case(num_tokens=(20, 21), with_weights=with_weights)
    inputs, received = make_inputs(world, case), make_received(world, case)
    world.sync()
    dispatch(world, case, inputs, received)
    for seed in range(5):
        other = Case(num_tokens=(11, 12), cast="bf16", seed=50 + seed)
        dispatch(world, other, make_inputs(world, other), make_received(world, other))
        combining = make_combining(world, replace(case, seed=seed))
        world.sync()
        combine(world, case, inputs, received, combining)
        world.check()
        check_combine(case, inputs, combining, "rank")


def test_dropped_operations_leave_nothing_behind() -> None:
    world = world_of(2)
    case = Case(num_tokens=(20, 21))
    for _ in range(7):
        inputs, received, combining = make_inputs(world, case), make_received(world, case), make_combining(world, case)
        world.sync()
        dispatch(world, case, inputs, received, SEND)
        dispatch(world, case, inputs, received, RECEIVE, discard=True)
        assert bool((received[0].x.view(torch.uint8) == 0xFF).all())
        dispatch(world, case, inputs, received)
        combine(world, case, inputs, received, combining, SEND)
        combine(world, case, inputs, received, combining, RECEIVE, discard=True)
        round_trip(world, case)
        case = case.next()


@pytest.mark.skipif(EMULATED, reason="graphs are recorded on GPUs only")
@pytest.mark.parametrize("num_ranks", [1, 2, 4])
def test_a_graph_replays(num_ranks: int) -> None:
    world = world_of(num_ranks)
    case = Case(num_tokens=(33,) * num_ranks, num_experts=8 * num_ranks, cast="bf16")
    inputs, received, combining = make_inputs(world, case), make_received(world, case), make_combining(world, case)
    world.sync()
    graphs = [torch.cuda.CUDAGraph() for _ in range(num_ranks)]
    for rank, graph in enumerate(graphs):
        world.only = rank
        with (
            torch.cuda.device(world.devices[rank]),
            torch.cuda.graph(graph, stream=world.streams[rank], capture_error_mode="thread_local"),
        ):
            for _ in range(2):
                dispatch(world, case, inputs, received)
                combine(world, case, inputs, received, combining)
    world.only = None
    for seed in range(20):
        fresh = make_inputs(world, replace(case, seed=100 + seed))
        for old, new in zip(inputs, fresh, strict=True):
            old.x.copy_(new.x)
            old.topk_idx.copy_(new.topk_idx)
            old.topk_weights.copy_(new.topk_weights)
        for r in received:
            r.x.view(torch.uint8).fill_(0xFF)
            r.handle.fill_(-1)
        world.sync()
        for rank, graph in enumerate(graphs):
            with torch.cuda.device(world.devices[rank]), torch.cuda.stream(world.streams[rank]):
                graph.replay()
        world.check()
        check_dispatch(case, inputs, received)
        check_combine(case, inputs, combining, "rank")
        round_trip(world, Case(num_tokens=(5,) * num_ranks, num_experts=8 * num_ranks, seed=seed))


@pytest.mark.skipif(SHARED_GPUS, reason="ranks that share GPUs have long deadlines")
def test_a_silent_peer_is_named_and_reset_repairs() -> None:
    world = World(2, 64 << 20, timeout_s=0.2) if AVAILABLE >= 2 else pytest.skip(f"needs 2 GPUs, found {AVAILABLE}")
    case = Case(num_tokens=(20, 21))
    inputs, received = make_inputs(world, case), make_received(world, case)
    world.sync()
    dispatch(world, case, inputs, received, ranks=[0])
    world.sync()
    error = world.runtimes[0].error()
    assert error is not None and (error.kind, error.op, error.peer) == ("timeout", "dispatch", 1), world.errors()
    assert 0.15e9 < error.elapsed_ns < 1e9
    world.reset()
    for _ in range(4):
        round_trip(world, case)
    world.close()


@pytest.mark.skipif(SHARED_GPUS, reason="ranks that share GPUs have long deadlines")
def test_an_abort_ends_a_wait() -> None:
    world = World(2, 64 << 20, timeout_s=30) if AVAILABLE >= 2 else pytest.skip(f"needs 2 GPUs, found {AVAILABLE}")
    case = Case(num_tokens=(20, 21))
    inputs, received = make_inputs(world, case), make_received(world, case)
    world.sync()
    dispatch(world, case, inputs, received, ranks=[0])
    world.runtimes[0].abort()
    world.sync()
    error = world.runtimes[0].error()
    assert error is not None and error.kind == "aborted", world.errors()
    world.close()


@pytest.mark.skipif(SHARED_GPUS, reason="ranks that share GPUs have long deadlines")
def test_a_peer_that_is_silent_in_combine_is_named_and_reset_repairs() -> None:
    world = World(4, 64 << 20, timeout_s=0.2) if AVAILABLE >= 4 else pytest.skip(f"needs 4 GPUs, found {AVAILABLE}")
    case = Case(num_tokens=(48, 50, 52, 49), hidden=128, num_sms=min(MOST_SMS, 96))  # blocks either send or receive
    inputs, received, combining = make_inputs(world, case), make_received(world, case), make_combining(world, case)
    world.sync()
    dispatch(world, case, inputs, received)
    world.check()
    combine(world, case, inputs, received, combining, ranks=[0, 1, 3])
    world.sync()
    for rank in (0, 1, 3):
        error = world.runtimes[rank].error()
        assert error is not None and (error.kind, error.op, error.peer) == ("timeout", "combine", 2), world.errors()
    world.reset()
    for _ in range(2):
        round_trip(world, case)
    world.close()


def test_ranks_that_disagree_are_told() -> None:
    world = world_of(2)
    cases = [Case(num_tokens=(20, 21)), Case(num_tokens=(20, 21), hidden=2048)]
    for rank, case in enumerate(cases):
        dispatch(world, case, make_inputs(world, case), make_received(world, case), ranks=[rank])
    world.sync()
    for rank in range(2):
        error = world.runtimes[rank].error()
        assert error is not None and (error.kind, error.peer) == ("mismatch", 1 - rank), world.errors()
    world.reset()
    round_trip(world, cases[0])


def test_masked_ranks_are_left_out_and_come_back() -> None:
    world = world_of(4, enable_shrink=True)
    case = Case(num_tokens=(20, 21, 8, 9))
    round_trip(world, case)
    for lost in (2, 0):
        others = [rank for rank in range(4) if rank != lost]
        for rank in others:
            world.runtimes[rank].update_mask(lost, True, stream=world.streams[rank].cuda_stream)
        for seed in range(5):
            one = replace(case, seed=seed)
            inputs, received, combining = make_inputs(world, one), make_received(world, one), make_combining(world, one)
            world.sync()
            dispatch(world, one, inputs, received, ranks=others)
            combine(world, one, inputs, received, combining, ranks=others)
            world.check()
            check_dispatch(one, inputs, received, left_out=frozenset([lost]))
            check_combine(one, inputs, combining, "rank", left_out=frozenset([lost]))
        for rank in others:
            world.runtimes[rank].clean_mask(stream=world.streams[rank].cuda_stream)
        for _ in range(4):
            case = case.next()
            round_trip(world, case)


@pytest.mark.skipif(SHARED_GPUS, reason="ranks that share GPUs have long deadlines")
def test_a_silent_peer_is_masked_and_the_others_go_on() -> None:
    if AVAILABLE < 4:
        pytest.skip(f"needs 4 GPUs, found {AVAILABLE}")
    world = World(4, 64 << 20, enable_shrink=True, timeout_s=0.2)
    case = Case(num_tokens=(20, 21, 8, 9))
    round_trip(world, case)
    lost, others = 1, [0, 2, 3]
    for seed in range(6):
        one = replace(case, seed=seed)
        inputs, received, combining = make_inputs(world, one), make_received(world, one), make_combining(world, one)
        world.sync()
        dispatch(world, one, inputs, received, ranks=others)
        combine(world, one, inputs, received, combining, ranks=others)
        world.check()
        check_dispatch(one, inputs, received, left_out=frozenset([lost]))
        check_combine(one, inputs, combining, "rank", left_out=frozenset([lost]))
    mask = torch.zeros(4, dtype=torch.int32, device=world.device(0))
    world.sync()
    world.runtimes[0].query_mask(mask.data_ptr(), stream=world.streams[0].cuda_stream)
    world.sync()
    assert mask.tolist() == [0, 1, 0, 0]
    world.close()
