"""The Python side without a GPU: its extension is replaced by the stub file, whose signatures refuse any other call."""

from __future__ import annotations

import gc
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from deep_ep import ArgumentError, BufferStateError, PeersDisagreeError, PeerTimeoutError
from deep_ep.backend import (
    BufferOptions,
    GroupFacts,
    LowLatencyCombineRequest,
    LowLatencyDispatchRequest,
)
from deep_ep.handles import LowLatencyHandle
from deepep_ibgda import low_latency, providers, window
from deepep_ibgda.low_latency import IbgdaLowLatency

STUB = Path(low_latency.__file__).with_name("_ibgda.pyi")
NUM_RANKS, MAX_TOKENS, HIDDEN, NUM_EXPERTS, NUM_TOPK = 2, 8, 256, 4, 2
TICKET_WORDS = 4


class FakeStream:
    def __init__(self, number: int = 7) -> None:
        self.cuda_stream = number

    def wait_event(self, event: FakeEvent) -> None:
        event.waited_by.append(self.cuda_stream)

    def synchronize(self) -> None:
        pass


class FakeEvent:
    def __init__(self) -> None:
        self.waited_by: list[int] = []

    def record(self, stream: FakeStream) -> None:
        pass

    def synchronize(self) -> None:
        pass


class FakeMachine:
    """What the stubbed extension was asked for, and what it will say next."""

    def __init__(self) -> None:
        self.launches: list[tuple[str, dict[str, Any]]] = []
        self.window_sizes: list[int] = []
        self.record: Any = None
        self.capture = 0
        self.stream = FakeStream()

    def phases(self) -> list[tuple[str, int]]:
        return [(name, arguments["phases"]) for name, arguments in self.launches]


@pytest.fixture
def machine(monkeypatch: pytest.MonkeyPatch) -> Iterator[FakeMachine]:
    """The backend's modules with a stub for an extension and plain objects for streams and events."""
    fake = FakeMachine()
    names: dict[str, Any] = {}
    exec(compile(STUB.read_text(), str(STUB), "exec"), names)
    stub = SimpleNamespace(**names)
    stub.SEND, stub.RECEIVE = 1, 2
    stub.capture_id = lambda *, stream: fake.capture
    runtime = stub.Runtime

    def launching(name: str, declared: Any) -> Any:
        def call(self: Any, **arguments: Any) -> None:
            declared(self, **arguments)  # raises TypeError for a call that the stub does not declare
            fake.launches.append((name, arguments))

        return call

    for name in ("dispatch", "combine"):
        monkeypatch.setattr(runtime, name, launching(name, getattr(runtime, name)))
    monkeypatch.setattr(runtime, "error", lambda self: fake.record)
    declared_bytes, declared_words = runtime.window_bytes, runtime.handle_words

    def window_bytes(**sizes: Any) -> int:
        declared_bytes(**sizes)
        return int(sizes["max_tokens"]) * int(sizes["hidden"]) * 2 * 3

    def handle_words(**sizes: Any) -> int:
        declared_words(**sizes)
        return int(sizes["num_experts"] * sizes["max_tokens"] + 10 * sizes["num_topk"])

    monkeypatch.setattr(runtime, "window_bytes", staticmethod(window_bytes))
    monkeypatch.setattr(runtime, "handle_words", staticmethod(handle_words))
    monkeypatch.setattr(runtime, "ticket_words", staticmethod(lambda *, num_ranks: TICKET_WORDS))

    class Arena:
        def __init__(self, _extension: Any, _facts: Any, *, num_bytes: int, **_how: Any) -> None:
            self.num_bytes, self.base, self.arena_ptrs = num_bytes, 4096, [4096] * NUM_RANKS
            fake.window_sizes.append(num_bytes)

        def close(self) -> None:
            pass

    monkeypatch.setattr(low_latency, "load_extension", lambda: stub)
    monkeypatch.setattr(low_latency, "_on_cuda", lambda tensor, call: None)
    monkeypatch.setattr(providers, "MappedArena", Arena)
    monkeypatch.setattr(torch.cuda, "Stream", lambda *args, **how: FakeStream(99))
    monkeypatch.setattr(torch.cuda, "Event", FakeEvent)
    monkeypatch.setattr(torch.cuda, "current_stream", lambda device=None: fake.stream)
    monkeypatch.setattr(torch.cuda, "synchronize", lambda device=None: None)
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: fake.capture != 0)
    monkeypatch.setattr(torch.Tensor, "record_stream", lambda self, stream: None)
    yield fake


