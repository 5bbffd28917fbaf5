"""The backend ``nvshmem`` on real GPUs of one host, cut into virtual nodes: between them rows go through NVSHMEM only.

Two nodes of two GPUs, four of one, and two of one. The reference backend runs beside the backend under test on the
same group; everything must agree bit for bit.
"""

from __future__ import annotations

import os
import signal
import time
from typing import Any, NamedTuple

import pytest
import torch
import torch.distributed as dist
from normal_on_gpus import buffer_of, generated_shapes, graph_replay, layout_of, many_buffers, missing_caller, soak

from deep_ep import BackendUnavailableError, Buffer, BufferStateError, DeepEPError, PeerError, registry
from deep_ep.launch import RankContext, RankFailure, run_ranks

DEADLINE_S = 2.0
pytestmark = pytest.mark.usefixtures("nvshmem")


class Topology(NamedTuple):
    num_nodes: int
    ranks_per_node: int

    @property
    def num_ranks(self) -> int:
        return self.num_nodes * self.ranks_per_node

    @property
    def seed(self) -> int:
        return 1000 * self.num_ranks + self.ranks_per_node


TOPOLOGIES = pytest.mark.parametrize(
    "topology",
    [
        pytest.param(topology, id="{}-nodes-of-{}".format(*topology), marks=pytest.mark.gpu(topology.num_ranks))
        for topology in (Topology(2, 2), Topology(4, 1), Topology(2, 1))
    ],
)


@pytest.fixture
def nvshmem() -> None:
    """Skips where the backend is not built or NVSHMEM is not there."""
    found = registry.obstacles(registry.load("nvshmem"), registry.local_environment())
    if found:
        pytest.skip(f"backend 'nvshmem' cannot serve here: {'; '.join(map(str, found))}")


def run(
    rank_pools: Any, function: Any, *args: Any, topology: Topology, timeout_s: float = 300, **more: str
) -> list[Any]:
    environment = {"DEEPEP_RANKS_PER_NODE": str(topology.ranks_per_node), **more}
    pool = rank_pools.get("cuda", num_ranks=topology.num_ranks)
    return pool.run(function, *args, num_ranks=topology.num_ranks, timeout_s=timeout_s, environment=environment)


# --- against the reference ------------------------------------------------------------------------------------------


@TOPOLOGIES
def test_generated_shapes_equal_the_reference(rank_pools: Any, topology: Topology) -> None:
    arguments = ("nvshmem", 20 * topology.seed, 200)
    counts = run(rank_pools, generated_shapes, *arguments, topology=topology)[0]
    assert counts["cases"] == 200 and counts["empty"] >= 20
    assert min(counts[kind] for kind in ("skewed", "one rank", "fp8", "pulled in place", "elsewhere")) >= 25


@TOPOLOGIES
def test_generated_shapes_through_the_smallest_window(rank_pools: Any, topology: Topology) -> None:
    """Two slots of the largest row that comes up: every stream waits for credits again and again."""
    arguments = ("nvshmem", 30 * topology.seed, 40)
    counts = run(rank_pools, generated_shapes, *arguments, topology=topology, DEEPEP_NVSHMEM_WINDOW_MB="0.02")[0]
    assert counts["cases"] == 40


# --- for long, and in graphs ----------------------------------------------------------------------------------------


@TOPOLOGIES
def test_ten_thousand_iterations_give_one_hash(rank_pools: Any, topology: Topology) -> None:
    results = run(rank_pools, soak, "nvshmem", 10_000, topology=topology, timeout_s=400)
    assert [different for different, _ in results] == [1] * topology.num_ranks
    assert all(first != 0 for _, first in results)


@TOPOLOGIES
def test_graph_replays_follow_their_inputs(rank_pools: Any, topology: Topology) -> None:
    results = run(rank_pools, graph_replay, "nvshmem", 500, topology.ranks_per_node, topology=topology)
    assert results == [0] * topology.num_ranks


@TOPOLOGIES
def test_build_and_destroy_leaves_no_device_memory_behind(rank_pools: Any, topology: Topology) -> None:
    """NVSHMEM keeps its memory for the next buffer, so that there is no more of it from the second round on."""
    for free in run(rank_pools, many_buffers, "nvshmem", 12, topology=topology):
        assert max(free[2:]) - min(free[2:]) <= 4 << 20, free


def push_limit(context: RankContext) -> float | None:
    buffer = buffer_of(context, "nvshmem")
    free, limit = [], None
    for _ in range(2):
        limit = buffer.push_limit_gbps(24)
        torch.cuda.empty_cache()
        free.append(torch.cuda.mem_get_info()[0])
    buffer.destroy()
    assert free[0] - free[1] <= 4 << 20, "what was mapped for the measurement is unmapped"
    return limit


@TOPOLOGIES
def test_virtual_nodes_know_what_the_links_between_them_carry(rank_pools: Any, topology: Topology) -> None:
    limits = run(rank_pools, push_limit, topology=topology)
    assert len(set(limits)) == 1 and limits[0] > 10


# --- faults ---------------------------------------------------------------------------------------------------------


