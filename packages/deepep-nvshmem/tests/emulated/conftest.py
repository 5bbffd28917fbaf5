"""For tests of the kernels across nodes on the emulator: they find their modules, and leave no world behind."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).resolve().parent))


@pytest.fixture(autouse=True)
def _closed_worlds() -> Iterator[None]:
    import torch
    from internode_steps import WORLDS
    from internode_world import machine

    torch.set_num_threads(1)
    machine().set_resident(0)
    yield
    while WORLDS:
        WORLDS.pop().close()
