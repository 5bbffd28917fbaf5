"""C++ programs over the shared headers, compiled once per session with the host's g++."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import pytest

HERE = Path(__file__).parent
INCLUDE = HERE.parents[1] / "src" / "deep_ep" / "include"


@dataclass(frozen=True, kw_only=True)
class Mutant:
    """One deliberate mistake in the headers: ``old``, which occurs once in ``header``, becomes ``new``."""

    name: str
    header: str
    old: str
    new: str


@dataclass(frozen=True, kw_only=True)
class Program:
    path: Path

    def run(self, *arguments: object) -> subprocess.CompletedProcess[str]:
        """Run to the end, whatever the exit status."""
        command = [str(self.path), *map(str, arguments)]
        # One race is enough to fail; writing reports of them all takes longer than the program.
        environment = {**os.environ, "TSAN_OPTIONS": "halt_on_error=1"}
        result = subprocess.run(command, capture_output=True, text=True, timeout=300, env=environment)
        if "unexpected memory mapping" in result.stderr:
            pytest.skip(f"ThreadSanitizer of this g++ does not run on this kernel: {result.stderr.splitlines()[0]}")
        return result

    def check(self, *arguments: object) -> str:
        """Run and return what it prints; a failure shows what does not hold."""
        result = self.run(*arguments)
        assert result.returncode == 0, f"exit {result.returncode}: {result.stderr[-4000:]}{result.stdout[-1000:]}"
        return result.stdout


Compile = Callable[..., Program]


@pytest.fixture(scope="session")
def compile_program(tmp_path_factory: pytest.TempPathFactory) -> Compile:
    """``compile_program(source, *flags, sanitizers="", mutant=None)``: the program, compiled when first asked for."""
    compiler = shutil.which("g++")
    if compiler is None:
        pytest.skip("no g++ on this machine: the shared headers cannot be compiled")
    folder = tmp_path_factory.mktemp("native")
    programs: dict[tuple[object, ...], Program] = {}

    def compile_one(source: str, *flags: str, sanitizers: str = "", mutant: Mutant | None = None) -> Program:
        key = (source, flags, sanitizers, mutant)
        if key in programs:
            return programs[key]
        include = INCLUDE if mutant is None else mutated(mutant, folder / re.sub(r"\W+", "-", mutant.name))
        program = folder / f"program-{len(programs)}"
        command = [compiler, "-std=c++17", "-Wall", "-Wextra", f"-I{include}", "-pthread", *flags]
        if "-O0" not in flags:
            command += ["-O1"]
        if sanitizers:
            command += ["-g1", f"-fsanitize={sanitizers}", "-fno-sanitize-recover=all"]
        # Mistakes may leave something unused; the headers as they are compile without a warning.
        command += ["-w"] if mutant is not None else ["-Werror"]
        result = subprocess.run([*command, str(HERE / source), "-o", str(program)], capture_output=True, text=True)
        assert result.returncode == 0, result.stderr[-4000:]
        programs[key] = Program(path=program)
        return programs[key]

    return compile_one


@pytest.fixture(scope="session")
def mutant_of() -> type[Mutant]:
    """The class of mutants, for tests that cannot import this file."""
    return Mutant


def mutated(mutant: Mutant, folder: Path) -> Path:
    """A copy of the headers with the mistake in it."""
    shutil.copytree(INCLUDE, folder)
    path = folder / "deepep" / mutant.header
    text = path.read_text()
    assert text.count(mutant.old) == 1, f"{mutant.header} has {text.count(mutant.old)} of: {mutant.old}"
    path.write_text(text.replace(mutant.old, mutant.new))
    return folder
