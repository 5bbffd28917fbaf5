"""The backend ``ibgda`` passes the shared suite: over NVLink, on virtual nodes through the software NIC, on one GPU."""

from __future__ import annotations

import pytest

from deep_ep.testing.conformance import ErrorConformance, LifecycleConformance, LowLatencyConformance


@pytest.mark.gpu(2)
class TestLowLatencyModeOnTwoGpus(LowLatencyConformance):
    backend = "ibgda"
    device = "cuda"
    rank_counts = (1, 2)


@pytest.mark.gpu(4)
class TestLowLatencyModeOnFourGpus(LowLatencyConformance):
    backend = "ibgda"
    device = "cuda"
    rank_counts = (3, 4)


@pytest.mark.gpu(1)
class TestLowLatencyModeWithAGlooGroup(LowLatencyConformance):
    """NCCL refuses to share a GPU between ranks, gloo does not: this runs with any number of GPUs."""

    backend = "ibgda"
    device = "cuda"
    group_backend = "gloo"
    rank_counts = (2,)


@pytest.mark.gpu(4)
class TestLowLatencyModeOnTwoNodesOfTwo(LowLatencyConformance):
    """Peers of the other node are reached by RDMA requests, which the software NIC executes."""

    backend = "ibgda"
    device = "cuda"
    rank_counts = (4,)
    ranks_per_node = 2


@pytest.mark.gpu(4)
class TestLowLatencyModeOnFourNodesOfOne(LowLatencyConformance):
    """No peer is reached over NVLink."""

    backend = "ibgda"
    device = "cuda"
    rank_counts = (4,)
    ranks_per_node = 1


@pytest.mark.gpu(2)
class TestErrors(ErrorConformance):
    backend = "ibgda"
    device = "cuda"
    rank_counts = (2,)


@pytest.mark.gpu(2)
class TestLifecycle(LifecycleConformance):
    backend = "ibgda"
    device = "cuda"
    rank_counts = (2,)


@pytest.mark.gpu(2)
class TestLifecycleAcrossNodes(LifecycleConformance):
    backend = "ibgda"
    device = "cuda"
    rank_counts = (2,)
    ranks_per_node = 1
