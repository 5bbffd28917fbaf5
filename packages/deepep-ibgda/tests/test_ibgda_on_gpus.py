"""The backend ``ibgda`` on real GPUs: against the reference, for long, in graphs, beside normal mode, with lost peers.

Symbols: ``T`` tokens of this rank, ``K`` choices, ``H`` hidden size, ``E`` experts, ``L`` experts of a rank.
"""

from __future__ import annotations

import os
import signal
import time
from typing import Any

import numpy as np
import pytest
import torch
import torch.distributed as dist

from deep_ep import Buffer, BufferStateError, PeerTimeoutError
from deep_ep.launch import RankContext, RankFailure, run_ranks

pytestmark = pytest.mark.gpu(2)

GPU_COUNTS = [pytest.param(n, id=f"{n}-gpus", marks=pytest.mark.gpu(n)) for n in (2, 4)]
DEADLINE_S = 2.0


def _buffer(context: RankContext, backend: Any = None, **options: Any) -> Buffer:
    options.setdefault("timeout_s", 20.0)
    chosen = backend or {"low_latency": "ibgda"}
    return Buffer(context.group, 1 << 20, 1 << 20, low_latency_mode=True, backend=chosen, **options)


def _valid(rows: torch.Tensor, counts: torch.Tensor) -> torch.Tensor:
    """bool ``[L, M]``: which rows hold something."""
    return torch.arange(rows.shape[1], device=rows.device)[None, :] < counts[:, None]


def _bits(tensor: torch.Tensor) -> torch.Tensor:
    # Not contiguous(): it leaves the strides of a dimension of size 1 as they are, and view refuses them.
    return tensor.clone(memory_format=torch.contiguous_format).view(torch.uint8)


def _same(name: str, ours: torch.Tensor, theirs: torch.Tensor, case: object) -> None:
    assert ours.shape == theirs.shape and ours.dtype == theirs.dtype, f"{name}: {ours.shape} {theirs.shape}: {case}"
    if not torch.equal(_bits(ours), _bits(theirs)):
        first = (_bits(ours) != _bits(theirs)).nonzero()[0].tolist()
        raise AssertionError(f"{name} differs first at byte {first} of {tuple(ours.shape)}: {case}")


def _choices(random: np.random.Generator, num_tokens: int, num_topk: int, num_experts: int, drop: float) -> np.ndarray:
    idx = np.stack([random.permutation(num_experts)[:num_topk] for _ in range(num_tokens)] or [np.empty(num_topk)])
    idx = idx[:num_tokens].astype(np.int64)
    idx[random.random(idx.shape) < drop] = -1
    return idx


