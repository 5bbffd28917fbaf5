"""The memory of one buffer that peers can reach: a window for signals and staging, and a heap for torch's tensors.

The arena is backed and mapped by all peers when the buffer is built. torch's own caching allocator manages the heap
through a ``MemPool`` over it, so tensors there behave like any other (streams, graphs, garbage collection).
"""

from __future__ import annotations

import contextlib
import math
import threading
from collections.abc import Iterator, Sequence
from typing import Any, ClassVar

import torch

from deep_ep.backend import GroupFacts
from deep_ep.errors import BufferStateError
from deep_ep.symmetric import GRANULE_BYTES, MappedArena, whole_granules

_retired: list[SymmetricArena] = []
"""Arenas of destroyed buffers in which the user still holds tensors."""


class SymmetricArena:
    """This rank's arena and the mappings of the arenas of its node's ranks.

    Attributes:
        arena_ptrs: address of each arena as mapped here, by rank of the node.
        num_bytes: size of each arena.
    """

    def __init__(
        self,
        extension: Any,
        facts: GroupFacts,
        *,
        num_window_bytes: int,
        num_heap_bytes: int,
        timeout_s: float,
        backend: str,
    ) -> None:
        """Collective. Raises `BackendUnavailableError` on every rank if any rank could not reserve or map.

        ``backend``: who asks, for the text of the error.
        """
        _close_retired()
        self._extension = extension
        self._heap: Any = None
        self._is_closed = False
        self._lasting: list[int] = []
        self._device_index = facts.device.index
        self._thread = threading.local()
        num_window_bytes = whole_granules(num_window_bytes)
        node = range(facts.node * facts.ranks_per_node, (facts.node + 1) * facts.ranks_per_node)
        self._mapped = MappedArena(
            extension,
            facts,
            num_bytes=num_window_bytes + whole_granules(num_heap_bytes),
            timeout_s=timeout_s,
            backend=backend,
            cure="Use a smaller heap (DEEPEP_SYMMETRIC_HEAP_MB).",
            mapped_ranks=node,
        )
        self.num_bytes = self._mapped.num_bytes
        self.arena_ptrs = [self._mapped.arena_ptrs[rank] for rank in node]
        self._heap = extension.Heap(
            base=self._mapped.base + num_window_bytes,
            num_bytes=self.num_bytes - num_window_bytes,
            granule=GRANULE_BYTES,
        )
        self._allocator = torch.cuda.memory.CUDAPluggableAllocator(
            extension.__file__, "deepep_heap_alloc", "deepep_heap_free"
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

    def empty_lasting(self, shape: Sequence[int], *, dtype: torch.dtype, device: torch.device) -> torch.Tensor:
        """As `torch.empty`, in the heap, until `close`: for captured calls, to which torch gives other memory.

        A graph is replayed after its tensors have gone, so this memory is not given back earlier.
        """
        num_bytes = max(1, math.prod(shape)) * dtype.itemsize
        address = 0 if self._is_closed else self._heap.allocate(num_bytes)
        if address == 0:
            raise torch.OutOfMemoryError(f"no {num_bytes} bytes are left in the symmetric heap")
        self._lasting.append(address)
        return _view(address, num_bytes, device).view(dtype)[: math.prod(shape)].view(*shape)

    def close(self) -> None:
        """Unmap the peers, and release the arena as soon as no tensor lives in it. No kernel may be running on it."""
        self._mapped.close_peers()
        self._is_closed = True
        for address in self._lasting:
            self._heap.free(address)
        self._lasting.clear()
        self._thread = threading.local()  # drops the pools, which returns what torch only caches
        _retired.append(self)
        _close_retired()

    def _is_empty(self) -> bool:
        return self._heap is None or self._heap.num_free_bytes == self._heap.num_bytes


def _view(address: int, num_bytes: int, device: torch.device) -> torch.Tensor:
    """uint8 ``[num_bytes]`` of memory that is somebody else's to free."""

    class Memory:
        __cuda_array_interface__: ClassVar[dict[str, Any]] = {
            "shape": (num_bytes,),
            "typestr": "|u1",
            "data": (address, False),
            "version": 3,
        }

    return torch.as_tensor(Memory(), device=device)


def _close_retired() -> None:
    """Release the arenas of destroyed buffers in which no tensor lives any more."""
    if any(not arena._is_empty() for arena in _retired):
        # Tensors that outlived their buffer have gone to torch's cache of a pool that nobody uses any more.
        torch.cuda.empty_cache()
    for arena in [a for a in _retired if a._is_empty()]:
        _retired.remove(arena)
        arena._mapped.close()
