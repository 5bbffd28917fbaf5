"""`Buffer`: V1's face of the library. It checks arguments, orders streams, asks a backend, and wraps the results.

Symbols: ``T`` tokens of this rank, ``K`` choices per token, ``H`` hidden size, ``S`` scales per row, ``N`` ranks, ``D``
nodes, ``E`` experts, ``L = E / N`` local experts, ``R`` received rows, ``X`` the most tokens a rank sends in one
low-latency call, ``M = N * X``.
"""

from __future__ import annotations

import contextlib
import logging
import threading
from collections.abc import Iterator, Mapping
from typing import Any, ClassVar

import torch
import torch.distributed as dist

from . import registry, settings, sizing, topology, validation
from ._low_latency import LowLatencyCalls, Rows
from ._options import DEFAULT_TIMEOUT_S, agree_on_options, ll_reduce_of, timeout_of
from ._runtime import Runtime
from ._streams import behind, check_overlap, checked, finish, output_stream_for
from .backend import (
    BufferOptions,
    GroupFacts,
    LowLatencyBackend,
    LowLatencyReduce,
    Mode,
    NormalBackend,
)
from .channel import open_channel
from .config import Config, get_low_latency_rdma_size_hint
from .errors import ArgumentError, BufferStateError, SettingError
from .events import EventHandle, EventOverlap

logger = logging.getLogger("deep_ep")

_DEFAULT_NUM_SMS = 20


