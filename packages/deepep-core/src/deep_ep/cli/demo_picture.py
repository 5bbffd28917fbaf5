"""The demo's picture: expert load and traffic matrix."""

from __future__ import annotations

from pathlib import Path

import numpy as np
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from .demo_job import DemoReport, DemoSettings
from .show import bytes_text

_INK, _FAINT, _GOOD, _BAD = "#1f2933", "#9aa5b1", "#2f855a", "#c53030"
_RANK_COLOURS = ("#2b6cb0", "#dd6b20", "#2f855a", "#805ad5", "#d53f8c", "#319795", "#b7791f", "#4a5568")


def draw(report: DemoReport, settings: DemoSettings, source: str, path: Path) -> None:
    """Write a PNG (or what the suffix of ``path`` says)."""
    figure = Figure(figsize=(12.5, 5.4), dpi=130, layout="constrained", facecolor="white")
    FigureCanvasAgg(figure)
    left, right = figure.subplots(1, 2, width_ratios=(1.65, 1))
    verdict, colour = ("all values agree with one process", _GOOD) if report.agrees else ("values differ", _BAD)
    backends = " and ".join(sorted(set(report.backends.values())))
    figure.suptitle(
        f"{Path(source).name}: {sum(report.num_tokens)} byte tokens, {report.num_ranks} ranks, "
        f"{settings.num_experts} experts, top-{settings.num_topk}, backend {backends}",
        fontsize=13,
        fontweight="bold",
        color=_INK,
    )
    figure.supxlabel(verdict, fontsize=11, color=colour, fontweight="bold")

    per_rank = len(report.expert_load) // report.num_ranks
    load = np.array(report.expert_load)
    left.bar(
        np.arange(load.size),
        load,
        width=0.86,
        color=[_RANK_COLOURS[e // per_rank % len(_RANK_COLOURS)] for e in range(load.size)],
    )
    left.axhline(load.mean(), color=_INK, linewidth=1, linestyle=(0, (4, 3)))
    left.annotate(
        f"mean\n{load.mean():.0f}",
        (1.0, load.mean()),
        xycoords=("axes fraction", "data"),
        xytext=(4, 0),
        textcoords="offset points",
        va="center",
        color=_INK,
        fontsize=9,
    )
    top = load.max() * 1.14 if load.max() else 1.0
    for rank in range(report.num_ranks):
        first = rank * per_rank
        if rank:
            left.axvline(first - 0.5, color=_FAINT, linewidth=0.8)
        left.text(
            first + (per_rank - 1) / 2,
            top * 0.985,
            f"rank {rank}\n{load[first : first + per_rank].sum()} in all",
            ha="center",
            va="top",
            fontsize=9 if report.num_ranks <= 8 else 6,
            color=_RANK_COLOURS[rank % len(_RANK_COLOURS)],
            fontweight="bold",
        )
    left.set(xlim=(-0.7, load.size - 0.3), ylim=(0, top * 1.04), xlabel="expert", ylabel="tokens")
    left.set_title("Expert load", loc="left", color=_INK)
    left.spines[["top", "right"]].set_visible(False)

    sent = np.array(report.sent)
    image = right.imshow(sent, cmap="Blues", vmin=0, vmax=max(1.0, 1.15 * sent.max()))
    if report.num_ranks <= 8:
        for source_rank in range(report.num_ranks):
            for target in range(report.num_ranks):
                count = int(sent[source_rank, target])
                right.text(
                    target,
                    source_rank,
                    f"{count}\n{bytes_text(count * report.row_bytes)}",
                    ha="center",
                    va="center",
                    fontsize=10 if report.num_ranks <= 4 else 6.5,
                    color="white" if count > 0.65 * sent.max() else _INK,
                )
    right.set(
        xlabel="to rank (holds the expert)",
        ylabel="from rank (holds the token)",
        xticks=range(report.num_ranks),
        yticks=range(report.num_ranks),
    )
    right.set_title("Tokens and bytes dispatched", loc="left", color=_INK)
    right.spines[:].set_visible(False)
    figure.colorbar(image, ax=right, shrink=0.8, label="tokens")
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path)
