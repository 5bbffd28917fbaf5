"""Which ranks form a node: agreed over the control channel when a buffer is built."""

from __future__ import annotations

import hashlib
import socket
import struct
from dataclasses import dataclass
from pathlib import Path

from .channel import Channel
from .errors import PeersDisagreeError, SettingError

MAX_RANKS_PER_NODE = 8
_RECORD = struct.Struct("<16sqq")


@dataclass(frozen=True, kw_only=True)
class Topology:
    """What every rank knows after the exchange.

    Attributes:
        ranks_per_node: equal on all nodes; ranks of a node are contiguous.
        device_of_rank: CUDA device index of each rank, -1 for a rank on the CPU.
        host_of_rank: a number for each rank's host, 0 for rank 0's.
    """

    ranks_per_node: int
    device_of_rank: tuple[int, ...]
    host_of_rank: tuple[int, ...]

    @property
    def num_nodes(self) -> int:
        return len(self.host_of_rank) // self.ranks_per_node


def host_identity() -> bytes:
    """16 bytes that are the same for all processes on this host, and on no other."""
    boot = Path("/proc/sys/kernel/random/boot_id")
    text = socket.gethostname() + (boot.read_text() if boot.is_file() else "")
    return hashlib.blake2b(text.encode(), digest_size=16).digest()


def agree(channel: Channel, *, device_index: int, ranks_per_node: int | None, timeout_s: float) -> Topology:
    """Exchange host and device of every rank and derive the nodes. Collective.

    Args:
        device_index: CUDA device of this rank, -1 for the CPU.
        ranks_per_node: this rank's setting, ``None`` to derive it from the hosts.

    Raises:
        PeersDisagreeError: ranks have different settings.
        SettingError: the nodes would not be equal and contiguous. The same on every rank.
    """
    record = _RECORD.pack(host_identity(), device_index, ranks_per_node or 0)
    records = [_RECORD.unpack(r) for r in channel.all_gather(record, phase="construction", timeout_s=timeout_s)]
    wanted = [int(r[2]) for r in records]
    if len(set(wanted)) > 1:
        raise PeersDisagreeError(
            f"ranks have different settings of ranks_per_node: {dict(enumerate(wanted))} (0: not set). "
            "Set DEEPEP_RANKS_PER_NODE alike on every rank.",
            phase="construction",
        )
    hosts = [bytes(r[0]) for r in records]
    numbers = {host: i for i, host in enumerate(dict.fromkeys(hosts))}
    host_of_rank = tuple(numbers[h] for h in hosts)
    return Topology(
        ranks_per_node=_checked(wanted[0], host_of_rank) if wanted[0] else _derived(host_of_rank),
        device_of_rank=tuple(int(r[1]) for r in records),
        host_of_rank=host_of_rank,
    )


def _checked(ranks_per_node: int, host_of_rank: tuple[int, ...]) -> int:
    num_ranks = len(host_of_rank)
    if num_ranks % ranks_per_node:
        raise SettingError(
            f"DEEPEP_RANKS_PER_NODE is {ranks_per_node}, which does not divide the {num_ranks} ranks of the group."
        )
    for first in range(0, num_ranks, ranks_per_node):
        if len(set(host_of_rank[first : first + ranks_per_node])) > 1:
            raise SettingError(
                f"DEEPEP_RANKS_PER_NODE is {ranks_per_node}, but ranks {first} to {first + ranks_per_node - 1} are on "
                "different hosts. A node's ranks are contiguous and on one host."
            )
    return ranks_per_node


def _derived(host_of_rank: tuple[int, ...]) -> int:
    per_host = [host_of_rank.count(host) for host in range(max(host_of_rank) + 1)]
    contiguous = list(host_of_rank) == sorted(host_of_rank)
    if len(set(per_host)) > 1 or not contiguous:
        raise SettingError(
            f"hosts hold {per_host} ranks{'' if contiguous else ', not in contiguous order'}; a group across "
            "hosts needs "
            "equally many, contiguous ranks on each. Launch it so, or set DEEPEP_RANKS_PER_NODE."
        )
    if per_host[0] <= MAX_RANKS_PER_NODE:
        return per_host[0]
    return max(n for n in range(1, MAX_RANKS_PER_NODE + 1) if per_host[0] % n == 0)
