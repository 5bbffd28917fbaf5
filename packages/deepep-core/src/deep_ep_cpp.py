"""V1's top-level native module name, for programs that import from it."""

from __future__ import annotations

from deep_ep import Buffer, Config, EventHandle, topk_idx_t
from deep_ep.config import get_low_latency_rdma_size_hint

is_sm90_compiled = Buffer.is_sm90_compiled

__all__ = ["Config", "EventHandle", "get_low_latency_rdma_size_hint", "is_sm90_compiled", "topk_idx_t"]
