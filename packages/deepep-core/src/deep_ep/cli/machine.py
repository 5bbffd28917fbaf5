"""Facts about this machine that decide what the library can do here. No CUDA context is created.

Every probe is optional: a missing tool, file or permission gives a fact that says so, never an exception.
"""

from __future__ import annotations

import contextlib
import enum
import importlib.metadata
import importlib.util
import os
import platform
import re
import shutil
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.distributed as dist

from .. import nvshmem_runtime, registry, settings
from ..errors import BackendUnavailableError, DeepEPError


class Level(enum.Enum):
    """How to take a fact.

    Fine; a note; amiss: something is slower or unavailable; broken: something that was asked for cannot work.
    """

    FINE = enum.auto()
    NOTE = enum.auto()
    AMISS = enum.auto()
    BROKEN = enum.auto()


@dataclass(frozen=True, kw_only=True)
class Fact:
    """One line of the report; ``cause`` and ``cure`` only where something is amiss."""

    section: str
    name: str
    found: str
    level: Level = Level.FINE
    cause: str = ""
    cure: str = ""


def examine(*, needed_backends: tuple[str, ...] = (), needed_gpus: int = 0) -> list[Fact]:
    """Everything, in the order to show it."""
    return [
        *_versions(),
        *_gpus(needed_gpus),
        *_nvlink(),
        *_nics(),
        *_communication_libraries(),
        *_distributed(),
        *_limits(),
        *_settings(),
        *_backends(needed_backends),
    ]


# --- versions -------------------------------------------------------------------------------------------------------


def _versions() -> Iterator[Fact]:
    section = "Versions"
    system = f"{platform.system()} {platform.release()} {platform.machine()}"
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    yield Fact(section=section, name="system", found=f"{system}, {cores} CPU cores usable")
    yield Fact(section=section, name="Python", found=f"{platform.python_version()} ({sys.executable})")
    cuda = torch.version.cuda
    yield Fact(section=section, name="torch", found=f"{torch.__version__}, {f'CUDA {cuda}' if cuda else 'CPU build'}")
    for name in ("deepep-core", "deepep-reference", "deepep-nvshmem", "deepep-ibgda"):
        version = installed_version(name)
        if version or name == "deepep-core":
            yield Fact(section=section, name=name, found=version or "not installed")
    other = installed_version("deep_ep") or installed_version("deep-ep")
    if other:
        yield Fact(
            section=section,
            name="deep_ep",
            found=other,
            level=Level.AMISS,
            cause="another distribution that provides the module deep_ep is installed beside deepep-core",
            cure="uninstall one of them: pip uninstall deep_ep",
        )


def installed_version(distribution: str) -> str | None:
    """Version of an installed distribution."""
    try:
        return importlib.metadata.version(distribution)
    except importlib.metadata.PackageNotFoundError:
        return None


# --- GPUs and links -------------------------------------------------------------------------------------------------


def query(command: list[str]) -> str | None:
    """Standard output of a tool, or ``None`` where it is absent, fails, or takes more than ten seconds."""
    if shutil.which(command[0]) is None:
        return None
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=10, check=False)
    except (OSError, subprocess.TimeoutExpired):
        return None
    return done.stdout if done.returncode == 0 else None


def _gpus(needed: int) -> Iterator[Fact]:
    section = "GPUs"
    visible = torch.cuda.device_count()
    listing = query(
        [
            "nvidia-smi",
            "--query-gpu=index,name,memory.total,driver_version,compute_cap",
            "--format=csv,noheader,nounits",
        ]
    )
    rows = [re.split(r",\s*", line) for line in (listing or "").splitlines() if line.strip()]
    missing = Level.BROKEN if needed > visible else None
    if rows:
        yield Fact(section=section, name="driver", found=rows[0][3])
        for index, name, memory, _, capability in (row for row in rows if len(row) == 5):
            found = f"{name}, {float(memory) / 1024:.0f} GiB, sm_{capability.replace('.', '')}"
            if capability and float(capability) < 8.0:
                yield Fact(
                    section=section,
                    name=f"GPU {index}",
                    found=found,
                    level=Level.AMISS,
                    cause=f"the kernel backends need sm_80 or newer, this is sm_{capability.replace('.', '')}",
                    cure="use the backend 'reference' on it",
                )
            else:
                yield Fact(section=section, name=f"GPU {index}", found=found)
    if rows and not visible:
        without_cuda = torch.version.cuda is None
        yield Fact(
            section=section,
            name="GPUs for torch",
            found="none",
            level=missing or Level.AMISS,
            cause=(
                "this torch is a CPU build"
                if without_cuda
                else f"CUDA_VISIBLE_DEVICES is {os.environ['CUDA_VISIBLE_DEVICES']!r}"
                if "CUDA_VISIBLE_DEVICES" in os.environ
                else "torch cannot initialise CUDA; its CUDA may be newer than the driver"
            ),
            cure="install a CUDA build of torch" if without_cuda else "compare the driver with torch.version.cuda",
        )
    elif not visible:
        device_files = any(Path("/dev").glob("nvidia[0-9]*"))
        yield Fact(
            section=section,
            name="GPUs",
            found="none",
            level=missing or (Level.AMISS if device_files else Level.NOTE),
            cause=(
                "there are NVIDIA device files but nvidia-smi and torch find no GPU"
                if device_files
                else f"{needed} GPUs were asked for, none is here"
                if missing
                else ""
            ),
            cure=(
                "check the driver, and in a container that it was started with GPU access"
                if device_files
                else "run on a machine with GPUs"
                if missing
                else ""
            ),
        )
    else:
        yield Fact(
            section=section,
            name="GPUs for torch",
            found=str(visible),
            level=missing or Level.FINE,
            cause=f"{needed} GPUs were asked for, torch sees {visible}" if missing else "",
            cure="run on a machine with more GPUs, or widen CUDA_VISIBLE_DEVICES" if missing else "",
        )


