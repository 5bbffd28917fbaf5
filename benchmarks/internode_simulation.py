"""Normal mode across nodes, simulated chunk by chunk: ``python benchmarks/internode_simulation.py --help``.

What is assumed, and what is not shown, stands in docs/internode-model.md.
"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Annotated, get_args

import typer
from rich.console import Console
from simulation import Kernel, Scenario, records, report, simulate

from deep_ep.internode_model import H200_400G, H200_VIRTUAL_NODES, Operation, Shape, enough_ring, enough_sms, estimate

app = typer.Typer(add_completion=False, no_args_is_help=True, help=__doc__, pretty_exceptions_show_locals=False)
OPERATIONS: tuple[Operation, ...] = get_args(Operation)
_LEAST_SMS = 8
_Plot = Annotated[Path | None, typer.Option(help="Where a plot over the nodes goes; none if not given.")]


@app.command()
def predict(
    nodes: Annotated[str, typer.Option(help="Node counts, with commas.")] = "2,4,8",
    ranks_per_node: Annotated[int, typer.Option(min=1, max=8)] = 8,
    tokens: Annotated[str, typer.Option(help="Of each rank; one number, or one for each node count.")] = "4096",
    hidden: Annotated[int, typer.Option(min=16)] = 7168,
    topk: Annotated[int, typer.Option(min=1)] = 8,
    experts: Annotated[int, typer.Option(min=1, help="At least; rounded up to a multiple of the ranks.")] = 256,
    groups: Annotated[int, typer.Option(min=0, help="Nodes that a token may choose from; 0: all.")] = 4,
    bf16: Annotated[bool, typer.Option("--bf16", help="Dispatch bf16 rows instead of FP8 with scales.")] = False,
    cached: Annotated[bool, typer.Option("--cached", help="Dispatch by a known handle.")] = False,
    virtual: Annotated[bool, typer.Option("--virtual", help="All nodes in one NVLink domain, no NICs.")] = False,
    nic_gbps: Annotated[float, typer.Option(min=0.1, help="Payload per rank, each way.")] = H200_400G.nic_gbps or 0,
    nvlink_gbps: Annotated[float, typer.Option(min=0.1, help="Egress per GPU.")] = H200_400G.nvlink_push_gbps,
    latency_us: Annotated[
        float, typer.Option(min=0, help="A small message between nodes, one way; 0: the machine's.")
    ] = 0.0,
    num_sms: Annotated[int, typer.Option(min=0, help="0: what the model finds enough.")] = 0,
    ring_bytes: Annotated[int, typer.Option(min=0, help="Of one ring; 0: what the model finds enough.")] = 0,
    seed: int = 0,
    plot: _Plot = None,
) -> None:
    """Simulate dispatch and combine, beside the cost model."""
    console = Console(width=120)
    machine = replace(H200_VIRTUAL_NODES if virtual else H200_400G, nvlink_push_gbps=nvlink_gbps)
    machine = replace(machine, nvlink_pull_gbps=machine.nvlink_pull_gbps * nvlink_gbps / H200_400G.nvlink_push_gbps)
    if not virtual:
        machine = replace(machine, nic_gbps=nic_gbps)
    if latency_us:
        machine = replace(machine, network_us=latency_us)
    counts = [int(part) for part in nodes.split(",")]
    of_each = [int(part) for part in tokens.split(",")]
    if len(of_each) not in (1, len(counts)):
        raise typer.BadParameter("give one number, or one for each node count.", param_hint="--tokens")
    predictions = []
    for i, num_nodes in enumerate(counts):
        num_ranks = num_nodes * ranks_per_node
        is_limited = 0 < groups < num_nodes
        shape = Shape(
            num_nodes=num_nodes,
            ranks_per_node=ranks_per_node,
            num_tokens=of_each[i % len(of_each)],
            hidden=hidden,
            num_topk=topk,
            num_experts=-(-experts // num_ranks) * num_ranks,
            num_groups=num_nodes if is_limited else 1,
            num_topk_groups=groups if is_limited else 1,
            is_fp8=not bf16,
            is_cached=cached,
        )
        for operation in OPERATIONS:
            sms = num_sms or max(_LEAST_SMS, enough_sms(operation, shape, machine))
            ring = ring_bytes or enough_ring(operation, shape, machine, num_sms=sms).num_bytes
            scenario = Scenario(
                operation=operation,
                shape=shape,
                machine=machine,
                kernel=Kernel(num_sms=sms, ring_bytes=ring),
                seed=seed,
            )
            predictions.append(
                report.Prediction(
                    scenario=scenario,
                    estimate=estimate(operation, shape, machine, num_sms=sms),
                    outcome=simulate(scenario),
                )
            )
    report.show_predictions(console, predictions)
    if plot is not None:
        report.draw(predictions, plot)
        console.print(f"written  [bold]{plot}[/]", highlight=False)


@app.command()
def compare(
    files: Annotated[list[Path] | None, typer.Argument(help="Records; all in benchmarks/results if none.")] = None,
) -> None:
    """Set what was measured on four and on two H200s beside model and simulation."""
    rows = []
    printed = (
        *records.PRINTED_BEFORE,
        *records.PRINTED,
        *records.PRINTED_LATER,
        *records.PRINTED_COMBINE,
        *records.PRINTED_NOW,
    )
    for measured in records.load(files) if files else [*records.load(), *printed]:
        machine = measured.machine
        # The model knows no routing but the uniform one.
        estimated = estimate(measured.operation, measured.shape, machine, num_sms=measured.num_sms)
        # Inside one node combine loads in bulk, which is not the kernel that is simulated.
        is_simulated = measured.operation == "dispatch" or measured.shape.num_nodes > 1
        simulated = simulate(measured.scenario, measured.routing()) if is_simulated else None
        rows.append((measured, estimated if measured.to == "all" else None, simulated))
    report.show_comparison(Console(width=120), rows)


@app.command()
def published() -> None:
    """Set figures that others have published beside the model."""
    report.show_published(Console(width=120))


if __name__ == "__main__":
    app()
