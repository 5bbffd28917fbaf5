"""Where a window's memory comes from, and who executes the RDMA requests that kernels post to ranks of other nodes."""

from __future__ import annotations

import importlib.util
import logging
import os
import secrets
import struct
from pathlib import Path
from typing import Any, Protocol

from deep_ep.backend import BufferOptions, GroupFacts
from deep_ep.errors import BackendUnavailableError
from deep_ep.symmetric import MappedArena

from .reach import Reach

logger = logging.getLogger("deep_ep")

_MAX_DRAIN_S = 5.0
_NONCE = struct.Struct("<I")
_UNIQUE_ID_BYTES = 256
_CURE = "Use fewer tokens per rank (num_max_dispatch_tokens_per_rank), or pass a smaller num_rdma_bytes."


class Provider(Protocol):
    """The memory of one window on every rank, and the queue pairs to the ranks that are remote.

    Attributes:
        num_bytes: of each rank's arena.
        own_ptr: address of this rank's arena.
        arena_ptrs: by rank, as kernels may use them: 0 for a rank that is remote.
        view_ptr: of the native table of queue pairs; 0 without remote ranks.
    """

    num_bytes: int
    own_ptr: int
    arena_ptrs: list[int]
    view_ptr: int

    def drop_requests(self) -> None:
        """Forget what was posted and not executed. No kernel of this rank may be running."""

    def finish_requests(self) -> None:
        """Wait until what was posted is executed, and execute nothing from then on. No kernel may be running."""

    def close(self) -> None:
        """Release everything; the runtime that used it is closed."""


class SharedMemory:
    """Arenas of the ranks of one host that map each other; no rank is remote."""

    view_ptr = 0

    def __init__(self, extension: Any, facts: GroupFacts, options: BufferOptions, reach: Reach, num_bytes: int) -> None:
        self._arena = MappedArena(
            extension,
            facts,
            num_bytes=num_bytes,
            timeout_s=options.timeout_s,
            backend="ibgda",
            cure=_CURE,
            mapped_ranks=reach.host_ranks,
        )
        self.num_bytes, self.own_ptr = self._arena.num_bytes, self._arena.base
        self.arena_ptrs = self._arena.arena_ptrs

    def drop_requests(self) -> None:
        pass

    def finish_requests(self) -> None:
        pass

    def close(self) -> None:
        self._arena.close()


class SoftwareNic(SharedMemory):
    """The same, but what kernels send to remote ranks is moved by a thread of this process, on their requests."""

    def __init__(self, extension: Any, facts: GroupFacts, options: BufferOptions, reach: Reach, num_bytes: int) -> None:
        super().__init__(extension, facts, options, reach, num_bytes)
        self._nic: Any = None
        refusal = ""
        if os.environ.get("CUDA_DEVICE_MAX_CONNECTIONS") == "1":
            # With one hardware queue its copies could stand behind the kernel that waits for them.
            refusal = f"rank {facts.rank} has CUDA_DEVICE_MAX_CONNECTIONS=1; the software NIC needs at least 2"
        try:
            self._nic = extension.SoftwareNic(
                rank=facts.rank,
                device=facts.device.index,
                arena_ptrs=self.arena_ptrs,
                num_arena_bytes=self.num_bytes,
                is_remote=list(reach.is_remote),
            )
            self._nic.start()
            self.view_ptr = int(self._nic.view_ptr)
        except extension.NativeError as error:
            refusal = refusal or f"rank {facts.rank} could not start the software NIC: {error}"
        self.arena_ptrs = [0 if far else ptr for ptr, far in zip(self.arena_ptrs, reach.is_remote, strict=True)]
        try:
            agree(facts, options, refusal)
            probe(extension, facts, options, self)
        except BackendUnavailableError:
            self.close()
            raise

    def drop_requests(self) -> None:
        self._nic.reset()

    def finish_requests(self) -> None:
        # A kernel ends when its own rows have come; what it sent may still be queued, and peers wait for it.
        if not self._nic.drain(timeout_s=_MAX_DRAIN_S):
            logger.warning("backend ibgda: the software NIC was stopped before it had executed every request")
        self._nic.stop()

    def close(self) -> None:
        nic, self._nic = self._nic, None
        if nic is not None:
            nic.stop()
            nic.close()
        super().close()


