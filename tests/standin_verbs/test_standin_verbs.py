"""The stand-in for libibverbs: two processes over it, in memory of the host and of a GPU that is played.

And NVSHMEM's own transport starts over it.
"""

from __future__ import annotations

import importlib.util
import os
import re
import shutil
import subprocess
import sys
import uuid
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

HERE = Path(__file__).parent
CASES = re.findall(r"^    CASE\((\w+)\),$", (HERE / "cases.cpp").read_text(), flags=re.MULTILINE)
FLAGS = ("-std=c++17", "-O1", "-Wall", "-Wextra", "-Werror")
HEADER = Path("/usr/include/infiniband/verbs.h")
# What the names of this process's segments begin with.
OWN_SEGMENTS = f"standin_verbs_{uuid.uuid4().hex}"

# name: (file, old, new, case, memory). The case must fail with the mistake.
MISTAKES = {
    "answers do not wait for copies": (
        "agent.cpp",
        "const bool have_landed = shared_.copier.finish();",
        "const bool have_landed = true;",
        "writes_arrive",
        "gpu",
    ),
    "keys are not compared": ("memory.cpp", "region.lkey != key || ", "", "bad_requests_fail_and_flush", "host"),
    "rights are not looked at": (
        "memory.cpp",
        "(region.access & rights) != rights",
        "(region.access & rights) == -1",
        "bad_requests_fail_and_flush",
        "host",
    ),
    "bounds are not looked at": (
        "memory.cpp",
        "return num_bytes <= region.num_bytes - (address - region.start) ?",
        "return num_bytes <= region.num_bytes ?",
        "bad_requests_fail_and_flush",
        "host",
    ),
    "a read onto itself writes back": (
        "pair.cpp",
        "if (!is_onto_itself && !scatter(",
        "if (static_cast<void>(is_onto_itself), !scatter(",
        "a_read_onto_itself_changes_nothing",
        "host",
    ),
    "packets are written over": (
        "pair.cpp",
        "prepared_ - taken_ < kWindow",
        "prepared_ - taken_ < 2 * kWindow",
        "requests_may_come_as_a_list",
        "host",
    ),
    "every comparison swaps": (
        "pair.cpp",
        "is_add || packet.word_before == packet.compare_or_add",
        "true",
        "atomics_add_and_swap",
        "gpu",
    ),
    "fences are not kept": (
        "pair.cpp",
        "(send.flags & IBV_SEND_FENCE) != 0 &&",
        "false &&",
        "a_fence_waits_for_reads",
        "host",
    ),
    "every request is reported": (
        "pair.cpp",
        "completes_all || (send.flags & IBV_SEND_SIGNALED) != 0",
        "true",
        "completions_are_in_order_and_on_request",
        "host",
    ),
    "packets land on the first": (
        "pair.cpp",
        "packet.remote_address = send.remote_address + next_offset_;",
        "packet.remote_address = send.remote_address;",
        "writes_arrive",
        "host",
    ),
}


@dataclass(frozen=True, kw_only=True)
class Build:
    folder: Path

    def run(self, case: str, memory: str, timeout_s: float = 300) -> subprocess.CompletedProcess[str]:
        arguments = [str(self.folder / "cases"), case, *(["gpu"] if memory == "gpu" else [])]
        environment = environment_of(self.folder, cuda="fake_cuda.so" if memory == "gpu" else "none")
        environment["LD_LIBRARY_PATH"] = str(self.folder)
        return subprocess.run(arguments, capture_output=True, text=True, timeout=timeout_s, env=environment)


def environment_of(folder: Path, *, cuda: str) -> dict[str, str]:
    """A shared segment of its own for each run."""
    name = f"/{OWN_SEGMENTS}_{uuid.uuid4().hex}"
    return {**os.environ, "STANDIN_VERBS_SHM": name, "STANDIN_VERBS_CUDA": str(folder / cuda)}


@pytest.fixture(scope="module")
def build(tmp_path_factory: pytest.TempPathFactory) -> Build:
    if shutil.which("c++") is None or not HEADER.exists():
        pytest.skip(f"needs a C++ compiler and {HEADER} (package libibverbs-dev)")
    folder = tmp_path_factory.mktemp("standin_verbs")
    for command in (
        ["sh", str(HERE / "build.sh"), str(folder)],
        ["c++", *FLAGS, "-fPIC", "-shared", str(HERE / "fake_cuda.cpp"), "-o", str(folder / "fake_cuda.so")],
        [
            "c++",
            *FLAGS,
            str(HERE / "cases.cpp"),
            str(HERE / "side.cpp"),
            f"-L{folder}",
            "-l:libibverbs.so.1",
            "-ldl",
            "-pthread",
            "-o",
            str(folder / "cases"),
        ],
    ):
        result = subprocess.run(command, capture_output=True, text=True)
        assert result.returncode == 0, result.stderr[-4000:]
    return Build(folder=folder)


