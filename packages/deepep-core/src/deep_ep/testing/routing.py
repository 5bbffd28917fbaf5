"""Generated routings: which experts each token of each rank chooses.

Everything follows from a few integers, so every rank builds the routing of every rank without asking anybody.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, get_args

import numpy as np
import numpy.typing as npt

Pattern = Literal["uniform", "grouped", "packed", "skewed"]
PATTERNS: tuple[Pattern, ...] = get_args(Pattern)


@dataclass(frozen=True, kw_only=True)
class Routing:
    """Which experts are chosen, and with which weights.

    Attributes:
        num_tokens: tokens of each rank; its length is the number of ranks.
        num_experts: a multiple of the number of ranks.
        num_topk: columns. A token never chooses an expert twice, so more columns than experts stay ``-1``.
        pattern: ``uniform``: any experts. ``grouped``: experts of at most half of the ranks for each token, as
            group-limited gates choose. ``packed``: experts of one rank for each token. ``skewed``: experts of rank
            ``target`` for all tokens of all ranks.
        target: see ``skewed``.
        drop_percent: so many of the choices become ``-1``, wherever they stand.
        seed: of everything random.
    """

    num_tokens: tuple[int, ...]
    num_experts: int
    num_topk: int
    pattern: Pattern = "uniform"
    target: int = 0
    drop_percent: int = 0
    seed: int = 0

    def __post_init__(self) -> None:
        if self.num_experts % self.num_ranks:
            raise ValueError(f"{self.num_experts} experts cannot be divided among {self.num_ranks} ranks.")

    @property
    def num_ranks(self) -> int:
        return len(self.num_tokens)

    @property
    def num_local_experts(self) -> int:
        return self.num_experts // self.num_ranks

    @property
    def has_empty_rank(self) -> bool:
        return 0 in self.num_tokens

    @property
    def is_maximally_skewed(self) -> bool:
        """Whether there are choices and all of them fall on one rank of several."""
        chosen = np.unique(np.concatenate([i[i >= 0] for i in self.all_topk_idx()]) // self.num_local_experts)
        return self.num_ranks > 1 and len(chosen) == 1

    def topk_idx(self, rank: int) -> npt.NDArray[np.int64]:
        """``[T, K]``: global experts of the tokens of ``rank``, ``-1`` for an unused choice."""
        random = self.random(rank, salt=1)
        num_tokens, num_topk = self.num_tokens[rank], self.num_topk
        allowed = self._allowed(random, num_tokens)
        # The allowed experts of each token in random order, the others behind them.
        order = np.argsort(np.where(allowed, random.random(allowed.shape), 2.0), axis=1)
        chosen = np.take_along_axis(np.where(allowed, np.arange(self.num_experts), -1), order, axis=1)
        chosen = np.pad(chosen, ((0, 0), (0, max(0, num_topk - self.num_experts))), constant_values=-1)[:, :num_topk]
        chosen[random.random(chosen.shape) * 100 < self.drop_percent] = -1
        return np.ascontiguousarray(random.permuted(chosen, axis=1), dtype=np.int64)

    def topk_weights(self, rank: int) -> npt.NDArray[np.float32]:
        """``[T, K]``, between 1/8 and 1. Half of them are one of three numbers, so that weighted terms can cancel."""
        random, shape = self.random(rank, salt=2), (self.num_tokens[rank], self.num_topk)
        repeated, free = random.choice([0.3, 0.55, 0.7], shape), random.uniform(0.125, 1.0, shape)
        return np.where(random.random(shape) < 0.5, repeated, free).astype(np.float32)

    def all_topk_idx(self) -> list[npt.NDArray[np.int64]]:
        return [self.topk_idx(rank) for rank in range(self.num_ranks)]

    def all_topk_weights(self) -> list[npt.NDArray[np.float32]]:
        return [self.topk_weights(rank) for rank in range(self.num_ranks)]

    def random(self, rank: int, *, salt: int) -> np.random.Generator:
        """Numbers that depend on seed, rank and purpose only."""
        return np.random.default_rng([self.seed, rank, salt])

    def _allowed(self, random: np.random.Generator, num_tokens: int) -> npt.NDArray[np.bool_]:
        """``[T, E]``: the experts a token may choose."""
        num_ranks = self.num_ranks
        if self.pattern == "uniform":
            ranks = np.ones((num_tokens, num_ranks), dtype=bool)
        elif self.pattern == "skewed":
            ranks = np.tile(np.arange(num_ranks) == self.target % num_ranks, (num_tokens, 1))
        else:
            num_groups = 1 if self.pattern == "packed" else (num_ranks + 1) // 2
            places = np.argsort(random.random((num_tokens, num_ranks)), axis=1)
            ranks = places < num_groups
        return np.repeat(ranks, self.num_local_experts, axis=1)


def uneven_tokens(num_ranks: int, most: int, *, seed: int = 0) -> tuple[int, ...]:
    """Between 1 and ``most`` tokens for each rank, different ones, the same on every rank for one seed."""
    return tuple(int(n) for n in np.random.default_rng([seed, num_ranks, 3]).integers(1, most + 1, num_ranks))
