"""What a benchmark leaves: a table, a JSON record and a plot."""

from __future__ import annotations

import importlib.metadata
import json
import os
import platform
import shutil
import subprocess
import time
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from rich import box
from rich.console import Console
from rich.panel import Panel
from rich.table import Table
from rich.text import Text

from .bench_job import BenchResult, BenchSettings, Measurement
from .machine import installed_version, query
from .show import bytes_text, duration, rate, span

FORMAT = 1
_COLOURS = {"deep_ep": "#2b6cb0", "all-to-all": "#dd6b20", "all-gather + reduce-scatter": "#718096"}


def headline(settings: BenchSettings, result: BenchResult) -> str:
    """One line: mode, ranks, device, backend."""
    nodes = result.num_ranks // result.ranks_per_node
    where = f"{result.num_ranks} ranks on {result.device}" + (f", {nodes} nodes" if nodes > 1 else "")
    return f"{settings.shape.mode.replace('_', '-')} mode, {where}, backend {result.backend}"


def shape_line(settings: BenchSettings) -> str:
    shape = settings.shape
    return (
        f"{shape.tokens} tokens per rank, hidden {shape.hidden}, top-{shape.topk} of {shape.experts} experts, "
        + (f"from {shape.num_topk_groups} of {shape.num_groups} groups, " if shape.num_groups > 1 else "")
        + f"dispatch {shape.dtype}, combine bf16"
    )


# --- table ----------------------------------------------------------------------------------------------------------


def show(console: Console, settings: BenchSettings, result: BenchResult) -> None:
    """Print the table and the outcome of the checks."""
    console.print(
        Panel(
            f"[bold]{headline(settings, result)}[/]\n{shape_line(settings)}",
            title="deepep bench",
            title_align="left",
            box=box.ROUNDED,
            expand=False,
        )
    )
    # Between nodes the limit is not one copy for each rank, and what it is stands below the table.
    has_floor = any(m.two_hop_efficiency is not None for m in result.measurements)
    has_limit = not has_floor and any(m.wire_efficiency is not None for m in result.measurements)
    table = Table(box=box.SIMPLE_HEAD, padding=(0, 1, 0, 0))
    table.add_column("", min_width=20)
    table.add_column("median", justify="right", no_wrap=True)
    table.add_column("10-90 %", justify="right", no_wrap=True)
    table.add_column("bytes", justify="right", no_wrap=True)
    table.add_column("GB/s", justify="right", no_wrap=True)
    table.add_column("logical", justify="right", no_wrap=True)
    if has_limit:
        table.add_column("limit", justify="right")
    best = _best(result.measurements)
    contender = ""
    for m in _ordered(result.measurements):
        if m.contender != contender:
            if contender:
                table.add_section()
            contender = m.contender
            name = f"{contender}, {result.backend}" if contender == "deep_ep" else contender
            table.add_row(Text(name, style="bold"))
        what = f"  {m.operation}" + (f", {m.num_sms} SMs" if m.num_sms is not None else "")
        if m.failure:
            table.add_row(what, Text("no", style="yellow"), Text("could not run", style="yellow"))
            continue
        cells: list[Text | str] = [
            what,
            Text(duration(m.seconds), style="bold green" if best.get(m.operation) is m else ""),
            span(m.fastest, m.slowest),
            bytes_text(m.physical_bytes),
            rate(m.physical_gbps),
            rate(m.logical_gbps),
        ]
        if has_limit and m.wire_efficiency is not None:
            cells.append(f"{m.wire_efficiency:.0%}")
        table.add_row(*cells)
    console.print(table)
    console.print(
        f"[dim]{settings.iterations} iterations after {settings.warmup}; median over iterations of the maximum over "
        "ranks; calls follow one another, inputs rotate. Bytes and GB/s: what has to leave a rank; logical: with the "
        "copies that stay on it. Green: fastest of its kind."
        + (" Limit: share of the push limit.[/]" if has_limit else "[/]"),
        highlight=False,
    )
    captured = sorted({m.calls_per_graph for m in result.measurements if m.calls_per_graph})
    if captured:
        console.print(
            f"[dim]In CUDA graphs of {' or '.join(map(str, captured))} calls, unless it says otherwise: time of a "
            "replay over its calls.[/]",
            highlight=False,
        )
    for m in result.measurements:
        if m.failure:
            console.print(Text(f"{m.contender}, {m.operation}, could not run: {m.failure}", style="yellow"))
    for num_sms, limit in result.push_limit_gbps.items():
        console.print(f"push limit measured in this run at {num_sms} SMs: {limit:.0f} GB/s per rank", highlight=False)
    for m in _ordered(result.measurements):
        if m.two_hop_bytes is not None and m.two_hop_efficiency is not None:
            console.print(floor_line(m), highlight=False)
    if result.faults:
        for fault in result.faults:
            console.print(Text(f"check failed {fault}", style="bold red"))
    else:
        console.print("[green]Checked against plain arithmetic before and after: equal bit for bit.[/]")


