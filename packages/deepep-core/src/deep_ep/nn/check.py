"""What the layer has to give, computed in one process, and how far rounding may take the distributed layer from it.

Everything is computed in float64 from the bf16 rows that the ranks started with. The distributed layer differs in two
ways, and the tolerance of every element is the sum of what they can cause:

- *Transport.* Partial sums are rounded to bf16 where the numerical contract says so. A rounding of ``v`` moves it by at
  most ``|v| / 256``; which values are rounded is known, so the bound follows element by element: each rank's partial
  sum, each node's if there are several nodes, and the total.
- *Float32.* Gate and experts are computed in float32, with sums in another order. How much that is, is measured: the
  same one-process computation is done in float32 too, and `NOISE_FACTOR` times its largest deviation from float64 is
  allowed. Gradients of parameters see rows that are exact, so they get nothing else.
"""

from __future__ import annotations

import copy
from dataclasses import dataclass

import torch

from .experts import Experts
from .gate import Gate

BF16_ROUNDING = 2.0**-8  # 8 significant bits: rounding to nearest moves a value by at most this fraction of it
SECOND_ORDER = 1.02  # later roundings act on values that earlier ones moved: three in a row stay below (1 + 2^-8)^3
NOISE_FACTOR = 16.0  # sums in another order (and on another device) may deviate more than the sample in float32 did


@dataclass(frozen=True, kw_only=True)
class Difference:
    """How far a tensor is from what was expected.

    Attributes:
        max_error: the largest absolute difference.
        max_share: the largest share of an element's tolerance that was used; agreement means at most 1.
        first_row: first row (index along dimension 0) with an element out of tolerance; ``None`` if there is none.
        actual, expected: of that row's first such element.
    """

    max_error: float
    max_share: float
    first_row: int | None = None
    actual: float = 0.0
    expected: float = 0.0

    @property
    def agrees(self) -> bool:
        return self.first_row is None


@dataclass(frozen=True, kw_only=True)
class Expected:
    """``value`` and ``tolerance``, float64 of equal shape."""

    value: torch.Tensor
    tolerance: torch.Tensor

    def difference(self, actual: torch.Tensor) -> Difference:
        """Compare a tensor of the same shape. NaN agrees with nothing."""
        if actual.shape != self.value.shape:
            raise ValueError(f"shape {tuple(actual.shape)} to be compared with {tuple(self.value.shape)}")
        if actual.numel() == 0:
            return Difference(max_error=0.0, max_share=0.0)
        error = (actual.to(self.value) - self.value).abs().nan_to_num(nan=float("inf"))
        share = torch.where(error == 0, 0.0, error / self.tolerance)
        bad = (share > 1).flatten().nonzero().flatten()
        if bad.numel() == 0:
            return Difference(max_error=float(error.max()), max_share=float(share.max()))
        at = int(bad[0])
        return Difference(
            max_error=float(error.max()),
            max_share=float(share.max()),
            first_row=at // (actual.numel() // actual.shape[0]),
            actual=float(actual.flatten()[at]),
            expected=float(self.value.flatten()[at]),
        )


@dataclass(kw_only=True)
class _Pass:
    """One computation of the layer in one dtype; lists are indexed by rank."""

    output: torch.Tensor
    partials: list[torch.Tensor]
    weighted: torch.Tensor  # sum over choices of weight times |expert output|
    gradients: dict[str, torch.Tensor]
    row_gradients: list[torch.Tensor]  # what each rank's experts send back to the token
    gate_row_gradient: torch.Tensor | None