@pytest.fixture(autouse=True)
def _no_segments_stay() -> Iterator[None]:
    """Processes that die leave their segment behind; tests in other processes may be using theirs."""
    yield
    for path in Path("/dev/shm").glob(f"{OWN_SEGMENTS}_*"):
        path.unlink(missing_ok=True)


@pytest.mark.parametrize("memory", ["host", "gpu"])
@pytest.mark.parametrize("case", CASES)
def test_two_processes(build: Build, case: str, memory: str) -> None:
    result = build.run(case, memory)
    assert result.returncode == 0, result.stderr[-4000:]


@pytest.mark.parametrize("mistake", MISTAKES)
def test_the_cases_find(build: Build, mistake: str, tmp_path: Path) -> None:
    name, old, new, case, memory = MISTAKES[mistake]
    sources, folder = tmp_path / "sources", tmp_path / "build"
    shutil.copytree(HERE, sources, ignore=shutil.ignore_patterns("__pycache__"))
    shutil.copytree(build.folder, folder)
    (folder / name.replace(".cpp", ".o")).unlink()
    text = (sources / name).read_text()
    assert text.count(old) == 1, f"{name} has {text.count(old)} of: {old}"
    (sources / name).write_text(text.replace(old, new))
    for path in folder.glob("*.o"):  # only the changed file is compiled
        os.utime(path)
    result = subprocess.run(
        ["sh", str(sources / "build.sh"), str(folder), str(sources)], capture_output=True, text=True
    )
    assert result.returncode == 0, result.stderr[-4000:]
    try:
        returncode = Build(folder=folder).run(case, memory, timeout_s=30).returncode
    except subprocess.TimeoutExpired:
        return
    assert returncode != 0


def nvshmem_transport() -> Path | None:
    """NVSHMEM's own transport over verbs, of the version whose interface this test knows."""
    spec = importlib.util.find_spec("nvidia.nvshmem") if importlib.util.find_spec("nvidia") else None
    folders = [*(spec.submodule_search_locations or [])] if spec else []
    folders += [os.environ["NVSHMEM_DIR"]] if "NVSHMEM_DIR" in os.environ else []
    paths = [Path(folder) / "lib" / "nvshmem_transport_ibrc.so.3" for folder in folders]
    return next((path for path in paths if path.exists()), None)


START_TRANSPORT = """
import ctypes, sys
library = ctypes.CDLL(sys.argv[1])
answer = ctypes.CFUNCTYPE(ctypes.c_int, ctypes.c_void_p, ctypes.c_void_p, ctypes.c_void_p)(lambda *_: 0)
cuda_calls = (ctypes.c_void_p * 256)(*[ctypes.cast(answer, ctypes.c_void_p).value] * 256)
transport = ctypes.c_void_p()
status = library.nvshmemt_init(ctypes.byref(transport), cuda_calls, 30000)
assert status == 0 and transport.value, status
"""


def test_the_transport_of_nvshmem_starts(build: Build) -> None:
    """It finds the device and its port, and takes the kernel for one that lets NICs reach GPUs.

    A CUDA driver it does not need yet.
    """
    transport = nvshmem_transport()
    if transport is None:
        pytest.skip(
            "no nvshmem_transport_ibrc.so.3: install nvidia-nvshmem-cu13==3.4.5 or name its folder in NVSHMEM_DIR"
        )

    def start(**variables: str) -> subprocess.CompletedProcess[str]:
        environment = {**environment_of(build.folder, cuda="none"), "NVSHMEM_DISABLE_DATA_DIRECT": "1", **variables}
        command = [sys.executable, "-c", START_TRANSPORT, str(transport)]
        return subprocess.run(command, capture_output=True, text=True, timeout=300, env=environment)

    preloaded = {"LD_PRELOAD": str(build.folder / "libibverbs.so.1"), "NVSHMEM_IB_DISABLE_DMABUF": "1"}
    result = start(NVSHMEM_DEBUG="INFO", **preloaded)
    assert result.returncode == 0, result.stderr[-4000:]
    assert "name=standin_0, num_ports=1" in result.stdout + result.stderr
    assert start(NVSHMEM_HCA_LIST="mlx5_0", **preloaded).returncode != 0, "another device is asked for"
