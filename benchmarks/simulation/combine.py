"""Combine across nodes: the source asks each node for the partial sums of a block of its tokens; a warp there adds up
the rows and puts the sums into the source's ring; the source adds its own node's and asks for a later block.

Blocks form teams: forwarders that bring rows into stages, add them up and put them out of shared memory where stores
reach the peers, else put sums together in the send ring; and collectors, which add up in stages, too."""

from __future__ import annotations

from collections import deque
from typing import Any

import numpy as np

from .cluster import Cluster, CombineTimes, Scenario
from .dispatch import Row, rows_of
from .engine import Warps

Request = tuple[int, int]  # the rank that asks, its block of tokens


class Combine(Cluster):
    def __init__(self, scenario: Scenario, routing: Any | None = None) -> None:
        super().__init__(scenario, routing)
        machine = self.machine
        # Of the earlier kernel a flag before it begins is all that was known.
        self.times = self.kernel.combine_times or CombineTimes(
            handshake_us=machine.flag_us, exit_us=0.0, request_us=0.0, answer_us=0.0
        )
        self.use = self.kernel.combine_shape(self.shape, machine)
        self.ring, self.num_places = self.use.ring, self.use.num_places
        self.num_slots = self.ring.num_slots
        self.sum_sm, self.sum_warp = 1e-3 / machine.sm_sum_gbps, 1e-3 / machine.warp_sum_gbps
        self.staged_sm_us = self.row_bytes * 1e-3 / self.times.sum_sm_gbps
        self.stage_us = 2 * machine.flag_us  # a row's way into a stage
        places = range(self.num_places)
        self.forwarders = [[self._forwarder(rank, place) for place in places] for rank in range(len(self.gpus))]
        self.sources = [[self._source(place) for place in places] for _ in self.gpus]
        # For each rank, block of tokens and node: copies at each local rank, and tokens that have any.
        self.block_tokens = self.ring.chunk_rows(self.shape.num_tokens)
        starts = np.arange(0, self.shape.num_tokens, self.block_tokens)
        self.num_blocks = len(starts)
        self.copies: list[Any] = []
        self.num_rows: list[Any] = []
        self.num_missing: list[Any] = []
        # Of a block: rows added up in stages, those added up where they lie, waits for rows of other ranks.
        self.staged: list[Any] = []
        self.rows: dict[tuple[int, int], tuple[list[Row], Any]] = {}  # to each other node; where those of a block begin
        for rank in range(len(self.gpus)):
            in_rank, own = self.routing[rank], self.node_of(rank)
            rows = np.add.reduceat(in_rank.any(axis=2), starts, axis=0, dtype=np.int64)
            self.copies.append(np.add.reduceat(in_rank, starts, axis=0, dtype=np.int64).tolist())
            self.num_rows.append(rows.tolist())
            self.staged.append(np.add.reduceat(self._addends(rank), starts, axis=0).tolist())
            if self.use.direct_warps:
                first = np.concatenate([np.zeros_like(rows[:1]), rows.cumsum(axis=0)])
                for node in self.other_nodes(rank):
                    self.rows[rank, node] = rows_of(in_rank[:, node]), first[:, node].tolist()
            rows[:, own] = 0
            self.num_missing.append((rows > 0).sum(axis=1).tolist())
            self.clock.at(machine.launch_us + self.times.handshake_us, self.start, rank)
        self.num_open = [self.num_blocks] * len(self.gpus)

    def _is_both(self, place: int) -> bool:
        return self.use.sender(place) == self.use.deliverer(place)

    def _forwarder(self, rank: int, place: int) -> Warps | DirectForwarder:
        if self._is_both(place):
            return Warps(self.use.both_warps[0], self.answer)
        return DirectForwarder(self, rank, place) if self.use.direct_warps else Warps(self.use.ring_warps, self.answer)

    def _source(self, place: int) -> Warps:
        return Warps(self.use.both_warps[1] if self._is_both(place) else self.use.source_warps, self.add_nodes)

    def _addends(self, rank: int) -> Any:
        """``[T, 3]``: of a token, as in ``staged``."""
        own, in_rank = self.node_of(rank), self.routing[rank]
        num_own = in_rank[:, own].sum(axis=1)
        total = num_own + in_rank.any(axis=2).sum(axis=1) - (num_own > 0)
        is_staged = total <= self.use.source_stages
        # Rows that lie here need none: what a warp takes for a row has their way in it.
        waits = num_own > in_rank[:, own, rank % self.shape.ranks_per_node]
        parts = self.use.source_parts * (is_staged & waits)
        return np.stack([total * is_staged, total * ~is_staged, parts], axis=1).astype(np.int64)

    def place_of(self, block: int) -> int:
        return block % self.num_slots % self.num_places

    def start(self, rank: int) -> None:
        for block in range(min(self.num_slots, self.num_blocks)):
            self.free(rank, block)

    def free(self, rank: int, block: int) -> None:
        """The block's slot is free."""
        self.clock.at(self.clock.now + self.times.request_us, self.ask, rank, block)

    def ask(self, rank: int, block: int) -> None:
        if not self.num_missing[rank][block]:
            self.sources[rank][self.place_of(block)].want(rank, block)
        for node in self.other_nodes(rank):
            if self.num_rows[rank][block][node]:
                self.tell(self.asked, rank, node, block)

    def asked(self, rank: int, node: int, block: int) -> None:
        forwarder = self.rank_at(node, rank)
        self.forwarders[forwarder][self.place_of(block)].want(rank, forwarder, block)

    # --- through the send ring, and in no stages ---

    def sum_rows(self, rank: int, sm: int, copies: list[int]) -> float:
        """A warp of ``rank`` sums rows of its node's ranks where they lie."""
        now, num_bytes = self.clock.now, sum(copies) * self.row_bytes
        busy = self.gpus[rank].sms[sm].serve(now, num_bytes * self.sum_sm)
        warp = now + self.machine.flag_us + num_bytes * self.sum_warp
        return max(busy, warp, self.copy_rows(copies, rank, is_pull=True))

    def answer(self, rank: int, forwarder: int, block: int) -> None:
        copies, sm = self.copies[rank][block][self.node_of(forwarder)], self.use.sender(self.place_of(block))
        self.clock.at(self.sum_rows(forwarder, sm, copies), self.put, rank, forwarder, block)

    def put(self, rank: int, forwarder: int, block: int) -> None:
        place, num_rows = self.place_of(block), self.num_rows[rank][block][self.node_of(forwarder)]
        free = self.send(forwarder, rank, num_rows, self.use.sender(place), self.arrive, rank, block)
        warps = self.forwarders[forwarder][place]
        assert isinstance(warps, Warps)  # others put out of their stages
        self.clock.at(free, warps.release)

    # --- collecting ---

    def arrive(self, rank: int, block: int) -> None:
        self.num_missing[rank][block] -= 1
        if not self.num_missing[rank][block]:
            posted = self.clock.now + self.times.answer_us
            self.clock.at(posted, self.sources[rank][self.place_of(block)].want, rank, block)

    def add_nodes(self, rank: int, block: int) -> None:
        now, sm = self.clock.now, self.gpus[rank].sms[self.use.deliverer(self.place_of(block))]
        staged, elsewhere, num_waits = self.staged[rank][block]
        num_bytes = elsewhere * self.row_bytes
        busy = sm.serve(now, staged * self.staged_sm_us + num_bytes * self.sum_sm)
        landed = self.copy_rows(self.copies[rank][block][self.node_of(rank)], rank, is_pull=True)
        if elsewhere or not self.use.source_stages:
            warp = self.machine.flag_us + num_bytes * self.sum_warp
            landed = max(landed, busy, now + warp)
        # Adding up comes behind the last row's way into its stage, and behind what other warps have the SM do.
        done = max(busy, landed, now + num_waits * self.stage_us) + staged * self.times.sum_warp_us
        self.clock.at(done, self.added, rank, block)

    def added(self, rank: int, block: int) -> None:
        self.sources[rank][self.place_of(block)].release()
        self.num_open[rank] -= 1
        self.rows_landed += min(self.block_tokens, self.shape.num_tokens - block * self.block_tokens)
        self.gpus[rank].end = self.clock.now
        if block + self.num_slots < self.num_blocks:
            self.free(rank, block + self.num_slots)

    def finish(self) -> None:
        """A rank ends when nobody reads its rows any more: those that its node answered have all they asked for."""
        end = max(gpu.end for gpu in self.gpus) + self.machine.network_us + self.machine.flag_us + self.times.exit_us
        for gpu in self.gpus:
            gpu.end = end

    def unfinished(self) -> str:
        return ", ".join(f"rank {r}: {n} blocks not summed" for r, n in enumerate(self.num_open) if n)


