"""The layout of windows and messages, compiled by g++ and fuzzed under sanitizers, and the hint that sizes a window."""

from __future__ import annotations

import os
import shutil
import subprocess
from pathlib import Path

import pytest

from deep_ep import Buffer

HERE = Path(__file__).resolve().parent
HEADERS = Path(os.environ.get("DEEPEP_INCLUDE_DIR", HERE.parents[1] / "deepep-core/src/deep_ep/include"))


@pytest.fixture(scope="module")
def program(tmp_path_factory: pytest.TempPathFactory) -> Path:
    compiler = shutil.which("g++")
    if compiler is None:
        pytest.skip("needs g++; none is on the PATH")
    target = tmp_path_factory.mktemp("fuzz") / "window_fuzz"
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
    headers = [f"-I{HEADERS}", f"-I{HERE.parent / 'csrc'}"]
    subprocess.run([compiler, *flags, *headers, str(HERE / "window_fuzz.cpp"), "-o", str(target)], check=True)
    return target


@pytest.mark.parametrize("seed", [1, 2, 3])
def test_windows_agree_with_exact_arithmetic(program: Path, seed: int) -> None:
    done = subprocess.run([str(program), "fuzz", str(seed), "4000"], capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stdout + done.stderr


@pytest.mark.parametrize("has_remote", [False, True], ids=["nvlink", "rdma"])
@pytest.mark.parametrize("max_tokens", [1, 8, 100, 128, 1024])
@pytest.mark.parametrize("hidden", [8, 1000, 7168, 16384])
@pytest.mark.parametrize("num_ranks", [1, 4, 64, 256])
def test_size_hint_is_enough_for_every_topk(
    program: Path, num_ranks: int, hidden: int, max_tokens: int, has_remote: bool
) -> None:
    hint = Buffer.get_low_latency_rdma_size_hint(max_tokens, hidden, num_ranks, 2 * num_ranks)
    for num_topk in (1, 8, 32):
        shape = map(str, (num_ranks, max_tokens, hidden, num_topk, int(has_remote)))
        needed = int(
            subprocess.run([str(program), "need", *shape], capture_output=True, check=True, timeout=300).stdout
        )
        assert needed <= hint, f"top-{num_topk} needs {needed} bytes, the hint is {hint}"
    assert has_remote is False or hint < 1.5 * needed + (1 << 20), f"the hint {hint} wastes memory: {needed} are needed"
