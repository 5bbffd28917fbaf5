"""The memory through which the kernels of one buffer talk, and the runtime that works in it."""

from __future__ import annotations

from typing import Any

from deep_ep.backend import BufferOptions, GroupFacts
from deep_ep.errors import BackendUnavailableError
from deep_ep.symmetric import whole_granules

from .providers import agree, open_provider
from .reach import Reach

MIN_WINDOW_BYTES = 16 << 20


class Window:
    """One arena of each rank with all that works in it: sequences, credits and masks live inside, none is shared.

    Attributes:
        runtime: native; launches the kernels.
        num_bytes: of each rank's arena.
    """

    def __init__(
        self, extension: Any, facts: GroupFacts, options: BufferOptions, reach: Reach, *, num_bytes: int
    ) -> None:
        """Collective, and the host waits for all ranks. Raises `BackendUnavailableError` on every rank if any failed.

        Args:
            num_bytes: the same on every rank; rounded up to what the driver maps.
        """
        self.runtime: Any = None
        num_bytes = whole_granules(max(num_bytes, MIN_WINDOW_BYTES))
        self._provider = open_provider(extension, facts, options, reach, num_bytes=num_bytes)
        self.num_bytes = self._provider.num_bytes
        refusal = ""
        try:
            self.runtime = extension.Runtime(
                rank=facts.rank,
                num_ranks=facts.num_ranks,
                device=facts.device.index,
                arena_ptrs=self._provider.arena_ptrs,
                num_arena_bytes=self.num_bytes,
                ll_reduce=options.ll_reduce,
                enable_shrink=options.enable_shrink,
                rdma_view=self._provider.view_ptr,
            )
            self.runtime.set_timeout_ns(int(options.timeout_s * 1e9))
        except extension.NativeError as error:
            refusal = f"rank {facts.rank} could not prepare its window: {error}"
        # Peers may store to this arena as soon as they leave here: by then it has been filled on every rank.
        try:
            agree(facts, options, refusal)
        except BackendUnavailableError:
            self.close()
            raise

    def drop_requests(self) -> None:
        """Forget RDMA requests that were not executed. No kernel of this rank may be running in it."""
        self._provider.drop_requests()

    def reset(self, stream: int) -> None:
        """Make it as new. No rank may be writing to it: all have ended their kernels and dropped their requests."""
        self.runtime.reset(stream=stream)
        self.runtime.clear_abort()
        self.runtime.clear_error()

    def close(self) -> None:
        """Release everything. May be called twice. No kernel of this rank may be running in it."""
        runtime, self.runtime = self.runtime, None
        if runtime is not None:
            self._provider.finish_requests()
            runtime.close()
        self._provider.close()