def _combined_of_identity(
    x: torch.Tensor, topk_idx: torch.Tensor, weights: torch.Tensor, num_local: int, num_ranks: int
) -> torch.Tensor:
    """What combine has to give where every expert returns what it got: each rank's part rounded, then their sum."""
    total = torch.zeros(x.shape, device=x.device)
    for rank in range(num_ranks):
        partial = torch.zeros_like(total)
        for k in range(topk_idx.shape[1]):
            here = (topk_idx[:, k] // num_local == rank) & (topk_idx[:, k] >= 0)
            partial = torch.where(here[:, None], partial + weights[:, k, None] * x.float(), partial)
        total += partial.bfloat16().float()
    return total.bfloat16()


# --- against the reference ------------------------------------------------------------------------------------------


def generated_shapes(context: RankContext, first_seed: int, num_cases: int, ll_reduce: Any) -> dict[str, int]:
    """Random shapes on both backends, bit for bit; returns how often each kind came up."""
    ours = _buffer(context, ll_reduce=ll_reduce)
    theirs = _buffer(context, "reference", ll_reduce=ll_reduce)
    kinds = dict.fromkeys(("cases", "empty", "fp8", "ue8m0", "hook", "weights", "all ones"), 0)
    for seed in range(first_seed, first_seed + num_cases):
        shared, own = np.random.default_rng(seed), np.random.default_rng([seed, context.rank])
        num_local = int(shared.integers(1, 9))
        num_experts = num_local * context.num_ranks
        num_topk = int(shared.integers(1, min(32, num_experts) + 1))
        use_ue8m0 = bool(shared.random() < 0.2)
        use_fp8 = use_ue8m0 or bool(shared.random() < 0.4)
        hidden = int(shared.integers(1, 17)) * (512 if use_ue8m0 else 128 if use_fp8 else 8)
        max_tokens = int(shared.choice([1, 5, 64, 130]))
        tokens = shared.integers(0, max_tokens + 1, context.num_ranks)
        split, with_weights = bool(shared.integers(0, 2)), bool(shared.integers(0, 2))
        has_all_ones = not use_fp8 and bool(shared.random() < 0.3)
        num_tokens, device = int(tokens[context.rank]), context.device
        case = {
            "seed": seed,
            "rank": context.rank,
            "tokens": tokens.tolist(),
            "hidden": hidden,
            "topk": num_topk,
            "experts": num_experts,
        }
        topk_idx = torch.from_numpy(_choices(own, num_tokens, num_topk, num_experts, 0.15)).to(device)
        if shared.integers(0, 2):
            topk_idx = topk_idx.int()
        weights = torch.from_numpy(own.random((num_tokens, num_topk), dtype=np.float32)).to(device)
        values = own.standard_normal((num_tokens, hidden)) * np.exp2(own.integers(-12, 12, (num_tokens, 1)))
        x = torch.from_numpy(values.astype(np.float32)).to(device).bfloat16()
        if has_all_ones:
            x.view(torch.int16)[:, : hidden // 2] = -1  # NaNs of all ones travel bit for bit
        stats = [torch.full((num_local,), 5, dtype=torch.int32, device=device) for _ in range(2)]
        results = []
        for buffer, added in zip((ours, theirs), stats, strict=True):
            received, counts, handle, _, hook = buffer.low_latency_dispatch(
                x,
                topk_idx,
                max_tokens,
                num_experts,
                cumulative_local_expert_recv_stats=added,
                use_fp8=use_fp8,
                round_scale=use_ue8m0,
                use_ue8m0=use_ue8m0,
                return_recv_hook=split,
                topk_weights=weights if with_weights else None,
            )
            if hook is not None:
                hook()
            results.append((received, counts, handle))
        (a, a_counts, a_handle), (b, b_counts, b_handle) = results
        _same("recv_count", a_counts, b_counts, case)
        _same("statistics", stats[0], stats[1], case)
        _same("layout_range", a_handle[1], b_handle[1], case)
        valid = _valid(a_handle[0], b_counts)
        _same("src_info", a_handle[0][valid], b_handle[0][valid], case)
        parts = list(zip(a, b, strict=True)) if use_fp8 else [(a, b)]
        for name, (one, other) in zip(("recv_x", "scales"), parts, strict=False):
            _same(name, _bits(one)[valid], _bits(other)[valid], case)
        noise = torch.from_numpy(own.standard_normal((*a_handle[0].shape, hidden)).astype(np.float32))
        y = noise.to(device).bfloat16()
        y[~valid] = float("nan")
        if not use_fp8 and not has_all_ones:
            y = torch.where(valid[..., None], y + b, y)
        combined = []
        for buffer, handle in ((ours, a_handle), (theirs, b_handle)):
            out, _, hook = buffer.low_latency_combine(y, topk_idx, weights, handle, return_recv_hook=split)
            if hook is not None:
                hook()
            combined.append(out)
        _same("combined_x", combined[0], combined[1], case)
        for name, happened in (
            ("cases", True),
            ("empty", bool((tokens == 0).any())),
            ("fp8", use_fp8),
            ("ue8m0", use_ue8m0),
            ("hook", split),
            ("weights", with_weights),
            ("all ones", has_all_ones),
        ):
            kinds[name] += int(happened)
    ours.destroy()
    theirs.destroy()
    return kinds


@pytest.mark.parametrize("num_gpus", GPU_COUNTS)
def test_generated_shapes_equal_the_reference(rank_pools: Any, num_gpus: int) -> None:
    pool = rank_pools.get("cuda", num_ranks=num_gpus)
    kinds = pool.run(generated_shapes, 1000 * num_gpus, 300, "rank", num_ranks=num_gpus, timeout_s=400)[0]
    assert kinds["cases"] == 300 and kinds["empty"] >= 20
    assert min(kinds["fp8"], kinds["ue8m0"], kinds["hook"], kinds["weights"], kinds["all ones"]) >= 30


@pytest.mark.parametrize("num_gpus", GPU_COUNTS)
def test_generated_shapes_summed_at_the_source_equal_the_reference(rank_pools: Any, num_gpus: int) -> None:
    pool = rank_pools.get("cuda", num_ranks=num_gpus)
    kinds = pool.run(generated_shapes, 3000 * num_gpus, 100, "expert", num_ranks=num_gpus, timeout_s=300)[0]
    assert kinds["cases"] == 100


@pytest.mark.gpu(4)
@pytest.mark.parametrize("ranks_per_node", [1, 2])
def test_generated_shapes_across_nodes_equal_the_reference(rank_pools: Any, ranks_per_node: int) -> None:
    environment = {"DEEPEP_RANKS_PER_NODE": str(ranks_per_node)}
    pool = rank_pools.get("cuda", num_ranks=4)
    kinds = pool.run(
        generated_shapes, 7000 * ranks_per_node, 60, "rank", num_ranks=4, timeout_s=400, environment=environment
    )[0]
    assert kinds["cases"] == 60


# --- for long, and in graphs ----------------------------------------------------------------------------------------


def soak(context: RankContext, pairs_per_replay: int, num_replays: int) -> tuple[list[int], list[int]]:
    """The same two pairs again and again in a graph; the smallest and the largest number that each one hashed to."""
    torch.manual_seed(context.rank)
    buffer = _buffer(context)
    num_tokens, hidden, num_topk, num_local, device = 20 + 7 * context.rank, 1024, 6, 4, context.device
    num_experts, max_tokens = num_local * context.num_ranks, 64
    x = torch.randn((num_tokens, hidden), device=device).bfloat16()
    topk_idx = torch.rand((num_tokens, num_experts), device=device).topk(num_topk).indices
    weights = torch.rand((num_tokens, num_topk), device=device)
    places = torch.arange(hidden, device=device) % 8191 + 1
    bounds = torch.iinfo(torch.int64)
    least, most = (torch.full((2,), bound, dtype=torch.int64, device=device) for bound in (bounds.max, bounds.min))

    def one_pair(use_fp8: bool) -> None:
        received, counts, handle, _, hook = buffer.low_latency_dispatch(
            x, topk_idx, max_tokens, num_experts, use_fp8=use_fp8, return_recv_hook=use_fp8
        )
        if hook is not None:
            hook()
        rows = received[0].to(torch.bfloat16) if use_fp8 else received
        combined, _, _ = buffer.low_latency_combine(rows, topk_idx, weights, handle)
        rows.fill_(float("nan"))  # whoever reads it again will notice
        number = (combined.view(torch.int16).long() * places).sum() * 31 + counts.sum()
        for extreme, choose in ((least, torch.minimum), (most, torch.maximum)):
            choose(extreme[int(use_fp8)], number, out=extreme[int(use_fp8)])

    for use_fp8 in (False, True):
        one_pair(use_fp8)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, capture_error_mode="thread_local"):
        for i in range(pairs_per_replay):
            one_pair(use_fp8=i % 2 == 1)
    for i in range(num_replays):
        graph.replay()
        if i % 500 == 0:
            one_pair(use_fp8=i % 1000 == 0)
    torch.cuda.synchronize()
    buffer.destroy()
    return least.tolist(), most.tolist()


@pytest.mark.parametrize("num_gpus", GPU_COUNTS)
def test_a_hundred_thousand_chained_pairs_give_one_hash(rank_pools: Any, num_gpus: int) -> None:
    results = rank_pools.get("cuda", num_ranks=num_gpus).run(soak, 20, 5_000, num_ranks=num_gpus, timeout_s=300)
    for least, most in results:
        assert least == most and 0 not in least


def replays(context: RankContext, num_graphs: int, num_replays: int) -> list[str]:
    """Graphs of different shapes, replayed in random order with new inputs, eager calls in between."""
    buffer, device, num_ranks = _buffer(context), context.device, context.num_ranks
    shared = np.random.default_rng(17)
    torch.manual_seed(1000 + context.rank)
    wrong: list[str] = []

    class Captured:
        def __init__(self, number: int) -> None:
            self.hidden = 128 * int(shared.integers(1, 17))
            self.num_topk = int(shared.integers(1, 9))
            self.num_local = int(shared.integers(2, 9)) + (8 - 1) // num_ranks
            self.max_tokens = int(shared.choice([8, 32, 128]))
            tokens = shared.integers(1, self.max_tokens + 1, num_ranks)
            self.num_tokens = int(tokens[context.rank])
            self.split, self.with_weights = bool(number % 2), bool(number & 2)
            self.x = torch.zeros((self.num_tokens, self.hidden), dtype=torch.bfloat16, device=device)
            self.topk_idx = torch.zeros((self.num_tokens, self.num_topk), dtype=torch.int64, device=device)
            self.weights = torch.zeros((self.num_tokens, self.num_topk), device=device)
            self.refill()
            self.combined = self.step()
            torch.cuda.synchronize()
            self.graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(self.graph, capture_error_mode="thread_local"):
                self.combined = self.step()

        def refill(self) -> None:
            num_experts = self.num_local * num_ranks
            self.x.copy_(torch.randn_like(self.x))
            self.topk_idx.copy_(torch.rand((self.num_tokens, num_experts), device=device).topk(self.num_topk).indices)
            self.topk_idx.masked_fill_(torch.rand_like(self.weights) < 0.1, -1)
            self.weights.copy_(torch.rand_like(self.weights))

        def step(self) -> torch.Tensor:
            rows, _, handle, _, hook = buffer.low_latency_dispatch(
                self.x,
                self.topk_idx,
                self.max_tokens,
                self.num_local * num_ranks,
                use_fp8=False,
                return_recv_hook=self.split,
                topk_weights=self.weights if self.with_weights else None,
            )
            if hook is not None:
                hook()
            combined, _, hook = buffer.low_latency_combine(
                rows, self.topk_idx, self.weights, handle, return_recv_hook=self.split
            )
            if hook is not None:
                hook()
            return combined

        def is_right(self, combined: torch.Tensor) -> bool:
            expected = _combined_of_identity(self.x, self.topk_idx, self.weights, self.num_local, num_ranks)
            return torch.equal(_bits(combined), _bits(expected))

    graphs = [Captured(number) for number in range(num_graphs)]
    for i in range(num_replays):
        one = graphs[int(shared.integers(0, num_graphs))]
        one.refill()
        is_eager = bool(shared.random() < 0.3)
        if is_eager:
            combined = one.step()
        else:
            one.graph.replay()
            combined = one.combined
        if not one.is_right(combined):
            wrong.append(f"replay {i}: graph {graphs.index(one)}, {'eager' if is_eager else 'replayed'}")
    torch.cuda.synchronize()
    buffer.destroy()
    return wrong[:5]


@pytest.mark.parametrize("num_gpus", GPU_COUNTS)
def test_replays_of_eight_graphs_between_eager_calls(rank_pools: Any, num_gpus: int) -> None:
    pool = rank_pools.get("cuda", num_ranks=num_gpus)
    assert pool.run(replays, 8, 1_000, num_ranks=num_gpus, timeout_s=300) == [[]] * num_gpus


def graph_of_a_window_that_was_outgrown(context: RankContext) -> bool:
    """A graph goes on working after the buffer has moved to a larger window."""
    buffer, device = _buffer(context), context.device
    topk_idx = torch.full((2, 1), (context.rank + 1) % context.num_ranks, device=device)
    weights = torch.full((2, 1), 0.5, device=device)

    def pair(x: torch.Tensor, max_tokens: int) -> torch.Tensor:
        rows, _, handle, _, _ = buffer.low_latency_dispatch(x, topk_idx, max_tokens, context.num_ranks, use_fp8=False)
        return buffer.low_latency_combine(rows, topk_idx, weights, handle)[0]

    small = torch.ones((2, 128), dtype=torch.bfloat16, device=device)
    wide = torch.ones((2, 8192), dtype=torch.bfloat16, device=device)
    pair(small, 4)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, capture_error_mode="thread_local"):
        captured = pair(small, 4)
    is_right = True
    for i in range(1, 5):
        small.fill_(2.0 * i)
        graph.replay()
        grown = pair(wide, 1024)
        is_right &= bool((captured == float(i)).all()) and bool((grown == 0.5).all())
    in_capture = torch.cuda.graph(torch.cuda.CUDAGraph(), capture_error_mode="thread_local")
    with pytest.raises(BufferStateError, match="captured"), in_capture:
        buffer.low_latency_dispatch(wide, topk_idx, 8192, context.num_ranks, use_fp8=False, return_recv_hook=True)
    buffer.destroy()
    return is_right