def floor_line(m: Measurement) -> str:
    """``dispatch, 24 SMs: 308 us; two-hop floor 245 us (86.4 MiB out of the busiest rank): 0.80``."""
    assert m.two_hop_bytes is not None and m.two_hop_efficiency is not None
    sms = f", {m.num_sms} SMs" if m.num_sms is not None else ""
    floor = duration(m.seconds * m.two_hop_efficiency)
    return (
        f"{m.operation}{sms}: {duration(m.seconds)}; two-hop floor {floor} "
        f"({bytes_text(m.two_hop_bytes)} out of the busiest rank): [bold]{m.two_hop_efficiency:.2f}[/]"
    )


def _ordered(measurements: list[Measurement]) -> list[Measurement]:
    """By contender, then operation, each in the order of first appearance, then SM count."""
    contenders = list(dict.fromkeys(m.contender for m in measurements))
    operations = list(dict.fromkeys(m.operation for m in measurements))
    return sorted(
        measurements, key=lambda m: (contenders.index(m.contender), operations.index(m.operation), m.num_sms or 0)
    )


def _best(measurements: list[Measurement]) -> dict[str, Measurement]:
    best: dict[str, Measurement] = {}
    for m in measurements:
        if not m.failure and (m.operation not in best or m.seconds < best[m.operation].seconds):
            best[m.operation] = m
    return best


# --- record ---------------------------------------------------------------------------------------------------------


def to_json(settings: BenchSettings, result: BenchResult, *, command: str) -> str:
    """The record, indented JSON; its fields are described in benchmarks/results/README.md."""
    record = {
        "format": FORMAT,
        "time": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
        "command": command,
        "commit": git_commit(),
        "hardware": _hardware(result),
        "versions": _versions(result.backend),
        "backend": result.backend,
        "num_ranks": result.num_ranks,
        "ranks_per_node": result.ranks_per_node,
        "shape": asdict(settings.shape),
        "num_sms": list(settings.num_sms) or None,
        "iterations": settings.iterations,
        "warmup": settings.warmup,
        "ll_reduce": settings.ll_reduce if settings.shape.mode == "low_latency" else None,
        "push_limit_gbps": {str(k): v for k, v in result.push_limit_gbps.items()} or None,
        "checked": {"equal": not result.faults, "faults": result.faults},
        "measurements": [
            asdict(m) | {"physical_gbps": m.physical_gbps, "logical_gbps": m.logical_gbps} for m in result.measurements
        ],
    }
    return json.dumps(record, indent=2) + "\n"


def git_commit() -> str | None:
    """The commit of the checkout that this module is in, with ``-dirty`` if it was changed; ``None`` outside one."""
    here = str(Path(__file__).parent)
    if shutil.which("git") is None:
        return None
    try:
        tracked = subprocess.run(
            ["git", "-C", here, "ls-files", "--error-unmatch", __file__], capture_output=True, check=False, timeout=10
        )
        commit = query(["git", "-C", here, "rev-parse", "HEAD"])
        if tracked.returncode != 0 or commit is None:
            return None
        return commit.strip() + ("-dirty" if query(["git", "-C", here, "status", "--porcelain"]) else "")
    except (OSError, subprocess.TimeoutExpired):
        return None


