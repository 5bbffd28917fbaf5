"""The control channel between the ranks of a buffer: fixed-layout byte records, never pickled objects.

It carries what has to be agreed before data moves: bootstrap facts, call headers, counts. Two implementations, one
over a torch process group (gloo, NCCL or both) and one over an mpi4py communicator.
"""

from __future__ import annotations

import time
from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
import torch.distributed as dist

from .errors import BufferStateError, PeerLostError, PeerTimeoutError

_POLL_S = 0.0002
_PUBLISH_AFTER_S = 1.0


class Channel(ABC):
    """Exchanges byte records of equal length between all ranks.

    Attributes:
        rank, num_ranks: of this process in the group.
    """

    rank: int
    num_ranks: int
    _is_aborted = False

    def abort(self) -> None:
        """Local, idempotent, callable from another thread: waits end with `BufferStateError`, now and from now on."""
        self._is_aborted = True

    def _check_aborted(self, phase: str) -> None:
        if self._is_aborted:
            raise BufferStateError(f"{phase}: rank {self.rank} gave up waiting because the buffer was aborted.")

    @abstractmethod
    def all_gather(self, record: bytes, *, phase: str, timeout_s: float) -> list[bytes]:
        """Every rank's record, by rank. Collective; all records have the same length.

        Releases the GIL while it waits. Raises `PeerTimeoutError` naming the ranks that did not come, or
        `PeerLostError`.
        """

    def all_agree(self, accepted: bool, *, phase: str, timeout_s: float) -> list[bool]:
        """Every rank's yes or no, by rank. Collective."""
        return [r == b"\1" for r in self.all_gather(b"\1" if accepted else b"\0", phase=phase, timeout_s=timeout_s)]

    def gather_texts(self, text: str, *, phase: str, timeout_s: float, max_bytes: int = 1024) -> list[str]:
        """Every rank's text (cut to ``max_bytes`` of UTF-8), by rank. Collective."""
        record = text.encode()[:max_bytes].ljust(max_bytes, b"\0")
        gathered = self.all_gather(record, phase=phase, timeout_s=timeout_s)
        return [r.rstrip(b"\0").decode(errors="replace") for r in gathered]


class GroupChannel(Channel):
    """Records over a torch process group: on its CPU backend if it has one, else through device tensors."""

    def __init__(self, group: dist.ProcessGroup) -> None:
        self.group = group
        self.rank = dist.get_rank(group)
        self.num_ranks = dist.get_world_size(group)
        self._device = torch.device("cpu") if has_cpu_backend(group) else torch.device("cuda")
        self._store = _store_of(group)
        self._num_waits = 0

    def all_gather(self, record: bytes, *, phase: str, timeout_s: float) -> list[bytes]:
        if self.num_ranks == 1:
            return [record]
        sent = torch.frombuffer(bytearray(record), dtype=torch.uint8).to(self._device)
        gathered = torch.empty((self.num_ranks, sent.numel()), dtype=torch.uint8, device=self._device)
        started = time.monotonic()
        try:
            work = dist.all_gather(list(gathered.unbind(0)), sent, group=self.group, async_op=True)
            self.wait(work, phase=phase, timeout_s=timeout_s)
        except (PeerTimeoutError, PeerLostError, BufferStateError):
            raise
        except RuntimeError as error:
            raise PeerLostError(
                f"{phase}: the exchange with the other ranks broke on rank {self.rank} after "
                f"{time.monotonic() - started:.1f} s: {_first_line(error)}. A peer's process has ended or its "
                "connection "
                "closed. Destroy the buffer and the group, and start again without it.",
                phase=phase,
            ) from error
        return [bytes(row) for row in gathered.cpu().numpy()]

    def wait(self, work: Any, *, phase: str, timeout_s: float) -> None:
        """Wait for a collective with a deadline; on time-out say which ranks are not in it.

        A wait longer than a second is published in the group's store, so that whoever runs into its deadline can tell
        the ranks that wait like itself from those that never came.
        """
        self._num_waits += 1
        started = time.monotonic()
        published = False
        while not work.is_completed():
            self._check_aborted(phase)
            waited = time.monotonic() - started
            if not published and waited > min(_PUBLISH_AFTER_S, timeout_s / 4):
                self._publish()
                published = True
            if waited > timeout_s:
                raise self._timeout(phase, waited)
            # The first moments are polled closely: most waits end there, and sleeping costs more than it saves.
            time.sleep(0.0 if waited < 0.002 else _POLL_S)
        work.wait()
        if self._device.type == "cuda":
            torch.cuda.current_stream().synchronize()

    def _key(self, rank: int) -> str:
        return f"deep_ep/waiting/{self._num_waits}/{rank}"

    def _publish(self) -> None:
        if self._store is not None:
            self._store.set(self._key(self.rank), "1")

    def _timeout(self, phase: str, waited: float) -> PeerTimeoutError:
        others = [r for r in range(self.num_ranks) if r != self.rank]
        missing: list[int] = []
        if self._store is not None:
            try:
                missing = [r for r in others if not self._store.check([self._key(r)])]
            except RuntimeError:
                missing = []
        who = f"rank{'s' if len(missing) != 1 else ''} {', '.join(map(str, missing))}" if missing else "its peers"
        return PeerTimeoutError(
            f"{phase}: rank {self.rank} waited {waited:.1f} s for {who}. Either they are late (raise the deadline: "
            "DEEPEP_TIMEOUT_S), or they made no such call. Destroy this buffer and build a new one.",
            ranks=missing,
            phase=phase,
            waited_s=waited,
        )


