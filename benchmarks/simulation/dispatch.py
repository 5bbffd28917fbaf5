"""Dispatch across nodes: send warps pack chunks and put them to the rank of the same local index; deliver warps there
store each row to the ranks that want it and give the slot back by a credit, and in between push rows of their own."""

from __future__ import annotations

from functools import partial
from typing import Any

import numpy as np

from .cluster import Cluster, Scenario
from .engine import Warps

PUSH_ROWS = 4  # own-node rows that one warp is simulated to move at a time


class Dispatch(Cluster):
    def __init__(self, scenario: Scenario, routing: Any | None = None) -> None:
        super().__init__(scenario, routing)
        kernel, machine = self.kernel, self.machine
        self.load_sm, self.store_sm = 1e-3 / machine.sm_load_gbps, 1e-3 / machine.sm_store_gbps
        # A warp has its stages' bytes on the way for as long as a flag takes there and back.
        self.bulk_warp = 2 * machine.flag_us / kernel.stage_bytes
        blocks = range(kernel.num_sms)
        self.senders = [[Warps(kernel.send_warps, self.pack) for _ in blocks] for _ in self.gpus]
        self.deliverers = [
            [Warps(kernel.deliver_warps, self.forward, partial(self.push, rank, block)) for block in blocks]
            for rank in range(len(self.gpus))
        ]
        self.chunks: dict[tuple[int, int], list[tuple[int, list[int]]]] = {}
        self.pushes: list[list[tuple[int, list[int]]]] = []
        self.num_outstanding = [0] * len(self.gpus)  # per source: chunks whose credit has not come, pushes not landed
        for rank in range(len(self.gpus)):
            own = self.node_of(rank)
            self.pushes.append(_cut(self.routing[rank, :, own], PUSH_ROWS))
            self.num_outstanding[rank] += len(self.pushes[rank])
            for node in self.other_nodes(rank):
                in_local = self.routing[rank, :, node]
                chunks = _cut(in_local, self.ring.chunk_rows(int(in_local.any(axis=1).sum())))
                self.chunks[rank, node] = chunks
                self.num_outstanding[rank] += len(chunks)
            self.clock.at(self.begin, self.start, rank)

    def start(self, rank: int) -> None:
        self.gpus[rank].end = self.clock.now
        self.pushes[rank].reverse()
        for warps in self.deliverers[rank]:
            warps.begin()
        for slot in range(self.num_slots):
            for node in self.other_nodes(rank):
                self.offer(rank, node, slot)

    def push(self, rank: int, block: int) -> bool:
        if not self.pushes[rank]:
            return False
        num_rows, copies = self.pushes[rank].pop()
        self.clock.at(self.move(rank, block, num_rows, copies), self.pushed, rank, block)
        return True

    def pushed(self, rank: int, block: int) -> None:
        self.settle(rank)
        self.deliverers[rank][block].release()

    def move(self, rank: int, block: int, num_rows: int, copies: list[int]) -> float:
        """A warp of ``rank`` loads rows once and stores them to each rank of its node that wants them."""
        now, total = self.clock.now, sum(copies)
        self.rows_landed += total
        busy = self.gpus[rank].sms[block].serve(now, (num_rows * self.load_sm + total * self.store_sm) * self.row_bytes)
        warp = now + self.machine.flag_us + total * self.row_bytes * self.bulk_warp
        return max(busy, warp, self.copy_rows(copies, rank, is_pull=False))

    def offer(self, rank: int, node: int, chunk: int) -> None:
        """The slot of this chunk is free."""
        if chunk < len(self.chunks[rank, node]):
            block = self.block_of(chunk)
            self.senders[rank][block].want(rank, node, chunk, block)

    def pack(self, rank: int, node: int, chunk: int, block: int) -> None:
        num_bytes = self.chunks[rank, node][chunk][0] * self.message_bytes
        busy = self.gpus[rank].sms[block].serve(self.clock.now, num_bytes * self.copy_sm)
        self.clock.at(max(busy, self.clock.now + num_bytes * self.copy_warp), self.put, rank, node, chunk, block)

    def put(self, rank: int, node: int, chunk: int, block: int) -> None:
        num_rows = self.chunks[rank, node][chunk][0]
        forwarder = self.rank_at(node, rank)
        free = self.send(rank, forwarder, num_rows, block, self.arrive, rank, forwarder, chunk)
        self.clock.at(free, self.senders[rank][block].release)

    def arrive(self, rank: int, forwarder: int, chunk: int) -> None:
        block = self.block_of(chunk)
        self.deliverers[forwarder][block].want(rank, forwarder, chunk, block)

    def forward(self, rank: int, forwarder: int, chunk: int, block: int) -> None:
        num_rows, copies = self.chunks[rank, self.node_of(forwarder)][chunk]
        self.clock.at(self.move(forwarder, block, num_rows, copies), self.forwarded, rank, forwarder, chunk, block)

    def forwarded(self, rank: int, forwarder: int, chunk: int, block: int) -> None:
        self.deliverers[forwarder][block].release()
        self.gpus[forwarder].end = max(self.gpus[forwarder].end, self.clock.now)
        self.tell(self.credit, rank, self.node_of(forwarder), chunk)

    def credit(self, rank: int, node: int, chunk: int) -> None:
        self.settle(rank)
        self.offer(rank, node, chunk + self.num_slots)

    def settle(self, rank: int) -> None:
        self.num_outstanding[rank] -= 1
        self.gpus[rank].end = max(self.gpus[rank].end, self.clock.now)

    def finish(self) -> None:
        """DONE of all ranks of the node."""
        per_node = self.shape.ranks_per_node
        for first in range(0, len(self.gpus), per_node):
            node = self.gpus[first : first + per_node]
            end = max(gpu.end for gpu in node) + self.machine.flag_us
            for gpu in node:
                gpu.end = end

    def unfinished(self) -> str:
        return ", ".join(f"rank {r}: {n} chunks without credit" for r, n in enumerate(self.num_outstanding) if n)


def _cut(in_local: Any, num_rows: int) -> list[tuple[int, list[int]]]:
    """Tokens that go to a node (``[T, P]``) in chunks: rows of each, and copies for each local rank."""
    rows = in_local[in_local.any(axis=1)]
    if not len(rows):
        return []
    starts = np.arange(0, len(rows), num_rows)
    copies = np.add.reduceat(rows, starts, axis=0, dtype=np.int64)
    counts = np.minimum(num_rows, len(rows) - starts)
    return list(zip(counts.tolist(), copies.tolist(), strict=True))
