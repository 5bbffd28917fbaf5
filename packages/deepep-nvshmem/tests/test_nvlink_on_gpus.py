"""The backend ``nvlink`` on real GPUs: against the reference, for long, in graphs, beyond 2^31, with faults.

Every test runs the same on 2 and on 4 GPUs and skips where fewer are found. The reference backend runs beside the
backend under test on the same group; everything must agree bit for bit.
"""

from __future__ import annotations

import time
from typing import Any

import numpy as np
import pytest
import torch
import torch.distributed as dist

import deep_ep
from deep_ep import Buffer
from deep_ep.launch import RankContext

pytestmark = pytest.mark.gpu(2)

GPU_COUNTS = [pytest.param(n, id=f"{n}-gpus", marks=pytest.mark.gpu(n)) for n in (2, 4)]


def _buffer(context: RankContext, **options: Any) -> Buffer:
    options.setdefault("timeout_s", 20.0)
    return Buffer(context.group, 1 << 20, backend="nvlink", **options)


def _routing(random: np.random.Generator, num_tokens: int, num_topk: int, num_experts: int, kind: str) -> torch.Tensor:
    if num_tokens == 0:
        return torch.empty((0, num_topk), dtype=torch.int64)
    pool = num_experts if kind != "skewed" else max(1, num_experts // 4)
    idx = np.stack([random.permutation(max(pool, num_topk))[:num_topk] for _ in range(num_tokens)])
    idx = np.where(idx < pool, idx, -1)
    if kind == "dropped":
        idx[random.random(idx.shape) < 0.3] = -1
    return torch.from_numpy(idx.astype(np.int64))


def _bits(tensor: torch.Tensor | None) -> torch.Tensor | None:
    return None if tensor is None else tensor.contiguous().view(-1).view(torch.uint8)


def _same(name: str, ours: torch.Tensor | None, theirs: torch.Tensor | None, case: object) -> None:
    assert (ours is None) == (theirs is None), f"{name} is missing on one side: {case}"
    if ours is None or theirs is None:
        return
    assert ours.shape == theirs.shape and ours.dtype == theirs.dtype, f"{name}: {ours.shape} {theirs.shape}: {case}"
    a, b = _bits(ours), _bits(theirs)
    assert a is not None and b is not None
    if not torch.equal(a, b):
        first = (a != b).nonzero()[0].tolist()
        raise AssertionError(f"{name} differs first at byte {first} of {tuple(a.shape)}: {case}")


def generated_shapes(context: RankContext, first_seed: int, num_cases: int, has_heap: bool = True) -> dict[str, int]:
    """Random shapes against the reference; returns how many had an empty rank and how many were skewed."""
    ours, theirs = _buffer(context), Buffer(context.group, backend="reference")
    counts = dict.fromkeys(("cases", "empty", "skewed", "fp8", "pulled in place", "relayed", "staged"), 0)
    for seed in range(first_seed, first_seed + num_cases):
        shared, own = np.random.default_rng(seed), np.random.default_rng([seed, context.rank])
        num_local = int(shared.integers(1, 9))
        num_experts = num_local * context.num_ranks
        num_topk = int(shared.integers(1, min(32, num_experts) + 1))
        kind = str(shared.choice(["uniform", "dropped", "skewed"]))
        is_fp8 = bool(shared.integers(0, 2))
        hidden = int(shared.integers(1, 260)) * (16 if is_fp8 else 8)
        tokens = shared.integers(0, int(shared.choice([3, 70, 400])), context.num_ranks)
        if shared.random() < 0.25:
            tokens[int(shared.integers(0, context.num_ranks))] = 0
        num_tokens, alignment = int(tokens[context.rank]), int(shared.choice([1, 4, 128]))
        num_worst = int(tokens.sum()) + 5 if shared.random() < 0.2 else 0
        num_sms = int(shared.choice([2, 8, 20]))
        num_bias, use_symmetric = int(shared.integers(0, 3)), bool(shared.integers(0, 2)) and has_heap
        case = {
            "seed": seed,
            "rank": context.rank,
            "tokens": tokens.tolist(),
            "hidden": hidden,
            "num_topk": num_topk,
            "kind": kind,
        }
        device = context.device
        topk_idx = _routing(own, num_tokens, num_topk, num_experts, kind).to(device)
        weights = torch.from_numpy(own.random((num_tokens, num_topk), dtype=np.float32)).to(device)
        x: Any = torch.from_numpy(own.standard_normal((num_tokens, hidden)).astype(np.float32)).to(device).bfloat16()
        if is_fp8:
            num_scales = int(shared.integers(1, 60))
            scales = torch.from_numpy(own.random((num_tokens, num_scales), dtype=np.float32)).to(device)
            if shared.integers(0, 2):
                scales = scales.t().contiguous().t()
            x = (x.to(torch.float8_e4m3fn), scales)
        config = deep_ep.Config(num_sms)
        results = []
        for buffer in (ours, theirs):
            per_rank, _, per_expert, in_rank, _ = buffer.get_dispatch_layout(topk_idx, num_experts)
            recv, idx, recv_weights, per_expert_list, handle, _ = buffer.dispatch(
                x,
                num_tokens_per_rank=per_rank,
                is_token_in_rank=in_rank,
                num_tokens_per_expert=per_expert,
                topk_idx=topk_idx,
                topk_weights=weights,
                expert_alignment=alignment,
                num_worst_tokens=num_worst,
                config=config,
            )
            results.append((per_rank, per_expert, in_rank, recv, idx, recv_weights, per_expert_list, handle))
        a, b = results
        for name, i in (("num_tokens_per_rank", 0), ("num_tokens_per_expert", 1), ("is_token_in_rank", 2)):
            _same(name, a[i], b[i], case)
        assert a[6] == b[6], f"counts per expert {a[6]} {b[6]}: {case}"
        num_recv = int(a[7][0][-1, context.rank])
        parts = zip(a[3] if is_fp8 else (a[3],), b[3] if is_fp8 else (b[3],), strict=True)
        for one, other in parts:
            assert one.shape == other.shape
            _same("recv_x or scales", one[:num_recv], other[:num_recv], case)
        _same("recv_topk_idx", a[4], b[4], case)
        _same("recv_topk_weights", a[5], b[5], case)
        _same("rank prefix", a[7][0], b[7][0], case)
        _same("send head", a[7][5], b[7][5], case)
        _same("source", a[7][3][:num_recv], b[7][3][:num_recv], case)
        # replay with another hidden size and dtype, then bring rows back
        other_hidden = int(shared.integers(1, 200)) * 8
        z = torch.from_numpy(own.standard_normal((num_tokens, other_hidden)).astype(np.float32)).to(device).bfloat16()
        replayed = [buf.dispatch(z, handle=r[7], config=config)[0] for buf, r in ((ours, a), (theirs, b))]
        _same("replayed rows", replayed[0][:num_recv], replayed[1][:num_recv], case)
        y = replayed[1].clone()
        y_weights = torch.nan_to_num(b[5])
        bias = tuple(torch.randn_like(z) for _ in range(num_bias))
        if use_symmetric:
            with ours.symmetric_memory():
                y_ours, w_ours = y.clone(), y_weights.clone()
        else:
            y_ours, w_ours = y.clone(), y_weights.clone()
        combined, combined_weights, _ = ours.combine(y_ours, a[7], w_ours, bias or None, config)
        expected, expected_weights, _ = theirs.combine(y, b[7], y_weights, bias or None, config)
        _same("combined_x", combined, expected, case)
        _same("combined_topk_weights", combined_weights, expected_weights, case)
        how = ours.placement()["x"]
        if has_heap:
            wanted = "pulled in place" if use_symmetric or y.shape[0] == 0 else "relayed"
            assert how == wanted, f"combine was {how}, expected {wanted}: {case}"
        counts["cases"] += 1
        counts["empty"] += int((tokens == 0).any())
        counts["skewed"] += int(kind == "skewed")
        counts["fp8"] += int(is_fp8)
        counts[how] += 1
    ours.destroy()
    theirs.destroy()
    return counts


@pytest.mark.parametrize("num_gpus", GPU_COUNTS)
def test_generated_shapes_equal_the_reference(rank_pools: Any, num_gpus: int) -> None:
    pool = rank_pools.get("cuda", num_ranks=num_gpus)
    counts = pool.run(generated_shapes, 1000 * num_gpus, 320, num_ranks=num_gpus, timeout_s=300)[0]
    assert counts["cases"] >= 300 and counts["empty"] >= 30 and counts["skewed"] >= 30
    assert min(counts["fp8"], counts["pulled in place"], counts["relayed"]) >= 60


@pytest.mark.parametrize("num_gpus", GPU_COUNTS)
def test_generated_shapes_through_the_staging_window(rank_pools: Any, num_gpus: int) -> None:
    """With a heap too small for nearly everything, rows go through staging in both directions."""
    pool = rank_pools.get("cuda", num_ranks=num_gpus)
    environment = {"DEEPEP_SYMMETRIC_HEAP_MB": "2"}
    arguments = (5000 * num_gpus, 60, False)
    counts = pool.run(generated_shapes, *arguments, num_ranks=num_gpus, timeout_s=300, environment=environment)[0]
    assert counts["cases"] == 60 and counts["staged"] >= 30


def _layout(buffer: Buffer, topk_idx: torch.Tensor, num_experts: int) -> dict[str, torch.Tensor]:
    per_rank, _, per_expert, in_rank, _ = buffer.get_dispatch_layout(topk_idx, num_experts)
    return {"num_tokens_per_rank": per_rank, "num_tokens_per_expert": per_expert, "is_token_in_rank": in_rank}


def _hash(*tensors: torch.Tensor) -> torch.Tensor:
    """A number that changes if a bit or its place changes; stays on the device."""
    total = torch.zeros((), dtype=torch.int64, device=tensors[0].device)
    for tensor in tensors:
        words = tensor.contiguous().view(torch.int16).flatten().long()
        places = torch.arange(words.numel(), device=words.device) % 8191 + 1
        total = total * 31 + (words * places).sum()
    return total


def soak(context: RankContext, num_iterations: int) -> tuple[int, int]:
    """The same calls again and again over poisoned memory; returns how many different hashes came, and the first."""
    torch.manual_seed(context.rank)
    buffer = _buffer(context)
    num_tokens, hidden, num_topk, num_experts = 200 + 31 * context.rank, 1024, 6, 8 * context.num_ranks
    device = context.device
    x = torch.randn((num_tokens, hidden), device=device).bfloat16()
    topk_idx = torch.rand((num_tokens, num_experts), device=device).topk(num_topk).indices
    weights = torch.rand((num_tokens, num_topk), device=device)
    hashes = torch.zeros(num_iterations, dtype=torch.int64, device=device)
    for i in range(num_iterations):
        with buffer.symmetric_memory():
            poison = torch.full(((64 << 20) // 2,), float("nan"), dtype=torch.bfloat16, device=device)
        del poison
        recv, _, recv_weights, _, handle, _ = buffer.dispatch(
            x, topk_idx=topk_idx, topk_weights=weights, **_layout(buffer, topk_idx, num_experts)
        )
        with buffer.symmetric_memory():
            y = recv * 2
        if i % 3 == 0:
            y = y.clone()  # elsewhere: through the staging window
        combined, combined_weights, _ = buffer.combine(y, handle, recv_weights)
        assert combined_weights is not None
        hashes[i] = _hash(recv, combined, combined_weights.view(torch.bfloat16))
    different = int(hashes.unique().numel())
    first = int(hashes[0])
    buffer.destroy()
    return different, first


@pytest.mark.parametrize("num_gpus", GPU_COUNTS)
def test_ten_thousand_iterations_give_one_hash(rank_pools: Any, num_gpus: int) -> None:
    results = rank_pools.get("cuda", num_ranks=num_gpus).run(soak, 10_000, num_ranks=num_gpus, timeout_s=300)
    assert [different for different, _ in results] == [1] * num_gpus
    assert all(first != 0 for _, first in results)


def graph_replay(context: RankContext, num_replays: int) -> int:
    """Capture layout, dispatch and combine; replay with new inputs each time; returns how many replays were wrong."""
    torch.manual_seed(100 + context.rank)
    buffer = _buffer(context)
    num_tokens, hidden, num_topk, num_experts = 128, 2048, 8, 8 * context.num_ranks
    device = context.device
    x = torch.randn((num_tokens, hidden), device=device).bfloat16()
    topk_idx = torch.rand((num_tokens, num_experts), device=device).topk(num_topk).indices
    weights = torch.rand((num_tokens, num_topk), device=device)

    def step() -> tuple[torch.Tensor, torch.Tensor]:
        recv, _, recv_weights, counts, handle, _ = buffer.dispatch(
            x,
            topk_idx=topk_idx,
            topk_weights=weights,
            num_worst_tokens=num_tokens * context.num_ranks,
            **_layout(buffer, topk_idx, num_experts),
        )
        assert counts == []
        combined, combined_weights, _ = buffer.combine(recv, handle, recv_weights)
        assert combined_weights is not None
        return combined, combined_weights

    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        step()
    stream.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, stream=stream):
        combined, combined_weights = step()
    wrong = torch.zeros((), dtype=torch.int64, device=device)
    local = num_experts // context.num_ranks
    for _ in range(num_replays):
        x.normal_()
        topk_idx.copy_(torch.rand((num_tokens, num_experts), device=device).topk(num_topk).indices)
        combined.fill_(float("nan"))
        graph.replay()
        in_rank = torch.zeros((num_tokens, context.num_ranks), dtype=torch.bool, device=device)
        in_rank.scatter_(1, topk_idx // local, True)
        # Every rank gives the row back as it came, so the sum is the row times the number of ranks, exactly in float32.
        expected = (x.float() * in_rank.sum(1, keepdim=True)).bfloat16()
        wrong += (combined != expected).any() | (combined_weights != weights).any()
    total = int(wrong)
    del graph
    buffer.destroy()
    return total


@pytest.mark.parametrize("num_gpus", GPU_COUNTS)
def test_graph_replays_follow_their_inputs(rank_pools: Any, num_gpus: int) -> None:
    results = rank_pools.get("cuda", num_ranks=num_gpus).run(graph_replay, 1000, num_ranks=num_gpus, timeout_s=120)
    assert results == [0] * num_gpus


def beyond_int32(context: RankContext) -> str:
    """More than 2^31 elements arrive at rank 0; rows are checked at the far end too."""
    buffer = _buffer(context, timeout_s=60.0)
    hidden, num_experts, device = 7168, context.num_ranks, context.device
    num_tokens = 2**31 // hidden // context.num_ranks + 1000
    torch.manual_seed(context.rank)
    x = torch.randn((num_tokens, hidden), device=device, dtype=torch.bfloat16)
    topk_idx = torch.zeros((num_tokens, 1), dtype=torch.int64, device=device)
    weights = torch.ones((num_tokens, 1), device=device)
    recv, _, _, counts, handle, _ = buffer.dispatch(
        x, topk_idx=topk_idx, topk_weights=weights, **_layout(buffer, topk_idx, num_experts)
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


def missing_caller(context: RankContext, absent: int) -> tuple[str, list[int], float, bool]:
    """One rank leaves out a combine: the others learn who, in time, and the buffer works again after `reset`."""
    buffer = _buffer(context, timeout_s=2.0)
    device = context.device
    num_experts = 4 * context.num_ranks
    x = torch.randn((64, 512), device=device).bfloat16()
    topk_idx = torch.rand((64, num_experts), device=device).topk(4).indices
    weights = torch.rand((64, 4), device=device)

    def round_trip() -> bool:
        recv, _, recv_weights, _, handle, _ = buffer.dispatch(
            x, topk_idx=topk_idx, topk_weights=weights, **_layout(buffer, topk_idx, num_experts)
        )
        _, back, _ = buffer.combine(recv, handle, recv_weights)
        torch.cuda.synchronize()
        assert back is not None
        return bool(torch.equal(back, weights))

    assert round_trip()
    recv, _, _, _, handle, _ = buffer.dispatch(
        x, topk_idx=topk_idx, topk_weights=weights, **_layout(buffer, topk_idx, num_experts)
    )
    started, kind, ranks = time.monotonic(), "", []
    if context.rank != absent:
        buffer.combine(recv, handle)
        torch.cuda.synchronize()  # the kernel gives up by itself; no trap, the context stays healthy
        try:
            buffer.combine(recv, handle)
        except deep_ep.PeerTimeoutError as error:
            kind, ranks = type(error).__name__, list(error.ranks)
            assert f"rank {context.rank}" in str(error) and "combine" in str(error)
    elapsed = time.monotonic() - started
    dist.barrier(context.group)
    buffer.reset()
    works = round_trip()
    buffer.destroy()
    return kind, ranks, elapsed, works


@pytest.mark.parametrize("num_gpus", GPU_COUNTS)
def test_missing_caller_is_named_and_reset_heals(rank_pools: Any, num_gpus: int) -> None:
    absent = num_gpus - 1
    results = rank_pools.get("cuda", num_ranks=num_gpus).run(missing_caller, absent, num_ranks=num_gpus, timeout_s=60)
    for rank, (kind, ranks, elapsed, works) in enumerate(results):
        assert works
        if rank != absent:
            assert kind == "PeerTimeoutError" and ranks == [absent] and 1.8 < elapsed < 4.0


def many_buffers(context: RankContext, num_cycles: int) -> list[int]:
    """Free device memory after each build and destroy, three buffers at once."""
    free: list[int] = []
    for _ in range(num_cycles):
        buffers = [_buffer(context) for _ in range(3)]
        for buffer in buffers:
            x = torch.ones((16, 64), device=context.device).bfloat16()
            idx = torch.zeros((16, 1), dtype=torch.int64, device=context.device)
            recv = buffer.dispatch(
                x, topk_idx=idx, topk_weights=idx.float(), **_layout(buffer, idx, context.num_ranks)
            )[0]
            torch.cuda.synchronize()
        for buffer in reversed(buffers):
            buffer.destroy()
        assert bool((recv == 1).all()), "a tensor that outlives its buffer keeps its memory"
        del recv, buffers
        dist.barrier(context.group)
        torch.cuda.empty_cache()  # what torch caches for each stream it ever used is no leak of ours
        free.append(torch.cuda.mem_get_info()[0])
    return free


@pytest.mark.parametrize("num_gpus", GPU_COUNTS)
def test_build_and_destroy_leaves_no_device_memory_behind(rank_pools: Any, num_gpus: int) -> None:
    results = rank_pools.get("cuda", num_ranks=num_gpus).run(many_buffers, 20, num_ranks=num_gpus, timeout_s=120)
    for free in results:
        assert max(free[2:]) - min(free[2:]) <= 4 << 20, free
