"""The contract between `deep_ep.Buffer` and a backend.

Symbols used in every shape: ``T`` tokens of this rank, ``K`` choices per token, ``H`` hidden size, ``S`` scales per
row, ``N`` ranks, ``D`` nodes, ``E`` experts, ``L = E / N`` experts of one rank, ``R`` received rows, ``X`` the most
tokens a rank may send in low-latency mode, ``M = N * X`` rows per local expert in low-latency mode.

Who does what
-------------
`Buffer` checks arguments (all of them, before any state changes), orders streams, and turns results into V1's tuples.
A backend allocates its outputs, owns its communication stream, moves the data and waits for peers. A backend's methods
are called with the stream to work on already current: whatever they enqueue goes to ``torch.cuda.current_stream()``
(`NormalBackend.orders_output_stream` names an exception).
On CPU tensors everything is complete when the method returns.

A backend package registers one `Backend` subclass under the entry-point group ``deep_ep.backends``. Importing that
module must be cheap, must not touch CUDA, and must not fail because a driver or a library is absent: `Backend.probe`
is where absence is reported.

Numbers
-------
All backends produce the same bits: see the numerical contract in the documentation. Its parameters are
`GroupFacts.ranks_per_node` and `BufferOptions.ll_reduce`.

Faults
------
Every wait on a peer has a deadline (`BufferOptions.timeout_s`) and ends in `PeerTimeoutError` or `PeerLostError`. After
such an error the backend refuses further calls with `BufferStateError` until it was reset or the buffer rebuilt.
A rank whose arguments were refused calls `refuse` where the capability `collective_refusal` names the operation: it
takes part in that call's header exchange, so that every peer raises `PeerRefusedError` at once.
"""

from __future__ import annotations

import contextlib
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, ClassVar, Literal

import torch

from .settings import NvshmemSettings

if TYPE_CHECKING:
    from .channel import Channel

ENTRY_POINT_GROUP = "deep_ep.backends"

Mode = Literal["normal", "low_latency"]
LowLatencyReduce = Literal["rank", "expert"]
Operation = Literal["dispatch", "cached_dispatch", "combine", "low_latency_dispatch", "low_latency_combine", "clean"]


# --- what a backend says about itself -------------------------------------------------------------------------------


@dataclass(frozen=True, kw_only=True)
class Capabilities:
    """What a backend can do, as data: core and tests ask for a capability, never for a backend's name.

    Attributes:
        modes: the modes it serves.
        devices: device types of the tensors it takes.
        priority: ``auto`` tries higher first.
        multi_node: serves groups that span several nodes.
        max_ranks: the most ranks it serves; ``None`` for any number.
        collective_refusal: operations whose header exchange carries one rank's refusal to all.
        cuda_graphs: its device work can be captured (normal mode with ``num_worst_tokens``, low-latency mode always).
        symmetric_memory: `NormalBackend.symmetric_memory` places tensors where peers can reach them.
        rank_masks: `LowLatencyBackend` masks ranks (``enable_shrink``).
        logfmt: low-latency combine can travel in LogFMT.
    """

    modes: frozenset[Mode]
    devices: frozenset[str]
    priority: int
    multi_node: bool = False
    max_ranks: int | None = None
    collective_refusal: frozenset[Operation] = frozenset()
    cuda_graphs: bool = False
    symmetric_memory: bool = False
    rank_masks: bool = False
    logfmt: bool = False


@dataclass(frozen=True, kw_only=True)
class Obstacle:
    """One reason why a backend cannot serve, with its cure, each one line."""

    cause: str
    cure: str

    def __str__(self) -> str:
        return f"{self.cause}. {self.cure}"


@dataclass(frozen=True, kw_only=True)
class Environment:
    """Facts about this process that a probe may use: gathered without creating a CUDA context.

    Attributes:
        device_type: ``"cuda"`` where torch sees a GPU, else ``"cpu"``.
        num_gpus: GPUs visible to this process.
        num_ranks, num_nodes: the group's, or ``None`` when no group exists yet (``deepep backends``).
        device_of_rank: device index of each rank of the group (-1 for CPU ranks), or ``None`` when unknown.
    """

    device_type: str
    num_gpus: int
    num_ranks: int | None = None
    num_nodes: int | None = None
    device_of_rank: tuple[int, ...] | None = None


