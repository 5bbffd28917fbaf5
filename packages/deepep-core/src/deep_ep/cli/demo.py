"""``deepep demo``: real text through an expert-parallel layer, compared with the same layer in one process."""

from __future__ import annotations

import importlib.metadata
import time
from pathlib import Path
from typing import Annotated, Any

import typer
from rich import box
from rich.console import Console, Group
from rich.panel import Panel
from rich.table import Table
from rich.text import Text

from ..errors import DeepEPError
from ..launch import RankFailure, launched_externally
from . import ranks
from .demo_job import Check, DemoReport, DemoSettings, run_demo, token_range
from .show import bar, bytes_text, heat

README_NAMES = ("README.md", "README.rst", "README.txt", "README")


def find_text(file: Path | None) -> tuple[str, bytes]:
    """The text to route and where it is from: ``file``, else the nearest README upwards from the working directory,
    else the one in the installed package's metadata."""
    if file is not None:
        if not file.is_file():
            raise typer.BadParameter(f"{file} is not a file.", param_hint="FILE")
        return str(file), file.read_bytes()
    here = Path.cwd()
    for folder in (here, *here.parents):
        for name in README_NAMES:
            if (folder / name).is_file():
                return name if folder == here else str(folder / name), (folder / name).read_bytes()
    metadata: Any = importlib.metadata.metadata("deepep-core")
    text = metadata.get_payload() or metadata.get("Description", "")
    return "README of deepep-core", text.encode()


def demo(
    file: Annotated[
        Path | None, typer.Argument(help="Text to route, any file. The README if none is given.", show_default=False)
    ] = None,
    num_ranks: Annotated[int, typer.Option("--ranks", min=1, help="Local processes (torchrun brings its own).")] = 4,
    tokens: Annotated[int, typer.Option(min=1, help="At most this many bytes of the text per rank.")] = 512,
    hidden: Annotated[int, typer.Option(min=128, help="Columns of a token's row; a multiple of 128.")] = 256,
    width: Annotated[int, typer.Option(min=1, help="Inner width of an expert.")] = 128,
    experts: Annotated[int, typer.Option(min=1, help="Experts of all ranks together.")] = 32,
    topk: Annotated[int, typer.Option(min=1, help="Experts of a token.")] = 6,
    groups: Annotated[int, typer.Option(min=1, help="Groups of experts.")] = 8,
    selected_groups: Annotated[int, typer.Option(min=1, help="Groups that a token may use.")] = 3,
    low_latency_tokens: Annotated[
        int, typer.Option(min=4, help="Tokens of a rank's micro-batch in low-latency mode; a multiple of 4.")
    ] = 64,
    backend: Annotated[
        str | None, typer.Option(help="A backend's name; the fastest that can serve if not given.")
    ] = None,
    device: Annotated[str, typer.Option(help="auto, cpu or cuda; auto wants one GPU per rank.")] = "auto",
    picture: Annotated[
        Path, typer.Option(help="Where to write the picture of expert load and traffic.", show_default=True)
    ] = Path("deepep-demo.png"),
    no_picture: Annotated[bool, typer.Option("--no-picture", help="Write no picture.")] = False,
    seed: Annotated[int, typer.Option(help="Of all weights.")] = 0,
    plant_error: Annotated[
        int | None,
        typer.Option(min=0, help="Falsify one value of this token's combined row, to see the check find it."),
    ] = None,
    timeout: Annotated[float, typer.Option(min=1, help="Seconds after which a silent rank counts as failed.")] = 300.0,
) -> None:
    """Send real text through a mixture-of-experts layer over several ranks and check every value.

    Bytes are embedded, routed by a DeepSeek-V3-style gate, dispatched to the ranks of their experts, and combined: in
    normal mode with the backward pass, and in low-latency mode with transfers hidden behind attention. Outputs and
    gradients are compared with the same layer computed in one process. Exit code 1, and the first differing token, if
    anything is off.
    """
    console = Console()
    source, text = find_text(file)
    if not text:
        raise typer.BadParameter(f"{source} is empty.", param_hint="FILE")
    settings = DemoSettings(
        text=text[: ranks.world_size(num_ranks) * tokens],
        tokens=tokens,
        hidden=hidden,
        width=width,
        num_experts=experts,
        num_topk=topk,
        num_groups=groups,
        num_selected_groups=selected_groups,
        low_latency_tokens=low_latency_tokens,
        backend=backend,
        seed=seed,
        plant=plant_error,
    )
    _check(settings, ranks.world_size(num_ranks))
    started = time.perf_counter()
    try:
        if launched_externally():
            outcome = ranks.run(run_demo, settings, num_ranks=num_ranks, device=device, timeout_s=timeout)
        else:
            with console.status(f"{num_ranks} ranks at work on {source} ..."):
                outcome = ranks.run(run_demo, settings, num_ranks=num_ranks, device=device, timeout_s=timeout)
    except (DeepEPError, RankFailure) as error:
        ranks.explain(console, error)
        raise typer.Exit(1) from None
    if not outcome.speaks:
        raise typer.Exit(0 if outcome.result else 1)
    report: DemoReport = outcome.result
    show(console, report, settings, source)
    if not no_picture:
        from .demo_picture import draw

        draw(report, settings, source, picture)
        console.print(f"picture  [bold]{picture}[/]", highlight=False)
    console.print(_verdict(report, settings, time.perf_counter() - started))
    raise typer.Exit(0 if report.agrees else 1)