def _nvlink() -> Iterator[Fact]:
    topology = query(["nvidia-smi", "topo", "-m"])
    if topology is None:
        return
    section = "Links"
    links = link_matrix(topology)
    if len(links) < 2:
        return
    kinds = sorted({kind for row in links.values() for kind in row.values() if kind != "X"})
    joined = all(kind.startswith("NV") for kind in kinds)
    yield Fact(
        section=section,
        name="between GPUs",
        found=f"{len(links)} GPUs, {', '.join(kinds)}" + (" (every pair)" if len(kinds) == 1 else ""),
        level=Level.FINE if joined else Level.AMISS,
        cause="" if joined else f"some pairs of GPUs are not joined by NVLink ({', '.join(kinds)})",
        cure="" if joined else "choose GPUs joined by NVLink, or the backend 'reference'",
    )
    fabric = query(["nvidia-smi", "-q", "-d", "FABRIC"]) or ""
    if (state := re.search(r"State\s*:\s*(.+)", fabric)) and state[1].strip() not in ("N/A", "Not Supported"):
        yield Fact(section=section, name="NVLink fabric", found=state[1].strip())


def link_matrix(topology: str) -> dict[str, dict[str, str]]:
    """``nvidia-smi topo -m`` as ``{"GPU0": {"GPU1": "NV18", ...}, ...}``; GPU to GPU only."""
    lines = [re.sub(r"\x1b\[[0-9;]*m", "", line) for line in topology.splitlines()]
    header = next((line.split() for line in lines if line.split()[:1] == ["GPU0"]), None)
    if header is None:
        return {}
    columns = [name for name in header if re.fullmatch(r"GPU\d+", name)]
    matrix: dict[str, dict[str, str]] = {}
    seen_header = False
    for line in lines:
        parts = line.split()
        if not parts or not re.fullmatch(r"GPU\d+", parts[0]):
            continue
        if not seen_header:
            seen_header = True
            continue
        matrix[parts[0]] = dict(zip(columns, parts[1:], strict=False))
    return matrix


def _nics() -> Iterator[Fact]:
    section = "Links"
    root = Path("/sys/class/infiniband")
    devices = sorted(root.iterdir()) if root.is_dir() else []
    if not devices:
        yield Fact(section=section, name="RDMA NICs", found="none", level=Level.NOTE)
        return
    for device in devices:
        for port in sorted((device / "ports").glob("*")):
            state, rate = _read(port / "state"), _read(port / "rate")
            layer, node = _read(port / "link_layer"), _read(device / "device" / "numa_node")
            active = "ACTIVE" in state
            found = f"{layer or 'unknown link'}, {state.split(': ')[-1].lower() or 'unknown state'}, {rate}"
            yield Fact(
                section=section,
                name=f"NIC {device.name}:{port.name}",
                found=f"{found}, NUMA node {node}" if node and node != "-1" else found,
                level=Level.FINE if active else Level.AMISS,
                cause="" if active else f"port {port.name} of {device.name} is not active",
                cure="" if active else "check cable, switch and subnet manager, or leave it out with NVSHMEM_HCA_LIST",
            )
    modules = {line.split()[0] for line in _read(Path("/proc/modules")).splitlines()}
    peer_memory = modules & {"nvidia_peermem", "nv_peer_mem"}
    if torch.cuda.device_count() and not peer_memory:
        yield Fact(
            section=section,
            name="GPU memory for NICs",
            found="nvidia_peermem not loaded",
            level=Level.AMISS,
            cause="NICs reach GPU memory only through dma-buf, which needs the open kernel module",
            cure="modprobe nvidia_peermem, or make sure the open kernel module is in use",
        )


