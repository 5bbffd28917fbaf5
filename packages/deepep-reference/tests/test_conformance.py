"""The reference backend passes the shared suite, on one node and on virtual nodes."""

from __future__ import annotations

from deep_ep.testing.conformance import (
    ErrorConformance,
    LifecycleConformance,
    LowLatencyConformance,
    NormalModeConformance,
)


class TestNormalMode(NormalModeConformance):
    backend = "reference"


class TestNormalModeOnNodesOfTwo(NormalModeConformance):
    backend = "reference"
    rank_counts = (4, 8)
    ranks_per_node = 2


class TestNormalModeOnNodesOfOne(NormalModeConformance):
    backend = "reference"
    rank_counts = (3,)
    ranks_per_node = 1


class TestLowLatencyMode(LowLatencyConformance):
    backend = "reference"


class TestErrors(ErrorConformance):
    backend = "reference"
    rank_counts = (2, 3)


class TestLifecycle(LifecycleConformance):
    backend = "reference"
    rank_counts = (1, 3)
