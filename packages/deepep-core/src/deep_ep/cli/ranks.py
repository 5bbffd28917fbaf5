"""How the commands get their ranks: those of a launcher such as torchrun, else local processes started here."""

from __future__ import annotations

import os
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
import typer
from rich.console import Console
from rich.markup import escape

from .. import launch
from ..errors import DeepEPError

_OUR_ERROR = re.compile(r"deep_ep\.errors\.\w+: ")  # last line of a rank's traceback


@dataclass(frozen=True, kw_only=True)
class Outcome:
    """What rank 0's function returned, and whether this process is the one to show it."""

    result: Any
    speaks: bool


def choose_device(device: str, num_ranks: int) -> str:
    """``auto`` is CUDA where every rank gets a GPU of its own, else the CPU."""
    if device == "auto":
        return "cuda" if torch.cuda.is_available() and torch.cuda.device_count() >= num_ranks else "cpu"
    if device not in ("cpu", "cuda"):
        raise typer.BadParameter(f"'{device}' is not one of auto, cpu, cuda.", param_hint="--device")
    if device == "cuda" and not torch.cuda.is_available():
        raise typer.BadParameter(
            "torch sees no GPU here. 'deepep doctor' says why; --device cpu works anywhere.", param_hint="--device"
        )
    return device


def run(
    function: Callable[..., Any],
    *args: Any,
    num_ranks: int,
    device: str,
    timeout_s: float,
    environment: Mapping[str, str | None] | None = None,
) -> Outcome:
    """Run ``function(context, *args)`` on every rank.

    Args:
        function: returns something of use on rank 0; on other ranks what they need for their exit code.
        num_ranks: local processes to start; under a launcher its number of ranks counts instead.
        device: ``auto``, ``cpu`` or ``cuda``.
        environment: variables for local ranks; a launcher passes its own.
    """
    if launch.launched_externally():
        local_ranks = int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
        context = launch.join_external(choose_device(device, local_ranks))
        try:
            return Outcome(result=function(context, *args), speaks=context.rank == 0)
        finally:
            dist.destroy_process_group()
    results = launch.run_ranks(
        function,
        *args,
        num_ranks=num_ranks,
        device=choose_device(device, num_ranks),
        timeout_s=timeout_s,
        environment=environment,
    )
    return Outcome(result=results[0], speaks=True)


def explain(console: Console, error: BaseException) -> None:
    """Show why a run failed: our own errors in one line, anything else with the ranks' tracebacks."""
    if isinstance(error, DeepEPError):
        console.print(f"[bold red]error[/] {escape(str(error))}", highlight=False)
    elif isinstance(error, launch.RankFailure):
        last_lines = {text.rstrip().splitlines()[-1] for text in error.failures.values() if text.strip()}
        ours = [line.partition(": ")[2] for line in sorted(last_lines) if _OUR_ERROR.match(line)]
        if len(ours) == len(last_lines):
            for text in ours:
                console.print(f"[bold red]error[/] {escape(text)}", highlight=False)
        else:
            console.print(str(error), markup=False, highlight=False)
    else:
        raise error


def gather_rows(context: launch.RankContext, rows: torch.Tensor) -> list[torch.Tensor]:
    """Every rank's rows, on the CPU, by rank. Collective; the ranks may have different numbers of rows."""
    mine = rows.detach().cpu().contiguous()
    if context.num_ranks == 1:
        return [mine]
    counts = [torch.zeros(1, dtype=torch.int64) for _ in range(context.num_ranks)]
    dist.all_gather(counts, torch.tensor([mine.shape[0]]), group=context.group)
    longest = int(max(counts))
    # Bytes, so that any dtype travels over any transport.
    row_bytes = mine.element_size() * (
        mine[0].numel() if mine.shape[0] else mine.new_zeros((1, *mine.shape[1:])).numel()
    )
    padded = torch.zeros((longest, row_bytes), dtype=torch.uint8)
    padded[: mine.shape[0]] = mine.view(torch.uint8).reshape(mine.shape[0], row_bytes)
    gathered = [torch.empty_like(padded) for _ in range(context.num_ranks)]
    dist.all_gather(gathered, padded, group=context.group)
    return [
        g[: int(n)].flatten().view(mine.dtype).reshape(int(n), *mine.shape[1:])
        for g, n in zip(gathered, counts, strict=True)
    ]


def slowest(context: launch.RankContext, values: list[float]) -> list[float]:
    """The maximum over ranks of each value. Collective."""
    together = torch.tensor(values, dtype=torch.float64)
    if context.num_ranks > 1 and values:
        dist.all_reduce(together, op=dist.ReduceOp.MAX, group=context.group)
    return [float(v) for v in together]


def world_size(num_ranks: int) -> int:
    """The launcher's number of ranks under a launcher, else ``num_ranks``."""
    return int(os.environ["WORLD_SIZE"]) if launch.launched_externally() else num_ranks


def any_rank(context: launch.RankContext, condition: bool) -> bool:
    """Whether it holds on any rank. Collective."""
    return slowest(context, [float(condition)])[0] > 0


def synchronize(device: torch.device) -> None:
    """Let the host wait for the device."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