@TOPOLOGIES
def test_missing_caller_ends_in_named_errors_and_reset_heals(rank_pools: Any, topology: Topology) -> None:
    absent = topology.num_ranks - 1
    results = run(rank_pools, missing_caller, "nvshmem", absent, topology=topology, timeout_s=60)
    for rank, (kind, ranks, elapsed, works) in enumerate(results):
        assert works
        if rank != absent:
            # A rank may wait for one that itself waits for the absent one.
            assert kind == "PeerTimeoutError" and len(ranks) == 1 and 1.8 < elapsed < 4.0
    assert any(ranks == [absent] for _, ranks, _, _ in results)


def lost_peer(context: RankContext, lost: int, how: str) -> tuple[list[str], float]:
    """One rank is killed, or late; what the others are told by a dispatch and by the call after it."""
    buffer, device = buffer_of(context, "nvshmem", timeout_s=DEADLINE_S), context.device
    num_experts = 2 * context.num_ranks
    x = torch.ones((64, 512), dtype=torch.bfloat16, device=device)
    topk_idx = torch.arange(64 * 4, device=device).view(64, 4) % num_experts

    def round_trip() -> str:
        try:
            recv, _, _, _, handle, _ = buffer.dispatch(
                x, topk_idx=topk_idx, topk_weights=topk_idx.float(), **layout_of(buffer, topk_idx, num_experts)
            )
            combined, _, _ = buffer.combine(recv, handle)
            torch.cuda.synchronize()
            return "right" if bool((combined == combined[0, 0]).all()) else "wrong"
        except PeerError as error:
            return f"{type(error).__name__} {'named' if error.ranks and error.phase else 'nameless'}"
        except BufferStateError:
            return "BufferStateError"

    told = [round_trip()]
    torch.cuda.synchronize()
    dist.barrier(context.group)
    started = time.monotonic()
    if context.rank == lost:
        if how == "killed":
            os.kill(os.getpid(), signal.SIGKILL)
        time.sleep(0.5 * DEADLINE_S if how == "late" else 3 * DEADLINE_S)
    told += [round_trip(), round_trip()]
    elapsed = time.monotonic() - started
    buffer.destroy()
    return told, elapsed


@TOPOLOGIES
@pytest.mark.parametrize("how", ["late", "too late", "killed"])
def test_lost_peer_ends_in_named_errors(topology: Topology, how: str) -> None:
    lost = topology.num_ranks - 1
    environment = {"DEEPEP_RANKS_PER_NODE": str(topology.ranks_per_node)}
    try:
        results = run_ranks(
            lost_peer, lost, how, num_ranks=topology.num_ranks, device="cuda", timeout_s=90.0, environment=environment
        )
    except RankFailure as failure:
        assert how == "killed" and set(failure.failures) == {lost}, str(failure)
        results = list(failure.results.values())
    for told, elapsed in results[:lost]:
        if how == "late":
            assert told == ["right"] * 3
        else:
            assert told == ["right", "PeerTimeoutError named", "BufferStateError"]
            assert elapsed < 3 * DEADLINE_S


def heap_too_small(context: RankContext) -> tuple[str, str]:
    """More arrives at rank 0 than its symmetric memory holds; then a dispatch that fits."""
    buffer, device, num_experts = buffer_of(context, "nvshmem"), context.device, context.num_ranks
    outcomes = []
    for num_tokens in (4096, 16):
        x = torch.ones((num_tokens, 2048), dtype=torch.bfloat16, device=device)
        topk_idx = torch.zeros((num_tokens, 1), dtype=torch.int64, device=device)
        try:
            recv = buffer.dispatch(
                x, topk_idx=topk_idx, topk_weights=topk_idx.float(), **layout_of(buffer, topk_idx, num_experts)
            )[0]
            torch.cuda.synchronize()
            outcomes.append(f"{recv.shape[0]} rows")
            buffer.get_dispatch_layout(topk_idx, num_experts)  # says what the kernel found
        except DeepEPError as error:
            outcomes[len(outcomes) :] = [str(error)]
        dist.barrier(context.group)
    buffer.destroy()
    return outcomes[0], outcomes[-1]


@pytest.mark.gpu(4)
def test_full_heap_is_an_error_that_names_the_setting_and_the_next_call_works(rank_pools: Any) -> None:
    results = run(rank_pools, heap_too_small, topology=Topology(2, 2), timeout_s=60, DEEPEP_SYMMETRIC_HEAP_MB="32")
    assert "DEEPEP_SYMMETRIC_HEAP_MB" in results[0][0]
    assert [last for _, last in results] == [f"{16 * 4} rows", "0 rows", "0 rows", "0 rows"]


def two_groups(context: RankContext) -> str:
    """After a buffer of all ranks, one of half of them."""
    buffer_of(context, "nvshmem").destroy()
    halves = [dist.new_group([0, 1]), dist.new_group([2, 3])]
    os.environ["DEEPEP_RANKS_PER_NODE"] = "1"
    try:
        Buffer(halves[context.rank // 2], 1 << 20, backend="nvshmem", timeout_s=20.0).destroy()
    except BackendUnavailableError as error:
        return str(error)
    return ""


@pytest.mark.gpu(4)
def test_another_group_is_refused_by_name() -> None:
    for text in run_ranks(two_groups, num_ranks=4, device="cuda", environment={"DEEPEP_RANKS_PER_NODE": "2"}):
        assert "serves another group" in text and "start new processes" in text
