"""V1's tuple-shaped handles, packed and unpacked in one place.

Clients keep a handle as an opaque value, save its parts with ``ctx.save_for_backward(*handle)`` and hand back a fresh
plain tuple, so everything a backend needs later has to be inside the tensors. All shapes are V1's with one channel
(``C = 1``); the send head is the destination row.
"""

from __future__ import annotations

from dataclasses import dataclass, fields
from typing import Any

import torch

from .errors import ArgumentError

Parts = tuple[torch.Tensor | None, ...]


@dataclass(frozen=True, kw_only=True)
class IntranodeHandle:
    """Handle of a dispatch inside one node; V1's order is the order of the fields.

    Attributes:
        rank_prefix_matrix: int32 ``[N, N]``; row ``s``, column ``d``: rows that ranks ``0..s`` together send to ``d``.
        channel_prefix_matrix: int32 ``[N, 1]``; tokens this rank sends to each rank.
        recv_channel_prefix_matrix: int32 ``[N, 1]``; first row of each source rank in ``recv_x``.
        recv_src_idx: int32 ``[R]``; the source's token number of each received row.
        is_token_in_rank: bool ``[T, N]``.
        send_head: int32 ``[T, N]``; destination row of the token at that rank, ``-1`` where it does not go.
    """

    rank_prefix_matrix: torch.Tensor
    channel_prefix_matrix: torch.Tensor
    recv_channel_prefix_matrix: torch.Tensor
    recv_src_idx: torch.Tensor
    is_token_in_rank: torch.Tensor
    send_head: torch.Tensor

    def to_tuple(self) -> Parts:
        return tuple([getattr(self, name) for name in _INTRANODE])

    @staticmethod
    def from_tuple(parts: Parts) -> IntranodeHandle:
        if len(parts) != 6 or any(not isinstance(p, torch.Tensor) for p in parts):
            raise ArgumentError(
                f"handle has {len(parts)} parts; a dispatch inside one node returns 6 tensors. "
                "Pass the handle that Buffer.dispatch returned."
            )
        return IntranodeHandle(**dict(zip(_INTRANODE, parts, strict=True)))  # type: ignore[arg-type]

    @property
    def num_ranks(self) -> int:
        return int(self.rank_prefix_matrix.shape[0])

    @property
    def num_tokens(self) -> int:
        return int(self.is_token_in_rank.shape[0])

    @property
    def num_recv_tokens(self) -> int:
        """Rows of ``recv_x``, padding of ``num_worst_tokens`` included."""
        return int(self.recv_src_idx.shape[0])


@dataclass(frozen=True, kw_only=True)
class InternodeHandle:
    """Handle of a dispatch across nodes; V1's order is the order of the fields.

    Attributes:
        is_token_in_rank: bool ``[T, N]``.
        rdma_channel_prefix_matrix: int32 ``[D, 1]``; tokens this rank sends to each node.
        gbl_channel_prefix_matrix: int32 ``[N, 1]``; tokens this rank sends to each rank.
        recv_rdma_channel_prefix_matrix: int32 ``[D, 1]``; rows this rank forwards from each node.
        recv_rdma_rank_prefix_sum: int32 ``[D]``; inclusive sums of the same.
        recv_gbl_channel_prefix_matrix: int32 ``[N, 1]``; first row of each source rank in ``recv_x``.
        recv_gbl_rank_prefix_sum: int32 ``[N]``; inclusive sums over source ranks of received rows
            (V1's ``handle[-4]``).
        recv_src_meta: uint8 ``[R, 8]``; source rank and source token of each row, two little-endian int32.
        send_rdma_head: int32 ``[T, D]``; row of the token at the forwarding rank of that node, ``-1`` where none.
        send_nvl_head: int32 ``[F, 8]`` for the ``F`` rows this rank forwards (by source node, then source token):
            destination row at each local rank, ``-1`` where none.
    """

    is_token_in_rank: torch.Tensor
    rdma_channel_prefix_matrix: torch.Tensor
    gbl_channel_prefix_matrix: torch.Tensor
    recv_rdma_channel_prefix_matrix: torch.Tensor
    recv_rdma_rank_prefix_sum: torch.Tensor
    recv_gbl_channel_prefix_matrix: torch.Tensor
    recv_gbl_rank_prefix_sum: torch.Tensor
    recv_src_meta: torch.Tensor
    send_rdma_head: torch.Tensor
    send_nvl_head: torch.Tensor

    def to_tuple(self) -> Parts:
        return tuple([getattr(self, name) for name in _INTERNODE])

    @staticmethod
    def from_tuple(parts: Parts) -> InternodeHandle:
        if len(parts) != 10 or any(not isinstance(p, torch.Tensor) for p in parts):
            raise ArgumentError(
                f"handle has {len(parts)} parts; a dispatch across nodes returns 10 tensors. "
                "Pass the handle that Buffer.dispatch returned."
            )
        return InternodeHandle(**dict(zip(_INTERNODE, parts, strict=True)))  # type: ignore[arg-type]

    @property
    def num_ranks(self) -> int:
        return int(self.is_token_in_rank.shape[1])

    @property
    def num_tokens(self) -> int:
        return int(self.is_token_in_rank.shape[0])

    @property
    def num_recv_tokens(self) -> int:
        return int(self.recv_src_meta.shape[0])


@dataclass(frozen=True, kw_only=True)
class LowLatencyHandle:
    """Handle of a low-latency dispatch; V1's order is the order of the fields.

    Attributes:
        src_info: int32 ``[L, M]``; the source's token number of each received row.
        layout_range: int64 ``[L, N]``; ``first row << 32 | number of rows`` of each source rank inside each expert.
        max_tokens: ``X``.
        hidden: ``H``.
        num_experts: ``E``.
    """

    src_info: torch.Tensor
    layout_range: torch.Tensor
    max_tokens: int
    hidden: int
    num_experts: int

    def to_tuple(self) -> tuple[Any, ...]:
        return tuple([getattr(self, name) for name in _LOW_LATENCY])

    @staticmethod
    def from_tuple(parts: tuple[Any, ...]) -> LowLatencyHandle:
        if (
            len(parts) != 5
            or not all(isinstance(p, torch.Tensor) for p in parts[:2])
            or not all(isinstance(p, int) for p in parts[2:])
        ):
            raise ArgumentError(
                f"handle has {len(parts)} parts; low_latency_dispatch returns 5 (two tensors, three ints). "
                "Pass the handle that Buffer.low_latency_dispatch returned."
            )
        return LowLatencyHandle(**dict(zip(_LOW_LATENCY, parts, strict=True)))


# Looked up once: a handle is packed and unpacked in every call.
_INTRANODE, _INTERNODE, _LOW_LATENCY = (
    tuple(f.name for f in fields(kind)) for kind in (IntranodeHandle, InternodeHandle, LowLatencyHandle)
)

__all__ = ["InternodeHandle", "IntranodeHandle", "LowLatencyHandle", "Parts"]