def _read(path: Path) -> str:
    try:
        return path.read_text().strip()
    except OSError:
        return ""


# --- NVSHMEM, NCCL, torch.distributed -------------------------------------------------------------------------------


_NVSHMEM_WHEELS = ("nvidia-nvshmem-cu13", "nvidia-nvshmem-cu12")


def _communication_libraries() -> Iterator[Fact]:
    section = "Communication libraries"
    for library, wheels in (
        ("NCCL", ("nvidia-nccl-cu13", "nvidia-nccl-cu12")),
        ("NVSHMEM", _NVSHMEM_WHEELS),
    ):
        found = [f"{wheel} {version}" for wheel in wheels if (version := installed_version(wheel))]
        if library == "NVSHMEM" and (directory := os.environ.get("NVSHMEM_DIR")):
            found.append(f"NVSHMEM_DIR={directory}")
        yield Fact(
            section=section,
            name=library,
            found=", ".join(found) or "no wheel found",
            level=Level.FINE if found else Level.NOTE,
        )
        if len([f for f in found if not f.startswith("NVSHMEM_DIR")]) > 1:
            yield Fact(
                section=section,
                name=library,
                found="two wheels",
                level=Level.AMISS,
                cause=f"wheels of {library} for two CUDA versions are installed",
                cure="keep the one for the CUDA version of torch",
            )
    yield from _nvshmem()
    if torch.cuda.device_count() and dist.is_available() and dist.is_nccl_available():
        with contextlib.suppress(Exception):
            version = ".".join(map(str, torch.cuda.nccl.version()))
            yield Fact(section=section, name="NCCL that torch uses", found=version)


def _nvshmem() -> Iterator[Fact]:
    """Whether NVSHMEM is one that the backend of that name can use, and what the environment tells it."""
    section = "Communication libraries"
    is_wanted = "NVSHMEM_DIR" in os.environ or any(map(installed_version, _NVSHMEM_WHEELS))
    try:
        nvshmem_runtime.load_library()
    except BackendUnavailableError as error:
        cause, _, cure = str(error).partition(". ")
        if is_wanted:
            yield Fact(
                section=section,
                name="NVSHMEM for backend nvshmem",
                found="unusable",
                level=Level.AMISS,
                cause=cause,
                cure=cure.rstrip("."),
            )
    given = [f"{name}={value}" for name, value in sorted(os.environ.items()) if name.startswith("NVSHMEM_")]
    given = [text for text in given if not text.startswith("NVSHMEM_DIR=")]
    if given:
        yield Fact(section=section, name="NVSHMEM's variables", found=", ".join(given), level=Level.NOTE)


def _distributed() -> Iterator[Fact]:
    section = "Communication libraries"
    if not dist.is_available():
        yield Fact(
            section=section,
            name="torch.distributed",
            found="absent",
            level=Level.BROKEN,
            cause="this torch was built without torch.distributed, on which everything here rests",
            cure="install a torch build that has it",
        )
        return
    transports = [
        name
        for name, there in (
            ("gloo", dist.is_gloo_available()),
            ("nccl", dist.is_nccl_available()),
            ("mpi", dist.is_mpi_available()),
        )
        if there
    ]
    yield Fact(
        section=section,
        name="torch.distributed",
        found=", ".join(transports) or "no transport",
        level=Level.FINE if transports else Level.BROKEN,
        cause="" if transports else "this torch has neither gloo nor NCCL",
        cure="" if transports else "install a torch build that has gloo",
    )
    launcher = [f"{name}={os.environ[name]}" for name in ("RANK", "WORLD_SIZE", "MASTER_ADDR") if name in os.environ]
    if launcher:
        yield Fact(section=section, name="launcher", found=" ".join(launcher), level=Level.NOTE)


# --- limits ---------------------------------------------------------------------------------------------------------


