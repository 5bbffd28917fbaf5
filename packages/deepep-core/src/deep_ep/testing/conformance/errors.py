"""Conformance when something goes wrong: refused arguments, ranks that disagree, ranks that do not come or are gone."""

from __future__ import annotations

import os
import signal
import threading
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import pytest
import torch
import torch.distributed as dist

from deep_ep import (
    ArgumentError,
    Buffer,
    BufferStateError,
    DeepEPError,
    PeerError,
    PeerRefusedError,
    PeersDisagreeError,
    PeerTimeoutError,
)
from deep_ep.backend import Mode, Operation
from deep_ep.launch import RankContext, RankFailure, run_ranks

from ..formats import bf16_tensor
from ..inputs import Case
from ..routing import Routing
from .base import Conformance, Run, Setup, at_least, environment_of
from .lifecycle import modes_round_trip

T = TypeVar("T")

# The deadline of buffers on which a call is meant to run into it, and the time in which that call has to end.
DEADLINE_S = 3.0
IN_TIME_S = 3 * DEADLINE_S
# The limit of a run of such calls: more than a busy machine takes, less than the default deadline leads to.
HANG_S = 60.0
# The deadline of all other buffers. No run may last as long, so a call that waits for it is found by the run's limit.
NEVER_S = 600.0


@dataclass(frozen=True, kw_only=True)
class Outcome:
    """How a call ended on one rank.

    Attributes:
        error: class of the error, ``""`` if there was none.
        text: of the error.
        ranks: that the error names, for peer errors.
        seconds: until it ended.
    """

    error: str
    text: str
    ranks: tuple[int, ...]
    seconds: float


def meeting_of_all() -> Callable[[], None]:
    """A barrier of all processes that calls which end badly do not spoil: over a group of its own. Collective."""
    group = dist.new_group(backend="gloo")

    def meet() -> None:
        dist.barrier(group=group)

    return meet


def in_time(limit_s: float, run: Callable[[int], T], seconds_of: Callable[[T], Iterable[float]]) -> T:
    """What a run returns whose calls all ended within the limit. A busy machine gets three tries.

    Args:
        limit_s: seconds that a call may take.
        run: is given the number of the try.
        seconds_of: what the calls of the run took.

    Raises:
        AssertionError: calls took longer every time.
    """
    longest = []
    for attempt in range(3):
        result = run(attempt)
        longest.append(max(seconds_of(result)))
        if longest[-1] < limit_s:
            return result
    raise AssertionError(f"calls took up to {longest} s in {len(longest)} tries, more than {limit_s} s each time")


def die_as(victim: int, context: RankContext, folder: Path) -> None:
    """Kill the victim's process once all ranks have come here: they may fail in calls that its connections end in.

    Args:
        folder: an empty one, the same for all ranks.
    """
    (folder / str(context.rank)).touch()
    if context.rank == victim:
        while len(os.listdir(folder)) < context.num_ranks:
            time.sleep(0.01)
        os.kill(os.getpid(), signal.SIGKILL)


def outcome_of(call: Callable[[], object]) -> Outcome:
    """Make the call. Errors of the library are outcomes; any other error is the test's failure."""
    started = time.monotonic()
    try:
        call()
    except DeepEPError as error:
        ranks = error.ranks if isinstance(error, PeerError) else ()
        return Outcome(error=type(error).__name__, text=str(error), ranks=ranks, seconds=time.monotonic() - started)
    return Outcome(error="", text="", ranks=(), seconds=time.monotonic() - started)


