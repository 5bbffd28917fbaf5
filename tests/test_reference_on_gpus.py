"""The reference backend on CUDA tensors: the same suite, over NCCL and, several ranks to a GPU, over gloo."""

from __future__ import annotations

import pytest

from deep_ep.testing.conformance import (
    ErrorConformance,
    LifecycleConformance,
    LowLatencyConformance,
    NormalModeConformance,
)


@pytest.mark.gpu(1)
class TestNormalModeOnASharedGpu(NormalModeConformance):
    """NCCL refuses to share a GPU between ranks; gloo goes through the host."""

    backend = "reference"
    device = "cuda"
    group_backend = "gloo"
    rank_counts = (1, 3)


@pytest.mark.gpu(1)
class TestLowLatencyModeOnASharedGpu(LowLatencyConformance):
    backend = "reference"
    device = "cuda"
    group_backend = "gloo"
    rank_counts = (1, 3)


@pytest.mark.gpu(2)
class TestNormalModeOverNccl(NormalModeConformance):
    backend = "reference"
    device = "cuda"
    rank_counts = (2,)


@pytest.mark.gpu(4)
class TestNormalModeOverNcclOnNodesOfTwo(NormalModeConformance):
    backend = "reference"
    device = "cuda"
    rank_counts = (4,)
    ranks_per_node = 2


@pytest.mark.gpu(2)
class TestLowLatencyModeOverNccl(LowLatencyConformance):
    backend = "reference"
    device = "cuda"
    rank_counts = (2,)


@pytest.mark.gpu(2)
class TestLifecycleOverNccl(LifecycleConformance):
    backend = "reference"
    device = "cuda"
    rank_counts = (2,)


@pytest.mark.gpu(2)
class TestErrorsOverNccl(ErrorConformance):
    backend = "reference"
    device = "cuda"
    rank_counts = (2,)
