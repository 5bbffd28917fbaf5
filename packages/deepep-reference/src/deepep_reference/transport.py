"""How bytes move between the ranks of a buffer: records of equal length to all, and rows from all to all.

Two transports for whole groups are here, one over a torch process group and one over an MPI communicator. Where ranks
may be missing (``enable_shrink``) the ranks talk pairwise instead: see `deepep_reference.mesh`.
"""

from __future__ import annotations

import time
from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
import torch.distributed as dist

from deep_ep.backend import GroupFacts
from deep_ep.channel import Channel, GroupChannel, has_cpu_backend, has_cuda_backend
from deep_ep.errors import BufferStateError, DeepEPError, PeerLostError, PeerTimeoutError

_POLL_S = 0.0002


@dataclass(frozen=True, kw_only=True)
class Step:
    """One exchange inside a collective call.

    Attributes:
        phase: for messages, for example ``"dispatch: counts"``.
        sequence: number of the call on this buffer.
        number: of the exchange inside the call; the header exchange is 0.
        ranks: who takes part, this rank included.
        is_tolerant: go on without ranks that are gone or late, instead of raising.
    """

    phase: str
    sequence: int
    number: int
    ranks: tuple[int, ...]
    is_tolerant: bool


class Transport(ABC):
    """Moves bytes between the ranks of one buffer. Every wait has a deadline and ends badly in a `PeerError`."""

    @property
    @abstractmethod
    def description(self) -> str:
        """The way that rows take, for people."""

    @abstractmethod
    def gather(self, record: bytes, step: Step) -> dict[int, bytes]:
        """Every rank's record. In a tolerant step the ranks that are gone or late are left out."""

    @abstractmethod
    def all_to_all(
        self, rows: torch.Tensor, send_counts: Sequence[int], recv_counts: Sequence[int], step: Step
    ) -> dict[int, torch.Tensor]:
        """uint8 rows from every rank, ordered by rank.

        Args:
            rows: ``[sum(send_counts), bytes]``, by destination rank.
            send_counts, recv_counts: ``N`` row counts, 0 for ranks that do not take part.

        Returns:
            For each source rank its rows, on the device of ``rows``. In a tolerant step the ranks that are gone or
            late are left out.
        """

    @abstractmethod
    def abort(self) -> None:
        """Make waits end soon. Callable from another thread."""

    @abstractmethod
    def close(self) -> None:
        """Release what this transport opened. Local, idempotent."""


class WholeGroupTransport(Transport):
    """Collectives of the whole group; headers and counts go over the buffer's control channel."""

    def __init__(self, channel: Channel, timeout_s: float) -> None:
        self.channel = channel
        self.timeout_s = timeout_s
        self.is_aborted = False

    def gather(self, record: bytes, step: Step) -> dict[int, bytes]:
        return dict(enumerate(self.channel.all_gather(record, phase=step.phase, timeout_s=self.timeout_s)))

    def all_to_all(
        self, rows: torch.Tensor, send_counts: Sequence[int], recv_counts: Sequence[int], step: Step
    ) -> dict[int, torch.Tensor]:
        received = self._exchange(rows, send_counts, recv_counts, step) if self.channel.num_ranks > 1 else rows
        return dict(enumerate(received.split(list(recv_counts))))

    @abstractmethod
    def _exchange(
        self, rows: torch.Tensor, send_counts: Sequence[int], recv_counts: Sequence[int], step: Step
    ) -> torch.Tensor: ...

    def abort(self) -> None:
        self.is_aborted = True
        self.channel.abort()

    def close(self) -> None:
        # The group and the communicator belong to the user.
        return


class GroupTransport(WholeGroupTransport):
    """`torch.distributed.all_to_all_single`: gloo for CPU tensors, NCCL for CUDA tensors where the group has it.

    A group that moves only one kind of tensors gets rows of the other kind through a copy.
    """

    def __init__(self, channel: GroupChannel, timeout_s: float) -> None:
        super().__init__(channel, timeout_s)
        self.group_channel = channel
        self.group: dist.ProcessGroup = channel.group
        self._moves_cpu = has_cpu_backend(self.group)
        self._moves_cuda = has_cuda_backend(self.group)

    @property
    def description(self) -> str:
        ways = (["cpu tensors directly"] if self._moves_cpu else []) + (
            ["cuda tensors directly"] if self._moves_cuda else []
        )
        return f"torch.distributed all_to_all ({', '.join(ways)})"

    def _device_for(self, device: torch.device) -> torch.device:
        if device.type == "cuda":
            return device if self._moves_cuda else torch.device("cpu")
        return device if self._moves_cpu else torch.device("cuda", torch.cuda.current_device())

    def _exchange(
        self, rows: torch.Tensor, send_counts: Sequence[int], recv_counts: Sequence[int], step: Step
    ) -> torch.Tensor:
        sent = rows.contiguous().to(self._device_for(rows.device))
        received = torch.empty((sum(recv_counts), rows.shape[1]), dtype=torch.uint8, device=sent.device)
        try:
            work = dist.all_to_all_single(
                received, sent, list(recv_counts), list(send_counts), group=self.group, async_op=True
            )
            self.group_channel.wait(work, phase=step.phase, timeout_s=self.timeout_s)
        except DeepEPError:
            raise
        except RuntimeError as error:
            first_line = (str(error).splitlines() or [type(error).__name__])[0]
            raise PeerLostError(
                f"{step.phase}: the exchange of rows broke on rank {self.channel.rank}: {first_line}. A peer's process "
                "has ended or its connection closed. Destroy the buffer and the group, and start again without it.",
                phase=step.phase,
            ) from error
        return received.to(rows.device)


class MpiTransport(WholeGroupTransport):
    """`Ialltoallv` of an mpi4py communicator, through host memory."""

    def __init__(self, channel: Channel, comm: Any, timeout_s: float) -> None:
        super().__init__(channel, timeout_s)
        self.comm = comm

    @property
    def description(self) -> str:
        return "MPI Ialltoallv through host memory"

    def _exchange(
        self, rows: torch.Tensor, send_counts: Sequence[int], recv_counts: Sequence[int], step: Step
    ) -> torch.Tensor:
        row_bytes = rows.shape[1]
        sent = rows.contiguous().cpu().numpy()
        received = np.empty((sum(recv_counts), row_bytes), dtype=np.uint8)
        request = self.comm.Ialltoallv(
            [sent, [count * row_bytes for count in send_counts]],
            [received, [count * row_bytes for count in recv_counts]],
        )
        started = time.monotonic()
        while not request.Test():
            waited = time.monotonic() - started
            if self.is_aborted:
                raise BufferStateError(f"{step.phase}: gave up waiting because the buffer was aborted.")
            if waited > self.timeout_s:
                raise PeerTimeoutError(
                    f"{step.phase}: rank {self.channel.rank} waited {waited:.1f} s for the rows of its peers. Destroy "
                    "this buffer and build a new one.",
                    phase=step.phase,
                    waited_s=waited,
                )
            time.sleep(0.0 if waited < 0.002 else _POLL_S)
        return torch.from_numpy(received).to(rows.device)


def open_whole_group(facts: GroupFacts, *, timeout_s: float) -> WholeGroupTransport:
    """The transport for the group or communicator that the buffer was built on."""
    if facts.comm is not None:
        return MpiTransport(facts.channel, facts.comm, timeout_s)
    channel = facts.channel if isinstance(facts.channel, GroupChannel) else GroupChannel(facts.group)
    return GroupTransport(channel, timeout_s)