@dataclass(frozen=True, kw_only=True)
class Calls:
    """The calls of one rank on one buffer, ready to be made with some arguments wrong."""

    buffer: Buffer
    case: Case
    context: RankContext

    @property
    def x(self) -> torch.Tensor:
        return bf16_tensor(self.case.x(self.context.rank), self.context.device)

    @property
    def topk_idx(self) -> torch.Tensor:
        return torch.from_numpy(self.case.routing.topk_idx(self.context.rank)).to(self.context.device)

    @property
    def topk_weights(self) -> torch.Tensor:
        return torch.from_numpy(self.case.routing.topk_weights(self.context.rank)).to(self.context.device)

    def dispatch(self, **wrong: Any) -> tuple[Any, ...]:
        """A fresh dispatch; ``wrong`` replaces arguments."""
        per_rank, per_node, per_expert, in_rank, _ = self.buffer.get_dispatch_layout(
            self.topk_idx, self.case.routing.num_experts
        )
        arguments: dict[str, Any] = {
            "x": self.x,
            "num_tokens_per_rank": per_rank,
            "num_tokens_per_rdma_rank": per_node,
            "is_token_in_rank": in_rank,
            "num_tokens_per_expert": per_expert,
            "topk_idx": self.topk_idx,
            "topk_weights": self.topk_weights,
        }
        return self.buffer.dispatch(**(arguments | wrong))

    def combine(self, handle: Any, **wrong: Any) -> tuple[Any, ...]:
        num_rows = len(self.case.normal.sources(self.context.rank))
        rows = torch.zeros((num_rows, self.case.hidden), dtype=torch.bfloat16, device=self.context.device)
        return self.buffer.combine(**({"x": rows, "handle": handle} | wrong))

    def low_latency_dispatch(self, **wrong: Any) -> tuple[Any, ...]:
        arguments: dict[str, Any] = {
            "x": self.x,
            "topk_idx": self.topk_idx,
            "num_max_dispatch_tokens_per_rank": max(self.case.routing.num_tokens),
            "num_experts": self.case.routing.num_experts,
        }
        return self.buffer.low_latency_dispatch(**(arguments | wrong))

    def whole(self, mode: Mode) -> None:
        """A dispatch to its end. Where the host does not wait for the device, the next call tells how it went."""
        if mode == "normal":
            self.dispatch()
            return
        self.low_latency_dispatch()
        if self.context.device.type == "cuda":
            torch.cuda.synchronize(self.context.device)
            self.low_latency_dispatch()

    def low_latency_combine(self, handle: Any, **wrong: Any) -> tuple[Any, ...]:
        arguments: dict[str, Any] = {
            "x": torch.zeros((*handle[0].shape, self.case.hidden), dtype=torch.bfloat16, device=self.context.device),
            "topk_idx": self.topk_idx,
            "topk_weights": self.topk_weights,
            "handle": handle,
        }
        return self.buffer.low_latency_combine(**(arguments | wrong))


# --- functions that run on every rank -------------------------------------------------------------------------------


def refused_operation(
    context: RankContext, setup: Setup, case: Case, operation: Operation, modes: tuple[Mode, ...], offender: int
) -> Outcome:
    """One rank's arguments are refused; then a round trip on the same buffer has to be right."""
    buffer = setup.buffer(context, low_latency="low_latency" in modes, timeout_s=NEVER_S)
    calls = Calls(buffer=buffer, case=case, context=context)
    is_offender = context.rank == offender
    wrong_x: dict[str, Any] = {"x": "no tensor"} if is_offender else {}
    if operation in ("cached_dispatch", "combine"):
        handle = calls.dispatch()[4]
        if operation == "combine":
            outcome = outcome_of(lambda: calls.combine(handle, **wrong_x))
        else:
            x = "no tensor" if is_offender else calls.x
            outcome = outcome_of(lambda: buffer.dispatch(x, handle=handle))  # type: ignore[arg-type]
    elif operation == "dispatch":
        outcome = outcome_of(lambda: calls.dispatch(**wrong_x))
    elif operation == "low_latency_dispatch":
        outcome = outcome_of(lambda: calls.low_latency_dispatch(**wrong_x))
    elif operation == "low_latency_combine":
        low_latency_handle = calls.low_latency_dispatch()[2]
        outcome = outcome_of(lambda: calls.low_latency_combine(low_latency_handle, **wrong_x))
    else:
        hidden: Any = "wide" if is_offender else case.hidden
        outcome = outcome_of(lambda: buffer.clean_low_latency_buffer(16, hidden, case.routing.num_experts))
    modes_round_trip(buffer, case, context, modes)
    buffer.destroy()
    return outcome


def disagreement(context: RankContext, setup: Setup, case: Case, other: Case, odd_one: int) -> Outcome:
    """One rank dispatches rows of another width; then a round trip on the same buffer has to be right."""
    buffer = setup.buffer(context, timeout_s=NEVER_S)
    mine = other if context.rank == odd_one else case
    calls = Calls(buffer=buffer, case=mine, context=context)
    outcome = outcome_of(calls.dispatch)
    modes_round_trip(buffer, case, context, ("normal",))
    buffer.destroy()
    return outcome


