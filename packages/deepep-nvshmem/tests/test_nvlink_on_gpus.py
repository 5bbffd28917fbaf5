"""The backend ``nvlink`` on real GPUs: against the reference, for long, in graphs, beyond 2^31, with faults.

Every test runs the same on 2 and on 4 GPUs and skips where fewer are found. The reference backend runs beside the
backend under test on the same group; everything must agree bit for bit.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch
from normal_on_gpus import (
    buffer_of,
    generated_shapes,
    graph_replay,
    layout_of,
    many_buffers,
    missing_caller,
    soak,
)

from deep_ep.launch import RankContext

pytestmark = pytest.mark.gpu(2)

GPU_COUNTS = [pytest.param(n, id=f"{n}-gpus", marks=pytest.mark.gpu(n)) for n in (2, 4)]


@pytest.mark.parametrize("num_gpus", GPU_COUNTS)
def test_generated_shapes_equal_the_reference(rank_pools: Any, num_gpus: int) -> None:
    pool = rank_pools.get("cuda", num_ranks=num_gpus)
    counts = pool.run(generated_shapes, "nvlink", 1000 * num_gpus, 320, num_ranks=num_gpus, timeout_s=300)[0]
    assert counts["cases"] >= 300 and counts["empty"] >= 30 and counts["skewed"] >= 30
    assert min(counts["fp8"], counts["pulled in place"], counts["elsewhere"]) >= 60


@pytest.mark.parametrize("num_gpus", GPU_COUNTS)
def test_generated_shapes_through_the_staging_window(rank_pools: Any, num_gpus: int) -> None:
    """With a heap too small for nearly everything, rows go through staging in both directions."""
    pool = rank_pools.get("cuda", num_ranks=num_gpus)
    environment = {"DEEPEP_SYMMETRIC_HEAP_MB": "2"}
    arguments = (5000 * num_gpus, 60, False)
    counts = pool.run(
        generated_shapes, "nvlink", *arguments, num_ranks=num_gpus, timeout_s=300, environment=environment
    )[0]
    assert counts["cases"] == 60 and counts["staged"] >= 30


@pytest.mark.parametrize("num_gpus", GPU_COUNTS)
def test_ten_thousand_iterations_give_one_hash(rank_pools: Any, num_gpus: int) -> None:
    results = rank_pools.get("cuda", num_ranks=num_gpus).run(soak, "nvlink", 10_000, num_ranks=num_gpus, timeout_s=300)
    assert [different for different, _ in results] == [1] * num_gpus
    assert all(first != 0 for _, first in results)


@pytest.mark.parametrize("num_gpus", GPU_COUNTS)
def test_graph_replays_follow_their_inputs(rank_pools: Any, num_gpus: int) -> None:
    results = rank_pools.get("cuda", num_ranks=num_gpus).run(
        graph_replay, "nvlink", 1000, num_ranks=num_gpus, timeout_s=120
    )
    assert results == [0] * num_gpus


def beyond_int32(context: RankContext) -> str:
    """More than 2^31 elements arrive at rank 0; rows are checked at the far end too."""
    buffer = buffer_of(context, "nvlink", timeout_s=60.0)
    hidden, num_experts, device = 7168, context.num_ranks, context.device
    num_tokens = 2**31 // hidden // context.num_ranks + 1000
    torch.manual_seed(context.rank)
    x = torch.randn((num_tokens, hidden), device=device, dtype=torch.bfloat16)
    topk_idx = torch.zeros((num_tokens, 1), dtype=torch.int64, device=device)
    weights = torch.ones((num_tokens, 1), device=device)
    recv, _, _, counts, handle, _ = buffer.dispatch(
        x, topk_idx=topk_idx, topk_weights=weights, **layout_of(buffer, topk_idx, num_experts)
    )
    how = buffer.placement()["recv_x"]
    if context.rank == 0:
        assert recv.numel() > 2**31 and counts == [num_tokens * context.num_ranks]
    combined, _, _ = buffer.combine(recv, handle)
    assert torch.equal(combined, x), "combine of one copy gives the row back"
    del recv, combined
    buffer.destroy()
    return how


@pytest.mark.parametrize("heap_mb", [pytest.param(6144, id="in-place"), pytest.param(512, id="staged")])
@pytest.mark.gpu(4)
def test_more_than_two_to_the_31_elements(rank_pools: Any, heap_mb: int) -> None:
    environment = {"DEEPEP_SYMMETRIC_HEAP_MB": str(heap_mb)}
    pool = rank_pools.get("cuda", num_ranks=4)
    how = pool.run(beyond_int32, num_ranks=4, timeout_s=120, environment=environment)
    assert how[0] == ("in place" if heap_mb > 5000 else "staged")


@pytest.mark.parametrize("num_gpus", GPU_COUNTS)
def test_missing_caller_is_named_and_reset_heals(rank_pools: Any, num_gpus: int) -> None:
    absent = num_gpus - 1
    results = rank_pools.get("cuda", num_ranks=num_gpus).run(
        missing_caller, "nvlink", absent, num_ranks=num_gpus, timeout_s=60
    )
    for rank, (kind, ranks, elapsed, works) in enumerate(results):
        assert works
        if rank != absent:
            assert kind == "PeerTimeoutError" and ranks == [absent] and 1.8 < elapsed < 4.0


@pytest.mark.parametrize("num_gpus", GPU_COUNTS)
def test_build_and_destroy_leaves_no_device_memory_behind(rank_pools: Any, num_gpus: int) -> None:
    results = rank_pools.get("cuda", num_ranks=num_gpus).run(
        many_buffers, "nvlink", 20, num_ranks=num_gpus, timeout_s=120
    )
    for free in results:
        assert max(free[2:]) - min(free[2:]) <= 4 << 20, free
