"""Ranks that talk pairwise over TCP: what ``enable_shrink`` needs, because any rank may be missing.

A collective of a whole group cannot go on without a rank that makes no call, and gloo closes every connection of a
group once one wait runs into its deadline. Here each pair of ranks has its own connection, so a rank that is gone costs
the others one deadline and nothing else.

Every message is a frame: who reads it knows from ``(sequence, number)`` to which exchange of which call it belongs.
Frames of earlier calls (of a rank that was late and masked, and is taken in again) are skipped. A rank that sat out
some calls finds its peers in a later call and continues with their number.

Peers are other processes of the same job on a private network. A connection is accepted only with the random token that
the ranks agreed on over their control channel; lengths and numbers in frames are checked before use.
"""

from __future__ import annotations

import contextlib
import os
import secrets
import selectors
import socket
import struct
import time
from collections import deque
from collections.abc import Mapping, Sequence

import torch

from deep_ep.backend import GroupFacts
from deep_ep.errors import (
    BackendUnavailableError,
    BufferStateError,
    PeerError,
    PeerLostError,
    PeerTimeoutError,
)
from deep_ep.topology import host_identity

from .session import PeerIsAheadError
from .transport import Step, Transport

_TOKEN_BYTES = 16
_ADDRESS = struct.Struct("<16s 64s i 16s")  # host identity, IP address, port, token
_HELLO = struct.Struct("<16s i")  # token, rank
_FRAME = struct.Struct("<I i q q")  # magic, number of the exchange, number of the call, payload bytes
_MAGIC = 0xDEE9_F4A3
_READ_BYTES = 1 << 20
_POLL_S = 0.02


class _Peer:
    """One connection: what has arrived, and what has yet to leave.

    Attributes:
        lost: why nothing more can come or go, or ``None``.
    """

    def __init__(self, rank: int, connection: socket.socket) -> None:
        connection.setblocking(False)
        connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        self.rank = rank
        self.connection = connection
        self.lost: str | None = None
        self._outgoing: deque[memoryview] = deque()
        self._unparsed = bytearray()
        self._frames: deque[tuple[int, int, bytes]] = deque()

    @property
    def has_unsent(self) -> bool:
        return self.lost is None and bool(self._outgoing)

    def queue(self, step: Step, payload: bytes | memoryview) -> None:
        """Send as the connection takes it."""
        self._outgoing.append(memoryview(_FRAME.pack(_MAGIC, step.number, step.sequence, len(payload))))
        if len(payload):
            self._outgoing.append(memoryview(payload))

    def take(self, step: Step) -> bytes | None:
        """The payload of this step, if it has come.

        Raises `PeerIsAheadError` if this step opens a call and the peer is in a later one, `PeerLostError` if the peer
        has gone on without this rank.
        """
        wanted = (step.sequence, step.number)
        while self._frames and self._frames[0][:2] < wanted:
            self._frames.popleft()
        if not self._frames:
            return None
        sequence, number, payload = self._frames[0]
        if (sequence, number) == wanted:
            self._frames.popleft()
            return payload
        if step.number == 0:
            raise PeerIsAheadError(sequence)
        raise PeerLostError(f"rank {self.rank} went on to another call", ranks=(self.rank,), phase=step.phase)

    def write(self) -> None:
        try:
            while self._outgoing:
                sent = self.connection.send(self._outgoing[0])
                if sent < len(self._outgoing[0]):
                    self._outgoing[0] = self._outgoing[0][sent:]
                    return
                self._outgoing.popleft()
        except BlockingIOError:
            return
        except OSError as error:
            self.lost = f"its connection broke ({error})"

    def read(self) -> None:
        try:
            arrived = self.connection.recv(_READ_BYTES)
        except BlockingIOError:
            return
        except OSError as error:
            self.lost = f"its connection broke ({error})"
            return
        if not arrived:
            self.lost = "it closed its connection"
            return
        self._unparsed += arrived
        while len(self._unparsed) >= _FRAME.size:
            magic, number, sequence, num_bytes = _FRAME.unpack_from(self._unparsed)
            if magic != _MAGIC or num_bytes < 0:
                self.lost = "it sent something that is not a frame"
                return
            end = _FRAME.size + num_bytes
            if len(self._unparsed) < end:
                return
            self._frames.append((sequence, number, bytes(self._unparsed[_FRAME.size : end])))
            del self._unparsed[:end]

    def close(self) -> None:
        with contextlib.suppress(OSError):
            self.connection.shutdown(socket.SHUT_WR)
        self.connection.close()


