"""The normal-mode calls of `deep_ep.Buffer`."""

from __future__ import annotations

import threading
from typing import Any, ClassVar

import torch

from . import validation
from ._low_latency import Rows
from ._streams import CallStreams, Checked, check_overlap, own_stream
from .backend import GroupFacts, NormalBackend
from .config import Config
from .errors import ArgumentError, BufferStateError
from .events import EventOverlap, StreamOrder
from .settings import Settings

DEFAULT_NUM_SMS = 20


class NormalCalls:
    """Prefill and training; symbols as in `deep_ep.buffer`. `deep_ep.Buffer` is this class plus low-latency mode."""

    num_sms: ClassVar[int]
    _num_sms_was_set: ClassVar[bool]
    group_size: int
    _lock: threading.RLock
    _order: StreamOrder
    _settings: Settings
    _facts: GroupFacts
    _normal_backend: NormalBackend | None

    def _normal(self, what: str) -> NormalBackend:
        if self._normal_backend is None:
            raise BufferStateError(f"{what}: this buffer was destroyed. Build a new one.")
        return self._normal_backend

    def get_dispatch_layout(
        self,
        topk_idx: torch.Tensor,
        num_experts: int,
        previous_event: EventOverlap | None = None,
        async_finish: bool = False,
        allocate_on_comm_stream: bool = False,
    ) -> tuple[torch.Tensor, torch.Tensor | None, torch.Tensor, torch.Tensor, EventOverlap]:
        """Count who gets what. Local; the host does not wait.

        Args:
            topk_idx: ``[T, K]`` int64 or int32. Global expert of each choice; -1 marks an unused choice.
            num_experts: ``E``, a multiple of the ranks.
            previous_event: wait for this instead of the current stream.
            async_finish: do not make the current stream wait; use the returned event.
            allocate_on_comm_stream: needs ``async_finish`` and a ``previous_event``.

        Returns:
            ``(num_tokens_per_rank int32 [N], num_tokens_per_rdma_rank int32 [D] or None on one node,
            num_tokens_per_expert int32 [E], is_token_in_rank bool [T, N], event)``. A token counts once per rank.
            For ``N = 2``, ``E = 4`` and ``topk_idx = [[0, 1], [1, 3]]``: ``[2, 1]``, ``None``, ``[1, 2, 0, 1]``,
            ``[[True, False], [True, True]]``.

        Raises:
            ArgumentError: bad shapes, dtypes or expert numbers.
        """
        where = "get_dispatch_layout"
        part = self._normal(where)
        check_overlap(where, previous_event, async_finish, allocate_on_comm_stream)
        validation.experts(num_experts, self.group_size, where)
        idx = validation.topk_indices(topk_idx, where, num_experts=num_experts, check_values=self._settings.debug)
        streams = self._streams(part, idx, previous_event)
        with streams:
            layout = part.layout(idx, num_experts, streams.output)
        outputs = (
            layout.num_tokens_per_rank,
            layout.num_tokens_per_rdma_rank,
            layout.num_tokens_per_expert,
            layout.is_token_in_rank,
        )
        event = streams.finish(async_finish, (idx,), outputs, is_on_output_stream=layout.is_on_output_stream)
        return (*outputs, event)

    def dispatch(
        self,
        x: Rows,
        handle: tuple[Any, ...] | None = None,
        num_tokens_per_rank: torch.Tensor | None = None,
        num_tokens_per_rdma_rank: torch.Tensor | None = None,
        is_token_in_rank: torch.Tensor | None = None,
        num_tokens_per_expert: torch.Tensor | None = None,
        topk_idx: torch.Tensor | None = None,
        topk_weights: torch.Tensor | None = None,
        expert_alignment: int = 1,
        num_worst_tokens: int = 0,
        config: Config | None = None,
        previous_event: EventOverlap | None = None,
        async_finish: bool = False,
        allocate_on_comm_stream: bool = False,
    ) -> tuple[Rows, torch.Tensor | None, torch.Tensor | None, list[int] | None, tuple[Any, ...] | None, EventOverlap]:
        """Send every token to the ranks that hold its experts, one copy per rank. Collective.

        Args:
            x: ``[T, H]`` bf16, or ``(x, scales)`` with a 1-byte ``x`` and ``[T, S]`` float32 or int32 scales of any
                strides. A row is a multiple of 16 bytes.
            handle: of an earlier dispatch, to repeat its routing (dtype and ``H`` may differ); then no counts are
                exchanged, and ``topk_idx`` and ``topk_weights`` stay ``None``.
            num_tokens_per_rank, num_tokens_per_rdma_rank, is_token_in_rank, num_tokens_per_expert: of
                `get_dispatch_layout`.
            topk_idx: ``[T, K]`` int64 or int32; with ``topk_weights`` or not at all.
            topk_weights: ``[T, K]`` float32.
            expert_alignment: counts per expert are rounded up to a multiple of it.
            num_worst_tokens: fixed number of output rows; the host then does not wait, and no counts are returned.
            config: SM count; V1's chunk sizes have no effect where there are no queues.
            previous_event, async_finish, allocate_on_comm_stream: as in `get_dispatch_layout`.

        Returns:
            ``(recv_x, recv_topk_idx, recv_topk_weights, num_recv_tokens_per_expert_list, handle, event)``:
            ``recv_x`` ``[R, H]`` (or with scales ``[R, S]``, row-major) by source rank, then source token;
            ``recv_topk_idx`` int64 ``[R, K]``, local expert numbers, -1 elsewhere; ``recv_topk_weights`` float32
            ``[R, K]``, 0 where -1; a list of ``L`` ints. With a handle the middle four are ``None``.
            The tensors are the caller's. The host waits for the counts of a fresh dispatch.

        Raises:
            ArgumentError: this rank's arguments; its peers raise `PeerRefusedError`.
            PeersDisagreeError: the same on every rank. PeerTimeoutError, PeerLostError: a rank did not do its part.
        """
        with self._lock:
            part = self._normal("dispatch")
            with Checked(part, "dispatch" if handle is None else "cached_dispatch"):
                num_sms, is_exact = self._sms(config)
                check_overlap("dispatch", previous_event, async_finish, allocate_on_comm_stream)
                streams = self._streams(part, x, previous_event)
                if handle is None:
                    request = validation.fresh_dispatch(
                        x,
                        num_ranks=self.group_size,
                        ranks_per_node=self._facts.ranks_per_node,
                        num_tokens_per_rank=num_tokens_per_rank,
                        num_tokens_per_rdma_rank=num_tokens_per_rdma_rank,
                        is_token_in_rank=is_token_in_rank,
                        num_tokens_per_expert=num_tokens_per_expert,
                        topk_idx=topk_idx,
                        weights=topk_weights,
                        expert_alignment=expert_alignment,
                        num_worst_tokens=num_worst_tokens,
                        num_sms=num_sms,
                        num_sms_is_exact=is_exact,
                        output_stream=streams.output,
                        check_values=self._settings.debug,
                    )
                else:
                    request = validation.cached_dispatch(
                        x,
                        handle,
                        num_ranks=self.group_size,
                        ranks_per_node=self._facts.ranks_per_node,
                        topk_idx=topk_idx,
                        weights=topk_weights,
                        num_sms=num_sms,
                        num_sms_is_exact=is_exact,
                        output_stream=streams.output,
                    )
            with streams:
                result = part.dispatch(request)
        # Listed only when they are needed: this path decides how fast small batches can be sent.
        inputs: list[torch.Tensor | None] = []
        if async_finish:
            inputs = [request.x, request.scales, request.topk_idx, request.topk_weights, *(request.handle or ())]
            if request.layout is not None:
                inputs += [request.layout.num_tokens_per_rank, request.layout.is_token_in_rank]
                inputs += [request.layout.num_tokens_per_expert, request.layout.num_tokens_per_rdma_rank]
        new_handle = result.handle if handle is None else None
        outputs = (result.recv_x, result.recv_scales, result.recv_topk_idx, result.recv_topk_weights)
        event = streams.finish(
            async_finish, inputs, (*outputs, *(new_handle or ())), is_on_output_stream=result.is_on_output_stream
        )
        rows: Rows = result.recv_x if result.recv_scales is None else (result.recv_x, result.recv_scales)
        if handle is not None:
            return rows, None, None, None, None, event
        counts = list(result.num_recv_tokens_per_expert or [])
        return rows, result.recv_topk_idx, result.recv_topk_weights, counts, new_handle, event

    def combine(
        self,
        x: torch.Tensor,
        handle: tuple[Any, ...],
        topk_weights: torch.Tensor | None = None,
        bias: torch.Tensor | tuple[torch.Tensor | None, torch.Tensor | None] | None = None,
        config: Config | None = None,
        previous_event: EventOverlap | None = None,
        async_finish: bool = False,
        allocate_on_comm_stream: bool = False,
    ) -> tuple[torch.Tensor, torch.Tensor | None, EventOverlap]:
        """Bring the rows of a dispatch back and sum them over ranks. Collective.

        Args:
            x: ``[R, H]`` bf16, one row for each received row, already weighted by the caller if wanted.
            handle: of the dispatch.
            topk_weights: ``[R, K]`` float32, summed beside the rows.
            bias: up to two ``[T, H]`` bf16 tensors, added first.
            config, previous_event, async_finish, allocate_on_comm_stream: as in `dispatch`.

        Returns:
            ``(combined_x bf16 [T, H], combined_topk_weights float32 [T, K] or None, event)``. Sums are float32 in
            ascending rank order and rounded once (several nodes: once per node too).

        Raises:
            As `dispatch`.
        """
        with self._lock:
            part = self._normal("combine")
            with Checked(part, "combine"):
                num_sms, is_exact = self._sms(config)
                check_overlap("combine", previous_event, async_finish, allocate_on_comm_stream)
                streams = self._streams(part, x, previous_event)
                request = validation.combine(
                    x,
                    handle,
                    num_ranks=self.group_size,
                    ranks_per_node=self._facts.ranks_per_node,
                    weights=topk_weights,
                    bias=bias,
                    num_sms=num_sms,
                    num_sms_is_exact=is_exact,
                    output_stream=streams.output,
                )
            with streams:
                result = part.combine(request)
        inputs = [request.x, request.topk_weights, *request.biases, *request.handle] if async_finish else []
        outputs = (result.combined_x, result.combined_topk_weights)
        event = streams.finish(async_finish, inputs, outputs, is_on_output_stream=result.is_on_output_stream)
        return result.combined_x, result.combined_topk_weights, event

    def internode_dispatch(
        self,
        x: Rows,
        handle: tuple[Any, ...] | None = None,
        num_tokens_per_rank: torch.Tensor | None = None,
        num_tokens_per_rdma_rank: torch.Tensor | None = None,
        is_token_in_rank: torch.Tensor | None = None,
        num_tokens_per_expert: torch.Tensor | None = None,
        topk_idx: torch.Tensor | None = None,
        topk_weights: torch.Tensor | None = None,
        expert_alignment: int = 1,
        num_worst_tokens: int = 0,
        config: Config | None = None,
        previous_event: EventOverlap | None = None,
        async_finish: bool = False,
        allocate_on_comm_stream: bool = False,
    ) -> tuple[Rows, torch.Tensor | None, torch.Tensor | None, list[int] | None, tuple[Any, ...] | None, EventOverlap]:
        """V1's name for `dispatch` across nodes; the same call."""
        return self.dispatch(
            x,
            handle,
            num_tokens_per_rank,
            num_tokens_per_rdma_rank,
            is_token_in_rank,
            num_tokens_per_expert,
            topk_idx,
            topk_weights,
            expert_alignment,
            num_worst_tokens,
            config,
            previous_event,
            async_finish,
            allocate_on_comm_stream,
        )

    def internode_combine(
        self,
        x: torch.Tensor,
        handle: tuple[Any, ...],
        topk_weights: torch.Tensor | None = None,
        bias: torch.Tensor | tuple[torch.Tensor | None, torch.Tensor | None] | None = None,
        config: Config | None = None,
        previous_event: EventOverlap | None = None,
        async_finish: bool = False,
        allocate_on_comm_stream: bool = False,
    ) -> tuple[torch.Tensor, torch.Tensor | None, EventOverlap]:
        """V1's name for `combine` across nodes; the same call."""
        return self.combine(
            x, handle, topk_weights, bias, config, previous_event, async_finish, allocate_on_comm_stream
        )

    def _streams(self, part: NormalBackend, x: Any, previous_event: Any) -> CallStreams:
        own = own_stream(part, x)
        return CallStreams(own, self._order, previous_event, backend_orders_outputs=part.orders_output_stream)

    def _sms(self, config: Config | None) -> tuple[int, bool]:
        """SM count of a call, and whether the user chose it."""
        if config is None:
            return self.num_sms, self._num_sms_was_set
        if not isinstance(config, Config):
            raise ArgumentError(f"config is a {type(config).__name__}; it has to be a deep_ep.Config or None.")
        return config.num_sms, self._num_sms_was_set or config.num_sms != DEFAULT_NUM_SMS
