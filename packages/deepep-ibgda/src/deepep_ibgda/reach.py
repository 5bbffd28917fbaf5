"""Which ranks share a host, which of them kernels reach over NVLink, and who executes RDMA requests for the others."""

from __future__ import annotations

import importlib.util
import logging
import struct
from dataclasses import dataclass
from typing import Any

from deep_ep.backend import BufferOptions, GroupFacts
from deep_ep.errors import BackendUnavailableError
from deep_ep.topology import host_identity

logger = logging.getLogger("deep_ep")

_RECORD = struct.Struct("<16sq")


@dataclass(frozen=True, kw_only=True)
class Reach:
    """The way to every rank; what all ranks agreed on when the buffer was built.

    Attributes:
        host_ranks: ranks of this host, this one among them: their arenas can be mapped here.
        is_remote: by rank: it belongs to another node, and kernels reach it by RDMA requests only.
        provider: who executes those, ``"software"`` or ``"nvshmem"``; ``""`` where no rank is remote.
        num_window_bytes: largest ``num_rdma_bytes`` that any rank asked for.
    """

    host_ranks: tuple[int, ...]
    is_remote: tuple[bool, ...]
    provider: str
    num_window_bytes: int


def agree_on_reach(extension: Any, facts: GroupFacts, options: BufferOptions) -> Reach:
    """Find out how to reach every rank. Collective; raises `BackendUnavailableError` on every rank alike."""
    record = _RECORD.pack(host_identity(), options.num_rdma_bytes)
    gathered = facts.channel.all_gather(record, phase="construction", timeout_s=options.timeout_s)
    hosts, sizes = zip(*(_RECORD.unpack(r) for r in gathered), strict=True)
    is_remote = tuple(rank // facts.ranks_per_node != facts.node for rank in range(facts.num_ranks))
    provider = ""
    if any(is_remote):
        provider = _provider(options.rdma_provider, num_hosts=len(set(hosts)))
    if provider == "nvshmem":
        obstacle = nic_obstacle(extension, facts)
        texts = facts.channel.gather_texts(obstacle, phase="construction", timeout_s=options.timeout_s)
        failed = [(rank, text) for rank, text in enumerate(texts) if text]
        if failed:
            raise BackendUnavailableError(
                f"backend 'ibgda': ranks of other nodes need RDMA through a NIC, and rank {failed[0][0]} cannot: "
                f"{failed[0][1]} Use the backend 'reference' for low-latency mode across hosts."
            )
    if provider == "software" and facts.rank == 0:
        logger.info(
            "backend ibgda: the %d nodes are of one host, so threads of its processes execute RDMA between them "
            "(DEEPEP_RDMA_PROVIDER=%s); this shows that the path works, not how fast a NIC is",
            facts.num_nodes,
            options.rdma_provider,
        )
    return Reach(
        host_ranks=tuple(rank for rank, host in enumerate(hosts) if host == hosts[facts.rank]),
        is_remote=is_remote,
        provider=provider,
        num_window_bytes=max(sizes),
    )


def _provider(wanted: str, *, num_hosts: int) -> str:
    """The provider that the setting and the hosts call for."""
    if wanted == "software" and num_hosts > 1:
        raise BackendUnavailableError(
            f"backend 'ibgda': DEEPEP_RDMA_PROVIDER is software, which moves bytes inside one host, and the ranks are "
            f"on {num_hosts} hosts. Leave it unset to use a NIC."
        )
    if wanted == "auto":
        return "software" if num_hosts == 1 else "nvshmem"
    return wanted


def nic_obstacle(extension: Any, facts: GroupFacts) -> str:
    """Why this rank cannot use a NIC, in sentences; empty if nothing is known to stand in the way."""
    if not extension.is_nvshmem_compiled():
        return "deepep-ibgda was built without NVSHMEM. Install its wheel (nvidia-nvshmem-cu13) and build again."
    if importlib.util.find_spec("nvidia") is None or importlib.util.find_spec("nvidia.nvshmem") is None:
        return "NVSHMEM is not installed. Install the extra deepep-ibgda[cu12] or [cu13]."
    return str(extension.rdma_obstacle(facts.device.index))
