"""What the backend ``ibgda`` says about itself and its surroundings, on a machine without a GPU."""

from __future__ import annotations

import logging
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

import deepep_ibgda
from deep_ep import BackendUnavailableError, registry
from deep_ep.backend import BufferOptions, Environment, GroupFacts
from deepep_ibgda import IbgdaBackend, backend, reach

SOURCES = Path(deepep_ibgda.__file__).parents[1]


def test_import_loads_no_extension_and_touches_no_gpu() -> None:
    program = (
        f"import sys; sys.path.insert(0, {str(SOURCES)!r})\n"
        "import deepep_ibgda, torch\n"
        "assert 'deepep_ibgda._ibgda' not in sys.modules\n"
        "assert not torch.cuda.is_initialized()\n"
    )
    finished = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=False)
    assert finished.returncode == 0, finished.stderr


def test_missing_extension_is_an_obstacle_with_a_cure(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "deepep_ibgda._ibgda", None)
    (obstacle,) = IbgdaBackend.probe(Environment(device_type="cuda", num_gpus=4))
    assert "native extension of deepep-ibgda does not load" in obstacle.cause and "Reinstall" in obstacle.cure
    assert IbgdaBackend.is_sm90_compiled() is False


@pytest.fixture
def loaded(monkeypatch: pytest.MonkeyPatch) -> None:
    extension = SimpleNamespace(is_sm90_compiled=lambda: True)
    monkeypatch.setattr(backend, "load_extension", lambda: extension)


def environment(*devices: int, num_gpus: int = 4) -> Environment:
    return Environment(device_type="cuda", num_gpus=num_gpus, num_ranks=len(devices), device_of_rank=devices)


def test_gpus_that_reach_each_other_are_no_obstacle(loaded: None, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[tuple[int, int]] = []
    monkeypatch.setattr(torch.cuda, "can_device_access_peer", lambda a, b: asked.append((a, b)) or True)
    assert IbgdaBackend.probe(environment(0, 1, 0, 1)) == []
    assert sorted(asked) == [(0, 1), (1, 0)]
    assert IbgdaBackend.probe(Environment(device_type="cuda", num_gpus=4)) == []


def test_gpus_apart_and_ranks_without_gpu_are_obstacles(loaded: None, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "can_device_access_peer", lambda a, b: {a, b} != {1, 2})
    (obstacle,) = IbgdaBackend.probe(environment(0, 1, 2))
    assert "GPU 1 cannot reach the memory of GPU 2" in str(obstacle)
    (obstacle,) = IbgdaBackend.probe(environment(0, -1))
    assert "rank 1 sees no GPU" in str(obstacle)


def test_normal_mode_and_cpu_tensors_are_refused_before_anything_is_loaded() -> None:
    cpu = Environment(device_type="cpu", num_gpus=0)
    assert "cuda" in str(registry.obstacles(IbgdaBackend, cpu)[0])
    gpu = environment(0, 1)
    assert "does not serve normal mode" in str(registry.obstacles(IbgdaBackend, gpu, mode="normal")[0])


# --- the way to each rank -------------------------------------------------------------------------------------------


class FakeChannel:
    """Every rank says what this one says, but of its own host; rank 0 has no obstacle."""

    def __init__(self, hosts: str) -> None:
        self.hosts = hosts

    def gather_texts(self, text: str, **_how: Any) -> list[str]:
        return ["", *[text] * (len(self.hosts) - 1)]

    def all_gather(self, record: bytes, **_how: Any) -> list[bytes]:
        return [host.encode() * 16 + record[16:] for host in self.hosts]


def agree(hosts: str, ranks_per_node: int, rank: int = 0, **options: Any) -> reach.Reach:
    facts = GroupFacts(
        rank=rank,
        num_ranks=len(hosts),
        ranks_per_node=ranks_per_node,
        device=torch.device("cuda", 0),
        channel=FakeChannel(hosts),  # type: ignore[arg-type]
    )
    extension = SimpleNamespace(is_nvshmem_compiled=lambda: False)
    return reach.agree_on_reach(extension, facts, BufferOptions(num_rdma_bytes=77, **options))


@pytest.mark.parametrize("provider", ["auto", "software", "nvshmem"])
def test_one_node_needs_no_provider(provider: str) -> None:
    found = agree("aaaa", 4, rdma_provider=provider)
    assert found.provider == "" and not any(found.is_remote) and found.host_ranks == (0, 1, 2, 3)
    assert found.num_window_bytes == 77


@pytest.mark.parametrize("provider", ["auto", "software"])
def test_nodes_of_one_host_get_the_software_nic_and_the_log_says_so(
    provider: str, caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level(logging.INFO, logger="deep_ep"):
        found = agree("aaaa", 2, rank=0, rdma_provider=provider)
    assert found.provider == "software" and found.is_remote == (False, False, True, True)
    assert found.host_ranks == (0, 1, 2, 3)
    assert "threads of its processes execute RDMA" in caplog.text


def test_nodes_of_one_host_may_be_told_to_use_a_nic() -> None:
    with pytest.raises(BackendUnavailableError, match="without NVSHMEM"):
        agree("aaaa", 2, rdma_provider="nvshmem")


@pytest.mark.parametrize(
    ("provider", "says"), [("auto", "rank 1 cannot"), ("software", "inside one host"), ("nvshmem", "without NVSHMEM")]
)
def test_several_hosts_never_get_the_software_nic(provider: str, says: str) -> None:
    with pytest.raises(BackendUnavailableError, match=says):
        agree("aabb", 2, rdma_provider=provider)
