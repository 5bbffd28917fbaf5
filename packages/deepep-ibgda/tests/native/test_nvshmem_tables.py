"""What NVSHMEM's IBGDA state becomes, on the CPU: made-up states through the reader, against NVSHMEM's own headers."""

from __future__ import annotations

import importlib.util
import os
import re
import shutil
import subprocess
from pathlib import Path

import pytest

HERE = Path(__file__).parent
CSRC = HERE.parents[1] / "csrc"
INCLUDE = HERE.parents[2] / "deepep-core" / "src" / "deep_ep" / "include"
SOURCE = HERE / "nvshmem_tables.cpp"
CASES = re.findall(r"^    CASE\((\w+)\),$", SOURCE.read_text(), flags=re.MULTILINE)


def nvshmem_include() -> Path | None:
    """NVSHMEM's headers: below NVSHMEM_DIR, or in the wheel."""
    if folder := os.environ.get("NVSHMEM_DIR"):
        return Path(folder) / "include"
    try:
        spec = importlib.util.find_spec("nvidia.nvshmem")
    except ModuleNotFoundError:
        return None
    locations = list(spec.submodule_search_locations or []) if spec is not None else []
    return Path(locations[0]) / "include" if locations else None


@pytest.fixture(scope="session")
def program(tmp_path_factory: pytest.TempPathFactory) -> Path:
    include, compiler = nvshmem_include(), shutil.which("g++")
    if include is None or compiler is None:
        missing = "g++" if compiler is None else "NVSHMEM's headers (install nvidia-nvshmem-cu13, or set NVSHMEM_DIR)"
        pytest.skip(f"{missing} not found: the reader of NVSHMEM's state cannot be compiled")
    path = tmp_path_factory.mktemp("nvshmem") / "nvshmem_tables"
    folders = [f"-I{INCLUDE}", f"-I{CSRC}", f"-I{CSRC / 'provider' / 'shim'}", "-isystem", str(include)]
    flags = ["-std=c++17", "-O0", "-g1", "-Wall", "-Wextra", "-Werror", "-fsanitize=address,undefined", "-pthread"]
    result = subprocess.run([compiler, *flags, *folders, str(SOURCE), "-o", str(path)], capture_output=True, text=True)
    assert result.returncode == 0, result.stderr[-4000:]
    return path


@pytest.mark.parametrize("case", CASES)
def test_case(program: Path, case: str) -> None:
    result = subprocess.run([str(program), case], capture_output=True, text=True, timeout=300)
    assert result.returncode == 0, result.stderr[-4000:]