@dataclass(frozen=True, kw_only=True)
class GroupFacts:
    """What a backend may know about the group.

    Attributes:
        rank, num_ranks: of this process in the group.
        ranks_per_node: equal on all nodes, contiguous ranks; ``num_ranks`` for a single node.
        device: where this rank's tensors live by default.
        channel: fixed-layout byte records between the ranks (`deep_ep.channel.Channel`).
        group: the torch process group, or ``None`` when the buffer was built on an MPI communicator.
        comm: the MPI communicator, or ``None``.
    """

    rank: int
    num_ranks: int
    ranks_per_node: int
    device: torch.device
    channel: Channel
    group: Any = None
    comm: Any = None

    @property
    def num_nodes(self) -> int:
        return self.num_ranks // self.ranks_per_node

    @property
    def node(self) -> int:
        return self.rank // self.ranks_per_node

    @property
    def local_rank(self) -> int:
        return self.rank % self.ranks_per_node


@dataclass(frozen=True, kw_only=True)
class BufferOptions:
    """How the buffer was asked for.

    Byte hints are V1's; a backend may need less or more and documents what it takes. ``symmetric_heap_bytes`` is the
    size of the memory that peers can reach, for backends that keep such; ``timeout_s`` the deadline of every wait.
    ``low_latency_sms``: SMs of low-latency kernels, ``None`` for the backend's choice; ``rdma_provider``: who executes
    RDMA requests that kernels post, ``"auto"``, ``"software"`` or ``"nvshmem"``; ``nvshmem``: how NVSHMEM is started.
    These three come from the settings.
    """

    num_nvl_bytes: int = 0
    num_rdma_bytes: int = 0
    low_latency_mode: bool = False
    num_qps_per_rank: int = 24
    allow_nvlink_for_low_latency_mode: bool = True
    allow_mnnvl: bool = False
    use_fabric: bool = False
    enable_shrink: bool = False
    symmetric_heap_bytes: int = 1 << 30
    ll_reduce: LowLatencyReduce = "rank"
    timeout_s: float = 100.0
    low_latency_sms: int | None = None
    rdma_provider: str = "auto"
    nvshmem: NvshmemSettings = field(default_factory=NvshmemSettings)


# --- normal mode ----------------------------------------------------------------------------------------------------


@dataclass(frozen=True, kw_only=True)
class DispatchLayout:
    """Who gets what from this rank.

    Attributes:
        num_tokens_per_rank: int32 ``[N]``; a token counts once for each rank that holds at least one of its experts.
        num_tokens_per_rdma_rank: int32 ``[D]``, or ``None`` on a single node.
        num_tokens_per_expert: int32 ``[E]``.
        is_token_in_rank: bool ``[T, N]``.
        is_on_output_stream: all of these were allocated on the ``output_stream`` of `NormalBackend.layout`.
    """

    num_tokens_per_rank: torch.Tensor
    num_tokens_per_rdma_rank: torch.Tensor | None
    num_tokens_per_expert: torch.Tensor
    is_token_in_rank: torch.Tensor
    is_on_output_stream: bool = False


@dataclass(frozen=True, kw_only=True)
class DispatchRequest:
    """One normal-mode dispatch; exactly one of ``layout`` (fresh) and ``handle`` (cached) is given.

    Attributes:
        x: ``[T, H]`` contiguous; bf16, or a 1-byte type with ``scales``.
        scales: ``[T, S]`` float32 or int32 with any strides, or ``None``.
        layout: of these ``topk_idx``; ``None`` in a cached dispatch.
        topk_idx: int64 or int32 ``[T, K]`` contiguous, ``-1`` for an unused choice; ``None`` without top-k.
        topk_weights: float32 ``[T, K]`` contiguous; ``None`` without top-k.
        expert_alignment: per-expert counts are rounded up to it.
        num_worst_tokens: 0, or the fixed number of output rows; then the host does not wait.
        handle: V1's tuple as an earlier fresh dispatch returned it (perhaps a fresh plain tuple of its parts).
        num_sms: how many SMs to use.
        num_sms_is_exact: the user chose it, so it is obeyed exactly; else it is a ceiling.
        output_stream: the caller's stream, where outputs should be allocated, so that their memory can be reused
            without waiting for events. Given only to a backend with `NormalBackend.orders_output_stream`.
    """

    x: torch.Tensor
    scales: torch.Tensor | None = None
    layout: DispatchLayout | None = None
    topk_idx: torch.Tensor | None = None
    topk_weights: torch.Tensor | None = None
    expert_alignment: int = 1
    num_worst_tokens: int = 0
    handle: tuple[torch.Tensor | None, ...] | None = None
    num_sms: int = 20
    num_sms_is_exact: bool = False
    output_stream: torch.cuda.Stream | None = None