class FakeChannel:
    """All ranks say what this one says."""

    rank, num_ranks = 0, NUM_RANKS

    def all_gather(self, record: bytes, **_how: Any) -> list[bytes]:
        return [record] * NUM_RANKS

    def gather_texts(self, text: str, **_how: Any) -> list[str]:
        return [text] * NUM_RANKS

    def all_agree(self, accepted: bool, **_how: Any) -> list[bool]:
        return [accepted] * NUM_RANKS


@pytest.fixture
def part(machine: FakeMachine) -> Iterator[IbgdaLowLatency]:
    facts = GroupFacts(
        rank=0,
        num_ranks=NUM_RANKS,
        ranks_per_node=NUM_RANKS,
        device=torch.device("cpu"),
        channel=FakeChannel(),  # type: ignore[arg-type]
    )
    opened = IbgdaLowLatency(facts, BufferOptions())
    yield opened
    opened.destroy()


def dispatch(part: IbgdaLowLatency, *, split: bool = False, **changes: Any) -> Any:
    arguments: dict[str, Any] = {
        "x": torch.zeros((3, HIDDEN), dtype=torch.bfloat16),
        "topk_idx": torch.zeros((3, NUM_TOPK), dtype=torch.int64),
        "max_tokens": MAX_TOKENS,
        "num_experts": NUM_EXPERTS,
        "split": split,
    }
    return part.dispatch(LowLatencyDispatchRequest(**(arguments | changes)))


def combine(part: IbgdaLowLatency, handle: tuple[Any, ...], *, split: bool = False, **changes: Any) -> Any:
    rows = (*handle[0].shape, HIDDEN)
    arguments: dict[str, Any] = {
        "x": torch.zeros(rows, dtype=torch.bfloat16),
        "topk_idx": torch.zeros((3, NUM_TOPK), dtype=torch.int64),
        "topk_weights": torch.zeros((3, NUM_TOPK)),
        "handle": handle,
        "split": split,
    }
    return part.combine(LowLatencyCombineRequest(**(arguments | changes)))


@pytest.mark.parametrize(
    ("cast", "scales"),
    [
        pytest.param({"use_fp8": False}, None, id="bf16"),
        pytest.param({}, ((2, 16, 2), torch.float32), id="fp8"),
        pytest.param({"use_ue8m0": True, "round_scale": True}, ((2, 16, 1), torch.int32), id="ue8m0"),
    ],
)
def test_outputs_have_the_shapes_and_strides_of_the_contract(
    part: IbgdaLowLatency, machine: FakeMachine, cast: dict[str, bool], scales: Any
) -> None:
    x = torch.zeros((3, 512 if "use_ue8m0" in cast else HIDDEN), dtype=torch.bfloat16)
    result = dispatch(part, x=x, **cast)
    assert result.recv_x.shape == (2, 16, x.shape[1]) and result.recv_count.shape == (2,)
    typed = LowLatencyHandle.from_tuple(result.handle)
    assert typed.src_info.shape == (2, 16) and typed.src_info.is_contiguous()
    assert typed.layout_range.shape == (2, NUM_RANKS) and typed.layout_range.dtype == torch.int64
    assert (result.recv_scales is None) == (scales is None)
    if scales is not None:
        shape, dtype = scales
        assert result.recv_scales.shape == shape and result.recv_scales.dtype == dtype
        assert result.recv_scales.stride(1) == 1 and result.recv_scales.stride(2) == 16
    assert machine.phases() == [("dispatch", 3)]