def test_graphs_survive_the_growth_of_the_window(rank_pools: Any) -> None:
    assert rank_pools.get("cuda", num_ranks=2).run(graph_of_a_window_that_was_outgrown, num_ranks=2) == [True, True]


# --- beside normal mode ---------------------------------------------------------------------------------------------


def both_modes(context: RankContext, num_rounds: int) -> int:
    """Low-latency pairs with a normal-mode round trip in between, on one buffer; returns how many were wrong."""
    torch.manual_seed(context.rank)
    buffer = _buffer(context, {"normal": "nvlink", "low_latency": "ibgda"})
    device, num_ranks, num_local = context.device, context.num_ranks, 4
    num_experts, hidden, num_topk = num_local * num_ranks, 512, 4
    wrong = 0
    for _ in range(num_rounds):
        x = torch.randn((40, hidden), device=device).bfloat16()
        topk_idx = torch.rand((40, num_experts), device=device).topk(num_topk).indices
        weights = torch.rand((40, num_topk), device=device)
        rows, _, handle, event, _ = buffer.low_latency_dispatch(
            x, topk_idx, 64, num_experts, use_fp8=False, async_finish=True
        )
        per_rank, _, per_expert, in_rank, _ = buffer.get_dispatch_layout(topk_idx, num_experts)
        received, _, _, _, normal_handle, _ = buffer.dispatch(
            x,
            num_tokens_per_rank=per_rank,
            is_token_in_rank=in_rank,
            num_tokens_per_expert=per_expert,
            topk_idx=topk_idx,
            topk_weights=weights,
        )
        back, _, _ = buffer.combine(received, normal_handle)
        event.current_stream_wait()
        combined, _, _ = buffer.low_latency_combine(rows, topk_idx, weights, handle)
        expected = _combined_of_identity(x, topk_idx, weights, num_local, num_ranks)
        copies = torch.zeros(x.shape, device=device)
        for rank in range(num_ranks):
            copies += x.float() * in_rank[:, rank, None]
        wrong += int(not torch.equal(_bits(combined), _bits(expected)))
        wrong += int(not torch.equal(back, copies.bfloat16()))
    buffer.destroy()
    return wrong


