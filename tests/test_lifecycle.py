"""Buffers over a process's life: a thousand of them, missing and dead peers, unusual groups, the interpreter's end."""

from __future__ import annotations

import gc
import itertools
import os
import subprocess
import sys
import threading
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist

from deep_ep import Buffer
from deep_ep.launch import RankContext, RankFailure, run_ranks
from deep_ep.testing.conformance.errors import (
    DEADLINE_S,
    HANG_S,
    NEVER_S,
    Calls,
    Outcome,
    die_as,
    in_time,
    meeting_of_all,
    outcome_of,
)
from deep_ep.testing.conformance.lifecycle import modes_round_trip
from deep_ep.testing.inputs import Case
from deep_ep.testing.routing import Routing


def small_case(num_ranks: int) -> Case:
    routing = Routing(num_tokens=(3,) * num_ranks, num_experts=2 * num_ranks, num_topk=2, seed=num_ranks)
    return Case(routing=routing, hidden=128)


# --- a thousand buffers ---------------------------------------------------------------------------------------------


def holdings() -> dict[str, int]:
    """What this process holds right now."""
    gc.collect()
    resident_pages = int(Path("/proc/self/statm").read_text().split()[1])
    return {
        "bytes": resident_pages * os.sysconf("SC_PAGE_SIZE"),
        "descriptors": len(os.listdir("/proc/self/fd")),
        "threads": len(os.listdir("/proc/self/task")),
        "objects": len(gc.get_objects()),
    }


