"""The command ``deepep``: `main` is all that other code may rely on.

Nothing here is imported by ``import deep_ep``; typer, rich and matplotlib come with the extra ``deepep-core[cli]``.
"""

from __future__ import annotations

import importlib.util
import sys

_NEEDED = ("typer", "rich", "matplotlib")


def main() -> None:
    """Run the command line of this process; exits."""
    missing = [name for name in _NEEDED if importlib.util.find_spec(name) is None]
    if missing:
        print(
            f"deepep: the command line needs {', '.join(missing)}, not installed here. "
            "Install the extra: pip install 'deepep-core[cli]'",
            file=sys.stderr,
        )
        raise SystemExit(2)
    from .app import app

    app(prog_name="deepep")


__all__ = ["main"]
