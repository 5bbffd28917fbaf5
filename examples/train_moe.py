"""Train a byte-level mixture-of-experts language model twice and compare the losses.

Once with expert parallelism: several processes, each with its own share of every batch and of the experts, tokens
travelling by `deep_ep`. Once in a single process, with the whole batch and all experts. Data and initial weights are
the same, so the losses have to be the same but for the rounding of rows to bf16 on their way.

    python examples/train_moe.py
    torchrun --nproc-per-node 4 examples/train_moe.py

How equal is equal: whatever crosses ranks, forward or backward, is rounded to bf16, which moves a number by at most
2^-8 of itself. The loss is a mean over tokens of a smooth function of such numbers. Were all roundings as large as
possible and in league, they would move it by a fraction of about that size; in fact most cancel. So the losses of each
step may differ by 2^-8 of their value, and the mean difference over all steps by a quarter of that.
"""

from __future__ import annotations

import argparse
import itertools
import sys
import time
from pathlib import Path

import torch
import torch.distributed as dist
from torch import nn
from torch.nn import functional as F

from deep_ep import Buffer
from deep_ep.launch import RankContext, join_external, launched_externally, run_ranks
from deep_ep.nn import Experts, Gate, LocalMoELayer, MoELayer

HIDDEN, WIDTH, HEADS, NUM_BLOCKS = 128, 64, 4, 2
NUM_EXPERTS, NUM_TOPK = 16, 4
SEQUENCES, LENGTH = 16, 64  # of one batch, over all ranks
LEARNING_RATE = 0.05
TOLERANCE = 2.0**-8


def text_of_repository() -> bytes:
    """The repository's documents and sources, in the order of their names."""
    root = Path(__file__).resolve().parent.parent
    files = [
        f for pattern in ("*.md", "docs/*.md", "examples/*.py", "packages/*/src/**/*.py") for f in root.glob(pattern)
    ]
    return b"\n".join(file.read_bytes() for file in sorted(files))


def batch(text: bytes, step: int, rank: int, num_ranks: int) -> torch.Tensor:
    """int64 ``[SEQUENCES / num_ranks, LENGTH + 1]``: this rank's share of the batch of a step."""
    starts = torch.randint(len(text) - LENGTH, (SEQUENCES,), generator=torch.Generator().manual_seed(step))
    mine = starts.chunk(num_ranks)[rank]
    return torch.tensor([list(text[start : start + LENGTH + 1]) for start in mine.tolist()])


class OverRanks(nn.Module):
    """A layer whose rows travel in bf16, in a model that computes in float32."""

    def __init__(self, layer: MoELayer) -> None:
        super().__init__()
        self.layer = layer

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.layer(x.to(torch.bfloat16)).float()


class Block(nn.Module):
    """Causal attention, then experts."""

    def __init__(self, experts: nn.Module) -> None:
        super().__init__()
        self.before_attention, self.before_experts = nn.RMSNorm(HIDDEN), nn.RMSNorm(HIDDEN)
        self.qkv, self.out = nn.Linear(HIDDEN, 3 * HIDDEN, bias=False), nn.Linear(HIDDEN, HIDDEN, bias=False)
        self.experts = experts

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        q, k, v = self.qkv(self.before_attention(x)).unflatten(-1, (3 * HEADS, -1)).transpose(1, 2).chunk(3, dim=1)
        x = x + self.out(F.scaled_dot_product_attention(q, k, v, is_causal=True).transpose(1, 2).flatten(2))
        return x + self.experts(self.before_experts(x).flatten(0, 1)).view_as(x)


class ByteModel(nn.Module):
    """Bytes ``[B, S]`` to logits ``[B, S, 256]``. All weights but the experts' come from the seed that is set."""

    def __init__(self, blocks: list[Block]) -> None:
        super().__init__()
        self.embedding, self.position = nn.Embedding(256, HIDDEN), nn.Embedding(LENGTH, HIDDEN)
        self.blocks = nn.ModuleList(blocks)
        self.norm, self.head = nn.RMSNorm(HIDDEN), nn.Linear(HIDDEN, 256, bias=False)

    def forward(self, bytes_: torch.Tensor) -> torch.Tensor:
        x = self.embedding(bytes_) + self.position.weight[: bytes_.shape[1]]
        for block in self.blocks:
            x = block(x)
        return self.head(self.norm(x))


