"""Handing file descriptors of shareable memory from process to process on one host.

Each rank listens on a Unix socket in the abstract namespace (nothing is left behind in the file system, whatever kills
a process), under a random 128-bit name that travels over the control channel together with a secret. A connection is
served only if it comes from the same user and shows the secret. Descriptors travel as SCM_RIGHTS.
"""

from __future__ import annotations

import contextlib
import os
import secrets
import socket
import struct
import time
from collections.abc import Collection

from .channel import Channel
from .errors import BackendUnavailableError, PeerLostError, PeerTimeoutError

_HELLO = struct.Struct("<16sq")
_CREDENTIALS = struct.Struct("3i")


def exchange_descriptors(
    channel: Channel, descriptor: int, *, phase: str, timeout_s: float, among: Collection[int] | None = None
) -> list[int]:
    """Give ``descriptor`` to the other ranks of this host and receive theirs. Collective.

    Args:
        descriptor: stays open and stays the caller's.
        among: the ranks of this host, on all of which it is the same; ``None``: all ranks are on one host.

    Returns:
        One descriptor per rank, to be closed by the caller; -1 at this rank's own place and for ranks elsewhere.

    Raises:
        PeerTimeoutError, PeerLostError: a rank did not do its part; descriptors received so far are closed.
        BackendUnavailableError: ranks run in different network namespaces and cannot reach each other's sockets.
    """
    name, secret = secrets.token_bytes(16), secrets.token_bytes(16)
    received = [-1] * channel.num_ranks
    deadline = time.monotonic() + timeout_s
    try:
        with contextlib.ExitStack() as stack:
            server = stack.enter_context(socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET))
            server.bind(b"\0deep_ep-" + name.hex().encode())
            server.listen(channel.num_ranks)
            tickets = channel.all_gather(name + secret, phase=phase, timeout_s=timeout_s)
            others = [r for r in (range(channel.num_ranks) if among is None else sorted(among)) if r != channel.rank]
            links: dict[int, socket.socket] = {}
            for rank in others:
                link = stack.enter_context(socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET))
                link.settimeout(_left(deadline, phase, rank))
                # The peer listens already: it did so before its ticket went out. The backlog holds every rank.
                link.connect(b"\0deep_ep-" + tickets[rank][:16].hex().encode())
                link.send(_HELLO.pack(tickets[rank][16:], channel.rank))
                links[rank] = link
            waiting = set(others)
            while waiting:
                server.settimeout(_left(deadline, phase, min(waiting)))
                connection, _ = server.accept()
                with connection:
                    connection.settimeout(_left(deadline, phase, min(waiting)))
                    rank = _authenticate(connection, secret)
                    if rank in waiting:
                        socket.send_fds(connection, [b"m"], [descriptor])
                        waiting.discard(rank)
            for rank, link in links.items():
                link.settimeout(_left(deadline, phase, rank))
                _, descriptors, _, _ = socket.recv_fds(link, 1, 1)
                if len(descriptors) != 1:
                    raise PeerLostError(f"{phase}: rank {rank} closed before it shared its memory.", ranks=[rank])
                received[rank] = descriptors[0]
    except ConnectionRefusedError as error:
        close_descriptors(received)
        raise BackendUnavailableError(
            f"{phase}: rank {channel.rank} cannot reach another rank's socket on this host ({error}). Ranks of a node "
            "have to share a network namespace: run them in one container."
        ) from error
    except TimeoutError as error:
        close_descriptors(received)
        if isinstance(error, PeerTimeoutError):
            raise
        raise PeerTimeoutError(
            f"{phase}: rank {channel.rank} waited {timeout_s:.0f} s for a rank to share its memory.",
            phase=phase,
            waited_s=timeout_s,
        ) from error
    except BaseException:
        close_descriptors(received)
        raise
    return received


def close_descriptors(descriptors: list[int]) -> None:
    """Close those that are open."""
    for descriptor in descriptors:
        if descriptor >= 0:
            os.close(descriptor)


def _authenticate(connection: socket.socket, secret: bytes) -> int:
    """The rank at the other end, or -1 if it is not one of ours."""
    raw = connection.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, _CREDENTIALS.size)
    _, uid, _ = _CREDENTIALS.unpack(raw)
    hello = connection.recv(_HELLO.size)
    if uid != os.getuid() or len(hello) != _HELLO.size:
        return -1
    shown, rank = _HELLO.unpack(hello)
    return int(rank) if secrets.compare_digest(shown, secret) else -1


def _left(deadline: float, phase: str, rank: int) -> float:
    left = deadline - time.monotonic()
    if left <= 0:
        raise PeerTimeoutError(f"{phase}: rank {rank} did not share its memory in time.", ranks=[rank], phase=phase)
    return left
