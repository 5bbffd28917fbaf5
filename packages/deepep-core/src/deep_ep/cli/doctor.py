"""``deepep doctor``: the state of this machine as far as this library depends on it."""

from __future__ import annotations

import json
from dataclasses import asdict
from typing import Annotated

import typer
from rich import box
from rich.console import Console
from rich.table import Table
from rich.text import Text

from . import machine
from .machine import Fact, Level

_STYLE = {Level.FINE: "green", Level.NOTE: "cyan", Level.AMISS: "yellow", Level.BROKEN: "bold red"}
_MARK = {Level.FINE: "✓", Level.NOTE: "·", Level.AMISS: "!", Level.BROKEN: "✗"}


def doctor(
    need: Annotated[
        list[str] | None,
        typer.Option(help="A backend that has to work here; exit code 1 if it cannot. May be repeated."),
    ] = None,
    need_gpus: Annotated[int, typer.Option(min=0, help="GPUs that have to be here; exit code 1 if fewer are.")] = 0,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON instead of tables.")] = False,
) -> None:
    """Inspect this machine: versions, GPUs, links, NVSHMEM and NCCL, limits; cause and cure of what is amiss.

    Exit code 0 unless something asked for (--need, --need-gpus, the settings of this library) cannot work.
    """
    facts = machine.examine(needed_backends=tuple(need or ()), needed_gpus=need_gpus)
    broken = [fact for fact in facts if fact.level is Level.BROKEN]
    if as_json:
        typer.echo(json.dumps([asdict(fact) | {"level": fact.level.name.lower()} for fact in facts], indent=2))
    else:
        _show(Console(), facts)
    raise typer.Exit(1 if broken else 0)


def _show(console: Console, facts: list[Fact]) -> None:
    table = Table(box=box.SIMPLE_HEAD, title="deepep doctor", title_justify="left", title_style="bold")
    table.add_column("")
    table.add_column("", style="bold")
    table.add_column("found", overflow="fold")
    section = ""
    for fact in facts:
        if fact.section != section:
            if section:
                table.add_section()
            section = fact.section
            table.add_row("", Text(section, style="bold underline"), "")
        table.add_row(Text(_MARK[fact.level], style=_STYLE[fact.level]), fact.name, Text(fact.found))
    console.print(table)
    amiss = [fact for fact in facts if fact.cause]
    if not amiss:
        console.print("[green]Nothing amiss.[/]")
    for fact in amiss:
        console.print(
            Text.assemble(
                (f"{_MARK[fact.level]} {fact.name}: ", _STYLE[fact.level]), fact.cause, (f" → {fact.cure}", "bold")
            )
        )
