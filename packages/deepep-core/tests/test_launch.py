"""Ranks as processes: `deep_ep.launch`."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
import torch.distributed as dist

from deep_ep.launch import RankContext, RankFailure, RankPool, launched_externally, run_ranks


@dataclass(frozen=True)
class Summand:
    """An argument of a class that only this module knows."""

    value: int


def add_up(context: RankContext, summand: Summand) -> tuple[int, int, int]:
    total = torch.tensor([summand.value + context.rank])
    dist.all_reduce(total, group=context.group)
    return int(total), context.rank, context.num_ranks


def process_id(context: RankContext) -> int:
    return os.getpid()


def fail_on(context: RankContext, ranks: tuple[int, ...]) -> int:
    if context.rank in ranks:
        raise ValueError(f"rank {context.rank} was told to fail")
    return context.rank


def sleep_on(context: RankContext, rank: int) -> int:
    if context.rank == rank:
        time.sleep(60)
    return context.rank


def die_on(context: RankContext, rank: int) -> int:
    if context.rank == rank:
        os.kill(os.getpid(), signal.SIGKILL)
    return context.rank


def read_environment(context: RankContext, name: str) -> str | None:
    return os.environ.get(name)


def tensor_of_rank(context: RankContext) -> torch.Tensor:
    return torch.full((2,), context.rank)


def num_threads(context: RankContext) -> int:
    return torch.get_num_threads()


@pytest.fixture(scope="module")
def pool():
    with RankPool(4) as pool:
        yield pool


@pytest.mark.parametrize("num_ranks", [1, 2, 3, 4])
def test_results_come_back_by_rank(pool, num_ranks):
    expected = sum(10 + rank for rank in range(num_ranks))
    assert pool.run(add_up, Summand(10), num_ranks=num_ranks) == [(expected, r, num_ranks) for r in range(num_ranks)]


def test_eight_ranks_of_a_pool_of_their_own():
    assert run_ranks(add_up, Summand(0), num_ranks=8) == [(28, rank, 8) for rank in range(8)]


def test_processes_live_on_between_runs(pool):
    assert pool.run(process_id) == pool.run(process_id)
    assert len(set(pool.run(process_id))) == 4


def test_failure_names_every_failing_rank_and_the_pool_recovers(pool):
    with pytest.raises(RankFailure, match="failed on 2 of 4 ranks") as caught:
        pool.run(fail_on, (1, 3))
    assert set(caught.value.failures) == {1, 3}
    assert caught.value.results == {0: 0, 2: 2}
    for rank in (1, 3):
        assert f"ValueError: rank {rank} was told to fail" in caught.value.failures[rank]
    assert pool.run(fail_on, ()) == [0, 1, 2, 3]


def test_stuck_rank_is_reported_with_its_stack_and_the_pool_recovers(pool):
    pool.run(fail_on, ())
    with pytest.raises(RankFailure, match="had not returned after 4 s") as caught:
        pool.run(sleep_on, 2, timeout_s=4.0)
    assert "in sleep_on" in caught.value.failures[2]
    assert caught.value.results == {0: 0, 1: 1, 3: 3}
    assert pool.run(fail_on, ()) == [0, 1, 2, 3]


def test_killed_rank_is_reported_with_its_exit_code_and_the_pool_recovers(pool):
    with pytest.raises(RankFailure) as caught:
        pool.run(die_on, 1)
    assert caught.value.failures == {1: "the process ended with exit code -9"}
    assert pool.run(fail_on, ()) == [0, 1, 2, 3]


def test_environment_holds_for_one_run(pool):
    assert pool.run(read_environment, "DEEPEP_TEST", environment={"DEEPEP_TEST": "7"}) == ["7"] * 4
    assert pool.run(read_environment, "DEEPEP_TEST") == [None] * 4


def test_ranks_start_with_the_environment_of_their_pool(monkeypatch):
    monkeypatch.setenv("DEEPEP_TEST", "later than the server process")
    assert run_ranks(read_environment, "DEEPEP_TEST", num_ranks=1) == ["later than the server process"]


def test_tensors_can_be_returned_and_outlive_the_pool():
    results = run_ranks(tensor_of_rank, num_ranks=2)
    assert [r.tolist() for r in results] == [[0, 0], [1, 1]]


def test_ranks_use_one_thread_each(pool):
    assert pool.run(num_threads) == [1] * 4


def test_closing_twice_leaves_no_process_behind():
    pool = RankPool(2)
    pids = pool.run(process_id)
    pool.close()
    pool.close()
    for pid in pids:
        with pytest.raises(ProcessLookupError):
            os.kill(pid, 0)


def test_nested_function_is_refused_before_it_is_sent(pool):
    def nested(context):
        return 0

    with pytest.raises(ValueError, match="Move it to the top of its module"):
        pool.run(nested)


@pytest.mark.parametrize("num_ranks", [0, 5])
def test_more_ranks_than_the_pool_has_are_refused(pool, num_ranks):
    with pytest.raises(ValueError, match="1 to 4 ranks"):
        pool.run(process_id, num_ranks=num_ranks)


def test_launcher_variables_are_recognised(monkeypatch):
    monkeypatch.delenv("RANK", raising=False)
    monkeypatch.delenv("WORLD_SIZE", raising=False)
    assert not launched_externally()
    monkeypatch.setenv("RANK", "0")
    monkeypatch.setenv("WORLD_SIZE", "1")
    assert launched_externally()


PROGRAM = """
import sys
import torch
from deep_ep.launch import join_external
context = join_external("cpu")
value = torch.tensor([context.rank])
torch.distributed.all_reduce(value, group=context.group)
with open(f"{sys.argv[1]}/rank{context.rank}", "w") as file:
    print(context.rank, context.num_ranks, int(value), context.device, file=file)
# torch 2.13 aborts now and then if a process ends within moments of its last gloo collective and still holds the group.
torch.distributed.barrier()
del context
torch.distributed.destroy_process_group()
"""


def test_program_under_torchrun_joins_its_launchers_group(tmp_path):
    program = tmp_path / "program.py"
    program.write_text(PROGRAM)
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]
    command = [*launcher, str(program), str(tmp_path)]
    finished = subprocess.run(command, capture_output=True, text=True, timeout=300, check=False)
    assert finished.returncode == 0, finished.stderr
    assert [(tmp_path / f"rank{rank}").read_text() for rank in range(2)] == ["0 2 1 cpu\n", "1 2 1 cpu\n"]


def test_functions_of_a_script_are_found_without_running_it_again(tmp_path: Path) -> None:
    (tmp_path / "job.py").write_text(
        "from deep_ep.launch import run_ranks\n"
        "def job(context):\n    return context.rank\n"
        "if __name__ == '__main__':\n    print(run_ranks(job, num_ranks=2))\n"
    )
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    # Started by a path that is not the one that the other processes see.
    run = subprocess.run(
        [sys.executable, "../job.py"],
        cwd=elsewhere,
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert run.returncode == 0, run.stderr
    assert run.stdout.strip() == "[0, 1]"
