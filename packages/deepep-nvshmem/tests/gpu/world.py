"""Several ranks in one process, each on a GPU (or sharing them): what kernels need and nothing of the backend around.

Without GPUs (or with ``DEEPEP_EMULATED=1``) they are those of ``tests/emulator``: launches are kept until
``World.sync`` or a wait for counts runs them.

Symbols: ``N`` ranks, ``T`` tokens of a rank, ``K`` choices, ``H`` bytes of a row, ``E`` experts, ``S`` scales, ``R``
rows received.
"""

from __future__ import annotations

import ctypes
import os
import sys
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[4] / "tests/emulator"))
import emulator

EMULATED = emulator.is_chosen()


def native() -> Any:
    """The extension."""
    return emulator.extension("_nvlink", "deepep_nvshmem")[0]


def machine() -> Any:
    """Its emulator."""
    return emulator.extension("_nvlink", "deepep_nvshmem")[1]


DTYPE_BYTES = {torch.uint8: 1, torch.bfloat16: 2}


@dataclass(frozen=True, kw_only=True)
class Case:
    num_tokens: tuple[int, ...]
    hidden_bytes: int = 1024
    dtype: torch.dtype = torch.bfloat16
    num_scales: int = 0
    scales_layout: str = "row"  # row, column, sparse
    num_topk: int = 4
    num_experts: int = 16
    routing: str = "random"  # random, to_rank_0, some_unused, none, repeated, bad
    index_bits: int = 64
    alignment: int = 1
    num_sms: int = 8
    use_bulk: bool = True
    staged: tuple[bool, ...] = ()  # per rank: outputs and y outside the arena
    relay: bool = False  # y outside the arena gets room for a relay
    num_biases: int = 0
    seed: int = 0

    @property
    def num_ranks(self) -> int:
        return len(self.num_tokens)

    @property
    def name(self) -> str:
        parts = [
            f"{self.num_ranks}ranks",
            "T" + "-".join(map(str, self.num_tokens)),
            f"{self.hidden_bytes}B",
            f"top{self.num_topk}of{self.num_experts}",
            self.routing,
        ]
        parts += [f"S{self.num_scales}{self.scales_layout}"] if self.num_scales else []
        parts += (
            [f"{self.num_sms}sms"]
            + ([] if self.use_bulk else ["plain"])
            + (["staged" + "".join(map(str, map(int, self.staged)))] if any(self.staged) else [])
        )
        return "_".join(parts)


class RawMemory:
    """Device memory that torch did not allocate, as ``torch.as_tensor`` takes it."""

    def __init__(self, address: int, num_bytes: int) -> None:
        self.__cuda_array_interface__ = {
            "shape": (num_bytes,),
            "typestr": "|u1",
            "data": (address, False),
            "version": 3,
        }