def test_rank_without_tokens_still_says_that_weights_travel(part: IbgdaLowLatency, machine: FakeMachine) -> None:
    nothing = {
        "x": torch.zeros((0, HIDDEN), dtype=torch.bfloat16),
        "topk_idx": torch.zeros((0, NUM_TOPK), dtype=torch.int64),
    }
    dispatch(part, **nothing, topk_weights=torch.zeros((0, NUM_TOPK)))
    dispatch(part, **nothing)
    assert [arguments["has_weights"] for _, arguments in machine.launches] == [True, False]


def test_split_operations_launch_each_half_with_the_same_memory(part: IbgdaLowLatency, machine: FakeMachine) -> None:
    sent = dispatch(part, split=True)
    sent.receive()
    sent.receive()
    back = combine(part, sent.handle, split=True)
    back.receive()
    assert machine.phases() == [("dispatch", 1), ("dispatch", 2), ("combine", 1), ("combine", 2)]
    for first, second in (machine.launches[:2], machine.launches[2:]):
        same = set(first[1]) - {"phases", "x", "topk_idx"}
        assert {name: first[1][name] for name in same} == {name: second[1][name] for name in same}
    assert machine.launches[0][1]["handle"] == machine.launches[2][1]["handle"] == sent.handle[0].data_ptr()
    assert machine.launches[2][1]["ticket"] != 0


def test_dropped_operations_are_received_into_nothing_by_the_next_call(
    part: IbgdaLowLatency, machine: FakeMachine
) -> None:
    sent = dispatch(part, split=True)
    handle = machine.launches[0][1]["handle"]
    del sent
    gc.collect()
    assert len(machine.launches) == 1, "something was enqueued by garbage collection"
    dispatch(part)
    assert machine.phases() == [("dispatch", 1), ("dispatch", 2), ("dispatch", 3)]
    discarding = machine.launches[1][1]
    assert discarding["handle"] == handle
    assert all(discarding[name] == 0 for name in ("recv_x", "recv_scales", "recv_count", "layout_range", "wait_stats"))


def test_hook_belongs_to_the_capture_of_its_call(part: IbgdaLowLatency, machine: FakeMachine) -> None:
    sent = dispatch(part, split=True)
    machine.capture = 5
    with pytest.raises(BufferStateError, match="hook"):
        sent.receive()
    machine.capture = 0
    sent.receive()
    assert machine.phases() == [("dispatch", 1), ("dispatch", 2)]


def test_dropped_operations_are_discarded_on_their_own_side_of_a_capture(
    part: IbgdaLowLatency, machine: FakeMachine, caplog: pytest.LogCaptureFixture
) -> None:
    dispatch(part, split=True)  # eager, dropped
    machine.capture = 6
    dispatch(part, split=True)  # captured, dropped
    machine.capture = 0
    combine(part, dispatch(part).handle)
    assert "hook is never called" in caplog.text
    assert [phases for _, phases in machine.phases()] == [1, 1, 2, 3, 3]
    assert machine.launches[0][1]["handle"] == machine.launches[2][1]["handle"]


def test_third_later_operation_behind_an_unreceived_one_is_refused(part: IbgdaLowLatency) -> None:
    sent = dispatch(part, split=True)
    handles = [dispatch(part).handle for _ in range(2)]
    with pytest.raises(BufferStateError, match="has not been received"):
        dispatch(part)
    combine(part, handles[0])
    sent.receive()
    dispatch(part)


def test_third_outstanding_operation_is_refused(part: IbgdaLowLatency) -> None:
    first, second = dispatch(part, split=True), dispatch(part, split=True)
    with pytest.raises(BufferStateError, match="2 operations on this buffer are outstanding"):
        dispatch(part)
    first.receive()
    second.receive()
    dispatch(part)