class MeshTransport(Transport):
    """A connection between each pair of ranks; rows travel through host memory."""

    def __init__(self, rank: int, connections: Mapping[int, socket.socket], timeout_s: float) -> None:
        self._rank = rank
        self._timeout_s = timeout_s
        self._is_aborted = False
        self._peers = {r: _Peer(r, connection) for r, connection in connections.items()}
        self._selector = selectors.DefaultSelector()
        for peer in self._peers.values():
            self._selector.register(peer.connection, selectors.EVENT_READ, peer)

    @property
    def description(self) -> str:
        return "TCP between each pair of ranks, through host memory"

    def gather(self, record: bytes, step: Step) -> dict[int, bytes]:
        records = self._exchange({r: record for r in step.ranks if r != self._rank}, step)
        for rank, received in records.items():
            if len(received) != len(record):
                raise PeerError(
                    f"{step.phase}: rank {rank} sent {len(received)} bytes, expected {len(record)}.",
                    ranks=(rank,),
                    phase=step.phase,
                )
        records[self._rank] = record
        return dict(sorted(records.items()))

    def all_to_all(
        self, rows: torch.Tensor, send_counts: Sequence[int], recv_counts: Sequence[int], step: Step
    ) -> dict[int, torch.Tensor]:
        parts = rows.contiguous().cpu().split(list(send_counts))
        payloads = {r: memoryview(parts[r].numpy()).cast("B") if parts[r].numel() else b"" for r in step.ranks}
        own = payloads.pop(self._rank)
        received: dict[int, bytes | memoryview] = {**self._exchange(payloads, step), self._rank: own}
        row_bytes = rows.shape[1]
        result = {}
        for rank in sorted(received):
            if len(received[rank]) % row_bytes:
                raise PeerError(
                    f"{step.phase}: rank {rank} sent {len(received[rank])} bytes, no multiple of a row's {row_bytes}.",
                    ranks=(rank,),
                    phase=step.phase,
                )
            payload = torch.frombuffer(bytearray(received[rank]), dtype=torch.uint8) if len(received[rank]) else None
            flat = payload if payload is not None else torch.empty(0, dtype=torch.uint8)
            result[rank] = flat.view(-1, row_bytes).to(rows.device)
        return result

    def _exchange(self, payloads: Mapping[int, bytes | memoryview], step: Step) -> dict[int, bytes]:
        """Send each peer its payload and get one from each: without those gone or late if the step is tolerant."""
        received: dict[int, bytes] = {}
        failed: dict[int, str] = {}
        for rank, payload in payloads.items():
            self._peers[rank].queue(step, payload)
        started = time.monotonic()
        while True:
            for rank in payloads.keys() - received.keys() - failed.keys():
                try:
                    arrived = self._peers[rank].take(step)
                except PeerLostError as error:
                    failed[rank] = str(error)
                    continue
                if arrived is not None:
                    received[rank] = arrived
                elif self._peers[rank].lost is not None:
                    failed[rank] = self._peers[rank].lost or ""
            if failed and not step.is_tolerant:
                raise PeerLostError(
                    f"{step.phase}: rank {self._rank} lost its peers: "
                    + ", ".join(f"rank {r}: {reason}" for r, reason in sorted(failed.items()))
                    + ". Destroy the buffer and build a new one without them.",
                    ranks=failed,
                    phase=step.phase,
                )
            late = [r for r in payloads.keys() - failed.keys() if r not in received or self._peers[r].has_unsent]
            if not late:
                return received
            waited = time.monotonic() - started
            if self._is_aborted:
                raise BufferStateError(
                    f"{step.phase}: rank {self._rank} gave up waiting because the buffer was aborted."
                )
            if waited > self._timeout_s:
                if step.is_tolerant:
                    return {r: payload for r, payload in received.items() if r not in late}
                raise PeerTimeoutError(
                    f"{step.phase}: rank {self._rank} waited {waited:.1f} s for ranks {sorted(late)}. Either they are "
                    "late (raise the deadline: DEEPEP_TIMEOUT_S), or they made no such call. Destroy this buffer and "
                    "build a new one.",
                    ranks=late,
                    phase=step.phase,
                    waited_s=waited,
                )
            self._pump(min(_POLL_S, max(0.0, self._timeout_s - waited)))

    def _pump(self, wait_s: float) -> None:
        """Move what can be moved; wait a moment for that if nothing can."""
        for peer in self._peers.values():
            if peer.lost is None:
                events = selectors.EVENT_READ | (selectors.EVENT_WRITE if peer.has_unsent else 0)
                self._selector.modify(peer.connection, events, peer)
        for key, events in self._selector.select(wait_s):
            peer = key.data
            if events & selectors.EVENT_WRITE:
                peer.write()
            if events & selectors.EVENT_READ and peer.lost is None:
                peer.read()
            if peer.lost is not None:
                self._selector.unregister(peer.connection)

    def abort(self) -> None:
        self._is_aborted = True

    def close(self) -> None:
        self._is_aborted = True
        self._selector.close()
        for peer in self._peers.values():
            peer.close()
        self._peers = {}


