"""NVSHMEM's own proxy moves the rows of the backend ``nvshmem`` between two GPUs that may not reach each other."""

from __future__ import annotations

import os
import re
import subprocess
import sys
import uuid
from pathlib import Path

import pytest

HERE = Path(__file__).parent


@pytest.mark.gpu(2)
def test_round_trips_over_the_proxy_are_right(tmp_path: Path) -> None:
    if not Path("/usr/include/infiniband/verbs.h").exists():
        pytest.skip("needs the headers of libibverbs (libibverbs-dev)")
    subprocess.run(["sh", str(HERE / "build.sh"), str(tmp_path)], check=True)
    segment = f"/deepep_{uuid.uuid4().hex}"
    environment = os.environ | {
        "LD_PRELOAD": str(tmp_path / "libibverbs.so.1"),
        "STANDIN_VERBS_SHM": segment,
        "STANDIN_VERBS_LOG": "1",
        "NVSHMEM_REMOTE_TRANSPORT": "ibrc",
        "NVSHMEM_DISABLE_P2P": "1",
        "NVSHMEM_IB_DISABLE_DMABUF": "1",
        "NVSHMEM_DISABLE_DATA_DIRECT": "1",
        "NVSHMEM_DISABLE_GDRCOPY": "1",
        "NCCL_IB_DISABLE": "1",
    }
    try:
        done = subprocess.run(
            [sys.executable, str(HERE / "round_trips.py")],
            env=environment,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            timeout=120,
        )
    finally:
        Path("/dev/shm", segment.lstrip("/")).unlink(missing_ok=True)
    for rank in range(2):
        assert f"rank {rank}: [True, True, True]" in done.stdout, done.stdout
    # What each process executed for the other.
    assert re.search(r"standin_verbs\[\d+\]: GPU \d is ready", done.stdout), done.stdout
