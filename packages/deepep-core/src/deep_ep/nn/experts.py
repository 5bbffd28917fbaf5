"""The experts: one gated feed-forward network each.

Symbols: ``H`` hidden size, ``F`` width of an expert, ``L`` experts held here, ``R`` rows, ``K`` choices per row,
``M`` rows per expert in the low-latency layout.
"""

from __future__ import annotations

import torch
from torch import nn
from torch.nn import functional as F


class Experts(nn.Module):
    """``L`` networks ``down(silu(gate(x)) * up(x))``.

    Args:
        hidden, width: ``H`` and ``F``.
        num_experts: ``L``.
        first_expert: global number of the first one. Each expert's weights are drawn from its own generator, seeded
            with ``seed`` and its global number, so that any split over ranks holds the same experts.
        seed: of the weights.

    Everything is computed in the parameters' dtype (float32 unless converted).
    """

    def __init__(self, *, hidden: int, width: int, num_experts: int, first_expert: int = 0, seed: int = 0) -> None:
        super().__init__()
        self.hidden, self.width, self.num_experts, self.first_expert = hidden, width, num_experts, first_expert
        gate_up, down = [], []
        for expert in range(first_expert, first_expert + num_experts):
            generator = torch.Generator().manual_seed(seed * 1_000_003 + expert)
            gate_up.append(torch.randn(2 * width, hidden, generator=generator) * hidden**-0.5)
            down.append(torch.randn(hidden, width, generator=generator) * width**-0.5)
        self.gate_up = nn.Parameter(torch.stack(gate_up))
        self.down = nn.Parameter(torch.stack(down))

    def forward(self, rows: torch.Tensor, topk_idx: torch.Tensor, topk_weights: torch.Tensor) -> torch.Tensor:
        """The weighted sum of each row's experts held here.

        Args:
            rows: ``[R, H]``, any floating dtype.
            topk_idx: int64 ``[R, K]``, 0 to ``L - 1``, or ``-1`` for a choice that is not held here.
            topk_weights: ``[R, K]``.

        Returns:
            ``[R, H]`` in the parameters' dtype. Connected to all inputs and parameters even if there is no row.
        """
        x = rows.to(self.down.dtype)
        weights = topk_weights.to(self.down.dtype)
        total = torch.zeros_like(x)
        for expert, (gate_up, down) in enumerate(zip(self.gate_up, self.down, strict=True)):
            row, column = torch.nonzero(topk_idx == expert, as_tuple=True)
            # No shortcut for an expert without rows: a rank that leaves the graph here would miss the collective
            # calls of the backward pass, and its peers would wait for it.
            gate, up = F.linear(x.index_select(0, row), gate_up).chunk(2, dim=-1)
            y = F.linear(F.silu(gate) * up, down)
            total = total.index_add(0, row, y * weights[row, column].unsqueeze(-1))
        return total

    def expert_major(self, rows: torch.Tensor) -> torch.Tensor:
        """Each expert applied to its own block of ``[L, M, H]`` rows, unweighted, in the parameters' dtype.

        All ``M`` rows are computed, valid or not: how many are valid is known on the device only, and asking for it
        would make the host wait.
        """
        x = rows.to(self.down.dtype)
        gate, up = torch.bmm(x, self.gate_up.transpose(1, 2)).chunk(2, dim=-1)
        return torch.bmm(F.silu(gate) * up, self.down.transpose(1, 2))
