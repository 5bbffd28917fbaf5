"""Judges a clean environment from inside: ``python check_install.py deepep-core [deepep-reference ...]``.

Run by ``nox -s packaging`` with the interpreter of an environment into which exactly the named packages were
installed, and in which torch is found but was installed before them, somewhere else.
"""

from __future__ import annotations

import importlib
import importlib.metadata
import os
import subprocess
import sys
import sysconfig
import tempfile
from pathlib import Path
from types import ModuleType

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

ROOT = Path(__file__).resolve().parents[2]
SITE_PACKAGES = Path(sysconfig.get_paths()["purelib"])
NATIVE_MODULES = {"deepep-nvshmem": ["_nvlink", "_nvshmem"], "deepep-ibgda": ["_ibgda"]}
ARCHITECTURES = [80, 90, 100]


def expect(condition: bool, complaint: str) -> None:
    """Like ``assert``, but not switched off by ``python -O``, and with a sentence."""
    if not condition:
        sys.exit(f"WRONG: {complaint}")


def check_torch_was_left_alone() -> None:
    import torch

    expect(SITE_PACKAGES not in Path(torch.__file__).parents, "installing our packages brought a torch of its own")
    brought = {path.name.split("-")[0].lower() for path in SITE_PACKAGES.glob("*.dist-info")}
    heavy = sorted(name for name in brought if name.startswith(("torch", "nvidia", "triton")))
    expect(not heavy, f"installing our packages brought {', '.join(heavy)}")


def check_import(packages: list[str]) -> None:
    before = set(sys.modules)
    import deep_ep

    expect(SITE_PACKAGES in Path(deep_ep.__file__).parents, f"deep_ep came from {deep_ep.__file__}")
    version = importlib.metadata.version("deepep-core")
    expect(deep_ep.__version__ == version, f"deep_ep.__version__ is {deep_ep.__version__}, installed is {version}")
    import torch

    expect(not torch.cuda.is_initialized(), "importing deep_ep initialised CUDA; workers could no longer fork")
    loaded = {name.split(".")[0] for name in set(sys.modules) - before}
    expect(not loaded & {"deepep_reference", "deepep_nvshmem", "deepep_ibgda"}, "importing deep_ep imported a backend")
    expect(not loaded & {"typer", "rich", "matplotlib", "pytest", "hypothesis"}, "importing deep_ep imported an extra")
    importlib.import_module("deep_ep_cpp")
    for package in packages:
        importlib.import_module("deep_ep" if package == "deepep-core" else package.replace("-", "_"))


def native_modules(package: str) -> list[ModuleType]:
    """The extension modules of a package, loaded; all that it can have must be there."""
    folder = SITE_PACKAGES / package.replace("-", "_")
    names = sorted(path.name.split(".")[0] for path in folder.glob("*.so"))
    wanted = NATIVE_MODULES.get(package, [])
    expect(names == wanted, f"{package} has the extension modules {names}, expected {wanted}")
    flags, modules = sys.getdlopenflags(), []
    try:
        sys.setdlopenflags(os.RTLD_LAZY | os.RTLD_LOCAL)  # as the package does: NVSHMEM's functions are found later
        modules = [importlib.import_module(f"{folder.name}.{name}") for name in names]
    finally:
        sys.setdlopenflags(flags)
    return modules


def check_native_modules(packages: list[str]) -> None:
    """Extension modules load although neither a driver nor NVSHMEM is here, and leave one another's names alone."""
    modules = [module for package in packages for module in native_modules(package)]
    for module in modules:
        if "TORCH_CUDA_ARCH_LIST" not in os.environ:
            found = list(module.architectures())
            expect(found == ARCHITECTURES, f"{module.__name__} is built for {found}, expected {ARCHITECTURES}")
        print(f"  {module.__name__} loads, built for {module.architectures()}")
        try:
            if hasattr(module, "Arena"):
                module.Arena(device=-1, num_reserved_bytes=1)
            else:
                module.network_attach(device=0)
        except module.NativeError as error:
            expect(type(error).__module__ == module.__name__, f"{module.__name__} raised another module's error")
        else:
            expect(False, f"{module.__name__} found a device or a network that cannot be")


