"""Inputs of the benchmark, and what has to come out, in plain arithmetic.

Symbols: ``T`` tokens of a rank, ``K`` choices, ``H`` hidden size, ``N`` ranks, ``E`` experts, ``L = E / N``.

A row's values are a hash of its rank, token and column: as good as random for whoever moves it, and computable wherever
it arrives, so that checking needs no second transport for the rows. Peers' choices are computed the same way.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any, Literal

import torch

from .. import nn

RowType = Literal["bf16", "fp8"]
Routing = Literal["uniform", "skewed"]
_BLOCK_ROWS = 1024  # rows hashed at a time, to bound memory


@dataclass(frozen=True, kw_only=True)
class Shape:
    """What is moved.

    ``tokens`` is per rank; ``dtype`` that of dispatched rows (combine moves bf16). ``routing``: ``skewed`` sends half
    of all rows to rank 0. Experts form ``num_groups`` equal groups; a token's experts come from the ``num_topk_groups``
    whose two best experts together please it most, as DeepSeek-V3's gate chooses. 1 and 1: any experts.
    """

    mode: Literal["normal", "low_latency"]
    tokens: int
    hidden: int
    topk: int
    experts: int
    dtype: RowType
    num_ranks: int
    routing: Routing = "uniform"
    num_groups: int = 1
    num_topk_groups: int = 1

    @property
    def skewed_share(self) -> float:
        """Share of the tokens that choose experts of rank 0 only, so that rank 0 is sent half of all rows.

        A token that chooses uniformly goes to ``u`` ranks on average, ``u / N`` of them rank 0. With a share ``p`` of
        the others: ``p + (1 - p) u / N = (p + (1 - p) u) / 2``.
        """
        if self.routing == "uniform":
            return 0.0
        spread = self.num_ranks * (1 - (1 - 1 / self.num_ranks) ** self.topk)
        missing = max(0.0, spread / 2 - spread / self.num_ranks)
        return missing / (missing + 0.5)

    @property
    def dispatch_row_bytes(self) -> int:
        return self.hidden + self.hidden // 128 * 4 if self.dtype == "fp8" else self.hidden * 2

    @property
    def combine_row_bytes(self) -> int:
        return self.hidden * 2


def choices(shape: Shape, rank: int, seed: int) -> torch.Tensor:
    """int64 ``[T, K]`` different experts, random; the same wherever it is computed."""
    generator = torch.Generator().manual_seed((seed * 4099 + rank) * 2 + 1)
    appeal = torch.rand(shape.tokens, shape.experts, generator=generator)
    is_skewed = torch.rand(shape.tokens, generator=generator) < shape.skewed_share
    appeal[:, shape.experts // shape.num_ranks :].masked_fill_(is_skewed[:, None], -1.0)
    if shape.num_groups > 1:
        groups = appeal.view(shape.tokens, shape.num_groups, -1)
        score = groups.topk(min(2, groups.shape[-1]), dim=-1).values.sum(-1)
        is_chosen = torch.zeros(score.shape, dtype=torch.bool)
        is_chosen.scatter_(1, score.topk(shape.num_topk_groups, dim=-1).indices, True)
        appeal = groups.masked_fill(~is_chosen[:, :, None], -1.0).view(appeal.shape)
    return appeal.topk(shape.topk, dim=-1).indices


def choice_weights(shape: Shape, rank: int, seed: int) -> torch.Tensor:
    """float32 ``[T, K]``, each token's weights summing to 1."""
    generator = torch.Generator().manual_seed((seed * 4099 + rank) * 2)
    return torch.rand(shape.tokens, shape.topk, generator=generator).softmax(-1)


