"""What the kernel packages ask for before they are built (their ``build_backend.py``). Nothing is built here."""

from __future__ import annotations

import importlib.util
import re
import sys
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest

from deep_ep.cli import machine

PACKAGES = Path(__file__).resolve().parents[1] / "packages"
KERNEL_PACKAGES = ("deepep-nvshmem", "deepep-ibgda")
VARIABLES = ("NVSHMEM_DIR", "DEEPEP_WITHOUT_NVSHMEM", "DEEPEP_CUDA_MAJOR", "CUDACXX", "CUDA_HOME", "CUDA_PATH")


@pytest.fixture
def backend(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Any:
    """The backend over a scikit-build-core that asks for ninja; no variable set, no nvcc."""
    below: Any = ModuleType("scikit_build_core.build")
    below.get_requires_for_build_wheel = below.get_requires_for_build_editable = lambda settings=None: ["ninja"]
    below.build_wheel = lambda *args: "a wheel"
    below.__all__ = ["get_requires_for_build_wheel", "get_requires_for_build_editable", "build_wheel"]
    monkeypatch.setitem(sys.modules, "scikit_build_core", SimpleNamespace(build=below, __path__=[]))
    monkeypatch.setitem(sys.modules, "scikit_build_core.build", below)
    for name in VARIABLES:
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("PATH", str(tmp_path))
    spec = importlib.util.spec_from_file_location("a_backend", PACKAGES / KERNEL_PACKAGES[0] / "build_backend.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_the_doctor_knows_every_variable_that_a_build_reads() -> None:
    files = [PACKAGES / name / file for name in KERNEL_PACKAGES for file in ("CMakeLists.txt", "build_backend.py")]
    read = {name for file in files for name in re.findall(r"DEEPEP_[A-Z_]+[A-Z]", file.read_text())}
    assert {"DEEPEP_CUDA_MAJOR", "DEEPEP_COUNT_PUTS"} <= read
    only_passed_on = {"DEEPEP_ARCHITECTURES", "DEEPEP_HAS_NVSHMEM"}  # from CMake to the compiler
    assert read - only_passed_on <= machine._BUILD_VARIABLES


def _nvcc(folder: Path, release: str) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "nvcc").write_text(f"#!/bin/sh\necho 'Cuda compilation tools, release {release}, V{release}.88'\n")
    (folder / "nvcc").chmod(0o755)


def test_all_kernel_packages_are_built_alike() -> None:
    assert len({(PACKAGES / name / "build_backend.py").read_text() for name in KERNEL_PACKAGES}) == 1
    for name in KERNEL_PACKAGES:
        assert 'build-backend = "build_backend"' in (PACKAGES / name / "pyproject.toml").read_text()


@pytest.mark.parametrize(("release", "wheel"), [("13.0", "cu13"), ("12.9", "cu12")])
def test_a_build_asks_for_the_nvshmem_of_its_compiler(backend: Any, tmp_path: Path, release: str, wheel: str) -> None:
    _nvcc(tmp_path, release)
    assert backend.get_requires_for_build_wheel() == ["ninja", f"nvidia-nvshmem-{wheel}==3.4.5"]
    assert backend.get_requires_for_build_editable({}) == ["ninja", f"nvidia-nvshmem-{wheel}==3.4.5"]
    assert backend.build_wheel("folder") == "a wheel"


def test_the_compiler_may_be_in_cuda_home(backend: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    _nvcc(tmp_path / "cuda" / "bin", "12.8")
    monkeypatch.setenv("CUDA_HOME", str(tmp_path / "cuda"))
    assert backend.nvshmem_requirements() == ["nvidia-nvshmem-cu12==3.4.5"]
    monkeypatch.setenv("DEEPEP_CUDA_MAJOR", "13")
    assert backend.nvshmem_requirements() == ["nvidia-nvshmem-cu13==3.4.5"]


@pytest.mark.parametrize("variable", [("NVSHMEM_DIR", "/somewhere"), ("DEEPEP_WITHOUT_NVSHMEM", "1"), None])
def test_nothing_is_asked_for_where_it_is_there_or_not_wanted_or_cuda_is_unknown(
    backend: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, variable: tuple[str, str] | None
) -> None:
    if variable is not None:
        _nvcc(tmp_path, "13.0")
        monkeypatch.setenv(*variable)
    assert backend.get_requires_for_build_wheel() == ["ninja"]
