"""Every routine of this repository by name: ``nox -l`` lists them, ``nox`` runs the tests.

Sessions that work on the tree share one environment with the packages installed in place (``.nox/tree``), because torch
takes half a minute to install. The packaging session installs built wheels into bare environments, each with a torch
that was "there before": that is how users meet these packages, and it shows that none of them replaces it.
"""

from __future__ import annotations

import contextlib
import hashlib
import os
import shutil
import sys
from collections.abc import Iterator
from pathlib import Path

import nox

nox.needs_version = ">=2024.4.15"
nox.options.error_on_missing_interpreters = True
nox.options.default_venv_backend = "none"

ROOT = Path(__file__).parent
PACKAGES = ROOT / "packages"
PURE_PACKAGES = ("deepep-core", "deepep-reference")
NATIVE_PACKAGES = ("deepep-nvshmem", "deepep-ibgda")
PYTHON_VERSIONS = ("3.10", "3.11", "3.12", "3.13")
TREE_TOOLS = ("build", "hatchling", "mpi4py", "mpich", "mypy", "nox", "pybind11", "pytest-xdist", "ruff", "tomli")
# Processes that run tests side by side; one may hold several gigabytes of emulated GPUs.
MOST_WORKERS = 4
# The oldest NVSHMEM that is accepted, which kernels are built with and which starts without a GPU.
NVSHMEM = "nvidia-nvshmem-cu13==3.4.5"
CHECKED_SCRIPTS = ("noxfile.py", "tests/cluster", "tests/packaging", "docs", "examples", "benchmarks")
# What a machine without a network lacks beside torch, numpy, pytest and hypothesis: small wheels of pure Python.
OFFLINE_WHEELS = ("stevedore", "hatchling", "packaging", "pathspec", "pluggy", "trove-classifiers")


