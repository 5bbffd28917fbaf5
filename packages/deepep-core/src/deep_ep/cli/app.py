"""The table of commands. What each does is in the module of its name."""

from __future__ import annotations

from typing import Annotated

import typer

from .. import __version__
from . import backends, bench, demo, doctor, tune

app = typer.Typer(
    name="deepep",
    help="Expert-parallel dispatch and combine: try it, inspect the machine, measure.",
    no_args_is_help=True,
    add_completion=False,
    rich_markup_mode="markdown",
    pretty_exceptions_show_locals=False,
)


def _print_version(wanted: bool) -> None:
    if wanted:
        typer.echo(f"deepep {__version__}")
        raise typer.Exit()


@app.callback()
def _root(
    version: Annotated[
        bool, typer.Option("--version", callback=_print_version, is_eager=True, help="Print the version.")
    ] = False,
) -> None:
    pass


app.command("demo")(demo.demo)
app.command("backends")(backends.backends)
app.command("doctor")(doctor.doctor)
app.command("bench")(bench.bench)
app.command("tune")(tune.tune)
