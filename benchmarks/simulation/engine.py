"""Time, and things that serve one request after the other. Times are microseconds, amounts bytes or SM microseconds."""

from __future__ import annotations

import heapq
from collections import deque
from collections.abc import Callable
from typing import Any


class Clock:
    """Runs what was asked for in the order of its time; of equal times in the order of asking."""

    def __init__(self) -> None:
        self.now = 0.0
        self._queue: list[tuple[float, int, Callable[..., None], tuple[Any, ...]]] = []
        self._num_asked = 0

    def at(self, time: float, call: Callable[..., None], *arguments: Any) -> None:
        self._num_asked += 1
        heapq.heappush(self._queue, (time, self._num_asked, call, arguments))

    def run(self) -> None:
        queue, pop = self._queue, heapq.heappop
        while queue:
            self.now, _, call, arguments = pop(queue)
            call(*arguments)


class Server:
    """A link's direction or an SM: serves amounts in the order in which they come, at one rate."""

    __slots__ = ("_free_at", "_per_unit", "served")

    def __init__(self, rate: float) -> None:
        self._per_unit = 1.0 / rate
        self._free_at = 0.0
        self.served = 0.0

    def serve(self, now: float, amount: float) -> float:
        """When the last of ``amount``, offered from ``now`` on, is through."""
        self.served += amount
        begin = now if now > self._free_at else self._free_at  # called for every row: max() is slower
        self._free_at = free_at = begin + amount * self._per_unit
        return free_at

    @property
    def busy_us(self) -> float:
        return self.served * self._per_unit


class Warps:
    """The warps of one role in one block, and what waits for one of them."""

    __slots__ = ("_num_idle", "_otherwise", "_waiting", "_work")

    def __init__(self, num_warps: int, work: Callable[..., None], otherwise: Callable[[], bool] | None = None) -> None:
        """``otherwise``: what a warp begins if nothing waits; false if there is nothing to begin."""
        self._num_idle = num_warps
        self._work = work
        self._otherwise = otherwise
        self._waiting: deque[tuple[Any, ...]] = deque()

    def want(self, *arguments: Any) -> None:
        """``arguments`` can be worked on; starts at once if a warp is idle."""
        if self._num_idle:
            self._num_idle -= 1
            self._work(*arguments)
        else:
            self._waiting.append(arguments)

    def release(self) -> None:
        """One warp is done with what it worked on."""
        if self._waiting:
            self._work(*self._waiting.popleft())
        elif self._otherwise is None or not self._otherwise():
            self._num_idle += 1

    def begin(self) -> None:
        """All idle warps look for something to do."""
        while self._num_idle and self._otherwise is not None and self._otherwise():
            self._num_idle -= 1
