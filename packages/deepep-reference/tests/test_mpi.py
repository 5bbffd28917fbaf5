"""A buffer on an MPI communicator instead of a process group."""

from __future__ import annotations

import importlib.util
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

PROGRAM = Path(__file__).with_name("mpi_round_trip.py")


def test_round_trips_over_an_mpi_communicator() -> None:
    launcher = shutil.which("mpiexec", path=f"{Path(sys.executable).parent}") or shutil.which("mpiexec")
    if importlib.util.find_spec("mpi4py") is None or launcher is None:
        pytest.skip("needs mpi4py and mpiexec (pip install mpi4py mpich)")
    finished = subprocess.run(
        [launcher, "-n", "3", sys.executable, str(PROGRAM)], capture_output=True, text=True, timeout=300, check=False
    )
    assert finished.returncode == 0, finished.stderr
    assert finished.stdout.count("agreed") == 3
