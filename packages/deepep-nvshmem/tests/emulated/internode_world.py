"""Ranks of several nodes in one process: what the kernels across nodes need and nothing of the backend around.

GPUs and NVSHMEM are those of ``tests/emulator``: launches are kept until ``World.sync`` runs them, every rank has a
symmetric heap of its own, and what is put to another rank lands late.

Symbols: ``N`` ranks, ``D`` nodes, ``P`` ranks of a node, ``T`` tokens of a rank, ``K`` choices, ``H`` bytes of a row,
``E`` experts, ``S`` scales, ``R`` rows received, ``F`` rows that a rank passes on to its node.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[4] / "tests/emulator"))
import emulator


def native() -> Any:
    """The extension."""
    return emulator.extension("_nvshmem", "deepep_nvshmem")[0]


def machine() -> Any:
    """Its emulator."""
    return emulator.extension("_nvshmem", "deepep_nvshmem")[1]


def obstacle_to_emulation() -> str | None:
    """Why these tests cannot run: there are GPUs, where the backend's own tests do it, or no emulator can be built."""
    if not emulator.is_chosen():
        return "runs on the emulator alone; on GPUs the backend's tests do this (or DEEPEP_EMULATED=1)"
    return emulator.obstacle()


LEAST_RING_BYTES = 4096
_NODE_WIDTH = 8  # of send_nvl_head


