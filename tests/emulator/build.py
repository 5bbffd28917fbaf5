"""Builds a package's extension over the emulator: the kernels' own sources, compiled by the host's compiler with the
headers here in place of CUDA's, NVSHMEM's and those of ``deepep/ptx``."""

from __future__ import annotations

import fcntl
import hashlib
import os
import re
import shutil
import subprocess
import sys
import sysconfig
import tempfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

HERE = Path(__file__).resolve().parent
PACKAGES = HERE.parents[1] / "packages"
SHARED = PACKAGES / "deepep-core/src/deep_ep/include"
FLAGS = [
    "-std=c++17",
    "-O1",
    "-fPIC",
    "-fvisibility=hidden",
    "-ffp-contract=off",
    "-fno-strict-aliasing",
    "-Wno-attributes",
    "-Wno-unknown-pragmas",
    "-Wno-volatile",
]
KERNEL_FLAGS = ["-x", "c++", "-D__CUDACC__", "-D__CUDA_ARCH__=900", "-include", "cuda_runtime_api.h"]
EMULATOR = ("emulator.cpp", "operations.cpp", "memory.cpp", "report.cpp")
# Of each extension: where its sources lie, which they are, and what it needs besides the emulator.
EXTENSIONS: dict[str, tuple[Path, str, tuple[str, ...]]] = {
    "_ibgda": (
        PACKAGES / "deepep-ibgda/csrc",
        "bindings.cpp runtime.cpp kernels/dispatch.cu kernels/combine.cu provider/bind_provider.cpp "
        "provider/software.cpp provider/device_tables.cpp provider/probe.cu",
        (),
    ),
    "_nvlink": (
        PACKAGES / "deepep-nvshmem/csrc",
        "bindings.cpp arena.cpp runtime.cpp kernels/layout.cu kernels/notify.cu kernels/dispatch.cu "
        "kernels/combine.cu kernels/fabric.cu",
        (),
    ),
    "_nvshmem": (
        PACKAGES / "deepep-nvshmem/csrc",
        "internode/bindings.cpp internode/runtime.cpp internode/dispatch_shape.cpp internode/layout.cu "
        "internode/counts.cu internode/plan.cu internode/dispatch.cu internode/combine.cu",
        ("nvshmem.cpp",),
    ),
    "_faults": (HERE / "faults", "faults.cu", ()),
}

# A block's own variable is found by the address of a tag that stands where the declaration stands.
_SHARED_VARIABLE = (
    "using {name}_type = {type}; static char {name}_tag; "
    "auto& {name} = *static_cast<{name}_type*>(emulator::shared(&{name}_tag, sizeof({name}_type)));"
)


def _translated(text: str) -> str:
    """What no macro can say in C++. Lines stay where they are."""
    text = text.replace("__noinline__", "")
    # Whoever waits on the host for what a kernel publishes lets the kernels run meanwhile.
    text = text.replace("sched_yield()", "emulator::host_waits()")
    # Real libraries of the same functions may be in the process.
    text = text.replace("dlsym(RTLD_DEFAULT, name)", "emulator::own_symbol(name)")
    text = re.sub(
        r"extern __shared__ (?:__align__\(\d+\) )?([\w:]+) (\w+)\[\];",
        r"\1* const \2 = static_cast<\1*>(emulator::dynamic_shared());",
        text,
    )

    def shared(match: re.Match[str]) -> str:
        base, first, extents, others = match.groups()
        names = [first, *(others or "").replace(",", " ").split()]
        return "".join(_SHARED_VARIABLE.format(name=name, type=base + extents) for name in names)

    text = re.sub(r"(?<!\w)__shared__ ([\w: ]+?) (\w+)((?:\[[^\]]*\])*)((?:, \w+)*);", shared, text)
    return re.sub(r"([\w:]+(?:<[^<>;=]*>)?)\s*<<<(.*?)>>>\(", r'emulator::launch("\1", \1, \2)(', text)


def _sources(folder: Path) -> list[Path]:
    return sorted(p for p in folder.rglob("*") if p.suffix in (".cu", ".cuh", ".hpp", ".cpp", ".h"))


def _lay_out(csrc: Path, tree: Path) -> None:
    """The sources and the shared headers, with the emulator's in place of those that speak to a GPU."""
    for origin, place in ((SHARED, tree / "include"), (csrc, tree / "csrc")):
        for path in _sources(origin):
            copy = place / path.relative_to(origin)
            copy.parent.mkdir(parents=True, exist_ok=True)
            copy.write_text(_translated(path.read_text()))
    for path in _sources(HERE / "include"):
        name = path.relative_to(HERE / "include")
        places = [tree / "include" / name]
        if (tree / "csrc" / name).exists():
            places.append(tree / "csrc" / name)
        for place in places:
            place.parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(path, place)


def build(name: str, folder: Path) -> Path:
    """The library of the extension ``name``; not built again while its sources stay the same."""
    csrc, sources, more = EXTENSIONS[name]
    inputs = [*_sources(csrc), *_sources(SHARED), *_sources(HERE / "include"), *sorted(HERE.glob("*.[ch]pp"))]
    digest = hashlib.sha256(b"".join(p.read_bytes() for p in [*inputs, Path(__file__)]) + sys.version.encode())
    library = folder / name / digest.hexdigest()[:16] / (name + sysconfig.get_config_var("EXT_SUFFIX"))
    (folder / name).mkdir(parents=True, exist_ok=True)
    with open(folder / f"{name}.lock", "w") as lock:  # of runs side by side one builds, the others wait
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not library.exists():
            for former in (folder / name).glob("*"):
                shutil.rmtree(former, ignore_errors=True)
            library.parent.mkdir(parents=True)
            _compile(csrc, sources, more, library)
    return library


def _compile(csrc: Path, sources: str, more: tuple[str, ...], library: Path) -> None:
    import pybind11

    compiler = os.environ.get("CXX", "g++")
    with tempfile.TemporaryDirectory(dir=library.parent) as temporary:
        tree = Path(temporary)
        _lay_out(csrc, tree)
        includes = [f"-I{p}" for p in (tree / "include", tree / "csrc", HERE, sysconfig.get_path("include"))]
        includes.append(f"-I{pybind11.get_include()}")

        def compiled(source: Path) -> str:
            target = tree / (source.name.replace(".", "_") + ".o")
            flags = KERNEL_FLAGS if source.suffix == ".cu" else ["-DDEEPEP_ARCHITECTURES=90"]
            subprocess.run([compiler, *FLAGS, *flags, *includes, "-c", str(source), "-o", str(target)], check=True)
            return str(target)

        files = [tree / "csrc" / s for s in sources.split()] + [HERE / s for s in EMULATOR + more]
        with ThreadPoolExecutor(min(4, os.cpu_count() or 1)) as pool:
            objects = list(pool.map(compiled, files))
        linked = tree / library.name
        subprocess.run([compiler, "-shared", "-o", str(linked), *objects, "-lpthread", "-ldl"], check=True)
        linked.replace(library)


if __name__ == "__main__":
    print(build(sys.argv[1], Path(sys.argv[2])))