def many_buffers(context: RankContext, times: int, options: dict[str, Any], explicit: bool) -> list[dict[str, int]]:
    """What the process holds after each fifth of ``times`` buffers, beginning with the second."""
    case = small_case(context.num_ranks)
    held = []
    for index in range(times):
        buffer = Buffer(
            context.group, 1 << 20, 1 << 20, low_latency_mode=True, backend="reference", timeout_s=60.0, **options
        )
        if index % 20 == 0:
            modes_round_trip(buffer, case, context, ("normal", "low_latency"))
        if explicit:
            buffer.destroy()
            buffer.destroy()
        if (index + 1) % (times // 5) == 0:
            del buffer
            held.append(holdings())
    return held


@pytest.mark.skipif(not Path("/proc/self/statm").exists(), reason="needs /proc to measure the process")
@pytest.mark.parametrize(
    ("options", "explicit"),
    [
        pytest.param({}, True, id="destroyed"),
        pytest.param({}, False, id="forgotten"),
        pytest.param({"enable_shrink": True}, True, id="with-masks"),
    ],
)
def test_a_thousand_buffers_come_and_go_without_leaving_anything(options, explicit):
    times = 1000
    for held in run_ranks(many_buffers, times, options, explicit, num_ranks=2, timeout_s=300.0):
        assert held[0]["descriptors"] == held[-1]["descriptors"], held
        assert held[0]["threads"] == held[-1]["threads"], held
        assert held[-1]["objects"] - held[0]["objects"] < times / 20, held
        # The pools of the allocator and of gloo grow at first; what a buffer leaves behind shows in every fifth.
        growth = [after["bytes"] - before["bytes"] for before, after in itertools.pairwise(held)]
        assert min(growth) < 512 * times / 5, f"memory grew by {growth} bytes in {times // 5} buffers each"


# --- peers that do not come, or are gone ----------------------------------------------------------------------------


def without_rank(context: RankContext, absent: int, what: str) -> Outcome | None:
    meet = meeting_of_all()
    buffer = Buffer(context.group, 0, 1 << 16, low_latency_mode=True, timeout_s=DEADLINE_S, backend="reference")
    outcome = None
    if context.rank != absent:
        calls = Calls(buffer=buffer, case=small_case(context.num_ranks), context=context)
        if what == "clean":
            outcome = outcome_of(lambda: buffer.clean_low_latency_buffer(4, 128, 2 * context.num_ranks))
        else:
            outcome = outcome_of(calls.dispatch if what == "dispatch" else calls.low_latency_dispatch)
    meet()
    buffer.destroy()
    return outcome


@pytest.mark.parametrize("absent", [0, 2])
@pytest.mark.parametrize("what", ["dispatch", "low_latency_dispatch", "clean"])
def test_missing_rank_is_named_at_the_deadline(what, absent):
    def run(attempt: int) -> dict[int, Outcome]:
        outcomes = run_ranks(without_rank, absent, what, num_ranks=3, timeout_s=2 * HANG_S)
        return {rank: outcome for rank, outcome in enumerate(outcomes) if rank != absent}

    outcomes = in_time(2 * DEADLINE_S + 1, run, lambda outcomes: (outcome.seconds for outcome in outcomes.values()))
    for rank, outcome in outcomes.items():
        assert outcome.error == "PeerTimeoutError", f"rank {rank}: {outcome}"
        assert outcome.ranks == (absent,), f"rank {rank}: {outcome}"
        assert f"rank {absent}" in outcome.text and what in outcome.text
        assert outcome.seconds >= DEADLINE_S


def killed_rank(context: RankContext, victim: int, folder: Path) -> list[Outcome]:
    buffer = Buffer(context.group, 0, 1 << 16, low_latency_mode=True, timeout_s=DEADLINE_S, backend="reference")
    case = small_case(context.num_ranks)
    modes_round_trip(buffer, case, context, ("normal",))
    die_as(victim, context, folder)
    calls = Calls(buffer=buffer, case=case, context=context)
    outcomes = [outcome_of(calls.dispatch), outcome_of(calls.dispatch)]
    buffer.destroy()
    return outcomes


@pytest.mark.parametrize("victim", [0, 2])
def test_killed_rank_ends_calls_and_the_buffer_says_so_from_then_on(victim, tmp_path):
    def run(attempt: int) -> dict[int, list[Outcome]]:
        folder = tmp_path / str(attempt)
        folder.mkdir()
        with pytest.raises(RankFailure) as caught:
            run_ranks(killed_rank, victim, folder, num_ranks=3, grace_s=2 * HANG_S)
        assert list(caught.value.failures) == [victim], str(caught.value)
        return caught.value.results

    results = in_time(2 * DEADLINE_S + 1, run, lambda results: (first.seconds for first, _ in results.values()))
    for rank, (first, second) in results.items():
        assert first.error in ("PeerLostError", "PeerTimeoutError"), f"rank {rank}: {first}"
        assert second.error == "BufferStateError", f"rank {rank}: {second}"


def destroy_beside_a_killed_rank(context: RankContext, victim: int, folder: Path, options: dict[str, Any]) -> None:
    buffer = Buffer(context.group, 0, 1 << 16, low_latency_mode=True, timeout_s=NEVER_S, backend="reference", **options)
    modes_round_trip(buffer, small_case(context.num_ranks), context, ("normal", "low_latency"))
    die_as(victim, context, folder)
    buffer.destroy()


@pytest.mark.parametrize("options", [{}, {"enable_shrink": True}], ids=["whole-group", "with-masks"])
def test_destroy_does_not_wait_for_a_killed_rank(options, tmp_path):
    with pytest.raises(RankFailure) as caught:
        run_ranks(destroy_beside_a_killed_rank, 1, tmp_path, options, num_ranks=3, grace_s=HANG_S)
    assert caught.value.results == {0: None, 2: None}, str(caught.value)


# --- groups of every kind -------------------------------------------------------------------------------------------


def on_a_group_of_some_ranks(context: RankContext, ranks: list[int], backend: str | None) -> int:
    group = dist.new_group(ranks, backend=backend)
    if context.rank not in ranks:
        return -1
    inside = RankContext(rank=ranks.index(context.rank), num_ranks=len(ranks), group=group, device=context.device)
    buffer = Buffer(group, 0, 1 << 16, low_latency_mode=True, backend="reference")
    modes_round_trip(buffer, small_case(len(ranks)), inside, ("normal", "low_latency"))
    assert (buffer.rank, buffer.group_size, buffer.group) == (inside.rank, len(ranks), group)
    buffer.destroy()
    return buffer.rank


@pytest.mark.parametrize("backend", [None, "gloo", "cpu:gloo"])
@pytest.mark.parametrize("ranks", [[1, 3], [0, 2, 3], [2]], ids=str)
def test_buffer_lives_on_a_group_of_some_ranks(ranks, backend):
    results = run_ranks(on_a_group_of_some_ranks, ranks, backend, num_ranks=4)
    assert results == [ranks.index(rank) if rank in ranks else -1 for rank in range(4)]


def buffers_on_two_groups(context: RankContext) -> None:
    """Groups that cross: each rank is in a row and in a column of a square."""
    rows = [dist.new_group(ranks) for ranks in ([0, 1], [2, 3])]
    columns = [dist.new_group(ranks) for ranks in ([0, 2], [1, 3])]
    row, column = divmod(context.rank, 2)
    pairs = []
    for group, rank in ((rows[row], column), (columns[column], row)):
        inside = RankContext(rank=rank, num_ranks=2, group=group, device=context.device)
        pairs.append((Buffer(group, 0, 1 << 16, low_latency_mode=True, backend="reference"), inside))
    for buffer, inside in [*pairs, *reversed(pairs)]:
        modes_round_trip(buffer, small_case(2), inside, ("normal", "low_latency"))
    for buffer, _ in pairs:
        buffer.destroy()


def test_buffers_live_on_crossing_groups():
    run_ranks(buffers_on_two_groups, num_ranks=4)


class Communicator:
    """The part of an mpi4py communicator that a buffer uses, over a process group."""

    def __init__(self, group: Any) -> None:
        self.group = group

    def Get_rank(self) -> int:
        return dist.get_rank(self.group)

    def Get_size(self) -> int:
        return dist.get_world_size(self.group)

    def Iallgather(self, sent: Any, received: Any) -> Request:
        rows = list(torch.from_numpy(received).unbind(0))
        own = torch.from_numpy(sent.copy())
        return Request(dist.all_gather(rows, own, group=self.group, async_op=True))

    def Ialltoallv(self, sent: Any, received: Any) -> Request:
        (send, send_counts), (receive, receive_counts) = sent, received
        source, target = (torch.from_numpy(buffer).reshape(-1) for buffer in (send, receive))
        return Request(
            dist.all_to_all_single(target, source, receive_counts, send_counts, group=self.group, async_op=True)
        )


class Request:
    """A request in the manner of mpi4py."""

    def __init__(self, *works: Any) -> None:
        self.works = works

    def Test(self) -> bool:
        return all(work.is_completed() for work in self.works)

    def Wait(self) -> None:
        for work in self.works:
            work.wait()


def on_a_communicator(context: RankContext) -> None:
    buffer = Buffer(None, 0, 1 << 16, low_latency_mode=True, comm=Communicator(context.group), backend="reference")
    assert buffer.group is None and buffer.group_size == context.num_ranks
    for _ in range(2):
        modes_round_trip(buffer, small_case(context.num_ranks), context, ("normal", "low_latency"))
    buffer.destroy()


@pytest.mark.parametrize("num_ranks", [1, 3])
def test_buffer_lives_on_an_mpi_communicator(rank_pool, num_ranks):
    rank_pool.run(on_a_communicator, num_ranks=num_ranks)


def group_and_communicator(context: RankContext) -> None:
    for arguments in ({"group": None}, {"group": context.group, "comm": Communicator(context.group)}):
        with pytest.raises(ValueError, match="a process group or an MPI communicator"):
            Buffer(**arguments)


def test_buffer_needs_a_group_or_a_communicator_and_not_both(rank_pool):
    rank_pool.run(group_and_communicator, num_ranks=1)


def two_threads(context: RankContext) -> None:
    """Two threads each with a buffer of its own, on groups of their own, at the same time."""
    groups = [dist.new_group(list(range(context.num_ranks))) for _ in range(2)]
    errors: list[BaseException] = []

    def work(group: Any) -> None:
        try:
            inside = RankContext(rank=context.rank, num_ranks=context.num_ranks, group=group, device=context.device)
            buffer = Buffer(group, 0, 1 << 16, low_latency_mode=True, backend="reference")
            for _ in range(10):
                modes_round_trip(buffer, small_case(context.num_ranks), inside, ("normal", "low_latency"))
            buffer.destroy()
        except BaseException as error:
            errors.append(error)

    threads = [threading.Thread(target=work, args=(group,)) for group in groups]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60.0)
        assert not thread.is_alive(), "a thread hangs"
    if errors:
        raise errors[0]


