"""What ranks with GPUs do in the tests of both backends; all is compared with the reference backend or with itself.

``T`` tokens of this rank, ``K`` choices, ``H`` hidden size, ``E`` experts.
"""

from __future__ import annotations

import time
from typing import Any

import numpy as np
import torch
import torch.distributed as dist

import deep_ep
from deep_ep import Buffer
from deep_ep.launch import RankContext


def buffer_of(context: RankContext, backend: str, **options: Any) -> Buffer:
    options.setdefault("timeout_s", 20.0)
    return Buffer(context.group, 1 << 20, backend=backend, **options)


def _routing(
    random: np.random.Generator, num_tokens: int, num_topk: int, num_experts: int, num_ranks: int, kind: str
) -> torch.Tensor:
    """int64 ``[T, K]``. Skewed: few experts; one rank: all on the last rank; dropped: some choices are -1."""
    if num_tokens == 0:
        return torch.empty((0, num_topk), dtype=torch.int64)
    pool = {"skewed": max(1, num_experts // 4), "one rank": num_experts // num_ranks}.get(kind, num_experts)
    idx = np.stack([random.permutation(max(pool, num_topk))[:num_topk] for _ in range(num_tokens)])
    idx = np.where(idx < pool, idx + (num_experts - pool if kind == "one rank" else 0), -1)
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


def generated_shapes(
    context: RankContext, backend: str, first_seed: int, num_cases: int, has_heap: bool = True
) -> dict[str, int]:
    """Random shapes against the reference; returns how often each kind came up and how rows came back."""
    ours, theirs = buffer_of(context, backend), Buffer(context.group, backend="reference")
    kinds = ("uniform", "dropped", "skewed", "one rank")
    counts = dict.fromkeys(("cases", "empty", "fp8", "pulled in place", "elsewhere", "staged", *kinds), 0)
    for seed in range(first_seed, first_seed + num_cases):
        shared, own = np.random.default_rng(seed), np.random.default_rng([seed, context.rank])
        num_local = int(shared.integers(1, 9))
        num_experts = num_local * context.num_ranks
        num_topk = int(shared.integers(1, min(32, num_experts) + 1))
        kind = str(shared.choice(kinds))
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
        topk_idx = _routing(own, num_tokens, num_topk, num_experts, context.num_ranks, kind).to(device)
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
            layout = layout_of(buffer, topk_idx, num_experts)
            recv, idx, recv_weights, per_expert, handle, _ = buffer.dispatch(
                x,
                topk_idx=topk_idx,
                topk_weights=weights,
                expert_alignment=alignment,
                num_worst_tokens=num_worst,
                config=config,
                **layout,
            )
            results.append((layout, recv, idx, recv_weights, per_expert, handle))
        a, b = results
        for name in a[0]:
            _same(name, a[0][name], b[0][name], case)
        assert a[4] == b[4], f"counts per expert {a[4]} {b[4]}: {case}"
        num_recv = _same_handles(a[5], b[5], context.rank, case)
        for one, other in zip(a[1] if is_fp8 else (a[1],), b[1] if is_fp8 else (b[1],), strict=True):
            assert one.shape == other.shape
            _same("recv_x or scales", one[:num_recv], other[:num_recv], case)
        _same("recv_topk_idx", a[2], b[2], case)
        _same("recv_topk_weights", a[3], b[3], case)
        # replay with another hidden size and dtype, then bring rows back
        other_hidden = int(shared.integers(1, 200)) * 8
        z = torch.from_numpy(own.standard_normal((num_tokens, other_hidden)).astype(np.float32)).to(device).bfloat16()
        replayed = [buf.dispatch(z, handle=r[5], config=config)[0] for buf, r in ((ours, a), (theirs, b))]
        _same("replayed rows", replayed[0][:num_recv], replayed[1][:num_recv], case)
        y = replayed[1].clone()
        y_weights = torch.nan_to_num(b[3])
        bias = tuple(torch.randn_like(z) for _ in range(num_bias))
        if use_symmetric:
            with ours.symmetric_memory():
                y_ours, w_ours = y.clone(), y_weights.clone()
        else:
            y_ours, w_ours = y.clone(), y_weights.clone()
        combined, combined_weights, _ = ours.combine(y_ours, a[5], w_ours, bias or None, config)
        expected, expected_weights, _ = theirs.combine(y, b[5], y_weights, bias or None, config)
        _same("combined_x", combined, expected, case)
        _same("combined_topk_weights", combined_weights, expected_weights, case)
        how = ours.placement()["x"]
        if how in ("relayed", "copied"):
            how = "elsewhere"
        if has_heap:
            wanted = "pulled in place" if use_symmetric or y.shape[0] == 0 else "elsewhere"
            assert how == wanted, f"combine was {how}, expected {wanted}: {case}"
        counts["cases"] += 1
        counts["empty"] += int((tokens == 0).any())
        counts["fp8"] += int(is_fp8)
        counts[kind] += 1
        counts[how] += 1
    ours.destroy()
    theirs.destroy()
    return counts


def _same_handles(ours: Any, theirs: Any, rank: int, case: object) -> int:
    """Compare all parts that say something; returns how many rows were received."""
    assert len(ours) == len(theirs)
    if len(ours) == 6:
        num_recv = int(theirs[0][-1, rank])
        parts = {0: None, 3: num_recv, 5: None}
    else:
        num_recv = int(theirs[6][-1])
        parts = dict.fromkeys(range(1, 9)) | {7: num_recv, 9: int(theirs[4][-1])}
    for part, num_rows in parts.items():
        _same(f"part {part} of the handle", ours[part][:num_rows], theirs[part][:num_rows], case)
    return num_recv


def layout_of(buffer: Buffer, topk_idx: torch.Tensor, num_experts: int) -> dict[str, Any]:
    """The arguments of a dispatch that the layout gives."""
    per_rank, per_node, per_expert, in_rank, _ = buffer.get_dispatch_layout(topk_idx, num_experts)
    layout = {"num_tokens_per_rank": per_rank, "num_tokens_per_expert": per_expert, "is_token_in_rank": in_rank}
    return layout if per_node is None else layout | {"num_tokens_per_rdma_rank": per_node}


def hash_of(*tensors: torch.Tensor) -> torch.Tensor:
    """A number that changes if a bit or its place changes; stays on the device."""
    total = torch.zeros((), dtype=torch.int64, device=tensors[0].device)
    for tensor in tensors:
        words = tensor.contiguous().view(torch.int16).flatten().long()
        places = torch.arange(words.numel(), device=words.device) % 8191 + 1
        total = total * 31 + (words * places).sum()
    return total


def soak(context: RankContext, backend: str, num_iterations: int) -> tuple[int, int]:
    """The same calls again and again over poisoned memory; returns how many different hashes came, and the first."""
    torch.manual_seed(context.rank)
    buffer = buffer_of(context, backend)
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
            x, topk_idx=topk_idx, topk_weights=weights, **layout_of(buffer, topk_idx, num_experts)
        )
        with buffer.symmetric_memory():
            y = recv * 2
        if i % 3 == 0:
            y = y.clone()  # where peers cannot reach it
        combined, combined_weights, _ = buffer.combine(y, handle, recv_weights)
        assert combined_weights is not None
        hashes[i] = hash_of(recv, combined, combined_weights.view(torch.bfloat16))
    different = int(hashes.unique().numel())
    first = int(hashes[0])
    buffer.destroy()
    return different, first


def graph_replay(context: RankContext, backend: str, num_replays: int, ranks_per_node: int | None = None) -> int:
    """Capture layout, dispatch and combine; replay with new inputs each time; returns how many replays were wrong."""
    torch.manual_seed(100 + context.rank)
    buffer = buffer_of(context, backend)
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
            **layout_of(buffer, topk_idx, num_experts),
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
        # Every rank gives the row back as it came: a node's part is the row times its ranks, exactly in float32.
        num_holders = in_rank.view(num_tokens, -1, ranks_per_node or context.num_ranks).sum(2, keepdim=True)
        expected = (x.float()[:, None] * num_holders).bfloat16().float().sum(1).bfloat16()
        wrong += (combined != expected).any() | (combined_weights != weights).any()
    total = int(wrong)
    del graph
    buffer.destroy()
    return total


def missing_caller(context: RankContext, backend: str, absent: int) -> tuple[str, list[int], float, bool]:
    """One rank leaves out a combine: the others learn who, in time, and the buffer works again after `reset`."""
    buffer = buffer_of(context, backend, timeout_s=2.0)
    device = context.device
    num_experts = 4 * context.num_ranks
    x = torch.randn((64, 512), device=device).bfloat16()
    topk_idx = torch.rand((64, num_experts), device=device).topk(4).indices
    weights = torch.rand((64, 4), device=device)

    def round_trip() -> bool:
        recv, _, recv_weights, _, handle, _ = buffer.dispatch(
            x, topk_idx=topk_idx, topk_weights=weights, **layout_of(buffer, topk_idx, num_experts)
        )
        _, back, _ = buffer.combine(recv, handle, recv_weights)
        torch.cuda.synchronize()
        assert back is not None
        return bool(torch.equal(back, weights))

    assert round_trip()
    recv, _, _, _, handle, _ = buffer.dispatch(
        x, topk_idx=topk_idx, topk_weights=weights, **layout_of(buffer, topk_idx, num_experts)
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


def many_buffers(context: RankContext, backend: str, num_cycles: int) -> list[int]:
    """Free device memory after each build and destroy, three buffers at once."""
    free: list[int] = []
    for _ in range(num_cycles):
        buffers = [buffer_of(context, backend) for _ in range(3)]
        for buffer in buffers:
            x = torch.ones((16, 64), device=context.device).bfloat16()
            idx = torch.zeros((16, 1), dtype=torch.int64, device=context.device)
            recv = buffer.dispatch(
                x, topk_idx=idx, topk_weights=idx.float(), **layout_of(buffer, idx, context.num_ranks)
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
