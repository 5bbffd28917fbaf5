"""What the conformance classes share: how they find ranks, and how a rank builds the buffer under test."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, ClassVar

import pytest
import torch

from deep_ep import BackendNotFoundError, Buffer, EventOverlap, registry
from deep_ep.backend import Backend, Capabilities, LowLatencyReduce, Mode
from deep_ep.launch import RankContext

Run = Callable[..., list[Any]]

MAX_TOKENS = 12
"""Most tokens of a rank in the suite's cases, where a case does not say otherwise."""


@dataclass(frozen=True, kw_only=True)
class Setup:
    """The backend under test, in a form that travels to the ranks.

    Attributes:
        backend: its name.
        modes: the modes it serves.
        ranks_per_node: size of virtual nodes, or ``None`` for one node.
    """

    backend: str
    modes: frozenset[Mode]
    ranks_per_node: int | None = None

    def buffer(
        self,
        context: RankContext,
        *,
        low_latency: bool = False,
        ll_reduce: LowLatencyReduce = "rank",
        timeout_s: float = 60.0,
        **options: Any,
    ) -> Buffer:
        """A buffer whose modes are served by the backend under test where it can. Collective."""
        if low_latency:
            options.setdefault("num_rdma_bytes", 1 << 20)
        options.setdefault("num_nvl_bytes", 1 << 20)
        buffer = Buffer(
            context.group,
            low_latency_mode=low_latency,
            backend={mode: self.backend for mode in self.modes if low_latency or mode == "normal"},
            ll_reduce=ll_reduce,
            timeout_s=timeout_s,
            **options,
        )
        wanted = {mode for mode in self.modes if low_latency or mode == "normal"}
        assert all(buffer.backends[mode] == self.backend for mode in wanted)
        return buffer


class Conformance:
    """Base of the conformance classes; a backend's tests set these.

    Attributes:
        backend: name of the backend under test. Required.
        device: ``"cpu"`` or ``"cuda"``.
        group_backend: as for `deep_ep.launch.RankPool`; ``"gloo"`` lets several ranks share one GPU.
        rank_counts: numbers of ranks to run with.
        ranks_per_node: run everything on virtual nodes of this size; counts it does not divide are left out.
    """

    backend: ClassVar[str]
    device: ClassVar[str] = "cpu"
    group_backend: ClassVar[str | None] = None
    rank_counts: ClassVar[tuple[int, ...]] = (1, 2, 3, 4, 8)
    ranks_per_node: ClassVar[int | None] = None
    mode: ClassVar[Mode | None] = None

    @classmethod
    def capabilities(cls) -> Capabilities:
        return cls._class().capabilities

    @classmethod
    def _class(cls) -> type[Backend]:
        return registry.load(cls.backend)

    @classmethod
    def usable_rank_counts(cls) -> tuple[int, ...]:
        """``rank_counts`` without those that the backend's limits or ``ranks_per_node`` rule out."""
        try:
            most = cls.capabilities().max_ranks
        except BackendNotFoundError:  # the tests are collected, and skipped with that reason
            most = None
        return tuple(
            n
            for n in cls.rank_counts
            if (most is None or n <= most) and (cls.ranks_per_node is None or n % cls.ranks_per_node == 0)
        )

    def pytest_generate_tests(self, metafunc: pytest.Metafunc) -> None:
        if "num_ranks" in metafunc.fixturenames:
            least = getattr(metafunc.function, "least_ranks", 1)
            counts = [n for n in self.usable_rank_counts() if n >= least]
            if counts:
                ids = [f"{n}-rank{'s' if n > 1 else ''}" for n in counts]
                metafunc.parametrize("num_ranks", counts, ids=ids)
            else:
                why = f"needs {least} ranks; backend {self.backend!r} is tested with {self.usable_rank_counts()}"
                metafunc.parametrize("num_ranks", [pytest.param(least, marks=pytest.mark.skip(reason=why))])

    @pytest.fixture
    def setup(self) -> Setup:
        try:
            can = self.capabilities()
        except BackendNotFoundError as error:
            pytest.skip(str(error))
        if self.mode is not None and self.mode not in can.modes:
            pytest.skip(f"backend {self.backend!r} does not serve {self.mode} mode")
        if self.device not in can.devices:
            pytest.skip(
                f"backend {self.backend!r} takes {' and '.join(sorted(can.devices))} tensors, not {self.device}"
            )
        if self.device == "cuda" and not torch.cuda.is_available():
            pytest.skip("needs a GPU, found none")
        found = registry.obstacles(self._class(), registry.local_environment())
        if found:
            pytest.skip(f"backend {self.backend!r} cannot serve here: {'; '.join(map(str, found))}")
        return Setup(backend=self.backend, modes=can.modes, ranks_per_node=self.ranks_per_node)

    @pytest.fixture
    def run(self, request: pytest.FixtureRequest, setup: Setup) -> Run:
        """``run(function, *args, num_ranks=n)``: call ``function(context, setup, *args)`` on every rank."""
        pools = request.getfixturevalue("rank_pools")

        def run(function: Callable[..., Any], *args: Any, num_ranks: int, **keywords: Any) -> list[Any]:
            pool = pools.get(self.device, group_backend=self.group_backend, num_ranks=max(self.usable_rank_counts()))
            return pool.run(function, setup, *args, num_ranks=num_ranks, environment=environment_of(setup), **keywords)

        return run


def environment_of(setup: Setup) -> dict[str, str | None]:
    """Settings of the user's environment must not change what is tested."""
    nodes = str(setup.ranks_per_node) if setup.ranks_per_node is not None else None
    return {
        "DEEPEP_BACKEND": None,
        "DEEPEP_CONFIG": None,
        "DEEPEP_LL_REDUCE": None,
        "DEEPEP_LOW_LATENCY_SMS": None,
        "DEEPEP_RDMA_PROVIDER": None,
        "DEEPEP_TIMEOUT_S": None,
        "DEEPEP_RANKS_PER_NODE": nodes,
    }


def at_least(num_ranks: int) -> Callable[[Callable[..., None]], Callable[..., None]]:
    """Mark a test that needs peers."""

    def mark(function: Callable[..., None]) -> Callable[..., None]:
        function.least_ranks = num_ranks  # type: ignore[attr-defined]
        return function

    return mark


def wait_for(event: EventOverlap, *, is_async: bool) -> None:
    """A synchronous call returns an event object without an event, an asynchronous one has it; wait for it."""
    if is_async:
        assert event.event is not None, "an asynchronous call returned no event"
        event.current_stream_wait()
    else:
        assert event.event is None, "a synchronous call returned an event"
