"""What is simulated: shape, machine and kernel; the routing, drawn at random; the ranks with their links and SMs.

Symbols as in `deep_ep.internode_model`.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass, field, replace
from functools import lru_cache
from typing import Any

import numpy as np

from deep_ep.internode_model import CHUNK_BYTES, Machine, Operation, Ring, Shape

from .engine import Clock, Server

# Of dispatch_shape.cpp.
LEAST_DIVIDED_SMS, MAX_PART_BYTES, SHARED_BYTES, ENOUGH_BYTES = 2, 16384, 214 << 10, 186 << 10
# Of combine.cu: warps beside the one for requests; those of a block that forwards and collects; of one that collects.
COMBINE_WARPS, BOTH_FORWARD_WARPS, SOURCE_WARPS = 15, 9, (7, 6, 5)
MAX_TABLE_BYTES, CONTEXT_BYTES, STAGE_ITEM_BYTES, LEAST_PART_BYTES = 64 << 10, 24, 40, 1024
# Shared memory of a block, less what the kernel declares (about 3 KiB); what a source warp keeps of a token.
COMBINE_SHARED_BYTES, SCRATCH_BYTES = 224 << 10, 1296


@dataclass(frozen=True, kw_only=True)
class DispatchTimes:
    """What one state of dispatch's kernels takes beside moving bytes. docs/internode-model.md has the origins.

    Attributes:
        handshake_us: from a kernel's begin until it may store to its node's ranks.
        exit_us: of a call, after its last row has landed and DONE is out.
        credit_us: from a chunk's last load until its credit leaves: one warp gives all back, and its fence waits for
            everything that the SM has under way.
        arrival_us: from a chunk's arrival until a deliver warp can take it: one warp finds them for all. 0: deliver
            warps look themselves, which ``deliver_warp_us`` has in it.
        deliver_warp_us: a row keeps a deliver warp for that long if the SM does little else.
        deliver_sm_us, send_sm_us: of the SM, for each row that is delivered, and put out of shared memory.
        send_warp_gbps: of one warp that puts rows out of shared memory.
    """

    handshake_us: float = 6.0
    exit_us: float = 6.5
    credit_us: float = 3.5
    arrival_us: float = 3.6
    deliver_warp_us: float = 0.66
    deliver_sm_us: float = 0.0
    send_sm_us: float = 0.11
    send_warp_gbps: float = 3.0


NOW = DispatchTimes()
# Of 2026-11-22 until 63a3c4e, while deliver warps looked for chunks themselves.
BEFORE = DispatchTimes(arrival_us=0.0, deliver_warp_us=1.84, deliver_sm_us=0.044, send_sm_us=0.061)
# Of the records of four H200s and of the first ones of two, before rows took fewer instructions.
EARLIER = replace(BEFORE, deliver_warp_us=3.0, deliver_sm_us=0.18)
# Inside one node dispatch is another backend's, of which no such times are known: a flag before, one behind.
IN_NODE = DispatchTimes(handshake_us=1.3, exit_us=0.0, deliver_warp_us=0.0, deliver_sm_us=0.0)


@dataclass(frozen=True, kw_only=True)
class CombineTimes:
    """The same of combine's kernels of teams.

    Attributes:
        handshake_us, exit_us: as of dispatch.
        request_us: from a slot's being free until its request is on its way.
        answer_us: from an answer's arrival until a source warp can take its block: one warp looks at all words.
        sum_sm_gbps, sum_warp_us: of rows in stages that are added up: of the SM; of a warp, for each whole row.
        put_sm_gbps, put_warp_gbps: of sums put out of shared memory.
    """

    handshake_us: float = 6.0
    exit_us: float = 6.5
    request_us: float = 5.0
    answer_us: float = 12.0
    sum_sm_gbps: float = 73.0
    sum_warp_us: float = 1.3
    put_sm_gbps: float = 26.4
    put_warp_gbps: float = 3.0


COMBINE_NOW = CombineTimes()
# Of 2026-11-22 until 63a3c4e, while loads of a sum were mixed with its additions.
COMBINE_BEFORE = CombineTimes(sum_sm_gbps=63.7, sum_warp_us=1.65)


@dataclass(frozen=True, kw_only=True)
class Teams:
    """Who serves which slots. ``num_team_senders``: of a team; 0: every block plays both roles."""

    num_sms: int
    num_team_senders: int

    @property
    def num_places(self) -> int:
        """Slot k of every stream belongs to place k % places, at both ends."""
        team_size = self.num_team_senders + 1
        return self.num_sms - (self.num_sms // team_size if self.num_team_senders else 0)

    def sender(self, place: int) -> int:
        """The SM that sends for a place."""
        return place + (place // self.num_team_senders if self.num_team_senders else 0)

    def deliverer(self, place: int) -> int:
        """The SM that delivers for a place. The last team may have no deliverer; its senders then do both."""
        if not self.num_team_senders:
            return place
        sm = (place // self.num_team_senders + 1) * (self.num_team_senders + 1) - 1
        return sm if sm < self.num_sms else self.sender(place)


@dataclass(frozen=True, kw_only=True)
class DispatchShape(Teams):
    """How a dispatch uses its SMs.

    Attributes:
        sends_directly: senders put rows out of shared memory, not out of the send ring.
        deliver_warps, send_warps: of a block that does so.
        num_stages: rows that a block's deliver warps have on their way.
    """

    sends_directly: bool
    deliver_warps: int
    send_warps: int
    num_stages: int


@dataclass(frozen=True, kw_only=True)
class CombineShape(Teams):
    """How a combine uses its SMs: forwarders send, collectors deliver.

    Attributes:
        ring: as many slots of as many rows as the blocks' tables hold.
        direct_warps, direct_stages, direct_parts: of a forwarder that puts sums out of shared memory; parts of a row. 0
            warps: all put together in the send ring.
        ring_warps: of a forwarder that puts sums together in the send ring.
        both_warps: forward and source warps of a block that plays both roles.
        source_warps, source_stages, source_parts: of a collector; 0 stages: it loads rows where it adds them up.
    """

    ring: Ring
    direct_warps: int
    direct_stages: int
    direct_parts: int
    ring_warps: int
    both_warps: tuple[int, int]
    source_warps: int
    source_stages: int
    source_parts: int


@dataclass(frozen=True, kw_only=True)
class Kernel:
    """How the kernels across nodes use a GPU; what is ``None`` is as in the kernels themselves.

    Attributes:
        num_sms: blocks, one per SM.
        num_team_senders: of dispatch's teams of senders and one deliverer each; 0: every block sends and delivers.
        may_send_directly: dispatch and combine may put rows out of shared memory where stores reach the peers.
        deliver_warps: of a block of dispatch: store rows of other nodes, and while there are none the own rows.
        deliver_stages: of such a warp.
        send_warps: of a block of dispatch: pack messages and put them. In a team's sender the deliver warps do so, too.
        forward_warps, source_warps: of a block of combine: sum for ranks of other nodes, sum the own tokens.
        forward_stages: of such a warp that puts out of shared memory.
        ring_bytes: of one ring; a rank keeps two per other node.
        chunk_bytes: what a slot aims at.
        times: of dispatch across nodes.
        combine_times: ``None``: combine as it was until 2026-11-22, without teams and stages.
    """

    num_sms: int = 24
    num_team_senders: int | None = None
    may_send_directly: bool = True
    deliver_warps: int | None = None
    deliver_stages: int | None = None
    send_warps: int | None = None
    forward_warps: int | None = None
    source_warps: int | None = None
    forward_stages: int | None = None
    ring_bytes: int = 12 << 20
    chunk_bytes: int = CHUNK_BYTES
    times: DispatchTimes = NOW
    combine_times: CombineTimes | None = COMBINE_NOW

    def combine_shape(self, shape: Shape, machine: Machine) -> CombineShape:
        """As ``csrc/internode/combine.cu`` of deepep-nvshmem chooses where copies in bulk are to be had."""
        num_nodes, num_ranks = shape.num_nodes, shape.ranks_per_node
        ring = Ring.of(
            self.ring_bytes,
            shape.message_bytes("combine"),
            self.chunk_bytes,
            Ring.most_slots("combine", num_nodes),
        )
        if self.combine_times is None:
            # Of 19 warps 10 forwarded, 14 where a node is one rank, which has nothing of its own to sum.
            forward = self.forward_warps or (14 if num_ranks == 1 else 10)
            source = self.source_warps or 19 - forward
            return CombineShape(
                num_sms=self.num_sms,
                num_team_senders=0,
                ring=ring,
                direct_warps=0,
                direct_stages=0,
                direct_parts=0,
                ring_warps=forward,
                both_warps=(forward, source),
                source_warps=source,
                source_stages=0,
                source_parts=0,
            )
        senders = min(1, self.num_sms - 1)
        num_places = Teams(num_sms=self.num_sms, num_team_senders=senders).num_places
        ring = _limited(ring, num_nodes, num_ranks, num_places)
        num_slots = -(-ring.num_slots // num_places)
        num_contexts = num_slots * (num_nodes - 1)
        budget = COMBINE_SHARED_BYTES - num_contexts * CONTEXT_BYTES
        collect_budget = budget - 4 * num_slots * _slot_words(ring, num_nodes, num_ranks)
        row, stages = shape.row_bytes("combine"), min(num_ranks, 4) + min(num_nodes - 1, 4)
        parts_of = {n: _num_parts(row, stages, collect_budget // n - SCRATCH_BYTES) for n in SOURCE_WARPS}
        source = self.source_warps or next((n for n in SOURCE_WARPS if parts_of[n] == 1), SOURCE_WARPS[0])
        source_parts = _num_parts(row, stages, collect_budget // source - SCRATCH_BYTES)
        both_forward = self.forward_warps or BOTH_FORWARD_WARPS
        direct, direct_parts, direct_stages = 0, 0, self.forward_stages or num_ranks + 1
        if senders and machine.nic_gbps is None and self.may_send_directly:
            direct = self.forward_warps or (14 if num_ranks == 1 else 10)
            budget -= 4 * num_contexts * ring.slot_rows * num_ranks
            direct_parts = _num_parts(row, direct_stages, budget // direct, -(-4 * shape.num_topk // 16) * 16)
        return CombineShape(
            num_sms=self.num_sms,
            num_team_senders=senders,
            ring=ring,
            direct_warps=direct if direct_parts else 0,
            direct_stages=direct_stages,
            direct_parts=direct_parts,
            ring_warps=self.forward_warps or COMBINE_WARPS,
            both_warps=(both_forward, min(source, COMBINE_WARPS - both_forward)),
            source_warps=source,
            source_stages=stages if source_parts else 0,
            source_parts=source_parts,
        )

    def dispatch_shape(self, shape: Shape, machine: Machine) -> DispatchShape:
        """As ``csrc/internode/dispatch_shape.cpp`` of deepep-nvshmem chooses where copies in bulk are to be had."""
        row = shape.hidden * (1 if shape.is_fp8 else 2)
        part = min(row, MAX_PART_BYTES)
        num_side = shape.row_bytes("dispatch") - row + 8 * shape.num_topk + 4 * max(8, shape.ranks_per_node + 1)
        stage = -(-(part + num_side) // 128) * 128
        num_stages = SHARED_BYTES // stage
        senders = self.num_team_senders
        if senders is None:
            senders = 1 if self.num_sms >= LEAST_DIVIDED_SMS else 0
        if shape.num_nodes == 1:
            senders = 0
        divided = 12 if shape.ranks_per_node == 1 else 7
        usual, fed = (divided, num_stages // 2) if senders else (4, num_stages // 3)
        deliver = self.deliver_warps or max(1, min(usual, fed))
        most = 8 if senders else max(3, ENOUGH_BYTES // (deliver * stage))
        num_each = self.deliver_stages or min(8, most, num_stages // deliver)
        return DispatchShape(
            num_sms=self.num_sms,
            num_team_senders=senders,
            sends_directly=senders > 0 and machine.nic_gbps is None and self.may_send_directly and part == row,
            deliver_warps=deliver,
            send_warps=self.send_warps or (15 - deliver if senders else 11),
            num_stages=deliver * max(1, num_each - 1),
        )


def _slot_words(ring: Ring, num_nodes: int, num_ranks: int) -> int:
    return 2 * num_nodes + ring.slot_rows * (num_nodes + num_ranks)


def _limited(ring: Ring, num_nodes: int, num_ranks: int, num_places: int) -> Ring:
    """Fewer rows of a slot, then fewer slots, until a block's tables of them are small enough."""

    def num_bytes(ring: Ring) -> int:
        each = (num_nodes - 1) * CONTEXT_BYTES + 4 * _slot_words(ring, num_nodes, num_ranks)
        return -(-ring.num_slots // num_places) * each

    while ring.slot_rows > 1 and num_bytes(ring) > MAX_TABLE_BYTES:
        ring = replace(ring, slot_rows=ring.slot_rows - 1)
    while ring.num_slots > 2 and num_bytes(ring) > MAX_TABLE_BYTES:
        ring = replace(ring, num_slots=ring.num_slots - 1)
    return ring


def _num_parts(row_bytes: int, num_stages: int, warp_bytes: int, tail_bytes: int = 0) -> int:
    """Into which a row is cut for stages in so many bytes of a warp; 0: they do not fit."""
    most = (warp_bytes // num_stages - STAGE_ITEM_BYTES) // 128 * 128 - tail_bytes
    return 0 if most < min(LEAST_PART_BYTES, row_bytes) else -(-row_bytes // most)


@dataclass(frozen=True, kw_only=True)
class Scenario:
    """One call to simulate; ``seed`` of the routing."""

    operation: Operation
    shape: Shape
    machine: Machine
    kernel: Kernel = field(default_factory=Kernel)
    seed: int = 0


@dataclass(frozen=True, kw_only=True)
class Outcome:
    """What came out: times of the slowest rank, bytes and shares as the mean over ranks.

    Attributes:
        seconds: of the call, launch and flags included.
        network_bytes: messages and signals that a rank sends to other nodes.
        least_network_bytes: of these, rows with their scales, choices and weights.
        nvlink_bytes: what leaves a GPU over NVLink.
        logical_bytes: rows to all nodes, the own one included.
        rows_landed: rows stored at their destinations (dispatch) or tokens combined, over all ranks.
        busy: share of ``seconds`` in which each resource of the busiest rank works.
    """

    seconds: float
    network_bytes: float
    least_network_bytes: float
    nvlink_bytes: float
    logical_bytes: float
    rows_landed: int
    busy: dict[str, float]

    @property
    def logical_rdma_gbps(self) -> float:
        return self.logical_bytes / self.seconds / 1e9


@lru_cache(maxsize=1)  # dispatch and combine of a shape follow one another
def draw_routing(shape: Shape, seed: int) -> Any:
    """bool ``[N, T, D, P]``: which rank gets which token of which rank. Not to be written to."""
    random = np.random.default_rng(seed)
    found = np.zeros((shape.num_ranks, shape.num_tokens, shape.num_ranks), dtype=bool)
    per_rank = shape.num_experts // shape.num_ranks
    for in_rank in found:
        appeal = random.random((shape.num_tokens, shape.num_experts), dtype=np.float32)
        if shape.num_topk_groups < shape.num_groups:
            grouped = appeal.reshape(shape.num_tokens, shape.num_groups, -1)
            losers = np.argsort(grouped.max(axis=2), axis=1)[:, : shape.num_groups - shape.num_topk_groups]
            np.put_along_axis(grouped, losers[:, :, None], np.float32(-1), axis=1)
        chosen = np.argpartition(appeal, shape.num_experts - shape.num_topk, axis=1)[:, -shape.num_topk :]
        np.put_along_axis(in_rank, chosen // per_rank, True, axis=1)
    found.flags.writeable = False
    return found.reshape(shape.num_ranks, shape.num_tokens, shape.num_nodes, shape.ranks_per_node)


class Gpu:
    """Links and SMs of one rank."""

    def __init__(self, scenario: Scenario) -> None:
        machine = scenario.machine
        is_push = scenario.operation == "dispatch"
        nvlink = (machine.nvlink_push_gbps if is_push else machine.nvlink_pull_gbps) * 1e3
        self.nvlink_out, self.nvlink_in = Server(nvlink), Server(nvlink)
        self.nic_out = self.nic_in = None
        if machine.nic_gbps is not None:
            self.nic_out, self.nic_in = Server(machine.nic_gbps * 1e3), Server(machine.nic_gbps * 1e3)
        self.sms = [Server(1.0) for _ in range(scenario.kernel.num_sms)]
        self.network_bytes = 0.0
        self.least_network_bytes = 0.0
        self.end = 0.0

    def share_busy(self, seconds: float) -> dict[str, float]:
        shares = {"NVLink": max(self.nvlink_out.busy_us, self.nvlink_in.busy_us)}
        if self.nic_out is not None and self.nic_in is not None:
            shares["NIC"] = max(self.nic_out.busy_us, self.nic_in.busy_us)
        shares["SMs"] = sum(sm.busy_us for sm in self.sms) / len(self.sms)
        return {name: busy / seconds / 1e6 for name, busy in shares.items()}


class Cluster(ABC):
    """What dispatch and combine have in common: ranks, routing, the way between nodes, what came out."""

    def __init__(self, scenario: Scenario, routing: Any | None = None) -> None:
        self.scenario, self.shape, self.machine = scenario, scenario.shape, scenario.machine
        self.kernel = scenario.kernel
        self.clock = Clock()
        self.routing = draw_routing(self.shape, scenario.seed) if routing is None else routing
        self.gpus = [Gpu(scenario) for _ in range(self.shape.num_ranks)]
        self.row_bytes = self.shape.row_bytes(scenario.operation)
        self.message_bytes = self.shape.message_bytes(scenario.operation)
        self.least_bytes = self.row_bytes + self.shape.routing_bytes(scenario.operation)
        self.rows_landed = 0
        # SM microseconds and warp microseconds per byte.
        self.copy_sm, self.copy_warp = 1e-3 / self.machine.sm_copy_gbps, 1e-3 / self.machine.warp_copy_gbps
        self.put_warp = 1e-3 / self.machine.warp_put_gbps

    def node_of(self, rank: int) -> int:
        return rank // self.shape.ranks_per_node

    def rank_at(self, node: int, like: int) -> int:
        """The rank of ``node`` with the local index of rank ``like``."""
        return node * self.shape.ranks_per_node + like % self.shape.ranks_per_node

    def other_nodes(self, rank: int) -> list[int]:
        """In the order in which a rank serves them: beginning behind its own, so that not all begin with one."""
        own = self.node_of(rank)
        return [(own + step) % self.shape.num_nodes for step in range(1, self.shape.num_nodes)]

    def send(self, src: int, dst: int, num_rows: int, sm: int, arrived: Any, *arguments: Any) -> float:
        """Put rows into the peer's ring; ``arrived`` is called there. Returns when the sending warp is free."""
        now, num_bytes = self.clock.now, num_rows * self.message_bytes
        a, b = self.gpus[src], self.gpus[dst]
        a.network_bytes += num_bytes + 8
        a.least_network_bytes += num_rows * self.least_bytes
        if a.nic_out is not None and b.nic_in is not None:
            free = now
            through = max(a.nic_out.serve(now, num_bytes + 8), b.nic_in.serve(now, num_bytes + 8))
        else:
            through = max(a.nvlink_out.serve(now, num_bytes), b.nvlink_in.serve(now, num_bytes))
            busy = a.sms[sm].serve(now, num_bytes * self.copy_sm)
            free = through = max(through, busy, now + num_bytes * self.put_warp)
        self.clock.at(through + self.machine.network_us, arrived, *arguments)
        return free

    def tell(self, heard: Any, *arguments: Any) -> None:
        """A credit or a request to another node."""
        self.clock.at(self.clock.now + self.machine.network_us, heard, *arguments)

    def copy_rows(self, copies: Any, home: int, *, is_pull: bool) -> float:
        """Rows between rank ``home`` and its node's ranks, ``copies[local]`` of them. When the links are through."""
        now, first = self.clock.now, self.node_of(home) * self.shape.ranks_per_node
        here, total, through = self.gpus[home], 0, now
        for local, count in enumerate(copies):
            if count and first + local != home:
                total += count
                peer = self.gpus[first + local]
                link = peer.nvlink_out if is_pull else peer.nvlink_in
                through = max(through, link.serve(now, count * self.row_bytes))
        if total:
            link = here.nvlink_in if is_pull else here.nvlink_out
            through = max(through, link.serve(now, total * self.row_bytes))
        return through

    def outcome(self) -> Outcome:
        """After the clock has run out. Raises if something never came to its end."""
        left = self.unfinished()
        if left:
            raise RuntimeError(f"the simulation stands still at {self.clock.now:.1f} us: {left}")
        seconds = max(gpu.end for gpu in self.gpus) / 1e6
        count = len(self.gpus)
        logical = int(self.routing.any(axis=3).sum()) * self.row_bytes
        busy: dict[str, float] = {}
        for gpu in self.gpus:
            for name, share in gpu.share_busy(seconds).items():
                busy[name] = max(busy.get(name, 0.0), share)
        return Outcome(
            seconds=seconds,
            network_bytes=sum(gpu.network_bytes for gpu in self.gpus) / count,
            least_network_bytes=sum(gpu.least_network_bytes for gpu in self.gpus) / count,
            nvlink_bytes=sum(gpu.nvlink_out.served for gpu in self.gpus) / count,
            logical_bytes=logical / count,
            rows_landed=self.rows_landed,
            busy=busy,
        )

    @abstractmethod
    def unfinished(self) -> str:
        """What still waits; empty if nothing does."""
