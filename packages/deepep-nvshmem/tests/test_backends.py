"""What the backends say about themselves and their surroundings, on a machine without a GPU."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

import deepep_nvshmem
from deep_ep import BackendUnavailableError, nvshmem_runtime, registry
from deep_ep.backend import Environment
from deepep_nvshmem import NvlinkBackend, NvshmemBackend, backend

SOURCES = Path(deepep_nvshmem.__file__).parents[1]


def test_import_loads_no_extension_and_no_nvshmem_and_touches_no_gpu() -> None:
    program = (
        f"import sys; sys.path.insert(0, {str(SOURCES)!r})\n"
        "import deepep_nvshmem, deepep_nvshmem.internode, torch\n"
        "assert not {'deepep_nvshmem._nvlink', 'deepep_nvshmem._nvshmem'} & set(sys.modules)\n"
        "assert 'nvshmem_host' not in open('/proc/self/maps').read()\n"
        "assert not torch.cuda.is_initialized()\n"
    )
    finished = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=False)
    assert finished.returncode == 0, finished.stderr


def environment(*devices: int, num_nodes: int | None = None, num_gpus: int = 4) -> Environment:
    return Environment(
        device_type="cuda",
        num_gpus=num_gpus,
        num_ranks=len(devices) or None,
        num_nodes=num_nodes,
        device_of_rank=devices or None,
    )


@pytest.fixture
def loaded(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Everything is there; notes what is loaded, in order."""
    order: list[str] = []
    monkeypatch.setattr(nvshmem_runtime, "load_library", lambda: order.append("NVSHMEM"))
    extension = SimpleNamespace(is_sm90_compiled=lambda: True)
    monkeypatch.setattr(backend, "_import", lambda module, cure: order.append(module) or extension)
    monkeypatch.setattr(torch.cuda, "can_device_access_peer", lambda a, b: True)
    return order


# --- the order that auto follows ------------------------------------------------------------------------------------


def serving(environment: Environment) -> list[str]:
    able = [b for b in (NvlinkBackend, NvshmemBackend) if not registry.obstacles(b, environment, mode="normal")]
    return [b.name for b in sorted(able, key=lambda b: -b.capabilities.priority)]


def test_one_node_is_served_by_nvlink_and_several_by_nvshmem(loaded: list[str]) -> None:
    assert serving(environment(0, 1, 2, 3, num_nodes=1)) == ["nvlink"]
    assert "NVSHMEM" not in loaded, "one node pays nothing for NVSHMEM"
    assert serving(environment(0, 1, 2, 3, num_nodes=2)) == ["nvshmem"]
    assert serving(environment(*range(8), *range(8), num_nodes=2, num_gpus=8)) == ["nvshmem"]
    assert loaded.index("NVSHMEM") < loaded.index("_nvshmem")


def test_one_node_is_an_obstacle_that_points_to_nvlink() -> None:
    (obstacle,) = NvshmemBackend.probe(environment(0, 1, num_nodes=1))
    assert str(obstacle) == "the group is one node. Use the backend 'nvlink', which needs no NVSHMEM"


def test_without_a_group_the_number_of_nodes_is_no_obstacle(loaded: list[str]) -> None:
    assert NvshmemBackend.probe(environment()) == NvlinkBackend.probe(environment()) == []


def test_nodes_of_more_than_eight_ranks_are_an_obstacle(loaded: list[str]) -> None:
    (obstacle,) = NvshmemBackend.probe(environment(*range(16), *range(16), num_nodes=2, num_gpus=16))
    assert "nodes have 16 ranks" in obstacle.cause and "DEEPEP_RANKS_PER_NODE" in obstacle.cure


# --- what may be missing --------------------------------------------------------------------------------------------