def _hardware(result: BenchResult) -> dict[str, Any]:
    found: dict[str, Any] = {
        "device": result.device,
        "hosts": len(result.hosts),
        "cpu": _cpu_name(),
        "cpu_cores": len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count(),
    }
    if result.device != "CPU":
        properties = torch.cuda.get_device_properties(0)
        found |= {
            "gpu_sms": properties.multi_processor_count,
            "gpu_memory_bytes": properties.total_memory,
            "gpu_l2_bytes": properties.L2_cache_size,
            "driver": (query(["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]) or "").split("\n")[
                0
            ],
        }
    return found


def _cpu_name() -> str:
    try:
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    except OSError:
        pass
    return platform.processor() or platform.machine()


def _versions(backend: str) -> dict[str, str | None]:
    found: dict[str, str | None] = {
        "python": platform.python_version(),
        "torch": torch.__version__,
        "cuda": torch.version.cuda,
        "deepep-core": installed_version("deepep-core"),
    }
    for entry in importlib.metadata.entry_points(group="deep_ep.backends"):
        if entry.name == backend and entry.dist is not None:
            found[entry.dist.name] = entry.dist.version
    if torch.cuda.is_available():
        found["nccl"] = ".".join(map(str, torch.cuda.nccl.version()))
    for wheel in ("nvidia-nvshmem-cu12", "nvidia-nvshmem-cu13"):
        if version := installed_version(wheel):
            found[wheel] = version
    return found


# --- plot -----------------------------------------------------------------------------------------------------------


def draw(settings: BenchSettings, result: BenchResult, path: Path) -> None:
    """Write the plot: times over SM counts as curves, or as bars where there is one count."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(11, 4.8), dpi=130, layout="constrained", facecolor="white")
    FigureCanvasAgg(figure)
    figure.suptitle(headline(settings, result), fontsize=13, fontweight="bold")
    figure.supxlabel(shape_line(settings), fontsize=9, color="#52606d")
    operations = ("dispatch", "combine", "pair")
    axes = figure.subplots(1, 3)
    unit, scale = ("ms", 1e3) if max((m.seconds for m in result.measurements), default=0) > 0.01 else ("us", 1e6)
    for axis, operation in zip(axes, operations, strict=True):
        rows = [m for m in result.measurements if m.operation == operation and not m.failure]
        axis.set_title(operation if operation != "pair" else "dispatch + combine", loc="left")
        axis.spines[["top", "right"]].set_visible(False)
        if len(settings.num_sms) > 1:
            _curves(axis, rows, scale)
        else:
            _bars(axis, rows, scale)
        axis.set_ylim(bottom=0)
    axes[0].set_ylabel(f"{unit} (median of the slowest rank)")
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path)


def _curves(axis: Any, rows: list[Measurement], scale: float) -> None:
    ours = [m for m in rows if m.num_sms is not None]
    axis.plot(
        [m.num_sms for m in ours],
        [m.seconds * scale for m in ours],
        marker="o",
        color=_COLOURS["deep_ep"],
        label="deep_ep",
    )
    for m in rows:
        if m.num_sms is None:
            axis.axhline(m.seconds * scale, color=_COLOURS[m.contender], linestyle=(0, (5, 3)), label=m.contender)
    axis.set_xlabel("SMs")
    axis.set_xticks([m.num_sms for m in ours])
    if rows:
        axis.set_ylim(0, max(m.seconds for m in rows) * scale * 1.25)
    axis.legend(frameon=False, fontsize=8)


def _bars(axis: Any, rows: list[Measurement], scale: float) -> None:
    for i, m in enumerate(rows):
        spread = [[(m.seconds - m.fastest) * scale], [(m.slowest - m.seconds) * scale]]
        axis.bar(i, m.seconds * scale, width=0.7, color=_COLOURS[m.contender], yerr=spread, ecolor="#9aa5b1", capsize=4)
    labels = [
        f"{m.contender.replace(' + ', ' +' + chr(10))}\n{duration(m.seconds)}\n{rate(m.physical_gbps)} GB/s"
        for m in rows
    ]
    axis.set_xticks(range(len(rows)), labels, fontsize=9)
    if rows:
        # One straggling iteration on a busy machine must not squeeze the bars.
        axis.set_ylim(top=min(max(m.slowest for m in rows) * 1.05, max(m.seconds for m in rows) * 2) * scale)
