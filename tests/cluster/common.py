"""What the three cluster checks share: options, launching, inputs that every rank can compute for any other, timing.

No rank asks another what to expect. Rows, choices and weights are functions of (seed, rank, token), so each rank works
out what has to arrive from its peers and what its own tokens have to come back as, in plain tensor arithmetic.
"""

from __future__ import annotations

import argparse
import hashlib
import statistics
import sys
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Literal

import torch
import torch.distributed as dist

from deep_ep import Buffer, DeepEPError, PeerRefusedError
from deep_ep.launch import RankContext, RankFailure, join_external, launched_externally, run_ranks

TIMEOUT_S = 1800.0


@dataclass(frozen=True, kw_only=True)
class Options:
    """What the command line says.

    Attributes:
        processes: local ranks to spawn; ignored under a launcher such as torchrun.
        tokens: of each rank (in low-latency mode the most; ranks then hold different numbers).
        hidden, topk, experts: shape of the layer; ``experts`` of the whole group.
        groups: how many groups of experts (those of one rank, or in `internode.py` of one node) a token chooses from;
            0 for all.
        backend: name, or ``None`` for the library's own choice.
        ll_reduce: where low-latency combine sums: ``"rank"`` or ``"expert"``.
        device: ``"cpu"`` or ``"cuda"``.
        pressure: rounds of the pressure test, 0 for none.
        tune: whether to measure.
        seed: of everything random.
    """

    processes: int
    tokens: int
    hidden: int
    topk: int
    experts: int
    groups: int
    backend: str | None
    ll_reduce: Literal["rank", "expert"]
    device: str
    pressure: int
    tune: bool
    seed: int


def parse(description: str, *, tokens: int, hidden: int, topk: int, experts: int, groups: int) -> Options:
    """Options of one check; the keywords are its defaults, made smaller where there is no GPU."""
    on_gpu = torch.cuda.is_available()
    if not on_gpu:
        tokens, hidden = min(tokens, 128), min(hidden, 1024)
    parser = argparse.ArgumentParser(
        description=description, formatter_class=argparse.ArgumentDefaultsHelpFormatter, allow_abbrev=False
    )
    parser.add_argument("--processes", type=int, default=torch.cuda.device_count() or 4, help="local ranks to spawn")
    parser.add_argument("--tokens", type=int, default=tokens, help="tokens of each rank")
    parser.add_argument("--hidden", type=int, default=hidden, help="hidden size")
    parser.add_argument("--topk", type=int, default=topk, help="experts of one token")
    parser.add_argument("--experts", type=int, default=experts, help="experts of the whole group")
    parser.add_argument("--groups", type=int, default=groups, help="groups of experts a token chooses from (0: all)")
    parser.add_argument("--backend", default=None, help="a backend's name; the library chooses without it")
    parser.add_argument(
        "--ll-reduce", choices=("rank", "expert"), default="rank", help="where low-latency sums are made"
    )
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cuda" if on_gpu else "cpu", help="of all tensors")
    parser.add_argument("--pressure", type=int, default=0, metavar="ROUNDS", help="seeds of the pressure test")
    parser.add_argument("--no-tune", dest="tune", action="store_false", help="leave the measurements out")
    parser.add_argument("--seed", type=int, default=0, help="of everything random")
    return Options(**vars(parser.parse_args()))


def launch(check: Callable[[RankContext, Options], None], options: Options) -> int:
    """Run ``check`` on every rank, spawned here or by an outer launcher. Returns the exit code."""
    if launched_externally():
        context = join_external(options.device)
        try:
            check(context, options)
        finally:
            dist.destroy_process_group()
        return 0
    try:
        run_ranks(check, options, num_ranks=options.processes, device=options.device, timeout_s=TIMEOUT_S)
    except RankFailure as failure:
        print(failure, file=sys.stderr)
        return 1
    return 0


