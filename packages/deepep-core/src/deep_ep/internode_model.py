"""What normal mode across nodes should cost: bytes, times and the resources that suffice, from link speeds alone.

Symbols: ``D`` nodes, ``P`` ranks per node, ``N = D * P`` ranks, ``T`` tokens of a rank, ``H`` hidden, ``K`` choices of
a token, ``E`` experts. A token travels once to each node that holds one of its experts, to the rank of its own local
index (the forwarder), and from there over NVLink once to each rank that holds one. Combine takes the same way back.

`fan_out` is exact. `estimate` takes the busiest resource: the links, or the SMs that move the rows; what one machine
reaches of each is a `Machine`, the same for every shape and node count. docs/internode-model.md compares it with
published and measured figures and says what it leaves out.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from functools import lru_cache
from types import MappingProxyType
from typing import Literal

from .errors import ArgumentError

Operation = Literal["dispatch", "combine"]
_ALIGNMENT = 128  # of a row message
_SIGNAL_BYTES = 8


def _aligned(num_bytes: int) -> int:
    return -(-num_bytes // _ALIGNMENT) * _ALIGNMENT


def _checked(owner: str, values: dict[str, int]) -> None:
    for name, value in values.items():
        if isinstance(value, bool) or not isinstance(value, int) or value <= 0:
            raise ArgumentError(f"{owner}.{name} is {value!r}; it has to be a positive int.")


@dataclass(frozen=True, kw_only=True)
class Shape:
    """What is moved, and between whom.

    Attributes:
        num_tokens: of each rank.
        num_groups, num_topk_groups: experts form ``num_groups`` equal groups, and a token chooses its ``num_topk``
            experts in the ``num_topk_groups`` groups that hold its best single experts. 1 and 1: any experts.
        is_fp8: dispatch moves one byte per element and a float32 scale per 128; combine moves bf16 always.
        is_cached: dispatch by a known handle; messages then carry no choices, weights or destination rows.
    """

    num_nodes: int
    ranks_per_node: int = 8
    num_tokens: int = 4096
    hidden: int = 7168
    num_topk: int = 8
    num_experts: int = 256
    num_groups: int = 1
    num_topk_groups: int = 1
    is_fp8: bool = True
    is_cached: bool = False

    def __post_init__(self) -> None:
        _checked("Shape", {name: value for name, value in vars(self).items() if not name.startswith("is_")})
        if self.num_experts % self.num_ranks or self.num_experts % self.num_groups:
            raise ArgumentError(
                f"Shape.num_experts is {self.num_experts}; it has to be a multiple of the {self.num_ranks} ranks and "
                f"of the {self.num_groups} groups."
            )
        reachable = self.num_experts // self.num_groups * self.num_topk_groups
        if self.num_topk_groups > self.num_groups or self.num_topk > reachable:
            raise ArgumentError(
                f"Shape: {self.num_topk_groups} of {self.num_groups} groups hold {reachable} experts, of which a token "
                f"cannot choose {self.num_topk}."
            )

    @property
    def num_ranks(self) -> int:
        return self.num_nodes * self.ranks_per_node

    def row_bytes(self, operation: Operation) -> int:
        """Bytes of a row as it lies in the caller's tensors, with its scales."""
        if operation == "dispatch" and self.is_fp8:
            return self.hidden + -(-self.hidden // 128) * 4
        return self.hidden * 2

    def routing_bytes(self, operation: Operation) -> int:
        """Bytes that have to travel with a row beside it: choices and weights out, weights back."""
        if self.is_cached and operation == "dispatch":
            return 0
        return self.num_topk * (8 if operation == "dispatch" else 4)

    def message_bytes(self, operation: Operation) -> int:
        """Bytes of a row's message between nodes.

        Beside row and routing: out, the destination row at each rank of that node and the source's token number.
        """
        num_bytes = self.row_bytes(operation) + self.routing_bytes(operation)
        if operation == "dispatch" and not self.is_cached:
            num_bytes += 4 + 4 * self.ranks_per_node
        return _aligned(num_bytes)


@dataclass(frozen=True, kw_only=True)
class FanOut:
    """Expected numbers of distinct nodes and ranks of one token, its own included."""

    nodes: float
    ranks: float


@lru_cache(maxsize=1024)
def fan_out(shape: Shape) -> FanOut:
    """Exact for scores without preference: every order of a token's experts is as likely as any other."""
    per_rank = shape.num_experts // shape.num_ranks
    reached = [
        count * (1 - _missed(shape, domain))
        for count, domain in ((shape.num_nodes, per_rank * shape.ranks_per_node), (shape.num_ranks, per_rank))
    ]
    return FanOut(nodes=reached[0], ranks=reached[1])


def _missed(shape: Shape, domain: int) -> float:
    """Probability that none of a token's choices is among ``domain`` consecutive experts.

    Draw experts in the order of their scores. Until the last of the chosen groups shows its first expert, nothing drawn
    lies outside the chosen groups, so everything drawn is chosen; from then on the draws come from the chosen groups
    alone. Walked over (draws, groups seen, whether the domain's own group was seen).
    """
    size = shape.num_experts // shape.num_groups
    if max(domain, size) % min(domain, size):
        raise ArgumentError(
            f"fan_out: groups of {size} experts lie across the borders of ranks or nodes, which hold {domain}; the "
            "formula needs one to be a multiple of the other."
        )
    # Groups that lie in the domain altogether, or the one group that the domain is a part of.
    whole_groups, part = (domain // size, 0) if domain >= size else (0, domain)
    others = shape.num_groups - whole_groups - (1 if part else 0)
    missed, at_draw = 0.0, {(0, False): 1.0}
    for draw in range(shape.num_topk):
        left = shape.num_experts - draw
        following: dict[tuple[int, bool], float] = {}
        for (seen, own), probability in at_draw.items():
            if seen == shape.num_topk_groups:
                pool = size * seen - draw
                avoidable = pool - part if own else pool
                missed += probability * _ratio(avoidable, pool, shape.num_topk - draw)
                continue
            steps = {
                (seen, own): seen * size - draw - (part if own else 0),
                (seen + 1, own): (others - seen + (1 if own else 0)) * size,
            }
            if part and not own:
                steps[seen + 1, True] = size - part
            for state, ways in steps.items():
                if ways > 0:
                    following[state] = following.get(state, 0.0) + probability * ways / left
        at_draw = following
    return missed + sum(at_draw.values())


def _ratio(avoidable: int, pool: int, draws: int) -> float:
    return math.comb(avoidable, draws) / math.comb(pool, draws)


@dataclass(frozen=True, kw_only=True)
class Machine:
    """What one GPU of a machine reaches, in GB/s (1e9 bytes per second) of payload.

    Attributes:
        nvlink_push_gbps, nvlink_pull_gbps: egress per GPU while all GPUs of a node exchange rows.
        nic_gbps: each way per rank; ``None``: nodes are drawn within one NVLink domain, other nodes are reached by
            stores over NVLink and share its egress.
        sm_store_gbps, sm_load_gbps: rows that one SM stores and loads by bulk copies, each counted alone.
        sm_copy_gbps: rows that one SM copies by 16-byte loads and stores.
        sm_sum_gbps: rows that one SM loads and sums in combine.
        warp_copy_gbps, warp_put_gbps, warp_sum_gbps: of one warp that packs messages, that puts them over NVLink, that
            loads and sums rows; its own latency bounds it.
        launch_us: from one call to the next with nothing to move; flag_us: a flag one way inside a node.
        network_us: a small message one way between nodes, as seen by the kernels.
    """

    nvlink_push_gbps: float
    nvlink_pull_gbps: float
    nic_gbps: float | None
    sm_store_gbps: float
    sm_load_gbps: float
    sm_copy_gbps: float
    sm_sum_gbps: float
    warp_copy_gbps: float
    warp_put_gbps: float
    warp_sum_gbps: float
    launch_us: float
    flag_us: float
    network_us: float

    def __post_init__(self) -> None:
        for name, value in vars(self).items():
            if value is not None and not 0 < value < math.inf:
                raise ArgumentError(f"Machine.{name} is {value!r}; it has to be a positive number.")


# Four H200s on NVSwitch, as measured (docs/internode-model.md has the origin of each figure). No NIC.
H200_VIRTUAL_NODES = Machine(
    nvlink_push_gbps=343,
    nvlink_pull_gbps=325,
    nic_gbps=None,
    sm_store_gbps=52,
    sm_load_gbps=263,
    sm_copy_gbps=31,
    sm_sum_gbps=45.7,
    warp_copy_gbps=4.4,
    warp_put_gbps=2.2,
    warp_sum_gbps=3.0,
    launch_us=4.0,
    flag_us=1.3,
    network_us=0.66,
)
# The same GPUs with a 400 Gb/s NIC each. 45 of the line's 50 GB/s is what published runs reach; not measured here.
H200_400G = Machine(**(vars(H200_VIRTUAL_NODES) | {"nic_gbps": 45.0, "network_us": 5.0}))


@dataclass(frozen=True, kw_only=True)
class Estimate:
    """One call as the model sees it; bytes are of one rank on average, each way.

    Attributes:
        seconds: of the call, launch and flags included.
        resource_s: seconds that each resource is busy; the longest one decides.
        logical_rdma_gbps: rows to all nodes, the own one included, over ``seconds``, as DeepEP counts.
        network_bytes: messages and their signals to other nodes, one signal per row at most.
        nvlink_bytes: what leaves the GPU over NVLink.
    """

    seconds: float
    resource_s: dict[str, float]
    logical_rdma_gbps: float
    network_bytes: float
    nvlink_bytes: float

    @property
    def bound_by(self) -> str:
        return max(self.resource_s, key=lambda name: self.resource_s[name])


def estimate(operation: Operation, shape: Shape, machine: Machine, *, num_sms: int | None = None) -> Estimate:
    """Time and bytes of one call.

    Args:
        num_sms: SMs of the kernel; ``None`` leaves them out, as if there were enough.
    """
    rows, remote_rows = _rows(shape)
    row = shape.row_bytes(operation)
    network = remote_rows * (shape.message_bytes(operation) + _SIGNAL_BYTES)
    nvlink = rows.ranks * (1 - 1 / shape.ranks_per_node) * row
    resource_s: dict[str, float] = {}
    rate = machine.nvlink_push_gbps if operation == "dispatch" else machine.nvlink_pull_gbps
    if machine.nic_gbps is None:
        # Both hops leave through the same links; messages are pushed in either operation.
        resource_s["NVLink"] = (nvlink / rate + network / machine.nvlink_push_gbps) / 1e9
        nvlink += network
    else:
        resource_s["NVLink"] = nvlink / rate / 1e9
        resource_s["NIC"] = network / machine.nic_gbps / 1e9
    if num_sms is not None:
        resource_s["SMs"] = _sm_seconds(operation, shape, machine) / num_sms
    hops_us = 2 * machine.flag_us + (2 * machine.network_us if shape.num_nodes > 1 else 0)
    seconds = max(resource_s.values()) + (machine.launch_us + hops_us) / 1e6
    return Estimate(
        seconds=seconds,
        resource_s=resource_s,
        logical_rdma_gbps=rows.nodes * row / seconds / 1e9,
        network_bytes=network,
        nvlink_bytes=nvlink,
    )


def _rows(shape: Shape) -> tuple[FanOut, float]:
    """Rows of one rank, to all nodes and ranks, and those to other nodes (the routing favours no node)."""
    reached = fan_out(shape)
    rows = FanOut(nodes=reached.nodes * shape.num_tokens, ranks=reached.ranks * shape.num_tokens)
    return rows, rows.nodes * (1 - 1 / shape.num_nodes)


def _sm_seconds(operation: Operation, shape: Shape, machine: Machine) -> float:
    """Seconds that the row movements of one rank would keep one SM busy."""
    rows, remote_rows = _rows(shape)
    row, message = shape.row_bytes(operation), shape.message_bytes(operation)
    puts = remote_rows * message / machine.sm_copy_gbps if machine.nic_gbps is None else 0.0
    if operation == "dispatch":
        # Pack each message; load a row once per node and store it once per rank.
        moved = remote_rows * message / machine.sm_copy_gbps
        moved += rows.nodes * row / machine.sm_load_gbps + rows.ranks * row / machine.sm_store_gbps
    else:
        # Sum the ranks' rows on each node, then the nodes' rows at the source.
        moved = (rows.ranks + remote_rows) * row / machine.sm_sum_gbps
    return (moved + puts) / 1e9


# --- what suffices --------------------------------------------------------------------------------------------------

CHUNK_BYTES = 32768  # of rows that travel together: long enough for a NIC and for a warp's put
_USUAL_SLOTS, _MOST_SLOTS, _MOST_CHUNK_ROWS, _FEW_SLOTS = 384, 768, 32, 16
_LEAST_SMS = 8


@dataclass(frozen=True, kw_only=True)
class Ring:
    """A ring between this rank and one other node, one way: a rank keeps one to send from and one to receive into.

    Cut as `csrc/internode/window.hpp` of deepep-nvshmem cuts it.
    """

    num_bytes: int
    slot_rows: int
    num_slots: int

    @staticmethod
    def most_slots(operation: Operation, num_nodes: int) -> int:
        """More of them help combine between two nodes only."""
        return _MOST_SLOTS if operation == "combine" and num_nodes == 2 else _USUAL_SLOTS

    @classmethod
    def of(
        cls, num_bytes: int, message_bytes: int, chunk_bytes: int = CHUNK_BYTES, most_slots: int = _USUAL_SLOTS
    ) -> Ring:
        """Raises ArgumentError if fewer than two messages fit."""
        num_messages = num_bytes // message_bytes
        if num_messages < 2:
            raise ArgumentError(f"a ring of {num_bytes} bytes does not hold two messages of {message_bytes} bytes.")
        slot_rows = max(1, min(chunk_bytes // message_bytes, num_messages // _FEW_SLOTS, _MOST_CHUNK_ROWS))
        return cls(num_bytes=num_bytes, slot_rows=slot_rows, num_slots=min(most_slots, num_messages // slot_rows))

    def chunk_rows(self, num_rows: int) -> int:
        """Rows of a chunk in a stream of ``num_rows``: few rows are spread over all slots."""
        return min(self.slot_rows, max(1, -(-num_rows // self.num_slots)))


def enough_sms(operation: Operation, shape: Shape, machine: Machine, *, slack: float = 1.5) -> int:
    """The least even SM count whose SMs are ``1 / slack`` busy while the links are fully so."""
    links = max(estimate(operation, shape, machine).resource_s.values())
    return max(2, 2 * math.ceil(slack * _sm_seconds(operation, shape, machine) / links / 2)) if links else 2


def enough_ring(operation: Operation, shape: Shape, machine: Machine, *, num_sms: int, slack: float = 2.0) -> Ring:
    """Slots that keep the way to the other nodes busy: as many as are begun while one goes round.

    A slot of dispatch holds a chunk of rows to one node: it is packed by a warp, waits behind a chunk of each other
    stream, crosses, is stored by a warp, and its credit returns. A slot of combine stands for as many tokens of the
    source, of which only some have a partial sum on that node, so many nodes need more slots: a request crosses, a
    warp sums, the sums cross, and a warp adds those of all nodes. ``slack`` covers streams that run ahead of one
    another. Slots are dealt to SMs, so there is at least one for each.
    """
    message, row, reached = shape.message_bytes(operation), shape.row_bytes(operation), fan_out(shape)
    slot_rows = max(1, min(CHUNK_BYTES // message, _MOST_CHUNK_ROWS))
    share = reached.nodes / shape.num_nodes  # of the tokens have rows on a given node
    copies = reached.ranks / reached.nodes
    rows = slot_rows if operation == "dispatch" else slot_rows * share
    if operation == "dispatch":
        at_warps = rows * message * 2 / machine.warp_copy_gbps
    else:
        at_warps = (rows * copies * 2 + slot_rows * reached.nodes) * row / machine.warp_sum_gbps
    if machine.nic_gbps is None:
        at_warps += rows * message / machine.warp_put_gbps
    rate = machine.nic_gbps or machine.nvlink_push_gbps
    queued = max(0, shape.num_nodes - 2) * rows * message / rate
    round_s = (at_warps + queued) / 1e9 + 3 * machine.network_us / 1e6
    links_s = max(estimate(operation, shape, machine).resource_s.values())
    begun = shape.num_tokens * (share if operation == "dispatch" else 1) / slot_rows
    wanted = max(_FEW_SLOTS, slack * round_s * begun / links_s if links_s else 0)
    most_slots = Ring.most_slots(operation, shape.num_nodes)
    num_slots = min(most_slots, math.ceil(wanted / num_sms) * num_sms)
    return Ring.of(num_slots * slot_rows * message, message, most_slots=most_slots)


@lru_cache(maxsize=64)  # clients ask before every call
def default_config(operation: Operation, num_ranks: int) -> Mapping[str, int]:
    """`Config` fields for ranks across nodes of up to 8, for the shape of DeepSeek-V3 on `H200_400G`.

    Empty for up to 8 ranks, which are one node. Chunk sizes are those of a ring: rows that travel together, and rows of
    a whole ring over V1's channels, two SMs each, so that `Config.get_rdma_buffer_size_hint` asks for all rings.
    """
    if num_ranks <= 8:
        return MappingProxyType({})
    ranks_per_node = max(p for p in range(1, 9) if num_ranks % p == 0)
    shape = Shape(
        num_nodes=num_ranks // ranks_per_node,
        ranks_per_node=ranks_per_node,
        num_experts=max(1, round(256 / num_ranks)) * num_ranks,
    )
    num_sms = max(_LEAST_SMS, enough_sms(operation, shape, H200_400G))
    ring = enough_ring(operation, shape, H200_400G, num_sms=num_sms)
    return MappingProxyType(
        {
            "num_sms": num_sms,
            "num_max_rdma_chunked_send_tokens": ring.slot_rows,
            "num_max_rdma_chunked_recv_tokens": -(-ring.num_slots * ring.slot_rows // (num_sms // 2)),
        }
    )
