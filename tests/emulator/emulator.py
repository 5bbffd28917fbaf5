"""Extensions over the emulator, and the machine that their kernels run on.

Tests of kernels take an extension by `extension`: on GPUs the installed one, without GPUs one over the emulator.
"""

from __future__ import annotations

import ctypes
import functools
import importlib
import importlib.util
import os
import shutil
import sys
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any, cast

import torch

HERE = Path(__file__).resolve().parent


def is_chosen() -> bool:
    """Whether kernels run here: where no GPU is visible, or with ``DEEPEP_EMULATED=1``."""
    return os.environ.get("DEEPEP_EMULATED") == "1" or not torch.cuda.is_available()


def obstacle() -> str | None:
    """What this machine lacks to build kernels for the emulator."""
    if os.uname().machine != "x86_64":
        return f"the emulator runs on x86-64, this is {os.uname().machine}"
    if shutil.which(os.environ.get("CXX", "g++")) is None:
        return "the emulator needs g++"
    return None if importlib.util.find_spec("pybind11") else "the emulator needs pybind11"


@dataclass(frozen=True)
class Stream:
    """Of an emulated GPU, with the field of torch's streams that launches are given."""

    cuda_stream: int


class Emulator:
    """Runs what an extension has launched; each extension has its own."""

    def __init__(self, module: ModuleType, *, seed: int = 1) -> None:
        assert module.__file__ is not None
        self.library: Any = ctypes.CDLL(module.__file__)
        self.library.emulator_run.restype = ctypes.c_char_p
        self.library.emulator_seed.argtypes = [ctypes.c_uint64]
        self.library.emulator_copy_behind.argtypes = [ctypes.c_void_p] * 3 + [ctypes.c_size_t]
        self.library.emulator_copy_behind.restype = None
        self.seed(seed)

    def seed(self, value: int) -> None:
        """Of the order in which threads run, and of all else that a run leaves to chance."""
        self.library.emulator_seed(value)

    def set_alone(self, is_alone: bool) -> None:
        """False while a thread of the host (a software NIC) may change what kernels wait for: no time is skipped."""
        self.library.emulator_set_alone(int(is_alone))

    def set_resident(self, most: int) -> None:
        """How many blocks of a kernel may run at once; 0: all."""
        self.library.emulator_set_resident(most)

    def copy_behind(self, stream: int, to: int, source: int, num_bytes: int) -> None:
        """Copies behind what the stream holds: what comes next in a stream sees, and may overwrite, this much."""
        self.library.emulator_copy_behind(stream, to, source, num_bytes)

    def open_heaps(self, num_pes: int, num_bytes: int, has_stores: bool) -> tuple[int, int]:
        """Symmetric heaps of emulated PEs, of ``_nvshmem`` alone: the address of the first, and their distance.

        Args:
            has_stores: PEs reach each other by stores, as over NVLink; otherwise a network carries what they put.
        """
        stride = ctypes.c_size_t()
        self.library.emulator_open_heaps.restype = ctypes.c_void_p
        return self.library.emulator_open_heaps(
            num_pes, ctypes.c_size_t(num_bytes), int(has_stores), ctypes.byref(stride)
        ), stride.value

    def close_heaps(self, base: int) -> None:
        self.library.emulator_close_heaps(ctypes.c_void_p(base))

    def run(self) -> None:
        """Runs what has been launched, all ranks side by side, to its end."""
        if failure := self.library.emulator_run().decode():
            raise AssertionError(failure)


def _imported(name: str, path: Path) -> ModuleType:
    spec = importlib.util.spec_from_file_location(name, path)
    assert spec is not None and spec.loader is not None, path
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@functools.cache
def load(name: str) -> tuple[Any, Emulator]:
    """The extension ``name`` and its emulator; built if its sources have changed since it was built last."""
    building = _imported("emulator_build", HERE / "build.py")
    library = cast(Path, building.build(name, HERE.parents[1] / "build" / "emulator"))
    module = _imported(name, library)
    return module, Emulator(module)


def _is_installed(name: str, package: str) -> bool:
    return importlib.util.find_spec(package) is not None and importlib.util.find_spec(f"{package}.{name}") is not None


def obstacle_to(name: str, package: str) -> str | None:
    """Why `extension` would fail."""
    if is_chosen():
        why = obstacle()
        return why and f"needs CUDA GPUs, none is visible; and {why}"
    if os.environ.get("DEEPEP_BUILD_DIR") or _is_installed(name, package):
        return None
    return f"needs the extension {name}: install the package or name DEEPEP_BUILD_DIR"


@functools.cache
def extension(name: str, package: str) -> tuple[Any, Emulator | None]:
    """The extension of the folder ``DEEPEP_BUILD_DIR``, over the emulator, or the installed one; and its emulator."""
    if build := os.environ.get("DEEPEP_BUILD_DIR"):
        sys.path.insert(0, build)
        module: Any = importlib.import_module(name)
        return module, Emulator(module) if is_chosen() else None
    return load(name) if is_chosen() else (importlib.import_module(f"{package}.{name}"), None)