class OneProcessCheck:
    """The layer of all ranks in one process.

    Args:
        gate: as every rank has it.
        experts: all of them.
        num_ranks: how the experts are spread, in equal blocks: it decides which sums are rounded.
        ranks_per_node: as in the numerical contract; all ranks if ``None``.
    """

    def __init__(self, gate: Gate, experts: Experts, *, num_ranks: int, ranks_per_node: int | None = None) -> None:
        self.gate, self.experts = gate, experts
        self.num_ranks, self.ranks_per_node = num_ranks, ranks_per_node or num_ranks

    def misrouted(self, x: torch.Tensor, topk_idx: torch.Tensor) -> torch.Tensor:
        """Tokens whose choice of experts is wrong: int64 numbers, ascending.

        A choice that differs from the one in float64 is accepted only where float32 cannot tell the candidates apart.

        Args:
            x: bf16 ``[T, H]``.
            topk_idx: int64 ``[T, K]``, as the ranks chose.
        """
        with torch.no_grad():
            scores32 = self.gate.scores(x)
            exact = copy.deepcopy(self.gate).double()
            scores64 = exact.scores(x)
            chosen, margin = exact.choose(scores64)
            noise = NOISE_FACTOR * float((scores32 - scores64).abs().max()) if x.shape[0] else 0.0
        differs = (chosen.sort(-1).values != topk_idx.sort(-1).values).any(-1)
        # A group's score is the sum of two, and both sides of a comparison are off: four times the noise of one score.
        return (differs & (margin > 4 * noise)).nonzero().flatten()

    def normal(
        self, x: torch.Tensor, topk_idx: torch.Tensor, grad_output: torch.Tensor | None = None
    ) -> dict[str, Expected]:
        """Normal mode.

        Args:
            x: bf16 ``[T, H]``, the tokens of all ranks by rank.
            topk_idx: int64 ``[T, K]``, the ranks' choices (see `misrouted`).
            grad_output: bf16 ``[T, H]``, the gradient that flows into the output.

        Returns:
            ``output``, and with ``grad_output`` also ``grad x``, ``grad gate`` ``[E, H]``, ``grad gate_up``
            ``[E, 2F, H]`` and ``grad down`` ``[E, H, F]``, summed over all tokens.
        """
        exact = self._compute(torch.float64, x, topk_idx, grad_output)
        rough = self._compute(torch.float32, x, topk_idx, grad_output)
        found = {
            "output": Expected(
                value=exact.output, tolerance=self._sum_rounding(exact.partials) + _noise(exact.output, rough.output)
            )
        }
        if grad_output is None:
            return found
        for name, value in exact.gradients.items():
            tolerance = torch.full_like(value, _noise(value, rough.gradients[name]))
            if name == "grad x":
                assert exact.gate_row_gradient is not None
                # The row has two consumers, experts and gate; either gradient and their sum are bf16 tensors.
                tolerance += self._sum_rounding(exact.row_gradients)
                tolerance += SECOND_ORDER * BF16_ROUNDING * (exact.gate_row_gradient.abs() + value.abs())
                # The experts' gradient of the row is rounded on its way out of the experts' rank: the same rounding
                # that _sum_rounding counts for the rank's partial sum.
            found[name] = Expected(value=value, tolerance=tolerance)
        return found

    @torch.no_grad()
    def low_latency(self, x: torch.Tensor, topk_idx: torch.Tensor, *, use_fp8: bool) -> Expected:
        """Low-latency mode: the output for bf16 ``[T, H]`` rows and ``[T, K]`` choices.

        With ``use_fp8`` the experts see the rows cast to e4m3 and back; the gate sees them as they are.
        """
        rows = dequantise(*quantise_fp8_blocks(x)) if use_fp8 else x
        exact = self._compute(torch.float64, x, topk_idx, None, rows)
        rough = self._compute(torch.float32, x, topk_idx, None, rows)
        tolerance = (
            _rounding(exact.weighted)
            + sum(_rounding(p.abs()) for p in exact.partials)
            + _rounding(exact.output.abs())
            + _noise(exact.output, rough.output)
        )
        return Expected(value=exact.output, tolerance=tolerance)

    def _sum_rounding(self, partials: list[torch.Tensor]) -> torch.Tensor:
        """What rounding the ranks' partial sums, the nodes' and the total can add up to."""
        tolerance = _rounding(torch.stack(partials).sum(0).abs())
        for partial in partials:
            tolerance += _rounding(partial.abs())
        if self.ranks_per_node < self.num_ranks:
            for first in range(0, self.num_ranks, self.ranks_per_node):
                tolerance += _rounding(torch.stack(partials[first : first + self.ranks_per_node]).sum(0).abs())
        return tolerance

    def _compute(
        self,
        dtype: torch.dtype,
        x: torch.Tensor,
        topk_idx: torch.Tensor,
        grad_output: torch.Tensor | None,
        rows: torch.Tensor | None = None,
    ) -> _Pass:
        gate = copy.deepcopy(self.gate).to(dtype)
        experts = copy.deepcopy(self.experts).to(dtype)
        gate_rows = x.detach().to(dtype).requires_grad_(grad_output is not None)
        weights = gate.weigh(gate.scores(gate_rows), topk_idx)
        per_rank = experts.num_experts // self.num_ranks
        gate_up, down = experts.gate_up.unbind(0), experts.down.unbind(0)
        weighted = torch.zeros_like(gate_rows, requires_grad=False)
        leaves, partials = [], []
        for rank in range(self.num_ranks):
            leaf = (x if rows is None else rows).detach().to(dtype).requires_grad_(grad_output is not None)
            partial = torch.zeros_like(leaf)
            for expert in range(rank * per_rank, (rank + 1) * per_rank):
                token, column = torch.nonzero(topk_idx == expert, as_tuple=True)
                first, second = torch.nn.functional.linear(leaf[token], gate_up[expert]).chunk(2, -1)
                y = torch.nn.functional.linear(torch.nn.functional.silu(first) * second, down[expert])
                y = y * weights[token, column].unsqueeze(-1)
                partial = partial.index_add(0, token, y)
                weighted.index_add_(0, token, y.detach().abs())
            leaves.append(leaf)
            partials.append(partial)
        output = torch.stack(partials).sum(0)
        gradients: dict[str, torch.Tensor] = {}
        row_gradients: list[torch.Tensor] = []
        if grad_output is not None:
            wanted = [*leaves, gate_rows, gate.weight, experts.gate_up, experts.down]
            found = list(torch.autograd.grad(output, wanted, grad_output.to(dtype)))
            row_gradients, (of_gate_rows, of_gate, of_gate_up, of_down) = found[: len(leaves)], found[len(leaves) :]
            gradients = {
                "grad x": torch.stack(row_gradients).sum(0) + of_gate_rows,
                "grad gate": of_gate,
                "grad gate_up": of_gate_up,
                "grad down": of_down,
            }
        return _Pass(
            output=output.detach(),
            partials=[p.detach() for p in partials],
            weighted=weighted,
            gradients=gradients,
            row_gradients=row_gradients,
            gate_row_gradient=of_gate_rows if grad_output is not None else None,
        )