# --- inputs ---------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, kw_only=True)
class Inputs:
    """What every rank feeds in, for one seed.

    Attributes:
        seed: of everything below.
        num_tokens: of each rank.
        hidden, num_topk, num_experts: shape of the layer.
        num_groups: experts are cut into so many groups of neighbours ...
        num_chosen_groups: ... and one token chooses from so many of them.
        device: where tensors are put.
    """

    seed: int
    num_tokens: tuple[int, ...]
    hidden: int
    num_topk: int
    num_experts: int
    num_groups: int
    num_chosen_groups: int
    device: torch.device

    @property
    def num_ranks(self) -> int:
        return len(self.num_tokens)

    def rows(self, ranks: torch.Tensor, tokens: torch.Tensor) -> torch.Tensor:
        """bf16 ``[R, H]``: the rows of these tokens of these ranks (``[R]`` each); 510 values between -16 and 16."""
        columns = torch.arange(self.hidden, device=self.device)
        numbers = (ranks * 7_919 + tokens * 104_729 + self.seed * 1_299_709).to(self.device)
        mixed = numbers[:, None] + columns * 15_485_863
        # A few rounds of multiply and shift, so that neighbours in any direction share no pattern.
        for factor in (668_265_263, 374_761_393):
            mixed = ((mixed ^ (mixed >> 15)) * factor) & 0x7FFF_FFFF
        # One byte of mantissa, sign and scale apart: every value is exact in bf16 and none is zero.
        value = ((mixed >> 3) % 255 + 1).float() * torch.where((mixed & 1).bool(), 2.0**-4, -(2.0**-8))
        return value.bfloat16()

    def x(self, rank: int) -> torch.Tensor:
        """bf16 ``[T, H]`` of one rank."""
        tokens = torch.arange(self.num_tokens[rank])
        return self.rows(torch.full_like(tokens, rank), tokens)

    def topk_idx(self, rank: int) -> torch.Tensor:
        """int64 ``[T, K]`` of one rank, as a group-limited gate chooses; every tenth choice is unused (-1)."""
        random = self._generator(rank, 1)
        scores = torch.rand(self.num_tokens[rank], self.num_experts, generator=random)
        grouped = scores.view(-1, self.num_groups, self.num_experts // self.num_groups)
        best = grouped.amax(dim=2).topk(self.num_chosen_groups, dim=1).indices
        allowed = torch.zeros(grouped.shape[:2], dtype=torch.bool).scatter_(1, best, True)
        limited = grouped.masked_fill(~allowed[:, :, None], -1.0).flatten(1)
        values, indices = limited.topk(self.num_topk, dim=1)
        unused = (values < 0) | (torch.rand(values.shape, generator=random) < 0.1)
        return indices.masked_fill(unused, -1).to(self.device)

    def topk_weights(self, rank: int) -> torch.Tensor:
        """float32 ``[T, K]`` of one rank, between 0.5 and 1.5."""
        shape = (self.num_tokens[rank], self.num_topk)
        return (torch.rand(shape, generator=self._generator(rank, 2)) + 0.5).to(self.device)

    def _generator(self, rank: int, purpose: int) -> torch.Generator:
        return torch.Generator().manual_seed((self.seed * 1_000_003 + rank) * 31 + purpose)


def chosen_groups(options: Options, num_groups: int) -> int:
    """``--groups``, where 0 and too many mean all."""
    return min(options.groups or num_groups, num_groups)


# --- comparison -----------------------------------------------------------------------------------------------------


class Digest:
    """One hash over many tensors: two runs agree if and only if all bits of all tensors do."""

    def __init__(self) -> None:
        self._hash = hashlib.blake2b(digest_size=16)

    def add(self, *tensors: torch.Tensor | None) -> None:
        for tensor in tensors:
            if tensor is not None:
                self._hash.update(tensor.detach().cpu().contiguous().view(torch.uint8).numpy().tobytes())

    def __str__(self) -> str:
        return self._hash.hexdigest()


class Report:
    """Prints what was checked, on rank 0 only; a failed check is an exception on the rank that sees it."""

    def __init__(self, context: RankContext, *, silent: bool = False) -> None:
        self._speaks = context.rank == 0 and not silent
        self._num_checks = 0

    def note(self, text: str) -> None:
        if self._speaks:
            print(text, flush=True)

    @contextmanager
    def check(self, what: str) -> Iterator[None]:
        """Says that ``what`` held, with the time it took, unless the block raised."""
        started = time.monotonic()
        yield
        self._num_checks += 1
        self.note(f"  ok  {what}  ({(time.monotonic() - started) * 1e3:.0f} ms)")

    def close(self, name: str) -> None:
        self.note(f"{name}: {self._num_checks} checks passed")


def expect_refusal(call: Callable[[], object]) -> None:
    """``call`` has to be refused on every rank."""
    try:
        call()
    except (ValueError, PeerRefusedError):
        return
    except DeepEPError as error:
        raise AssertionError(f"refused with {type(error).__name__}, expected ArgumentError: {error}") from error
    raise AssertionError("the call was accepted although it had to be refused")


# --- timing ---------------------------------------------------------------------------------------------------------


def time_us(context: RankContext, work: Callable[[], object], *, repetitions: int | None = None) -> float:
    """Microseconds of one ``work()``: for each repetition the slowest rank, then the median."""
    on_gpu = context.device.type == "cuda"
    repetitions = repetitions or (20 if on_gpu else 5)
    for _ in range(2):
        work()
    spent = []
    for _ in range(repetitions):
        dist.barrier(context.group)
        if on_gpu:
            torch.cuda.synchronize()
            begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            begin.record()
            work()
            end.record()
            end.synchronize()
            spent.append(begin.elapsed_time(end) * 1e3)
        else:
            started = time.perf_counter()
            work()
            spent.append((time.perf_counter() - started) * 1e6)
    slowest = torch.tensor(spent, dtype=torch.float64)
    # One tensor for all repetitions: the exchange happens after the measuring.
    gathered = [torch.empty_like(slowest) for _ in range(context.num_ranks)]
    _gather_on_host(context, gathered, slowest)
    return statistics.median(torch.stack(gathered).amax(dim=0).tolist())


def _gather_on_host(context: RankContext, gathered: list[torch.Tensor], own: torch.Tensor) -> None:
    if dist.get_backend_config(context.group).startswith("nccl"):
        on_device = [part.to(context.device) for part in gathered]
        dist.all_gather(on_device, own.to(context.device), group=context.group)
        for part, moved in zip(gathered, on_device, strict=True):
            part.copy_(moved)
    else:
        dist.all_gather(gathered, own, group=context.group)


def sm_choices(context: RankContext) -> Iterable[int]:
    """SM counts worth measuring; where no kernels run, the default alone."""
    return (4, 8, 12, 16, 20, 24, 32) if context.device.type == "cuda" else (Buffer.num_sms,)


def print_times(report: Report, title: str, times: dict[str, float], num_bytes: int) -> None:
    """A table of times and logical bandwidths, the best marked."""
    best = min(times, key=lambda name: times[name])
    report.note(f"{title} ({num_bytes / 1e6:.1f} MB received by this rank):")
    for name, spent in times.items():
        mark = "  <- best" if name == best and len(times) > 1 else ""
        report.note(f"  {name:<28} {spent:10.1f} us {num_bytes / spent / 1e3:8.2f} GB/s{mark}")