def _limits() -> Iterator[Fact]:
    section = "Limits"
    try:
        import resource
    except ImportError:
        return
    unlimited = resource.RLIM_INFINITY
    locked = resource.getrlimit(resource.RLIMIT_MEMLOCK)[0]
    has_nic = Path("/sys/class/infiniband").is_dir() and any(Path("/sys/class/infiniband").iterdir())
    too_little = has_nic and locked != unlimited and locked < 1 << 30
    yield Fact(
        section=section,
        name="locked memory (memlock)",
        found="unlimited" if locked == unlimited else _size(locked),
        level=Level.AMISS if too_little else Level.FINE,
        cause=f"RDMA has to lock its buffers and may lock only {_size(locked)}" if too_little else "",
        cure="ulimit -l unlimited, or --ulimit memlock=-1 for a container" if too_little else "",
    )
    files = resource.getrlimit(resource.RLIMIT_NOFILE)[0]
    few = files != unlimited and files < 1024
    yield Fact(
        section=section,
        name="open files (nofile)",
        found="unlimited" if files == unlimited else str(files),
        level=Level.AMISS if few else Level.FINE,
        cause=f"each rank opens files for each peer, and only {files} may be open" if few else "",
        cure="ulimit -n 65536" if few else "",
    )
    shared = Path("/dev/shm")
    if shared.is_dir():
        usage = shutil.disk_usage(shared)
        writable = os.access(shared, os.W_OK)
        small = usage.free < 64 << 20
        yield Fact(
            section=section,
            name="/dev/shm",
            found=f"{_size(usage.free)} free of {_size(usage.total)}",
            level=Level.AMISS if small or not writable else Level.FINE,
            cause="/dev/shm is not writable" if not writable else "NCCL wants some 64 MiB per host" if small else "",
            cure="start the container with --shm-size=1g or --ipc=host" if small or not writable else "",
        )


def _size(num_bytes: float) -> str:
    from .show import bytes_text

    return bytes_text(num_bytes)


# --- this library ---------------------------------------------------------------------------------------------------


def _settings() -> Iterator[Fact]:
    section = "This library"
    try:
        found = settings.load()
    except DeepEPError as error:
        yield Fact(
            section=section,
            name="settings",
            found="not accepted",
            level=Level.BROKEN,
            cause=str(error),
            cure="correct the value",
        )
        return
    known = {variable.name for variable in settings.VARIABLES}
    given = [f"{name}={os.environ[name]}" for name in sorted(known) if os.environ.get(name)]
    yield Fact(
        section=section,
        name="settings",
        found=", ".join(given) or (found.source or "defaults"),
        level=Level.NOTE if given else Level.FINE,
    )
    for name in sorted(
        name for name in os.environ if name.startswith("DEEPEP_") and name not in known | _BUILD_VARIABLES
    ):
        yield Fact(
            section=section,
            name=name,
            found=os.environ[name],
            level=Level.AMISS,
            cause=f"no environment variable {name} is read by this library",
            cure=f"known are {', '.join(sorted(known))}",
        )


# Read by builds of the kernel packages, or by frameworks that use this library.
_BUILD_VARIABLES = {
    "DEEPEP_INCLUDE_DIR",
    "DEEPEP_CUDA_MAJOR",
    "DEEPEP_WITHOUT_NVSHMEM",
    "DEEPEP_COUNT_PUTS",
    "DEEPEP_LL_TRACE",
    "DEEPEP_NVSHMEM_TRACE",
    "DEEPEP_LINEINFO",
    "DEEPEP_BUFFER_NUM_SMS",
    "DEEPEP_MODE",
    "DEEPEP_ENABLE_MNNVL",
    "DEEPEP_SMS",
}


def _backends(needed: tuple[str, ...]) -> Iterator[Fact]:
    from .backends import find

    section = "Backends"
    found = find()
    wanted = set(needed) | _asked_for()
    for finding in found:
        if finding.version is None and finding.name not in wanted:
            continue
        broken = finding.name in wanted and not finding.serves
        yield Fact(
            section=section,
            name=finding.name,
            found=(
                f"{', '.join(finding.modes).replace('_', ' ')} on {' and '.join(finding.devices)}"
                if finding.serves
                else "cannot serve here"
            ),
            level=Level.FINE if finding.serves else Level.BROKEN if broken else Level.NOTE,
            cause="" if finding.serves else "; ".join(o.partition(". ")[0] for o in finding.obstacles),
            cure=""
            if finding.serves
            else "; ".join(o.partition(". ")[2] or "see the cause" for o in finding.obstacles),
        )
    for name in sorted(wanted - {finding.name for finding in found}):
        yield Fact(
            section=section,
            name=name,
            found="not installed",
            level=Level.BROKEN,
            cause=f"no backend named {name} is installed",
            cure="install the package that has it, or ask for another",
        )
    if not any(finding.serves for finding in found):
        yield Fact(
            section=section,
            name="any",
            found="none can serve",
            level=Level.AMISS,
            cause="no installed backend can serve on this machine",
            cure="install deepep-reference, which runs anywhere",
        )


def _asked_for() -> set[str]:
    """Backends that the environment or the configuration file names."""
    try:
        named = settings.load().backend or {}
    except DeepEPError:
        return set()
    return {name for name in named.values() if name != registry.AUTO}