def _rounding(magnitude: torch.Tensor) -> torch.Tensor:
    return SECOND_ORDER * BF16_ROUNDING * magnitude


def _noise(exact: torch.Tensor, rough: torch.Tensor) -> float:
    return NOISE_FACTOR * float((rough - exact).abs().max()) if exact.numel() else 0.0


def quantise_fp8_blocks(x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """e4m3 ``[..., H]`` and float32 scales ``[..., H / 128]`` of bf16 rows, as the numerical contract defines them."""
    blocks = x.float().unflatten(-1, (-1, 128))
    amax = blocks.abs().amax(-1, keepdim=True).clamp(min=1e-4)
    # A number divided by a tensor would be computed as its reciprocal times the number: two roundings instead of one.
    quantised = (blocks * (torch.full_like(amax, 448.0) / amax)).clamp(-448.0, 448.0).to(torch.float8_e4m3fn)
    return quantised.flatten(-2), (amax * (1.0 / 448.0)).squeeze(-1)


def dequantise(values: torch.Tensor, scales: torch.Tensor) -> torch.Tensor:
    """float32 rows from e4m3 ``[..., H]`` and float32 scales ``[..., H / 128]``."""
    return (values.float().unflatten(-1, (-1, 128)) * scales.unsqueeze(-1)).flatten(-2)