def rows(shape: Shape, rank: torch.Tensor | int, tokens: torch.Tensor, seed: int) -> torch.Tensor:
    """bf16 ``[len(tokens), H]``: the rows of these tokens of ``rank`` (one for all, or one per token).

    Multiples of 1/64 between -2 and 2, exact in bf16.
    """
    device = tokens.device
    found = torch.empty(tokens.shape[0], shape.hidden, dtype=torch.bfloat16, device=device)
    column = torch.arange(shape.hidden, device=device)
    number = torch.as_tensor(rank, device=device) * shape.tokens + tokens
    for first in range(0, tokens.shape[0], _BLOCK_ROWS):
        mixed = (
            number[first : first + _BLOCK_ROWS, None] * shape.hidden + column
        ) * 0x9E3779B97F4A7C1 + seed * 0x51ED27
        mixed = (mixed ^ (mixed >> 29)) * 0x3F58476D1CE4E5B9
        found[first : first + _BLOCK_ROWS] = (((mixed >> 32) & 0xFF) - 128).float() / 64
    return found


def payload(shape: Shape, x: torch.Tensor) -> Any:
    """What normal-mode dispatch is given for bf16 rows: themselves, or their e4m3 blocks with scales."""
    return nn.quantise_fp8_blocks(x) if shape.dtype == "fp8" else x


def as_bf16(received: Any) -> torch.Tensor:
    """bf16 rows again."""
    return nn.dequantise(*received).to(torch.bfloat16) if isinstance(received, tuple) else received


@dataclass(kw_only=True)
class InputSet:
    """Inputs of one rank, and with a handle the state for calls that need no counting.

    Attributes:
        x: bf16 ``[T, H]``; ``sent``: the same as dispatched rows; ``topk_idx``, ``topk_weights``: ``[T, K]``.
        in_rank: bool ``[T, N]``, which rank gets which token; from plain arithmetic.
        handle, expert_out: filled by the first dispatch; ``expert_out`` is what combine is given.
        rival_out: the same for the all-to-all rival, ``[R, H]`` in either mode.
    """

    seed: int
    x: torch.Tensor
    sent: Any
    topk_idx: torch.Tensor
    topk_weights: torch.Tensor
    in_rank: torch.Tensor
    handle: tuple[Any, ...] = ()
    expert_out: torch.Tensor | None = None
    rival_out: torch.Tensor | None = None


def make_inputs(shape: Shape, rank: int, seed: int, device: torch.device) -> InputSet:
    topk_idx = choices(shape, rank, seed)
    x = rows(shape, rank, torch.arange(shape.tokens, device=device), seed)
    return InputSet(
        seed=seed,
        x=x,
        sent=payload(shape, x),
        topk_idx=topk_idx.to(device),
        topk_weights=choice_weights(shape, rank, seed).to(device),
        in_rank=ranks_of(shape, topk_idx).to(device),
    )


