"""Ordering of streams around a backend's call, and what keeps tensors alive until their stream is done with them."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import torch

from .backend import LowLatencyBackend, NormalBackend, Operation
from .errors import ArgumentError
from .events import EventHandle, EventOverlap, use_stream

Hook = Callable[[], None]


@contextlib.contextmanager
def checked(part: NormalBackend | LowLatencyBackend, operation: Operation) -> Iterator[None]:
    """Check arguments inside: a refusal is told to the peers, which already wait in the same call."""
    try:
        yield
    except ArgumentError as error:
        part.refuse(operation, str(error))
        raise


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


@contextlib.contextmanager
def behind(stream: torch.cuda.Stream | None, previous_event: Any) -> Iterator[None]:
    """Make ``stream`` current, ordered behind ``previous_event``, or behind the current stream without one."""
    if stream is None:
        yield
        return
    event = event_of(previous_event)
    if event is not None:
        event.stream_wait(stream)
    else:
        stream.wait_stream(torch.cuda.current_stream(stream.device_index))
    with use_stream(stream):
        yield


def finish(
    stream: torch.cuda.Stream | None,
    async_finish: bool,
    inputs: Iterable[torch.Tensor | None],
    outputs: Iterable[torch.Tensor | None],
    *,
    is_on_output_stream: bool = False,
) -> EventOverlap:
    """Order the current stream, or the user's later wait, behind ``stream``, and keep memory from early reuse.

    Outputs were allocated on ``stream``, or on the current one (``is_on_output_stream``), and are used on both. After a
    synchronous call the current stream waits, so what belongs to it needs no record.
    """
    if stream is None:
        return EventOverlap(EventHandle()) if async_finish else EventOverlap(None)
    current = torch.cuda.current_stream(stream.device_index)
    if not is_on_output_stream:
        for tensor in outputs:
            if tensor is not None and tensor.is_cuda:
                tensor.record_stream(current)
    if not async_finish:
        current.wait_stream(stream)
        return EventOverlap(None)
    for used in (*inputs, *(outputs if is_on_output_stream else ())):
        if used is not None and used.is_cuda:
            used.record_stream(stream)
    return EventOverlap(EventHandle(stream))


def output_stream_for(x: Any, previous_event: Any, allocate_on_comm_stream: bool) -> torch.cuda.Stream | None:
    """Where a backend should allocate the outputs of a call on ``x`` (rows, or rows and scales).

    Memory of the current stream is the cheapest, but then the communication stream has to wait for that stream. A
    caller who named an event instead wants the two to overlap: outputs then come from the communication stream.
    """
    rows = x[0] if isinstance(x, (tuple, list)) and x else x
    if allocate_on_comm_stream or event_of(previous_event) is not None or not getattr(rows, "is_cuda", False):
        return None
    return torch.cuda.current_stream(rows.device.index)


def event_of(previous_event: Any) -> Any:
    """The event inside an `EventOverlap`; a bare `EventHandle` is taken too."""
    return getattr(previous_event, "event", previous_event) if previous_event is not None else None


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
