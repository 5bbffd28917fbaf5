"""Expert-parallel dispatch and combine: DeepEP V1's API over pluggable backends.

Importing touches no CUDA state and loads no backend.
"""

from __future__ import annotations

import importlib.metadata

import torch

from .buffer import Buffer
from .config import Config
from .errors import (
    ArgumentError,
    BackendNotFoundError,
    BackendUnavailableError,
    BufferStateError,
    DeepEPError,
    PeerError,
    PeerLostError,
    PeerRefusedError,
    PeersDisagreeError,
    PeerTimeoutError,
    SettingError,
)
from .events import EventHandle, EventOverlap

topk_idx_t = torch.int64
"""Dtype of expert numbers in results; int32 is accepted in arguments."""

__version__ = importlib.metadata.version("deepep-core")

__all__ = [
    "ArgumentError",
    "BackendNotFoundError",
    "BackendUnavailableError",
    "Buffer",
    "BufferStateError",
    "Config",
    "DeepEPError",
    "EventHandle",
    "EventOverlap",
    "PeerError",
    "PeerLostError",
    "PeerRefusedError",
    "PeerTimeoutError",
    "PeersDisagreeError",
    "SettingError",
    "topk_idx_t",
]
