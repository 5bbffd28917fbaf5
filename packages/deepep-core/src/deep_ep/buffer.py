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

from . import internode_model, registry, settings, sizing, topology, validation
from ._low_latency import LowLatencyCalls
from ._normal_mode import DEFAULT_NUM_SMS, NormalCalls
from ._options import DEFAULT_TIMEOUT_S, agree_on_options, ll_reduce_of, timeout_of
from ._runtime import Runtime
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
from .events import EventHandle, EventOverlap, StreamOrder

logger = logging.getLogger("deep_ep")


class Buffer(NormalCalls, LowLatencyCalls):
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

    num_sms: ClassVar[int] = DEFAULT_NUM_SMS
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
        self._order = StreamOrder()
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
        if self._low_latency_backend is not None:
            self._low_latency_backend.reset()

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
        """`Config` for dispatch: as ``deepep tune`` wrote it for this many ranks, else the default. Any rank count.

        The default for more ranks than one node holds follows from a model of the links (`deep_ep.internode_model`).
        """
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


def _tuned(operation: internode_model.Operation, num_ranks: int) -> Config:
    validation.integer(num_ranks, "num_ranks", f"get_{operation}_config", least=1)
    try:
        row = settings.load().tuning.get(operation, {}).get(num_ranks, {})
    except SettingError:
        logger.warning("configuration is unreadable; using default %s settings", operation, exc_info=True)
        row = {}
    fields = {name: row[name] for name in Config.__dataclass_fields__ if name in row}
    default = internode_model.default_config(operation, num_ranks)
    num_sms = Buffer.num_sms
    if not Buffer._num_sms_was_set:
        num_sms = min(num_sms, default.get("num_sms", num_sms))
    return Config(**{**default, "num_sms": num_sms, **fields})