@dataclass(frozen=True, kw_only=True)
class DispatchResult:
    """What arrived: rows by source rank, then by source token, always.

    Attributes:
        recv_x: ``[R, H]``, dtype of ``x``.
        recv_scales: ``[R, S]`` row-major contiguous, dtype of ``scales``, or ``None``.
        recv_topk_idx: int64 ``[R, K]``, expert numbers of this rank (0 to L-1), ``-1`` elsewhere; ``None`` when cached.
        recv_topk_weights: float32 ``[R, K]``, 0 where ``recv_topk_idx`` is ``-1``; ``None`` when cached.
        num_recv_tokens_per_expert: ``L`` ints rounded up to the alignment; empty with ``num_worst_tokens``; ``None``
            when cached.
        handle: V1's tuple (`deep_ep.handles`); ``None`` when cached.
        is_on_output_stream: all of these were allocated on the request's ``output_stream``.
    """

    recv_x: torch.Tensor
    recv_scales: torch.Tensor | None = None
    recv_topk_idx: torch.Tensor | None = None
    recv_topk_weights: torch.Tensor | None = None
    num_recv_tokens_per_expert: list[int] | None = None
    handle: tuple[torch.Tensor | None, ...] | None = None
    is_on_output_stream: bool = False


@dataclass(frozen=True, kw_only=True)
class CombineRequest:
    """One normal-mode combine.

    Attributes:
        x: bf16 ``[R, H]`` contiguous, rows as dispatch delivered them.
        handle: V1's tuple of the dispatch.
        topk_weights: float32 ``[R, K]``, summed over ranks beside the rows, or ``None``.
        biases: 0 to 2 bf16 tensors ``[T, H]``, added first.
        num_sms, num_sms_is_exact, output_stream: as in `DispatchRequest`.
    """

    x: torch.Tensor
    handle: tuple[torch.Tensor | None, ...]
    topk_weights: torch.Tensor | None = None
    biases: tuple[torch.Tensor, ...] = ()
    num_sms: int = 20
    num_sms_is_exact: bool = False
    output_stream: torch.cuda.Stream | None = None


@dataclass(frozen=True, kw_only=True)
class CombineResult:
    """``combined_x`` bf16 ``[T, H]``: the unweighted sum over ranks.

    ``combined_topk_weights``: float32 ``[T, K]`` or ``None``. ``is_on_output_stream``: as in `DispatchResult`.
    """

    combined_x: torch.Tensor
    combined_topk_weights: torch.Tensor | None = None
    is_on_output_stream: bool = False


class NormalBackend(ABC):
    """High-throughput dispatch and combine. One instance belongs to one buffer.

    Attributes:
        orders_output_stream: calls that wait for nothing but the caller's stream come with that stream, still current,
            as ``output_stream``. The backend allocates there and then lets its own stream, on which it works, wait for
            it (after allocating: what was freed there may still be read). In other calls `Buffer` orders the streams.
    """

    orders_output_stream: ClassVar[bool] = False

    @property
    @abstractmethod
    def comm_stream(self) -> torch.cuda.Stream | None:
        """The stream on which `Buffer` runs this backend's calls; ``None`` where tensors live on the CPU."""

    @abstractmethod
    def layout(
        self, topk_idx: torch.Tensor, num_experts: int, output_stream: torch.cuda.Stream | None = None
    ) -> DispatchLayout:
        """Count. Local, the host does not wait.

        ``topk_idx``: contiguous int64 or int32 ``[T, K]``. ``output_stream``: as in `DispatchRequest`.
        """

    @abstractmethod
    def dispatch(self, request: DispatchRequest) -> DispatchResult:
        """Send rows to the ranks that want them. Collective.

        A fresh dispatch exchanges headers and counts first; the host waits for them unless ``num_worst_tokens`` is set.
        New tensor objects every time; the backend keeps no reference to them.

        Raises `PeersDisagreeError`, `PeerRefusedError`, `PeerTimeoutError`, `PeerLostError`, `BufferStateError`.
        """

    @abstractmethod
    def combine(self, request: CombineRequest) -> CombineResult:
        """Bring rows back and sum them. Collective. Raises as `dispatch` does."""

    @abstractmethod
    def refuse(self, operation: Operation, reason: str) -> None:
        """This rank's arguments for ``operation`` were refused: tell the peers through that call's header exchange.

        Must not raise for what peers say. Does nothing for operations outside `Capabilities.collective_refusal`.
        """

    @contextlib.contextmanager
    def symmetric_memory(self) -> Iterator[None]:
        """Tensors allocated inside are reachable by peers, where the backend has such memory; else nothing changes."""
        yield

    def local_tensor(self, num_bytes: int) -> torch.Tensor | None:
        """Scratch that the user may overwrite between calls: uint8, at least ``num_bytes``; ``None`` if there is none.

        Never shows signals or counters.
        """
        return None

    def placement(self) -> Mapping[str, str]:
        """For the last call, where each tensor was placed: ``{"recv_x": "in place", ...}``. For people and tests."""
        return {}

    def tuning_space(self) -> Mapping[str, tuple[int, ...]]:
        """What ``deepep tune`` may vary, beside the SM count, with the values worth trying."""
        return {}

    def push_limit_gbps(self, num_sms: int) -> float | None:
        """The best all-to-all push rate of this machine, GB/s of egress per rank, measured now; ``None`` if unknown.

        Collective. Benchmarks measure wire efficiency against it.
        """
        return None

    @abstractmethod
    def abort(self) -> None:
        """Local, idempotent: make every wait of this rank end soon with an error. Callable from another thread."""

    def reset(self) -> None:
        """Collective: make the backend usable again after a fault."""
        from .errors import BufferStateError

        raise BufferStateError(f"{type(self).__name__} cannot be reset. Destroy the buffer and build a new one.")

    @abstractmethod
    def destroy(self) -> None:
        """Local, idempotent, never waits for a peer for longer than the deadline: release everything."""


