"""Normal-mode handles: made at dispatch, read back at combine and cached dispatch.

The shapes and the meaning of every part are `deep_ep.handles`'s.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from deep_ep.backend import GroupFacts
from deep_ep.errors import ArgumentError
from deep_ep.handles import InternodeHandle, IntranodeHandle, Parts

from . import rows
from .routing import exclusive_sum, is_token_in_node, position_at_destination
from .session import Call

_NVL_RANKS = 8


@dataclass(frozen=True, kw_only=True)
class Route:
    """What a handle says about this rank's rows.

    Attributes:
        is_token_in_rank: bool ``[T, N]``.
        send_counts: tokens this rank sends to each rank in dispatch, and gets back in combine.
        recv_counts: rows this rank receives from each rank in dispatch, and sends back in combine.
        num_recv_rows: rows of ``recv_x``, padding included.
    """

    is_token_in_rank: torch.Tensor
    send_counts: list[int]
    recv_counts: list[int]
    num_recv_rows: int


def build(
    facts: GroupFacts,
    call: Call,
    *,
    is_token_in_rank: torch.Tensor,
    rank_counts: torch.Tensor,
    node_counts: torch.Tensor,
    src_tokens: torch.Tensor,
) -> Parts:
    """The handle of a dispatch.

    Args:
        is_token_in_rank: bool ``[T, N]``.
        rank_counts: int64 ``[N, N]`` on the CPU: row ``s``, column ``d``: tokens that rank ``s`` sends to rank ``d``.
        node_counts: int64 ``[N, D]`` on the CPU: tokens that each rank sends to each node.
        src_tokens: int32 ``[R]``, token number at its source of each received row; ``-1`` for padding.
    """
    rank, device = facts.rank, is_token_in_rank.device

    def int32(values: torch.Tensor) -> torch.Tensor:
        return values.to(device=device, dtype=torch.int32)

    # First row of this rank's tokens at every destination, and of every source's tokens here.
    first_there = exclusive_sum(rank_counts)[rank]
    first_here = exclusive_sum(rank_counts[:, rank])
    dst_row = position_at_destination(is_token_in_rank, first_there)
    if facts.num_nodes == 1:
        return IntranodeHandle(
            rank_prefix_matrix=int32(rank_counts.cumsum(dim=0)),
            channel_prefix_matrix=int32(rank_counts[rank, :, None]),
            recv_channel_prefix_matrix=int32(first_here[:, None]),
            recv_src_idx=src_tokens,
            is_token_in_rank=is_token_in_rank,
            send_head=dst_row,
        ).to_tuple()

    # A token crosses to another node once, to the rank with the sender's local number, which forwards it there.
    forwarded_from = node_counts[facts.local_rank :: facts.ranks_per_node, facts.node]
    first_at_forwarder = exclusive_sum(node_counts[facts.local_rank :: facts.ranks_per_node])[facts.node]
    is_in_node = is_token_in_node(is_token_in_rank, facts.ranks_per_node)
    src_rank = torch.repeat_interleave(rank_counts[:, rank]).to(device)
    src_meta = torch.full((src_tokens.shape[0], 2), -1, dtype=torch.int32, device=device)
    src_meta[: src_rank.shape[0], 0] = src_rank.to(torch.int32)
    src_meta[:, 1] = src_tokens
    return InternodeHandle(
        is_token_in_rank=is_token_in_rank,
        rdma_channel_prefix_matrix=int32(node_counts[rank, :, None]),
        gbl_channel_prefix_matrix=int32(rank_counts[rank, :, None]),
        recv_rdma_channel_prefix_matrix=int32(forwarded_from[:, None]),
        recv_rdma_rank_prefix_sum=int32(forwarded_from.cumsum(dim=0)),
        recv_gbl_channel_prefix_matrix=int32(first_here[:, None]),
        recv_gbl_rank_prefix_sum=int32(rank_counts[:, rank].cumsum(dim=0)),
        recv_src_meta=src_meta.view(torch.uint8),
        send_rdma_head=position_at_destination(is_in_node, first_at_forwarder),
        send_nvl_head=_exchange_forwarding(facts, call, is_in_node, dst_row, node_counts[rank], forwarded_from),
    ).to_tuple()


def _exchange_forwarding(
    facts: GroupFacts,
    call: Call,
    is_in_node: torch.Tensor,
    dst_row: torch.Tensor,
    sent_to_node: torch.Tensor,
    forwarded_from: torch.Tensor,
) -> torch.Tensor:
    """Tell every forwarding rank where the rows it forwards go: its ``send_nvl_head``, int32 ``[F, 8]``."""
    send_counts = [0] * facts.num_ranks
    recv_counts = [0] * facts.num_ranks
    send_counts[facts.local_rank :: facts.ranks_per_node] = sent_to_node.tolist()
    recv_counts[facts.local_rank :: facts.ranks_per_node] = forwarded_from.tolist()
    nodes, tokens = is_in_node.t().nonzero().unbind(dim=1)
    by_local_rank = dst_row.unflatten(1, (facts.num_nodes, facts.ranks_per_node))[tokens, nodes]
    width = max(_NVL_RANKS, facts.ranks_per_node)
    heads = torch.full((tokens.shape[0], width), -1, dtype=torch.int32, device=dst_row.device)
    heads[:, : facts.ranks_per_node] = by_local_rank
    received, _ = call.all_to_all(rows.pack([heads]), send_counts, recv_counts, "forwarding")
    return rows.unpack(received, like=[heads])[0]


def read(parts: Parts, facts: GroupFacts) -> Route:
    """The route in a handle. Raises `ArgumentError` if it cannot be one of a dispatch on this buffer."""
    typed: IntranodeHandle | InternodeHandle
    if facts.num_nodes == 1:
        typed = IntranodeHandle.from_tuple(parts)
        received = typed.rank_prefix_matrix
        expected_shape: tuple[int, ...] = (facts.num_ranks, facts.num_ranks)
    else:
        typed = InternodeHandle.from_tuple(parts)
        received = typed.recv_gbl_rank_prefix_sum
        expected_shape = (facts.num_ranks,)
    if typed.num_ranks != facts.num_ranks or tuple(received.shape) != expected_shape:
        raise ArgumentError(
            f"handle is of a dispatch among {typed.num_ranks} ranks, this buffer has {facts.num_ranks}. Pass the "
            "handle that dispatch on this buffer returned."
        )
    prefix = received.cpu().long().reshape(facts.num_ranks, -1)
    prefix = prefix[:, facts.rank if prefix.shape[1] > 1 else 0]
    recv_counts = torch.diff(prefix, prepend=prefix.new_zeros(1)).tolist()
    if min(recv_counts) < 0 or sum(recv_counts) > typed.num_recv_tokens:
        raise ArgumentError(
            f"handle says that {recv_counts} rows came from the ranks, but lists {typed.num_recv_tokens}. Pass the "
            "handle that dispatch returned, unchanged."
        )
    return Route(
        is_token_in_rank=typed.is_token_in_rank,
        send_counts=typed.is_token_in_rank.sum(dim=0).tolist(),
        recv_counts=recv_counts,
        num_recv_rows=typed.num_recv_tokens,
    )
