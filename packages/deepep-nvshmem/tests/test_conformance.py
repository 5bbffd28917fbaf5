"""Both backends pass the shared suite: ``nvlink`` on one node, ``nvshmem`` on several virtual ones."""

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


@pytest.mark.gpu(4)
class TestNormalModeOnTwoNodesOfTwo(NormalModeConformance):
    """Between the nodes rows go through NVSHMEM only."""

    backend = "nvshmem"
    device = "cuda"
    rank_counts = (4,)
    ranks_per_node = 2


@pytest.mark.gpu(4)
class TestNormalModeOnFourNodesOfOne(NormalModeConformance):
    backend = "nvshmem"
    device = "cuda"
    rank_counts = (4,)
    ranks_per_node = 1


@pytest.mark.gpu(2)
class TestNormalModeOnTwoNodesOfOne(NormalModeConformance):
    backend = "nvshmem"
    device = "cuda"
    rank_counts = (2,)
    ranks_per_node = 1


@pytest.mark.gpu(2)
class TestErrorsOnTwoNodesOfOne(ErrorConformance):
    backend = "nvshmem"
    device = "cuda"
    rank_counts = (2,)
    ranks_per_node = 1


@pytest.mark.gpu(2)
class TestLifecycleOnTwoNodesOfOne(LifecycleConformance):
    backend = "nvshmem"
    device = "cuda"
    rank_counts = (2,)
    ranks_per_node = 1


@pytest.mark.gpu(4)
class TestErrorsAcrossNodes(ErrorConformance):
    backend = "nvshmem"
    device = "cuda"
    rank_counts = (4,)
    ranks_per_node = 2


@pytest.mark.gpu(4)
class TestLifecycleAcrossNodes(LifecycleConformance):
    backend = "nvshmem"
    device = "cuda"
    rank_counts = (4,)
    ranks_per_node = 2
