"""The Python side is tested on machines without CUDA's compiler too: from the tree, where it is not installed.

The fixture ``machine`` stands in for GPU, streams and native extension, which is replaced by its stub file: its
signatures refuse any call that it does not declare.
"""

from __future__ import annotations

import contextlib
import importlib.util
import sys
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from deep_ep.headers import CallHeader

TESTS = Path(__file__).resolve().parent
if importlib.util.find_spec("deepep_nvshmem") is None:
    sys.path.insert(0, str(TESTS.parent / "src"))
# For normal_on_gpus, which ranks have to find too.
sys.path.append(str(TESTS))


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

    def __init__(self, num_ranks: int, num_experts: int) -> None:
        self.log: list[str] = []
        self.calls: list[tuple[str, dict[str, Any]]] = []
        self.caller, self.own = FakeStream(self, "caller", 5), FakeStream(self, "own", 99)
        self.current = self.caller
        self.num_ranks, self.num_experts = num_ranks, num_experts
        self.is_capturing = False
        self.num_rows = 4
        self.num_forward_rows = 3
        self.has_counts = True
        self.mismatch_mask = 0
        self.refusal = ""  # of the other rank
        self.heap_is_full = False
        self.is_symmetric = True
        self.record: Any = None  # what `error` returns
        self.extension: Any = None

    def of(self, name: str) -> list[dict[str, Any]]:
        return [arguments for called, arguments in self.calls if called == name]

    @property
    def channel(self) -> Any:
        return FakeChannel(self)


class FakeChannel:
    """The other ranks agree with this one, but for the refusal that rank 1 has."""

    rank = 0

    def __init__(self, machine: FakeMachine) -> None:
        self._machine, self.num_ranks = machine, machine.num_ranks

    def all_gather(self, record: bytes, *, phase: str, **_how: Any) -> list[bytes]:
        if phase != "dispatch":
            return [record] * self.num_ranks
        theirs = CallHeader(operation="dispatch", sequence=0, refusal=self._machine.refusal)
        return [record, theirs.pack()]

    def all_agree(self, accepted: bool, *, phase: str, **_how: Any) -> list[bool]:
        self._machine.log.append(f"all agree in {phase}")
        return [accepted] * self.num_ranks

    def gather_texts(self, text: str, **_how: Any) -> list[str]:
        return [text] * self.num_ranks


class FakeArena:
    def __init__(self, machine: FakeMachine) -> None:
        self._machine = machine
        self.num_bytes, self.num_free_bytes, self.arena_ptrs = 1 << 20, 0, [4096] * machine.num_ranks

    @contextlib.contextmanager
    def allocate_here(self) -> Iterator[None]:
        if self._machine.heap_is_full:
            raise torch.OutOfMemoryError("the heap is full")
        yield

    def empty_lasting(self, shape: Any, *, dtype: torch.dtype, device: torch.device) -> torch.Tensor:
        self._machine.calls.append(("empty_lasting", {"shape": tuple(shape)}))
        return torch.empty(shape, dtype=dtype, device=device)

    def close(self) -> None:
        pass


def _extension_of(machine: FakeMachine, stub: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    """The extension as its stub declares it; calls are noted, and answered as the machine says."""
    names: dict[str, Any] = {}
    exec(compile(stub.read_text(), str(stub), "exec"), names)
    extension = SimpleNamespace(**names)

    def fits(*, ticket: int, least_rows: int, capacity: int, **others: Any) -> Any:
        has_room = least_rows <= machine.num_rows <= capacity
        has_room &= machine.num_forward_rows <= others.get("forward_capacity", machine.num_forward_rows)
        is_launched = ticket == 0 or (machine.has_counts and not machine.mismatch_mask and has_room)
        if "forward_capacity" in others:
            return is_launched
        return "in_place" if is_launched else None

    def wait_counts(ticket: int, timeout_s: float) -> Any:
        if not machine.has_counts:
            return None
        return SimpleNamespace(
            num_recv_tokens=machine.num_rows,
            num_forward_rows=machine.num_forward_rows,
            num_recv_tokens_per_expert=[machine.num_rows] * (machine.num_experts // machine.num_ranks),
            mismatch_mask=machine.mismatch_mask,
            bad_count_mask=0,
        )

    answers: dict[str, Any] = {"dispatch": fits, "wait_counts": wait_counts}
    answers |= dict.fromkeys(("layout", "notify", "refuse", "combine", "reset", "close"), lambda **_arguments: None)
    for name, answer in answers.items():
        declared = getattr(extension.Runtime, name)

        def call(
            self: Any, *arguments: Any, name: str = name, declared: Any = declared, answer: Any = answer, **named: Any
        ) -> Any:
            declared(self, *arguments, **named)  # raises TypeError for a call that the stub does not declare
            machine.calls.append((name, named))
            if "stream" in named:
                machine.log.append(name)
            return answer(*arguments, **named)

        monkeypatch.setattr(extension.Runtime, name, call)
    monkeypatch.setattr(extension.Runtime, "window_bytes", staticmethod(lambda **_sizes: 1 << 20))
    monkeypatch.setattr(extension.Runtime, "error", lambda self: machine.record)
    monkeypatch.setattr(extension.Runtime, "clear_error", lambda self: setattr(machine, "record", None))
    monkeypatch.setattr(extension.Runtime, "is_symmetric", lambda self, address, num_bytes: machine.is_symmetric)
    return extension


@pytest.fixture
def machine(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> FakeMachine:
    """Fakes in both backends; the test's module says ``EXTENSION``, ``NUM_RANKS`` and ``NUM_EXPERTS``."""
    from deepep_nvshmem import base, internode, normal

    fake = FakeMachine(request.module.NUM_RANKS, request.module.NUM_EXPERTS)
    stub = Path(base.__file__).with_name(f"{request.module.EXTENSION}.pyi")
    fake.extension = _extension_of(fake, stub, monkeypatch)
    for module in (normal, internode):
        monkeypatch.setattr(module, "load_extension", lambda: fake.extension)
        monkeypatch.setattr(module, "SymmetricArena", lambda *_what, **_how: FakeArena(fake))
    monkeypatch.setattr(internode, "load_internode_extension", lambda: fake.extension)
    monkeypatch.setattr(base.KernelNormal, "_on_cuda", lambda self, tensor, call: None)
    monkeypatch.setattr(torch.cuda, "Stream", lambda *args, **how: fake.own)
    monkeypatch.setattr(torch.cuda, "Event", FakeEvent)
    monkeypatch.setattr(torch.cuda, "current_stream", lambda device=None: fake.current)
    monkeypatch.setattr(torch.cuda, "set_stream", lambda stream: setattr(fake, "current", stream))
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: fake.is_capturing)
    return fake