def test_operations_on_different_streams_are_chained_but_not_across_a_capture(
    part: IbgdaLowLatency, machine: FakeMachine
) -> None:
    waits: list[tuple[int, int]] = []

    class Stream(FakeStream):
        def wait_event(self, event: FakeEvent) -> None:
            waits.append((self.cuda_stream, machine.capture))

    for number, capture in ((1, 0), (1, 0), (2, 0), (3, 8), (4, 8), (5, 9), (2, 0), (1, 0)):
        machine.stream, machine.capture = Stream(number), capture
        dispatch(part)
    assert waits == [(2, 0), (4, 8), (1, 0)]


def test_window_grows_at_the_first_call_that_needs_more_but_not_in_a_capture(
    part: IbgdaLowLatency, machine: FakeMachine
) -> None:
    assert machine.window_sizes == [window.MIN_WINDOW_BYTES]
    wide = torch.zeros((3, 1 << 21), dtype=torch.bfloat16)
    machine.capture = 3
    with pytest.raises(BufferStateError, match="get_low_latency_rdma_size_hint"):
        dispatch(part, x=wide, use_fp8=False)
    machine.capture = 0
    dispatch(part, x=wide, use_fp8=False)
    dispatch(part, x=wide, use_fp8=False)
    dispatch(part)
    assert machine.window_sizes == [window.MIN_WINDOW_BYTES, 8 * (1 << 21) * 6]


@pytest.mark.parametrize("how", ["copied", "other-topk"])
def test_handles_without_their_memory_are_refused(part: IbgdaLowLatency, how: str) -> None:
    handle = dispatch(part).handle
    changes: dict[str, Any] = {}
    if how == "copied":
        handle = (handle[0].clone(), *handle[1:])
    else:
        changes = {"topk_idx": torch.zeros((3, 3), dtype=torch.int64), "topk_weights": torch.zeros((3, 3))}
    with pytest.raises(ArgumentError, match="Pass the handle as it was returned"):
        combine(part, handle, **changes)


def test_zero_copy_reads_the_buffer_of_its_handle(part: IbgdaLowLatency, machine: FakeMachine) -> None:
    handle = dispatch(part).handle
    with pytest.raises(ArgumentError, match="zero_copy without a buffer"):
        combine(part, handle, zero_copy=True)
    place = part.next_combine_buffer(handle)
    assert part.next_combine_buffer(handle) is place
    combine(part, handle, zero_copy=True)
    name, arguments = machine.launches[-1]
    assert name == "combine" and arguments["x"] == place.data_ptr() and arguments["row_stride"] == HIDDEN


@pytest.mark.parametrize(
    ("kind", "error", "says"),
    [
        ("timeout", PeerTimeoutError, "rank 0 waited 2.0 s for rank 1"),
        ("mismatch", PeersDisagreeError, "made calls that differ"),
        ("aborted", BufferStateError, "aborted"),
    ],
)
def test_error_record_is_raised_once_and_then_the_buffer_refuses(
    part: IbgdaLowLatency, machine: FakeMachine, kind: str, error: type[Exception], says: str
) -> None:
    sent = dispatch(part, split=True)
    machine.record = SimpleNamespace(
        kind=kind, op="dispatch", phase="row", rank=0, peer=1, epoch=4, seen=1, expected=2, elapsed_ns=2_000_000_000
    )
    with pytest.raises(error, match=says):
        dispatch(part)
    with pytest.raises(BufferStateError, match="failed before"):
        dispatch(part)
    machine.record = None
    part.reset()
    with pytest.raises(BufferStateError, match="reset after this call"):
        sent.receive()
    dispatch(part)


def test_use_after_destroy_is_refused(part: IbgdaLowLatency) -> None:
    sent = dispatch(part, split=True)
    part.destroy()
    part.destroy()
    with pytest.raises(BufferStateError, match="destroyed"):
        sent.receive()
    with pytest.raises(BufferStateError, match="destroyed"):
        dispatch(part)
