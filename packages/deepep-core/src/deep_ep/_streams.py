"""Ordering of streams around a backend's call, and what keeps tensors alive until their stream is done with them."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from types import TracebackType
from typing import Any

import torch

from .backend import LowLatencyBackend, NormalBackend, Operation
from .errors import ArgumentError
from .events import EventHandle, EventOverlap, StreamOrder

Hook = Callable[[], None]


class Checked:
    """Check arguments inside: a refusal is told to the peers, which already wait in the same call."""

    __slots__ = ("_operation", "_part")

    def __init__(self, part: NormalBackend | LowLatencyBackend, operation: Operation) -> None:
        self._part = part
        self._operation = operation

    def __enter__(self) -> None:
        return

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        if isinstance(error, ArgumentError):
            self._part.refuse(self._operation, str(error))


def check_overlap(
    where: str, previous_event: Any, async_finish: bool, allocate_on_comm_stream: bool, hook: bool = False
) -> None:
    """Raise `ArgumentError` for stream arguments that contradict one another."""
    if previous_event is not None and not hasattr(previous_event, "current_stream_wait"):
        raise ArgumentError(
            f"{where}: previous_event is a {type(previous_event).__name__}; it has to be an EventOverlap or None."
        )
    if allocate_on_comm_stream and not (async_finish and event_of(previous_event) is not None):
        raise ArgumentError(
            f"{where}: allocate_on_comm_stream needs async_finish=True and a previous_event that holds an event."
        )
    if async_finish and hook:
        raise ArgumentError(f"{where}: async_finish and return_recv_hook exclude each other.")


class CallStreams:
    """The streams of one call: its caller's, and the backend's, on which the call runs: ``with streams: ...``.

    The two are looked up and ordered once for each call, because on the host that is a good part of what a call costs.

    Attributes:
        output: the caller's stream, if the backend should allocate outputs there and order the streams itself; it then
            stays current. Memory of the caller's stream is the cheapest, but the backend's stream has to wait for that
            stream. A caller who named an event instead wants the two to overlap: outputs then come from the backend's.
    """

    __slots__ = ("_caller", "_event", "_order", "_own", "output")

    def __init__(
        self,
        own: torch.cuda.Stream | None,
        order: StreamOrder,
        previous_event: Any = None,
        *,
        backend_orders_outputs: bool = False,
    ) -> None:
        """Look at the current stream.

        Args:
            own: the backend's stream; ``None`` if there is nothing to order.
            order: this thread's and this buffer's.
            previous_event: what the call waits for instead of the caller's stream.
            backend_orders_outputs: `NormalBackend.orders_output_stream`.
        """
        self._own = own
        self._order = order
        self._event = event_of(previous_event)
        self._caller = torch.cuda.current_stream(own.device_index) if own is not None else None
        self.output = self._caller if backend_orders_outputs and self._event is None else None

    def __enter__(self) -> None:
        if self._own is None or self._caller is None or self.output is not None:
            return
        if self._event is not None:
            self._event.stream_wait(self._own)
        else:
            self._order.wait(self._own, self._caller)
        torch.cuda.set_stream(self._own)

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        if self._caller is not None and self.output is None:
            torch.cuda.set_stream(self._caller)

    def finish(
        self,
        async_finish: bool,
        inputs: Iterable[torch.Tensor | None],
        outputs: Iterable[torch.Tensor | None],
        *,
        is_on_output_stream: bool = False,
    ) -> EventOverlap:
        """Order the caller's stream, or the user's later wait, behind the call, and keep memory from early reuse.

        Outputs were allocated on the backend's stream, or on the caller's (``is_on_output_stream``), and are used on
        both. After a synchronous call the caller's stream waits, so what belongs to it needs no record.
        """
        own, caller = self._own, self._caller
        if own is None or caller is None:
            return EventOverlap(EventHandle()) if async_finish else EventOverlap(None)
        if not is_on_output_stream:
            _record(outputs, caller)
        if not async_finish:
            self._order.wait(caller, own)
            return EventOverlap(None)
        _record(inputs, own)
        if is_on_output_stream:
            _record(outputs, own)
        return EventOverlap(EventHandle(own))


def own_stream(part: NormalBackend, x: Any) -> torch.cuda.Stream | None:
    """The backend's stream for a call on ``x`` (rows, or rows and scales), ``None`` where all is done on the CPU."""
    rows = x[0] if isinstance(x, (tuple, list)) and x else x
    return part.comm_stream if getattr(rows, "is_cuda", False) else None


def event_of(previous_event: Any) -> Any:
    """The event inside an `EventOverlap`; a bare `EventHandle` is taken too."""
    return getattr(previous_event, "event", previous_event) if previous_event is not None else None


def _record(tensors: Iterable[torch.Tensor | None], stream: torch.cuda.Stream) -> None:
    for tensor in tensors:
        if tensor is not None and tensor.is_cuda:
            tensor.record_stream(stream)


def run_once(receive: Callable[[], None], on_cuda: bool, alive: tuple[Any, ...]) -> Hook:
    """The user's hook: runs ``receive`` once, on the stream that is current now, whoever calls it from wherever."""
    stream = torch.cuda.current_stream() if on_cuda else None
    # Inference mode belongs to a thread too, and tensors made in it can be written in it only.
    is_inference = torch.is_inference_mode_enabled()
    done = False

    def hook() -> None:
        nonlocal done, alive
        if done:
            return
        done = True
        with torch.cuda.stream(stream), torch.inference_mode(is_inference):
            receive()
        alive = ()

    return hook
