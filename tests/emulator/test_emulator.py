"""The emulator itself: wrong kernels are seen to be wrong, right ones pass (``faults/faults.cu``)."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).resolve().parent))
import emulator

if obstacle := emulator.obstacle():
    pytest.skip(obstacle, allow_module_level=True)

NUM_WORDS = 64
SEEDS = range(30)


def run(case: str, seed: int = 1) -> list[int]:
    faults, machine = emulator.load("_faults")
    faults.launch(case)
    machine.seed(seed)
    machine.run()
    return [faults.result(i) for i in range(NUM_WORDS)]


@pytest.mark.parametrize(
    ("case", "words"),
    [
        ("shuffle_of_half_a_warp", [r"nobody can go on", r"lanes ffff at __shfl_sync of ffffffff in faults.cu:\d+"]),
        ("shuffles_that_meet_by_chance", [r"lanes ffff at __shfl_sync", r"lanes ffff0000 at __shfl_sync"]),
        ("shuffle_from_outside_its_mask", [r"a shuffle reads lane 20, which takes no part \(mask ffff\)"]),
        ("lane_outside_its_mask", [r"a warp operation whose mask leaves it out"]),
        ("barrier_of_three_warps", [r"nobody can go on", r"2 warps .*: lanes ffffffff at barrier 1"]),
        ("barrier_of_two_sizes", [r"barrier 1 is used for \d+ and for \d+ threads at once"]),
        ("wait_for_nobody", [r"somebody waits without a deadline", r"lanes ffffffff polls"]),
        ("end_before_a_copy_has_read", [r"block 0 ends before its copies have read their source"]),
        ("promise_of_other_memory", [r"a promise is not kept: __isShared\(m\)"]),
        ("write_behind_shared_memory", [r"has written behind its dynamic shared memory"]),
    ],
)
def test_a_fault_is_named(case: str, words: list[str]) -> None:
    with pytest.raises(AssertionError) as raised:
        run(case)
    for word in [case, *words]:
        raised.match(word)
    assert run("barrier_of_two_warps")[:NUM_WORDS] == [1] * 64  # nothing of it is left


def test_right_kernels_pass() -> None:
    assert run("shuffle_of_all") == [3] * 16 + [0] * 16 + [35] * 16 + [0] * 16
    assert run("bulk_load_and_wait") == [100 + i for i in range(NUM_WORDS)]
    assert all(run("bulk_store_and_wait", seed) == [7] * NUM_WORDS for seed in SEEDS)
    assert all(run("announce_and_release", seed)[0] == 0 for seed in SEEDS)


def test_what_is_announced_too_early_is_found_old() -> None:
    assert any(run("announce_only", seed)[0] > 0 for seed in SEEDS)


def test_a_copy_that_nobody_waits_for_has_not_come() -> None:
    assert any(run("bulk_load_only", seed)[0] == 0xFDFDFDFD for seed in SEEDS)
    assert any(8 in run("bulk_store_only", seed) for seed in SEEDS)


def test_shared_memory_begins_with_anything() -> None:
    assert run("read_what_nobody_wrote")[:32] == [0xFDFDFDFD] * 32


def test_time_passes_when_nobody_gets_on() -> None:
    assert 1000 <= run("wait_a_second")[0] <= 3000


def test_a_seed_decides_the_order() -> None:
    orders = [tuple(run("come_in_any_order", seed)[:12]) for seed in SEEDS]
    assert all(sorted(order) == list(range(12)) for order in orders)
    assert len(set(orders)) > len(orders) // 2
    assert orders == [tuple(run("come_in_any_order", seed)[:12]) for seed in SEEDS]
