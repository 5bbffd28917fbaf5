"""``deepep bench``: how fast dispatch and combine are here, beside the two plain rivals."""

from __future__ import annotations

import os
import shlex
import sys
from dataclasses import replace
from pathlib import Path
from typing import Annotated

import torch
import typer
from rich.console import Console

from .. import settings as library_settings
from ..errors import DeepEPError
from ..launch import RankFailure, launched_externally
from . import ranks
from .bench_data import Shape
from .bench_job import BenchResult, BenchSettings, run_benches

_DEFAULTS = {
    # mode, device: tokens, hidden, experts. On a GPU the shapes of DeepSeek-V3; on a CPU some that take seconds.
    ("normal", "cuda"): (4096, 7168, 256),
    ("normal", "cpu"): (256, 1024, 64),
    ("low_latency", "cuda"): (128, 7168, 288),
    ("low_latency", "cpu"): (32, 1024, 48),
}


def bench(
    mode: Annotated[str, typer.Option(help="normal or low-latency.")] = "normal",
    num_ranks: Annotated[
        int,
        typer.Option("--ranks", min=0, help="Local processes; 0: one per GPU, or 4 without. torchrun brings its own."),
    ] = 0,
    tokens: Annotated[
        str,
        typer.Option(
            help="Tokens per rank; several with commas: one record each. [normal 4096, low-latency 128; less on CPU]"
        ),
    ] = "",
    hidden: Annotated[int | None, typer.Option(min=16, help="Columns of a row. [7168; 1024 on CPU]")] = None,
    topk: Annotated[int, typer.Option(min=1, help="Experts of a token.")] = 8,
    experts: Annotated[
        int | None, typer.Option(min=1, help="Experts of all ranks. [normal 256, low-latency 288; less on CPU]")
    ] = None,
    dtype: Annotated[
        str | None, typer.Option(help="Of dispatched rows: bf16 or fp8. [fp8 on GPU, bf16 on CPU]")
    ] = None,
    routing: Annotated[str, typer.Option(help="uniform, or skewed: half of all rows go to rank 0.")] = "uniform",
    num_groups: Annotated[int, typer.Option("--groups", min=1, help="Equal groups that the experts form.")] = 1,
    num_topk_groups: Annotated[
        int, typer.Option("--topk-groups", min=1, help="Best groups that a token's experts come from.")
    ] = 1,
    num_sms: Annotated[
        str, typer.Option(help="SM counts to measure at, with commas: 8,16,24. Empty: the backend's choice.")
    ] = "",
    iterations: Annotated[int, typer.Option(min=2, help="Measured calls of each operation.")] = 30,
    warmup: Annotated[int, typer.Option(min=1, help="Calls before the first measured one.")] = 5,
    backend: Annotated[
        str | None, typer.Option(help="A backend's name; the fastest that can serve if not given.")
    ] = None,
    device: Annotated[str, typer.Option(help="auto, cpu or cuda; auto wants one GPU per rank.")] = "auto",
    output: Annotated[
        Path,
        typer.Option(
            help="Where the JSON record goes, the plot beside it with the suffix .png. Several token counts: each has "
            "its count appended to the name."
        ),
    ] = Path("deepep-bench.json"),
    no_rivals: Annotated[bool, typer.Option("--no-rivals", help="Leave out the two plain ways: much quicker.")] = False,
    no_plot: Annotated[bool, typer.Option("--no-plot", help="Draw no plot.")] = False,
    timeout: Annotated[float, typer.Option(min=1, help="Seconds after which a silent rank counts as failed.")] = 900.0,
) -> None:
    """Measure dispatch and combine, beside all-to-all and all-gather + reduce-scatter on the same rows.

    A figure is the median over iterations of the maximum over ranks, of calls that follow one another without the host
    waiting, on random rows that rotate through more than the cache; results are checked against plain arithmetic before
    and after. Exit code 1 if a check fails.
    """
    console = Console()
    counts = token_counts(tokens)
    each, chosen_device = [], "cpu"
    for num_tokens in counts or (None,):
        settings, chosen_device = bench_settings(
            mode=mode,
            num_ranks=num_ranks,
            tokens=num_tokens,
            hidden=hidden,
            topk=topk,
            experts=experts,
            dtype=dtype,
            routing=routing,
            num_groups=num_groups,
            num_topk_groups=num_topk_groups,
            num_sms=sm_counts(num_sms),
            iterations=iterations,
            warmup=warmup,
            backend=backend,
            device=device,
        )
        each.append(replace(settings, has_rivals=not no_rivals))
    if each[0].num_sms and chosen_device == "cpu":
        raise typer.BadParameter("there are no SMs on a CPU.", param_hint="--num-sms")
    try:
        outcome = ranks.run(
            run_benches, each, num_ranks=each[0].shape.num_ranks, device=chosen_device, timeout_s=timeout
        )
    except (DeepEPError, RankFailure) as error:
        ranks.explain(console, error)
        raise typer.Exit(1) from None
    results: list[BenchResult] = outcome.result
    if outcome.speaks:
        for settings, result in zip(each, results, strict=True):
            name = f"{output.stem}-{settings.shape.tokens}{output.suffix}" if len(counts) > 1 else output.name
            _leave(console, settings, result, output.with_name(name), has_plot=not no_plot)
    raise typer.Exit(1 if any(result.faults for result in results) else 0)