def open_mesh(facts: GroupFacts, *, timeout_s: float) -> MeshTransport:
    """Connect each pair of ranks. Collective. Raises `BackendUnavailableError` on every rank if any pair fails."""
    connections: dict[int, socket.socket] = {}
    listener: socket.socket | None = None
    problem = ""
    phase = "connecting the ranks pairwise"
    deadline = time.monotonic() + timeout_s
    token = secrets.token_bytes(_TOKEN_BYTES)
    record = bytes(_ADDRESS.size)
    try:
        is_one_host = len(set(facts.channel.all_gather(host_identity(), phase=phase, timeout_s=timeout_s))) == 1
        try:
            address = "127.0.0.1" if is_one_host else _own_address()
            listener = socket.create_server((address, 0), backlog=facts.num_ranks)
            port = listener.getsockname()[1]
            record = _ADDRESS.pack(host_identity(), address.encode(), port, token)
        except OSError as error:
            problem = f"rank {facts.rank} cannot listen for its peers ({error})"
        records = [_ADDRESS.unpack(r) for r in facts.channel.all_gather(record, phase=phase, timeout_s=timeout_s)]
        token = records[0][3]
        if not problem and listener is not None and all(port for _, _, port, _ in records):
            try:
                for rank in range(facts.rank):
                    _, ip, port, _ = records[rank]
                    connections[rank] = _connect(ip.rstrip(b"\0").decode(), port, token, facts.rank, deadline)
                while len(connections) < facts.num_ranks - 1:
                    rank, connection = _accept(listener, token, deadline)
                    if facts.rank < rank < facts.num_ranks and rank not in connections:
                        connections[rank] = connection
                    else:
                        connection.close()
            except OSError as error:
                problem = f"rank {facts.rank} cannot connect to all its peers ({error})"
        problems = [p for p in facts.channel.gather_texts(problem, phase=phase, timeout_s=timeout_s) if p]
        if problems:
            raise BackendUnavailableError(
                f"enable_shrink needs TCP connections between all ranks: {'; '.join(problems)}. Open the network "
                "between the hosts, or build the buffer without enable_shrink."
            )
    except BaseException:
        for connection in connections.values():
            connection.close()
        raise
    finally:
        if listener is not None:
            listener.close()
    return MeshTransport(facts.rank, connections, timeout_s)


def _own_address() -> str:
    """The IPv4 address by which other hosts reach this one: of the interface on the way to the job's master."""
    master = os.environ.get("MASTER_ADDR")
    if master:
        with contextlib.suppress(OSError), socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
            probe.connect((master, 1))  # sends nothing: the kernel only picks the interface
            return str(probe.getsockname()[0])
    return socket.gethostbyname(socket.gethostname())


def _remaining(deadline: float) -> float:
    return max(0.001, deadline - time.monotonic())


def _connect(address: str, port: int, token: bytes, rank: int, deadline: float) -> socket.socket:
    connection = socket.create_connection((address, port), timeout=_remaining(deadline))
    connection.sendall(_HELLO.pack(token, rank))
    return connection


def _accept(listener: socket.socket, token: bytes, deadline: float) -> tuple[int, socket.socket]:
    """The next connection that knows the token; others are closed."""
    while True:
        listener.settimeout(_remaining(deadline))
        connection, _ = listener.accept()
        connection.settimeout(_remaining(deadline))
        hello = b""
        with contextlib.suppress(OSError):
            while len(hello) < _HELLO.size and (part := connection.recv(_HELLO.size - len(hello))):
                hello += part
        if len(hello) == _HELLO.size:
            given, rank = _HELLO.unpack(hello)
            if secrets.compare_digest(given, token):
                return rank, connection
        connection.close()
