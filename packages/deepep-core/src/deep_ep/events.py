"""`EventHandle` and `EventOverlap`: points in a stream that later work can wait for.

Where there is no CUDA device all work is done when a call returns, so an event is complete from the start.
"""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Iterator
from types import TracebackType
from typing import Any

import torch


@contextlib.contextmanager
def use_stream(stream: torch.cuda.Stream) -> Iterator[None]:
    """Make a stream of the current device current.

    Does what ``torch.cuda.stream`` does for the one case that is needed here, without asking several times which device
    is current: a call on a buffer changes streams often enough for that to show.
    """
    previous = torch.cuda.current_stream(stream.device_index)
    torch.cuda.set_stream(stream)
    try:
        yield
    finally:
        torch.cuda.set_stream(previous)


class StreamOrder(threading.local):
    """Lets one stream of a device wait for another, again and again, by one event for each thread.

    A wait holds what was recorded last when it was enqueued, so the event may be recorded anew at once. Making a new
    event every time costs the host more than the recording and the wait together.
    """

    def __init__(self) -> None:
        self._event: torch.cuda.Event | None = None

    def wait(self, waiting: torch.cuda.Stream, awaited: torch.cuda.Stream) -> None:
        """Let ``waiting`` wait for everything that ``awaited`` was given up to now. The host does not wait."""
        event = self._event
        if event is None:
            event = self._event = torch.cuda.Event()
        event.record(awaited)
        event.wait(waiting)


class EventHandle:
    """A point in the current CUDA stream, recorded when the object is made."""

    def __init__(self, stream: torch.cuda.Stream | None = None) -> None:
        self._event: torch.cuda.Event | None = None
        if stream is not None or torch.cuda.is_available():
            self._event = torch.cuda.Event()
            self._event.record(stream if stream is not None else torch.cuda.current_stream())

    def current_stream_wait(self) -> None:
        """Let the current stream wait for this point. The host does not wait."""
        if self._event is not None:
            torch.cuda.current_stream().wait_event(self._event)

    def stream_wait(self, stream: torch.cuda.Stream | None) -> None:
        """Let ``stream`` wait for this point; nothing to do for ``None``."""
        if self._event is not None and stream is not None:
            stream.wait_event(self._event)

    def query(self) -> bool:
        """Whether the point has been reached."""
        return self._event is None or self._event.query()


class EventOverlap:
    """What asynchronous calls return: an event, and the tensors that must live until it is reached.

    Also a context manager: on leaving the block the current stream waits for the event::

        event = buffer.dispatch(..., async_finish=True)[-1]
        with event:
            work_that_overlaps()

    Attributes:
        event: the point to wait for; ``None`` after a synchronous call.
        extra_tensors: kept alive as long as this object.
    """

    def __init__(self, event: Any = None, extra_tensors: tuple[torch.Tensor, ...] | None = None) -> None:
        self.event = event
        self.extra_tensors = extra_tensors

    def current_stream_wait(self) -> None:
        """Let the current stream wait for the event, which must be there."""
        assert self.event is not None, "this EventOverlap holds no event: the call that returned it was synchronous"
        self.event.current_stream_wait()

    def __enter__(self) -> EventOverlap:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, traceback: TracebackType | None
    ) -> None:
        if self.event is not None:
            self.event.current_stream_wait()
