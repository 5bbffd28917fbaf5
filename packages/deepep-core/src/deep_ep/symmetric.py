"""Memory that peers map: every rank reserves an arena of one size, and ranks of a host map each other's.

Shared by kernel packages. What touches the driver is their native extension's `Arena` and `PeerArena` (bindings of
``include/deepep/memory/symmetric.hpp``); what has to be agreed with the peers is here.
"""

from __future__ import annotations

import os
from collections.abc import Collection
from typing import Any

from .backend import GroupFacts
from .channel import Channel
from .errors import BackendUnavailableError, DeepEPError
from .rendezvous import close_descriptors, exchange_descriptors

GRANULE_BYTES = 2 << 20
"""What the driver maps at once."""


def whole_granules(num_bytes: int) -> int:
    """``num_bytes`` rounded up to what the driver maps at once."""
    return -(-num_bytes // GRANULE_BYTES) * GRANULE_BYTES


class MappedArena:
    """This rank's arena and the mappings of its peers' arenas.

    Attributes:
        base: address of this rank's arena.
        num_bytes: size of each arena.
        arena_ptrs: address of every rank's arena as mapped here, by rank; 0 where it is not mapped.
    """

    def __init__(
        self,
        extension: Any,
        facts: GroupFacts,
        *,
        num_bytes: int,
        timeout_s: float,
        backend: str,
        cure: str,
        mapped_ranks: Collection[int] | None = None,
    ) -> None:
        """Collective.

        Args:
            extension: the native module with `Arena`, `PeerArena` and `NativeError`.
            num_bytes: the same on every rank, a multiple of `GRANULE_BYTES`.
            backend, cure: who asks, and how to need less, for the text of an error.
            mapped_ranks: ranks of this host, this one among them, which map each other; ``None`` for all.

        Raises:
            BackendUnavailableError: on every rank if any rank could not reserve or map.
        """
        self._peers: list[Any] = []
        self._arena: Any = None
        self._backend, self._cure = backend, cure
        channel, phase = facts.channel, "construction"
        mapped = set(range(facts.num_ranks) if mapped_ranks is None else mapped_ranks)
        refusal = ""
        descriptor = -1
        try:
            self._arena = extension.Arena(device=facts.device.index, num_reserved_bytes=num_bytes)
            descriptor = self._arena.export_fd(self._arena.grow(num_bytes))
        except extension.NativeError as error:
            refusal = f"rank {facts.rank} could not reserve {num_bytes >> 20} MiB of shareable GPU memory: {error}"
        self._agree(channel, refusal, timeout_s)
        self.base = int(self._arena.base)
        self.num_bytes = int(self._arena.num_bytes)
        descriptors: list[int] = []
        try:
            descriptors = exchange_descriptors(channel, descriptor, phase=phase, timeout_s=timeout_s, among=mapped)
            self.arena_ptrs = [self.base if rank in mapped else 0 for rank in range(facts.num_ranks)]
            for rank, peer_descriptor in enumerate(descriptors):
                if rank != facts.rank and rank in mapped:
                    peer = extension.PeerArena(device=facts.device.index, num_reserved_bytes=self.num_bytes)
                    self._peers.append(peer)
                    peer.map(peer_descriptor, self.num_bytes)
                    self.arena_ptrs[rank] = int(peer.base)
        except (extension.NativeError, DeepEPError) as error:
            refusal = f"rank {facts.rank} could not map a peer's GPU memory: {error}"
        finally:
            close_descriptors(descriptors)
            os.close(descriptor)
        self._agree(channel, refusal, timeout_s)

    def _agree(self, channel: Channel, refusal: str, timeout_s: float) -> None:
        """One rank's failure is every rank's, in the same words."""
        texts = channel.gather_texts(refusal, phase="construction", timeout_s=timeout_s)
        failed = [text for text in texts if text]
        if failed:
            self.close()
            raise BackendUnavailableError(f"backend '{self._backend}': {failed[0]}. {self._cure}")

    def close_peers(self) -> None:
        """Unmap the peers' arenas. No kernel may be running on them."""
        for peer in self._peers:
            peer.close()
        self._peers.clear()

    def close(self) -> None:
        """Unmap the peers' arenas and release this rank's. May be called twice. No kernel may be running on them."""
        self.close_peers()
        if self._arena is not None:
            self._arena.close()
            self._arena = None