def _check(settings: DemoSettings, num_ranks: int) -> None:
    if settings.num_experts % num_ranks:
        raise typer.BadParameter(
            f"{settings.num_experts} experts cannot be spread evenly over {num_ranks} ranks; "
            f"take a multiple of {num_ranks}.",
            param_hint="--experts",
        )
    if settings.num_experts % settings.num_groups or settings.num_selected_groups > settings.num_groups:
        raise typer.BadParameter(
            f"{settings.num_experts} experts, {settings.num_groups} groups, {settings.num_selected_groups} of them "
            "selected: groups have to be equal, and no more selected than there are.",
            param_hint="--groups",
        )
    allowed = settings.num_experts // settings.num_groups * settings.num_selected_groups
    if settings.num_topk > allowed:
        raise typer.BadParameter(
            f"top-{settings.num_topk}, but the selected groups hold {allowed} experts.", param_hint="--topk"
        )
    if settings.plant is not None and settings.plant >= len(settings.text):
        raise typer.BadParameter(
            f"token {settings.plant} is not among the {len(settings.text)} in use.", param_hint="--plant-error"
        )
    if settings.hidden % 128:
        raise typer.BadParameter(
            f"{settings.hidden} is not a multiple of 128, which low-latency mode needs.", param_hint="--hidden"
        )


# --- tables ---------------------------------------------------------------------------------------------------------


def show(console: Console, report: DemoReport, settings: DemoSettings, source: str) -> None:
    """Print everything but the verdict."""
    chosen = sorted(set(report.backends.values()))
    facts = (
        f"[bold]{source}[/], {sum(report.num_tokens)} bytes, one token each\n"
        f"{report.num_ranks} ranks on {report.device}, backend [bold]{' and '.join(chosen)}[/]\n"
        f"hidden {settings.hidden}, {settings.num_experts} experts of width {settings.width}, top-{settings.num_topk} "
        f"from {settings.num_selected_groups} of {settings.num_groups} groups of experts"
    )
    console.print(Panel(facts, title="deepep demo", title_align="left", box=box.ROUNDED, expand=False))
    console.print(_traffic(report))
    console.print(_load(report))
    console.print(_times(report))
    console.print(_comparison(report))


def _traffic(report: DemoReport) -> Table:
    table = _table("Tokens and bytes sent, from rank (down) to rank (across)")
    table.add_column("from", justify="right", style="bold")
    for rank in range(report.num_ranks):
        table.add_column(f"to {rank}", justify="right")
    table.add_column("held", justify="right", style="dim")
    table.add_column("leave", justify="right")
    most = max((max(row) for row in report.sent), default=0)
    for rank, row in enumerate(report.sent):
        cells = [
            Text(f"{count}\n{bytes_text(count * report.row_bytes)}", style=heat(count, most), justify="right")
            for count in row
        ]
        leaving = sum(row) - row[rank]
        table.add_row(
            str(rank),
            *cells,
            str(report.num_tokens[rank]),
            f"{leaving}\n{bytes_text(leaving * report.row_bytes)}",
        )
    return table


