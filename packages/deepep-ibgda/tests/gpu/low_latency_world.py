"""Several ranks in one process, each on a GPU (or sharing them): what kernels need and nothing of the backend around.

Without GPUs (or with ``DEEPEP_EMULATED=1``) they are those of ``tests/emulator``: launches are kept until
``World.sync`` runs them.

Symbols: ``N`` ranks, ``X`` most tokens of a rank, ``T`` tokens of a rank, ``K`` choices, ``H`` hidden size, ``E``
experts, ``L = E / N`` experts of a rank, ``M = N X`` rows of a local expert.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[4] / "tests/emulator"))
import emulator

EMULATED = emulator.is_chosen()
SEND, RECEIVE = 1, 2
BOTH = SEND + RECEIVE


def native() -> Any:
    """The extension."""
    return emulator.extension("_ibgda", "deepep_ibgda")[0]


def machine() -> Any:
    """Its emulator."""
    return emulator.extension("_ibgda", "deepep_ibgda")[1]


SHARED_GPUS = os.environ.get("DEEPEP_TEST_SHARED_GPUS") == "1"
CASTS = ("bf16", "fp8", "fp8_round", "ue8m0")


@dataclass(frozen=True, kw_only=True)
class Case:
    num_tokens: tuple[int, ...]
    max_tokens: int = 0  # 0: the most of num_tokens, at least 1
    hidden: int = 1024
    num_topk: int = 4
    num_experts: int = 16
    cast: str = "fp8"
    routing: str = "random"  # random, some_unused, none, to_rank_0, uneven, repeated
    with_weights: bool = False
    specials: bool = False  # all-ones words, NaN and infinities among the values
    use_logfmt: bool = False
    index_bits: int = 64
    num_sms: int = 8
    with_stats: bool = False
    padding: int = 0  # elements between rows of the expert outputs
    seed: int = 0

    @property
    def num_ranks(self) -> int:
        return len(self.num_tokens)

    @property
    def limit(self) -> int:
        return self.max_tokens or max(1, *self.num_tokens)

    @property
    def num_local(self) -> int:
        return self.num_experts // self.num_ranks

    @property
    def num_rows(self) -> int:
        return self.num_ranks * self.limit

    @property
    def name(self) -> str:
        parts = [
            f"{self.num_ranks}ranks",
            "T" + "-".join(map(str, sorted(set(self.num_tokens)))),
            f"H{self.hidden}",
            f"top{self.num_topk}of{self.num_experts}",
            self.cast,
            self.routing,
            f"{self.num_sms}sms",
        ]
        for flag in ("with_weights", "specials", "use_logfmt", "with_stats"):
            parts += [flag] if getattr(self, flag) else []
        return "_".join(parts)

    def next(self) -> Case:
        return replace(self, seed=self.seed + 1)


class World:
    """``N`` runtimes in ordinary tensors; peer access comes from torch's first copy between two devices."""

    def __init__(
        self,
        num_ranks: int,
        arena_bytes: int = 64 << 20,
        *,
        ll_reduce: str = "rank",
        enable_shrink: bool = False,
        timeout_s: float = 5.0,
        ranks_per_node: int = 0,  # ranks of different nodes reach each other through the software NIC; 0: one node
    ) -> None:
        assert (native().SEND, native().RECEIVE) == (SEND, RECEIVE)
        self.num_ranks = num_ranks
        self.ll_reduce = ll_reduce
        self.devices = [rank % torch.cuda.device_count() if SHARED_GPUS else rank for rank in range(num_ranks)]
        for a in set(self.devices if not EMULATED else ()):
            for b in set(self.devices):
                torch.ones(8, device=f"cuda:{a}").to(f"cuda:{b}")
        # Torch aligns memory of the host to 64 bytes.
        self.arenas = [
            torch.empty(arena_bytes + 256, dtype=torch.uint8, device=self.device(r)) for r in range(num_ranks)
        ]
        pointers = [(arena.data_ptr() + 255) // 256 * 256 for arena in self.arenas]
        node = [rank // (ranks_per_node or num_ranks) for rank in range(num_ranks)]
        is_remote = [[node[peer] != node[rank] for peer in range(num_ranks)] for rank in range(num_ranks)]
        self.nics = [
            native().SoftwareNic(
                rank=rank,
                device=self.devices[rank],
                arena_ptrs=pointers,
                num_arena_bytes=arena_bytes,
                is_remote=is_remote[rank],
            )
            for rank in range(num_ranks)
            if any(is_remote[rank])
        ]
        for nic in self.nics:
            nic.start()
        self.runtimes = [
            native().Runtime(
                rank=rank,
                num_ranks=num_ranks,
                device=self.devices[rank],
                arena_ptrs=[0 if is_remote[rank][peer] else pointers[peer] for peer in range(num_ranks)],
                num_arena_bytes=arena_bytes,
                ll_reduce=ll_reduce,
                enable_shrink=enable_shrink,
                rdma_view=self.nics[rank].view_ptr if self.nics else 0,
            )
            for rank in range(num_ranks)
        ]
        for runtime in self.runtimes:
            runtime.set_timeout_ns(int((60.0 if SHARED_GPUS else timeout_s) * 1e9))
            if EMULATED or SHARED_GPUS:  # as many blocks as on a GPU of a rank's own there are not
                runtime.set_least_divided_blocks(4 if EMULATED else 24)
        self.streams: list[Any] = (
            [emulator.Stream(1 + rank) for rank in range(num_ranks)]
            if EMULATED
            else [torch.cuda.Stream(device=d) for d in self.devices]
        )
        self.only: int | None = None  # launches of one rank alone, for capture
        self.held: list[Any] = []  # what launches refer to, until they have run

    def ranks(self) -> list[int]:
        return list(range(self.num_ranks)) if self.only is None else [self.only]

    def device(self, rank: int) -> torch.device:
        return torch.device("cpu") if EMULATED else torch.device("cuda", self.devices[rank])

    def sync(self) -> None:
        if EMULATED:
            machine().set_alone(not self.nics)
            machine().run()
        for device in set(self.devices if not EMULATED else ()):
            torch.cuda.synchronize(device)
        self.held.clear()

    def errors(self) -> list[str]:
        return [repr(e) for e in (runtime.error() for runtime in self.runtimes) if e is not None]

    def check(self) -> None:
        self.sync()
        assert not self.errors(), self.errors()

    def reset(self) -> None:
        self.sync()
        for runtime, stream in zip(self.runtimes, self.streams, strict=True):
            runtime.reset(stream=stream.cuda_stream)
        self.sync()

    def close(self) -> None:
        self.sync()
        for runtime in self.runtimes:
            runtime.close()
        for nic in self.nics:
            nic.close()


def poisoned(shape: Sequence[int], dtype: torch.dtype, device: torch.device) -> torch.Tensor:
    tensor = torch.empty(tuple(shape), dtype=dtype, device=device)
    if tensor.numel():
        tensor.view(torch.uint8).fill_(0xFF)
    return tensor


@dataclass
class Inputs:
    """One rank's tokens."""

    x: torch.Tensor
    topk_idx: torch.Tensor
    topk_weights: torch.Tensor


@dataclass
class Received:
    """One rank's outputs of dispatch."""

    x: torch.Tensor
    scales: torch.Tensor | None  # storage [L, scale words, M]
    count: torch.Tensor
    layout_range: torch.Tensor
    handle: torch.Tensor
    stats: torch.Tensor | None
    wait_stats: torch.Tensor | None

    def src_info(self, case: Case) -> torch.Tensor:
        return self.handle[: case.num_local * case.num_rows].view(case.num_local, case.num_rows)


@dataclass
class Combining:
    """One rank's expert outputs and result."""

    x: torch.Tensor  # [L, M, H + padding]
    out: torch.Tensor
    ticket: torch.Tensor
    wait_stats: torch.Tensor | None = None
    topk_weights: torch.Tensor | None = None
    extra: dict[str, Any] = field(default_factory=dict)


def _special(values: torch.Tensor, generator: torch.Generator) -> torch.Tensor:
    """Some values replaced by NaN of all ones (whole words of them), other NaN, infinities, zeros, subnormals."""
    bits = values.view(torch.int16)
    draw = torch.rand(bits.shape, device=bits.device, generator=generator)
    for low, pattern in ((0.0, -1), (0.02, 0x7FC1), (0.04, 0x7F80), (0.06, -128), (0.08, 0), (0.1, 1), (0.12, -32768)):
        bits = torch.where((draw >= low) & (draw < low + 0.02), pattern, bits)
    pairs = bits.view(torch.int32)
    whole = torch.rand(pairs.shape, device=bits.device, generator=generator) < 0.05
    pairs = torch.where(whole, -1, pairs)
    # The first words of the first row are ones, too, and its last ones the first candidates for an escape.
    if pairs.numel():
        flat = pairs.view(-1)
        flat[0] = -1
        count = min(70, pairs.shape[-1] - 1)
        flat[1 : 1 + count] = 0x7FC10000 + torch.arange(count, device=bits.device, dtype=torch.int32)
    return pairs.view(torch.bfloat16)


def make_inputs(world: World, case: Case) -> list[Inputs]:
    result = []
    for rank in range(case.num_ranks):
        device = world.device(rank)
        g = torch.Generator(device=device).manual_seed(1000 * case.seed + rank)
        t, k, e, local = case.num_tokens[rank], case.num_topk, case.num_experts, case.num_local
        scale = torch.rand((t, 1), device=device, generator=g) * 4
        x = (torch.randn((t, case.hidden), device=device, generator=g) * scale).to(torch.bfloat16)
        if case.specials:
            x = _special(x, g)
        idx = torch.rand((t, e), device=device, generator=g).argsort(dim=1)[:, :k]
        if case.routing == "to_rank_0":
            idx = torch.rand((t, local), device=device, generator=g).argsort(dim=1)[:, : min(k, local)]
            idx = torch.nn.functional.pad(idx, (0, k - idx.shape[1]), value=-1)
        elif case.routing == "uneven":
            # Rank 0 holds nearly all rows: all of a token's choices, one of them, or those that come its way.
            on_first = torch.rand((t, local), device=device, generator=g).argsort(dim=1)[:, : min(k, local)]
            on_first = torch.nn.functional.pad(on_first, (0, k - on_first.shape[1]), value=-1)
            alone = torch.where(torch.arange(k, device=device) == 0, on_first, -1)
            kind = torch.arange(t, device=device)[:, None] % 4
            idx = torch.where(kind == 3, idx, torch.where(kind == 2, alone, on_first))
        elif case.routing == "some_unused":
            idx = torch.where(torch.rand((t, k), device=device, generator=g) < 0.5, -1, idx)
        elif case.routing == "none":
            idx = torch.full_like(idx, -1)
        elif case.routing == "repeated":
            idx = torch.randint(-1, min(e, 6), (t, k), device=device, generator=g)
        weights = torch.randn((t, k), device=device, generator=g)
        index_type = torch.int64 if case.index_bits == 64 else torch.int32
        result.append(Inputs(x=x.contiguous(), topk_idx=idx.to(index_type).contiguous(), topk_weights=weights))
    return result


def payload_dtype(case: Case) -> torch.dtype:
    return torch.bfloat16 if case.cast == "bf16" else torch.float8_e4m3fn


def make_received(world: World, case: Case) -> list[Received]:
    result = []
    for rank in range(case.num_ranks):
        device = world.device(rank)
        words = native().Runtime.handle_words(
            num_ranks=case.num_ranks, max_tokens=case.limit, num_experts=case.num_experts, num_topk=case.num_topk
        )
        scales = None
        if case.cast != "bf16":
            num_scales = case.hidden // (512 if case.cast == "ue8m0" else 128)
            scale_type = torch.int32 if case.cast == "ue8m0" else torch.float32
            scales = poisoned((case.num_local, num_scales, case.num_rows), scale_type, device)
        result.append(
            Received(
                x=poisoned((case.num_local, case.num_rows, case.hidden), payload_dtype(case), device),
                scales=scales,
                count=poisoned((case.num_local,), torch.int32, device),
                layout_range=poisoned((case.num_local, case.num_ranks), torch.int64, device),
                handle=poisoned((words,), torch.int32, device),
                stats=torch.full((case.num_local,), 7, dtype=torch.int32, device=device) if case.with_stats else None,
                wait_stats=torch.zeros(case.num_ranks, dtype=torch.int64, device=device) if case.with_stats else None,
            )
        )
    return result


def pointer(tensor: torch.Tensor | None) -> int:
    return 0 if tensor is None else tensor.data_ptr()


def dispatch(
    world: World,
    case: Case,
    inputs: list[Inputs],
    received: list[Received],
    phases: int = BOTH,
    *,
    discard: bool = False,
    ranks: Sequence[int] | None = None,
) -> None:
    world.held.append((inputs, received))
    for rank in world.ranks() if ranks is None else ranks:
        i, r = inputs[rank], received[rank]
        world.runtimes[rank].dispatch(
            x=i.x.data_ptr(),
            topk_idx=i.topk_idx.data_ptr(),
            topk_idx_bits=case.index_bits,
            topk_weights=i.topk_weights.data_ptr(),
            has_weights=case.with_weights,
            num_tokens=i.x.shape[0],
            hidden=case.hidden,
            num_topk=case.num_topk,
            max_tokens=case.limit,
            num_experts=case.num_experts,
            use_fp8=case.cast != "bf16",
            round_scale=case.cast in ("fp8_round", "ue8m0"),
            use_ue8m0=case.cast == "ue8m0",
            recv_x=0 if discard else r.x.data_ptr(),
            recv_scales=0 if discard else pointer(r.scales),
            recv_count=0 if discard else r.count.data_ptr(),
            layout_range=0 if discard else r.layout_range.data_ptr(),
            handle=r.handle.data_ptr(),
            cumulative_stats=0 if discard else pointer(r.stats),
            wait_stats=0 if discard else pointer(r.wait_stats),
            phases=phases,
            num_sms=case.num_sms,
            stream=world.streams[rank].cuda_stream,
        )


def make_combining(world: World, case: Case) -> list[Combining]:
    result = []
    for rank in range(case.num_ranks):
        device = world.device(rank)
        g = torch.Generator(device=device).manual_seed(77 + 1000 * case.seed + rank)
        shape = (case.num_local, case.num_rows, case.hidden + case.padding)
        y = torch.randn(shape, device=device, generator=g).to(torch.bfloat16)
        if case.specials:
            y = _special(y, g)
        result.append(
            Combining(
                x=y,
                out=poisoned((case.num_tokens[rank], case.hidden), torch.bfloat16, device),
                ticket=poisoned((native().Runtime.ticket_words(num_ranks=case.num_ranks),), torch.int32, device),
                wait_stats=torch.zeros(case.num_ranks, dtype=torch.int64, device=device) if case.with_stats else None,
            )
        )
    return result


def combine(
    world: World,
    case: Case,
    inputs: list[Inputs],
    received: list[Received],
    combining: list[Combining],
    phases: int = BOTH,
    *,
    discard: bool = False,
    ranks: Sequence[int] | None = None,
) -> None:
    world.held.append((inputs, received, combining))
    for rank in world.ranks() if ranks is None else ranks:
        i, r, c = inputs[rank], received[rank], combining[rank]
        world.runtimes[rank].combine(
            x=c.x.data_ptr(),
            row_stride=case.hidden + case.padding,
            topk_idx=i.topk_idx.data_ptr(),
            topk_idx_bits=case.index_bits,
            topk_weights=i.topk_weights.data_ptr(),
            handle=r.handle.data_ptr(),
            ticket=c.ticket.data_ptr(),
            num_tokens=i.x.shape[0],
            hidden=case.hidden,
            num_topk=case.num_topk,
            max_tokens=case.limit,
            num_experts=case.num_experts,
            use_logfmt=case.use_logfmt,
            out=0 if discard else c.out.data_ptr(),
            wait_stats=pointer(c.wait_stats),
            phases=phases,
            num_sms=case.num_sms,
            stream=world.streams[rank].cuda_stream,
        )
