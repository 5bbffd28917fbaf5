"""NVSHMEM's host library, started by real processes; most tests put one in its place that does as it is told."""

from __future__ import annotations

import ctypes
import importlib.util
import os
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist

from deep_ep import BackendUnavailableError, DeepEPError
from deep_ep import nvshmem_runtime as nvshmem
from deep_ep.backend import GroupFacts
from deep_ep.channel import open_channel
from deep_ep.launch import RankContext, RankPool, run_ranks
from deep_ep.settings import NvshmemSettings
from deep_ep.testing.conformance.errors import DEADLINE_S, NEVER_S

NUM_RANKS = 4
MIB = 1 << 20


@pytest.fixture(scope="module")
def fake(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder like that of an installed NVSHMEM."""
    compiler = shutil.which("gcc")
    if compiler is None:
        pytest.skip("needs gcc to make a library in the place of NVSHMEM; none is on the PATH")
    folder = tmp_path_factory.mktemp("nvshmem")
    (folder / "lib").mkdir()
    source = Path(__file__).parent / "native" / "fake_nvshmem.c"
    command = [compiler, "-shared", "-fPIC", "-Wall", "-Wextra", "-Werror", str(source)]
    subprocess.run([*command, "-o", str(folder / "lib" / nvshmem.SONAME)], check=True)
    return folder


@pytest.fixture(scope="module")
def pool() -> Iterator[RankPool]:
    """Processes of this file's own: each belongs to the first group for which it starts NVSHMEM."""
    with RankPool(NUM_RANKS) as pool:
        yield pool


def facts_of(context: RankContext) -> GroupFacts:
    return GroupFacts(
        rank=context.rank,
        num_ranks=context.num_ranks,
        ranks_per_node=1,
        device=context.device,
        channel=open_channel(context.group, None),
    )


def allocate(
    context: RankContext, num_bytes: int = MIB, *, timeout_s: float = NEVER_S, **settings: Any
) -> nvshmem.SymmetricPiece:
    return nvshmem.allocate(
        facts_of(context),
        num_bytes=num_bytes,
        settings=NvshmemSettings(**settings),
        timeout_s=timeout_s,
        backend="nvshmem",
    )


def refusal(context: RankContext, **settings: Any) -> str:
    """The text of the error that this rank gets; empty if it gets memory."""
    try:
        allocate(context, **settings).close()
    except BackendUnavailableError as error:
        return str(error)
    return ""


# --- memory ---------------------------------------------------------------------------------------------------------


def keep_and_reuse(context: RankContext) -> list[bool]:
    first, second = allocate(context), allocate(context)
    distinct = first.ptr != second.ptr
    is_usable = ctypes.memset(second.ptr, 1, MIB) == second.ptr and second.ptr % 4096 == 0
    if context.rank != 0:
        first.close()
    third = allocate(context)
    not_while_one_rank_holds_it = third.ptr not in (first.ptr, second.ptr)
    if context.rank == 0:
        first.close()
        first.close()
    fourth = allocate(context, MIB // 2)
    is_reused = fourth.ptr == first.ptr and fourth.num_bytes == MIB
    larger = allocate(context, 2 * MIB)
    larger_is_new = larger.ptr not in (first.ptr, second.ptr, third.ptr)
    for piece in (second, third, fourth, larger):
        piece.close()
    smallest_that_fits = allocate(context).num_bytes == MIB
    return [distinct, is_usable, not_while_one_rank_holds_it, is_reused, larger_is_new, smallest_that_fits]


def test_memory_is_used_again_when_every_rank_has_left_it(pool: RankPool, fake: Path) -> None:
    assert pool.run(keep_and_reuse, environment={"NVSHMEM_DIR": str(fake)}) == [[True] * 6] * NUM_RANKS


def test_one_group_is_served_and_another_is_refused_by_name(pool: RankPool, fake: Path) -> None:
    environment = {"NVSHMEM_DIR": str(fake)}
    assert pool.run(refusal, environment=environment) == [""] * NUM_RANKS
    first, *others = pool.run(refusal, num_ranks=2, environment=environment)
    assert first == others[0]
    assert "backend 'nvshmem': NVSHMEM of rank 0's process serves another group: it is rank 0 of 4 there" in first
    assert "start new processes" in first
    assert pool.run(refusal, environment=environment) == [""] * NUM_RANKS


# --- starting -------------------------------------------------------------------------------------------------------


def start_with_settings(context: RankContext) -> tuple[str, str]:
    before = dict(os.environ)
    for _ in range(2):
        allocate(context, service_level=3)
    changed = {name for name in before.keys() | os.environ if before.get(name) != os.environ.get(name)}
    return Path(os.environ["FAKE_NVSHMEM_LOG"]).read_text(), ", ".join(changed)


def test_is_started_once_with_the_settings_and_leaves_the_environment_alone(fake: Path, tmp_path: Path) -> None:
    environment = {"NVSHMEM_DIR": str(fake), "FAKE_NVSHMEM_LOG": str(tmp_path / "log")}
    results = run_ranks(start_with_settings, num_ranks=NUM_RANKS, environment=environment)
    assert [changed for _, changed in results] == [""] * NUM_RANKS
    lines = sorted(results[0][0].splitlines())
    places, makers, levels = zip(*(line.split(", ") for line in lines), strict=True)
    assert places == tuple(f"{rank} of {NUM_RANKS}" for rank in range(NUM_RANKS))
    assert len(set(makers)) == 1 and makers[0].startswith("made by") and set(levels) == {"level 3"}


def test_settings_are_told_in_nvshmems_own_variables() -> None:
    told = nvshmem.variables_of(
        NvshmemSettings(window_mb=1, interface="eth0", transport="ucx", queue_pairs=2, queue_depth=64, heap_mb=5)
    )
    assert told == {
        "NVSHMEM_REMOTE_TRANSPORT": "ucx",
        "NVSHMEM_BOOTSTRAP_UID_SOCK_IFNAME": "eth0",
        "NVSHMEM_IBGDA_NUM_RC_PER_PE": "2",
        "NVSHMEM_QP_DEPTH": "64",
        "NVSHMEM_SYMMETRIC_SIZE": str(5 << 20),
    }
    assert nvshmem.variables_of(NvshmemSettings(transport="ibgda")) == {"NVSHMEM_IB_ENABLE_IBGDA": "1"}
    assert nvshmem.variables_of(NvshmemSettings()) == {}


def with_a_contradiction(context: RankContext) -> str:
    return refusal(context, service_level=3)


def test_variable_that_contradicts_a_setting_is_an_error_naming_both(fake: Path) -> None:
    environment = {"NVSHMEM_DIR": str(fake), "NVSHMEM_IB_SL": "4"}
    text, other = run_ranks(with_a_contradiction, num_ranks=2, environment=environment)
    assert text == other and "NVSHMEM_IB_SL is '4'" in text and "DEEPEP_NVSHMEM_" in text and "'3'" in text


def refused_and_again(context: RankContext, plan: str) -> tuple[str, str]:
    os.environ["FAKE_NVSHMEM"] = plan
    dist.barrier(group=context.group)  # none is late by the time that it took to start
    first = refusal(context, timeout_s=DEADLINE_S if plan.startswith("hang") else NEVER_S)
    del os.environ["FAKE_NVSHMEM"]
    return first, refusal(context)


@pytest.mark.parametrize(
    ("plan", "says", "again"),
    [
        ("id:0", "did not make an id for the group (status 7). NVSHMEM_DEBUG=INFO says more", ""),
        ("init:2", "did not start (status 7). NVSHMEM_DEBUG=INFO says more", "failed before"),
        ("shared:1", "several ranks share a GPU", "failed before"),
        ("elsewhere:3", "rank 3 of 4 is PE 4 of 4 there", "failed before"),
        ("memory:2", "NVSHMEM on rank 2 has no 1 MiB left. Use a smaller window (DEEPEP_NVSHMEM_WINDOW_MB)", ""),
        ("hang:1", "starting NVSHMEM took longer than 3 s on rank 1", "failed before"),
    ],
    ids=["no-id", "no-start", "shared-gpu", "other-place", "no-memory", "no-end"],
)
def test_trouble_on_one_rank_is_the_same_error_on_all(fake: Path, plan: str, says: str, again: str) -> None:
    environment = {"NVSHMEM_DIR": str(fake)}
    texts, second_texts = zip(
        *run_ranks(refused_and_again, plan, num_ranks=NUM_RANKS, environment=environment), strict=True
    )
    assert len(set(texts)) == len(set(second_texts)) == 1
    assert says in texts[0] and texts[0].startswith("backend 'nvshmem': ")
    assert (again in second_texts[0]) if again else second_texts[0] == ""


def started_elsewhere(context: RankContext, ranks: tuple[int, ...], offset: int) -> str:
    """As if torch had started NVSHMEM before, on some ranks, in some order."""
    library = nvshmem.load_library()
    if context.rank in ranks:
        nvshmem._init(library, facts_of(context), bytes([128, 0, 1, 0]) + bytes(124))
        if offset:
            os.environ["FAKE_NVSHMEM"] = f"elsewhere:{context.rank}"
            with pytest.raises(BackendUnavailableError):
                nvshmem._init(library, facts_of(context), bytes([128, 0, 1, 0]) + bytes(124))
    return refusal(context, service_level=2)


@pytest.mark.parametrize(
    ("ranks", "offset", "says"),
    [
        ((0, 1), 0, ""),
        ((0, 1), 1, "NVSHMEM was started by other code in this process, and rank 0 of 2 is PE 2 of 2 there"),
        ((1,), 0, "NVSHMEM runs already on rank 1 and not on rank 0"),
    ],
    ids=["same-ranks", "other-order", "one-rank-only"],
)
def test_nvshmem_that_other_code_started_is_used_if_it_counts_the_same_ranks(
    fake: Path, ranks: tuple[int, ...], offset: int, says: str
) -> None:
    environment = {"NVSHMEM_DIR": str(fake)}
    texts = run_ranks(started_elsewhere, ranks, offset, num_ranks=2, environment=environment)
    assert texts[0] == texts[1]
    assert says in texts[0] and bool(says) == bool(texts[0])


# --- finding --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("version", ["3.4.4", "3.3.9", "2.11.0", "4.0.0"])
def test_other_versions_are_refused_with_the_one_to_install(fake: Path, version: str) -> None:
    environment = {"NVSHMEM_DIR": str(fake), "FAKE_NVSHMEM_VERSION": version}
    text, other = run_ranks(refusal, num_ranks=2, environment=environment)
    assert text == other and f"NVSHMEM {version} is installed" in text
    assert "3.4.5 or a later 3.x is needed. Install 'nvidia-nvshmem-cu13>=3.4.5,<4'" in text


@pytest.mark.parametrize("version", ["3.4.5", "3.5.0", "3.10.1"])
def test_later_versions_are_accepted(fake: Path, version: str) -> None:
    environment = {"NVSHMEM_DIR": str(fake), "FAKE_NVSHMEM_VERSION": version}
    assert run_ranks(refusal, num_ranks=1, environment=environment) == [""]


def test_absent_nvshmem_is_an_error_that_names_the_package(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, fake: Path
) -> None:
    monkeypatch.setenv("NVSHMEM_DIR", str(tmp_path))
    with pytest.raises(BackendUnavailableError, match=r"NVSHMEM_DIR is .* has no lib/libnvshmem_host\.so\.3"):
        nvshmem.find_library()
    monkeypatch.setenv("NVSHMEM_DIR", str(fake))
    assert nvshmem.find_library() == fake / "lib" / nvshmem.SONAME
    monkeypatch.delenv("NVSHMEM_DIR")
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(BackendUnavailableError, match=r"NVSHMEM is not installed\. Install nvidia-nvshmem-cu13"):
        nvshmem.find_library()


def test_library_that_does_not_load_is_an_error_with_the_loaders_words(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    (tmp_path / "lib").mkdir()
    (tmp_path / "lib" / nvshmem.SONAME).write_text("")
    monkeypatch.setenv("NVSHMEM_DIR", str(tmp_path))
    with pytest.raises(BackendUnavailableError, match=r"does not load: .*file too short\."):
        nvshmem.load_library()


# --- the real one ---------------------------------------------------------------------------------------------------


def meet(context: RankContext) -> tuple[int, int, int, str]:
    """Start the installed NVSHMEM, without a GPU: ranks meet, and it waits for a device."""

    def start(facts: GroupFacts) -> ctypes.CDLL:
        settings = NvshmemSettings(interface="lo")
        return nvshmem.start(facts, settings=settings, timeout_s=NEVER_S, backend="nvshmem")

    library = start(facts_of(context))
    start(facts_of(context))
    return library.nvshmemx_init_status(), library.nvshmem_my_pe(), library.nvshmem_n_pes(), str(nvshmem.find_library())


def test_installed_nvshmem_lets_four_processes_meet() -> None:
    if torch.cuda.is_available():
        pytest.skip("is about processes without a GPU; there is one")
    try:
        path = nvshmem.find_library()
        library = ctypes.CDLL(str(path))
    except (DeepEPError, OSError) as error:
        pytest.skip(f"needs the wheel nvidia-nvshmem-cu13 3.4.5: {error}")
    numbers = [ctypes.c_int(), ctypes.c_int(), ctypes.c_int()]
    library.nvshmemx_vendor_get_version_info(*map(ctypes.byref, numbers))
    if [number.value for number in numbers] != [3, 4, 5]:
        pytest.skip(f"needs NVSHMEM 3.4.5, which starts without a GPU; found {[n.value for n in numbers]}")
    results = run_ranks(meet, num_ranks=NUM_RANKS)
    assert [result[:3] for result in results] == [(1, rank, NUM_RANKS) for rank in range(NUM_RANKS)]
