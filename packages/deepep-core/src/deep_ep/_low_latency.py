"""The low-latency calls of `deep_ep.Buffer`."""

from __future__ import annotations

import threading
from typing import Any

import torch

from . import validation
from ._streams import CallStreams, Checked, Hook, check_overlap, run_once
from .backend import LowLatencyBackend, NormalBackend
from .errors import ArgumentError, BufferStateError
from .events import EventOverlap, StreamOrder
from .settings import Settings

Rows = torch.Tensor | tuple[torch.Tensor, torch.Tensor]


class LowLatencyCalls:
    """Decode-time calls; symbols as in `deep_ep.buffer`. `deep_ep.Buffer` is this class plus the normal mode."""

    rank: int
    group_size: int
    enable_shrink: bool
    _lock: threading.RLock
    _order: StreamOrder
    _settings: Settings
    _normal_backend: NormalBackend | None
    _low_latency_backend: LowLatencyBackend | None

    def _low_latency(self, what: str) -> LowLatencyBackend:
        if self._low_latency_backend is None:
            if self._normal_backend is None:
                raise BufferStateError(f"{what}: this buffer was destroyed. Build a new one.")
            raise BufferStateError(f"{what}: this buffer was built without low_latency_mode=True.")
        return self._low_latency_backend

    def _low_latency_streams(self, part: LowLatencyBackend, x: torch.Tensor, async_finish: bool) -> CallStreams:
        """Only what the caller does not wait for leaves the caller's stream."""
        return CallStreams(part.comm_stream if x.is_cuda and async_finish else None, self._order)

    def clean_low_latency_buffer(self, num_max_dispatch_tokens_per_rank: int, hidden: int, num_experts: int) -> None:
        """Forget leftovers before the first low-latency call after something else used the memory. Collective."""
        where = "clean_low_latency_buffer"
        with self._lock:
            part = self._low_latency(where)
            with Checked(part, "clean"):
                validation.integer(num_max_dispatch_tokens_per_rank, "num_max_dispatch_tokens_per_rank", where, least=1)
                validation.integer(hidden, "hidden", where, least=1)
                validation.experts(num_experts, self.group_size, where)
            part.clean(num_max_dispatch_tokens_per_rank, hidden, num_experts)

    def low_latency_dispatch(
        self,
        x: torch.Tensor,
        topk_idx: torch.Tensor,
        num_max_dispatch_tokens_per_rank: int,
        num_experts: int,
        cumulative_local_expert_recv_stats: torch.Tensor | None = None,
        dispatch_wait_recv_cost_stats: torch.Tensor | None = None,
        use_fp8: bool = True,
        round_scale: bool = False,
        use_ue8m0: bool = False,
        async_finish: bool = False,
        return_recv_hook: bool = False,
        *,
        topk_weights: torch.Tensor | None = None,
    ) -> tuple[Rows, torch.Tensor, tuple[Any, ...], EventOverlap, Hook | None]:
        """Send every token to its experts with the least delay. Collective; the host does not wait for data.

        Args:
            x: ``[T, H]`` bf16, ``T <= num_max_dispatch_tokens_per_rank``, ``H`` a multiple of 128 (of 512
                with ``use_ue8m0``, of 8 for bf16 rows).
            topk_idx: ``[T, K]`` int64 or int32; -1 unused.
            num_max_dispatch_tokens_per_rank: ``X``, the same on every rank.
            num_experts: ``E``.
            cumulative_local_expert_recv_stats: int32 ``[L]``, received rows are added.
            dispatch_wait_recv_cost_stats: int64 ``[N]``, nanoseconds waited for each source rank are added.
            use_fp8: cast to e4m3 with one scale per 128 columns.
            round_scale: round scales up to powers of two.
            use_ue8m0: pack scales as UE8M0, four to an int32; needs ``round_scale``.
            async_finish: do not make the current stream wait; use the returned event.
            return_recv_hook: return after the send; calling the hook receives. Excludes ``async_finish``.
            topk_weights: float32 ``[T, K]``; sent along, combine's send then need not wait for them.

        Returns:
            ``(recv_x, recv_count, handle, event, hook)``: ``recv_x`` ``[L, M, H]`` bf16, or e4m3 with scales float32
            ``[L, M, H/128]`` or int32 ``[L, M, H/512]`` (both stride 1 along ``M``); ``recv_count`` int32 ``[L]``. Rows
            beyond the count are undefined. With a hook everything is undefined until it was called.

        Raises:
            As `dispatch`; `BufferStateError` for a third outstanding operation.
        """
        where = "low_latency_dispatch"
        with self._lock:
            part = self._low_latency(where)
            with Checked(part, "low_latency_dispatch"):
                check_overlap(where, None, async_finish, False, hook=return_recv_hook)
                request = validation.low_latency_dispatch(
                    x,
                    topk_idx,
                    num_ranks=self.group_size,
                    max_tokens=num_max_dispatch_tokens_per_rank,
                    num_experts=num_experts,
                    weights=topk_weights,
                    cumulative_local_expert_recv_stats=cumulative_local_expert_recv_stats,
                    wait_recv_cost_stats=dispatch_wait_recv_cost_stats,
                    use_fp8=use_fp8,
                    round_scale=round_scale,
                    use_ue8m0=use_ue8m0,
                    split=return_recv_hook,
                    check_values=self._settings.debug,
                )
            streams = self._low_latency_streams(part, request.x, async_finish)
            with streams:
                result = part.dispatch(request)
        outputs = [result.recv_x, result.recv_scales, result.recv_count, *result.handle[:2]]
        inputs = [request.x, request.topk_idx, request.topk_weights]
        event = streams.finish(async_finish, (), outputs)
        alive = tuple(t for t in (*inputs, *outputs) if t is not None)
        if async_finish:
            event.extra_tensors = alive
        hook = run_once(result.receive, request.x.is_cuda, alive) if result.receive is not None else None
        rows: Rows = result.recv_x if result.recv_scales is None else (result.recv_x, result.recv_scales)
        return rows, result.recv_count, result.handle, event, hook

    def low_latency_combine(
        self,
        x: torch.Tensor,
        topk_idx: torch.Tensor,
        topk_weights: torch.Tensor,
        handle: tuple[Any, ...],
        use_logfmt: bool = False,
        zero_copy: bool = False,
        async_finish: bool = False,
        return_recv_hook: bool = False,
        out: torch.Tensor | None = None,
        combine_wait_recv_cost_stats: torch.Tensor | None = None,
    ) -> tuple[torch.Tensor, EventOverlap, Hook | None]:
        """Bring expert outputs back and sum them with the weights. Collective.

        Args:
            x: ``[L, M, H]`` bf16 in the layout of `low_latency_dispatch`.
            topk_idx, topk_weights: ``[T, K]`` of this rank's tokens; weights float32.
            handle: of the dispatch; may be combined more than once.
            use_logfmt: let rows travel in LogFMT (10 bits per value); excludes ``zero_copy``.
            zero_copy: the rows are in the tensor that `get_next_low_latency_combine_buffer` returned.
            async_finish, return_recv_hook: as in `low_latency_dispatch`.
            out: ``[T, H]`` bf16 to write to.
            combine_wait_recv_cost_stats: int64 ``[N]``, nanoseconds waited for each rank are added.

        Returns:
            ``(combined_x bf16 [T, H], event, hook)``.

        Raises:
            As `low_latency_dispatch`.
        """
        where = "low_latency_combine"
        with self._lock:
            part = self._low_latency(where)
            with Checked(part, "low_latency_combine"):
                check_overlap(where, None, async_finish, False, hook=return_recv_hook)
                request = validation.low_latency_combine(
                    x,
                    topk_idx,
                    topk_weights,
                    handle,
                    num_ranks=self.group_size,
                    use_logfmt=use_logfmt,
                    zero_copy=zero_copy,
                    out=out,
                    wait_recv_cost_stats=combine_wait_recv_cost_stats,
                    split=return_recv_hook,
                    check_values=self._settings.debug,
                )
            streams = self._low_latency_streams(part, request.x, async_finish)
            with streams:
                result = part.combine(request)
        event = streams.finish(async_finish, (), (result.combined_x,))
        alive = (request.x, request.topk_idx, request.topk_weights, *request.handle[:2], result.combined_x)
        if async_finish:
            event.extra_tensors = alive
        hook = run_once(result.receive, request.x.is_cuda, alive) if result.receive is not None else None
        return result.combined_x, event, hook

    def get_next_low_latency_combine_buffer(self, handle: tuple[Any, ...]) -> torch.Tensor:
        """bf16 ``[L, M, H]`` to write expert outputs to, for ``low_latency_combine(zero_copy=True)`` on this handle.

        The row stride may exceed ``H``. Valid until that combine.
        """
        where = "get_next_low_latency_combine_buffer"
        part = self._low_latency(where)
        return part.next_combine_buffer(
            validation.low_latency_handle(handle, where, num_ranks=self.group_size).to_tuple()
        )

    def _masks(self, where: str) -> LowLatencyBackend:
        part = self._low_latency(where)
        if not self.enable_shrink:
            raise BufferStateError(f"{where}: this buffer was built without enable_shrink=True.")
        return part

    def low_latency_update_mask_buffer(self, rank_to_mask: int, mask: bool = False) -> None:
        """Leave a rank out of low-latency operations (``mask=True``), or take it in again. Local."""
        where = "low_latency_update_mask_buffer"
        part = self._masks(where)
        validation.integer(rank_to_mask, "rank_to_mask", where, least=0)
        if rank_to_mask >= self.group_size or rank_to_mask == self.rank:
            raise ArgumentError(
                f"{where}: rank_to_mask is {rank_to_mask}; it has to be another rank of 0 to {self.group_size - 1}."
            )
        part.update_mask(rank_to_mask, bool(mask))

    def low_latency_query_mask_buffer(self, mask_status: torch.Tensor) -> None:
        """Write 1 for each masked rank, else 0, into int32 ``[N]``. Local."""
        where = "low_latency_query_mask_buffer"
        part = self._masks(where)
        validation.tensor(mask_status, "mask_status", where, dims=1, dtypes=(torch.int32,))
        if mask_status.shape[0] != self.group_size:
            raise ArgumentError(f"{where}: mask_status has {mask_status.shape[0]} entries for {self.group_size} ranks.")
        part.query_mask(mask_status)

    def low_latency_clean_mask_buffer(self) -> None:
        """Take every rank in again. Local."""
        self._masks("low_latency_clean_mask_buffer").clean_mask()
