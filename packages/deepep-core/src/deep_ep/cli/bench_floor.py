"""The least that two hops move over NVLink, counted from the routing: the floor for normal mode between virtual nodes.

``N`` ranks, ``D`` nodes, ``P = N / D`` ranks per node, ``T`` tokens of a rank.

A remote token crosses once to each node that wants it, to the rank of the source's own local index (the forwarder),
and from there once to each other rank of its node that wants it; combine takes the same way back with a partial sum at
the forwarder. Where all nodes lie inside one NVLink domain, both hops leave a GPU through the same links, so no kernel
can be done before the busiest rank has sent all of its rows at the rate of the links.
"""

from __future__ import annotations

import statistics
from dataclasses import dataclass

import torch

from .bench_data import Shape, choices, ranks_of


@dataclass(frozen=True, kw_only=True)
class RowsOut:
    """Rows that have to leave each rank for other ranks, int64 ``[N]``."""

    dispatch: torch.Tensor
    combine: torch.Tensor


def two_hop_rows(wanted: torch.Tensor, ranks_per_node: int) -> RowsOut:
    """Count them.

    Two nodes of two ranks, one token, of rank 0, for ranks 1, 2 and 3: in dispatch rank 0 sends it to rank 1 and to its
    forwarder, rank 2, which keeps it and sends it to rank 3; in combine ranks 1 and 3 each give up a row and rank 2 a
    partial sum.

    Args:
        wanted: bool ``[N, T, N]``: source, token, whether a rank holds one of the token's experts.
    """
    num_ranks, num_tokens, _ = wanted.shape
    of_node = wanted.view(num_ranks, num_tokens, num_ranks // ranks_per_node, ranks_per_node)
    at_rank = of_node.sum(1)  # [N, D, P]
    at_node = of_node.any(-1).sum(1)  # [N, D]
    out = torch.zeros(num_ranks, dtype=torch.int64)
    back = torch.zeros(num_ranks, dtype=torch.int64)
    for source in range(num_ranks):
        own_node, local = divmod(source, ranks_per_node)
        for node in range(num_ranks // ranks_per_node):
            first, forwarder = node * ranks_per_node, node * ranks_per_node + local
            if node != own_node:
                out[source] += at_node[source, node]
                back[forwarder] += at_node[source, node]
            elsewhere = at_rank[source, node].clone()
            elsewhere[local] = 0
            out[forwarder] += elsewhere.sum()
            back[first : first + ranks_per_node] += elsewhere
    return RowsOut(dispatch=out, combine=back)


def two_hop_bytes(shape: Shape, ranks_per_node: int, num_sets: int) -> dict[str, float]:
    """Bytes that leave the busiest rank in ``dispatch``, ``combine`` and both (``pair``), mean over the input sets."""
    found: dict[str, list[float]] = {"dispatch": [], "combine": [], "pair": []}
    for seed in range(num_sets):
        wanted = torch.stack([ranks_of(shape, choices(shape, rank, seed)) for rank in range(shape.num_ranks)])
        rows = two_hop_rows(wanted, ranks_per_node)
        out = float(rows.dispatch.max()) * shape.dispatch_row_bytes
        back = float(rows.combine.max()) * shape.combine_row_bytes
        for name, value in (("dispatch", out), ("combine", back), ("pair", out + back)):
            found[name].append(value)
    return {name: statistics.mean(values) for name, values in found.items()}
