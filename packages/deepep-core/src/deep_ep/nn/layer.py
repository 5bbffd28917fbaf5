"""A mixture-of-experts layer whose experts live on several ranks, and the same layer in one process.

Symbols: ``T`` tokens of this rank, ``H`` hidden size, ``L`` experts of this rank, ``M`` rows per expert, ``N`` ranks.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from ..errors import ArgumentError
from . import functional
from .check import dequantise
from .experts import Experts
from .gate import Gate, Routing

if TYPE_CHECKING:
    from ..buffer import Buffer


class LocalMoELayer(nn.Module):
    """Gate and all experts in one process, in the parameters' dtype: ``[T, H] -> [T, H]``."""

    def __init__(self, gate: Gate, experts: Experts) -> None:
        super().__init__()
        self.gate, self.experts = gate, experts

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        routing = self.gate(x)
        y: torch.Tensor = self.experts(x, routing.topk_idx, routing.topk_weights)
        return y


class MoELayer(nn.Module):
    """Gate here, experts spread over the ranks of a buffer.

    Args:
        buffer: serves normal mode for `forward`, low-latency mode for `low_latency`.
        gate: the same parameters on every rank.
        experts: this rank's: ``gate.num_experts / N`` of them, from ``rank * that`` on.
        max_tokens: the most tokens a rank sends in low-latency mode; 0 if that mode is not used.

    Gradients: the experts' are complete on their rank; the gate's are this rank's share, to be summed over ranks.
    """

    def __init__(self, buffer: Buffer, gate: Gate, experts: Experts, *, max_tokens: int = 0) -> None:
        super().__init__()
        held = gate.num_experts / buffer.group_size
        if experts.num_experts != held or experts.first_expert != held * buffer.rank:
            raise ArgumentError(
                f"rank {buffer.rank} of {buffer.group_size} was given {experts.num_experts} experts from number "
                f"{experts.first_expert} on; the gate's {gate.num_experts} experts make {held:g} per rank, from number "
                f"{held * buffer.rank:g} on."
            )
        self.buffer, self.gate, self.experts, self.max_tokens = buffer, gate, experts, max_tokens

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """bf16 ``[T, H] -> [T, H]`` in normal mode. Collective, forward and backward."""
        return self.routed(x, self.gate(x))

    def routed(self, x: torch.Tensor, routing: Routing) -> torch.Tensor:
        """`forward` with a routing that is already known."""
        arrived = functional.dispatch(
            self.buffer, x, routing.topk_idx, routing.topk_weights, num_experts=self.gate.num_experts
        )
        y = self.experts(arrived.recv_x, arrived.recv_topk_idx, arrived.recv_topk_weights)
        return functional.combine(self.buffer, y.to(torch.bfloat16), arrived.handle)

    @torch.no_grad()
    def low_latency(self, x: torch.Tensor, *, use_fp8: bool = False) -> LowLatencyStep:
        """Send bf16 ``[T, H]`` in low-latency mode and return at once. Collective; without gradients.

        Whatever is done before `LowLatencyStep.compute` overlaps with the transfer.
        """
        routing = self.gate(x)
        recv_x, _, handle, _, receive = self.buffer.low_latency_dispatch(
            x,
            routing.topk_idx,
            self.max_tokens,
            self.gate.num_experts,
            use_fp8=use_fp8,
            return_recv_hook=True,
        )
        return LowLatencyStep(layer=self, routing=routing, recv_x=recv_x, handle=handle, receive=receive)


@dataclass(kw_only=True)
class LowLatencyStep:
    """One low-latency pass through a layer on its way; call `compute`, then `result`.

    Example, two micro-batches whose attention hides the transfers::

        step = layer.low_latency(a)         # a's rows are on their way
        b = attention(b)
        step.compute()                      # a's rows have arrived: experts, then the way back begins
        other = layer.low_latency(b)
        out_a = step.result()
    """

    layer: MoELayer
    routing: Routing
    recv_x: Any
    handle: tuple[Any, ...]
    receive: Callable[[], None] | None
    combined: torch.Tensor | None = None

    @torch.no_grad()
    def compute(self) -> None:
        """Wait for the rows, run the experts on them and send the outputs back. Collective; returns at once."""
        if self.combined is not None:
            return
        self._arrive()
        rows = dequantise(*self.recv_x) if isinstance(self.recv_x, tuple) else self.recv_x
        y = self.layer.experts.expert_major(rows).to(torch.bfloat16)
        self.combined, _, self.receive = self.layer.buffer.low_latency_combine(
            y, self.routing.topk_idx, self.routing.topk_weights, self.handle, return_recv_hook=True
        )

    def result(self) -> torch.Tensor:
        """bf16 ``[T, H]``, the weighted sum over this rank's tokens' experts."""
        self.compute()
        assert self.combined is not None
        self._arrive()
        return self.combined

    def _arrive(self) -> None:
        if self.receive is not None:
            self.receive()
            self.receive = None
