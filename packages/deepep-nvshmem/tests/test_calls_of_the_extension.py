"""The Python side without a GPU: its extension is replaced by the stub file, whose signatures refuse any other call."""

from __future__ import annotations

import contextlib
import itertools
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from deep_ep import ArgumentError, BufferStateError, PeerRefusedError, PeerTimeoutError
from deep_ep.backend import BufferOptions, DispatchLayout, DispatchRequest, DispatchResult, GroupFacts
from deep_ep.headers import CallHeader
from deepep_nvshmem import normal
from deepep_nvshmem.normal import NvlinkNormal

STUB = Path(normal.__file__).with_name("_nvlink.pyi")
NUM_RANKS, NUM_TOKENS, NUM_EXPERTS, NUM_TOPK, HIDDEN = 2, 6, 8, 3, 64


class FakeStream:
    def __init__(self, machine: FakeMachine, name: str, handle: int) -> None:
        self.machine, self.name, self.cuda_stream, self.device_index = machine, name, handle, 0

    def synchronize(self) -> None:
        pass


class FakeEvent:
    def record(self, stream: FakeStream) -> None:
        self.where = stream.name

    def wait(self, stream: FakeStream) -> None:
        stream.machine.log.append(f"{stream.name} waits for {self.where}")


class FakeMachine:
    """What was enqueued, and what the extension will say next."""

    def __init__(self) -> None:
        self.log: list[str] = []
        self.calls: list[tuple[str, dict[str, Any]]] = []
        self.caller, self.own = FakeStream(self, "caller", 5), FakeStream(self, "own", 99)
        self.current = self.caller
        self.is_capturing = False
        self.num_rows = 4
        self.has_counts = True
        self.mismatch_mask = 0
        self.refusal = ""  # of the other rank

    def of(self, name: str) -> list[dict[str, Any]]:
        return [arguments for called, arguments in self.calls if called == name]


@pytest.fixture
def machine(monkeypatch: pytest.MonkeyPatch) -> Iterator[FakeMachine]:
    fake = FakeMachine()
    names: dict[str, Any] = {}
    exec(compile(STUB.read_text(), str(STUB), "exec"), names)
    stub = SimpleNamespace(**names)
    runtime = stub.Runtime

    def replace(name: str, answer: Any) -> None:
        declared = getattr(runtime, name)

        def call(self: Any, *arguments: Any, **named: Any) -> Any:
            declared(self, *arguments, **named)  # raises TypeError for a call that the stub does not declare
            fake.calls.append((name, named))
            if "stream" in named:
                fake.log.append(name)
            return answer(*arguments, **named)

        monkeypatch.setattr(runtime, name, call)

    def fits(*, ticket: int, least_rows: int, capacity: int, **_others: Any) -> str | None:
        is_good = fake.has_counts and not fake.mismatch_mask and least_rows <= fake.num_rows <= capacity
        return "in_place" if ticket == 0 or is_good else None

    def wait_counts(ticket: int, timeout_s: float) -> Any:
        experts = [fake.num_rows] * (NUM_EXPERTS // NUM_RANKS)
        return (
            SimpleNamespace(
                num_recv_tokens=fake.num_rows,
                num_recv_tokens_per_expert=experts,
                mismatch_mask=fake.mismatch_mask,
                bad_count_mask=0,
            )
            if fake.has_counts
            else None
        )

    replace("dispatch", fits)
    replace("wait_counts", wait_counts)
    for name in ("layout", "notify", "refuse"):
        replace(name, lambda **_arguments: None)
    monkeypatch.setattr(runtime, "window_bytes", staticmethod(lambda **_sizes: 1 << 20))
    monkeypatch.setattr(runtime, "error", lambda self: None)

    class Arena:
        def __init__(self, *_what: Any, **_how: Any) -> None:
            self.num_bytes, self.arena_ptrs = 1 << 20, [4096] * NUM_RANKS

        def allocate_here(self) -> Any:
            return contextlib.nullcontext()

        def close(self) -> None:
            pass

    monkeypatch.setattr(normal, "load_extension", lambda: stub)
    monkeypatch.setattr(normal, "SymmetricArena", Arena)
    monkeypatch.setattr(normal, "_on_cuda", lambda tensor, call: None)
    monkeypatch.setattr(torch.cuda, "Stream", lambda *args, **how: fake.own)
    monkeypatch.setattr(torch.cuda, "Event", FakeEvent)
    monkeypatch.setattr(torch.cuda, "current_stream", lambda device=None: fake.current)
    monkeypatch.setattr(torch.cuda, "set_stream", lambda stream: setattr(fake, "current", stream))
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: fake.is_capturing)
    yield fake


