"""The memory of one buffer that peers can reach: a window for signals and staging, and a heap for torch's tensors.

The arena is backed and mapped by all peers when the buffer is built. torch's own caching allocator manages the heap
through a ``MemPool`` over it, so tensors there behave like any other (streams, graphs, garbage collection).
"""

from __future__ import annotations

import contextlib
import os
import threading
from collections.abc import Iterator
from typing import Any

import torch

from deep_ep.backend import GroupFacts
from deep_ep.errors import BackendUnavailableError, BufferStateError, DeepEPError
from deep_ep.rendezvous import close_descriptors, exchange_descriptors

HEAP_GRANULE_BYTES = 2 << 20
"""The heap hands out multiples of this; it is also what the driver maps at once."""

_retired: list[SymmetricArena] = []
"""Arenas of destroyed buffers in which the user still holds tensors."""


class SymmetricArena:
    """This rank's arena and the mappings of its peers' arenas.

    Attributes:
        arena_ptrs: address of every rank's arena as mapped here, by rank.
        num_bytes: size of each arena.
    """

    def __init__(
        self, extension: Any, facts: GroupFacts, *, num_window_bytes: int, num_heap_bytes: int, timeout_s: float
    ) -> None:
        """Collective. Raises `BackendUnavailableError` on every rank if any rank could not reserve or map."""
        _close_retired()
        self._extension = extension
        self._peers: list[Any] = []
        self._arena: Any = None
        self._heap: Any = None
        self._is_closed = False
        self._device_index = facts.device.index
        self._thread = threading.local()
        self._allocator: Any = None
        channel, phase = facts.channel, "construction"
        num_window_bytes = _whole_granules(num_window_bytes)
        num_bytes = num_window_bytes + _whole_granules(num_heap_bytes)
        refusal = ""
        descriptor = -1
        try:
            self._arena = extension.Arena(device=facts.device.index, num_reserved_bytes=num_bytes)
            descriptor = self._arena.export_fd(self._arena.grow(num_bytes))
        except extension.NativeError as error:
            refusal = f"rank {facts.rank} could not reserve {num_bytes >> 20} MiB of shareable GPU memory: {error}"
        self._agree(channel, refusal, timeout_s)
        self.num_bytes = int(self._arena.num_bytes)
        descriptors: list[int] = []
        try:
            descriptors = exchange_descriptors(channel, descriptor, phase=phase, timeout_s=timeout_s)
            self.arena_ptrs = [int(self._arena.base)] * facts.num_ranks
            for rank, peer_descriptor in enumerate(descriptors):
                if rank != facts.rank:
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
        heap_start = int(self._arena.base) + num_window_bytes
        self._heap = extension.Heap(
            base=heap_start, num_bytes=self.num_bytes - num_window_bytes, granule=HEAP_GRANULE_BYTES
        )
        self._allocator = torch.cuda.memory.CUDAPluggableAllocator(
            extension.__file__, "deepep_heap_alloc", "deepep_heap_free"
        )

    def _agree(self, channel: Any, refusal: str, timeout_s: float) -> None:
        """One rank's failure is every rank's, in the same words."""
        texts = channel.gather_texts(refusal, phase="construction", timeout_s=timeout_s)
        failed = [text for text in texts if text]
        if failed:
            self._release()
            raise BackendUnavailableError(
                f"backend 'nvlink': {failed[0]}. Use a smaller heap (DEEPEP_SYMMETRIC_HEAP_MB)."
            )

    @property
    def num_free_bytes(self) -> int:
        """Bytes of the heap that torch does not hold (what it caches counts as held)."""
        return int(self._heap.num_free_bytes)

    @contextlib.contextmanager
    def allocate_here(self) -> Iterator[None]:
        """CUDA tensors that this thread allocates inside live in the heap; a full heap is an out-of-memory error.

        Brackets nest. Each thread has a pool of its own over the heap, because torch refuses to record into one pool
        from two places at once.
        """
        if self._is_closed:
            raise BufferStateError("this buffer was destroyed, and its symmetric memory with it")
        if getattr(self._thread, "is_inside", False):
            yield
            return
        if not hasattr(self._thread, "pool"):
            self._thread.pool = torch.cuda.MemPool(self._allocator.allocator())
        previous = self._extension.set_current_heap(self._heap)
        self._thread.is_inside = True
        try:
            with torch.cuda.use_mem_pool(self._thread.pool, device=self._device_index):
                yield
        finally:
            self._thread.is_inside = False
            self._extension.set_current_heap(previous)

    def close(self) -> None:
        """Unmap the peers, and release the arena as soon as no tensor lives in it. No kernel may be running on it."""
        for peer in self._peers:
            peer.close()
        self._peers.clear()
        self._is_closed = True
        self._thread = threading.local()  # drops the pools, which returns what torch only caches
        _retired.append(self)
        _close_retired()

    def _is_empty(self) -> bool:
        return self._heap is None or self._heap.num_free_bytes == self._heap.num_bytes

    def _release(self) -> None:
        for peer in self._peers:
            peer.close()
        self._peers.clear()
        if self._arena is not None:
            self._arena.close()
            self._arena = None


def _whole_granules(num_bytes: int) -> int:
    return -(-num_bytes // HEAP_GRANULE_BYTES) * HEAP_GRANULE_BYTES


def _close_retired() -> None:
    """Release the arenas of destroyed buffers in which no tensor lives any more."""
    if any(not arena._is_empty() for arena in _retired):
        # Tensors that outlived their buffer have gone to torch's cache of a pool that nobody uses any more.
        torch.cuda.empty_cache()
    for arena in [a for a in _retired if a._is_empty()]:
        _retired.remove(arena)
        arena._release()
