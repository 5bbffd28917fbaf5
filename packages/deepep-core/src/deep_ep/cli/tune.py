"""``deepep tune``: find the `Config` of dispatch and combine that this machine likes, and write it down."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Annotated, Any

import typer
from rich import box
from rich.console import Console
from rich.table import Table
from rich.text import Text

from .. import settings as library_settings
from ..config import Config
from ..errors import DeepEPError
from ..launch import RankContext, RankFailure
from . import ranks
from .bench import bench_settings, sm_counts
from .bench_job import BenchSettings, Operation, Session, build_buffer
from .show import duration

USUAL_SM_COUNTS = (4, 6, 8, 10, 12, 16, 20, 24, 32)
GOOD_ENOUGH = 1.03  # a smaller value wins if it costs at most this much time: SMs are better spent on the experts
OPERATIONS = ("dispatch", "combine")


@dataclass(frozen=True, kw_only=True)
class Trial:
    """One timed configuration of one operation."""

    operation: str
    config: dict[str, int]
    varied: str
    seconds: float


@dataclass(kw_only=True)
class TuneResult:
    """All trials in their order and the winner of each operation; empty where there is nothing to vary."""

    num_ranks: int
    backend: str
    trials: list[Trial] = field(default_factory=list)
    winners: dict[str, dict[str, int]] = field(default_factory=dict)
    faults: list[str] = field(default_factory=list)


def winner(times: Mapping[int, float]) -> int:
    """The smallest value whose time is within `GOOD_ENOUGH` of the best."""
    best = min(times.values())
    return min(value for value, seconds in times.items() if seconds <= best * GOOD_ENOUGH)


def run_tune(context: RankContext, settings: BenchSettings) -> TuneResult:
    """Time one dimension after the other, SM counts first, each at the winners so far. Alike on every rank."""
    buffer = build_buffer(context, settings)
    try:
        assert buffer.runtime is not None
        session = Session(
            context, settings, buffer, ranks_per_node=context.num_ranks // buffer.runtime.get_num_rdma_ranks()
        )
        result = TuneResult(num_ranks=context.num_ranks, backend=buffer.backends["normal"])
        dimensions = _dimensions(context, settings, buffer.tuning_space())
        if not dimensions:
            return result
        session.prepare()
        result.faults = session.faults("before")
        with session.progress(len(OPERATIONS) * sum(map(len, dimensions.values()))) as advance:
            for operation in OPERATIONS:
                chosen: dict[str, int] = {}
                for name, values in dimensions.items():
                    times: dict[int, float] = {}
                    for value in values:
                        advance(f"{operation}: {name} {value}")
                        config = Config(**(chosen | {name: value}))
                        measured = session.measure(
                            Operation(contender="deep_ep", name=operation, call=_call(session, operation, config)),
                            config.num_sms,
                        )
                        times[value] = measured.seconds
                        result.trials.append(
                            Trial(operation=operation, config=asdict(config), varied=name, seconds=measured.seconds)
                        )
                    chosen[name] = winner(times)
                result.winners[operation] = asdict(Config(**chosen))
        result.faults += session.faults("after")
        return result
    finally:
        buffer.destroy()


def _dimensions(
    context: RankContext, settings: BenchSettings, space: Mapping[str, tuple[int, ...]]
) -> dict[str, tuple[int, ...]]:
    counts = settings.num_sms or (USUAL_SM_COUNTS if context.device.type == "cuda" else ())
    known = {f.name for f in fields(Config)}
    found = {"num_sms": counts} | {name: values for name, values in space.items() if name in known - {"num_sms"}}
    return {name: values for name, values in found.items() if values}


def _call(session: Session, operation: str, config: Config) -> Callable[[Any], Any]:
    if operation == "dispatch":
        return lambda s: session.buffer.dispatch(s.sent, handle=s.handle, config=config)
    return lambda s: session.buffer.combine(s.expert_out, s.handle, config=config)


def merge(text: str, result: TuneResult, settings: BenchSettings) -> str:
    """The text of a configuration file with the winners in it; everything else stays as it was."""
    for operation, config in result.winners.items():
        header = f"[tuning.{operation}.{result.num_ranks}]"
        # A table reaches to the next line that begins one.
        text = re.sub(rf"^{re.escape(header)}[^\n]*\n(?:(?!\[)[^\n]*\n?)*", "", text, flags=re.MULTILINE)
        shape = settings.shape
        facts = config | {"hidden": shape.hidden, "num_topk": shape.topk, "num_tokens": shape.tokens}
        lines = "".join(f"{name} = {value}\n" for name, value in facts.items())
        text = f"{text.rstrip()}\n\n{header}\n{lines}".lstrip()
    return text


def tune(
    num_ranks: Annotated[
        int, typer.Option("--ranks", min=0, help="Local processes; 0: one per GPU, or 4. torchrun brings its own.")
    ] = 0,
    tokens: Annotated[int | None, typer.Option(min=1, help="Tokens per rank. [4096; 256 on CPU]")] = None,
    hidden: Annotated[int | None, typer.Option(min=16, help="Columns of a row. [7168; 1024 on CPU]")] = None,
    topk: Annotated[int, typer.Option(min=1, help="Experts of a token.")] = 8,
    experts: Annotated[int | None, typer.Option(min=1, help="Experts of all ranks. [256; 64 on CPU]")] = None,
    dtype: Annotated[str | None, typer.Option(help="Of dispatched rows: bf16 or fp8.")] = None,
    num_sms: Annotated[
        str, typer.Option(help=f"SM counts to try. Empty: {','.join(map(str, USUAL_SM_COUNTS))} on GPUs.")
    ] = "",
    iterations: Annotated[int, typer.Option(min=2, help="Measured calls of each configuration.")] = 30,
    warmup: Annotated[int, typer.Option(min=1, help="Calls before the first measured one.")] = 5,
    backend: Annotated[
        str | None, typer.Option(help="A backend's name; the fastest that can serve if not given.")
    ] = None,
    device: Annotated[str, typer.Option(help="auto, cpu or cuda; auto wants one GPU per rank.")] = "auto",
    output: Annotated[Path, typer.Option(help="The configuration file to write the winners to.")] = Path(
        library_settings.DEFAULT_FILE
    ),
    timeout: Annotated[float, typer.Option(min=1, help="Seconds after which a silent rank counts as failed.")] = 900.0,
) -> None:
    """Time SM counts, and whatever else the backend says may be varied, for one shape in normal mode.

    The winners go to a configuration file that Buffer.get_dispatch_config and Buffer.get_combine_config read: the
    fewest SMs that are within 3 % of the fastest. Exit code 1 if results are wrong or there is nothing to vary.
    """
    console = Console()
    settings, chosen_device = bench_settings(
        mode="normal",
        num_ranks=num_ranks,
        tokens=tokens,
        hidden=hidden,
        topk=topk,
        experts=experts,
        dtype=dtype,
        num_sms=sm_counts(num_sms),
        iterations=iterations,
        warmup=warmup,
        backend=backend,
        device=device,
    )
    try:
        outcome = ranks.run(
            run_tune, settings, num_ranks=settings.shape.num_ranks, device=chosen_device, timeout_s=timeout
        )
    except (DeepEPError, RankFailure) as error:
        ranks.explain(console, error)
        raise typer.Exit(1) from None
    result: TuneResult = outcome.result
    is_useful = bool(result.winners) and not result.faults
    if not outcome.speaks:
        raise typer.Exit(0 if is_useful else 1)
    if not result.winners:
        console.print(
            f"The backend {result.backend} has nothing to vary on this device. Choose another with --backend, or name "
            "SM counts with --num-sms."
        )
        raise typer.Exit(1)
    _show(console, result)
    if result.faults:
        for fault in result.faults:
            console.print(Text(f"check failed {fault}; nothing written", style="bold red"))
        raise typer.Exit(1)
    output.parent.mkdir(parents=True, exist_ok=True)
    output.write_text(merge(output.read_text() if output.is_file() else "", result, settings))
    console.print(f"written  [bold]{output}[/]", highlight=False)


def _show(console: Console, result: TuneResult) -> None:
    table = Table(
        title=f"deepep tune: {result.num_ranks} ranks, backend {result.backend}",
        title_justify="left",
        title_style="bold",
        box=box.SIMPLE_HEAD,
    )
    for name in ("operation", "varied"):
        table.add_column(name)
    for name in ("value", "median"):
        table.add_column(name, justify="right")
    table.add_column("")
    for trial in result.trials:
        won = result.winners[trial.operation][trial.varied] == trial.config[trial.varied]
        table.add_row(
            trial.operation,
            trial.varied,
            str(trial.config[trial.varied]),
            duration(trial.seconds),
            Text("chosen", style="green") if won else "",
        )
    console.print(table)
