"""What the normal modes of both backends share: streams, layouts, the exchange that opens a call, and faults.

``T`` tokens here, ``K`` choices, ``H`` hidden, ``S`` scales, ``N`` ranks, ``D`` nodes, ``E`` experts, ``R`` rows
received here.
"""

from __future__ import annotations

import contextlib
import itertools
from abc import abstractmethod
from collections.abc import Callable, Iterator, Mapping
from typing import Any, ClassVar, NoReturn

import torch

from deep_ep.backend import (
    BufferOptions,
    CombineRequest,
    DispatchLayout,
    DispatchRequest,
    DispatchResult,
    GroupFacts,
    NormalBackend,
    Operation,
)
from deep_ep.errors import ArgumentError, BufferStateError, DeepEPError, PeersDisagreeError, PeerTimeoutError
from deep_ep.events import StreamOrder, use_stream
from deep_ep.headers import CallHeader, dtype_code, judge

from .arena import SymmetricArena
from .faults import HARMLESS, exception_for

MAX_LOCAL_EXPERTS = 1024
INT_BYTES = 4
_REFUSED = 1
_HEADER_ERRORS = ("mismatch", "bad_count")  # every rank sees these alike, and nothing has moved


class KernelNormal(NormalBackend):
    """Normal mode by the kernels of a native ``Runtime``.

    Attributes:
        name: of the backend.
    """

    orders_output_stream: ClassVar[bool] = True
    name: ClassVar[str]

    def __init__(self, facts: GroupFacts, options: BufferOptions, arena: SymmetricArena, runtime: Any) -> None:
        """Collective: returns when every rank's ``runtime`` has zeroed the memory that its peers write to."""
        self._facts = facts
        self._timeout_s = options.timeout_s
        # The kernel has its own deadline and reports who is missing; the host waits a little longer to hear it.
        self._host_timeout_s = options.timeout_s * 1.25 + 5
        self._arena = arena
        self._runtime: Any = runtime
        self._runtime.set_timeout_ns(int(options.timeout_s * 1e9))
        self._stream = torch.cuda.Stream(facts.device, priority=-1)
        self._handle = self._stream.cuda_stream
        self._tickets = itertools.count(1)
        self._num_calls = 0
        self._num_nodes = facts.num_nodes if facts.num_nodes > 1 else 0
        self._placement: dict[str, str] = {}
        self._broken = ""
        self._order = StreamOrder()
        self._scratch: torch.Tensor | None = None  # made when somebody asks for it; no kernel uses it
        facts.channel.all_agree(True, phase="construction", timeout_s=options.timeout_s)

    # --- calls ------------------------------------------------------------------------------------------------------

    def _follow(self, output_stream: torch.cuda.Stream | None) -> None:
        """Let this backend's stream wait for the one on which outputs were allocated just now, if it is another.

        What was freed there may still be in use there, up to the moment of allocation.
        """
        if output_stream is not None:
            self._order.wait(self._stream, output_stream)

    @property
    def comm_stream(self) -> torch.cuda.Stream:
        return self._stream

    def layout(
        self, topk_idx: torch.Tensor, num_experts: int, output_stream: torch.cuda.Stream | None = None
    ) -> DispatchLayout:
        num_tokens, num_topk = topk_idx.shape
        num_ranks, num_nodes, device = self._facts.num_ranks, self._num_nodes, topk_idx.device
        self._on_cuda(topk_idx, "get_dispatch_layout")
        runtime = self._alive("get_dispatch_layout")
        counts = torch.empty(num_ranks + num_nodes + num_experts, dtype=torch.int32, device=device)
        is_token_in_rank = torch.empty(num_tokens, num_ranks, dtype=torch.bool, device=device)
        self._follow(output_stream)
        address = counts.data_ptr()
        runtime.layout(
            topk_idx=topk_idx.data_ptr(),
            topk_idx_bits=topk_idx.element_size() * 8,
            num_tokens=num_tokens,
            num_topk=num_topk,
            num_experts=num_experts,
            num_tokens_per_rank=address,
            num_tokens_per_expert=address + (num_ranks + num_nodes) * INT_BYTES,
            is_token_in_rank=is_token_in_rank.data_ptr(),
            num_bad_indices=0,
            stream=self._handle,
            **({"num_tokens_per_node": address + num_ranks * INT_BYTES} if num_nodes else {}),
        )
        sizes = (num_ranks, num_nodes, num_experts) if num_nodes else (num_ranks, num_experts)
        per_rank, *per_node, per_expert = counts.split_with_sizes(sizes)
        return DispatchLayout(
            num_tokens_per_rank=per_rank,
            num_tokens_per_rdma_rank=per_node[0] if per_node else None,
            num_tokens_per_expert=per_expert,
            is_token_in_rank=is_token_in_rank,
            is_on_output_stream=output_stream is not None,
        )

    def dispatch(self, request: DispatchRequest) -> DispatchResult:
        return self._fresh_dispatch(request) if request.handle is None else self._cached_dispatch(request)

    @abstractmethod
    def _fresh_dispatch(self, request: DispatchRequest) -> DispatchResult:
        """Headers, counts and rows."""

    @abstractmethod
    def _cached_dispatch(self, request: DispatchRequest) -> DispatchResult:
        """Rows alone, by the routing of a handle."""

    def _checked_layout(self, request: DispatchRequest) -> DispatchLayout:
        """The layout of a fresh dispatch that this backend can serve; anything else is refused on every rank."""
        try:
            self._on_cuda(request.x, "dispatch")
        except ArgumentError as error:
            self.refuse("dispatch", str(error))
            raise
        layout = request.layout
        assert layout is not None
        num_experts = layout.num_tokens_per_expert.numel()
        if num_experts // self._facts.num_ranks > MAX_LOCAL_EXPERTS:
            self._refuse_and_raise(f"num_experts is {num_experts}; at most {MAX_LOCAL_EXPERTS} experts per rank.")
        if request.num_worst_tokens == 0 and torch.cuda.is_current_stream_capturing():
            self._refuse_and_raise(
                "a CUDA graph is being captured; pass num_worst_tokens, so that the host need not wait."
            )
        return layout

    # --- memory -----------------------------------------------------------------------------------------------------

    @contextlib.contextmanager
    def symmetric_memory(self) -> Iterator[None]:
        self._alive("symmetric_memory")
        with self._arena.allocate_here():
            yield

    def placement(self) -> Mapping[str, str]:
        return dict(self._placement)

    def local_tensor(self, num_bytes: int) -> torch.Tensor:
        if self._scratch is None or self._scratch.numel() < num_bytes:
            self._scratch = torch.zeros(num_bytes, dtype=torch.uint8, device=self._facts.device)
        return self._scratch

    # --- faults -----------------------------------------------------------------------------------------------------

    def _on_cuda(self, tensor: torch.Tensor, call: str) -> None:
        if not tensor.is_cuda:
            raise ArgumentError(
                f"{call}: tensors are on {tensor.device}; backend '{self.name}' needs CUDA tensors. Move them, or "
                "build the buffer with backend='reference'."
            )

    def _alive(self, call: str) -> Any:
        """The runtime, after raising what an earlier call's kernels reported."""
        if self._runtime is None:
            raise BufferStateError(f"{call}: this buffer was destroyed. Build a new one.")
        if self._broken:
            raise BufferStateError(f"{call}: this buffer failed before ({self._broken}). Call reset() on every rank.")
        record = self._runtime.error()
        if record is not None:
            raise self._failure(record)
        return self._runtime

    def _failure(self, record: Any) -> DeepEPError:
        """The exception for what a kernel reported; after a failed wait the buffer is unusable until `reset`."""
        error = exception_for(record, self._facts.ranks_per_node if self._num_nodes else None)
        if record.kind in HARMLESS:
            self._runtime.clear_error()
        else:
            self._broken = str(error)
        return error

    def _judge(self, runtime: Any, counts: Any, header: Callable[[], CallHeader]) -> None:
        """Raise what keeps the call from going on with these counts, or without them."""
        record = runtime.error()
        if record is not None and (record.op != "notify" or record.kind not in _HEADER_ERRORS):
            raise self._failure(record)
        if counts is None:
            self._broken = "no counts came"
            raise PeerTimeoutError(
                f"dispatch: rank {self._facts.rank} heard nothing of its own kernel within the deadline. The GPU may "
                "be busy with other work for longer than that; raise DEEPEP_TIMEOUT_S.",
                phase="counts",
                waited_s=self._timeout_s,
            )
        if record is not None or counts.mismatch_mask or counts.bad_count_mask:
            runtime.clear_error()
            self._explain(header())

    def _explain(self, header: CallHeader) -> None:
        """Some header differs, and every rank has seen that: exchange them in full, and raise what they call for."""
        records = self._facts.channel.all_gather(header.pack(), phase=header.operation, timeout_s=self._timeout_s)
        judge([CallHeader.unpack(record) for record in records])
        raise PeersDisagreeError(
            f"{header.operation}: ranks sent different headers or impossible counts, yet their arguments agree. "
            "num_tokens_per_rank or is_token_in_rank do not belong to this x.",
            phase=header.operation,
        )

    def _refuse_and_raise(self, reason: str, kind: type[DeepEPError] = ArgumentError) -> NoReturn:
        self.refuse("dispatch", reason)
        raise kind(f"dispatch: {reason}")

    def refuse(self, operation: Operation, reason: str) -> None:
        if operation != "dispatch" or self._runtime is None or self._broken:
            return
        with use_stream(self._stream):
            if torch.cuda.is_current_stream_capturing():
                return  # what is launched now is only recorded: no peer would hear it
        header = CallHeader(operation="dispatch", sequence=self._num_calls, refusal=reason)
        self._num_calls += 1
        ticket = next(self._tickets)
        self._runtime.refuse(
            fields=[], num_experts=self._facts.num_ranks, reason=_REFUSED, ticket=ticket, stream=self._handle
        )
        # What the peers say to this has no place in the caller's own error.
        with contextlib.suppress(DeepEPError):
            counts = self._runtime.wait_counts(ticket, self._host_timeout_s)
            self._judge(self._runtime, counts, lambda: header)

    def abort(self) -> None:
        if self._runtime is not None:
            self._runtime.abort()

    def reset(self) -> None:
        runtime, channel = self._runtime, self._facts.channel
        if runtime is None:
            raise BufferStateError("reset: this buffer was destroyed. Build a new one.")
        runtime.abort()
        self._stream.synchronize()
        self._settle()
        channel.all_agree(True, phase="reset", timeout_s=self._timeout_s)
        runtime.reset(stream=self._stream.cuda_stream)
        runtime.clear_abort()
        runtime.clear_error()
        self._stream.synchronize()
        self._broken, self._num_calls = "", 0
        channel.all_agree(True, phase="reset", timeout_s=self._timeout_s)

    def _settle(self) -> None:
        """Return when nothing that this rank's kernels have sent is under way any more. They have ended."""

    def destroy(self) -> None:
        runtime, self._runtime = self._runtime, None
        if runtime is None:
            return
        if self._broken:
            runtime.abort()
        # Kernels of this rank may still wait for peers; each such wait ends within its deadline.
        self._stream.synchronize()
        runtime.close()
        self._arena.close()
        self._scratch = None


