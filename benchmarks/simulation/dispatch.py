"""Dispatch across nodes: senders bring chunks to the rank of the same local index; deliver warps there store each row
to the ranks that want it and give the slot back by a credit, and in between deliver own rows. Blocks do both, or form
teams of senders and a deliverer; a team's senders put rows out of shared memory where stores reach the peers."""

from __future__ import annotations

from collections import deque
from functools import partial
from typing import Any

import numpy as np

from deep_ep.internode_model import Ring

from .cluster import IN_NODE, Cluster, Scenario
from .engine import Warps

Row = tuple[int, ...]  # which of a node's ranks want it, by local index
HELP_ROWS = 4  # own rows that a sender's warp delivers before it looks for a chunk again


class Dispatch(Cluster):
    def __init__(self, scenario: Scenario, routing: Any | None = None) -> None:
        super().__init__(scenario, routing)
        kernel, machine = self.kernel, self.machine
        self.times = kernel.times if self.shape.num_nodes > 1 else IN_NODE
        self.use = kernel.dispatch_shape(self.shape, machine)
        self.num_places = self.use.num_places
        most_slots = Ring.most_slots("dispatch", self.shape.num_nodes)
        self.ring = Ring.of(kernel.ring_bytes, self.message_bytes, kernel.chunk_bytes, most_slots)
        self.num_slots = self.ring.num_slots
        self.first_of = [self.rank_at(self.node_of(rank), 0) for rank in range(self.shape.num_ranks)]
        # SM microseconds of a row: what it takes once, and for each copy.
        self.deliver_sm_us = self.row_bytes * 1e-3 / machine.sm_load_gbps + self.times.deliver_sm_us
        self.store_sm_us = self.row_bytes * 1e-3 / machine.sm_store_gbps
        self.stage_us = 2 * machine.flag_us  # a row's way through a stage, as long as a flag takes there and back
        self.put_sm_us, self.put_warp_us = self.message_bytes * self.copy_sm, self.message_bytes * self.put_warp
        if self.use.sends_directly:
            per_byte = 1e-3 / machine.sm_load_gbps + 1e-3 / machine.sm_store_gbps
            self.put_sm_us = self.message_bytes * per_byte + self.times.send_sm_us
            self.put_warp_us = self.message_bytes * 1e-3 / self.times.send_warp_gbps
        self.senders: list[list[Warps]] = []  # of each place
        self.deliverers: list[dict[int, Warps]] = []  # of each SM that delivers
        # When the rows that were last brought into a block's stages land.
        self.stages = [[deque[float](maxlen=self.use.num_stages) for _ in gpu.sms] for gpu in self.gpus]
        self.chunks: dict[tuple[int, int], list[list[Row]]] = {}  # from each rank to each other node
        self.own_rows: list[list[Row]] = []
        self.num_outstanding = [0] * len(self.gpus)  # per source: chunks whose credit has not come, own rows not landed
        self.num_uncredited = [[0] * self.num_places for _ in self.gpus]  # chunks of each place
        places = range(self.num_places)
        num_send_warps, work = self.use.send_warps, self.pack
        if self.use.sends_directly:
            num_send_warps, work = self.use.deliver_warps, self.put_rows
        elif self.use.num_team_senders:
            num_send_warps += self.use.deliver_warps
        for rank in range(len(self.gpus)):
            self.senders.append([Warps(num_send_warps, work, partial(self.help, rank, place)) for place in places])
            sms = {self.use.deliverer(place) for place in places}
            self.deliverers.append(
                {sm: Warps(self.use.deliver_warps, self.forward, partial(self.push, rank, sm)) for sm in sorted(sms)}
            )
            self.own_rows.append(rows_of(self.routing[rank, :, self.node_of(rank)])[::-1])
            self.num_outstanding[rank] += len(self.own_rows[rank])
            for node in self.other_nodes(rank):
                rows = rows_of(self.routing[rank, :, node])
                step = self.ring.chunk_rows(len(rows))
                self.chunks[rank, node] = [rows[first : first + step] for first in range(0, len(rows), step)]
                self.num_outstanding[rank] += len(self.chunks[rank, node])
                for chunk in range(len(self.chunks[rank, node])):
                    self.num_uncredited[rank][self.place_of(chunk)] += 1
            self.clock.at(self.machine.launch_us + self.times.handshake_us, self.start, rank)

    def place_of(self, chunk: int) -> int:
        return chunk % self.num_slots % self.num_places

    def start(self, rank: int) -> None:
        self.gpus[rank].end = self.clock.now
        for warps in self.deliverers[rank].values():
            warps.begin()
        for slot in range(self.num_slots):
            for node in self.other_nodes(rank):
                self.offer(rank, node, slot)
        for warps in self.senders[rank]:
            warps.begin()

    # --- own rows ---

    def push(self, rank: int, sm: int) -> bool:
        return self.push_rows(rank, sm, self.deliverers[rank][sm], 1)

    def help(self, rank: int, place: int) -> bool:
        """A sender's warp has no chunk to send. Through the ring it helps when all are credited."""
        if not self.use.num_team_senders or (self.num_uncredited[rank][place] and not self.use.sends_directly):
            return False
        return self.push_rows(rank, self.use.sender(place), self.senders[rank][place], HELP_ROWS)

    def push_rows(self, rank: int, sm: int, warps: Warps, most: int) -> bool:
        if not self.own_rows[rank]:
            return False
        free, landed = self.deliver(rank, sm, self.own_rows[rank].pop())
        self.settle(rank, landed)
        self.clock.at(free, self.pushed, rank, sm, warps, most - 1)
        return True

    def pushed(self, rank: int, sm: int, warps: Warps, most: int) -> None:
        if most == 0 or not self.push_rows(rank, sm, warps, most):
            warps.release()

    def deliver(self, rank: int, sm: int, row: Row) -> tuple[float, float]:
        """A warp of ``rank`` loads a row once and stores it to each rank of its node that wants it.

        Returns when the warp goes on (before the row has landed, as long as the block has stages) and when the row has
        landed.
        """
        now, gpu, first = self.clock.now, self.gpus[rank], self.first_of[rank]
        self.rows_landed += len(row)
        busy = gpu.sms[sm].serve(now, self.deliver_sm_us + len(row) * self.store_sm_us)
        landed = max(busy, now + self.stage_us)
        for local in row:
            if first + local != rank:
                through = self.gpus[first + local].nvlink_in.serve(now, self.row_bytes)
                landed = max(landed, through, gpu.nvlink_out.serve(now, self.row_bytes))
        stages = self.stages[rank][sm]
        emptied = stages[0] if len(stages) == stages.maxlen else now
        stages.append(landed)
        return max(now + self.times.deliver_warp_us, emptied), landed

    # --- rows for other nodes ---

    def offer(self, rank: int, node: int, chunk: int) -> None:
        """The slot of this chunk is free."""
        if chunk < len(self.chunks[rank, node]):
            self.senders[rank][self.place_of(chunk)].want(rank, node, chunk)

    def pack(self, rank: int, node: int, chunk: int, index: int = 0) -> None:
        """Into the send ring, row by row; all at once where a NIC puts them, since little else wants the SM then."""
        is_nic, num_rows = self.machine.nic_gbps is not None, len(self.chunks[rank, node][chunk])
        packed = num_rows if is_nic else 1
        num_bytes, now, sm = packed * self.message_bytes, self.clock.now, self.use.sender(self.place_of(chunk))
        busy = self.gpus[rank].sms[sm].serve(now, num_bytes * self.copy_sm)
        free = max(busy, now + num_bytes * self.copy_warp)
        if index + packed < num_rows:
            self.clock.at(free, self.pack, rank, node, chunk, index + packed)
        else:
            self.clock.at(free, self.post if is_nic else self.put_rows, rank, node, chunk)

    def post(self, rank: int, node: int, chunk: int) -> None:
        """The chunk to the NIC."""
        place, forwarder, num_rows = self.place_of(chunk), self.rank_at(node, rank), len(self.chunks[rank, node][chunk])
        free = self.send(rank, forwarder, num_rows, self.use.sender(place), self.arrive, rank, forwarder, chunk)
        self.clock.at(free, self.senders[rank][place].release)

    def put_rows(self, rank: int, node: int, chunk: int, index: int = 0) -> None:
        """By stores: out of the send ring, or out of shared memory, where bulk loads have brought the row before."""
        now, place, forwarder = self.clock.now, self.place_of(chunk), self.rank_at(node, rank)
        is_last = index + 1 == len(self.chunks[rank, node][chunk])
        a, b = self.gpus[rank], self.gpus[forwarder]
        a.network_bytes += self.message_bytes + (8 if is_last else 0)
        a.least_network_bytes += self.least_bytes
        through = max(a.nvlink_out.serve(now, self.message_bytes), b.nvlink_in.serve(now, self.message_bytes))
        busy = a.sms[self.use.sender(place)].serve(now, self.put_sm_us)
        free = max(through, busy, now + self.put_warp_us)
        if not is_last:
            self.clock.at(free, self.put_rows, rank, node, chunk, index + 1)
            return
        self.clock.at(free + self.machine.network_us, self.arrive, rank, forwarder, chunk)
        self.clock.at(free, self.senders[rank][place].release)

    def arrive(self, rank: int, forwarder: int, chunk: int) -> None:
        self.clock.at(self.clock.now + self.times.arrival_us, self.found, rank, forwarder, chunk)

    def found(self, rank: int, forwarder: int, chunk: int) -> None:
        self.deliverers[forwarder][self.use.deliverer(self.place_of(chunk))].want(rank, forwarder, chunk)

    def forward(self, rank: int, forwarder: int, chunk: int, index: int = 0) -> None:
        rows, sm = self.chunks[rank, self.node_of(forwarder)][chunk], self.use.deliverer(self.place_of(chunk))
        free, landed = self.deliver(forwarder, sm, rows[index])
        if index + 1 < len(rows):
            self.clock.at(free, self.forward, rank, forwarder, chunk, index + 1)
        else:
            self.clock.at(free, self.deliverers[forwarder][sm].release)
            self.clock.at(landed, self.forwarded, rank, forwarder, chunk)

    def forwarded(self, rank: int, forwarder: int, chunk: int) -> None:
        self.gpus[forwarder].end = max(self.gpus[forwarder].end, self.clock.now)
        self.clock.at(
            self.clock.now + self.times.credit_us, self.tell, self.credit, rank, self.node_of(forwarder), chunk
        )

    def credit(self, rank: int, node: int, chunk: int) -> None:
        self.settle(rank, self.clock.now)
        place = self.place_of(chunk)
        self.num_uncredited[rank][place] -= 1
        self.offer(rank, node, chunk + self.num_slots)
        if not self.num_uncredited[rank][place]:
            self.senders[rank][place].begin()

    def settle(self, rank: int, time: float) -> None:
        self.num_outstanding[rank] -= 1
        self.gpus[rank].end = max(self.gpus[rank].end, time)

    def finish(self) -> None:
        """DONE of all ranks of the node."""
        per_node = self.shape.ranks_per_node
        for first in range(0, len(self.gpus), per_node):
            node = self.gpus[first : first + per_node]
            end = max(gpu.end for gpu in node) + self.machine.flag_us + self.times.exit_us
            for gpu in node:
                gpu.end = end

    def unfinished(self) -> str:
        return ", ".join(f"rank {r}: {n} chunks without credit" for r, n in enumerate(self.num_outstanding) if n)


def rows_of(in_local: Any) -> list[Row]:
    """Of tokens that may go to a node (``[T, P]``): those that do."""
    num_ranks = in_local.shape[1]
    every = [tuple(rank for rank in range(num_ranks) if code >> rank & 1) for code in range(1 << num_ranks)]
    codes = in_local @ (1 << np.arange(num_ranks))
    return [every[code] for code in codes[codes > 0].tolist()]