class FakeChannel:
    rank, num_ranks = 0, NUM_RANKS

    def __init__(self, machine: FakeMachine) -> None:
        self._machine = machine

    def all_gather(self, record: bytes, **_how: Any) -> list[bytes]:
        theirs = CallHeader(operation="dispatch", sequence=0, refusal=self._machine.refusal)
        return [record, theirs.pack()]

    def all_agree(self, accepted: bool, **_how: Any) -> list[bool]:
        return [accepted] * NUM_RANKS


@pytest.fixture
def part(machine: FakeMachine) -> Iterator[NvlinkNormal]:
    facts = GroupFacts(
        rank=0,
        num_ranks=NUM_RANKS,
        ranks_per_node=NUM_RANKS,
        device=torch.device("cpu"),
        channel=FakeChannel(machine),  # type: ignore[arg-type]
    )
    opened = NvlinkNormal(facts, BufferOptions())
    yield opened
    opened.destroy()


def dispatch(part: NvlinkNormal, machine: FakeMachine, **changes: Any) -> DispatchResult:
    layout = DispatchLayout(
        num_tokens_per_rank=torch.zeros(NUM_RANKS, dtype=torch.int32),
        num_tokens_per_rdma_rank=None,
        num_tokens_per_expert=torch.zeros(NUM_EXPERTS, dtype=torch.int32),
        is_token_in_rank=torch.zeros((NUM_TOKENS, NUM_RANKS), dtype=torch.bool),
    )
    arguments: dict[str, Any] = {
        "x": torch.zeros((NUM_TOKENS, HIDDEN), dtype=torch.float8_e4m3fn),
        "scales": torch.zeros((NUM_TOKENS, 2)),
        "layout": layout,
        "topk_idx": torch.zeros((NUM_TOKENS, NUM_TOPK), dtype=torch.int64),
        "topk_weights": torch.zeros((NUM_TOKENS, NUM_TOPK)),
        "output_stream": machine.caller,
    }
    return part.dispatch(DispatchRequest(**(arguments | changes)))


def test_results_have_the_shapes_of_the_contract(part: NvlinkNormal, machine: FakeMachine) -> None:
    result = dispatch(part, machine)
    assert result.recv_scales is not None and result.recv_topk_idx is not None and result.recv_topk_weights is not None
    assert result.recv_x.shape == (4, HIDDEN) and result.recv_x.dtype == torch.float8_e4m3fn
    assert result.recv_scales.shape == (4, 2)
    assert result.recv_topk_idx.shape == (4, NUM_TOPK) and result.recv_topk_idx.dtype == torch.int64
    assert result.recv_topk_weights.shape == (4, NUM_TOPK)
    assert result.num_recv_tokens_per_expert == [4] * 4 and result.is_on_output_stream
    shapes = [tuple(p.shape) for p in result.handle or () if p is not None]
    assert shapes == [(2, 2), (2, 1), (2, 1), (4,), (NUM_TOKENS, 2), (NUM_TOKENS, 2)]


def test_kernels_write_to_what_the_handle_holds(part: NvlinkNormal, machine: FakeMachine) -> None:
    rank_prefix, _, first_rows, src_idx, _, send_head = dispatch(part, machine).handle or ()
    assert rank_prefix is not None and first_rows is not None and src_idx is not None and send_head is not None
    (notify,), launched = machine.of("notify"), machine.of("dispatch")[-1]
    assert notify["rank_prefix"] == launched["rank_prefix"] == rank_prefix.data_ptr()
    assert notify["send_head"] == launched["send_head"] == send_head.data_ptr()
    assert notify["first_rows"] == first_rows.data_ptr()
    assert launched["recv_src_idx"] == src_idx.data_ptr()
    spans = sorted((t.data_ptr(), t.numel() * 4) for t in (rank_prefix, first_rows, send_head))
    assert all(start + size <= after for (start, size), (after, _) in itertools.pairwise(spans))