def test_threads_with_buffers_of_their_own_do_not_block_each_other():
    run_ranks(two_threads, num_ranks=3)


# --- the end of the interpreter -------------------------------------------------------------------------------------

PROGRAM = """
import gc, os, sys, time
import torch, torch.distributed as dist
from deep_ep import Buffer
torch.set_num_threads(1)
dist.init_process_group("gloo")
rank = dist.get_rank()

def make(**options):
    return Buffer(dist.group.WORLD, 0, 1 << 16, low_latency_mode=True, timeout_s=600.0, backend="reference", **options)

def use(buffer):
    x = torch.ones(2, 128, dtype=torch.bfloat16)
    idx = torch.tensor([[0, 1], [1, -1]])
    per_rank, _, per_expert, in_rank, _ = buffer.get_dispatch_layout(idx, 2)
    buffer.dispatch(x, num_tokens_per_rank=per_rank, is_token_in_rank=in_rank, num_tokens_per_expert=per_expert)
    return buffer.low_latency_dispatch(x, idx, 4, 2, return_recv_hook=True)

def pause():
    # torch 2.13 aborts now and then, without this library too, if a process that holds a group ends within moments of
    # its last gloo collective: its worker thread is still letting go of tensors.
    time.sleep(0.3)

"""
ENDINGS = {
    "buffers-alive": "buffers = [make() for _ in range(3)]; use(buffers[1])",
    "hook-never-called": "buffer = make(); hook = use(buffer)[-1]",
    "group-destroyed-before-buffers": "buffer = make(); use(buffer); dist.destroy_process_group()",
    "destroy-after-the-group": "buffer = make(); use(buffer); dist.destroy_process_group(); buffer.destroy()",
    "buffer-in-a-cycle": "buffer = make(); buffer.myself = [buffer]; use(buffer); del buffer",
    "ranks-leave-at-different-times": "buffer = make(); use(buffer); time.sleep(1.5 * rank)",
    "different-order-on-each-rank": (
        "buffers = [make(), make()]; use(buffers[0]); buffers[rank].destroy(); dist.destroy_process_group()"
    ),
    "with-masks": "buffer = make(enable_shrink=True); use(buffer)",
    "exit-in-the-middle": "buffer = make(); use(buffer); pause(); sys.exit(0)",
}


@pytest.mark.parametrize("ending", ENDINGS)
def test_interpreter_ends_quietly_and_at_once(ending, tmp_path):
    program = tmp_path / "program.py"
    program.write_text(f"{PROGRAM}{ENDINGS[ending]}\npause()\n")
    port_store = dist.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    common = os.environ | {
        "WORLD_SIZE": "2",
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(port_store.port),
        "TORCHELASTIC_USE_AGENT_STORE": "True",
        "GLOO_SOCKET_IFNAME": "lo",
    }
    processes = [
        subprocess.Popen(
            [sys.executable, str(program)],
            env=common | {"RANK": str(rank)},
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        for rank in range(2)
    ]
    try:
        # Less than the buffers' deadline, more than a busy machine takes to import torch.
        outputs = [process.communicate(timeout=300)[0] for process in processes]
    finally:
        for process in processes:
            process.kill()
    assert [process.returncode for process in processes] == [0, 0], outputs
    assert "Traceback" not in "".join(outputs) and "Exception ignored" not in "".join(outputs), outputs
