"""The backend ``nvlink`` passes the shared suite: one GPU per rank, and several ranks on whatever GPUs there are."""

from __future__ import annotations

import pytest

from deep_ep.testing.conformance import ErrorConformance, LifecycleConformance, NormalModeConformance


@pytest.mark.gpu(2)
class TestNormalModeOnTwoGpus(NormalModeConformance):
    backend = "nvlink"
    device = "cuda"
    rank_counts = (1, 2)


@pytest.mark.gpu(4)
class TestNormalModeOnFourGpus(NormalModeConformance):
    backend = "nvlink"
    device = "cuda"
    rank_counts = (3, 4)


@pytest.mark.gpu(1)
class TestNormalModeWithAGlooGroup(NormalModeConformance):
    """NCCL refuses to share a GPU between ranks, gloo does not: this runs with any number of GPUs."""

    backend = "nvlink"
    device = "cuda"
    group_backend = "gloo"
    rank_counts = (3,)


@pytest.mark.gpu(2)
class TestErrors(ErrorConformance):
    backend = "nvlink"
    device = "cuda"
    rank_counts = (2,)


@pytest.mark.gpu(2)
class TestLifecycle(LifecycleConformance):
    backend = "nvlink"
    device = "cuda"
    rank_counts = (2,)
