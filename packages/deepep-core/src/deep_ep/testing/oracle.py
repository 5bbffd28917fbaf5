"""What must arrive and what must be summed: plain arithmetic over the inputs of all ranks, gathered in one place.

This is the yardstick of every backend, the reference backend included, and shares no code with any of them. It follows
the numerical contract literally, in numpy float32, so that each addition and each product is rounded once.

Symbols: ``T`` tokens of a rank, ``K`` choices, ``H`` hidden, ``N`` ranks, ``D`` nodes, ``E`` experts, ``L = E / N``,
``R`` received rows.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, Literal

import numpy as np
import numpy.typing as npt

from .formats import Float32, round_to_bf16

Ints = npt.NDArray[np.int64]


class _Choices:
    def __init__(self, topk_idx: Sequence[npt.NDArray[Any]], num_experts: int) -> None:
        """Args: ``topk_idx``: ``[T, K]`` of each rank, ``-1`` unused."""
        self.topk_idx = [np.asarray(indices).astype(np.int64) for indices in topk_idx]
        self.num_ranks = len(self.topk_idx)
        self.num_experts = num_experts
        self.num_local_experts = num_experts // self.num_ranks

    def num_tokens(self, rank: int) -> int:
        return int(self.topk_idx[rank].shape[0])

    def rank_of_choice(self, rank: int) -> Ints:
        """``[T, K]``: the rank that holds the chosen expert, ``-1`` for none."""
        indices = self.topk_idx[rank]
        return np.where(indices >= 0, indices // self.num_local_experts, -1)


class NormalOracle(_Choices):
    """Normal mode: rows by source rank, then by source token; sums over ranks.

    Args:
        topk_idx: ``[T, K]`` of each rank, ``-1`` unused.
        num_experts: ``E``.
        ranks_per_node: neighbours in one node; all ranks without it.
    """

    def __init__(
        self, topk_idx: Sequence[npt.NDArray[Any]], num_experts: int, *, ranks_per_node: int | None = None
    ) -> None:
        super().__init__(topk_idx, num_experts)
        self.ranks_per_node = ranks_per_node if ranks_per_node is not None else self.num_ranks
        self.num_nodes = self.num_ranks // self.ranks_per_node

    # --- layout

    def is_token_in_rank(self, rank: int) -> npt.NDArray[np.bool_]:
        """``[T, N]``: whether a token chose at least one expert of that rank."""
        ranks = self.rank_of_choice(rank)
        return np.stack([(ranks == destination).any(axis=1) for destination in range(self.num_ranks)], axis=1)

    def num_tokens_per_rank(self, rank: int) -> Ints:
        """``[N]``."""
        return self.is_token_in_rank(rank).sum(axis=0)

    def num_tokens_per_node(self, rank: int) -> Ints:
        """``[D]``: a token counts once for a node that holds at least one of its experts."""
        by_node = self.is_token_in_rank(rank).reshape(-1, self.num_nodes, self.ranks_per_node)
        return by_node.any(axis=2).sum(axis=0)

    def num_tokens_per_expert(self, rank: int) -> Ints:
        """``[E]``."""
        indices = self.topk_idx[rank]
        return np.bincount(indices[indices >= 0], minlength=self.num_experts)

    # --- dispatch

    def sources(self, rank: int) -> Ints:
        """``[R, 2]``: source rank and source token of each row that ``rank`` receives."""
        parts = []
        for source in range(self.num_ranks):
            tokens = np.flatnonzero(self.is_token_in_rank(source)[:, rank])
            parts.append(np.stack([np.full_like(tokens, source), tokens], axis=1))
        return np.concatenate(parts)

    def received(self, rank: int, rows: Sequence[npt.NDArray[Any]]) -> npt.NDArray[Any]:
        """What ``rank`` receives of a tensor ``[T, ...]`` that each rank has: ``[R, ...]``."""
        return np.concatenate([part[self.is_token_in_rank(s)[:, rank]] for s, part in enumerate(rows)])

    def received_topk_idx(self, rank: int) -> Ints:
        """``[R, K]``: experts of ``rank``, counted from its first; ``-1`` elsewhere."""
        local = self.received(rank, self.topk_idx) - rank * self.num_local_experts
        return np.where((local >= 0) & (local < self.num_local_experts), local, -1)

    def received_topk_weights(self, rank: int, topk_weights: Sequence[Float32]) -> Float32:
        """``[R, K]``, 0 where the choice is not an expert of ``rank``."""
        weights = self.received(rank, topk_weights)
        return np.where(self.received_topk_idx(rank) >= 0, weights, np.float32(0))

    def num_received_per_expert(self, rank: int, alignment: int = 1) -> list[int]:
        """``L`` counts, each rounded up to a multiple of ``alignment``."""
        total = sum(self.num_tokens_per_expert(source) for source in range(self.num_ranks))
        first = rank * self.num_local_experts
        local = np.asarray(total)[first : first + self.num_local_experts]
        return [int(-(-count // alignment) * alignment) for count in local]

    def rank_prefix_matrix(self) -> Ints:
        """``[N, N]``: row ``s``, column ``d``: rows that ranks 0 to ``s`` together send to ``d``."""
        sent = np.stack([self.num_tokens_per_rank(source) for source in range(self.num_ranks)])
        return np.cumsum(sent, axis=0)

    # --- combine

    def combine(self, rank: int, rows: Sequence[Float32], biases: Sequence[Float32] = ()) -> Float32:
        """``[T, H]`` as float32 values that are bf16.

        Args:
            rows: bf16 values ``[R, H]`` of each rank, in the order in which dispatch delivered them.
            biases: bf16 values ``[T, H]`` of ``rank``.
        """
        total = np.zeros((self.num_tokens(rank), rows[0].shape[1]), dtype=np.float32)
        for bias in biases:
            total = total + bias
        if self.num_nodes == 1:
            return round_to_bf16(self._add_ranks(total, rank, range(self.num_ranks), rows))
        for partial in self._node_partials(rank, rows):
            total = total + round_to_bf16(partial)
        return round_to_bf16(total)

    def combine_weights(self, rank: int, weights: Sequence[Float32]) -> Float32:
        """``[T, K]``: the sums of ``weights`` (``[R, K]`` of each rank), never rounded to bf16."""
        total = np.zeros((self.num_tokens(rank), weights[0].shape[1]), dtype=np.float32)
        if self.num_nodes == 1:
            return self._add_ranks(total, rank, range(self.num_ranks), weights)
        for partial in self._node_partials(rank, weights):
            total = total + partial
        return total

    def _node_partials(self, rank: int, rows: Sequence[Float32]) -> list[Float32]:
        shape = (self.num_tokens(rank), rows[0].shape[1])
        per_node = self.ranks_per_node
        return [
            self._add_ranks(np.zeros(shape, dtype=np.float32), rank, range(n * per_node, (n + 1) * per_node), rows)
            for n in range(self.num_nodes)
        ]

    def _add_ranks(self, total: Float32, source: int, ranks: range, rows: Sequence[Float32]) -> Float32:
        """Add the rows that ``ranks`` hold for the tokens of ``source``, ascending."""
        total = total.copy()
        held = self.is_token_in_rank(source)
        for rank in ranks:
            first = sum(int(self.is_token_in_rank(earlier)[:, rank].sum()) for earlier in range(source))
            count = int(held[:, rank].sum())
            total[held[:, rank]] += rows[rank][first : first + count]
        return total


class LowLatencyOracle(_Choices):
    """Low-latency mode: a token is one row at each expert that it names; weighted sums over choices.

    Args:
        topk_idx: ``[T, K]`` of each rank, ``-1`` unused.
        num_experts: ``E``.
        masked: ranks that are left out: they send nothing, and nothing goes to their experts.
    """

    def __init__(self, topk_idx: Sequence[npt.NDArray[Any]], num_experts: int, *, masked: Sequence[int] = ()) -> None:
        super().__init__(topk_idx, num_experts)
        for rank, indices in enumerate(self.topk_idx):
            if rank in masked:
                indices[:] = -1
            indices[np.isin(self.rank_of_choice(rank), masked)] = -1

    def tokens(self, rank: int, local_expert: int, source: int) -> Ints:
        """Tokens of ``source`` that chose this expert of ``rank``, ascending."""
        expert = rank * self.num_local_experts + local_expert
        return np.flatnonzero((self.topk_idx[source] == expert).any(axis=1))

    def num_received(self, rank: int) -> list[int]:
        """Rows of each local expert."""
        return [
            sum(len(self.tokens(rank, local_expert, source)) for source in range(self.num_ranks))
            for local_expert in range(self.num_local_experts)
        ]

    def combine(
        self,
        rank: int,
        expert_rows: Callable[[int, int], Float32],
        topk_weights: Float32,
        *,
        reduce: Literal["rank", "expert"],
    ) -> Float32:
        """``[T, H]`` as float32 values that are bf16.

        Args:
            expert_rows: for an expert and a source rank, the expert's bf16 output for every token of that rank (used
                only for tokens that chose it): ``[T, H]``.
            topk_weights: ``[T, K]`` of ``rank``.
            reduce: which sums are rounded: ``expert``: none but the last; ``rank``: each rank's partial sum too.
        """
        indices, ranks = self.topk_idx[rank], self.rank_of_choice(rank)
        hidden = expert_rows(0, rank).shape[1]
        products = np.zeros((*indices.shape, hidden), dtype=np.float32)
        for expert in np.unique(indices[indices >= 0]).tolist():
            token, column = np.nonzero(indices == expert)
            products[token, column] = topk_weights[token, column, None] * expert_rows(expert, rank)[token]
        groups = [indices >= 0] if reduce == "expert" else [ranks == r for r in range(self.num_ranks)]
        total = np.zeros((len(indices), hidden), dtype=np.float32)
        for group in groups:
            partial = np.zeros_like(total)
            for k in range(indices.shape[1]):
                partial[group[:, k]] += products[group[:, k], k]
            total = total + (partial if reduce == "expert" else round_to_bf16(partial))
        return round_to_bf16(total)

    def magnitude(self, rank: int, expert_rows: Callable[[int, int], Float32], topk_weights: Float32) -> Float32:
        """``[T, H]``: sum of ``|weight * row|``, what relative errors of lossy formats are measured against."""
        indices = self.topk_idx[rank]
        total = np.zeros((len(indices), expert_rows(0, rank).shape[1]), dtype=np.float32)
        for expert in np.unique(indices[indices >= 0]).tolist():
            token, column = np.nonzero(indices == expert)
            total[token] += np.abs(topk_weights[token, column, None] * expert_rows(expert, rank)[token])
        return total