@pytest.mark.parametrize("num_gpus", GPU_COUNTS)
def test_normal_mode_in_between_on_one_buffer(rank_pools: Any, num_gpus: int) -> None:
    from deep_ep import registry

    if "nvlink" not in registry.installed_names():
        pytest.skip("needs the backend nvlink (deepep-nvshmem), which is not installed")
    pool = rank_pools.get("cuda", num_ranks=num_gpus)
    assert pool.run(both_modes, 200, num_ranks=num_gpus, timeout_s=120) == [0] * num_gpus


# --- lost peers -----------------------------------------------------------------------------------------------------


def lost_peer(context: RankContext, lost: int, how: str) -> list[tuple[str, list[int], float]]:
    """One rank stops coming; the others meet its deadline once, mask it, and go on. What each call told, and how long.

    Rank ``lost`` is killed, or just makes no more calls.
    """
    buffer = _buffer(context, enable_shrink=True, timeout_s=DEADLINE_S)
    device, num_ranks, num_local = context.device, context.num_ranks, 2
    num_experts, hidden = num_local * num_ranks, 256
    generator = torch.Generator().manual_seed(context.rank)
    x = torch.randn((6, hidden), generator=generator).bfloat16().to(device)
    topk_idx = torch.rand((6, num_experts), generator=generator).topk(num_local * num_ranks).indices.to(device)
    weights = torch.rand((6, num_experts), generator=generator).to(device)
    told: list[tuple[str, list[int], float]] = []

    def pair(without: int = -1) -> None:
        started, kind = time.monotonic(), ""
        try:
            rows, _, handle, _, _ = buffer.low_latency_dispatch(x, topk_idx, 8, num_experts, use_fp8=False)
            combined, _, _ = buffer.low_latency_combine(rows, topk_idx, weights, handle)
            torch.cuda.synchronize()
            reached = torch.where(topk_idx // num_local == without, -1, topk_idx)
            expected = _combined_of_identity(x, reached, weights, num_local, num_ranks)
            kind = "right" if torch.equal(_bits(combined), _bits(expected)) else "wrong"
        except PeerTimeoutError as error:
            kind = f"PeerTimeoutError{list(error.ranks)}"
        status = torch.zeros(num_ranks, dtype=torch.int32, device=device)
        buffer.low_latency_query_mask_buffer(status)
        told.append((kind, status.tolist(), time.monotonic() - started))

    pair()
    if context.rank == lost:
        if how == "killed":
            torch.cuda.synchronize()
            dist.barrier(context.group)
            os.kill(os.getpid(), signal.SIGKILL)
        dist.barrier(context.group)
        time.sleep(3 * DEADLINE_S)
    else:
        dist.barrier(context.group)
        for _ in range(3):
            pair(without=lost)
    buffer.destroy()
    return told


@pytest.mark.parametrize("num_gpus", GPU_COUNTS)
@pytest.mark.parametrize("how", ["silent", "killed"])
def test_lost_peer_is_masked_at_the_deadline_and_the_others_go_on(num_gpus: int, how: str) -> None:
    lost = num_gpus - 1
    try:
        results = dict(enumerate(run_ranks(lost_peer, lost, how, num_ranks=num_gpus, device="cuda", timeout_s=90.0)))
    except RankFailure as failure:
        assert how == "killed" and set(failure.failures) == {lost}, str(failure)
        results = dict(failure.results)
    masked = [int(rank == lost) for rank in range(num_gpus)]
    for rank in range(num_gpus - 1):
        first, at_deadline, *later = results[rank]
        assert first[:2] == ("right", [0] * num_gpus)
        assert at_deadline[:2] == ("right", masked), f"rank {rank}: {at_deadline}"
        # Two waits (for the dispatch, for the combine) at most: the mask is set at the first.
        assert 0.8 * DEADLINE_S < at_deadline[2] < 3 * DEADLINE_S
        for kind, status, seconds in later:
            assert (kind, status) == ("right", masked)
            assert seconds < 0.5 * DEADLINE_S, f"rank {rank} waited again for the rank that it had masked"


def late_peer(context: RankContext, late: int) -> tuple[str, list[int], float]:
    """Without masks a missing peer is an error that names it."""
    buffer, device = _buffer(context, timeout_s=DEADLINE_S), context.device
    x = torch.ones((4, 128), dtype=torch.bfloat16, device=device)
    topk_idx = torch.arange(context.num_ranks, device=device).repeat(4, 1)

    def dispatch() -> None:
        buffer.low_latency_dispatch(x, topk_idx, 8, context.num_ranks)
        torch.cuda.synchronize()

    dispatch()
    started, kind, ranks = time.monotonic(), "", []
    if context.rank != late:
        dispatch()  # the kernel gives up by itself; no trap, the context stays healthy
        try:
            dispatch()
        except PeerTimeoutError as error:
            kind, ranks = type(error).__name__, list(error.ranks)
            assert f"rank {context.rank}" in str(error) and "low_latency_dispatch" in str(error)
    elapsed = time.monotonic() - started
    dist.barrier(context.group)
    buffer.destroy()
    return kind, ranks, elapsed


@pytest.mark.parametrize("num_gpus", GPU_COUNTS)
def test_missing_caller_is_named_at_the_deadline(rank_pools: Any, num_gpus: int) -> None:
    late = num_gpus - 1
    results = rank_pools.get("cuda", num_ranks=num_gpus).run(late_peer, late, num_ranks=num_gpus, timeout_s=60)
    for rank, (kind, ranks, elapsed) in enumerate(results):
        if rank != late:
            assert kind == "PeerTimeoutError" and ranks == [late] and 0.9 * DEADLINE_S < elapsed < 2 * DEADLINE_S


def many_buffers(context: RankContext, num_cycles: int) -> list[int]:
    """Free device memory after each build and destroy, three buffers at once."""
    free: list[int] = []
    for _ in range(num_cycles):
        buffers = [_buffer(context) for _ in range(3)]
        for buffer in buffers:
            x = torch.ones((4, 128), device=context.device).bfloat16()
            idx = torch.zeros((4, 1), dtype=torch.int64, device=context.device)
            rows = buffer.low_latency_dispatch(x, idx, 8, context.num_ranks, use_fp8=False)[0]
            torch.cuda.synchronize()
        for buffer in reversed(buffers):
            buffer.destroy()
        del rows, buffers
        dist.barrier(context.group)
        torch.cuda.empty_cache()  # what torch caches for each stream it ever used is no leak of ours
        free.append(torch.cuda.mem_get_info()[0])
    return free


@pytest.mark.parametrize("num_gpus", GPU_COUNTS)
def test_build_and_destroy_leaves_no_device_memory_behind(rank_pools: Any, num_gpus: int) -> None:
    results = rank_pools.get("cuda", num_ranks=num_gpus).run(many_buffers, 20, num_ranks=num_gpus, timeout_s=120)
    for free in results:
        assert max(free[2:]) - min(free[2:]) <= 4 << 20, free
