"""The two plain ways to do the same work, with what torch.distributed has: the rivals of every table.

Both are given the counts beforehand, as a cached dispatch is.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist

from .bench_data import InputSet, Shape


class AllToAll:
    """Rows sorted by destination rank, one copy for each rank, exchanged by one all-to-all; combine adds in float32."""

    name = "all-to-all"

    def __init__(self, group: dist.ProcessGroup, rank: int, shape: Shape) -> None:
        self.group, self.rank, self.shape = group, rank, shape
        self._plans: dict[int, tuple[torch.Tensor, list[int], list[int]]] = {}

    def prepare(self, inputs: InputSet, num_from_each_rank: list[int]) -> None:
        """Fix what a cached dispatch knows: which token goes where and how many rows come from each rank."""
        _, token = inputs.in_rank.t().nonzero(as_tuple=True)
        self._plans[inputs.seed] = (token, inputs.in_rank.sum(0).tolist(), num_from_each_rank)

    def dispatch(self, inputs: InputSet) -> Any:
        token, to_each, from_each = self._plans[inputs.seed]
        parts = inputs.sent if isinstance(inputs.sent, tuple) else (inputs.sent,)
        received = tuple(self._exchange(part.index_select(0, token), to_each, from_each) for part in parts)
        return received if len(received) > 1 else received[0]

    def combine(self, inputs: InputSet) -> torch.Tensor:
        token, to_each, from_each = self._plans[inputs.seed]
        assert inputs.rival_out is not None
        back = self._exchange(inputs.rival_out, from_each, to_each)
        total = torch.zeros(inputs.x.shape, device=back.device)
        return total.index_add_(0, token, back.float()).to(torch.bfloat16)

    def egress_rows(self, inputs: InputSet) -> int:
        to_each = self._plans[inputs.seed][1]
        return sum(to_each) - to_each[self.rank]

    def _exchange(self, rows: torch.Tensor, to_each: list[int], from_each: list[int]) -> torch.Tensor:
        received = torch.empty(sum(from_each), *rows.shape[1:], dtype=rows.dtype, device=rows.device)
        if self.shape.num_ranks == 1:
            return received.copy_(rows)
        # e4m3 is no type that transports know; bytes are.
        as_sent = rows.view(torch.uint8) if rows.element_size() == 1 else rows
        target = received.view(torch.uint8) if rows.element_size() == 1 else received
        dist.all_to_all_single(target, as_sent.contiguous(), from_each, to_each, group=self.group)
        return received


class AllGatherReduceScatter:
    """Every row to every rank; combine sums whole matrices in bf16. Placing rows by expert would cost extra."""

    name = "all-gather + reduce-scatter"

    def __init__(self, group: dist.ProcessGroup, rank: int, shape: Shape) -> None:
        self.group, self.rank, self.shape = group, rank, shape
        # Newer torch has these collectives under new names and warns about the old ones.
        self._gather: Callable[..., Any] = getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor
        self._scatter: Callable[..., Any] = getattr(dist, "reduce_scatter_single", None) or dist.reduce_scatter_tensor
        self._partials: torch.Tensor | None = None

    def dispatch(self, inputs: InputSet) -> Any:
        parts = inputs.sent if isinstance(inputs.sent, tuple) else (inputs.sent,)
        received = tuple(self._everything(part) for part in parts)
        return received if len(received) > 1 else received[0]

    def combine(self, inputs: InputSet) -> torch.Tensor:
        if self._partials is None:
            self._partials = torch.ones(
                self.shape.num_ranks * self.shape.tokens,
                self.shape.hidden,
                dtype=torch.bfloat16,
                device=inputs.x.device,
            )
        total = torch.empty_like(inputs.x)
        self._scatter(total, self._partials, group=self.group)
        return total

    def egress_rows(self, inputs: InputSet) -> int:
        return (self.shape.num_ranks - 1) * self.shape.tokens

    def _everything(self, part: torch.Tensor) -> torch.Tensor:
        gathered = torch.empty(
            self.shape.num_ranks * part.shape[0], *part.shape[1:], dtype=part.dtype, device=part.device
        )
        is_byte = part.element_size() == 1
        self._gather(
            gathered.view(torch.uint8) if is_byte else gathered,
            part.contiguous().view(torch.uint8) if is_byte else part.contiguous(),
            group=self.group,
        )
        return gathered