def test_missing_nvshmem_is_an_obstacle_that_names_the_package(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("NVSHMEM_DIR", str(tmp_path))
    (obstacle,) = NvshmemBackend.probe(environment(0, 1, num_nodes=2))
    assert "has no lib/libnvshmem_host.so.3" in obstacle.cause and "Correct or unset it" in obstacle.cure
    monkeypatch.delenv("NVSHMEM_DIR")
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    (obstacle,) = NvshmemBackend.probe(environment(0, 1, num_nodes=2))
    assert obstacle.cause == "NVSHMEM is not installed" and "Install nvidia-nvshmem-cu13" in obstacle.cure


def test_nvshmem_that_is_too_old_is_an_obstacle_with_the_version_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    def version(*places: Any) -> None:
        for place, number in zip(places, (3, 3, 9), strict=True):
            place._obj.value = number

    old = SimpleNamespace(nvshmemx_vendor_get_version_info=version)
    monkeypatch.setattr(nvshmem_runtime, "find_library", lambda: Path("/old/libnvshmem_host.so.3"))
    monkeypatch.setattr(nvshmem_runtime.ctypes, "CDLL", lambda path, mode: old)
    (obstacle,) = NvshmemBackend.probe(environment(0, 1, num_nodes=2))
    assert "NVSHMEM 3.3.9 is installed (/old/libnvshmem_host.so.3)" in obstacle.cause
    assert "Install 'nvidia-nvshmem-cu13>=3.4.5,<4'" in obstacle.cure


@pytest.mark.parametrize(
    ("module", "cure"), [("_nvlink", "building it needs nvcc"), ("_nvshmem", "It is built where NVSHMEM's headers are")]
)
def test_missing_extension_is_an_obstacle_with_a_cure(monkeypatch: pytest.MonkeyPatch, module: str, cure: str) -> None:
    monkeypatch.setattr(nvshmem_runtime, "load_library", lambda: None)
    for name in ("_nvlink", "_nvshmem"):
        monkeypatch.setitem(sys.modules, f"deepep_nvshmem.{name}", None if name == module else SimpleNamespace())
    (obstacle,) = NvshmemBackend.probe(environment(0, 1, num_nodes=2))
    assert f"the native extension {module} of deepep-nvshmem does not load" in obstacle.cause and cure in obstacle.cure
    assert bool(NvlinkBackend.probe(environment())) == (module == "_nvlink")
    if module == "_nvlink":
        assert NvshmemBackend.is_sm90_compiled() is NvlinkBackend.is_sm90_compiled() is False


def test_functions_of_nvshmem_are_looked_up_when_they_are_called(monkeypatch: pytest.MonkeyPatch) -> None:
    before, during = sys.getdlopenflags(), []
    monkeypatch.setattr(backend, "_import", lambda module, cure: during.append(sys.getdlopenflags()))
    backend.load_internode_extension()
    assert during == [os.RTLD_LAZY | os.RTLD_LOCAL] and sys.getdlopenflags() == before

    def fail(module: str, cure: str) -> None:
        raise BackendUnavailableError("absent")

    monkeypatch.setattr(backend, "_import", fail)
    with pytest.raises(BackendUnavailableError):
        backend.load_internode_extension()
    assert sys.getdlopenflags() == before


# --- GPUs -----------------------------------------------------------------------------------------------------------


def test_gpus_of_one_node_have_to_reach_each_other(loaded: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "can_device_access_peer", lambda a, b: {a, b} != {1, 2})
    (obstacle,) = NvlinkBackend.probe(environment(0, 1, 2, num_nodes=1))
    assert "GPU 1 cannot reach the memory of GPU 2" in str(obstacle)
    assert NvshmemBackend.probe(environment(0, 1, 2, 3, num_nodes=2)) == [], "1 and 2 are of different nodes"
    assert len(NvshmemBackend.probe(environment(0, 3, 1, 2, num_nodes=2))) == 1


@pytest.mark.parametrize("kind", [NvlinkBackend, NvshmemBackend])
def test_rank_without_a_gpu_is_an_obstacle(loaded: list[str], kind: Any) -> None:
    (obstacle,) = kind.probe(environment(0, -1, 0, 1, num_nodes=2))
    assert "rank 1 sees no GPU" in obstacle.cause
