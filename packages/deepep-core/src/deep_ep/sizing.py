"""From facts about a model to the byte sizes of a buffer."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from .config import Config, get_low_latency_rdma_size_hint
from .errors import ArgumentError

BufferMode = Literal["normal", "low_latency", "both"]


@dataclass(frozen=True, kw_only=True)
class BufferSize:
    """What to pass to `deep_ep.Buffer`: two byte hints and whether low-latency mode is wanted."""

    num_nvl_bytes: int
    num_rdma_bytes: int
    low_latency_mode: bool


def size_for_model(
    *,
    hidden: int,
    num_experts: int,
    num_ranks: int,
    max_tokens_per_rank: int,
    num_topk: int,
    mode: BufferMode = "normal",
    bytes_per_element: int = 2,
) -> BufferSize:
    """Byte sizes for a model.

    Args:
        hidden: columns of a token.
        num_experts: of the whole group; a multiple of ``num_ranks``.
        num_ranks: size of the group.
        max_tokens_per_rank: the most tokens one rank sends in one low-latency call. Normal mode takes any number.
        num_topk: experts of a token.
        mode: which calls the buffer has to serve.
        bytes_per_element: of the widest rows (2 for bf16).

    Raises:
        ArgumentError: a fact that cannot be.
    """
    facts = {
        "hidden": hidden,
        "num_experts": num_experts,
        "num_ranks": num_ranks,
        "max_tokens_per_rank": max_tokens_per_rank,
        "num_topk": num_topk,
        "bytes_per_element": bytes_per_element,
    }
    for name, value in facts.items():
        if not isinstance(value, int) or value <= 0:
            raise ArgumentError(f"{name} is {value!r}; sizing a buffer needs a positive int.")
    if num_experts % num_ranks:
        raise ArgumentError(f"num_experts is {num_experts}; it has to be a multiple of the {num_ranks} ranks.")
    if num_topk > min(32, num_experts):
        raise ArgumentError(
            f"num_topk is {num_topk}; at most {min(32, num_experts)} of {num_experts} experts can be chosen."
        )
    if mode not in ("normal", "low_latency", "both"):
        raise ArgumentError(f"mode is {mode!r}; accepted: 'normal', 'low_latency', 'both'.")
    num_nvl_bytes = num_rdma_bytes = 0
    if mode in ("normal", "both"):
        config = Config()
        num_nvl_bytes = config.get_nvl_buffer_size_hint(hidden * bytes_per_element, num_ranks)
        num_rdma_bytes = config.get_rdma_buffer_size_hint(hidden * bytes_per_element, num_ranks)
    if mode in ("low_latency", "both"):
        hint = get_low_latency_rdma_size_hint(max_tokens_per_rank, hidden, num_ranks, num_experts)
        num_rdma_bytes = max(num_rdma_bytes, hint)
    return BufferSize(
        num_nvl_bytes=num_nvl_bytes, num_rdma_bytes=num_rdma_bytes, low_latency_mode=mode in ("low_latency", "both")
    )
