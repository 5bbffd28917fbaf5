"""Split low-latency operations: sent, but not yet received. For backends."""

from __future__ import annotations

import threading
import weakref
from collections import deque
from collections.abc import Callable

from .errors import BufferStateError

MAX_OUTSTANDING = 2


class Outstanding:
    """Counts the operations whose ``receive`` has neither run nor been dropped."""

    def __init__(self) -> None:
        self._open: set[int] = set()
        self._dropped: deque[tuple[int, Callable[[], bool]]] = deque()
        self._num_begun = 0
        # Garbage collection may end an operation in the middle of any statement here, on the same thread.
        self._lock = threading.RLock()

    def check_room(self, operation: str) -> None:
        """Finish what was dropped; raise `BufferStateError` if two operations are outstanding then."""
        if self._dropped:
            self.finish_dropped()
        with self._lock:
            if len(self._open) >= MAX_OUTSTANDING:
                raise BufferStateError(
                    f"{operation}: {len(self._open)} operations on this buffer are outstanding, the most it holds. "
                    "Call the hook of one of them (or drop it) first."
                )

    def begin(self, complete: Callable[[], None], discard: Callable[[], bool] | None = None) -> Receive:
        """A new outstanding operation.

        Args:
            complete: ends it.
            discard: ends it where nobody wants its results, if that takes work. Called by the next `finish_dropped`
                after the user dropped the operation (at that moment itself, which garbage collection chooses, nothing
                may be enqueued); returns whether it could, and is called again if not.
        """
        with self._lock:
            number = self._num_begun
            self._num_begun += 1
            self._open.add(number)
        return Receive(complete, self, number, discard)

    def finish_dropped(self) -> None:
        """Do what dropped operations still need, as far as that can be done now."""
        for _ in range(len(self._dropped)):
            number, discard = self._dropped.popleft()
            if discard():
                self._end(number)
            else:
                self._dropped.append((number, discard))

    def _drop(self, number: int, discard: Callable[[], bool] | None) -> None:
        if discard is None:
            self._end(number)
        else:
            self._dropped.append((number, discard))

    def _end(self, number: int) -> None:
        with self._lock:
            self._open.discard(number)


class Receive:
    """Completes a split operation when called, once. Forgetting it uncalled ends the operation too."""

    def __init__(
        self,
        complete: Callable[[], None],
        outstanding: Outstanding,
        number: int,
        discard: Callable[[], bool] | None,
    ) -> None:
        self._complete: Callable[[], None] | None = complete
        self._outstanding, self._number = outstanding, number
        self._finalizer = weakref.finalize(self, outstanding._drop, number, discard)
        self._finalizer.atexit = False

    def __call__(self) -> None:
        complete, self._complete = self._complete, None
        if complete is None:
            return
        try:
            complete()
        except BaseException:
            self._complete = complete  # it is outstanding still
            raise
        self._finalizer.detach()
        self._outstanding._end(self._number)
