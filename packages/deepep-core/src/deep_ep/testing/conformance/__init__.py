"""The conformance suite: subclass these, say which backend, and run pytest.

The classes ask for capabilities, never for names. What a backend does not claim is skipped with a reason; what it
claims is compared with plain arithmetic over the inputs of all ranks.
"""

from __future__ import annotations

from .base import Conformance, Setup
from .errors import ErrorConformance
from .lifecycle import LifecycleConformance
from .low_latency import LowLatencyConformance, LowLatencyOptions
from .normal import NormalModeConformance, NormalOptions

__all__ = [
    "Conformance",
    "ErrorConformance",
    "LifecycleConformance",
    "LowLatencyConformance",
    "LowLatencyOptions",
    "NormalModeConformance",
    "NormalOptions",
    "Setup",
]