class MpiChannel(Channel):
    """Records over an mpi4py communicator."""

    def __init__(self, comm: Any) -> None:
        self.comm = comm
        self.rank = int(comm.Get_rank())
        self.num_ranks = int(comm.Get_size())

    def all_gather(self, record: bytes, *, phase: str, timeout_s: float) -> list[bytes]:
        sent = np.frombuffer(record, dtype=np.uint8)
        gathered = np.empty((self.num_ranks, sent.size), dtype=np.uint8)
        request = self.comm.Iallgather(sent, gathered)
        started = time.monotonic()
        while not request.Test():
            self._check_aborted(phase)
            waited = time.monotonic() - started
            if waited > timeout_s:
                raise PeerTimeoutError(
                    f"{phase}: rank {self.rank} waited {waited:.1f} s for its peers. Destroy this buffer.",
                    phase=phase,
                    waited_s=waited,
                )
            time.sleep(0.0 if waited < 0.002 else _POLL_S)
        return [bytes(row) for row in gathered]


def open_channel(group: dist.ProcessGroup | None, comm: Any) -> Channel:
    """The channel for the group or the communicator that a buffer was built on; exactly one of them is given."""
    return GroupChannel(group) if group is not None else MpiChannel(comm)


def has_cpu_backend(group: dist.ProcessGroup) -> bool:
    """Whether the group moves CPU tensors."""
    return _has_backend(group, "cpu")


def has_cuda_backend(group: dist.ProcessGroup) -> bool:
    """Whether the group moves CUDA tensors without staging them through the host (NCCL)."""
    config = _backend_config(group)
    return config.get("cuda", "") == "nccl"


def _has_backend(group: dist.ProcessGroup, device: str) -> bool:
    return device in _backend_config(group)


def _backend_config(group: dist.ProcessGroup) -> dict[str, str]:
    """``{"cpu": "gloo", "cuda": "nccl"}`` and the like."""
    config = dist.get_backend_config(group)
    pairs: Sequence[str] = config.split(",")
    if all(":" in pair for pair in pairs):
        return dict(pair.split(":", 1) for pair in pairs)
    return {"nccl": {"cuda": "nccl"}, "gloo": {"cpu": "gloo", "cuda": "gloo"}}.get(config, {"cpu": config})


def _store_of(group: dist.ProcessGroup) -> Any:
    """The group's key-value store, if this torch shows it; only error messages depend on it."""
    try:
        from torch.distributed.distributed_c10d import _get_process_group_store

        return _get_process_group_store(group)
    except (ImportError, KeyError, ValueError, RuntimeError):
        return None


def _first_line(error: BaseException) -> str:
    return (str(error).splitlines() or [type(error).__name__])[0][:200]
