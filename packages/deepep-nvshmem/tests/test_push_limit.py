"""When the push limit of a group across nodes is measured, on a machine without a GPU."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch

from deep_ep.errors import BackendUnavailableError
from deepep_nvshmem import push_limit


class Mapped:
    """An arena of all ranks; notes what becomes of it."""

    def __init__(self, log: list[str], fails: bool) -> None:
        self.log = log
        if fails:
            raise BackendUnavailableError("rank 1 could not map a peer's GPU memory")
        self.arena_ptrs = [4096, 8192, 12288, 16384]
        log.append("mapped")

    def close(self) -> None:
        self.log.append("closed")


def _measured(monkeypatch: pytest.MonkeyPatch, log: list[str], *, hosts: list[bytes], fails: bool = False) -> Any:
    monkeypatch.setattr(push_limit, "MappedArena", lambda *_what, **_how: Mapped(log, fails))
    monkeypatch.setattr(push_limit, "_pushed_gbps", lambda *what, **_how: log.append(f"pushed to {what[2]}") or 300.0)
    channel = SimpleNamespace(all_gather=lambda record, **_how: hosts)
    facts: Any = SimpleNamespace(num_ranks=len(hosts), channel=channel, device=torch.device("cpu"))
    return push_limit.measure_push_limit_of_host(None, facts, num_sms=24, timeout_s=1.0, backend="nvshmem")


def test_nodes_of_one_host_are_measured_and_unmapped_again(monkeypatch: pytest.MonkeyPatch) -> None:
    log: list[str] = []
    assert _measured(monkeypatch, log, hosts=[b"a"] * 4) == 300.0
    assert log == ["mapped", "pushed to [4096, 8192, 12288, 16384]", "closed"]


@pytest.mark.parametrize("hosts", [[b"a", b"a", b"b", b"b"], [b"a"] * 16, [b"a"]])
def test_several_hosts_and_more_ranks_than_can_be_mapped_have_no_limit(
    monkeypatch: pytest.MonkeyPatch, hosts: list[bytes]
) -> None:
    log: list[str] = []
    assert _measured(monkeypatch, log, hosts=hosts) is None
    assert log == []


def test_gpus_that_do_not_reach_one_another_have_no_limit(monkeypatch: pytest.MonkeyPatch) -> None:
    log: list[str] = []
    assert _measured(monkeypatch, log, hosts=[b"a"] * 4, fails=True) is None
    assert log == []
