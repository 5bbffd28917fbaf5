"""Fixtures and markers for tests that run on several ranks.

Use it with ``pytest_plugins = ["deep_ep.testing.plugin"]`` in the top ``conftest.py``. It is not an automatic plugin,
because it imports torch.

Fixtures, both of the whole session: ``rank_pool``, eight ranks on the CPU; ``rank_pools``, pools of any kind by
`RankPools.get`. Marker: ``gpu(n)`` skips a test, or a class, where fewer than ``n`` GPUs are visible; with
``DEEPEP_TEST_SHARED_GPUS=1`` one is enough, and ranks share what there is: slowly, as their processes take turns.
"""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Iterator

import pytest
import torch

from deep_ep.launch import RankPool, preload

NUM_CPU_RANKS = 8
SHARED_GPUS = os.environ.get("DEEPEP_TEST_SHARED_GPUS") == "1"


class RankPools:
    """Pools that live as long as the session, one for each kind asked for."""

    def __init__(self) -> None:
        self._pools: dict[tuple[str, str | None, int], RankPool] = {}

    def get(self, device: str = "cpu", *, group_backend: str | None = None, num_ranks: int = 1) -> RankPool:
        """A pool of at least ``num_ranks`` ranks; on the CPU of at least eight, so that all tests share one."""
        size = max(num_ranks, NUM_CPU_RANKS) if device == "cpu" else num_ranks
        key = (device, group_backend, size)
        if key not in self._pools:
            self._pools[key] = RankPool(size, device=device, group_backend=group_backend)
        return self._pools[key]

    def close(self) -> None:
        for pool in self._pools.values():
            pool.close()
        self._pools.clear()


@pytest.fixture(scope="session")
def rank_pools() -> Iterator[RankPools]:
    pools = RankPools()
    yield pools
    pools.close()


@pytest.fixture(scope="session")
def rank_pool(rank_pools: RankPools) -> RankPool:
    return rank_pools.get("cpu")


def pytest_configure(config: pytest.Config) -> None:
    config.addinivalue_line("markers", "gpu(n=1): needs n GPUs in this machine")
    preload("deep_ep.testing.conformance", "hypothesis")


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    """One line for each reason to skip, instead of one for each skipped place."""
    reasons: Counter[str] = Counter()
    for report in terminalreporter.stats.get("skipped", []):
        reason = report.longrepr[2] if isinstance(report.longrepr, tuple) else str(report.longrepr)
        reasons[reason.removeprefix("Skipped: ")] += 1
    for reason, number in reasons.most_common():
        terminalreporter.write_line(f"skipped {number}: {reason}")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    found = torch.cuda.device_count()
    for item in items:
        needed = max((marker.args[0] if marker.args else 1 for marker in item.iter_markers("gpu")), default=0)
        if needed > found and not (SHARED_GPUS and found):
            item.add_marker(pytest.mark.skip(reason=f"needs {needed} GPUs, found {found}"))
