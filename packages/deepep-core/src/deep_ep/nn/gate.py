"""The router: which experts a token goes to and with what weight, as DeepSeek-V3 does it.

Symbols: ``T`` tokens, ``H`` hidden size, ``E`` experts, ``K`` choices per token, ``G`` groups of ``E / G`` experts.

Scores are sigmoids. A bias per expert is added to choose, and only to choose: the groups with the largest sum of their
two best biased scores stay, and of their experts the ``K`` with the largest biased scores. The weights are the chosen
experts' scores without the bias, scaled to sum to ``route_scale``.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import nn

from ..errors import ArgumentError


@dataclass(frozen=True, kw_only=True)
class Routing:
    """Where tokens go.

    Attributes:
        topk_idx: int64 ``[T, K]``, in no particular order, all different.
        topk_weights: ``[T, K]`` in the gate's dtype; differentiable.
        scores: ``[T, E]``, the sigmoids.
    """

    topk_idx: torch.Tensor
    topk_weights: torch.Tensor
    scores: torch.Tensor


def select_experts(
    biased_scores: torch.Tensor, *, num_topk: int, num_groups: int = 1, num_selected_groups: int = 1
) -> tuple[torch.Tensor, torch.Tensor]:
    """Group-limited top-k.

    Args:
        biased_scores: ``[T, E]``.
        num_topk, num_groups, num_selected_groups: ``K``, ``G`` and how many groups stay.

    Returns:
        The chosen experts, int64 ``[T, K]``, and the margin ``[T]``: by how much the closest decision was won, be it
        between groups or between experts (infinite if nothing was left out). Two computations of the scores whose
        errors stay below half the margin choose alike.

    Example: four experts in two groups, scores ``.9 .1 | .5 .6``, one group stays, ``K = 1``. The groups score 1.0 and
    1.1, so the second stays and its best, expert 3, is chosen although expert 0 scores higher; the margin is 0.1.
    """
    num_tokens, num_experts = biased_scores.shape
    margin = torch.full((num_tokens,), float("inf"), dtype=biased_scores.dtype, device=biased_scores.device)
    allowed = biased_scores
    if num_selected_groups < num_groups:
        grouped = biased_scores.view(num_tokens, num_groups, num_experts // num_groups)
        group_scores = grouped.topk(min(2, grouped.shape[-1]), dim=-1).values.sum(-1)
        best = group_scores.topk(num_selected_groups + 1, dim=-1)
        margin = torch.minimum(margin, best.values[:, -2] - best.values[:, -1])
        keep = torch.zeros_like(group_scores, dtype=torch.bool)
        keep.scatter_(1, best.indices[:, :num_selected_groups], True)
        allowed = grouped.masked_fill(~keep.unsqueeze(-1), float("-inf")).reshape(num_tokens, num_experts)
    best = allowed.topk(min(num_topk + 1, num_experts), dim=-1)
    if num_topk < num_experts:
        margin = torch.minimum(margin, best.values[:, num_topk - 1] - best.values[:, num_topk])
    return best.indices[:, :num_topk], margin


class Gate(nn.Module):
    """DeepSeek-V3's gate.

    Args:
        hidden, num_experts, num_topk: ``H``, ``E``, ``K``.
        num_groups: ``G``; divides ``E``.
        num_selected_groups: groups that a token may use; together they hold at least ``K`` experts.
        route_scale: what a token's weights sum to.

    The parameters are float32: routing decisions are too sensitive for less. ``bias`` is a buffer, not a parameter:
    `balance` moves it, gradients do not.
    """

    weight: nn.Parameter
    bias: torch.Tensor

    def __init__(
        self,
        *,
        hidden: int,
        num_experts: int,
        num_topk: int,
        num_groups: int = 1,
        num_selected_groups: int = 1,
        route_scale: float = 1.0,
    ) -> None:
        super().__init__()
        if num_groups < 1 or num_experts % num_groups:
            raise ArgumentError(f"{num_experts} experts cannot form {num_groups} equal groups.")
        if not 1 <= num_selected_groups <= num_groups:
            raise ArgumentError(f"num_selected_groups is {num_selected_groups}; accepted: 1 to {num_groups}.")
        if not 1 <= num_topk <= num_experts // num_groups * num_selected_groups:
            raise ArgumentError(
                f"num_topk is {num_topk}; {num_selected_groups} of {num_groups} groups hold "
                f"{num_experts // num_groups * num_selected_groups} experts. Choose fewer or allow more groups."
            )
        self.hidden, self.num_experts, self.num_topk = hidden, num_experts, num_topk
        self.num_groups, self.num_selected_groups, self.route_scale = num_groups, num_selected_groups, route_scale
        self.weight = nn.Parameter(torch.randn(num_experts, hidden) * hidden**-0.5)
        self.register_buffer("bias", torch.zeros(num_experts))

    def scores(self, x: torch.Tensor) -> torch.Tensor:
        """``[T, E]`` sigmoids of ``[T, H]`` rows, in the gate's dtype."""
        return torch.sigmoid(nn.functional.linear(x.to(self.weight.dtype), self.weight))

    def choose(self, scores: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """`select_experts` with this gate's bias and groups."""
        return select_experts(
            scores.detach() + self.bias,
            num_topk=self.num_topk,
            num_groups=self.num_groups,
            num_selected_groups=self.num_selected_groups,
        )

    def weigh(self, scores: torch.Tensor, topk_idx: torch.Tensor) -> torch.Tensor:
        """``[T, K]`` weights of chosen experts; every row sums to ``route_scale``."""
        chosen = scores.gather(1, topk_idx)
        return chosen / chosen.sum(-1, keepdim=True) * self.route_scale

    def forward(self, x: torch.Tensor) -> Routing:
        """Route ``[T, H]`` rows of any floating dtype. Local; the host does not wait."""
        scores = self.scores(x)
        topk_idx, _ = self.choose(scores)
        return Routing(topk_idx=topk_idx, topk_weights=self.weigh(scores, topk_idx), scores=scores)

    @torch.no_grad()
    def balance(self, num_tokens_per_expert: torch.Tensor, *, speed: float = 0.001) -> None:
        """Raise the bias of experts below the mean load and lower it above, by ``speed``.

        Args:
            num_tokens_per_expert: ``[E]``, over all ranks.
            speed: the step, in units of a score.
        """
        load = num_tokens_per_expert.to(self.bias.dtype)
        self.bias += speed * torch.sign(load.mean() - load)
