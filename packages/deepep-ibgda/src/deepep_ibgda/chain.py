"""Operations of one buffer follow one another, whichever streams they go to: their kernels share sequence numbers."""

from __future__ import annotations

from typing import Any

import torch


class Chain:
    """Orders each operation behind the one before it, by events.

    What is captured into a graph is ordered inside that capture only. How a graph's replays follow other calls is the
    user's affair, as with any work on several streams.
    """

    def __init__(self, extension: Any, device_index: int) -> None:
        self._capture_id = extension.capture_id
        self._device_index = device_index
        # The last operation outside of captures, and the last inside of one: where it went, and a point behind it.
        self._eager: tuple[int, torch.cuda.Event] | None = None
        self._captured: tuple[int, torch.cuda.Event, int] | None = None

    def current_stream(self) -> torch.cuda.Stream:
        return torch.cuda.current_stream(self._device_index)

    def capture_of(self, stream: torch.cuda.Stream) -> int:
        """A number for the capture that the stream is in, 0 for none."""
        capture: int = self._capture_id(stream=stream.cuda_stream)
        return capture

    def enter(self, stream: torch.cuda.Stream) -> int:
        """Let ``stream`` wait for the operation before; returns what `leave` wants to know."""
        handle = stream.cuda_stream
        capture: int = self._capture_id(stream=handle)
        if capture == 0:
            if self._eager is not None and self._eager[0] != handle:
                stream.wait_event(self._eager[1])
        elif self._captured is not None and self._captured[0] != handle and self._captured[2] == capture:
            stream.wait_event(self._captured[1])
        return capture

    def leave(self, stream: torch.cuda.Stream, capture: int) -> None:
        """The operation has been enqueued."""
        if capture == 0:
            event = self._eager[1] if self._eager is not None else torch.cuda.Event()
            event.record(stream)
            self._eager = (stream.cuda_stream, event)
        else:
            event = torch.cuda.Event()
            event.record(stream)
            self._captured = (stream.cuda_stream, event, capture)

    def synchronize(self) -> None:
        """Let the host wait for every operation that was enqueued outside of captures."""
        if self._eager is not None:
            self._eager[1].synchronize()
