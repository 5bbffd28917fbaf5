"""The kernels against plain tensor arithmetic, on as many GPUs as a case has ranks.

With DEEPEP_TEST_SHARED_GPUS=1 ranks may share a GPU, side by side on streams of their own; with DEEPEP_EMULATED=1
there is no GPU at all (tests/emulator), as on a machine without any.
"""

from __future__ import annotations

import dataclasses
import os
import sys
from collections.abc import Iterator
from functools import partial
from pathlib import Path

import pytest

torch = pytest.importorskip("torch")
sys.path.insert(0, str(Path(__file__).resolve().parent))
from world import (  # noqa: E402
    EMULATED,
    Case,
    Rank,
    World,
    allocate,
    combine,
    dispatch,
    emulator,
    layout,
    machine,
    make_back,
    make_rank,
    notify,
)

if obstacle := emulator.obstacle_to("_nvlink", "deepep_nvshmem"):
    pytest.skip(obstacle, allow_module_level=True)
_worlds: dict[tuple[int, int, bool], World] = {}
SHARED_GPUS = os.environ.get("DEEPEP_TEST_SHARED_GPUS") == "1"


@pytest.fixture(scope="module", autouse=True)
def _worlds_end_with_the_module() -> Iterator[None]:
    yield
    _worlds.clear()


def world_of(num_ranks: int, staging_bytes: int = 64 << 20, symmetric: bool = False) -> World:
    num_gpus = torch.cuda.device_count()
    if num_gpus < num_ranks and not SHARED_GPUS and not EMULATED:
        pytest.skip(f"needs {num_ranks} GPUs, found {num_gpus}; with DEEPEP_TEST_SHARED_GPUS=1 ranks share them")
    key = (num_ranks, staging_bytes, symmetric)
    if key not in _worlds:
        devices = [rank % num_gpus for rank in range(num_ranks)] if SHARED_GPUS else None
        arena_bytes = 512 << 20 if EMULATED else 3 << 30
        _worlds[key] = World(num_ranks, arena_bytes, staging_bytes=staging_bytes, symmetric=symmetric, devices=devices)
    _worlds[key].release()
    return _worlds[key]


def first_difference(name: str, rank: int, got: torch.Tensor, want: torch.Tensor) -> None:
    assert got.shape == want.shape, f"{name} on rank {rank}: shape {tuple(got.shape)}, expected {tuple(want.shape)}"
    got_bytes, want_bytes = got.contiguous().view(torch.uint8), want.contiguous().view(torch.uint8)
    if not torch.equal(got_bytes, want_bytes):
        at = (got_bytes != want_bytes).nonzero()
        first = tuple(at[0])
        raise AssertionError(
            f"{name} on rank {rank}: {len(at)} bytes differ, first at {at[0].tolist()}: "
            f"got {got_bytes[first]}, expected {want_bytes[first]}"
        )