@dataclass(frozen=True, kw_only=True)
class Case:
    num_tokens: tuple[int, ...]
    ranks_per_node: int = 2
    hidden_bytes: int = 256
    dtype: torch.dtype = torch.bfloat16
    num_scales: int = 0
    scales_layout: str = "row"  # row, column, sparse
    num_topk: int = 4
    num_experts: int = 16
    routing: str = "random"  # random, some_unused, none, to_rank_0, other_nodes, own_node, one_group, bad
    index_bits: int = 64
    alignment: int = 1
    num_biases: int = 0
    num_ring_messages: int = 0  # of the larger kind that fit in a ring; 0: many
    chunk_bytes: int = 0
    num_sms: int = 2
    use_bulk: bool = True
    tuning: tuple[tuple[str, int], ...] = (("num_send_warps", 4),)  # of dispatch; fewer warps run faster here
    num_forward_warps: int = 0  # of combine
    answers_directly: bool = True  # combine, where others are reached by stores
    combine_tuning: tuple[tuple[str, int], ...] = ()
    has_stores: bool = False  # ranks of other nodes are reached by stores, as over NVLink
    seed: int = 0

    @property
    def num_ranks(self) -> int:
        return len(self.num_tokens)

    @property
    def num_nodes(self) -> int:
        return self.num_ranks // self.ranks_per_node

    @property
    def ring_bytes(self) -> int:
        shape = {"num_topk": self.num_topk, "ranks_per_node": self.ranks_per_node}
        least: int = native().Runtime.least_ring_bytes(
            num_row_bytes=self.hidden_bytes, num_scales=self.num_scales, **shape
        )
        return max(LEAST_RING_BYTES, least // 2 * (self.num_ring_messages or 400))

    @property
    def name(self) -> str:
        parts = [
            f"{self.num_nodes}x{self.ranks_per_node}",
            "T" + "-".join(map(str, self.num_tokens if len(set(self.num_tokens)) > 1 else self.num_tokens[:1])),
            f"{self.hidden_bytes}B",
            f"top{self.num_topk}of{self.num_experts}",
            self.routing,
        ]
        parts += [f"S{self.num_scales}{self.scales_layout}"] if self.num_scales else []
        parts += [f"ring{self.num_ring_messages}"] if self.num_ring_messages else []
        parts += ["stores"] if self.has_stores else []
        parts += [f"{self.num_sms}sms"] + ([] if self.use_bulk else ["plain"])
        parts += [f"{name}{value}" for name, value in self.tuning if self.tuning != Case.tuning]
        parts += [] if self.answers_directly else ["ring"]
        parts += [f"{name}{value}" for name, value in self.combine_tuning]
        return "_".join(parts) + (f"_seed{self.seed}" if self.seed else "")

    def next(self) -> Case:
        return replace(self, seed=self.seed + 1)


class World:
    """``N`` runtimes over ordinary memory: an arena for each, of which the others of its node know, and a heap."""

    def __init__(
        self,
        num_ranks: int,
        ranks_per_node: int,
        *,
        ring_bytes: int,
        chunk_bytes: int = 0,
        max_local_experts: int = 64,
        arena_bytes: int = 4 << 20,
        timeout_s: float = 0.5,
        has_stores: bool = False,  # ranks of other nodes are reached by stores, as over NVLink
    ) -> None:
        self.num_ranks = num_ranks
        sizes = {
            "num_ranks": num_ranks,
            "ranks_per_node": ranks_per_node,
            "max_local_experts": max_local_experts,
            "num_ring_bytes": ring_bytes,
        }
        self._heaps, stride = machine().open_heaps(num_ranks, native().Runtime.network_bytes(**sizes), has_stores)
        storage = [torch.empty(arena_bytes + 256, dtype=torch.uint8) for _ in range(num_ranks)]
        self.arenas = [memory[-memory.data_ptr() % 256 :][:arena_bytes] for memory in storage]
        pointers = [arena.data_ptr() for arena in self.arenas]
        self.runtimes = [
            native().Runtime(
                rank=rank,
                device=0,
                arena_ptrs=pointers[rank // ranks_per_node * ranks_per_node :][:ranks_per_node],
                num_arena_bytes=arena_bytes,
                network_ptr=self._heaps + rank * stride,
                num_chunk_bytes=chunk_bytes,
                **sizes,
            )
            for rank in range(num_ranks)
        ]
        for runtime in self.runtimes:
            runtime.set_timeout_ns(int(timeout_s * 1e9))
        self.window_bytes = native().Runtime.window_bytes(ranks_per_node=ranks_per_node)
        self.used = [self.window_bytes] * num_ranks
        self.ticket = 0
        self.members: Sequence[int] = range(num_ranks)  # the ranks that launch
        self.launched: list[Any] = []  # what launches that have not run yet will use

    def stream(self, rank: int) -> int:
        return 1 + rank

    def tensor(self, rank: int, shape: tuple[int, ...], dtype: torch.dtype) -> torch.Tensor:
        """Poisoned memory in the rank's arena."""
        num_bytes = torch.Size(shape).numel() * dtype.itemsize
        begin = -(-self.used[rank] // 512) * 512
        self.used[rank] = begin + num_bytes
        assert self.used[rank] <= self.arenas[rank].numel(), "the test's arena is too small"
        return self.arenas[rank][begin : begin + num_bytes].fill_(0xFF).view(dtype).view(shape)

    def sync(self) -> None:
        machine().run()
        self.launched.clear()

    def errors(self) -> list[str]:
        return [repr(e) for e in (runtime.error() for runtime in self.runtimes) if e is not None]

    def check(self) -> None:
        self.sync()
        assert not self.errors(), self.errors()

    def reset(self) -> None:
        native().network_quiet()
        for rank, runtime in enumerate(self.runtimes):
            runtime.reset(stream=self.stream(rank))

    def close(self) -> None:
        for runtime in self.runtimes:
            runtime.close()
        machine().close_heaps(self._heaps)


def poisoned(shape: tuple[int, ...], dtype: torch.dtype) -> torch.Tensor:
    """Private memory of a rank."""
    tensor = torch.empty(shape, dtype=dtype)
    if tensor.numel():
        tensor.view(torch.uint8).fill_(0xFF)
    return tensor


@dataclass
class Rank:
    """One rank's tensors of a case, but for those of one dispatch or combine."""

    x: torch.Tensor
    scales: torch.Tensor | None
    topk_idx: torch.Tensor
    topk_weights: torch.Tensor
    layout: dict[str, torch.Tensor]
    routing: dict[str, torch.Tensor]
    bad: torch.Tensor
    expert_counts: torch.Tensor
    send_nvl_head: torch.Tensor = field(default_factory=lambda: poisoned((0, _NODE_WIDTH), torch.int32))


@dataclass
class Received:
    """One rank's outputs of a dispatch."""

    x: torch.Tensor
    scales: torch.Tensor | None
    topk_idx: torch.Tensor
    topk_weights: torch.Tensor
    src_meta: torch.Tensor


@dataclass
class Combined:
    """One rank's expert outputs, and what it gets back."""

    y: torch.Tensor
    weights: torch.Tensor | None
    biases: list[torch.Tensor]
    out: torch.Tensor
    out_weights: torch.Tensor


def _choices(case: Case, rank: int, generator: torch.Generator) -> torch.Tensor:
    t, k, e, n, p = case.num_tokens[rank], case.num_topk, case.num_experts, case.num_ranks, case.ranks_per_node
    score = torch.rand((t, e), generator=generator)
    ranks = torch.arange(e) // (e // n)
    if case.routing == "to_rank_0":
        score[:, ranks != 0] = -1.0
    elif case.routing == "other_nodes":
        score[:, ranks // p == rank // p] = -1.0
    elif case.routing == "own_node":
        score[:, ranks // p != rank // p] = -1.0
    elif case.routing == "one_group":  # each token goes to one node
        node = torch.randint(0, n // p, (t, 1), generator=generator)
        score[(ranks // p)[None] != node] = -1.0
    best = score.topk(k, dim=1)
    idx = torch.where(best.values < 0, -1, best.indices)
    if case.routing == "some_unused":
        idx = torch.where(torch.rand((t, k), generator=generator) < 0.5, -1, idx)
    elif case.routing == "none":
        idx = torch.full_like(idx, -1)
    elif case.routing == "bad":
        idx = torch.where(torch.rand((t, k), generator=generator) < 0.2, e + 5, idx)
        idx = torch.where(torch.rand((t, k), generator=generator) < 0.2, -7, idx)
    elif case.routing == "repeated":
        idx = torch.randint(-1, min(e, 5), (t, k), generator=generator)
    return idx


def random_rows(shape: tuple[int, int], dtype: torch.dtype, generator: torch.Generator) -> torch.Tensor:
    """Rows of that many bytes: random bytes, or bfloat16 of very different sizes, so that the order of a sum shows."""
    if dtype == torch.uint8:
        return torch.randint(0, 256, shape, dtype=torch.uint8, generator=generator)
    values = torch.randn((shape[0], shape[1] // 2), generator=generator)
    return (values * torch.exp2(torch.randint(-6, 7, values.shape, generator=generator).float())).to(torch.bfloat16)


def make_rank(case: Case, rank: int) -> Rank:
    g = torch.Generator().manual_seed(1000 * case.seed + rank)
    t, k, e, n, d = case.num_tokens[rank], case.num_topk, case.num_experts, case.num_ranks, case.num_nodes
    idx = _choices(case, rank, g)
    scales = torch.rand((t, case.num_scales), generator=g) if case.num_scales else None
    if scales is not None and case.scales_layout == "column":
        scales = scales.t().contiguous().t()
    elif scales is not None and case.scales_layout == "sparse":
        scales = torch.repeat_interleave(scales, 3, dim=1)[:, ::3]
    int32 = torch.int32
    return Rank(
        x=random_rows((t, case.hidden_bytes), case.dtype, g),
        scales=scales,
        topk_idx=idx.to(torch.int64 if case.index_bits == 64 else int32).contiguous(),
        topk_weights=torch.randn((t, k), generator=g),
        layout={
            "num_tokens_per_rank": poisoned((n,), int32),
            "num_tokens_per_node": poisoned((d,), int32),
            "num_tokens_per_expert": poisoned((e,), int32),
            "is_token_in_rank": poisoned((t, n), torch.uint8),
        },
        routing={
            "rdma_channel_prefix": poisoned((d,), int32),
            "gbl_channel_prefix": poisoned((n,), int32),
            "recv_rdma_channel_prefix": poisoned((d,), int32),
            "recv_rdma_rank_prefix": poisoned((d,), int32),
            "recv_gbl_channel_prefix": poisoned((n,), int32),
            "recv_gbl_rank_prefix": poisoned((n,), int32),
            "send_rdma_head": poisoned((t, d), int32),
            "dst_rows": poisoned((t, n), int32),
            "tokens_to_node": poisoned((d, t), int32),
        },
        bad=poisoned((1,), int32),
        expert_counts=poisoned((e // n,), int32),
    )


def make_ranks(case: Case) -> list[Rank]:
    return [make_rank(case, rank) for rank in range(case.num_ranks)]


def _pointers(tensors: dict[str, torch.Tensor]) -> dict[str, int]:
    return {name: tensor.data_ptr() for name, tensor in tensors.items()}


def _pointer(tensor: torch.Tensor | None) -> int:
    return 0 if tensor is None else tensor.data_ptr()


def layout(world: World, case: Case, ranks: Sequence[Rank]) -> None:
    world.launched.append(ranks)
    for rank in world.members:
        r = ranks[rank]
        world.runtimes[rank].layout(
            topk_idx=r.topk_idx.data_ptr(),
            topk_idx_bits=case.index_bits,
            num_tokens=r.x.shape[0],
            num_topk=case.num_topk,
            num_experts=case.num_experts,
            num_bad_indices=r.bad.data_ptr(),
            stream=world.stream(rank),
            **_pointers(r.layout),
        )


def notify(world: World, case: Case, ranks: Sequence[Rank], *, has_ticket: bool = True) -> None:
    world.ticket += 1
    world.launched.append(ranks)
    for rank in world.members:
        r = ranks[rank]
        world.runtimes[rank].notify(
            fields=[case.hidden_bytes, case.num_topk],
            num_tokens=r.x.shape[0],
            num_experts=case.num_experts,
            expert_alignment=case.alignment,
            recv_tokens_per_expert=r.expert_counts.data_ptr(),
            num_bad_indices=r.bad.data_ptr(),
            ticket=world.ticket if has_ticket else 0,
            stream=world.stream(rank),
            **_pointers(r.layout),
            **_pointers(r.routing),
        )


def make_received(world: World, case: Case, capacities: Sequence[int]) -> list[Received]:
    def of(rank: int, rows: int) -> Received:
        make = lambda shape, dtype: world.tensor(rank, shape, dtype)  # noqa: E731
        return Received(
            x=make((rows, case.hidden_bytes // case.dtype.itemsize), case.dtype),
            scales=make((rows, case.num_scales), torch.float32) if case.num_scales else None,
            topk_idx=make((rows, case.num_topk), torch.int64),
            topk_weights=make((rows, case.num_topk), torch.float32),
            src_meta=make((rows, 2), torch.int32),
        )

    return [of(rank, rows) for rank, rows in enumerate(capacities)]


def dispatch(
    world: World,
    case: Case,
    ranks: Sequence[Rank],
    received: Sequence[Received],
    *,
    is_cached: bool = False,
    is_unlisted: bool = False,  # cached: tokens_to_node is made again
    fill: bool = False,
    **more: Any,
) -> list[bool]:
    world.launched.append((ranks, received))

    def launch(rank: int) -> bool:
        r, out = ranks[rank], received[rank]
        launched: bool = world.runtimes[rank].dispatch(
            x=r.x.data_ptr(),
            num_row_bytes=case.hidden_bytes,
            scales=_pointer(r.scales),
            num_scales=case.num_scales,
            scales_stride_token=r.scales.stride(0) if r.scales is not None else 0,
            scales_stride_col=r.scales.stride(1) if r.scales is not None else 0,
            topk_idx=0 if is_cached else r.topk_idx.data_ptr(),
            topk_idx_bits=case.index_bits,
            topk_weights=0 if is_cached else r.topk_weights.data_ptr(),
            num_tokens=r.x.shape[0],
            num_topk=0 if is_cached else case.num_topk,
            num_experts=case.num_experts,
            is_cached=is_cached,
            unlisted_rdma_head=r.routing["send_rdma_head"].data_ptr() if is_unlisted else 0,
            send_nvl_head=r.send_nvl_head.data_ptr(),
            forward_capacity=r.send_nvl_head.shape[0],
            recv_x=out.x.data_ptr(),
            recv_scales=_pointer(out.scales),
            recv_topk_idx=0 if is_cached else out.topk_idx.data_ptr(),
            recv_topk_weights=0 if is_cached else out.topk_weights.data_ptr(),
            recv_src_meta=0 if is_cached else out.src_meta.data_ptr(),
            capacity=out.x.shape[0],
            fill_unused=fill,
            num_sms=case.num_sms,
            use_bulk=case.use_bulk,
            stream=world.stream(rank),
            **dict.fromkeys(("dst_rows",), 0 if is_cached else r.routing["dst_rows"].data_ptr()),
            **{
                name: r.routing[name].data_ptr()
                for name in (
                    "tokens_to_node",
                    "rdma_channel_prefix",
                    "recv_rdma_rank_prefix",
                    "recv_gbl_rank_prefix",
                )
            },
            **dict(case.tuning),
            **more,
        )
        return launched

    return [launch(rank) for rank in world.members]


def make_combined(
    world: World, case: Case, rows: Sequence[int | Received], *, weights: bool = True, seed: int = 0
) -> list[Combined]:
    """Random expert outputs for so many rows, or the received rows themselves."""

    def of(rank: int, source: int | Received) -> Combined:
        g = torch.Generator().manual_seed(77 + 1000 * (case.seed + seed) + rank)
        t, k = case.num_tokens[rank], case.num_topk
        if isinstance(source, Received):
            y, w = source.x, source.topk_weights
        else:
            y = world.tensor(rank, (source, case.hidden_bytes // 2), torch.bfloat16)
            y.copy_(random_rows((source, case.hidden_bytes), torch.bfloat16, g))
            w = world.tensor(rank, (source, k), torch.float32)
            w.copy_(torch.randn((source, k), generator=g))
        return Combined(
            y=y,
            weights=w if weights else None,
            biases=[random_rows((t, case.hidden_bytes), torch.bfloat16, g) for _ in range(case.num_biases)],
            out=poisoned((t, case.hidden_bytes // 2), torch.bfloat16),
            out_weights=poisoned((t, k), torch.float32),
        )

    return [of(rank, source) for rank, source in enumerate(rows)]


def combine(world: World, case: Case, ranks: Sequence[Rank], combined: Sequence[Combined]) -> None:
    world.launched.append((ranks, combined))
    for rank in world.members:
        r, c = ranks[rank], combined[rank]
        biases = [_pointer(bias) for bias in c.biases] + [0, 0]
        world.runtimes[rank].combine(
            x=c.y.data_ptr(),
            num_recv_tokens=c.y.shape[0],
            num_row_bytes=case.hidden_bytes,
            topk_weights=_pointer(c.weights),
            num_topk=case.num_topk if c.weights is not None else 0,
            bias_0=biases[0],
            bias_1=biases[1],
            recv_rdma_rank_prefix=r.routing["recv_rdma_rank_prefix"].data_ptr(),
            send_rdma_head=r.routing["send_rdma_head"].data_ptr(),
            send_nvl_head=r.send_nvl_head.data_ptr(),
            num_forward_rows=r.send_nvl_head.shape[0],
            num_tokens=r.x.shape[0],
            out=c.out.data_ptr(),
            out_topk_weights=c.out_weights.data_ptr(),
            num_sms=case.num_sms,
            num_warps=case.num_forward_warps,
            may_send_directly=case.answers_directly,
            stream=world.stream(rank),
            **dict(case.combine_tuning),
        )