def test_the_same_number_of_rows_again_is_launched_behind_its_counts(part: NvlinkNormal, machine: FakeMachine) -> None:
    dispatch(part, machine)
    machine.calls.clear()
    dispatch(part, machine)
    (launched,) = machine.of("dispatch")
    assert launched["ticket"] == machine.of("notify")[0]["ticket"] != 0
    assert launched["least_rows"] <= 4 <= launched["capacity"]


@pytest.mark.parametrize("num_rows", [5000, 100])
def test_rows_that_do_not_fit_get_memory_of_their_own(part: NvlinkNormal, machine: FakeMachine, num_rows: int) -> None:
    machine.num_rows = 1000
    dispatch(part, machine)
    machine.num_rows = num_rows
    machine.calls.clear()
    result = dispatch(part, machine)
    declined, launched = machine.of("dispatch")
    assert declined["ticket"] != 0 and launched["ticket"] == 0
    assert num_rows <= launched["capacity"] <= num_rows * 9 // 8
    assert launched["recv_x"] == result.recv_x.data_ptr() and result.recv_x.shape == (num_rows, HIDDEN)


def test_a_fixed_number_of_rows_waits_for_nothing(part: NvlinkNormal, machine: FakeMachine) -> None:
    machine.is_capturing = True
    result = dispatch(part, machine, num_worst_tokens=1001)
    (launched,) = machine.of("dispatch")
    assert launched["ticket"] == 0 == machine.of("notify")[0]["ticket"] and not machine.of("wait_counts")
    assert launched["capacity"] == 1001 and launched["fill_unused"]
    assert result.recv_x.shape == (1001, HIDDEN) and result.num_recv_tokens_per_expert == []


def test_own_stream_waits_after_each_allocation_on_the_callers(part: NvlinkNormal, machine: FakeMachine) -> None:
    machine.num_rows = 50
    dispatch(part, machine)
    waits = "own waits for caller"
    assert machine.log == [waits, "notify", "dispatch", waits, "dispatch"]
    machine.log.clear()
    part.layout(torch.zeros((NUM_TOKENS, NUM_TOPK), dtype=torch.int64), NUM_EXPERTS, machine.caller)  # type: ignore[arg-type]
    assert machine.log == [waits, "layout"]
    assert {arguments["stream"] for _, arguments in machine.calls if "stream" in arguments} == {99}
    machine.log.clear()
    assert not dispatch(part, machine, output_stream=None).is_on_output_stream
    assert machine.log == ["notify", "dispatch"]


def test_what_another_rank_refused_is_raised_with_its_reason(part: NvlinkNormal, machine: FakeMachine) -> None:
    machine.mismatch_mask, machine.refusal = 2, "scales have 0 columns"
    with pytest.raises(PeerRefusedError, match="scales have 0 columns"):
        dispatch(part, machine)
    # notify may still be writing to memory that the caller's stream gets back.
    assert machine.log == ["own waits for caller", "notify", "dispatch", "caller waits for own"]
    machine.mismatch_mask = 0
    dispatch(part, machine)


def test_counts_that_never_come_break_the_buffer(part: NvlinkNormal, machine: FakeMachine) -> None:
    machine.has_counts = False
    with pytest.raises(PeerTimeoutError, match="heard nothing"):
        dispatch(part, machine)
    machine.has_counts = True
    with pytest.raises(BufferStateError, match="failed before"):
        dispatch(part, machine)


def test_a_capture_without_fixed_rows_is_refused_before_anything_is_enqueued(
    part: NvlinkNormal, machine: FakeMachine
) -> None:
    machine.is_capturing = True
    with pytest.raises(ArgumentError, match="num_worst_tokens"):
        dispatch(part, machine)
    assert machine.log == []
    machine.is_capturing = False
    dispatch(part, machine)


def test_refused_arguments_are_told_to_the_peers(part: NvlinkNormal, machine: FakeMachine) -> None:
    part.refuse("dispatch", "scales have 0 columns")
    assert machine.log == ["refuse"] and machine.current is machine.caller
