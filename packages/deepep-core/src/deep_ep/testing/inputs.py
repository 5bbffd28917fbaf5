"""Inputs of generated cases: rows, scales, biases and expert outputs of every rank, from a few integers.

Any rank can build the inputs of all ranks, which is what "gathered" means in these tests: nothing has to be sent.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property, lru_cache

import numpy as np
import numpy.typing as npt

from .formats import Bits8, Bits16, Float32, bf16_to_float32, float32_to_bf16, round_to_bf16
from .oracle import LowLatencyOracle, NormalOracle
from .routing import Routing

_FACTORS = (1.0, -1.0, 1.5, 1.375 * 2.0**-18, -0.8125 * 2.0**-18, 2.0**-9)
_FACTOR_SHARES = (0.3, 0.3, 0.1, 0.1, 0.1, 0.1)


@dataclass(frozen=True, kw_only=True)
class Case:
    """One multi-rank case: a routing and rows of a hidden size.

    Attributes:
        routing: who chooses what.
        hidden: columns.
        ranks_per_node: virtual nodes of that many ranks; one node if ``None``.
    """

    routing: Routing
    hidden: int
    ranks_per_node: int | None = None

    @property
    def num_ranks(self) -> int:
        return self.routing.num_ranks

    def num_tokens(self, rank: int) -> int:
        return self.routing.num_tokens[rank]

    @cached_property
    def normal(self) -> NormalOracle:
        return NormalOracle(self.routing.all_topk_idx(), self.routing.num_experts, ranks_per_node=self.ranks_per_node)

    def low_latency(self, masked: Sequence[int] = ()) -> LowLatencyOracle:
        return LowLatencyOracle(self.routing.all_topk_idx(), self.routing.num_experts, masked=masked)

    # --- what ranks send: bits

    def x(self, rank: int, *, hidden: int | None = None, salt: int = 0) -> Bits16:
        """Finite bf16 ``[T, H]`` over many exponents; some values are zeros of either sign, some rows tiny or zero."""
        random = self.routing.random(rank, salt=100 + salt)
        shape = (self.num_tokens(rank), self.hidden if hidden is None else hidden)
        values = random.standard_normal(shape) * np.exp2(random.integers(-8, 8, shape))
        values[random.random(shape) < 0.01] = 0.0
        values *= random.choice([1.0, 2.0**-24, 0.0], (len(values), 1), p=[0.8, 0.15, 0.05])
        return float32_to_bf16(np.copysign(values, random.standard_normal(shape)).astype(np.float32))

    def x_codes(self, rank: int, *, hidden: int | None = None, salt: int = 0) -> Bits8:
        """``[T, H]`` bytes of every value, those included that mean NaN: dispatch has to move bytes as they are."""
        shape = (self.num_tokens(rank), self.hidden if hidden is None else hidden)
        return self.routing.random(rank, salt=200 + salt).integers(0, 256, shape, dtype=np.uint8)

    def scales(self, rank: int, num_scales: int, *, salt: int = 0) -> Float32:
        """``[T, S]`` positive float32."""
        random = self.routing.random(rank, salt=300 + salt)
        return random.uniform(1e-3, 2.0, (self.num_tokens(rank), num_scales)).astype(np.float32)

    def packed_scales(self, rank: int, num_scales: int, *, salt: int = 0) -> npt.NDArray[np.int32]:
        """``[T, S]`` int32 of every value."""
        random = self.routing.random(rank, salt=300 + salt)
        return random.integers(-(2**31), 2**31, (self.num_tokens(rank), num_scales), dtype=np.int32)

    def bias(self, rank: int, number: int) -> Bits16:
        """bf16 ``[T, H]``, of the same kind as expert outputs."""
        return float32_to_bf16(self.expert_rows(1000 + number, rank))

    # --- what experts give back: bf16 values as float32

    def expert_rows(self, expert: int, source: int) -> Float32:
        """Output of an expert for each token of a source rank, ``[T, H]``; it depends on expert, rank and token.

        Sums of bf16 numbers of like size are exact in float32, whatever their order. Here large terms cancel and leave
        small ones, so another order, or a rounding too few or too many, changes the result.
        """
        random = np.random.default_rng([self.routing.seed, expert, 4])
        factors = random.choice(_FACTORS, self.hidden, p=_FACTOR_SHARES).astype(np.float32)
        return round_to_bf16(_expert_base(self, source) * factors)

    def rank_rows(self, rank: int) -> Float32:
        """What ``rank`` gives to normal-mode combine, ``[R, H]``: one row for each row it received."""
        outputs = [self.expert_rows(rank, source) for source in range(self.num_ranks)]
        return self.normal.received(rank, outputs)

    def rank_weights(self, rank: int) -> Float32:
        """Weights that ``rank`` gives to normal-mode combine, ``[R, K]``: none of them 0, so that every sum shows."""
        shape = (len(self.normal.sources(rank)), self.routing.num_topk)
        return self.routing.random(rank, salt=500).uniform(0.1, 1.0, shape).astype(np.float32)

    def origin(self, rank: int, row: int) -> str:
        """For messages: where a row that ``rank`` received in normal mode comes from."""
        sources = self.normal.sources(rank)
        if row >= len(sources):
            return "a row beyond the last received one"
        return f"token {sources[row, 1]} of rank {sources[row, 0]}"


@lru_cache(maxsize=64)
def _expert_base(case: Case, source: int) -> Float32:
    return bf16_to_float32(case.x(source, salt=50))
