"""Combine across nodes: the source asks each node for the partial sums of a block of its tokens; a warp there pulls and
sums the rows and puts the sums into the source's ring; the source adds its own node's and asks for a later block."""

from __future__ import annotations

from typing import Any

import numpy as np

from .cluster import Cluster, Scenario
from .engine import Warps


class Combine(Cluster):
    def __init__(self, scenario: Scenario, routing: Any | None = None) -> None:
        super().__init__(scenario, routing)
        kernel, machine = self.kernel, self.machine
        self.sum_sm, self.sum_warp = 1e-3 / machine.sm_sum_gbps, 1e-3 / machine.warp_sum_gbps
        blocks = range(kernel.num_sms)
        num_forward, num_source = kernel.combine_warps(self.shape.ranks_per_node)
        self.forwarders = [[Warps(num_forward, self.answer) for _ in blocks] for _ in self.gpus]
        self.sources = [[Warps(num_source, self.add_nodes) for _ in blocks] for _ in self.gpus]
        # For each rank, block of tokens and node: copies at each local rank, and tokens that have any.
        self.block_tokens = self.ring.chunk_rows(self.shape.num_tokens)
        starts = np.arange(0, self.shape.num_tokens, self.block_tokens)
        self.num_blocks = len(starts)
        self.copies: list[Any] = []
        self.num_rows: list[Any] = []
        self.num_missing: list[Any] = []
        for rank in range(len(self.gpus)):
            in_rank = self.routing[rank]
            rows = np.add.reduceat(in_rank.any(axis=2), starts, axis=0, dtype=np.int64)
            self.copies.append(np.add.reduceat(in_rank, starts, axis=0, dtype=np.int64).tolist())
            self.num_rows.append(rows.tolist())
            rows[:, self.node_of(rank)] = 0
            self.num_missing.append((rows > 0).sum(axis=1).tolist())
            self.clock.at(self.begin, self.start, rank)
        self.num_open = [self.num_blocks] * len(self.gpus)

    def start(self, rank: int) -> None:
        for block in range(min(self.num_slots, self.num_blocks)):
            self.ask(rank, block)

    def ask(self, rank: int, block: int) -> None:
        if not self.num_missing[rank][block]:
            self.sources[rank][self.block_of(block)].want(rank, block)
        for node in self.other_nodes(rank):
            if self.num_rows[rank][block][node]:
                self.tell(self.asked, rank, node, block)

    def asked(self, rank: int, node: int, block: int) -> None:
        forwarder = self.rank_at(node, rank)
        self.forwarders[forwarder][self.block_of(block)].want(rank, forwarder, block)

    def sum_rows(self, rank: int, sm: int, copies: list[int], num_local: int) -> float:
        """A warp of ``rank`` sums rows of its node's ranks and ``num_local`` rows that lie here already."""
        now, num_bytes = self.clock.now, (sum(copies) + num_local) * self.row_bytes
        busy = self.gpus[rank].sms[sm].serve(now, num_bytes * self.sum_sm)
        warp = now + self.machine.flag_us + num_bytes * self.sum_warp
        return max(busy, warp, self.copy_rows(copies, rank, is_pull=True))

    def answer(self, rank: int, forwarder: int, block: int) -> None:
        copies = self.copies[rank][block][self.node_of(forwarder)]
        self.clock.at(self.sum_rows(forwarder, self.block_of(block), copies, 0), self.put, rank, forwarder, block)

    def put(self, rank: int, forwarder: int, block: int) -> None:
        sm, num_rows = self.block_of(block), self.num_rows[rank][block][self.node_of(forwarder)]
        free = self.send(forwarder, rank, num_rows, sm, self.arrive, rank, block)
        self.clock.at(free, self.forwarders[forwarder][sm].release)

    def arrive(self, rank: int, block: int) -> None:
        self.num_missing[rank][block] -= 1
        if not self.num_missing[rank][block]:
            self.sources[rank][self.block_of(block)].want(rank, block)

    def add_nodes(self, rank: int, block: int) -> None:
        own = self.node_of(rank)
        num_remote = sum(self.num_rows[rank][block]) - self.num_rows[rank][block][own]
        done = self.sum_rows(rank, self.block_of(block), self.copies[rank][block][own], num_remote)
        self.clock.at(done, self.added, rank, block)

    def added(self, rank: int, block: int) -> None:
        self.sources[rank][self.block_of(block)].release()
        self.num_open[rank] -= 1
        self.rows_landed += min(self.block_tokens, self.shape.num_tokens - block * self.block_tokens)
        self.gpus[rank].end = self.clock.now
        if block + self.num_slots < self.num_blocks:
            self.ask(rank, block + self.num_slots)

    def finish(self) -> None:
        """A rank ends when nobody reads its rows any more: those that its node answered have all they asked for."""
        end = max(gpu.end for gpu in self.gpus) + self.machine.network_us + self.machine.flag_us
        for gpu in self.gpus:
            gpu.end = end

    def unfinished(self) -> str:
        return ", ".join(f"rank {r}: {n} blocks not summed" for r, n in enumerate(self.num_open) if n)