# --- low-latency mode -----------------------------------------------------------------------------------------------


@dataclass(frozen=True, kw_only=True)
class LowLatencyDispatchRequest:
    """One low-latency dispatch.

    Attributes:
        x: bf16 ``[T, H]`` contiguous, ``T <= max_tokens``.
        topk_idx: int64 or int32 ``[T, K]`` contiguous, ``-1`` unused.
        topk_weights: float32 ``[T, K]`` or ``None``: sent along, so that combine's send need not wait for them.
        max_tokens: ``X``, the same on every rank.
        num_experts: ``E``.
        cumulative_local_expert_recv_stats: int32 ``[L]``, added to in place, or ``None``.
        wait_recv_cost_stats: int64 ``[N]``, nanoseconds waited for each source rank, added to in place, or ``None``.
        use_fp8: cast to e4m3 with one scale per 128 columns.
        round_scale: round scales up to powers of two.
        use_ue8m0: pack scales as UE8M0, four to an int32.
        split: return after the send; the result's ``receive`` does the rest.
    """

    x: torch.Tensor
    topk_idx: torch.Tensor
    topk_weights: torch.Tensor | None = None
    max_tokens: int
    num_experts: int
    cumulative_local_expert_recv_stats: torch.Tensor | None = None
    wait_recv_cost_stats: torch.Tensor | None = None
    use_fp8: bool = True
    round_scale: bool = False
    use_ue8m0: bool = False
    split: bool = False


@dataclass(frozen=True, kw_only=True)
class LowLatencyDispatchResult:
    """What arrives in the expert-major layout.

    Attributes:
        recv_x: ``[L, M, H]`` bf16 or e4m3; rows of one expert are grouped by source rank.
        recv_scales: float32 ``[L, M, H/128]`` or int32 ``[L, M, H/512]``, stride 1 along ``M``; ``None`` for bf16.
        recv_count: int32 ``[L]``, valid rows of each expert.
        handle: V1's five parts (`deep_ep.handles.LowLatencyHandle`).
        receive: completes the operation on the stream current when it is called; ``None`` if the call was not split.
    """

    recv_x: torch.Tensor
    recv_scales: torch.Tensor | None
    recv_count: torch.Tensor
    handle: tuple[Any, ...]
    receive: Callable[[], None] | None


@dataclass(frozen=True, kw_only=True)
class LowLatencyCombineRequest:
    """One low-latency combine.

    Attributes:
        x: bf16 ``[L, M, H]`` contiguous, expert outputs in the layout of dispatch (ignored with ``zero_copy``: the rows
            are in the buffer that `LowLatencyBackend.next_combine_buffer` returned).
        topk_idx, topk_weights: of this rank's tokens, ``[T, K]``; weights float32.
        handle: V1's five parts.
        use_logfmt: let rows travel in LogFMT.
        zero_copy: see ``x``.
        out: bf16 ``[T, H]`` to write to, or ``None``.
        wait_recv_cost_stats: as in dispatch.
        split: as in dispatch.
    """

    x: torch.Tensor
    topk_idx: torch.Tensor
    topk_weights: torch.Tensor
    handle: tuple[Any, ...]
    use_logfmt: bool = False
    zero_copy: bool = False
    out: torch.Tensor | None = None
    wait_recv_cost_stats: torch.Tensor | None = None
    split: bool = False