class DirectForwarder:
    """The warps of a block that bring rows into stages, part by part, add them up there and put the sums."""

    def __init__(self, combine: Combine, rank: int, place: int) -> None:
        self.combine, self.rank, self.gpu = combine, rank, combine.gpus[rank]
        self.sm = self.gpu.sms[combine.use.sender(place)]
        self.requests = deque[Request]()
        self.idle = [DirectWarp(self) for _ in range(combine.use.direct_warps)]

    def want(self, rank: int, _: int, block: int) -> None:
        self.requests.append((rank, block))
        if self.idle:
            self.idle.pop().step()


class DirectWarp:
    """Loads parts as long as there are stages, then puts the oldest."""

    __slots__ = ("_answer", "_block", "_in_flight", "_num_free", "_part", "_rows", "parent")

    def __init__(self, parent: DirectForwarder) -> None:
        self.parent = parent
        self._num_free = parent.combine.use.direct_stages
        self._rows = deque[Row]()  # of the request that is being loaded
        self._part = 0
        self._answer: Request = (0, 0)
        # When it has landed; its addends; the request that ends with it.
        self._in_flight = deque[tuple[float, int, Request, bool]]()

    def step(self) -> None:
        parent = self.parent
        while (self._rows or self._open()) and len(self._rows[0]) <= self._num_free:
            self._load()
        if not self._in_flight:
            parent.idle.append(self)
            return
        landed, clock = self._in_flight[0][0], parent.combine.clock
        if landed > clock.now:
            clock.at(landed, self._put)
        else:
            self._put()

    def _open(self) -> bool:
        parent, combine = self.parent, self.parent.combine
        if not parent.requests:
            return False
        self._answer = rank, block = parent.requests.popleft()
        rows, first = combine.rows[rank, combine.node_of(parent.rank)]
        self._rows.extend(rows[first[block] : first[block + 1]])
        return True

    def _load(self) -> None:
        parent, combine, holders = self.parent, self.parent.combine, self._rows[0]
        now, own, use = combine.clock.now, parent.rank % combine.shape.ranks_per_node, combine.use
        num_bytes, landed = combine.row_bytes / use.direct_parts, now + combine.stage_us
        for local in holders:
            if local != own:
                peer = combine.gpus[parent.rank - own + local]
                landed = max(landed, peer.nvlink_out.serve(now, num_bytes), parent.gpu.nvlink_in.serve(now, num_bytes))
        self._part += 1
        ends_row = self._part == use.direct_parts
        if ends_row:
            self._part = 0
            self._rows.popleft()
        self._num_free -= len(holders)
        self._in_flight.append((landed, len(holders), self._answer, ends_row and not self._rows))

    def _put(self) -> None:
        _, num_addends, (rank, block), is_last = self._in_flight.popleft()
        parent, combine, now = self.parent, self.parent.combine, self.parent.combine.clock.now
        times, num_parts = combine.times, combine.use.direct_parts
        num_bytes = combine.message_bytes / num_parts
        self._num_free += num_addends
        sm_us, warp_us = num_bytes * 1e-3 / times.put_sm_gbps, num_bytes * 1e-3 / times.put_warp_gbps
        if num_addends > 1:
            sm_us += num_addends * combine.staged_sm_us / num_parts
            warp_us += num_addends * times.sum_warp_us / num_parts
        through = max(parent.gpu.nvlink_out.serve(now, num_bytes), combine.gpus[rank].nvlink_in.serve(now, num_bytes))
        free = max(through, parent.sm.serve(now, sm_us), now + warp_us)
        parent.gpu.network_bytes += num_bytes + (8 if is_last else 0)
        parent.gpu.least_network_bytes += combine.least_bytes / num_parts
        if is_last:
            combine.clock.at(free + combine.machine.network_us, combine.arrive, rank, block)
        combine.clock.at(free, self.step)
