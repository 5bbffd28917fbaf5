"""Counts what the kernels put to other nodes, beside the least that can travel: every token once to each remote node.

Needs GPUs of one host, and the extension built with ``DEEPEP_COUNT_PUTS=1``, whose kernels count every put and every
word where they hand it to NVSHMEM; tokens and nodes are counted from the routing. Nodes are virtual. Ends with 1 if
some row crossed more or less than once, or if more than 2 % was put beside the rows and what belongs to them.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
import torch.distributed as dist

from deep_ep import Buffer
from deep_ep.cli.bench_data import Shape, choice_weights, choices, payload, ranks_of, rows
from deep_ep.launch import RankContext, RankPool

WORD_BYTES = 8
MOST_OVERHEAD = 0.02
ALIGNMENT = 128  # of a message


class Puts(NamedTuple):
    """What this rank's kernels have handed to the network."""

    num_puts: int
    num_bytes: int
    num_words: int

    @staticmethod
    def now() -> Puts:
        from deepep_nvshmem.backend import load_internode_extension

        torch.cuda.synchronize()
        read = getattr(load_internode_extension(), "put_counts", None)
        if read is None:
            raise RuntimeError("This extension does not count. Build it with DEEPEP_COUNT_PUTS=1.")
        return Puts(*read())

    def since(self, before: Puts) -> Puts:
        return Puts(*(a - b for a, b in zip(self, before, strict=True)))


@dataclass(frozen=True, kw_only=True)
class Row:
    """One operation, over all ranks.

    Attributes:
        copies: (token, remote node) pairs of the routing.
        least_bytes: what has to travel for one copy: the row with its scales, choices and weights that the call brings.
        message_bytes: of one copy as it is put; 0 where records of counts travel too, so that bytes do not tell copies.
    """

    operation: str
    copies: int
    least_bytes: int
    message_bytes: int
    puts: Puts

    @property
    def put_bytes(self) -> int:
        """With the word of each put and the words that are set by themselves (credits, requests)."""
        return self.puts.num_bytes + WORD_BYTES * (self.puts.num_puts + self.puts.num_words)

    @property
    def overhead(self) -> float:
        return self.put_bytes / (self.copies * self.least_bytes) - 1

    @property
    def is_good(self) -> bool:
        is_once = not self.message_bytes or self.puts.num_bytes == self.copies * self.message_bytes
        return is_once and 0 <= self.overhead < MOST_OVERHEAD

    def line(self, shape: Shape, ranks_per_node: int) -> str:
        of_rank, mib = shape.num_ranks, shape.num_ranks * (1 << 20)
        return (
            f"| {shape.num_ranks // ranks_per_node} x {ranks_per_node} | {shape.tokens} | {self.operation} "
            f"| {self.copies / of_rank:.0f} | {self.copies * self.least_bytes / mib:.3f} | {self.put_bytes / mib:.3f} "
            f"| {self.overhead:.2%} | {self.puts.num_puts / of_rank:.0f} | {self.puts.num_words / of_rank:.0f} |"
        )


def count(context: RankContext, shape: Shape, ranks_per_node: int) -> list[dict[str, Any]]:
    """Arguments of `Row`, the same on every rank."""
    device, rank, num_topk = context.device, context.rank, shape.topk
    chosen = choices(shape, rank, seed=0)
    nodes = ranks_of(shape, chosen).view(shape.tokens, -1, ranks_per_node).any(-1)
    nodes[:, rank // ranks_per_node] = False
    num_copies = torch.tensor([int(nodes.sum())])
    dist.all_reduce(num_copies, group=context.group)
    copies = int(num_copies)

    buffer = Buffer(context.group, 1 << 28, backend="nvshmem")
    x = rows(shape, rank, torch.arange(shape.tokens, device=device), seed=0)
    sent, topk_idx = payload(shape, x), chosen.to(device)
    topk_weights = choice_weights(shape, rank, seed=0).to(device)
    per_rank, per_node, per_expert, in_rank, _ = buffer.get_dispatch_layout(topk_idx, shape.experts)

    def dispatch() -> Any:
        return buffer.dispatch(
            sent,
            num_tokens_per_rank=per_rank,
            num_tokens_per_rdma_rank=per_node,
            is_token_in_rank=in_rank,
            num_tokens_per_expert=per_expert,
            topk_idx=topk_idx,
            topk_weights=topk_weights,
        )

    def counted(
        operation: str, call: Callable[[], Any], *, row: int, routing: int, has_records: bool = False
    ) -> dict[str, Any]:
        call()
        dist.barrier(context.group)
        before = Puts.now()
        call()
        own = Puts.now().since(before)
        together = torch.tensor(own)
        dist.all_reduce(together, group=context.group)
        message = -(-(row + routing) // ALIGNMENT) * ALIGNMENT
        return {
            "operation": operation,
            "copies": copies,
            "least_bytes": row + routing,
            "message_bytes": 0 if has_records else message,
            "puts": together.tolist(),
        }

    recv_x, _, recv_weights, _, handle, _ = dispatch()
    received = recv_x[0] if isinstance(recv_x, tuple) else recv_x
    with buffer.symmetric_memory():
        out = torch.randn((received.shape[0], shape.hidden), device=device).to(torch.bfloat16)
        weights = recv_weights.clone()
    name, dispatched, combined = shape.dtype, shape.dispatch_row_bytes, shape.combine_row_bytes
    with_routing = num_topk * 8  # an index and a weight for each choice, 4 bytes each
    found = [
        counted(f"dispatch {name}", dispatch, row=dispatched, routing=with_routing, has_records=True),
        counted(f"dispatch {name}, cached", lambda: buffer.dispatch(sent, handle=handle), row=dispatched, routing=0),
        counted("combine bf16", lambda: buffer.combine(out, handle), row=combined, routing=0),
        counted(
            "combine bf16, weights",
            lambda: buffer.combine(out, handle, topk_weights=weights),
            row=combined,
            routing=num_topk * 4,
        ),
    ]
    buffer.destroy()
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--ranks", type=int, default=4)
    parser.add_argument("--tokens", default="4096,128")
    parser.add_argument("--hidden", type=int, default=7168)
    parser.add_argument("--groups", type=int, default=8)
    parser.add_argument("--topk-groups", type=int, default=4)
    args = parser.parse_args()
    print("| nodes | tokens | operation | copies | least MiB | put MiB | beside | puts | words |")
    print("| --- | --- | --- | --- | --- | --- | --- | --- | --- |")
    is_good = True
    with RankPool(args.ranks, device="cuda") as pool:
        for ranks_per_node in (args.ranks // 2, 1):
            for tokens in map(int, args.tokens.split(",")):
                for dtype in ("fp8", "bf16"):
                    shape = Shape(
                        mode="normal",
                        tokens=tokens,
                        hidden=args.hidden,
                        topk=8,
                        experts=256,
                        dtype=dtype,
                        num_ranks=args.ranks,
                        num_groups=args.groups,
                        num_topk_groups=args.topk_groups,
                    )
                    environment = {"DEEPEP_RANKS_PER_NODE": str(ranks_per_node)}
                    counted = pool.run(count, shape, ranks_per_node, environment=environment)[0]
                    for facts in counted[: 2 if dtype == "bf16" else None]:  # combine is the same for both
                        row = Row(**facts | {"puts": Puts(*facts["puts"])})
                        print(row.line(shape, ranks_per_node) + ("" if row.is_good else " WRONG"), flush=True)
                        is_good = is_good and row.is_good
    raise SystemExit(0 if is_good else 1)


if __name__ == "__main__":
    main()
