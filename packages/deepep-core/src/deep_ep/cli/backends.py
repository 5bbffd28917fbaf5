"""``deepep backends``: what is installed, what it can do, and whether it can serve here."""

from __future__ import annotations

import importlib.metadata
import json
from dataclasses import asdict, dataclass
from typing import Annotated

import typer
from rich import box
from rich.console import Console
from rich.table import Table
from rich.text import Text

from .. import registry
from ..backend import ENTRY_POINT_GROUP, Capabilities, Environment
from ..errors import DeepEPError


@dataclass(frozen=True, kw_only=True)
class Finding:
    """One backend.

    Attributes:
        name, distribution, version: as registered; ``None`` for one that is known but not installed.
        modes, devices, features, max_ranks, priority: what it declares.
        obstacles: why it cannot serve here, each with its cure; empty if it can.
    """

    name: str
    distribution: str | None
    version: str | None
    modes: list[str]
    devices: list[str]
    features: list[str]
    max_ranks: int | None
    priority: int | None
    obstacles: list[str]

    @property
    def serves(self) -> bool:
        return self.version is not None and not self.obstacles


def find(environment: Environment | None = None) -> list[Finding]:
    """Every installed backend by falling priority, then the first-party ones that are not installed."""
    environment = environment if environment is not None else registry.local_environment()
    homes = {
        entry.name: entry.dist
        for entry in importlib.metadata.entry_points(group=ENTRY_POINT_GROUP)
        if entry.dist is not None
    }
    found = []
    for name in registry.installed_names():
        home = homes.get(name)
        try:
            backend = registry.load(name)
            obstacles = [str(o) for o in registry.obstacles(backend, environment)]
            can: Capabilities | None = backend.capabilities
        except DeepEPError as error:
            obstacles, can = [str(error)], None
        found.append(
            Finding(
                name=name,
                distribution=home.name if home else None,
                version=home.version if home else "unknown",
                modes=sorted(can.modes, reverse=True) if can else [],
                devices=sorted(can.devices) if can else [],
                features=_features(can) if can else [],
                max_ranks=can.max_ranks if can else None,
                priority=can.priority if can else None,
                obstacles=obstacles,
            )
        )
    found.sort(key=lambda finding: (-(finding.priority or 0), finding.name))
    installed = {finding.name for finding in found}
    for name, distribution in registry.FIRST_PARTY.items():
        if name not in installed:
            found.append(
                Finding(
                    name=name,
                    distribution=distribution,
                    version=None,
                    modes=[],
                    devices=[],
                    features=[],
                    max_ranks=None,
                    priority=None,
                    obstacles=[f"it is not installed. Install the package {distribution}"],
                )
            )
    return found


def _features(can: Capabilities) -> list[str]:
    """Declared abilities by name; new boolean ones appear by themselves."""
    names = [name for name, value in vars(can).items() if value is True]
    return [name.replace("_", " ") for name in names]


def backends(
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON instead of a table.")] = False,
) -> None:
    """List the backends: what is installed, what each can do, whether it can serve here and why not."""
    found = find()
    if as_json:
        typer.echo(json.dumps([asdict(finding) | {"serves": finding.serves} for finding in found], indent=2))
        return
    console = Console()
    environment = registry.local_environment()
    gpus = f"{environment.num_gpus} GPU{'s' if environment.num_gpus != 1 else ''}" if environment.num_gpus else "no GPU"
    table = Table(
        title=f"Backends on this machine ({gpus})",
        title_justify="left",
        title_style="bold",
        box=box.SIMPLE_HEAD,
        padding=(0, 1, 0, 0),
    )
    table.add_column("name", style="bold", no_wrap=True)
    table.add_column("package", no_wrap=True)
    table.add_column("modes", no_wrap=True)
    table.add_column("devices", no_wrap=True)
    table.add_column("abilities", style="dim", no_wrap=True)
    table.add_column("here", no_wrap=True)
    for finding in found:
        verdict = ("can serve", "green") if finding.serves else ("cannot serve", "yellow")
        table.add_row(
            finding.name,
            f"{finding.distribution or '?'}\n{finding.version or 'not installed'}",
            "\n".join(mode.replace("_", " ") for mode in finding.modes),
            "\n".join(finding.devices),
            "\n".join(finding.features),
            Text(*verdict) if finding.version is not None else Text("not installed"),
            style="dim" if finding.version is None else "",
        )
    console.print(table)
    for finding in found:
        if finding.version is not None:
            for obstacle in finding.obstacles:
                console.print(Text.assemble((f"{finding.name} cannot serve here: ", "yellow"), obstacle))
    able = [finding.name for finding in found if finding.serves]
    if able:
        console.print(
            f"A buffer that names no backend takes the first of these that serves its group: {', '.join(able)}."
        )
    else:
        console.print("[bold red]No backend can serve here.[/] Install deepep-reference, which runs anywhere.")
