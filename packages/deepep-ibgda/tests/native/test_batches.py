"""How the software NIC's copies on a GPU are known to have landed, on the CPU."""

from __future__ import annotations

import shutil
import subprocess
from pathlib import Path

import pytest

HERE = Path(__file__).parent
CSRC = HERE.parents[1] / "csrc"
INCLUDE = HERE.parents[2] / "deepep-core" / "src" / "deep_ep" / "include"
NUM_STEPS = 1_000_000
# (old, new) in provider/batches.hpp: mistakes that the program must find.
MISTAKES = {
    "moves do not open a batch": ("void add_move() { is_open_empty_ = false; }", "void add_move() {}"),
    "the batch that is still open counts as recorded": ("landed_ = open_ - 1;", "landed_ = open_;"),
    "the event is moved while it is in use": ("if (!is_recorded_) {", "if (true) {"),
    "a wait for everything forgets the open batch": ("landed_ = open_++;", "landed_ = open_++ - 1;"),
}


def compile_program(folder: Path, csrc: Path) -> Path:
    compiler = shutil.which("g++")
    if compiler is None:
        pytest.skip("no g++ on this machine: the bookkeeping of moves cannot be compiled")
    path = folder / "batches"
    flags = ["-std=c++17", "-O1", "-g1", "-Wall", "-Wextra", "-Werror", "-fsanitize=address,undefined"]
    command = [compiler, *flags, f"-I{INCLUDE}", f"-I{csrc}", str(HERE / "batches.cpp"), "-o", str(path)]
    result = subprocess.run(command, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr[-4000:]
    return path


def run(program: Path) -> subprocess.CompletedProcess[str]:
    return subprocess.run([str(program), str(NUM_STEPS)], capture_output=True, text=True, timeout=300)


def test_what_has_landed_is_said_and_nothing_else(tmp_path: Path) -> None:
    result = run(compile_program(tmp_path, CSRC))
    assert result.returncode == 0, result.stderr[-4000:]


@pytest.mark.parametrize("name", MISTAKES)
def test_a_mistake_is_found(tmp_path: Path, name: str) -> None:
    old, new = MISTAKES[name]
    text = (CSRC / "provider" / "batches.hpp").read_text()
    assert text.count(old) == 1
    (tmp_path / "provider").mkdir()
    (tmp_path / "provider" / "batches.hpp").write_text(text.replace(old, new))
    assert run(compile_program(tmp_path, tmp_path)).returncode == 1