def _leave(console: Console, settings: BenchSettings, result: BenchResult, output: Path, *, has_plot: bool) -> None:
    """Table, record and plot."""
    from . import bench_report

    bench_report.show(console, settings, result)
    written = [output]
    output.parent.mkdir(parents=True, exist_ok=True)
    output.write_text(bench_report.to_json(settings, result, command=f"deepep {shlex.join(sys.argv[1:])}"))
    if has_plot:
        written.append(output.with_suffix(".png"))
        bench_report.draw(settings, result, written[-1])
    console.print(f"written  [bold]{'  '.join(map(str, written))}[/]", highlight=False)


def bench_settings(
    *,
    mode: str,
    num_ranks: int,
    tokens: int | None,
    hidden: int | None,
    topk: int,
    experts: int | None,
    dtype: str | None,
    routing: str = "uniform",
    num_groups: int = 1,
    num_topk_groups: int = 1,
    num_sms: tuple[int, ...],
    iterations: int,
    warmup: int,
    backend: str | None,
    device: str,
) -> tuple[BenchSettings, str]:
    """Settings with this device's usual values where none is given, and the device. Refuses what cannot be measured."""
    mode = mode.replace("-", "_")
    if mode not in ("normal", "low_latency"):
        raise typer.BadParameter(f"'{mode}' is not one of normal, low-latency.", param_hint="--mode")
    if dtype not in (None, "bf16", "fp8"):
        raise typer.BadParameter(f"'{dtype}' is not one of bf16, fp8.", param_hint="--dtype")
    if routing not in ("uniform", "skewed"):
        raise typer.BadParameter(f"'{routing}' is not one of uniform, skewed.", param_hint="--routing")
    world = ranks.world_size(num_ranks or (torch.cuda.device_count() if device != "cpu" else 0) or 4)
    local = int(os.environ.get("LOCAL_WORLD_SIZE", "1")) if launched_externally() else world
    chosen = ranks.choose_device(device, local)
    usual = _DEFAULTS[mode, chosen]
    shape = Shape(
        mode=mode,  # type: ignore[arg-type]
        tokens=tokens or usual[0],
        hidden=hidden or usual[1],
        topk=topk,
        experts=experts or -(-usual[2] // world) * world,
        dtype=dtype or ("fp8" if chosen == "cuda" else "bf16"),  # type: ignore[arg-type]
        num_ranks=world,
        routing=routing,  # type: ignore[arg-type]
        num_groups=num_groups,
        num_topk_groups=num_topk_groups,
    )
    if shape.experts % world:
        raise typer.BadParameter(
            f"{shape.experts} experts cannot be spread evenly over {world} ranks.", param_hint="--experts"
        )
    if shape.topk > shape.experts:
        raise typer.BadParameter(f"top-{shape.topk} of {shape.experts} experts.", param_hint="--topk")
    if shape.routing == "skewed" and shape.topk > shape.experts // world:
        raise typer.BadParameter(
            f"rank 0 has {shape.experts // world} experts, too few for a token's {shape.topk}.", param_hint="--routing"
        )
    if shape.experts % num_groups or num_topk_groups > num_groups:
        raise typer.BadParameter(
            f"{shape.experts} experts in {num_groups} groups, {num_topk_groups} of them chosen.", param_hint="--groups"
        )
    if shape.topk > shape.experts // num_groups * num_topk_groups:
        raise typer.BadParameter(
            f"{num_topk_groups} groups of {shape.experts // num_groups} experts are too few for a token's {topk}.",
            param_hint="--topk-groups",
        )
    if shape.routing == "skewed" and num_groups > 1:
        raise typer.BadParameter("a skewed routing knows no groups.", param_hint="--groups")
    if shape.dtype == "fp8" and shape.hidden % 128:
        raise typer.BadParameter(
            f"{shape.hidden} is not a multiple of 128, the block of an FP8 scale.", param_hint="--hidden"
        )
    return (
        BenchSettings(
            shape=shape,
            num_sms=num_sms,
            iterations=iterations,
            warmup=warmup,
            backend=backend,
            ll_reduce=library_settings.load().ll_reduce or "rank",
        ),
        chosen,
    )


def token_counts(text: str) -> tuple[int, ...]:
    """``"1024,4096"`` as ``(1024, 4096)``."""
    try:
        counts = tuple(int(part) for part in text.split(",") if part.strip())
    except ValueError:
        counts = (0,)
    if any(count <= 0 for count in counts) or len(set(counts)) < len(counts):
        raise typer.BadParameter(f"'{text}' has to be different positive numbers with commas.", param_hint="--tokens")
    return counts


def sm_counts(text: str) -> tuple[int, ...]:
    """``"8,16"`` as ``(8, 16)``."""
    try:
        counts = tuple(int(part) for part in text.split(",") if part.strip())
    except ValueError:
        counts = (-1,)
    if any(count <= 0 or count % 2 for count in counts):
        raise typer.BadParameter(f"'{text}' has to be even positive numbers with commas.", param_hint="--num-sms")
    return counts