def _load(report: DemoReport) -> Table:
    table = _table("Expert load (tokens per expert)")
    table.add_column("rank", justify="right", style="bold")
    table.add_column("experts")
    table.add_column("one bar each")
    for name in ("least", "mean", "most", "sum"):
        table.add_column(name, justify="right")
    per_rank = len(report.expert_load) // report.num_ranks
    most = max(report.expert_load)
    for rank in range(report.num_ranks):
        load = report.expert_load[rank * per_rank : (rank + 1) * per_rank]
        table.add_row(
            str(rank),
            f"{rank * per_rank} to {(rank + 1) * per_rank - 1}",
            Text("".join(bar(count, most) for count in load), style="cyan"),
            str(min(load)),
            f"{sum(load) / len(load):.0f}",
            str(max(load)),
            str(sum(load)),
        )
    return table


def _times(report: DemoReport) -> Table:
    table = _table("Time (slowest rank)")
    table.add_column("step")
    table.add_column("ms", justify="right")
    table.add_column("")
    most = max(report.times_ms.values())
    for name, value in report.times_ms.items():
        table.add_row(name, f"{value:.1f}", Text("█" * max(1, round(24 * value / most)), style="cyan"))
    return table


def _comparison(report: DemoReport) -> Table:
    table = _table("Compared with the same layer in one process (float64)")
    table.add_column("what", no_wrap=True)
    table.add_column("values", justify="right", no_wrap=True)
    table.add_column("max error", justify="right", no_wrap=True)
    table.add_column("tolerance used", justify="right")
    table.add_column("verdict", no_wrap=True)
    mode = ""
    for check in report.checks:
        if check.mode != mode:
            if mode:
                table.add_section()
            mode = check.mode
            table.add_row(Text(f"{mode} mode", style="bold"))
        difference = check.difference
        table.add_row(
            f"  {check.what}",
            f"{check.count:,}",
            f"{difference.max_error:.1e}" if difference.max_error else "0",
            f"{difference.max_share:.0%}" if difference.max_share < 100 else "> 10000%",
            Text("agrees", style="green") if check.agrees else Text(f"{check.rows} {check.first} off", "bold red"),
        )
    return table


def _table(title: str) -> Table:
    return Table(title=title, title_justify="left", title_style="bold", box=box.SIMPLE_HEAD)


def excerpt(text: bytes, at: int, *, around: int = 24) -> Text:
    """The text around one byte, the byte itself marked."""

    def printable(part: bytes) -> str:
        return part.decode("utf-8", errors="replace").replace("\n", "⏎").replace("\r", "").replace("\t", "⇥")

    line = Text("…" if at > around else "")
    line.append(printable(text[max(0, at - around) : at]))
    line.append(printable(text[at : at + 1]), style="bold white on red")
    line.append(printable(text[at + 1 : at + 1 + around]))
    return line.append("…" if at + 1 + around < len(text) else "")


def _verdict(report: DemoReport, settings: DemoSettings, seconds: float) -> Panel:
    failed: Check | None = report.first_token
    if failed is None:
        worst = max(report.checks, key=lambda check: check.difference.max_share)
        body: Any = Text.assemble(
            ("All values agree. ", "bold green"),
            f"{sum(check.count for check in report.checks):,} values compared, the worst used "
            f"{worst.difference.max_share:.0%} of its tolerance ({worst.what}). {seconds:.1f} s.",
        )
        return Panel(body, border_style="green", expand=False)
    difference = failed.difference
    body = Group(
        Text.assemble(
            ("Not in agreement. ", "bold red"),
            f"First differing {failed.rows}: {failed.first} ({failed.mode}, {failed.what}): "
            f"got {difference.actual:.6g}, expected {difference.expected:.6g}.",
        ),
        _where(report, settings, failed),
    )
    return Panel(body, border_style="red", expand=False)


def _where(report: DemoReport, settings: DemoSettings, failed: Check) -> Text:
    at = failed.first or 0
    if failed.rows == "token":
        for rank in range(report.num_ranks):
            begin, end = token_range(len(settings.text), report.num_ranks, settings.tokens, rank)
            if begin <= at < end:
                return Text.assemble(f"byte {at}, token {at - begin} of rank {rank}: ", excerpt(settings.text, at))
    return Text(f"expert {at} lives on rank {at * report.num_ranks // len(report.expert_load)}.")
