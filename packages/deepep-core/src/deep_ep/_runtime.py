"""What `Buffer.runtime` holds."""

from __future__ import annotations

from .backend import GroupFacts


class Runtime:
    """What `Buffer.runtime` holds until the buffer is destroyed: facts that V1's native object could tell."""

    def __init__(self, facts: GroupFacts, device_of_rank: tuple[int, ...]) -> None:
        self._facts = facts
        self._device_of_rank = device_of_rank

    def is_available(self) -> bool:
        """True: a constructed buffer can be used."""
        return True

    def get_num_rdma_ranks(self) -> int:
        """Number of nodes."""
        return self._facts.num_nodes

    def get_rdma_rank(self) -> int:
        """This rank's node."""
        return self._facts.node

    def get_root_rdma_rank(self, global_: bool = False) -> int:
        """Rank 0 of this rank's RDMA group, as a node number or as a global rank."""
        return self._facts.local_rank if global_ else 0

    def get_local_device_id(self) -> int:
        """CUDA device index of this rank, -1 on the CPU."""
        return self._device_of_rank[self._facts.rank]