def ranks_of(shape: Shape, topk_idx: torch.Tensor) -> torch.Tensor:
    """bool ``[T, N]``: whether any of a token's experts lives on a rank."""
    per_rank = shape.experts // shape.num_ranks
    return torch.zeros(topk_idx.shape[0], shape.num_ranks, dtype=torch.bool).scatter_(1, topk_idx // per_rank, True)


def factor(rank_or_expert: int) -> float:
    """What stands in for the experts' work: neighbours differ, so that sums of the wrong rows are seen."""
    return (1.0, 0.75, 1.25, 0.625, 1.5)[rank_or_expert % 5]


# --- normal mode ----------------------------------------------------------------------------------------------------


def expected_dispatch(shape: Shape, rank: int, seed: int, device: torch.device) -> Any:
    """What this rank receives: every token with an expert here, by source rank, then by token."""
    parts = []
    for source in range(shape.num_ranks):
        tokens = ranks_of(shape, choices(shape, source, seed))[:, rank].nonzero().flatten().to(device)
        parts.append(rows(shape, source, tokens, seed))
    return payload(shape, torch.cat(parts))


def stand_in_for_experts(received: Any, rank: int) -> torch.Tensor:
    """bf16 rows for combine that tell ranks apart."""
    return (as_bf16(received).float() * factor(rank)).to(torch.bfloat16)


def expected_combine(shape: Shape, inputs: InputSet, ranks_per_node: int) -> torch.Tensor:
    """bf16 ``[T, H]`` by the numerical contract: ranks ascending in float32; several nodes round each its own."""
    x = as_bf16(inputs.sent)
    total = torch.zeros(x.shape, device=x.device)
    for node in range(shape.num_ranks // ranks_per_node):
        partial = torch.zeros_like(total)
        for rank in range(node * ranks_per_node, (node + 1) * ranks_per_node):
            row = stand_in_for_experts(x, rank).float()
            partial = torch.where(inputs.in_rank[:, rank, None], partial + row, partial)
        total += partial.to(torch.bfloat16).float() if ranks_per_node < shape.num_ranks else partial
    return total.to(torch.bfloat16)


# --- low-latency mode -----------------------------------------------------------------------------------------------


def check_low_latency_dispatch(shape: Shape, rank: int, seed: int, received: Any, handle: tuple[Any, ...]) -> str:
    """Empty, or the first thing wrong with what arrived."""
    src_info, layout_range = handle[0], handle[1].tolist()
    is_cast = isinstance(received, tuple)
    values = received[0] if is_cast else received
    per_rank = shape.experts // shape.num_ranks
    for source in range(shape.num_ranks):
        chosen = choices(shape, source, seed)
        for local in range(per_rank):
            begin, count = layout_range[local][source] >> 32, layout_range[local][source] & 0xFFFFFFFF
            tokens = src_info[local, begin : begin + count].long()
            wanted = (chosen == rank * per_rank + local).any(-1).nonzero().flatten()
            if not torch.equal(tokens.cpu().sort().values, wanted):
                return (
                    f"expert {rank * per_rank + local} got {count} tokens of rank {source}, expected {wanted.numel()}"
                )
            expected = payload(replace(shape, dtype="fp8" if is_cast else "bf16"), rows(shape, source, tokens, seed))
            actual = values[local, begin : begin + count]
            if is_cast and not torch.equal(received[1][local, begin : begin + count], expected[1]):
                return f"expert {rank * per_rank + local}: wrong scales from rank {source}"
            if not same_bits(actual, expected[0] if is_cast else expected):
                return f"expert {rank * per_rank + local}: wrong rows from rank {source}"
    return ""


def stand_in_for_low_latency_experts(shape: Shape, received: Any, rank: int) -> torch.Tensor:
    """bf16 ``[L, M, H]`` that tell experts apart."""
    per_rank = shape.experts // shape.num_ranks
    scale = torch.tensor([factor(rank * per_rank + e) for e in range(per_rank)])
    values = as_bf16(received)
    return (values.float() * scale.to(values.device)[:, None, None]).to(torch.bfloat16)


def expected_low_latency_combine(shape: Shape, inputs: InputSet, reduce: str) -> torch.Tensor:
    """bf16 ``[T, H]``: weight times row added in column order, on the experts' rank first if ``reduce`` is ``rank``."""
    x = as_bf16(nn.quantise_fp8_blocks(inputs.x)) if shape.dtype == "fp8" else inputs.x
    scale = torch.tensor([factor(e) for e in range(shape.experts)], device=x.device)
    per_rank = shape.experts // shape.num_ranks
    total = torch.zeros(x.shape, device=x.device)
    for rank in range(shape.num_ranks) if reduce == "rank" else (None,):
        partial = torch.zeros_like(total)
        for k in range(shape.topk):
            expert = inputs.topk_idx[:, k]
            y = (x.float() * scale[expert, None]).to(torch.bfloat16).float() * inputs.topk_weights[:, k, None]
            here = torch.ones_like(expert, dtype=torch.bool) if rank is None else expert // per_rank == rank
            partial = torch.where(here[:, None], partial + y, partial)
        total += partial.to(torch.bfloat16).float() if reduce == "rank" else partial
    return total.to(torch.bfloat16)


def same_bits(a: torch.Tensor, b: torch.Tensor) -> bool:
    """Equality of shape and of every bit."""
    if a.shape != b.shape or a.dtype != b.dtype:
        return False
    whole = {1: torch.uint8, 2: torch.int16, 4: torch.int32}[a.element_size()]
    return torch.equal(a.contiguous().view(whole), b.contiguous().view(whole))
