"""Extensions over the emulator: ``load`` builds one and gives it with the machine that its kernels run on."""

from __future__ import annotations

import ctypes
import importlib.util
import os
import shutil
import tempfile
from pathlib import Path
from types import ModuleType
from typing import Any, cast


def obstacle() -> str | None:
    """What this machine lacks to build kernels for the emulator."""
    if os.uname().machine != "x86_64":
        return f"the emulator runs on x86-64, this is {os.uname().machine}"
    if shutil.which(os.environ.get("CXX", "g++")) is None:
        return "the emulator needs g++"
    return None if importlib.util.find_spec("pybind11") else "the emulator needs pybind11"


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


def load(name: str) -> tuple[Any, Emulator]:
    """The extension ``name`` and its emulator; built if its sources have changed since it was built last."""
    building = _imported("emulator_build", Path(__file__).with_name("build.py"))
    folder = Path(tempfile.gettempdir()) / f"deepep-emulator-{os.getuid()}"
    module = _imported(name, cast(Path, building.build(name, folder)))
    return module, Emulator(module)