@nox.session
def tests(session: nox.Session) -> None:
    """All tests that need no GPU (further arguments go to pytest)."""
    arguments, environment = list(session.posargs), {}
    if not arguments:
        arguments = ["-q"]
        cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
        workers = min(cores, MOST_WORKERS)
        if workers > 1:
            # A file stays whole, because its tests share pools of ranks, compiled programs and emulated GPUs.
            arguments += [f"--numprocesses={workers}", "--dist=loadfile"]
            # Without it each worker's torch keeps all cores busy, also while it waits for work.
            environment["OMP_NUM_THREADS"] = str(cores // workers)
    session.run(tree_python(session), "-m", "pytest", *arguments, env=environment, external=True)


@nox.session(default=False)
def lint(session: nox.Session) -> None:
    """Style: ruff's rules and ruff's format."""
    python = tree_python(session)
    session.run(python, "-m", "ruff", "check", ".", external=True)
    session.run(python, "-m", "ruff", "format", "--check", ".", external=True)


@nox.session(default=False)
def types(session: nox.Session) -> None:
    """Type hints of all packages, as each supported Python reads them."""
    python = tree_python(session)
    sources = [str(path.relative_to(ROOT)) for path in sorted(PACKAGES.glob("*/src"))]
    for version in PYTHON_VERSIONS:
        session.run(python, "-m", "mypy", f"--python-version={version}", *sources, external=True)
    session.run(python, "-m", "mypy", *[name for name in CHECKED_SCRIPTS if (ROOT / name).exists()], external=True)


@nox.session(default=False)
def docs(session: nox.Session) -> None:
    """The examples of README and docs: each one is run, its output compared, links followed."""
    session.run(tree_python(session), "docs/run_examples.py", *session.posargs, external=True)


@nox.session(default=False)
def packaging(session: nox.Session) -> None:
    """Builds every package, installs them in clean environments and checks what arrived."""
    python = tree_python(session)
    natives = NATIVE_PACKAGES if shutil.which("nvcc") else ()
    if not natives:
        session.warn(f"no nvcc on this machine: {', '.join(NATIVE_PACKAGES)} cannot be built and are left out")
    dist = Path(session.create_tmp()) / "dist"
    shutil.rmtree(dist, ignore_errors=True)
    # From the tree to an sdist, and from that sdist to the wheel: a wheel that needs a file the sdist lacks fails.
    build = (python, "-m", "build", "--outdir", str(dist))
    for name in PURE_PACKAGES:
        session.run(*build, "--no-isolation", str(PACKAGES / name), external=True)
    for name in natives:
        with shared_headers_inside(PACKAGES / name):
            session.run(*build, str(PACKAGES / name), external=True)
    session.run(python, "tests/packaging/check_archives.py", str(dist), external=True)
    session.run(python, "tests/packaging/check_requirements.py", *PYTHON_VERSIONS, external=True)

    for combination in combinations(natives):
        target = clean_environment(session, "-".join(combination))
        wheels = [str(next(dist.glob(f"{name.replace('-', '_')}-*.whl"))) for name in combination]
        wheels[0] += "[cli]"
        session.run(target, "-m", "pip", "install", "--quiet", *wheels, external=True)
        session.run(target, "-m", "pip", "check", external=True)
        session.run(target, "tests/packaging/check_install.py", *combination, external=True)
    if natives:
        across_nodes(session, dist)


def across_nodes(session: nox.Session, dist: Path) -> None:
    """deepep-nvshmem beside NVSHMEM, built with it and built without."""
    target = clean_environment(session, "nvshmem")
    core = str(next(dist.glob("deepep_core-*.whl")))
    whole = str(next(dist.glob("deepep_nvshmem-*.whl")))
    session.run(target, "-m", "pip", "install", "--quiet", core, f"{whole}[cu13]", NVSHMEM, external=True)
    session.run(target, "tests/packaging/check_nvshmem.py", "built", external=True)
    without = Path(session.create_tmp()) / "without"
    shutil.rmtree(without, ignore_errors=True)
    # One architecture will do: the kernels that are left are those of the wheel above.
    session.run(
        sys.executable, "-m", "pip", "wheel", "--quiet", "--no-deps", "--wheel-dir", str(without),
        str(next(dist.glob("deepep_nvshmem-*.tar.gz"))), external=True,
        env={"DEEPEP_WITHOUT_NVSHMEM": "1", "TORCH_CUDA_ARCH_LIST": "9.0"},
    )  # fmt: skip
    reinstall = ("--quiet", "--no-deps", "--force-reinstall", str(next(without.glob("*.whl"))))
    session.run(target, "-m", "pip", "install", *reinstall, external=True)
    session.run(target, "tests/packaging/check_nvshmem.py", "left-out", external=True)


@nox.session(default=False)
def cluster(session: nox.Session) -> None:
    """The three cluster checks, small, on the CPU."""
    python = tree_python(session)
    small = ("--processes=4", "--tokens=64", "--hidden=512", "--topk=4", "--experts=16")
    session.run(python, "tests/cluster/intranode.py", *small, "--pressure=2", external=True)
    session.run(
        python, "tests/cluster/internode.py", *small, "--groups=2", "--pressure=2",
        external=True, env={"DEEPEP_RANKS_PER_NODE": "2"},
    )  # fmt: skip
    session.run(python, "tests/cluster/low_latency.py", *small, "--pressure=2", external=True)


@nox.session(default=False)
def gpu(session: nox.Session) -> None:
    """Everything marked gpu, built from the tree, with the Python at hand (needs GPUs and nvcc)."""
    session.run("bash", "scripts/gpu_suite.sh", *session.posargs, external=True)


@nox.session(default=False)
def wheelhouse(session: nox.Session) -> None:
    """Collects in wheelhouse/ the small wheels that scripts/gpu_suite.sh needs on a machine without a network."""
    session.run(
        sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--only-binary=:all:",
        "--dest", "wheelhouse", *OFFLINE_WHEELS, external=True,
    )  # fmt: skip


def tree_python(session: nox.Session) -> str:
    """The interpreter of the shared environment, made again when a pyproject.toml or the constraints change."""
    home = ROOT / ".nox" / "tree"
    python = home / "bin" / "python"
    stamp = home / "installed"
    described = [ROOT / "constraints.txt", ROOT / "noxfile.py", *sorted(PACKAGES.glob("*/pyproject.toml"))]
    state = hashlib.sha256(b"".join(path.read_bytes() for path in described)).hexdigest()
    if not (stamp.exists() and stamp.read_text() == state):
        session.run(sys.executable, "-m", "venv", "--clear", str(home), external=True, silent=True)
        editable = [part for name in PURE_PACKAGES for part in ("-e", f"packages/{name}")]
        editable[1] += "[cli,testing]"
        session.run(
            str(python), "-m", "pip", "install", "--quiet", "-c", "constraints.txt", *TREE_TOOLS,
            f"{NVSHMEM}; sys_platform == 'linux'", *editable, external=True,
        )  # fmt: skip
        stamp.write_text(state)
    return str(python)


def clean_environment(session: nox.Session, name: str) -> str:
    """The interpreter of an empty environment in which only a torch of an earlier day is found."""
    before = ROOT / ".nox" / "torch-before"
    if not (before / "torch").exists():
        requirements = ("-c", "constraints.txt", "torch", "numpy")
        session.run(
            sys.executable, "-m", "pip", "install", "--quiet", "--target", str(before), *requirements, external=True
        )
    home = ROOT / ".nox" / f"clean-{name}"
    session.run(sys.executable, "-m", "venv", "--clear", str(home), external=True, silent=True)
    site_packages = next((home / "lib").glob("python*/site-packages"))
    (site_packages / "torch-before.pth").write_text(f"{before}\n")
    return str(home / "bin" / "python")


def combinations(natives: tuple[str, ...]) -> list[tuple[str, ...]]:
    """Core alone, core with the reference, with each native package, and everything together."""
    everything = [(*PURE_PACKAGES, *natives)] if natives else []
    return [("deepep-core",), PURE_PACKAGES, *(("deepep-core", name) for name in natives), *everything]


@contextlib.contextmanager
def shared_headers_inside(package: Path) -> Iterator[None]:
    """While its sdist is made, a native package holds a copy of core's headers, so that the sdist builds by itself."""
    copy = package / "vendor" / "include"
    shutil.copytree(PACKAGES / "deepep-core" / "src" / "deep_ep" / "include", copy, dirs_exist_ok=True)
    try:
        yield
    finally:
        shutil.rmtree(package / "vendor")
