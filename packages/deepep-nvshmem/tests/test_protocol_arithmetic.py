"""The layout arithmetic shared by host and kernels, compiled by the host's compiler and fuzzed under sanitizers."""

from __future__ import annotations

import os
import shutil
import subprocess
from pathlib import Path

import pytest

HERE = Path(__file__).resolve().parent
HEADERS = Path(os.environ.get("DEEPEP_INCLUDE_DIR", HERE.parents[1] / "deepep-core/src/deep_ep/include"))


@pytest.fixture(scope="module")
def program(tmp_path_factory: pytest.TempPathFactory) -> Path:
    compiler = shutil.which("g++")
    if compiler is None:
        pytest.skip("needs g++; none is on the PATH")
    target = tmp_path_factory.mktemp("fuzz") / "protocol_fuzz"
    flags = [
        "-std=c++17",
        "-O1",
        "-g",
        "-Wall",
        "-Wextra",
        "-Werror",
        "-fsanitize=address,undefined",
        "-fno-sanitize-recover=all",
    ]
    subprocess.run([compiler, *flags, f"-I{HEADERS}", str(HERE / "protocol_fuzz.cpp"), "-o", str(target)], check=True)
    return target


@pytest.mark.parametrize("seed", [1, 2, 3])
def test_shared_arithmetic_agrees_with_exact_arithmetic(program: Path, seed: int) -> None:
    done = subprocess.run([str(program), str(seed), "4000"], capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stdout + done.stderr
