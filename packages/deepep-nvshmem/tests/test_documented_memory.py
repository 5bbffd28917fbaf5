"""The memory formula of docs/nvshmem.md against the layout that the kernels use (``internode/window.hpp``)."""

from __future__ import annotations

import re
import shutil
import subprocess
from pathlib import Path

import pytest

from deepep_nvshmem import internode

ROOT = Path(__file__).resolve().parents[3]
PAGE = (ROOT / "docs" / "nvshmem.md").read_text()
INTERNODE = ROOT / "packages" / "deepep-nvshmem"
CASES = [(4, 2), (4, 4), (16, 2), (64, 8), (512, 64), (24, 3)]  # ranks, nodes
MIB = 1 << 20
PROGRAM = """
#include <cstdio>
#include <cstdlib>
#include "internode/window.hpp"
int main(int count, char** given) {
    const int experts = std::atoi(given[1]);
    for (int i = 2; i + 2 < count; i += 3) {
        const int ranks = std::atoi(given[i]), nodes = std::atoi(given[i + 1]);
        const long long ring = std::atoll(given[i + 2]);
        const auto window = deepep::internode::NetworkWindow::of(ranks, nodes, experts, ring);
        std::printf("%lld\\n", static_cast<long long>(window.num_bytes()));
    }
}
"""


def _ring_bytes(num_nodes: int) -> int:
    return int(internode.default_window_mb(num_nodes) * MIB) // 2 // 128 * 128


def _documented(num_ranks: int, num_nodes: int) -> int:
    """Bytes in NVSHMEM's heap, by the page's own numbers."""
    words = re.search(r"`(\d+) D \+ (\d+) N`", PAGE)
    records = re.search(r"`4 N \((\d+) \+ 4 N \+ 4 D\)`", PAGE)
    assert "`(D - 1) W`" in PAGE and words and records
    num_bytes = (
        (num_nodes - 1) * 2 * _ring_bytes(num_nodes)
        + int(words[1]) * num_nodes
        + -(-int(words[2]) * num_ranks // 128) * 128
    )
    return num_bytes + 4 * num_ranks * (-(-(int(records[1]) + 4 * num_ranks + 4 * num_nodes) // 128) * 128)


@pytest.fixture(scope="module")
def laid_out(tmp_path_factory: pytest.TempPathFactory) -> dict[tuple[int, int], int]:
    compiler = shutil.which("g++")
    if compiler is None:
        pytest.skip("needs g++; none was found")
    folder = tmp_path_factory.mktemp("window")
    (folder / "window.cpp").write_text(PROGRAM)
    includes = [f"-I{ROOT / 'packages/deepep-core/src/deep_ep/include'}", f"-I{INTERNODE / 'csrc'}"]
    subprocess.run([compiler, "-std=c++17", *includes, "window.cpp", "-o", "window"], cwd=folder, check=True)
    base = (INTERNODE / "src" / "deepep_nvshmem" / "base.py").read_text()
    experts = re.search(r"^MAX_LOCAL_EXPERTS = (\d+)$", base, re.MULTILINE)
    assert experts is not None
    arguments = [experts[1], *(str(number) for case in CASES for number in (*case, _ring_bytes(case[1])))]
    done = subprocess.run([folder / "window", *arguments], check=True, capture_output=True, text=True)
    return dict(zip(CASES, map(int, done.stdout.split()), strict=True))


@pytest.mark.parametrize("case", CASES, ids=lambda case: f"{case[0]} ranks, {case[1]} nodes")
def test_the_page_tells_what_is_reserved(laid_out: dict[tuple[int, int], int], case: tuple[int, int]) -> None:
    assert _documented(*case) == laid_out[case]


@pytest.mark.parametrize(("num_nodes", "window_mb"), [(2, 32), (3, 24), (9, 24), (17, 12), (33, 6), (64, 6)])
def test_windows_shrink_beyond_nine_nodes(num_nodes: int, window_mb: int) -> None:
    assert internode.default_window_mb(num_nodes) == window_mb


def test_the_pages_name_the_default_window() -> None:
    settings = (ROOT / "docs" / "configuration.md").read_text()
    row = next(line for line in settings.splitlines() if line.startswith("| `DEEPEP_NVSHMEM_WINDOW_MB`"))
    only, most, least = map(internode.default_window_mb, (2, 3, 1000))
    told = f"`DEEPEP_NVSHMEM_WINDOW_MB` ({most} MiB; {only} for two nodes; beyond nine nodes"
    assert told in PAGE and f"at least {least} MiB" in PAGE
    assert row.endswith(f"| {most}, {only} for two nodes, less beyond nine |")


def test_the_examples_of_the_page_are_right(laid_out: dict[tuple[int, int], int]) -> None:
    told = re.search(r"16 ranks on 2 nodes take ([\d.]+) MiB, 64 on 8 take ([\d.]+), 512 on 64 take ([\d.]+)\.", PAGE)
    assert told is not None
    for text, case in zip(told.groups(), [(16, 2), (64, 8), (512, 64)], strict=True):
        assert float(text) == pytest.approx(laid_out[case] / MIB, abs=0.5 if "." not in text else 0.05)
