"""Every error the library raises on purpose, under one base.

Wording, everywhere: what was given, what is accepted, where, and the next step. The layer that recognises an error
words it; the layers above pass it on with its cause.

Sources of trouble are different classes: the caller (`ArgumentError`, `SettingError`), the installation
(`BackendNotFoundError`, `BackendUnavailableError`), the other ranks (`PeerError` and below), and the life of the
buffer itself (`BufferStateError`).
"""

from __future__ import annotations

from collections.abc import Iterable


class DeepEPError(RuntimeError):
    """Base of all errors of this library. A `RuntimeError`, because that is what V1's clients catch."""


class ArgumentError(DeepEPError, ValueError):
    """The caller gave something that the call does not accept. Nothing has changed; the buffer serves the next call."""


class SettingError(DeepEPError, ValueError):
    """An environment variable or a configuration file holds a value that is not accepted."""


class BackendNotFoundError(DeepEPError, LookupError):
    """No backend of that name is installed."""


class BackendUnavailableError(DeepEPError):
    """The backend is installed but cannot serve this group; the text names the missing condition and its cure."""


class BufferStateError(DeepEPError):
    """The buffer cannot take this call now: destroyed, broken by an earlier fault, or too many operations in flight."""


class PeerError(DeepEPError):
    """Something is wrong with other ranks.

    Attributes:
        ranks: the ranks concerned, ascending; empty when they could not be told apart.
        phase: what was being done, for example ``"dispatch"``.
    """

    def __init__(self, message: str, *, ranks: Iterable[int] = (), phase: str = "") -> None:
        super().__init__(message)
        self.ranks: tuple[int, ...] = tuple(sorted(ranks))
        self.phase = phase


class PeersDisagreeError(PeerError):
    """Ranks made different calls, or the same call with arguments that have to agree. The same text on every rank."""


class PeerRefusedError(PeerError):
    """Another rank refused its own arguments, so this collective call did not take place on any rank."""


class PeerLostError(PeerError):
    """Another rank is gone: its connection closed or its process ended."""


class PeerTimeoutError(PeerError, TimeoutError):
    """Another rank did not do its part within the deadline.

    Attributes:
        waited_s: how long this rank waited, in seconds.
    """

    def __init__(self, message: str, *, ranks: Iterable[int] = (), phase: str = "", waited_s: float = 0.0) -> None:
        super().__init__(message, ranks=ranks, phase=phase)
        self.waited_s = waited_s
