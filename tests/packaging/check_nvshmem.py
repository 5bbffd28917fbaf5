"""Judges the backend nvshmem where NVSHMEM is installed and no driver is: ``python check_nvshmem.py built|left-out``.

Run by ``nox -s packaging`` with the interpreter of a clean environment into which deepep-core, NVSHMEM's wheel and
deepep-nvshmem, built with NVSHMEM or without, were installed.
"""

from __future__ import annotations

import importlib
import sys

import torch
from check_install import expect

from deep_ep import nvshmem_runtime
from deep_ep.backend import Environment
from deep_ep.errors import BackendUnavailableError


def main(how: str) -> None:
    here = Environment(device_type="cuda", num_gpus=0)
    package = importlib.import_module("deepep_nvshmem.backend")
    inside = package.NvlinkBackend.probe(here)
    expect(inside == [], f"the backend nvlink says {inside}")
    nvshmem_runtime.load_library()
    obstacles = [str(obstacle) for obstacle in package.NvshmemBackend.probe(here)]
    if how == "built":
        expect(obstacles == [], f"the backend nvshmem says {obstacles}")
    else:
        expect(
            len(obstacles) == 1 and "_nvshmem" in obstacles[0] and "built where NVSHMEM's headers are" in obstacles[0],
            f"without its extension the backend nvshmem says {obstacles}",
        )
        try:
            package.load_internode_extension()
        except BackendUnavailableError as error:
            print(f"  nvshmem: {error}")
        else:
            expect(False, "an extension that was left out loads")
    expect(not torch.cuda.is_initialized(), "asking what can serve initialised CUDA")
    print(f"backend nvshmem, extension {how}, NVSHMEM installed: as expected")


if __name__ == "__main__":
    main(sys.argv[1])