def routes(case: Case, ranks: list[Rank]) -> list[torch.Tensor]:
    """``[T, N]`` bool on the CPU: which token goes to which rank."""
    per_rank = case.num_experts // case.num_ranks
    result = []
    for r in ranks:
        idx = r.topk_idx.long().cpu()
        good = (idx >= 0) & (idx < case.num_experts)
        result.append(torch.stack([(good & (idx // per_rank == n)).any(dim=1) for n in range(case.num_ranks)], dim=1))
    return result


def check_layout(case: Case, ranks: list[Rank]) -> None:
    for rank, (r, goes) in enumerate(zip(ranks, routes(case, ranks), strict=True)):
        idx = r.topk_idx.long().cpu()
        good = (idx >= 0) & (idx < case.num_experts)
        first_difference("is_token_in_rank", rank, r.is_token_in_rank.cpu(), goes)
        first_difference("num_tokens_per_rank", rank, r.num_tokens_per_rank.cpu(), goes.sum(0).int())
        first_difference(
            "num_tokens_per_expert",
            rank,
            r.num_tokens_per_expert.cpu(),
            torch.bincount(idx[good], minlength=case.num_experts).int(),
        )
        assert r.bad.item() == ((idx != -1) & ~good).sum()


def gather_rows(ranks: list[Rank], pick: list[torch.Tensor], device: torch.device, name: str) -> torch.Tensor:
    """The picked rows of one input of every rank, source after source."""
    found = [getattr(s, name)[p.to(s.x.device)].to(device) for s, p in zip(ranks, pick, strict=True)]
    return torch.cat(found)


def check_dispatch(case: Case, ranks: list[Rank], *, cached: bool = False) -> list[int]:
    """Every output against gathers in source order; returns rows per rank."""
    goes = routes(case, ranks)
    per_rank = case.num_experts // case.num_ranks
    counts = torch.stack([g.sum(0) for g in goes])
    prefix = counts.cumsum(0).int()
    for rank, r in enumerate(ranks):
        first_difference("rank_prefix", rank, r.rank_prefix.cpu(), prefix)
        base = prefix[rank - 1] if rank else torch.zeros_like(prefix[0])
        head = torch.where(goes[rank], goes[rank].long().cumsum(0) - 1 + base, -1).int()
        first_difference("send_head", rank, r.send_head.cpu(), head)
        rows = int(prefix[-1, rank])
        device = r.x.device
        pick = [g[:, rank].nonzero().flatten() for g in goes]
        gather = partial(gather_rows, ranks, pick, device)
        first_difference("recv_x", rank, r.seen["x"][:rows], gather("x"))
        if case.num_scales:
            first_difference("recv_scales", rank, r.seen["scales"][:rows], gather("scales"))
        if cached:
            continue
        idx = gather("topk_idx").long()
        local = torch.where((idx >= rank * per_rank) & (idx < (rank + 1) * per_rank), idx - rank * per_rank, -1)
        first_difference("recv_topk_idx", rank, r.seen["topk_idx"][:rows], local)
        first_difference(
            "recv_topk_weights",
            rank,
            r.seen["topk_weights"][:rows],
            torch.where(local < 0, 0.0, gather("topk_weights")),
        )
        first_difference("recv_src_idx", rank, r.seen["src_idx"][:rows].cpu(), torch.cat(pick).int())
        per_expert = torch.bincount(local[local >= 0].flatten().cpu(), minlength=per_rank)
        first_difference(
            "expert_counts", rank, r.expert_counts.cpu(), (-(-per_expert // case.alignment) * case.alignment).int()
        )
    return [int(n) for n in prefix[-1]]


def check_combine(case: Case, ranks: list[Rank], backs: list, *, weights: bool = True) -> None:
    for rank, (r, b) in enumerate(zip(ranks, backs, strict=True)):
        device = r.x.device
        total = torch.zeros(b.out.shape, dtype=torch.float32, device=device)
        total_weights = torch.zeros(b.out_weights.shape, dtype=torch.float32, device=device)
        for bias in b.biases:
            total += bias.float()
        for owner, o in enumerate(backs):
            head = r.send_head[:, owner]
            held = (head >= 0).nonzero().flatten()
            rows = head[held].long().to(o.y.device)
            total[held] += o.given_y[rows].to(device).float()
            total_weights[held] += o.given_weights[rows].to(device)
        first_difference("combined", rank, b.out, total.to(torch.bfloat16))
        if weights:
            first_difference("combined weights", rank, b.out_weights, total_weights)


def affordable(case: Case) -> Case:
    """The emulator gets fewer blocks, and fewer tokens where rows are long: a warp does what it does on a GPU."""
    if not EMULATED:
        return case
    most, largest = 80 if case.hidden_bytes > 4096 else 4200, max(case.num_tokens)
    num_tokens = tuple(-(-t * most // largest) if largest > most else t for t in case.num_tokens)
    return dataclasses.replace(case, num_sms=min(case.num_sms, 3), num_tokens=num_tokens)


def run(case: Case, staging_bytes: int = 64 << 20, symmetric: bool = False) -> None:
    case = affordable(case)
    world = world_of(case.num_ranks, staging_bytes, symmetric)
    ranks = [make_rank(world, case, rank) for rank in range(case.num_ranks)]
    world.sync()
    layout(world, case, ranks)
    world.check()
    check_layout(case, ranks)
    notify(world, case, ranks)
    counts = [runtime.wait_counts(world.ticket, 5.0) for runtime in world.runtimes]
    assert all(c is not None and c.mismatch_mask == 0 and c.bad_count_mask == 0 for c in counts), world.errors()
    allocate(world, case, ranks, [c.num_recv_tokens for c in counts])
    world.sync()
    expected = "staged" if any(case.staged) else "in_place"
    how = dispatch(world, case, ranks)
    world.check()
    assert case.staged or set(how) == {expected}
    rows = check_dispatch(case, ranks)
    for rank, c in enumerate(counts):
        assert c.num_recv_tokens == rows[rank]
        assert c.num_recv_tokens_per_expert == ranks[rank].expert_counts.tolist()
    # a second, cached dispatch of other data into poisoned outputs
    for r in ranks:
        r.x.copy_(r.x.flip(0))
        if r.scales is not None:
            r.scales.copy_(r.scales.flip(0))
        for out in r.outputs.values():
            out.view(torch.uint8).fill_(0xEE)
    world.sync()
    dispatch(world, case, ranks, cached=True)
    world.check()
    check_dispatch(case, ranks, cached=True)
    if case.hidden_bytes % 2:
        return
    backs = [make_back(world, case, rank, rows[rank]) for rank in range(case.num_ranks)]
    world.sync()
    combine(world, case, ranks, backs)
    world.check()
    check_combine(case, ranks, backs)
    for b in backs:
        b.out.view(torch.uint8).fill_(0xFF)
    world.sync()
    combine(world, case, ranks, backs, weights=False)
    world.check()
    check_combine(case, ranks, backs, weights=False)


def cases() -> list[Case]:
    found = []
    for use_bulk in (True, False):
        how = {"use_bulk": use_bulk}
        found += [
            Case(num_tokens=(100,), num_experts=8, **how),
            Case(num_tokens=(37, 64), **how),
            Case(num_tokens=(128, 96, 0, 33), **how),
            Case(num_tokens=(0, 0, 0, 0), **how),
            Case(num_tokens=(200, 50, 100, 150), routing="to_rank_0", **how),
            Case(num_tokens=(200, 50, 100, 150), routing="some_unused", num_biases=2, **how),
            Case(num_tokens=(64, 64, 64, 64), routing="none", num_biases=1, **how),
            Case(num_tokens=(64, 64, 64, 64), routing="bad", **how),
            Case(num_tokens=(40, 30, 20, 10), routing="repeated", num_topk=6, **how),
            Case(num_tokens=(65, 66, 67, 68), hidden_bytes=16 * 7, num_topk=3, num_experts=12, num_biases=1, **how),
            Case(num_tokens=(65, 66, 67), hidden_bytes=16, num_topk=1, num_experts=3, **how),
            Case(num_tokens=(70, 71, 72, 73), hidden_bytes=32768, num_topk=8, num_experts=64, num_sms=5, **how),
            Case(num_tokens=(70, 71, 72, 73), hidden_bytes=16400, num_topk=8, num_experts=64, num_sms=1, **how),
            Case(
                num_tokens=(300, 301, 302, 303),
                hidden_bytes=7168,
                dtype=torch.uint8,
                num_scales=56,
                num_topk=8,
                num_experts=256,
                alignment=16,
                num_sms=24,
                **how,
            ),
            Case(
                num_tokens=(300, 301, 302, 303),
                hidden_bytes=7168,
                dtype=torch.uint8,
                num_scales=56,
                scales_layout="column",
                num_topk=8,
                num_experts=256,
                index_bits=32,
                **how,
            ),
            Case(
                num_tokens=(90, 91, 92, 93),
                hidden_bytes=2048,
                dtype=torch.uint8,
                num_scales=16,
                scales_layout="sparse",
                num_topk=32,
                num_experts=64,
                **how,
            ),
            Case(num_tokens=(90, 91, 92, 93), hidden_bytes=128, dtype=torch.uint8, num_scales=1, **how),
            Case(
                num_tokens=(90, 91, 92, 93),
                hidden_bytes=640,
                dtype=torch.uint8,
                num_scales=5,
                scales_layout="column",
                **how,
            ),
            Case(num_tokens=(5000, 4999, 3, 1024), hidden_bytes=512, num_topk=8, num_experts=1024, num_sms=32, **how),
        ]
    return found


@pytest.mark.parametrize("case", cases(), ids=lambda case: case.name)
def test_dispatch_and_combine_agree_with_tensor_arithmetic(case: Case) -> None:
    run(case)


STAGED = [
    Case(num_tokens=(64, 80), staged=(True, True)),
    Case(num_tokens=(64, 80), staged=(True, False), num_biases=1),
    Case(num_tokens=(100, 0, 70, 33), staged=(True,) * 4),
    Case(num_tokens=(100, 90, 70, 33), staged=(False, True, False, True), num_topk=3, num_experts=12),
    Case(
        num_tokens=(500, 400, 300, 200), staged=(True,) * 4, hidden_bytes=14336, num_topk=8, num_experts=256, num_sms=24
    ),
    Case(
        num_tokens=(300, 301, 302, 303),
        staged=(True,) * 4,
        hidden_bytes=7168,
        dtype=torch.uint8,
        num_scales=56,
        num_topk=8,
        num_experts=256,
    ),
    Case(
        num_tokens=(200, 201, 3, 100),
        staged=(False, False, True, True),
        hidden_bytes=640,
        dtype=torch.uint8,
        num_scales=5,
        scales_layout="column",
    ),
    Case(num_tokens=(200, 201, 3, 100), staged=(True,) * 4, hidden_bytes=16 * 7, num_topk=1, num_sms=1),
    Case(num_tokens=(200, 201, 3, 100), staged=(True,) * 4, routing="to_rank_0", hidden_bytes=32768, num_biases=2),
    Case(num_tokens=(60,), staged=(True,), num_experts=8),
]


@pytest.mark.parametrize("use_bulk", [True, False], ids=["bulk", "plain"])
@pytest.mark.parametrize("num_slots", [2048, 16], ids=["roomy", "tight"])
@pytest.mark.parametrize("case", STAGED, ids=lambda case: case.name)
def test_memory_out_of_reach_goes_through_the_staging_window(case: Case, num_slots: int, use_bulk: bool) -> None:
    run(dataclasses.replace(case, use_bulk=use_bulk), staging_bytes=case.num_ranks * num_slots * 8192)


@pytest.mark.parametrize("use_bulk", [True, False], ids=["bulk", "plain"])
@pytest.mark.parametrize("num_slots", [2048, 16], ids=["small-chunks", "large-chunks"])
@pytest.mark.parametrize("case", STAGED, ids=lambda case: case.name)
def test_outputs_out_of_reach_are_relayed(case: Case, num_slots: int, use_bulk: bool) -> None:
    run(dataclasses.replace(case, use_bulk=use_bulk, relay=True), staging_bytes=case.num_ranks * num_slots * 8192)


# Many chunks: balanced, and with ranks that hold nearly everything or nothing.
LARGE = [
    Case(
        num_tokens=(700, 690, 710, 705), staged=(True,) * 4, hidden_bytes=14336, num_topk=8, num_experts=256, num_sms=16
    ),
    Case(
        num_tokens=(1500, 10, 1500, 0),
        staged=(True, True, False, True),
        hidden_bytes=14336,
        num_topk=8,
        num_experts=32,
    ),
    Case(num_tokens=(900, 1200), staged=(True,) * 2, hidden_bytes=14336, routing="to_rank_0", num_sms=1),
]


@pytest.mark.parametrize("case", LARGE, ids=lambda case: case.name)
def test_large_outputs_are_relayed(case: Case) -> None:
    run(dataclasses.replace(case, relay=True), staging_bytes=case.num_ranks * 256 * 8192)


# Eight ranks: shorter parts of a row in combine, seven pushing warps, eight rows in a stage.
EIGHT = [
    Case(num_tokens=(40, 0, 33, 17, 64, 5, 28, 1), num_topk=8, num_experts=64, num_biases=1),
    Case(num_tokens=(9, 12, 0, 10, 11, 8, 7, 13), num_topk=8, num_experts=8, hidden_bytes=8208, staged=(True,) * 8),
    Case(
        num_tokens=(20, 12, 0, 30, 1, 18, 27, 13),
        num_topk=3,
        num_experts=16,
        routing="some_unused",
        staged=(True, False) * 4,
        relay=True,
    ),
]


@pytest.mark.parametrize("use_bulk", [True, False], ids=["bulk", "plain"])
@pytest.mark.parametrize("case", EIGHT, ids=lambda case: case.name)
def test_eight_ranks_agree_with_tensor_arithmetic(case: Case, use_bulk: bool) -> None:
    run(dataclasses.replace(case, use_bulk=use_bulk), staging_bytes=case.num_ranks * 16 * 8192)


@pytest.mark.skipif(not EMULATED, reason="a GPU decides by itself how many blocks run at once")
@pytest.mark.parametrize("relay", [False, True], ids=["staged", "relayed"])
@pytest.mark.parametrize("use_bulk", [True, False], ids=["bulk", "plain"])
def test_one_resident_block_is_enough(use_bulk: bool, relay: bool) -> None:
    case = Case(num_tokens=(100, 90, 70, 33), staged=(True, True, False, True), relay=relay, use_bulk=use_bulk)
    world_of(4)
    machine().set_resident(1)
    try:
        run(dataclasses.replace(case, staged=(), relay=False))
        run(case, staging_bytes=4 * 16 * 8192)
    finally:
        machine().set_resident(0)


@pytest.mark.parametrize("num_ranks", [2, 4])
def test_memory_exported_and_imported_as_file_descriptors_serves(num_ranks: int) -> None:
    run(Case(num_tokens=(150, 140, 130, 0)[:num_ranks], hidden_bytes=2048, num_topk=8, num_experts=64), symmetric=True)


@pytest.mark.skipif(EMULATED, reason="graphs are recorded on GPUs only")
def test_a_captured_graph_replays_with_new_routing_and_data() -> None:
    case = Case(num_tokens=(100, 50, 0, 80), num_topk=4)
    world = world_of(4)
    ranks = [make_rank(world, case, rank) for rank in range(4)]
    backs = [make_back(world, case, rank, 512) for rank in range(4)]
    allocate(world, case, ranks, [512] * 4)
    world.sync()
    graphs = [torch.cuda.CUDAGraph() for _ in ranks]
    for rank, graph in enumerate(graphs):
        with (
            torch.cuda.device(world.devices[rank]),
            torch.cuda.graph(graph, stream=world.streams[rank], capture_error_mode="thread_local"),
        ):
            world.only = rank
            layout(world, case, ranks)
            notify(world, case, ranks, ticket=False)
            dispatch(world, case, ranks, fill=True)
            combine(world, case, ranks, backs)
    world.only = None
    for seed in range(1, 6):
        fresh = [make_rank(world, dataclasses.replace(case, seed=seed), rank) for rank in range(4)]
        for r, new, b in zip(ranks, fresh, backs, strict=True):
            r.x.copy_(new.x)
            r.topk_idx.copy_(new.topk_idx)
            r.topk_weights.copy_(new.topk_weights)
            for out in (*r.outputs.values(), b.out, b.out_weights):
                out.view(torch.uint8).fill_(0xFF)
        world.sync()
        for rank, graph in enumerate(graphs):
            with torch.cuda.device(world.devices[rank]), torch.cuda.stream(world.streams[rank]):
                graph.replay()
        world.check()
        check_layout(case, ranks)
        check_dispatch(case, ranks)
        check_combine(case, ranks, backs)


def test_many_repetitions_give_the_same_bytes() -> None:
    case = affordable(Case(num_tokens=(512, 300, 512, 1), hidden_bytes=7168, num_topk=8, num_experts=256, num_sms=16))
    world = world_of(4)
    ranks = [make_rank(world, case, rank) for rank in range(4)]
    world.sync()
    layout(world, case, ranks)
    notify(world, case, ranks)
    rows = [runtime.wait_counts(world.ticket, 5.0).num_recv_tokens for runtime in world.runtimes]
    allocate(world, case, ranks, rows)
    backs = [make_back(world, case, rank, rows[rank]) for rank in range(4)]
    world.sync()
    for _ in range(4 if EMULATED else 300):
        dispatch(world, case, ranks)
        combine(world, case, ranks, backs)
    world.check()
    check_dispatch(case, ranks)
    check_combine(case, ranks, backs)


def test_worst_case_sizes_need_no_host_and_mark_unused_rows() -> None:
    case = Case(num_tokens=(100, 50, 0, 80), num_topk=4)
    world = world_of(4)
    ranks = [make_rank(world, case, rank) for rank in range(4)]
    worst = 4 * 128
    allocate(world, case, ranks, [worst] * 4)
    world.sync()
    layout(world, case, ranks)
    notify(world, case, ranks, ticket=False)
    dispatch(world, case, ranks, fill=True)
    world.check()
    rows = check_dispatch(case, ranks)
    for rank, r in enumerate(ranks):
        assert (r.outputs["topk_idx"][rows[rank] :] == -1).all()
        assert (r.outputs["topk_weights"][rows[rank] :] == 0).all()


def test_a_dispatch_that_waits_for_counts_starts_if_its_rows_fit() -> None:
    case = Case(num_tokens=(37, 64, 5, 20))
    world = world_of(4)
    ranks = [make_rank(world, case, rank) for rank in range(4)]
    allocate(world, case, ranks, [200] * 4)
    world.sync()
    layout(world, case, ranks)
    notify(world, case, ranks)
    assert dispatch(world, case, ranks, ticket=world.ticket, timeout_s=5.0) == ["in_place"] * 4
    world.check()
    rows = check_dispatch(case, ranks)
    for fits in ({"least_rows": max(rows) + 1}, {}):
        if not fits:
            allocate(world, case, ranks, [min(rows) - 1] * 4)
        notify(world, case, ranks)
        assert dispatch(world, case, ranks, ticket=world.ticket, timeout_s=5.0, **fits) == [None] * 4
    world.check()


def test_too_small_a_capacity_is_reported_and_writes_nothing_beyond_it() -> None:
    case = Case(num_tokens=(100, 50, 60, 80), num_topk=4)
    world = world_of(4)
    ranks = [make_rank(world, case, rank) for rank in range(4)]
    allocate(world, case, ranks, [40] * 4)
    guards = [world.tensor(rank, (1 << 20,), torch.uint8, symmetric=True) for rank in range(4)]
    world.sync()
    layout(world, case, ranks)
    notify(world, case, ranks, ticket=False)
    dispatch(world, case, ranks, fill=True)
    world.sync()
    assert any("overflow" in text for text in world.errors())
    assert all((guard == 0xFF).all() for guard in guards)
    for runtime in world.runtimes:
        runtime.clear_error()
    run(case)


def test_a_missing_rank_is_named_and_the_others_recover_after_reset() -> None:
    case = Case(num_tokens=(64, 64, 64, 64))
    world = world_of(4)
    ranks = [make_rank(world, case, rank) for rank in range(4)]
    allocate(world, case, ranks, [256] * 4)
    for runtime in world.runtimes:
        runtime.set_timeout_ns(300_000_000)
    world.sync()
    runtimes, streams = world.runtimes, world.streams
    world.runtimes, world.streams = runtimes[:3], streams[:3]
    layout(world, case, ranks[:3])
    notify(world, case, ranks[:3])
    assert runtimes[0].wait_counts(world.ticket, 3.0).mismatch_mask == 8
    dispatch(world, case, ranks[:3])
    world.sync()
    error = runtimes[0].error()
    assert error is not None and error.kind == "timeout" and error.op == "notify" and error.peer == 3, error
    world.runtimes, world.streams = runtimes, streams
    world.sync()
    for runtime, stream in zip(world.runtimes, world.streams, strict=True):
        runtime.set_timeout_ns(4_000_000_000)
        runtime.reset(stream=stream.cuda_stream)
    run(case)


def test_a_refusing_rank_is_seen_by_all() -> None:
    case = Case(num_tokens=(64, 64, 64, 64))
    world = world_of(4)
    ranks = [make_rank(world, case, rank) for rank in range(4)]
    world.sync()
    runtimes, streams = world.runtimes, world.streams
    layout(world, case, ranks)
    world.runtimes, world.streams = runtimes[:3], streams[:3]
    notify(world, case, ranks[:3])
    world.runtimes, world.streams = runtimes, streams
    runtimes[3].refuse(fields=[], num_experts=0, reason=42, ticket=world.ticket, stream=streams[3].cuda_stream)
    for rank in range(3):
        counts = runtimes[rank].wait_counts(world.ticket, 3.0)
        assert counts.mismatch_mask == 8 and counts.headers[3][0] == 1 and counts.headers[3][3] == 42
    world.sync()
    for runtime in runtimes:
        runtime.clear_error()
    run(case)
