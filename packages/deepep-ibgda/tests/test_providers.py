"""The memory of a window and its software NIC, with an extension that only takes notes."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from deep_ep import BackendUnavailableError
from deep_ep.backend import BufferOptions, GroupFacts
from deepep_ibgda import providers
from deepep_ibgda.reach import Reach

NUM_RANKS = 4
FAR = (False, False, True, True)


class FakeNativeError(RuntimeError):
    pass


class Channel:
    """Every rank says what this one says."""

    def all_gather(self, record: bytes, **_how: Any) -> list[bytes]:
        return [record] * NUM_RANKS

    def gather_texts(self, text: str, **_how: Any) -> list[str]:
        return [text] * NUM_RANKS


class Extension:
    """Notes what it is asked for, in order."""

    NativeError = FakeNativeError

    def __init__(self, *, broken: str = "", missing: tuple[tuple[int, int], ...] = (), is_drained: bool = True) -> None:
        self.notes: list[str] = []
        self.broken, self.missing, self.is_drained = broken, missing, is_drained
        self.num_bytes = 0
        extension = self

        class SoftwareNic:
            view_ptr = 0xABC

            def __init__(self, *, arena_ptrs: list[int], is_remote: list[bool], **_more: Any) -> None:
                assert 0 not in arena_ptrs and is_remote == list(FAR)
                if extension.broken == "nic":
                    raise FakeNativeError("no threads left")
                extension.notes.append("nic")

            def start(self) -> None:
                extension.notes.append("start")

            def stop(self) -> None:
                extension.notes.append("stop")

            def reset(self) -> None:
                extension.notes.append("reset")

            def close(self) -> None:
                extension.notes.append("close nic")

            def drain(self, *, timeout_s: float) -> bool:
                extension.notes.append("drain")
                return extension.is_drained

        self.SoftwareNic = SoftwareNic

    def post_probe(self, *, arena_ptr: int, view_ptr: int, **_more: Any) -> str:
        assert (arena_ptr, view_ptr) == (1000, 0xABC)
        self.notes.append("probe")
        return "the ring is full" if self.broken == "probe" else ""

    def missing_of_probe(self, **_more: Any) -> list[tuple[int, int]]:
        return list(self.missing)


@pytest.fixture(autouse=True)
def arenas(monkeypatch: pytest.MonkeyPatch) -> None:
    class Arena:
        def __init__(self, extension: Extension, _facts: Any, *, num_bytes: int, **_how: Any) -> None:
            self.extension = extension
            self.num_bytes, self.base, self.arena_ptrs = num_bytes, 1000, [1000, 2000, 3000, 4000]

        def close(self) -> None:
            self.extension.notes.append("close arena")

    monkeypatch.setattr(providers, "MappedArena", Arena)
    monkeypatch.delenv("CUDA_DEVICE_MAX_CONNECTIONS", raising=False)


def opened(extension: Extension, provider: str) -> providers.Provider:
    facts = GroupFacts(
        rank=0,
        num_ranks=NUM_RANKS,
        ranks_per_node=2,
        device=torch.device("cuda", 0),
        channel=Channel(),  # type: ignore[arg-type]
    )
    is_remote = FAR if provider else (False,) * NUM_RANKS
    found = Reach(host_ranks=tuple(range(4)), is_remote=is_remote, provider=provider, num_window_bytes=0)
    return providers.open_provider(extension, facts, BufferOptions(), found, num_bytes=1 << 20)


def test_one_node_has_no_queue_pairs() -> None:
    extension = Extension()
    found = opened(extension, "")
    assert found.arena_ptrs == [1000, 2000, 3000, 4000] and found.view_ptr == 0 and extension.notes == []
    found.finish_requests()
    found.close()
    assert extension.notes == ["close arena"]


def test_software_nic_hides_remote_arenas_from_kernels_and_is_probed_before_use() -> None:
    extension = Extension()
    found = opened(extension, "software")
    assert found.arena_ptrs == [1000, 2000, 0, 0] and found.view_ptr == 0xABC and found.own_ptr == 1000
    assert extension.notes == ["nic", "start", "probe"]


def test_software_nic_serves_what_was_posted_before_it_stops(caplog: pytest.LogCaptureFixture) -> None:
    extension = Extension(is_drained=False)
    found = opened(extension, "software")
    found.finish_requests()
    found.close()
    notes = extension.notes
    assert notes.index("drain") < notes.index("stop") < notes.index("close nic") < notes.index("close arena")
    assert "before it had executed every request" in caplog.text


@pytest.mark.parametrize(
    ("extension", "says"),
    [
        pytest.param(Extension(broken="nic"), "could not start the software NIC: no threads left", id="no-thread"),
        pytest.param(Extension(broken="probe"), "could not send by RDMA: the ring is full", id="no-room"),
        pytest.param(Extension(missing=((2, 0), (3, 0))), "what rank 2, 3 sent to rank 0", id="lost"),
    ],
)
def test_trouble_is_told_on_every_rank_and_everything_is_released(extension: Extension, says: str) -> None:
    with pytest.raises(BackendUnavailableError, match=says):
        opened(extension, "software")
    assert extension.notes[-1] == "close arena"
    assert ("close nic" in extension.notes) == (extension.broken != "nic")


def test_one_hardware_queue_is_too_few_for_the_software_nic(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CUDA_DEVICE_MAX_CONNECTIONS", "1")
    with pytest.raises(BackendUnavailableError, match="CUDA_DEVICE_MAX_CONNECTIONS"):
        opened(Extension(), "software")
    assert opened(Extension(), "").view_ptr == 0