def call_without_a_rank(context: RankContext, setup: Setup, case: Case, mode: Mode, absent: int) -> list[Outcome]:
    """All but one make a call; what they get, and what the next call gives them."""
    meet = meeting_of_all()
    buffer = setup.buffer(context, low_latency=mode == "low_latency", timeout_s=DEADLINE_S)
    calls = Calls(buffer=buffer, case=case, context=context)
    modes_round_trip(buffer, case, context, (mode,))
    outcomes = []
    if context.rank != absent:
        outcomes = [outcome_of(lambda: calls.whole(mode)) for _ in range(2)]
    meet()
    buffer.destroy()
    return outcomes


def call_with_a_killed_rank(
    context: RankContext, setup: Setup, case: Case, mode: Mode, victim: int, folder: Path
) -> Outcome:
    buffer = setup.buffer(context, low_latency=mode == "low_latency", timeout_s=DEADLINE_S)
    calls = Calls(buffer=buffer, case=case, context=context)
    modes_round_trip(buffer, case, context, (mode,))
    die_as(victim, context, folder)
    outcome = outcome_of(lambda: calls.whole(mode))
    buffer.destroy()
    return outcome


def reset_after_a_fault(context: RankContext, setup: Setup, case: Case, absent: int) -> list[Outcome]:
    """A call times out; then all ranks, the absent one too, reset the buffer and use it if that is possible."""
    meet = meeting_of_all()
    buffer = setup.buffer(context, timeout_s=DEADLINE_S)
    modes_round_trip(buffer, case, context, ("normal",))
    if context.rank != absent:
        outcome_of(Calls(buffer=buffer, case=case, context=context).dispatch)
    meet()
    outcomes = [outcome_of(buffer.reset)]
    if not outcomes[0].error:
        modes_round_trip(buffer, case, context, ("normal",))
    buffer.destroy()
    return outcomes


def aborted_wait(context: RankContext, setup: Setup, case: Case, mode: Mode) -> Outcome | None:
    """Rank 0 waits for peers that do not come, and another of its threads aborts the wait."""
    meet = meeting_of_all()
    buffer = setup.buffer(context, low_latency=mode == "low_latency", timeout_s=NEVER_S)
    calls = Calls(buffer=buffer, case=case, context=context)
    outcome = None
    if context.rank == 0:
        timer = threading.Timer(0.5, buffer.abort)
        timer.start()
        outcome = outcome_of(lambda: calls.whole(mode))
        timer.join()
    meet()
    buffer.destroy()
    return outcome


# --- the tests ------------------------------------------------------------------------------------------------------


