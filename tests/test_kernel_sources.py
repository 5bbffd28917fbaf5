"""Rules that every kernel source keeps, checked on the text: the memory model has no other lint."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

PACKAGES = Path(__file__).parent.parent / "packages"
SOURCES = sorted(
    path
    for pattern in ("*.cu", "*.cuh", "*.hpp", "*.cpp")
    for path in PACKAGES.rglob(pattern)
    if not {"build", "vendor", ".nox"} & set(path.parts)
)
DEVICE_SOURCES = [path for path in SOURCES if path.suffix in (".cu", ".cuh") or "include" in path.parts]

FORBIDDEN = {
    "the non-coherent path for data that a peer may write": r"__ldg\s*\(|\.nc\b|__ldcs\s*\(",
    "a device trap (a wait reports and the kernel drains)": r"__trap\s*\(|\btrap;|\bassert\s*\(",
    "printing from a kernel": r"\bprintf\s*\(",
    "NVLink multicast": r"cuMulticast|multimem",
    "managed memory": r"cudaMallocManaged|__managed__",
    "a cooperative launch": r"cudaLaunchCooperativeKernel|this_grid\s*\(",
}


def _without_comments(text: str) -> str:
    return re.sub(r"//[^\n]*|/\*.*?\*/", lambda m: "\n" * m.group().count("\n"), text, flags=re.DOTALL)


def _found(path: Path, pattern: str) -> list[str]:
    lines = _without_comments(path.read_text()).splitlines()
    return [f"{path.name}:{i}: {line.strip()}" for i, line in enumerate(lines, 1) if re.search(pattern, line)]


def test_there_are_kernel_sources_to_check() -> None:
    assert len(DEVICE_SOURCES) >= 10


@pytest.mark.parametrize("what", FORBIDDEN)
def test_kernel_sources_contain_no(what: str) -> None:
    found = [hit for path in DEVICE_SOURCES for hit in _found(path, FORBIDDEN[what])]
    assert not found, f"{what}: {found}"


def test_ptx_lives_in_one_folder() -> None:
    found = [hit for path in DEVICE_SOURCES if path.parent.name != "ptx" for hit in _found(path, r"\basm\b")]
    assert not found, found


def test_offsets_are_not_narrowed_to_32_bits() -> None:
    """A row number times a row size overflows 32 bits; products with sizes start from a 64-bit operand."""
    narrowing = r"static_cast<int>\([^()]*\*\s*[^()]*(row_bytes|hidden)[^()]*\)"
    found = [hit for path in DEVICE_SOURCES for hit in _found(path, narrowing)]
    assert not found, found


@pytest.mark.parametrize(
    ("what", "line"),
    [
        ("the non-coherent path for data that a peer may write", "v = __ldg(p);"),
        ("a device trap (a wait reports and the kernel drains)", 'asm volatile("trap;");'),
        ("printing from a kernel", 'printf("late");'),
    ],
)
def test_the_check_sees_an_offender(tmp_path: Path, what: str, line: str) -> None:
    bad = tmp_path / "bad.cu"
    bad.write_text(f"// {line} in a comment is fine\n{line}\n")
    assert len(_found(bad, FORBIDDEN[what])) == 1