@dataclass(frozen=True, kw_only=True)
class LowLatencyCombineResult:
    """``combined_x`` bf16 ``[T, H]``, the weighted sum; ``receive`` as in `LowLatencyDispatchResult`."""

    combined_x: torch.Tensor
    receive: Callable[[], None] | None


class LowLatencyBackend(ABC):
    """Decode-time dispatch and combine. One instance belongs to one buffer."""

    @property
    @abstractmethod
    def comm_stream(self) -> torch.cuda.Stream | None:
        """The stream for calls with ``async_finish``; all others run on the caller's stream."""

    @abstractmethod
    def dispatch(self, request: LowLatencyDispatchRequest) -> LowLatencyDispatchResult:
        """Send each token to the experts it chose. Collective.

        With ``split``, outputs are undefined until ``receive`` ran. A dispatch whose ``receive`` has not run is
        outstanding; a third outstanding operation is refused with `BufferStateError`; dropping ``receive`` uncalled
        (it is garbage-collected) ends the operation too.
        """

    @abstractmethod
    def combine(self, request: LowLatencyCombineRequest) -> LowLatencyCombineResult:
        """Bring expert outputs back, sum them with the weights. Collective. One handle may be combined repeatedly."""

    @abstractmethod
    def next_combine_buffer(self, handle: tuple[Any, ...]) -> torch.Tensor:
        """bf16 ``[L, M, H]`` that a ``zero_copy`` combine of this handle reads; the row stride may exceed ``H``."""

    @abstractmethod
    def clean(self, max_tokens: int, hidden: int, num_experts: int) -> None:
        """Collective: forget leftovers before the first low-latency call after something else used the memory."""

    @abstractmethod
    def refuse(self, operation: Operation, reason: str) -> None:
        """As `NormalBackend.refuse`."""

    def update_mask(self, rank: int, masked: bool) -> None:
        """Leave ``rank`` out of the following operations, or take it in again. Local."""
        raise NotImplementedError

    def query_mask(self, out: torch.Tensor) -> None:
        """Write 1 for every masked rank, else 0, into int32 ``[N]``."""
        raise NotImplementedError

    def clean_mask(self) -> None:
        """Take every rank in again. Local."""
        raise NotImplementedError

    def local_tensor(self, num_bytes: int) -> torch.Tensor | None:
        """As `NormalBackend.local_tensor`."""
        return None

    @abstractmethod
    def abort(self) -> None:
        """As `NormalBackend.abort`."""

    def reset(self) -> None:
        """As `NormalBackend.reset`."""
        from .errors import BufferStateError

        raise BufferStateError(f"{type(self).__name__} cannot be reset. Destroy the buffer and build a new one.")

    @abstractmethod
    def destroy(self) -> None:
        """As `NormalBackend.destroy`."""


# --- the entry point ------------------------------------------------------------------------------------------------


@dataclass(frozen=True, kw_only=True)
class Opened:
    """What `Backend.open` gives: one object per mode that was asked for."""

    normal: NormalBackend | None = None
    low_latency: LowLatencyBackend | None = None


@dataclass(frozen=True, kw_only=True)
class RequestedModes:
    """The modes that a buffer wants from this backend."""

    modes: frozenset[Mode] = field(default_factory=frozenset)

    def __contains__(self, mode: Mode) -> bool:
        return mode in self.modes


class Backend(ABC):
    """What the entry point names: a class without state that says what it can do and opens buffers."""

    name: ClassVar[str]
    capabilities: ClassVar[Capabilities]

    @classmethod
    @abstractmethod
    def probe(cls, environment: Environment) -> list[Obstacle]:
        """Everything that keeps this backend from serving here; empty when it can.

        Creates no CUDA context, needs no group, takes well under a second, and never raises.
        """

    @classmethod
    def is_sm90_compiled(cls) -> bool:
        """Whether this backend has kernels built with SM90 features. Touches no CUDA state."""
        return False

    @classmethod
    @abstractmethod
    def open(cls, facts: GroupFacts, options: BufferOptions, modes: RequestedModes) -> Opened:
        """Reserve everything for one buffer. Collective; all ranks pass the same options and modes.

        Raises `BackendUnavailableError` on every rank if any rank could not do its part, within
        ``options.timeout_s``.
        """
