"""The Python side is tested on machines without CUDA's compiler too: from the tree, where it is not installed."""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path

if importlib.util.find_spec("deepep_ibgda") is None:
    sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "src"))