class World:
    """``N`` runtimes, whose arenas are ordinary tensors or symmetric memory exported and imported as file descriptors.

    Peer access to ordinary tensors comes from torch's first copy between two devices.
    """

    def __init__(
        self,
        num_ranks: int,
        arena_bytes: int,
        *,
        devices: list[int] | None = None,
        staging_bytes: int = 64 << 20,
        timeout_s: float = 4.0,
        symmetric: bool = False,
    ) -> None:
        self.num_ranks = num_ranks
        self.devices = devices or list(range(num_ranks))
        for a in self.devices if not EMULATED else ():
            for b in self.devices:
                torch.ones(8, device=f"cuda:{a}").to(f"cuda:{b}")
        if symmetric:
            self.keep: list = [native().Arena(device=d, num_reserved_bytes=arena_bytes) for d in self.devices]
            own = list(self.keep)
            for arena in own:  # two segments, to have a seam inside
                arena.grow(arena_bytes // 2)
                arena.grow(arena_bytes - arena.num_bytes)
            arena_bytes = own[0].num_bytes
            self.arenas = [
                self._tensor_of(arena.base, arena_bytes, d) for arena, d in zip(own, self.devices, strict=True)
            ]
            pointers_of = [
                [
                    self._map(own[peer], self.devices[rank]) if peer != rank else own[rank].base
                    for peer in range(num_ranks)
                ]
                for rank in range(num_ranks)
            ]
        else:
            # torch aligns memory of the host to 64 bytes
            whole = [torch.empty(arena_bytes + 256, dtype=torch.uint8, device=self._device(d)) for d in self.devices]
            self.arenas = [w[-w.data_ptr() % 256 :][:arena_bytes] for w in whole]
            pointers_of = [[arena.data_ptr() for arena in self.arenas]] * num_ranks
        self.window_bytes = native().Runtime.window_bytes(
            num_ranks=num_ranks, max_local_experts=512, num_staging_bytes=staging_bytes
        )
        self.runtimes = [
            native().Runtime(
                rank=r,
                num_ranks=num_ranks,
                device=self.devices[r],
                arena_ptrs=pointers_of[r],
                num_arena_bytes=arena_bytes,
                max_local_experts=512,
                num_staging_bytes=staging_bytes,
            )
            for r in range(num_ranks)
        ]
        for runtime in self.runtimes:
            runtime.set_timeout_ns(int(timeout_s * 1e9))
        self.streams: list[Any] = (
            [emulator.Stream(1 + rank) for rank in range(num_ranks)]
            if EMULATED
            else [torch.cuda.Stream(device=d) for d in self.devices]
        )
        self.used = [self.window_bytes] * num_ranks
        self.ticket = 0
        self.poison = torch.full((64 << 20 if EMULATED else 0,), 0xFD, dtype=torch.uint8)
        self.held: list[Any] = []  # what streams of the emulator refer to
        self.only: int | None = None  # launches of one rank alone, for capture

    @staticmethod
    def _device(device: int) -> torch.device:
        return torch.device("cpu") if EMULATED else torch.device("cuda", device)

    def _tensor_of(self, address: int, num_bytes: int, device: int) -> torch.Tensor:
        if EMULATED:
            return torch.frombuffer((ctypes.c_uint8 * num_bytes).from_address(address), dtype=torch.uint8)
        return torch.as_tensor(RawMemory(address, num_bytes), device=self._device(device))

    def _map(self, arena, device: int) -> int:
        peer = native().PeerArena(device=device, num_reserved_bytes=arena.num_bytes)
        for segment in range(2):
            fd = arena.export_fd(segment)
            peer.map(fd, arena.segment_bytes(segment))
            os.close(fd)
        self.keep.append(peer)
        return peer.base

    def members(self, *per_rank: list) -> list[tuple]:
        """(runtime, stream, ...) of the ranks that launch."""
        everyone = list(zip(self.runtimes, self.streams, *per_rank, strict=True))
        return everyone if self.only is None else [everyone[self.only]]

    def release(self) -> None:
        self.used = [self.window_bytes] * self.num_ranks

    def tensor(self, rank: int, shape: tuple[int, ...], dtype: torch.dtype, *, symmetric: bool) -> torch.Tensor:
        """Poisoned memory, in the arena or outside."""
        count = 1
        for n in shape:
            count *= n
        num_bytes = count * torch.empty(0, dtype=dtype).element_size()
        if not symmetric:
            raw = torch.empty(max(num_bytes, 1), dtype=torch.uint8, device=self.arenas[rank].device)
        else:
            begin = -(-self.used[rank] // 512) * 512
            self.used[rank] = begin + num_bytes
            assert self.used[rank] <= self.arenas[rank].numel(), "the test's arena is too small"
            raw = self.arenas[rank][begin : begin + num_bytes]
        raw.fill_(0xFF)
        return raw[:num_bytes].view(dtype).view(shape)

    def sync(self) -> None:
        if EMULATED:
            machine().run()
            self.held.clear()
            return
        for device in self.devices:
            torch.cuda.synchronize(device)

    def errors(self) -> list[str]:
        return [repr(e) for e in (runtime.error() for runtime in self.runtimes) if e is not None]

    def check(self) -> None:
        self.sync()
        assert not self.errors(), self.errors()


def copy_behind(stream: emulator.Stream, to: torch.Tensor, source: torch.Tensor) -> None:
    """On the emulator: behind what the stream holds. Both have to live until that has run."""
    machine().copy_behind(stream.cuda_stream, to.data_ptr(), source.data_ptr(), source.nbytes)


@dataclass
class Rank:
    """One rank's tensors of a case."""

    x: torch.Tensor
    scales: torch.Tensor | None
    topk_idx: torch.Tensor
    topk_weights: torch.Tensor
    num_tokens_per_rank: torch.Tensor
    num_tokens_per_expert: torch.Tensor
    is_token_in_rank: torch.Tensor
    bad: torch.Tensor
    rank_prefix: torch.Tensor
    send_head: torch.Tensor
    expert_counts: torch.Tensor
    outputs: dict[str, torch.Tensor] = field(default_factory=dict)
    seen: dict[str, torch.Tensor] = field(default_factory=dict)  # by what follows dispatch in its stream (emulated)


def random_rows(
    shape: tuple[int, int], dtype: torch.dtype, device: torch.device, generator: torch.Generator
) -> torch.Tensor:
    """``[rows, bytes]`` random bytes, or random finite bfloat16 of that many bytes."""
    if dtype == torch.uint8:
        return torch.randint(0, 256, shape, dtype=torch.uint8, device=device, generator=generator)
    return torch.randn((shape[0], shape[1] // 2), device=device, generator=generator).to(torch.bfloat16)


def make_rank(world: World, case: Case, rank: int) -> Rank:
    device = world.arenas[rank].device
    g = torch.Generator(device=device).manual_seed(1000 * case.seed + rank)
    t, k, e, n = case.num_tokens[rank], case.num_topk, case.num_experts, case.num_ranks
    idx_type = torch.int64 if case.index_bits == 64 else torch.int32
    idx = (
        torch.rand((t, e), device=device, generator=g).topk(k, dim=1).indices
        if t
        else torch.empty((0, k), dtype=torch.int64, device=device)
    )
    if case.routing == "to_rank_0":
        idx = torch.rand((t, e // n), device=device, generator=g).topk(min(k, e // n), dim=1).indices if t else idx
        idx = torch.nn.functional.pad(idx, (0, k - idx.shape[1]), value=-1)
    elif case.routing == "some_unused":
        idx = torch.where(torch.rand((t, k), device=device, generator=g) < 0.5, -1, idx)
    elif case.routing == "none":
        idx = torch.full_like(idx, -1)
    elif case.routing == "repeated":
        idx = torch.randint(-1, min(e, 6), (t, k), device=device, generator=g)
    elif case.routing == "bad":
        idx = torch.where(torch.rand((t, k), device=device, generator=g) < 0.2, e + 5, idx)
        idx = torch.where(torch.rand((t, k), device=device, generator=g) < 0.2, -7, idx)
    scales = None
    if case.num_scales:
        scales = torch.rand((t, case.num_scales), device=device, generator=g)
        if case.scales_layout == "column":
            scales = scales.t().contiguous().t()
        elif case.scales_layout == "sparse":
            scales = torch.repeat_interleave(scales, 3, dim=1)[:, ::3]
    i32 = {"dtype": torch.int32, "device": device}
    return Rank(
        x=random_rows((t, case.hidden_bytes), case.dtype, device, g),
        scales=scales,
        topk_idx=idx.to(idx_type).contiguous(),
        topk_weights=torch.rand((t, k), device=device, generator=g),
        num_tokens_per_rank=torch.full((n,), -9, **i32),
        num_tokens_per_expert=torch.full((e,), -9, **i32),
        is_token_in_rank=torch.full((t, n), True, device=device),
        bad=torch.full((1,), -9, **i32),
        rank_prefix=torch.full((n, n), -9, **i32),
        send_head=torch.full((t, n), -9, **i32),
        expert_counts=torch.full((e // n,), -9, **i32),
    )


def layout(world: World, case: Case, ranks: list[Rank]) -> None:
    for runtime, stream, r in world.members(ranks):
        runtime.layout(
            topk_idx=r.topk_idx.data_ptr(),
            topk_idx_bits=case.index_bits,
            num_tokens=r.x.shape[0],
            num_topk=case.num_topk,
            num_experts=case.num_experts,
            num_tokens_per_rank=r.num_tokens_per_rank.data_ptr(),
            num_tokens_per_expert=r.num_tokens_per_expert.data_ptr(),
            is_token_in_rank=r.is_token_in_rank.data_ptr(),
            num_bad_indices=r.bad.data_ptr(),
            stream=stream.cuda_stream,
        )


def notify(world: World, case: Case, ranks: list[Rank], *, ticket: bool = True) -> None:
    world.ticket += 1
    for runtime, stream, r in world.members(ranks):
        runtime.notify(
            fields=[case.hidden_bytes, case.num_topk],
            num_tokens=r.x.shape[0],
            num_experts=case.num_experts,
            expert_alignment=case.alignment,
            num_tokens_per_rank=r.num_tokens_per_rank.data_ptr(),
            num_tokens_per_expert=r.num_tokens_per_expert.data_ptr(),
            is_token_in_rank=r.is_token_in_rank.data_ptr(),
            rank_prefix=r.rank_prefix.data_ptr(),
            send_head=r.send_head.data_ptr(),
            recv_tokens_per_expert=r.expert_counts.data_ptr(),
            num_bad_indices=r.bad.data_ptr(),
            ticket=world.ticket if ticket else 0,
            stream=stream.cuda_stream,
        )


def is_staged(case: Case, rank: int) -> bool:
    return bool(case.staged) and case.staged[rank]


def allocate(world: World, case: Case, ranks: list[Rank], capacities: list[int]) -> None:
    for rank, (r, rows) in enumerate(zip(ranks, capacities, strict=True)):
        make = lambda shape, dtype, rank=rank: world.tensor(rank, shape, dtype, symmetric=not is_staged(case, rank))  # noqa: E731
        width = case.hidden_bytes // DTYPE_BYTES[case.dtype]
        r.outputs = {
            "x": make((rows, width), case.dtype),
            "topk_idx": make((rows, case.num_topk), torch.int64),
            "topk_weights": make((rows, case.num_topk), torch.float32),
            "src_idx": make((rows,), torch.int32),
        }
        if case.num_scales:
            r.outputs["scales"] = make((rows, case.num_scales), torch.float32)


def dispatch(
    world: World, case: Case, ranks: list[Rank], *, cached: bool = False, fill: bool = False, **tuning: float
) -> list[str | None]:
    how = []
    for runtime, stream, r in world.members(ranks):
        out = r.outputs
        how.append(
            runtime.dispatch(
                x=r.x.data_ptr(),
                num_row_bytes=case.hidden_bytes,
                scales=r.scales.data_ptr() if r.scales is not None else 0,
                num_scales=case.num_scales,
                scales_stride_token=r.scales.stride(0) if r.scales is not None else 0,
                scales_stride_col=r.scales.stride(1) if r.scales is not None else 0,
                topk_idx=0 if cached else r.topk_idx.data_ptr(),
                topk_idx_bits=case.index_bits,
                topk_weights=0 if cached else r.topk_weights.data_ptr(),
                num_tokens=r.x.shape[0],
                num_topk=0 if cached else case.num_topk,
                num_experts=case.num_experts,
                rank_prefix=r.rank_prefix.data_ptr(),
                send_head=r.send_head.data_ptr(),
                has_src_idx=not cached,
                recv_x=out["x"].data_ptr(),
                recv_scales=out["scales"].data_ptr() if "scales" in out else 0,
                recv_topk_idx=0 if cached else out["topk_idx"].data_ptr(),
                recv_topk_weights=0 if cached else out["topk_weights"].data_ptr(),
                recv_src_idx=0 if cached else out["src_idx"].data_ptr(),
                capacity=out["x"].shape[0],
                fill_unused=fill,
                num_sms=case.num_sms,
                stream=stream.cuda_stream,
                use_bulk=case.use_bulk,
                **tuning,
            )
        )
        r.seen = out
        if EMULATED:
            r.seen = {name: torch.empty_like(tensor) for name, tensor in out.items()}
            world.held.append(r.seen)
            for name, tensor in out.items():
                copy_behind(stream, r.seen[name], tensor)
    return how


@dataclass
class Back:
    """One rank's tensors of a combine."""

    y: torch.Tensor
    weights: torch.Tensor
    biases: list[torch.Tensor]
    out: torch.Tensor
    out_weights: torch.Tensor
    relay: torch.Tensor | None
    given_y: torch.Tensor  # on the emulator, y and weights are overwritten when combine has ended
    given_weights: torch.Tensor


def make_back(world: World, case: Case, rank: int, num_rows: int) -> Back:
    device = world.arenas[rank].device
    g = torch.Generator(device=device).manual_seed(77 + 1000 * case.seed + rank)
    t = case.num_tokens[rank]
    y = world.tensor(rank, (num_rows, case.hidden_bytes // 2), torch.bfloat16, symmetric=not is_staged(case, rank))
    y.copy_(random_rows((num_rows, case.hidden_bytes), torch.bfloat16, device, g))
    relays = case.relay and is_staged(case, rank)
    has_reach = relays or not is_staged(case, rank)
    weights = world.tensor(rank, (num_rows, case.num_topk), torch.float32, symmetric=has_reach)
    weights.copy_(torch.rand((num_rows, case.num_topk), device=device, generator=g))
    return Back(
        y=y,
        weights=weights,
        biases=[random_rows((t, case.hidden_bytes), torch.bfloat16, device, g) for _ in range(case.num_biases)],
        out=world.tensor(rank, (t, case.hidden_bytes // 2), torch.bfloat16, symmetric=False),
        out_weights=world.tensor(rank, (t, case.num_topk), torch.float32, symmetric=False),
        relay=world.tensor(rank, tuple(y.shape), torch.bfloat16, symmetric=True) if relays else None,
        given_y=y.clone() if EMULATED else y,
        given_weights=weights.clone() if EMULATED else weights,
    )


def combine(
    world: World, case: Case, ranks: list[Rank], backs: list[Back], *, weights: bool = True, **tuning: int
) -> list[str]:
    how = []
    for runtime, stream, r, b in world.members(ranks, backs):
        biases = [bias.data_ptr() for bias in b.biases] + [0, 0]
        own = [(b.y, b.given_y), (b.weights, b.given_weights)]
        if EMULATED:
            for tensor, given in own:
                copy_behind(stream, tensor, given)
        how.append(
            runtime.combine(
                y=b.y.data_ptr(),
                num_recv_tokens=b.y.shape[0],
                num_row_bytes=case.hidden_bytes,
                topk_weights=b.weights.data_ptr() if weights else 0,
                num_topk=case.num_topk if weights else 0,
                bias_0=biases[0],
                bias_1=biases[1],
                rank_prefix=r.rank_prefix.data_ptr(),
                send_head=r.send_head.data_ptr(),
                num_tokens=r.x.shape[0],
                out=b.out.data_ptr(),
                out_topk_weights=b.out_weights.data_ptr(),
                num_sms=case.num_sms,
                stream=stream.cuda_stream,
                use_bulk=case.use_bulk,
                relay=b.relay.data_ptr() if b.relay is not None else 0,
                **tuning,
            )
        )
        if EMULATED:
            for tensor in (b.y, b.weights, *([] if b.relay is None else [b.relay])):
                copy_behind(stream, tensor, world.poison[: tensor.nbytes])
    return how