def check_across_nodes(packages: list[str]) -> None:
    """Without NVSHMEM the backend across nodes says which package is missing, and the one inside a node stays."""
    if "deepep-nvshmem" not in packages:
        return
    from deep_ep.backend import Environment

    package = importlib.import_module("deepep_nvshmem")
    here = Environment(device_type="cuda", num_gpus=0)
    obstacles = [str(obstacle) for obstacle in package.NvshmemBackend.probe(here)]
    expect(
        len(obstacles) == 1 and "NVSHMEM is not installed" in obstacles[0] and "nvidia-nvshmem-cu13" in obstacles[0],
        f"without NVSHMEM the backend nvshmem says {obstacles}",
    )
    inside = package.NvlinkBackend.probe(here)
    expect(inside == [], f"the backend nvlink says {inside}")
    print(f"  nvshmem: {obstacles[0]}")


def declared_backends(package: str) -> list[str]:
    project = tomllib.loads((ROOT / "packages" / package / "pyproject.toml").read_text())["project"]
    return list(project.get("entry-points", {}).get("deep_ep.backends", {}))


def check_backends(packages: list[str]) -> None:
    expected = {name for package in packages for name in declared_backends(package)}
    found = {point.name for point in importlib.metadata.entry_points(group="deep_ep.backends")}
    expect(found == expected, f"backends registered: {sorted(found)}, expected {sorted(expected)}")
    shown = subprocess.run(
        [Path(sys.executable).with_name("deepep"), "backends"],
        capture_output=True,
        text=True,
        env={**os.environ, "COLUMNS": "200", "NO_COLOR": "1"},
    )
    text = shown.stdout + shown.stderr
    expect("Traceback" not in text, f"`deepep backends` broke:\n{text}")
    for name in expected:
        expect(name in text, f"`deepep backends` does not show {name}:\n{text}")
    print("  deepep backends:", *text.strip().splitlines(), sep="\n    ")


def check_buffer(packages: list[str]) -> None:
    """One rank: with a backend that serves CPUs it works, without one the error names what to install."""
    import torch.distributed as dist

    from deep_ep import Buffer
    from deep_ep.errors import DeepEPError

    with tempfile.TemporaryDirectory() as folder:
        store = dist.FileStore(str(Path(folder) / "store"), 1)
        dist.init_process_group("gloo", store=store, rank=0, world_size=1)
        if "deepep-reference" in packages:
            check_round_trip()
        else:
            try:
                Buffer(dist.group.WORLD)
            except DeepEPError as error:
                expect("deepep-reference" in str(error), f"the error does not say what to install: {error}")
                print(f"  without a backend: {type(error).__name__}: {error}")
            else:
                expect(False, "a Buffer could be built although no installed backend serves a CPU")
        dist.destroy_process_group()


def check_round_trip() -> None:
    import torch
    import torch.distributed as dist

    from deep_ep import Buffer

    buffer = Buffer(dist.group.WORLD, explicitly_destroy=True)
    x = torch.arange(24, dtype=torch.bfloat16).reshape(3, 8)
    topk_idx = torch.tensor([[0, 1], [1, -1], [-1, -1]])
    per_rank, per_node, per_expert, in_rank, _ = buffer.get_dispatch_layout(topk_idx, 2)
    received, _, _, counts, handle, _ = buffer.dispatch(
        x,
        num_tokens_per_rank=per_rank,
        num_tokens_per_rdma_rank=per_node,
        num_tokens_per_expert=per_expert,
        is_token_in_rank=in_rank,
        topk_idx=topk_idx,
        topk_weights=torch.ones(3, 2),
    )
    assert isinstance(received, torch.Tensor) and handle is not None
    combined, _, _ = buffer.combine(received, handle)
    expect(counts == [1, 2], f"dispatch counted {counts} tokens per expert, expected [1, 2]")
    expect(received.shape == (2, 8), f"dispatch delivered {tuple(received.shape)}, expected (2, 8)")
    expected = x.clone()
    expected[2] = 0
    expect(torch.equal(combined, expected), f"combine returned {combined}, expected {expected}")
    buffer.destroy()
    print("  dispatch and combine on one rank: exact")


def main(packages: list[str]) -> None:
    print(f"{' + '.join(packages)} in {sys.prefix}")
    check_torch_was_left_alone()
    check_import(packages)
    check_native_modules(packages)
    check_across_nodes(packages)
    check_backends(packages)
    check_buffer(packages)


if __name__ == "__main__":
    main(sys.argv[1:])
