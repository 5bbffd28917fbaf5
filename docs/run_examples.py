"""Runs what README and docs show, so that no example rots: ``python docs/run_examples.py [page ...]``.

What a fenced block promises is decided by its language:

- ``python``: a whole program. It has to exit with 0; if the next block is ``text``, its output has to match that.
- ``console``: lines that begin with ``$ `` are commands, run in the repository root; the lines below each have to match
  its output.
- any other: not run (the first two blocks of README's "Quick start" are run by ``.ci/run`` and by newcomers).

``...`` in expected output stands for anything. Relative links are followed, and pages that list names have to list all.
"""

from __future__ import annotations

import os
import re
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
TIMEOUT_S = 180
_FENCE = re.compile(r"^```(\w*)[^\n]*\n(.*?)^```$", re.MULTILINE | re.DOTALL)
_LINK = re.compile(r"\]\(([^)\s]+)\)|src=\"([^\"]+)\"")


@dataclass(frozen=True, kw_only=True)
class Block:
    """One fenced block: its language, its text, and the line of its first line."""

    language: str
    text: str
    line: int


@dataclass(frozen=True, kw_only=True)
class Example:
    """Something to run and what it has to print (``None``: anything)."""

    where: str
    command: list[str] | str
    expected: str | None


def blocks_of(page: str) -> list[Block]:
    return [
        Block(language=match[1], text=match[2], line=page.count("\n", 0, match.start()) + 2)
        for match in _FENCE.finditer(page)
    ]


def examples_of(path: Path, folder: Path) -> Iterator[Example]:
    """The examples of one page; programs are written into ``folder``."""
    blocks = blocks_of(path.read_text())
    name = path.relative_to(ROOT)
    for block, following in zip(blocks, [*blocks, None][1:], strict=True):
        if block.language == "python":
            # A program of its own name: ranks import the module that defines the function they run.
            program = folder / f"{path.stem.replace('-', '_')}_line_{block.line}.py"
            program.write_text(block.text)
            printed = following.text if following is not None and following.language == "text" else None
            yield Example(where=f"{name}:{block.line}", command=[sys.executable, str(program)], expected=printed)
        elif block.language == "console":
            for part in re.split(r"^(?=\$ )", block.text, flags=re.MULTILINE):
                if part.startswith("$ "):
                    command, _, printed = part[2:].partition("\n")
                    yield Example(where=f"{name}:{block.line}", command=command, expected=printed or None)


def matches(expected: str, printed: str) -> bool:
    """Whether ``printed`` is ``expected``, where ``...`` stands for anything and spaces at line ends do not count."""
    tidy = [re.sub(r"[ \t]+$", "", text, flags=re.MULTILINE).strip() for text in (expected, printed)]
    pattern = ".*?".join(re.escape(piece) for piece in tidy[0].split("..."))
    return re.fullmatch(pattern, tidy[1], re.DOTALL) is not None


def run(example: Example, folder: Path) -> str | None:
    """What went wrong, or ``None``."""
    shell = isinstance(example.command, str)
    bin_folder = str(Path(sys.executable).parent)
    environment = {name: value for name, value in os.environ.items() if not name.startswith("DEEPEP_")}
    environment |= {"PATH": f"{bin_folder}:{os.environ['PATH']}", "COLUMNS": "120", "NO_COLOR": "1", "TERM": "dumb"}
    try:
        done = subprocess.run(
            ["bash", "-c", example.command] if isinstance(example.command, str) else example.command,
            cwd=ROOT if shell else folder,
            env=environment,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT if shell else subprocess.PIPE,
            text=True,
            timeout=TIMEOUT_S,
        )
    except subprocess.TimeoutExpired:
        return f"did not end within {TIMEOUT_S} s"
    if done.returncode != 0:
        return f"ended with {done.returncode}:\n{done.stdout}{done.stderr or ''}"
    if example.expected is not None and not matches(example.expected, done.stdout):
        return f"printed\n{done.stdout}\nwhere the page shows\n{example.expected}"
    return None


def broken_links(path: Path) -> list[str]:
    """Relative links of a page that lead nowhere."""
    targets = [a or b for a, b in _LINK.findall(_FENCE.sub("", path.read_text()))]
    local = [t.split("#")[0] for t in targets if not re.match(r"\w+:", t) and not t.startswith("#")]
    return [target for target in local if target and not (path.parent / target).exists()]


def unlisted_names() -> Iterator[str]:
    """Public names and environment variables that their page does not mention."""
    import deep_ep
    from deep_ep import settings

    api = (ROOT / "docs" / "api.md").read_text()
    public = [name for name in dir(deep_ep.Buffer) if not name.startswith("_")]
    for name in [*deep_ep.__all__, *public]:
        if re.search(rf"\b{name}\b", api) is None:
            yield f"docs/api.md: {name} is public and not mentioned"
    configuration = (ROOT / "docs" / "configuration.md").read_text()
    for variable in settings.VARIABLES:
        if variable.name not in configuration:
            yield f"docs/configuration.md: {variable.name} is read and not mentioned"


def main(names: list[str]) -> int:
    pages = [Path(name).resolve() for name in names]
    if not pages:
        pages = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").rglob("*.md"))]
        pages += [*sorted((ROOT / "packages").glob("*/README.md")), ROOT / "examples" / "README.md"]
        pages += sorted((ROOT / "benchmarks").rglob("README.md"))
    unlisted = [] if names else list(unlisted_names())
    print(*unlisted, sep="\n", end="\n" if unlisted else "")
    failures, num_examples = len(unlisted), 0
    for path in pages:
        for target in broken_links(path):
            failures += 1
            print(f"{path.relative_to(ROOT)}: the link to {target} leads nowhere")
        with tempfile.TemporaryDirectory() as folder:
            for example in examples_of(path, Path(folder)):
                started = time.monotonic()
                complaint = run(example, Path(folder))
                num_examples += 1
                failures += complaint is not None
                shown = example.command if isinstance(example.command, str) else "program"
                verdict = "ok" if complaint is None else "FAILED"
                print(f"{example.where}: {shown}: {verdict} ({time.monotonic() - started:.1f} s)", flush=True)
                if complaint is not None:
                    print(complaint, flush=True)
    print(f"{num_examples} examples of {len(pages)} pages, {failures} failures")
    return 1 if failures else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