class Buffer(LowLatencyCalls):
    """Dispatch and combine for the ranks of one group.

    Building a buffer, all dispatches and combines, and `clean_low_latency_buffer` are collective: every rank of the
    group makes the same calls in the same order. `get_dispatch_layout` and all static methods are local.

    Several buffers may exist at once. Two threads may share one: its calls run one after the other.

    Attributes:
        num_sms: (class) SMs for communication kernels: a ceiling until `set_num_sms` was called, then exact.
        group, group_size, rank: the group, its size, and this process's rank in it.
        num_nvl_bytes, num_rdma_bytes, low_latency_mode, explicitly_destroy, enable_shrink: as passed.
        runtime: `Runtime`, or ``None`` once destroyed.
    """

    num_sms: ClassVar[int] = _DEFAULT_NUM_SMS
    _num_sms_was_set: ClassVar[bool] = False

    def __init__(
        self,
        group: dist.ProcessGroup | None,
        num_nvl_bytes: int = 0,
        num_rdma_bytes: int = 0,
        low_latency_mode: bool = False,
        num_qps_per_rank: int = 24,
        allow_nvlink_for_low_latency_mode: bool = True,
        allow_mnnvl: bool = False,
        use_fabric: bool = False,
        explicitly_destroy: bool = False,
        enable_shrink: bool = False,
        comm: Any = None,
        *,
        backend: str | Mapping[str, str] | None = None,
        ll_reduce: LowLatencyReduce | None = None,
        timeout_s: float | None = None,
    ) -> None:
        """Build a buffer. Collective.

        Args:
            group: process group with gloo, NCCL or both; ``None`` with ``comm``.
            num_nvl_bytes, num_rdma_bytes: V1's sizes. A buffer of any size serves any number of tokens.
            low_latency_mode: serve the low-latency calls too.
            num_qps_per_rank: RDMA queue pairs per rank, for backends that have such.
            allow_nvlink_for_low_latency_mode, allow_mnnvl, use_fabric: as in V1; hints to backends.
            explicitly_destroy: the user will call `destroy`; without it, garbage collection does it.
            enable_shrink: allow ranks to be masked in low-latency mode.
            comm: an mpi4py communicator instead of a group.
            backend: name for all modes that it serves, or ``{"normal": ..., "low_latency": ...}``; else the environment
                variable DEEPEP_BACKEND, the configuration file, or the fastest that can serve this group.
            ll_reduce: ``"rank"`` sums expert outputs on their rank before they travel back, ``"expert"`` only at the
                source. Part of the numerical contract; default DEEPEP_LL_REDUCE or ``"rank"``.
            timeout_s: deadline of every wait for a peer, in seconds; default DEEPEP_TIMEOUT_S or 100.

        Raises:
            ArgumentError, SettingError: on every rank, if any rank gave something unacceptable or ranks differ.
            BackendNotFoundError, BackendUnavailableError: on every rank; the text names what to install or change.
            PeerTimeoutError: a rank did not come.
        """
        if torch.cuda.is_available() and torch.cuda.is_current_stream_capturing():
            raise BufferStateError(
                "A Buffer cannot be built while a CUDA graph is captured. Build it before the capture."
            )
        if (group is None) == (comm is None):
            raise ArgumentError("Buffer needs a process group or an MPI communicator (comm=), and not both.")
        self.group = group
        self.num_nvl_bytes = num_nvl_bytes
        self.num_rdma_bytes = num_rdma_bytes
        self.low_latency_mode = low_latency_mode
        self.explicitly_destroy = explicitly_destroy
        self.enable_shrink = enable_shrink
        self.runtime: Runtime | None = None
        self._normal_backend: NormalBackend | None = None
        self._low_latency_backend: LowLatencyBackend | None = None
        self._lock = threading.RLock()
        channel = open_channel(group, comm)
        self.rank = channel.rank
        self.group_size = channel.num_ranks

        def own_options() -> tuple[settings.Settings, BufferOptions, dict[str, str]]:
            own = settings.load()
            options = BufferOptions(
                num_nvl_bytes=validation.integer(num_nvl_bytes, "num_nvl_bytes", "Buffer", least=0),
                num_rdma_bytes=validation.integer(num_rdma_bytes, "num_rdma_bytes", "Buffer", least=0),
                low_latency_mode=bool(low_latency_mode),
                num_qps_per_rank=validation.integer(num_qps_per_rank, "num_qps_per_rank", "Buffer", least=1),
                allow_nvlink_for_low_latency_mode=bool(allow_nvlink_for_low_latency_mode),
                allow_mnnvl=bool(allow_mnnvl),
                use_fabric=bool(use_fabric),
                enable_shrink=bool(enable_shrink),
                symmetric_heap_bytes=max((own.symmetric_heap_mb or 1024) << 20, num_nvl_bytes),
                ll_reduce=ll_reduce_of(ll_reduce or own.ll_reduce or "rank"),
                timeout_s=timeout_of(timeout_s if timeout_s is not None else own.timeout_s or DEFAULT_TIMEOUT_S),
            )
            return own, options, registry.parse_request(backend if backend is not None else own.backend)

        own, options, request = agree_on_options(channel, own_options)
        self._settings = own
        device_index = torch.cuda.current_device() if torch.cuda.is_available() else -1
        nodes = topology.agree(
            channel, device_index=device_index, ranks_per_node=own.ranks_per_node, timeout_s=options.timeout_s
        )
        self._facts = GroupFacts(
            rank=self.rank,
            num_ranks=self.group_size,
            ranks_per_node=nodes.ranks_per_node,
            device=torch.device("cuda", device_index) if device_index >= 0 else torch.device("cpu"),
            channel=channel,
            group=group,
            comm=comm,
        )
        modes: tuple[Mode, ...] = ("normal", "low_latency") if options.low_latency_mode else ("normal",)
        environment = registry.local_environment(
            num_ranks=self.group_size, num_nodes=nodes.num_nodes, device_of_rank=nodes.device_of_rank
        )
        chosen = registry.choose(request, modes, environment, self._facts, options)
        self._normal_backend = chosen.normal
        self._low_latency_backend = chosen.low_latency
        self._backend_names = dict(chosen.names)
        self.runtime = Runtime(self._facts, nodes.device_of_rank)

    @classmethod
    def for_model(
        cls,
        group: dist.ProcessGroup | None,
        *,
        hidden: int,
        num_experts: int,
        num_topk: int,
        max_tokens_per_rank: int,
        mode: sizing.BufferMode = "normal",
        comm: Any = None,
        backend: str | Mapping[str, str] | None = None,
        ll_reduce: LowLatencyReduce | None = None,
        timeout_s: float | None = None,
        enable_shrink: bool = False,
    ) -> Buffer:
        """Build a buffer sized by facts about the model. Collective.

        Args:
            hidden: columns of a token.
            num_experts: of the whole group.
            num_topk: experts of a token.
            max_tokens_per_rank: the most tokens one rank sends in one low-latency call; normal mode takes any number.
            mode: ``"normal"``, ``"low_latency"`` or ``"both"``.

        The rest, and what is raised, as in the constructor.
        """
        num_ranks = dist.get_world_size(group) if group is not None else int(comm.Get_size())
        size = sizing.size_for_model(
            hidden=hidden,
            num_experts=num_experts,
            num_ranks=num_ranks,
            max_tokens_per_rank=max_tokens_per_rank,
            num_topk=num_topk,
            mode=mode,
        )
        return cls(
            group,
            size.num_nvl_bytes,
            size.num_rdma_bytes,
            low_latency_mode=size.low_latency_mode,
            num_qps_per_rank=max(1, num_experts // num_ranks),
            enable_shrink=enable_shrink,
            comm=comm,
            backend=backend,
            ll_reduce=ll_reduce,
            timeout_s=timeout_s,
        )

    # --- lifecycle --------------------------------------------------------------------------------------------------

    def destroy(self) -> None:
        """Release everything. May be called twice; never hangs. Before ``destroy_process_group``."""
        normal, low_latency = self._normal_backend, self._low_latency_backend
        self._normal_backend = self._low_latency_backend = None
        self.runtime = None
        for part in (normal, low_latency):
            if part is not None:
                part.destroy()

    def __del__(self) -> None:
        # At interpreter exit anything may be gone already; a destructor has nobody to report to.
        with contextlib.suppress(Exception):
            self.destroy()

    def abort(self) -> None:
        """Make every wait of this rank end soon with an error. Local, idempotent, callable from another thread."""
        for part in (self._normal_backend, self._low_latency_backend):
            if part is not None:
                part.abort()

    def reset(self) -> None:
        """Make the buffer usable again after a fault, where the backend can. Collective.

        Raises `BufferStateError` where it cannot; then destroy the buffer and build a new one.
        """
        self._normal("reset").reset()

    @property
    def backends(self) -> Mapping[Mode, str]:
        """The backend that serves each mode."""
        return dict(self._backend_names)

    def placement(self) -> Mapping[str, str]:
        """Where the tensors of the last normal-mode call were placed; empty where the backend has nothing to tell."""
        return self._normal("placement").placement()

    def push_limit_gbps(self, num_sms: int) -> float | None:
        """The best all-to-all push rate, GB/s of egress per rank, measured now; ``None`` if unknown. Collective."""
        return self._normal("push_limit_gbps").push_limit_gbps(num_sms)

    def tuning_space(self) -> Mapping[str, tuple[int, ...]]:
        """What `deepep tune` may vary beside the SM count, with the values worth trying."""
        return self._normal("tuning_space").tuning_space()

    @contextlib.contextmanager
    def symmetric_memory(self) -> Iterator[None]:
        """Tensors allocated inside the block are placed where peers can reach them, so that `combine` copies less.

        Where the backend has no such memory the block changes nothing.
        """
        with self._normal("symmetric_memory").symmetric_memory():
            yield

    def _normal(self, what: str) -> NormalBackend:
        if self._normal_backend is None:
            raise BufferStateError(f"{what}: this buffer was destroyed. Build a new one.")
        return self._normal_backend

    # --- static facts and settings ----------------------------------------------------------------------------------

    @staticmethod
    def is_sm90_compiled() -> bool:
        """Whether SM90 features are there: true where CUDA is absent, or an installed kernel backend has them."""
        from . import _native_facts

        return _native_facts.is_sm90_compiled()

    @staticmethod
    def set_num_sms(new_num_sms: int) -> None:
        """SMs of the communication kernels from now on, for every buffer of this process: even, obeyed exactly."""
        validation.integer(new_num_sms, "new_num_sms", "set_num_sms", least=2)
        if new_num_sms % 2:
            raise ArgumentError(f"set_num_sms: new_num_sms is {new_num_sms}; it has to be even.")
        Buffer.num_sms = new_num_sms
        Buffer._num_sms_was_set = True

    @staticmethod
    def capture() -> EventOverlap:
        """An event of the current stream, to pass as ``previous_event``."""
        return EventOverlap(EventHandle())

    @staticmethod
    def get_low_latency_rdma_size_hint(
        num_max_dispatch_tokens_per_rank: int, hidden: int, num_ranks: int, num_experts: int
    ) -> int:
        """Bytes to pass as ``num_rdma_bytes`` for low-latency mode. Needs no CUDA."""
        return get_low_latency_rdma_size_hint(num_max_dispatch_tokens_per_rank, hidden, num_ranks, num_experts)

    @staticmethod
    def get_dispatch_config(num_ranks: int) -> Config:
        """`Config` for dispatch: as ``deepep tune`` wrote it for this many ranks, else the default. Any rank count."""
        return _tuned("dispatch", num_ranks)

    @staticmethod
    def get_combine_config(num_ranks: int) -> Config:
        """`Config` for combine; see `get_dispatch_config`."""
        return _tuned("combine", num_ranks)

    def get_comm_stream(self) -> torch.Stream:
        """The communication stream (a ``torch.cuda.Stream``; a CPU stream where there is no GPU)."""
        stream = self._normal("get_comm_stream").comm_stream
        return stream if stream is not None else torch.Stream(device="cpu")

    def get_local_buffer_tensor(
        self, dtype: torch.dtype, size: torch.Size | None = None, offset: int = 0, use_rdma_buffer: bool = False
    ) -> torch.Tensor:
        """A view of this rank's scratch memory, free to overwrite between calls; never shows signals.

        Args:
            dtype: of the view.
            size: shape; everything from ``offset`` on if ``None``.
            offset: in bytes.
            use_rdma_buffer: the scratch of low-latency mode (``num_rdma_bytes``) instead of normal mode's.

        Raises:
            ArgumentError: the view would reach beyond the buffer.
        """
        where = "get_local_buffer_tensor"
        num_bytes = self.num_rdma_bytes if use_rdma_buffer else self.num_nvl_bytes
        part: NormalBackend | LowLatencyBackend = (
            self._low_latency(where) if use_rdma_buffer and self.low_latency_mode else self._normal(where)
        )
        memory = part.local_tensor(num_bytes)
        if memory is None:
            raise BufferStateError(f"{where}: the backend of this buffer keeps no scratch memory.")
        validation.integer(offset, "offset", where, least=0)
        item = torch.empty((), dtype=dtype).element_size()
        available = memory.numel() - offset
        wanted = available // item * item if size is None else torch.Size(size).numel() * item
        if offset % item or wanted > available or available < 0:
            raise ArgumentError(
                f"{where}: {wanted} bytes of {dtype} at byte offset {offset} do not fit, aligned, into "
                f"{memory.numel()} bytes."
            )
        view = memory[offset : offset + wanted].view(dtype)
        return view if size is None else view.view(size)

    # --- normal mode ------------------------------------------------------------------------------------------------

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
        stream = part.comm_stream
        with behind(stream, previous_event):
            layout = part.layout(idx, num_experts)
        outputs = (
            layout.num_tokens_per_rank,
            layout.num_tokens_per_rdma_rank,
            layout.num_tokens_per_expert,
            layout.is_token_in_rank,
        )
        event = finish(stream, async_finish, (idx,), outputs)
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
            with checked(part, "dispatch" if handle is None else "cached_dispatch"):
                num_sms, is_exact = _sms(config)
                check_overlap("dispatch", previous_event, async_finish, allocate_on_comm_stream)
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
                        output_stream=output_stream_for(x, previous_event, allocate_on_comm_stream),
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
                        output_stream=output_stream_for(x, previous_event, allocate_on_comm_stream),
                    )
            stream = part.comm_stream if request.x.is_cuda else None
            with behind(stream, previous_event):
                result = part.dispatch(request)
        new_handle = result.handle if handle is None else None
        # Listed only when they are needed: this path decides how fast small batches can be sent.
        inputs: list[torch.Tensor | None] = []
        if async_finish:
            inputs = [request.x, request.scales, request.topk_idx, request.topk_weights, *(request.handle or ())]
            if request.layout is not None:
                inputs += [request.layout.num_tokens_per_rank, request.layout.is_token_in_rank]
                inputs += [request.layout.num_tokens_per_expert, request.layout.num_tokens_per_rdma_rank]
        outputs = (result.recv_x, result.recv_scales, result.recv_topk_idx, result.recv_topk_weights)
        event = finish(
            stream,
            async_finish,
            inputs,
            (*outputs, *(new_handle or ())),
            is_on_output_stream=result.is_on_output_stream,
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
            with checked(part, "combine"):
                num_sms, is_exact = _sms(config)
                check_overlap("combine", previous_event, async_finish, allocate_on_comm_stream)
                request = validation.combine(
                    x,
                    handle,
                    num_ranks=self.group_size,
                    ranks_per_node=self._facts.ranks_per_node,
                    weights=topk_weights,
                    bias=bias,
                    num_sms=num_sms,
                    num_sms_is_exact=is_exact,
                    output_stream=output_stream_for(x, previous_event, allocate_on_comm_stream),
                )
            stream = part.comm_stream if request.x.is_cuda else None
            with behind(stream, previous_event):
                result = part.combine(request)
        inputs = [request.x, request.topk_weights, *request.biases, *request.handle]
        outputs = (result.combined_x, result.combined_topk_weights)
        event = finish(stream, async_finish, inputs, outputs, is_on_output_stream=result.is_on_output_stream)
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


def _sms(config: Config | None) -> tuple[int, bool]:
    """SM count of a call, and whether the user chose it."""
    if config is None:
        return Buffer.num_sms, Buffer._num_sms_was_set
    if not isinstance(config, Config):
        raise ArgumentError(f"config is a {type(config).__name__}; it has to be a deep_ep.Config or None.")
    return config.num_sms, Buffer._num_sms_was_set or config.num_sms != _DEFAULT_NUM_SMS


def _tuned(operation: str, num_ranks: int) -> Config:
    validation.integer(num_ranks, "num_ranks", f"get_{operation}_config", least=1)
    try:
        row = settings.load().tuning.get(operation, {}).get(num_ranks, {})
    except SettingError:
        logger.warning("configuration is unreadable; using default %s settings", operation, exc_info=True)
        row = {}
    fields = {name: row[name] for name in Config.__dataclass_fields__ if name in row}
    return Config(**{"num_sms": Buffer.num_sms, **fields})
