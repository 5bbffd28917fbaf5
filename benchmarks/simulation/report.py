"""Tables and plots of the simulation."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rich import box
from rich.console import Console
from rich.table import Table

from deep_ep.internode_model import Estimate

from .cluster import Outcome, Scenario
from .records import PUBLISHED, PUBLISHED_LATENCIES, Measured

COLOURS = {"dispatch": "#2b6cb0", "combine": "#dd6b20"}


@dataclass(frozen=True, kw_only=True)
class Prediction:
    """One call as the model and the simulation see it."""

    scenario: Scenario
    estimate: Estimate
    outcome: Outcome


def _table(title: str, *columns: str) -> Table:
    table = Table(title=title, title_justify="left", title_style="bold", box=box.SIMPLE_HEAD, padding=(0, 1, 0, 0))
    for i, name in enumerate(columns):
        table.add_column(name, justify="left" if i == 0 else "right", no_wrap=True)
    return table


def show_predictions(console: Console, predictions: list[Prediction]) -> None:
    table = _table("Prediction", "call", "tokens", "SMs", "ring", "model", "simulated", "GB/s", "bytes", "busiest")
    for p in predictions:
        shape, kernel = p.scenario.shape, p.scenario.kernel
        name, share = max(p.outcome.busy.items(), key=lambda item: item[1])
        least = p.outcome.least_network_bytes
        table.add_row(
            f"{p.scenario.operation}, {shape.num_nodes} x {shape.ranks_per_node}",
            str(shape.num_tokens),
            str(kernel.num_sms),
            f"{kernel.ring_bytes / 2**20:.2f} MiB",
            f"{p.estimate.seconds * 1e6:.0f} us",
            f"{p.outcome.seconds * 1e6:.0f} us",
            f"{p.outcome.logical_rdma_gbps:.1f}",
            f"+{p.outcome.network_bytes / least - 1:.1%}" if least else "",
            f"{name} {share:.0%}",
        )
    console.print(table)


def show_comparison(console: Console, rows: list[tuple[Measured, Estimate | None, Outcome | None]]) -> None:
    table = _table("Measured", "record", "operation", "nodes", "SMs", "measured", "model", "simulated")
    for measured, estimate, outcome in rows:
        table.add_row(
            measured.record,
            measured.operation,
            f"{measured.shape.num_nodes} x {measured.shape.ranks_per_node}",
            str(measured.num_sms),
            f"{measured.seconds * 1e6:.0f} us",
            _against(estimate.seconds, measured.seconds) if estimate is not None else "",
            _against(outcome.seconds, measured.seconds) if outcome is not None else "",
        )
    console.print(table)


def _against(seconds: float, measured: float) -> str:
    return f"{seconds * 1e6:.0f} us {seconds / measured - 1:+.0%}"


def show_published(console: Console) -> None:
    table = _table("Published, GB/s to all nodes", "who", "operation", "nodes", "published", "model", "off", "bound by")
    for figure in PUBLISHED:
        estimate = figure.estimate()
        table.add_row(
            figure.who,
            figure.operation,
            str(figure.num_nodes),
            f"{figure.gbps:g}",
            f"{estimate.logical_rdma_gbps:.1f}",
            f"{estimate.logical_rdma_gbps / figure.gbps - 1:+.0%}",
            estimate.bound_by,
        )
    console.print(table)
    table = _table("DeepEP V1, low latency", "operation", "nodes", "published", "NIC alone", "left")
    for latency in PUBLISHED_LATENCIES:
        table.add_row(
            latency.operation,
            str(latency.num_nodes),
            f"{latency.us:g} us",
            f"{latency.nic_us():.0f} us",
            f"{latency.us - latency.nic_us():.0f} us",
        )
    console.print(table)


def draw(predictions: list[Prediction], path: Path) -> None:
    """Logical RDMA bandwidth over nodes: simulation, model, and what others have published."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(11, 4.6), dpi=130, layout="constrained", facecolor="white")
    FigureCanvasAgg(figure)
    figure.suptitle("Normal mode across nodes: predicted, not measured", fontsize=13, fontweight="bold")
    figure.supxlabel(
        "nodes of 8 ranks, tokens of each below; 7168 hidden, top-8 in the 4 best nodes; 45 GB/s of a 400 Gb/s NIC "
        "per rank; hollow: figures that others published",
        fontsize=9,
        color="#52606d",
    )
    axes = figure.subplots(1, 2, sharey=True)
    for axis, operation in zip(axes, COLOURS, strict=True):
        rows = [p for p in predictions if p.scenario.operation == operation]
        nodes = [p.scenario.shape.num_nodes for p in rows]
        axis.plot(nodes, [p.estimate.logical_rdma_gbps for p in rows], color="#9aa5b1", label="model")
        gbps = [p.outcome.logical_rdma_gbps for p in rows]
        axis.plot(nodes, gbps, "o", color=COLOURS[operation], label="simulation")
        _others(axis, operation)
        axis.set_xscale("log", base=2)
        axis.set_xticks(nodes, [f"{p.scenario.shape.num_nodes}\n{p.scenario.shape.num_tokens}" for p in rows])
        axis.minorticks_off()
        axis.set_ylim(0, 100)
        axis.set_title(operation, loc="left")
        axis.spines[["top", "right"]].set_visible(False)
        axis.legend(frameon=False, fontsize=8)
    axes[0].set_ylabel("GB/s per rank to all nodes, own one included")
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path)


def _others(axis: Any, operation: str) -> None:
    marks = dict(zip(dict.fromkeys(figure.who for figure in PUBLISHED), "sDv^", strict=True))
    for who, mark in marks.items():
        found = [figure for figure in PUBLISHED if figure.who == who and figure.operation == operation]
        at, gbps = [f.num_nodes for f in found], [f.gbps for f in found]
        axis.plot(at, gbps, mark, markerfacecolor="none", color="#4a5568", label=who)
