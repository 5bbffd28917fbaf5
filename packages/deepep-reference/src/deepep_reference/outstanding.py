"""Split low-latency operations: sent, but not yet received."""

from __future__ import annotations

import threading
import weakref
from collections.abc import Callable

from deep_ep.errors import BufferStateError

MAX_OUTSTANDING = 2


class Outstanding:
    """Counts the operations whose ``receive`` has neither run nor been dropped."""

    def __init__(self) -> None:
        self._open: set[int] = set()
        self._num_begun = 0
        self._lock = threading.Lock()

    def check_room(self, operation: str) -> None:
        """Raise `BufferStateError` if two operations are outstanding already."""
        with self._lock:
            if len(self._open) >= MAX_OUTSTANDING:
                raise BufferStateError(
                    f"{operation}: {len(self._open)} operations on this buffer are outstanding, the most it holds. "
                    "Call the hook of one of them (or drop it) first."
                )

    def begin(self, complete: Callable[[], None]) -> Receive:
        """A new outstanding operation, which ``complete`` ends."""
        with self._lock:
            number = self._num_begun
            self._num_begun += 1
            self._open.add(number)
        return Receive(complete, self, number)

    def end(self, number: int) -> None:
        with self._lock:
            self._open.discard(number)


class Receive:
    """Completes a split operation when called, once. Forgetting it uncalled ends the operation too."""

    def __init__(self, complete: Callable[[], None], outstanding: Outstanding, number: int) -> None:
        self._complete: Callable[[], None] | None = complete
        self._end = weakref.finalize(self, outstanding.end, number)
        self._end.atexit = False

    def __call__(self) -> None:
        complete, self._complete = self._complete, None
        if complete is not None:
            complete()
            self._end()
