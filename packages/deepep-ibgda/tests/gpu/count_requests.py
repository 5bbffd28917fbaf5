"""Counts what one dispatch and one combine hand to the NIC, beside what a copy per (token, expert) would.

Nodes are virtual and the NIC is the software one, so counts and bytes mean something and times do not.
"""

from __future__ import annotations

import argparse
from typing import NamedTuple

import torch
from low_latency_world import Case, World, combine, dispatch, make_combining, make_inputs, make_received


class Counts(NamedTuple):
    """Means over ranks, per operation."""

    writes: float
    inline_writes: float
    atomics: float
    num_bytes: float

    @staticmethod
    def now(world: World) -> Counts:
        seen = [nic.counters() for nic in world.nics]
        return Counts(
            *(sum(c[name] for c in seen) / len(seen) for name in ("writes", "inline_writes", "atomics", "bytes"))
        )

    def since(self, before: Counts) -> Counts:
        return Counts(*(a - b for a, b in zip(self, before, strict=True)))

    def line(self, name: str, num_tokens: int) -> str:
        kinds = (self.writes, self.inline_writes, self.atomics)
        whole = " | ".join(f"{count:.0f}" for count in kinds)
        return f"| {name} | {whole} | {sum(kinds) / num_tokens:.2f} | {self.num_bytes / num_tokens / 1024:.1f} |"


def per_expert(world: World, case: Case, experts: list[torch.Tensor], ranks_per_node: int) -> tuple[Counts, Counts]:
    """What one write per (token, expert) and one atomic per (expert, rank) come to: dispatch, combine."""
    copies, num_ranks = 0.0, case.num_ranks
    for rank in range(num_ranks):
        node = experts[rank] // case.num_local // ranks_per_node
        copies += float(((node != rank // ranks_per_node) & (experts[rank] >= 0)).sum()) / num_ranks
    num_remote = num_ranks - ranks_per_node
    atomics = float(num_remote * case.num_local)  # dispatch: each remote expert's count; combine: each own one's flag
    fp8_row = case.hidden + case.hidden // 128 * 4 + 16
    return (
        Counts(copies, 0, atomics, copies * fp8_row + 8 * atomics),
        Counts(copies, 0, atomics, copies * 2 * case.hidden + 8 * atomics),
    )


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--ranks", type=int, default=4)
    parser.add_argument("--tokens", type=int, default=128)
    args = parser.parse_args()
    print("| nodes, operation | writes | inline writes | atomics | requests per token | KiB per token |")
    print("| --- | --- | --- | --- | --- | --- |")
    for ranks_per_node in (args.ranks // 2, 1):
        world = World(args.ranks, 1 << 30, ranks_per_node=ranks_per_node)
        case = Case(num_tokens=(args.tokens,) * args.ranks, hidden=7168, num_topk=8, num_experts=288, num_sms=32)
        inputs, received, combining = make_inputs(world, case), make_received(world, case), make_combining(world, case)

        def settled(world: World = world) -> Counts:
            world.check()
            for nic in world.nics:
                assert nic.drain(timeout_s=10)
            return Counts.now(world)

        for _ in range(4):  # credits flow from the second operation on
            dispatch(world, case, inputs, received)
            combine(world, case, inputs, received, combining)
        counts = [settled()]
        dispatch(world, case, inputs, received)
        counts.append(settled())
        combine(world, case, inputs, received, combining)
        counts.append(settled())
        others = per_expert(world, case, [i.topk_idx.cpu() for i in inputs], ranks_per_node)
        shape = f"{args.ranks // ranks_per_node} x {ranks_per_node}"
        for i, name in enumerate(("dispatch FP8", "combine bf16")):
            print(counts[i + 1].since(counts[i]).line(f"{shape}, {name}", args.tokens))
            print(others[i].line(f"{shape}, {name}, one copy per (token, expert)", args.tokens))
        world.close()


if __name__ == "__main__":
    main()
