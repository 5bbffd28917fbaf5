"""The build backend: scikit-build-core's, which also asks for the NVSHMEM that belongs to the CUDA at hand.

Its headers and its device library are needed while kernels for other nodes are built: in the major version of nvcc, and
as old as the oldest NVSHMEM that may be met at run time. ``NVSHMEM_DIR`` names another copy, ``DEEPEP_CUDA_MAJOR``
stands for what nvcc says about itself, and ``DEEPEP_WITHOUT_NVSHMEM=1`` builds what needs no NVSHMEM. A build without
isolation (``--no-build-isolation``) takes what is installed.
"""

from __future__ import annotations

import os
import re
import shutil
import subprocess
from pathlib import Path
from typing import Any

from scikit_build_core import build as _build
from scikit_build_core.build import *  # noqa: F403  the hooks that stay as they are

_VERSION = "3.4.5"


def nvshmem_requirements() -> list[str]:
    """NVSHMEM's wheel for this build; empty if it is not wanted, or no compiler says for which CUDA."""
    if os.environ.get("NVSHMEM_DIR") or os.environ.get("DEEPEP_WITHOUT_NVSHMEM", "0") != "0":
        return []
    major = os.environ.get("DEEPEP_CUDA_MAJOR") or _major_of_nvcc()
    return [f"nvidia-nvshmem-cu{major}=={_VERSION}"] if major else []


def _major_of_nvcc() -> str:
    homes = [Path(os.environ[name]) / "bin" for name in ("CUDA_HOME", "CUDA_PATH") if os.environ.get(name)]
    places = [os.environ.get("CUDACXX"), shutil.which("nvcc"), *(str(home / "nvcc") for home in homes)]
    nvcc = next((place for place in places if place and shutil.which(place)), None)
    if nvcc is None:
        return ""
    said = subprocess.run([nvcc, "--version"], capture_output=True, text=True, check=False).stdout
    release = re.search(r"release (\d+)\.", said)
    return release[1] if release else ""


def get_requires_for_build_wheel(config_settings: dict[str, Any] | None = None) -> list[str]:
    return [*_build.get_requires_for_build_wheel(config_settings), *nvshmem_requirements()]


def get_requires_for_build_editable(config_settings: dict[str, Any] | None = None) -> list[str]:
    return [*_build.get_requires_for_build_editable(config_settings), *nvshmem_requirements()]
