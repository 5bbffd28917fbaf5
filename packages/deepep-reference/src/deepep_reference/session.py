"""What the two modes of one buffer share: the number of the next call, the headers, faults, and masked ranks."""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
import torch

from deep_ep.backend import BufferOptions, GroupFacts, Operation
from deep_ep.errors import ArgumentError, BufferStateError, DeepEPError, PeerError, PeersDisagreeError
from deep_ep.headers import CallHeader, judge

from .transport import Step, Transport

_COUNT = np.dtype("<i8")
_TOLERANT: frozenset[Operation] = frozenset({"low_latency_dispatch", "low_latency_combine", "clean"})


class PeerIsAheadError(DeepEPError):
    """A peer is in a later call than this rank, which sat out some calls while it was masked."""

    def __init__(self, sequence: int) -> None:
        super().__init__(f"a peer is in call {sequence}")
        self.sequence = sequence


class Session:
    """One buffer's collective calls, one after the other.

    Attributes:
        facts, options: what the buffer was opened with.
        transport: how bytes move.
        masked: ranks left out of low-latency calls.
    """

    def __init__(self, facts: GroupFacts, options: BufferOptions, transport: Transport) -> None:
        self.facts = facts
        self.options = options
        self.transport = transport
        self.masked: set[int] = set()
        self._sequence = 0
        self._fault: str | None = None
        self._users = 0
        # Two threads may share a buffer; the exchanges of one call must not mix with those of another.
        self._lock = threading.RLock()

    # --- the calls --------------------------------------------------------------------------------------------------

    @contextlib.contextmanager
    def refusing(self, operation: Operation) -> Iterator[None]:
        """Check arguments inside, before the call's headers: what is refused here is told to the peers."""
        self.check_usable(operation)
        try:
            yield
        except (ArgumentError, BufferStateError) as error:
            self.refuse(operation, str(error))
            raise

    def refuse(self, operation: Operation, reason: str) -> None:
        """Take part in the header exchange of ``operation`` to say that this rank does not make the call."""
        # What peers say, and even that they are gone, is not this call's news: its caller raises its own error.
        with contextlib.suppress(DeepEPError):
            self.check_usable(operation)
            with self.call(operation, refusal=reason):
                pass

    @contextlib.contextmanager
    def call(self, operation: Operation, **fields: Any) -> Iterator[Call]:
        """Make a collective call: exchange headers, then do inside the block what the call does.

        With ``enable_shrink`` low-latency calls go on without ranks that are masked, gone or late, and mask those.

        Args:
            operation: which.
            fields: of this rank's `CallHeader`.

        Raises:
            PeersDisagreeError, PeerRefusedError: on every rank, before anything moved; the next call can succeed.
            PeerTimeoutError, PeerLostError: after these the session refuses further calls.
            BufferStateError: it does so now.
        """
        with self._lock:
            self.check_usable(operation)
            call = Call(self, operation, is_tolerant=self.options.enable_shrink and operation in _TOLERANT)
            with self._breaking():
                headers = call.exchange_headers(**fields)
            judge(list(headers.values()), ranks=list(headers))
            with self._breaking():
                yield call

    @contextlib.contextmanager
    def _breaking(self) -> Iterator[None]:
        """Whatever ends a call half-way breaks the session, but for errors that every rank raises alike."""
        try:
            yield
        except (ArgumentError, PeersDisagreeError):
            raise
        except BaseException as error:
            self._fault = (str(error).splitlines() or [type(error).__name__])[0]
            raise

    def take_sequence(self) -> int:
        """Number of the call that begins now."""
        self._sequence += 1
        return self._sequence - 1

    def catch_up(self, sequence: int) -> None:
        """Continue with the number of a peer's call."""
        self._sequence = sequence

    # --- state ------------------------------------------------------------------------------------------------------

    def check_usable(self, operation: str) -> None:
        """Raise `BufferStateError` if no call can be made now."""
        if self._fault is not None:
            raise BufferStateError(
                f"{operation}: this buffer broke in an earlier call ({self._fault}). Destroy it and build a new one."
            )
        if torch.cuda.is_available() and torch.cuda.is_current_stream_capturing():
            raise BufferStateError(
                f"{operation}: the reference backend waits on the host and cannot be captured in a CUDA graph. Use a "
                "backend whose capabilities say cuda_graphs."
            )

    def abort(self) -> None:
        """End every wait soon; no call succeeds from now on. Callable from another thread, hence takes no lock."""
        if self._fault is None:
            self._fault = "it was aborted"
        self.transport.abort()

    def acquire(self) -> None:
        """One more mode uses this session."""
        self._users += 1

    def release(self) -> None:
        """One mode is done; the last one closes the transport."""
        self._users -= 1
        if self._users == 0:
            self._fault = self._fault or "it was destroyed"
            self.transport.close()


