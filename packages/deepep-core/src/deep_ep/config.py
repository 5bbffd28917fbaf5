"""`Config`, V1's tuning object, and the byte hints that size a buffer."""

from __future__ import annotations

from dataclasses import dataclass

from .errors import ArgumentError

_ALIGNMENT = 128
# Low-latency mode: of a row's header and of a rank's message; the layout is that of the backend ibgda.
_MAX_TOPK, _HEADER_WORDS, _PARTS, _SLOTS, _INDEX_BYTES, _STATE_BYTES = 32, 8, 32, 3, 1 << 14, 1 << 16


def _align(num_bytes: int) -> int:
    return (num_bytes + _ALIGNMENT - 1) // _ALIGNMENT * _ALIGNMENT


@dataclass(frozen=True)
class Config:
    """How a normal-mode call uses the machine; V1's five names, positional or by keyword.

    ``num_sms`` is obeyed by every backend that runs kernels. The four chunk sizes describe V1's queues; a backend
    without queues accepts them without effect.

    Attributes:
        num_sms: SMs for the communication kernels; even.
        num_max_nvl_chunked_send_tokens, num_max_nvl_chunked_recv_tokens: rows per NVLink queue step and queue length.
        num_max_rdma_chunked_send_tokens, num_max_rdma_chunked_recv_tokens: the same for RDMA queues.
    """

    num_sms: int = 20
    num_max_nvl_chunked_send_tokens: int = 6
    num_max_nvl_chunked_recv_tokens: int = 256
    num_max_rdma_chunked_send_tokens: int = 6
    num_max_rdma_chunked_recv_tokens: int = 256

    def __post_init__(self) -> None:
        for name, value in vars(self).items():
            if not isinstance(value, int) or value <= 0:
                raise ArgumentError(f"Config.{name} is {value!r}; it has to be a positive int.")

    def get_nvl_buffer_size_hint(self, hidden_bytes: int, num_ranks: int) -> int:
        """Bytes to pass as ``num_nvl_bytes``. Cheap, needs no CUDA, grows with every argument.

        The hint pays for a staging window: a buffer of any size serves any number of tokens.

        Args:
            hidden_bytes: bytes of one row.
            num_ranks: size of the group.
        """
        ranks_per_node = min(num_ranks, 8)
        row_bytes = hidden_bytes + 1024  # beside the row: scales, top-k indices and weights, source number
        return _align(ranks_per_node * self.num_max_nvl_chunked_recv_tokens * row_bytes * max(1, self.num_sms // 2))

    def get_rdma_buffer_size_hint(self, hidden_bytes: int, num_ranks: int) -> int:
        """Bytes to pass as ``num_rdma_bytes``; 0 for up to 8 ranks. See `get_nvl_buffer_size_hint`."""
        if num_ranks <= 8:
            return 0
        num_nodes = (num_ranks + 7) // 8
        row_bytes = hidden_bytes + 1024
        return _align(2 * num_nodes * self.num_max_rdma_chunked_recv_tokens * row_bytes * max(1, self.num_sms // 2))


def get_low_latency_rdma_size_hint(
    num_max_dispatch_tokens_per_rank: int, hidden: int, num_ranks: int, num_experts: int
) -> int:
    """Bytes to pass as ``num_rdma_bytes`` for low-latency mode. Cheap, needs no CUDA, falls with no argument.

    Three messages of each rank may be under way in each direction, each with room for one bf16 row, its routing and its
    weights per token; where peers are reached by RDMA, they lie ready at the sender too.
    """
    for name, value in {
        "num_max_dispatch_tokens_per_rank": num_max_dispatch_tokens_per_rank,
        "hidden": hidden,
        "num_ranks": num_ranks,
        "num_experts": num_experts,
    }.items():
        if not isinstance(value, int) or value <= 0:
            raise ArgumentError(f"{name} is {value!r}; get_low_latency_rdma_size_hint needs a positive int.")
    tokens = num_max_dispatch_tokens_per_rank
    row_bytes = _align(hidden * 2 + 4 * (_HEADER_WORDS + 2 * _MAX_TOPK))
    # A message is cut in parts of one size: 32 for dispatched rows, 32 for rows that come back, one for weights.
    part_bytes = _align(max(8 * _MAX_TOPK * tokens, -(-tokens * row_bytes // _PARTS)))
    message_bytes = (2 * _PARTS + 1) * part_bytes + _INDEX_BYTES
    return _align(2 * _SLOTS * num_ranks * message_bytes + _STATE_BYTES + 256 * num_ranks)