def build_model(buffer: Buffer | None) -> ByteModel:
    """The model with this rank's experts, or with all of them if there is no buffer."""
    torch.manual_seed(0)
    num_ranks, rank = (buffer.group_size, buffer.rank) if buffer is not None else (1, 0)
    blocks = []
    for number in range(NUM_BLOCKS):
        gate = Gate(hidden=HIDDEN, num_experts=NUM_EXPERTS, num_topk=NUM_TOPK, num_groups=4, num_selected_groups=2)
        held = NUM_EXPERTS // num_ranks
        experts = Experts(hidden=HIDDEN, width=WIDTH, num_experts=held, first_expert=rank * held, seed=number)
        if buffer is None:
            blocks.append(Block(LocalMoELayer(gate, experts)))
        else:
            blocks.append(Block(OverRanks(MoELayer(buffer, gate, experts))))
    return ByteModel(blocks)


def average_gradients(model: ByteModel, group: dist.ProcessGroup, num_ranks: int) -> None:
    """Make gradients those of the mean loss over ranks.

    An expert has seen the tokens of all ranks, so its gradient is the sum over the ranks' losses already. Everything
    else is replicated, and each rank has the share of its own loss.
    """
    for name, parameter in model.named_parameters():
        assert parameter.grad is not None, name
        is_expert = name.endswith(("experts.gate_up", "experts.down"))
        if not is_expert:
            dist.all_reduce(parameter.grad, group=group)
        parameter.grad /= num_ranks


def train(text: bytes, steps: int, context: RankContext | None, buffer: Buffer | None) -> list[float]:
    """The loss of each step, over the whole batch."""
    model = build_model(buffer)
    rank, num_ranks = (context.rank, context.num_ranks) if context is not None else (0, 1)
    device = context.device if context is not None else torch.device("cpu")
    model = model.to(device)
    optimizer = torch.optim.SGD(model.parameters(), lr=LEARNING_RATE, momentum=0.9, nesterov=True)
    losses = []
    for step in range(steps):
        data = batch(text, step, rank, num_ranks).to(device)
        loss = F.cross_entropy(model(data[:, :-1]).flatten(0, 1), data[:, 1:].flatten())
        optimizer.zero_grad()
        loss.backward()
        mean = loss.detach().clone()
        if context is not None:
            average_gradients(model, context.group, num_ranks)
            dist.all_reduce(mean, group=context.group)
        optimizer.step()
        losses.append(float(mean) / num_ranks)
    return losses


def train_over_ranks(context: RankContext, text: bytes, steps: int) -> list[float]:
    """Training on this rank; every rank returns the same losses."""
    buffer = Buffer.for_model(
        context.group,
        hidden=HIDDEN,
        num_experts=NUM_EXPERTS,
        num_topk=NUM_TOPK,
        max_tokens_per_rank=SEQUENCES * LENGTH // context.num_ranks,
    )
    try:
        return train(text, steps, context, buffer)
    finally:
        buffer.destroy()


def report(over_ranks: list[float], single: list[float], num_ranks: int, seconds: tuple[float, float]) -> bool:
    """Print both losses and whether they agree."""
    differences = [abs(a - b) / b for a, b in zip(over_ranks, single, strict=True)]
    print(f"{'step':>6} {f'{num_ranks} ranks':>10} {'1 process':>10} {'difference':>11}")
    shown = sorted({*range(0, len(single), max(1, len(single) // 10)), len(single) - 1})
    for step in shown:
        print(f"{step:6d} {over_ranks[step]:10.5f} {single[step]:10.5f} {differences[step]:11.1e}")
    worst, mean = max(differences), sum(differences) / len(differences)
    agrees = worst <= TOLERANCE and mean <= TOLERANCE / 4
    print(f"largest difference {worst:.1e} (tolerance 2^-8 = {TOLERANCE:.1e}), mean {mean:.1e} ({TOLERANCE / 4:.1e})")
    print(f"{seconds[0]:.1f} s over ranks, {seconds[1]:.1f} s in one process")
    learned = single[-1] < single[0] - 1
    print("the losses agree" if agrees else "THE LOSSES DIFFER", "" if learned else "but the model did not learn")
    return agrees and learned


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--ranks", type=int, default=4, help="processes (torchrun brings its own)")
    parser.add_argument("--steps", type=int, default=40)
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    options = parser.parse_args()
    text = text_of_repository()
    clock = [time.perf_counter()]
    if launched_externally():
        context = join_external(options.device)
        over_ranks, rank, num_ranks = train_over_ranks(context, text, options.steps), context.rank, context.num_ranks
        dist.destroy_process_group()
        if rank != 0:
            return 0
    else:
        num_ranks = options.ranks
        over_ranks = run_ranks(train_over_ranks, text, options.steps, num_ranks=num_ranks, device=options.device)[0]
    clock.append(time.perf_counter())
    torch.set_num_threads(1)  # as each rank: these matrices are too small to be worth sharing
    single = train(text, options.steps, None, None)
    clock.append(time.perf_counter())
    first, second = (b - a for a, b in itertools.pairwise(clock))
    return 0 if report(over_ranks, single, num_ranks, (first, second)) else 1


if __name__ == "__main__":
    sys.exit(main())