class ErrorConformance(Conformance):
    """Errors are typed, arrive on every rank they concern, come in time, and leave a usable buffer where promised."""

    def case(self, num_ranks: int, *, hidden: int = 128) -> Case:
        routing = Routing(num_tokens=(5,) * num_ranks, num_experts=2 * num_ranks, num_topk=2 * num_ranks, seed=3)
        return Case(routing=routing, hidden=hidden, ranks_per_node=self.ranks_per_node)

    @property
    def modes(self) -> tuple[Mode, ...]:
        served = self.capabilities().modes
        return tuple(mode for mode in ("normal", "low_latency") if mode in served)

    def alone(self, function: Callable[..., Any], setup: Setup, *args: Any, num_ranks: int) -> list[Any]:
        """Run on processes of its own: what happens leaves the group unusable."""
        return run_ranks(
            function,
            setup,
            *args,
            num_ranks=num_ranks,
            device=self.device,
            group_backend=self.group_backend,
            environment=environment_of(setup),
            timeout_s=2 * HANG_S,
            grace_s=2 * HANG_S,
        )

    @at_least(2)
    @pytest.mark.parametrize(
        "operation",
        ["dispatch", "cached_dispatch", "combine", "low_latency_dispatch", "low_latency_combine", "clean"],
    )
    def test_refused_arguments_of_one_rank_reach_all_at_once(
        self, run: Run, setup: Setup, num_ranks: int, operation: Operation
    ) -> None:
        if operation not in self.capabilities().collective_refusal:
            pytest.skip(f"backend {self.backend!r} exchanges no headers in {operation}")
        offender = num_ranks - 1
        outcomes = run(refused_operation, self.case(num_ranks), operation, self.modes, offender, num_ranks=num_ranks)
        assert outcomes[offender].error == ArgumentError.__name__
        for rank, outcome in enumerate(outcomes):
            if rank != offender:
                assert outcome.error == PeerRefusedError.__name__, f"rank {rank}: {outcome}"
                assert outcome.ranks == (offender,)
                assert outcomes[offender].text[:60] in outcome.text, (
                    f"rank {rank} does not pass on the reason: {outcome}"
                )

    @at_least(2)
    def test_disagreement_is_the_same_error_everywhere(self, run: Run, setup: Setup, num_ranks: int) -> None:
        if "normal" not in self.modes:
            pytest.skip(f"backend {self.backend!r} does not serve normal mode")
        case, other = self.case(num_ranks), self.case(num_ranks, hidden=64)
        outcomes = run(disagreement, case, other, num_ranks - 1, num_ranks=num_ranks)
        assert {outcome.error for outcome in outcomes} == {PeersDisagreeError.__name__}
        assert len({outcome.text for outcome in outcomes}) == 1
        assert "hidden" in outcomes[0].text and "128" in outcomes[0].text and "64" in outcomes[0].text

    @at_least(2)
    @pytest.mark.parametrize("mode", ["normal", "low_latency"])
    def test_missing_rank_ends_the_call_at_the_deadline(self, setup: Setup, num_ranks: int, mode: Mode) -> None:
        if mode not in self.modes:
            pytest.skip(f"backend {self.backend!r} does not serve {mode} mode")
        absent = num_ranks - 1

        def run(attempt: int) -> list[list[Outcome]]:
            case = self.case(num_ranks)
            return self.alone(call_without_a_rank, setup, case, mode, absent, num_ranks=num_ranks)[:absent]

        results = in_time(IN_TIME_S, run, lambda results: (first.seconds for first, _ in results))
        for rank, (first, second) in enumerate(results):
            assert first.error == PeerTimeoutError.__name__, f"rank {rank}: {first}"
            assert first.seconds > 0.8 * DEADLINE_S, f"rank {rank} waited only {first.seconds:.1f} s"
            assert second.error == BufferStateError.__name__, f"rank {rank}, the call after a time-out: {second}"

    @at_least(2)
    def test_reset_restores_the_buffer_or_says_that_it_cannot(self, setup: Setup, num_ranks: int) -> None:
        if "normal" not in self.modes:
            pytest.skip(f"backend {self.backend!r} does not serve normal mode")
        case, absent = self.case(num_ranks), num_ranks - 1
        outcomes = self.alone(reset_after_a_fault, setup, case, absent, num_ranks=num_ranks)
        errors = {outcome.error for (outcome,) in outcomes}
        assert errors in ({""}, {BufferStateError.__name__}), f"ranks differ or fail otherwise: {outcomes}"

    @at_least(2)
    @pytest.mark.parametrize("mode", ["normal", "low_latency"])
    def test_killed_rank_ends_the_call(self, setup: Setup, num_ranks: int, mode: Mode, tmp_path: Path) -> None:
        if mode not in self.modes:
            pytest.skip(f"backend {self.backend!r} does not serve {mode} mode")
        victim = num_ranks - 1

        def run(attempt: int) -> dict[int, Outcome]:
            folder = tmp_path / str(attempt)
            folder.mkdir()
            with pytest.raises(RankFailure) as caught:
                case = self.case(num_ranks)
                self.alone(call_with_a_killed_rank, setup, case, mode, victim, folder, num_ranks=num_ranks)
            assert set(caught.value.failures) == {victim}, str(caught.value)
            return caught.value.results

        results = in_time(IN_TIME_S, run, lambda results: (outcome.seconds for outcome in results.values()))
        for rank, outcome in results.items():
            assert outcome.error in ("PeerLostError", "PeerTimeoutError"), f"rank {rank}: {outcome}"

    @at_least(2)
    @pytest.mark.parametrize("mode", ["normal", "low_latency"])
    def test_abort_from_another_thread_ends_a_wait(self, setup: Setup, num_ranks: int, mode: Mode) -> None:
        if mode not in self.modes:
            pytest.skip(f"backend {self.backend!r} does not serve {mode} mode")
        outcome = self.alone(aborted_wait, setup, self.case(num_ranks), mode, num_ranks=num_ranks)[0]
        assert outcome.error in ("BufferStateError", "PeerLostError", "PeerTimeoutError"), str(outcome)


__all__ = [
    "DEADLINE_S",
    "HANG_S",
    "IN_TIME_S",
    "NEVER_S",
    "Calls",
    "ErrorConformance",
    "Outcome",
    "die_as",
    "in_time",
    "meeting_of_all",
    "outcome_of",
]