class Call:
    """One collective call in progress."""

    def __init__(self, session: Session, operation: Operation, *, is_tolerant: bool) -> None:
        self._session = session
        self._operation = operation
        self._is_tolerant = is_tolerant
        self._num_steps = 0
        self._sequence = session.take_sequence()

    def exchange_headers(self, **fields: Any) -> dict[int, CallHeader]:
        """The header of every rank that takes part."""
        while True:
            header = CallHeader(operation=self._operation, sequence=self._sequence, **fields)
            self._num_steps = 0
            try:
                records = self._gather(header.pack(), "")
            except PeerIsAheadError as ahead:
                self._session.catch_up(ahead.sequence)
                self._sequence = self._session.take_sequence()
                continue
            return {rank: CallHeader.unpack(record) for rank, record in records.items()}

    def gather_counts(self, counts: Sequence[int], what: str = "counts") -> torch.Tensor:
        """Every rank's ``counts`` as int64 ``[N, len(counts)]`` on the CPU; zeros for ranks that do not take part.

        Raises `PeersDisagreeError` on every rank if any rank's counts are negative.
        """
        records = self._gather(np.asarray(counts, dtype=_COUNT).tobytes(), what)
        table = torch.zeros((self._session.facts.num_ranks, len(counts)), dtype=torch.int64)
        for rank, sent in records.items():
            table[rank] = torch.from_numpy(np.frombuffer(sent, dtype=_COUNT).astype(np.int64))
        wrong = (table < 0).any(dim=1).nonzero().flatten().tolist()
        if wrong:
            raise PeersDisagreeError(
                f"{self._operation}: negative {what} came from ranks {wrong}.", ranks=wrong, phase=self._operation
            )
        return table

    def all_to_all(
        self, rows: torch.Tensor, send_counts: Sequence[int], recv_counts: Sequence[int], what: str = "rows"
    ) -> tuple[torch.Tensor, list[int]]:
        """uint8 rows by source rank, and how many came from each: ``recv_counts`` but for ranks lost on the way."""
        by_rank = self._session.transport.all_to_all(rows, send_counts, recv_counts, self._step(what))
        self._mask_missing(by_rank)
        counts = [by_rank[r].shape[0] if r in by_rank else 0 for r in range(self._session.facts.num_ranks)]
        if any(got not in (expected, 0) for got, expected in zip(counts, recv_counts, strict=True)):
            raise PeerError(f"{self._operation}: {counts} rows came, announced were {list(recv_counts)}.")
        return torch.cat([by_rank[r] for r in sorted(by_rank)]), counts

    @property
    def ranks(self) -> tuple[int, ...]:
        """Who takes part, this rank included."""
        masked = self._session.masked if self._is_tolerant else ()
        return tuple(r for r in range(self._session.facts.num_ranks) if r not in masked)

    def _step(self, what: str) -> Step:
        self._num_steps += 1
        return Step(
            phase=f"{self._operation}: {what}" if what else self._operation,
            sequence=self._sequence,
            number=self._num_steps - 1,
            ranks=self.ranks,
            is_tolerant=self._is_tolerant,
        )

    def _gather(self, record: bytes, what: str) -> dict[int, bytes]:
        records = self._session.transport.gather(record, self._step(what))
        self._mask_missing(records)
        return records

    def _mask_missing(self, received: dict[int, Any]) -> None:
        self._session.masked.update(r for r in self.ranks if r not in received)