class NvshmemTransport:
    """A NIC, through NVSHMEM's GPU-initiated transport. NVSHMEM belongs to the process: one window, of one group."""

    def __init__(self, extension: Any, facts: GroupFacts, options: BufferOptions, reach: Reach, num_bytes: int) -> None:
        channel, timeout_s = facts.channel, options.timeout_s
        found = importlib.util.find_spec("nvidia.nvshmem")
        assert found is not None and found.submodule_search_locations is not None  # `nic_obstacle` has looked
        libraries = Path(next(iter(found.submodule_search_locations))) / "lib"
        host_library = str(libraries / "libnvshmem_host.so.3")
        refusal, own_id = "", b""
        if facts.rank == 0:
            try:
                own_id = extension.nvshmem_unique_id(host_library=host_library)
            except extension.NativeError as error:
                refusal = f"rank 0 could not start NVSHMEM: {error}"
        agree(facts, options, refusal)
        record = _NONCE.pack(len(own_id)) + own_id.ljust(_UNIQUE_ID_BYTES, b"\0")
        first = channel.all_gather(record, phase="construction", timeout_s=timeout_s)[0]
        (length,) = _NONCE.unpack_from(first)
        self._rdma: Any = None
        try:
            self._rdma = extension.NvshmemRdma(
                rank=facts.rank,
                num_ranks=facts.num_ranks,
                device=facts.device.index,
                unique_id=first[_NONCE.size : _NONCE.size + length],
                host_library=host_library,
                device_library=str(libraries / "libnvshmem_device.a"),
                state_module=str(Path(extension.__file__).with_name("nvshmem_state.fatbin")),
                num_arena_bytes=num_bytes,
                is_remote=list(reach.is_remote),
            )
        except extension.NativeError as error:
            refusal = f"rank {facts.rank} could not connect through NVSHMEM: {error}"
        agree(facts, options, refusal)
        self.num_bytes = num_bytes
        self.arena_ptrs = [int(ptr) for ptr in self._rdma.arena_ptrs]
        self.own_ptr, self.view_ptr = self.arena_ptrs[facts.rank], int(self._rdma.view_ptr)
        probe(extension, facts, options, self)

    def drop_requests(self) -> None:
        pass

    def finish_requests(self) -> None:
        pass

    def close(self) -> None:
        rdma, self._rdma = self._rdma, None
        if rdma is not None:
            rdma.close()


def open_provider(
    extension: Any, facts: GroupFacts, options: BufferOptions, reach: Reach, *, num_bytes: int
) -> Provider:
    """What the agreed way to the ranks calls for. Collective; raises `BackendUnavailableError` on every rank alike."""
    kinds: dict[str, type[SharedMemory] | type[NvshmemTransport]] = {
        "": SharedMemory,
        "software": SoftwareNic,
        "nvshmem": NvshmemTransport,
    }
    return kinds[reach.provider](extension, facts, options, reach, num_bytes)


def agree(facts: GroupFacts, options: BufferOptions, refusal: str) -> None:
    """One rank's failure is every rank's, in the same words. Collective."""
    texts = facts.channel.gather_texts(refusal, phase="construction", timeout_s=options.timeout_s)
    failed = [text for text in texts if text]
    if failed:
        raise BackendUnavailableError(f"backend 'ibgda': {failed[0]}")


def probe(extension: Any, facts: GroupFacts, options: BufferOptions, provider: Provider) -> None:
    """Send a number along every queue pair, and see that each arrives where it should. Collective."""
    own = _NONCE.pack(secrets.randbits(32))
    gathered = facts.channel.all_gather(own, phase="construction", timeout_s=options.timeout_s)
    common = {
        "rank": facts.rank,
        "device": facts.device.index,
        "arena_ptr": provider.own_ptr,
        "view_ptr": provider.view_ptr,
        "nonce": _NONCE.unpack(gathered[0])[0],
    }
    refusal = ""
    try:
        text = extension.post_probe(**common, timeout_s=options.timeout_s)
        refusal = f"rank {facts.rank} could not send by RDMA: {text}" if text else ""
    except extension.NativeError as error:
        refusal = f"rank {facts.rank} could not send by RDMA: {error}"
    agree(facts, options, refusal)
    try:
        missing = sorted({peer for peer, _ in extension.missing_of_probe(**common)})
        peers = ", ".join(map(str, missing))
        refusal = f"what rank {peers} sent to rank {facts.rank} by RDMA did not arrive" if missing else ""
    except extension.NativeError as error:
        refusal = f"rank {facts.rank} could not look for what was sent to it by RDMA: {error}"
    agree(facts, options, refusal)
