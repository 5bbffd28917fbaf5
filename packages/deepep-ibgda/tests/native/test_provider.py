"""The RDMA side's bindings without a GPU: what is refused, in which words, and failures in words."""

from __future__ import annotations

from typing import Any

import pytest

_ibgda: Any = pytest.importorskip("deepep_ibgda._ibgda")

SOFTWARE = {"rank": 0, "device": 0, "arena_ptrs": [512, 512], "num_arena_bytes": 512, "is_remote": [False, True]}
NVSHMEM = {
    "rank": 0,
    "num_ranks": 2,
    "device": 0,
    "unique_id": b"\0" * 128,
    "host_library": "nowhere/libnvshmem_host.so.3",
    "device_library": "nowhere/libnvshmem_device.a",
    "state_module": "nowhere/nvshmem_state.fatbin",
    "num_arena_bytes": 1 << 20,
    "is_remote": [False, True],
}


@pytest.mark.parametrize(
    ("wrong", "words"),
    [
        ({"depth": 3}, "depth is 3; powers of two from 2 to 32768 are accepted"),
        ({"depth": 1 << 16}, "depth is 65536"),
        ({"num_queue_pairs": 0}, "num_queue_pairs is 0; 1 to 64 are accepted"),
        ({"rank": 2}, "rank is 2 of 2"),
        ({"is_remote": [True, False]}, "rank 0 cannot be remote to itself"),
        ({"is_remote": []}, "is_remote has 0 entries"),
        ({"faults_per_million": {"slow": 1}}, "fault is 'slow'; known are 'delay', 'reorder', 'drop completion'"),
    ],
    ids=lambda value: "-".join(value) if isinstance(value, dict) else "",
)
def test_software_nic_refuses(wrong: dict[str, Any], words: str) -> None:
    with pytest.raises(_ibgda.ArgumentError, match=words):
        _ibgda.SoftwareNic(**{**SOFTWARE, **wrong})


def test_a_failure_word_is_put_in_words() -> None:
    outcome, retries_exhausted, request = 3, 0x15, 5
    seen = outcome | retries_exhausted << 8 | request << 32
    assert _ibgda.describe_rdma_failure(peer=3, seen=seen, expected=64) == (
        "queue pair 64 to rank 3: request 5 failed: retries exhausted (the peer's NIC does not answer), "
        "syndrome 21, vendor syndrome 0"
    )
    assert _ibgda.describe_rdma_failure(peer=3, seen=0, expected=64) == (
        "queue pair 64 to rank 3: waited until the deadline"
    )


def test_nothing_is_probed_where_no_peer_is_remote() -> None:
    facts = {"rank": 0, "device": 0, "arena_ptr": 0, "view_ptr": 0, "nonce": 1}
    assert _ibgda.post_probe(**facts, timeout_s=1.0) == ""
    assert _ibgda.missing_of_probe(**facts) == []


@pytest.mark.parametrize(
    ("wrong", "words"),
    [
        ({"depth": 64}, "depth is 64; powers of two from 128 to 32768 are accepted"),
        ({"unique_id": b"1"}, "unique_id has 1 bytes"),
        ({"service_level": 16}, "service_level is 16; 0 to 15 are accepted"),
        ({"traffic_class": 256}, "traffic_class is 256; 0 to 255 are accepted"),
        ({"is_remote": [True, False]}, "rank 0 is none of the group, or remote to itself"),
    ],
    ids=lambda value: "-".join(value) if isinstance(value, dict) else "",
)
def test_nvshmem_provider_refuses(wrong: dict[str, Any], words: str) -> None:
    if not _ibgda.is_nvshmem_compiled():
        pytest.skip("deepep-ibgda was built without NVSHMEM's headers")
    with pytest.raises(_ibgda.ArgumentError, match=words):
        _ibgda.NvshmemRdma(**{**NVSHMEM, **wrong})


def test_an_nvshmem_that_is_not_there_is_named() -> None:
    if not _ibgda.is_nvshmem_compiled():
        pytest.skip("deepep-ibgda was built without NVSHMEM's headers")
    with pytest.raises(_ibgda.DriverError, match=r"opening NVSHMEM \(nowhere/libnvshmem_host\.so\.3\)"):
        _ibgda.nvshmem_unique_id(host_library=NVSHMEM["host_library"])