def header_fields(sequence: int, request: DispatchRequest) -> list[int]:
    """What ranks compare on the device, as non-negative 32-bit numbers; `call_header` says the same at length."""
    x, scales = request.x, request.scales
    return [
        sequence & 0x7FFFFFFF,
        x.shape[1],
        dtype_code(x.dtype),
        scales.shape[1] if scales is not None else 0,
        dtype_code(scales.dtype) if scales is not None else 0,
        request.topk_idx.shape[1] if request.topk_idx is not None else 0,
        int(request.topk_weights is not None),
        request.expert_alignment,
        request.num_worst_tokens,
    ]


def call_header(sequence: int, request: DispatchRequest) -> CallHeader:
    """This rank's side of a fresh dispatch, for the exchange that explains a disagreement."""
    assert request.layout is not None
    scales = request.scales
    return CallHeader(
        operation="dispatch",
        sequence=sequence,
        hidden=request.x.shape[1],
        dtype=dtype_code(request.x.dtype),
        num_scales=scales.shape[1] if scales is not None else 0,
        scale_dtype=dtype_code(scales.dtype) if scales is not None else 0,
        num_experts=request.layout.num_tokens_per_expert.numel(),
        num_topk=request.topk_idx.shape[1] if request.topk_idx is not None else 0,
        has_weights=int(request.topk_weights is not None),
        expert_alignment=request.expert_alignment,
        num_worst_tokens=request.num_worst_tokens,
        num_tokens=request.x.shape[0],
    )


def sms_for(request: DispatchRequest | CombineRequest, enough: int) -> int:
    """The user's number, or what is enough if the number is only a ceiling."""
    return request.num_sms if request.num_sms_is_exact else min(request.num_sms, enough)


def address_of(tensor: torch.Tensor | None) -> int:
    return 0 if tensor is None else tensor.data_ptr()
