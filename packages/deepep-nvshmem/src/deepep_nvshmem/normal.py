"""Normal mode over NVLink: allocates outputs, starts the kernels, waits for counts, words the errors.

``T`` tokens here, ``K`` choices, ``H`` hidden, ``S`` scales, ``N`` ranks, ``E`` experts, ``R`` rows received here.
"""

from __future__ import annotations

import contextlib
import itertools
from collections.abc import Callable, Iterator, Mapping
from typing import Any, ClassVar

import torch

from deep_ep.backend import (
    BufferOptions,
    CombineRequest,
    CombineResult,
    DispatchLayout,
    DispatchRequest,
    DispatchResult,
    GroupFacts,
    NormalBackend,
    Operation,
)
from deep_ep.errors import ArgumentError, BufferStateError, DeepEPError, PeersDisagreeError, PeerTimeoutError
from deep_ep.events import StreamOrder, use_stream
from deep_ep.handles import IntranodeHandle
from deep_ep.headers import CallHeader, dtype_code, judge

from .arena import SymmetricArena
from .backend import load_extension
from .faults import HARMLESS, exception_for
from .outputs import Outputs, least_rows, size_class
from .push_limit import measure_push_limit

MAX_LOCAL_EXPERTS = 1024
NUM_STAGING_BYTES = 64 << 20
# On four H200s these many are within 1 % of the best (docs/benchmarks.md). A relay gains from every further SM.
_ENOUGH_SMS_TO_DISPATCH, _ENOUGH_SMS_TO_PULL = 12, 16
_REFUSED = 1
_INT_BYTES = 4
_HEADER_ERRORS = ("mismatch", "bad_count")  # every rank sees these alike, and nothing has moved


class NvlinkNormal(NormalBackend):
    """One buffer's normal mode on the backend ``nvlink``."""

    orders_output_stream: ClassVar[bool] = True

    def __init__(self, facts: GroupFacts, options: BufferOptions) -> None:
        self._facts = facts
        self._timeout_s = options.timeout_s
        # The kernel has its own deadline and reports who is missing; the host waits a little longer to hear it.
        self._host_timeout_s = options.timeout_s * 1.25 + 5
        self._extension = load_extension()
        runtime_class = self._extension.Runtime
        num_window_bytes = runtime_class.window_bytes(
            num_ranks=facts.num_ranks, max_local_experts=MAX_LOCAL_EXPERTS, num_staging_bytes=NUM_STAGING_BYTES
        )
        self._arena = SymmetricArena(
            self._extension,
            facts,
            num_window_bytes=num_window_bytes,
            num_heap_bytes=options.symmetric_heap_bytes,
            timeout_s=options.timeout_s,
        )
        self._runtime: Any = runtime_class(
            rank=facts.rank,
            num_ranks=facts.num_ranks,
            device=facts.device.index,
            arena_ptrs=self._arena.arena_ptrs,
            num_arena_bytes=self._arena.num_bytes,
            max_local_experts=MAX_LOCAL_EXPERTS,
            num_staging_bytes=NUM_STAGING_BYTES,
        )
        self._runtime.set_timeout_ns(int(options.timeout_s * 1e9))
        self._stream = torch.cuda.Stream(facts.device, priority=-1)
        self._handle = self._stream.cuda_stream
        self._tickets = itertools.count(1)
        self._num_calls = 0
        self._placement: dict[str, str] = {}
        self._broken = ""
        self._capacity = 1  # of the last dispatch that had to ask for its row count
        self._order = StreamOrder()
        self._scratch: torch.Tensor | None = None  # made when somebody asks for it; no kernel uses it
        # Peers may store to this arena as soon as they leave the constructor: it has to be zeroed everywhere first.
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
        num_ranks, device = self._facts.num_ranks, topk_idx.device
        _on_cuda(topk_idx, "get_dispatch_layout")
        runtime = self._alive("get_dispatch_layout")
        counts = torch.empty(num_ranks + num_experts, dtype=torch.int32, device=device)
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
            num_tokens_per_expert=address + num_ranks * _INT_BYTES,
            is_token_in_rank=is_token_in_rank.data_ptr(),
            num_bad_indices=0,
            stream=self._handle,
        )
        per_rank, per_expert = counts.split_with_sizes((num_ranks, num_experts))
        return DispatchLayout(
            num_tokens_per_rank=per_rank,
            num_tokens_per_rdma_rank=None,
            num_tokens_per_expert=per_expert,
            is_token_in_rank=is_token_in_rank,
            is_on_output_stream=output_stream is not None,
        )

    def dispatch(self, request: DispatchRequest) -> DispatchResult:
        if request.handle is None:
            return self._fresh_dispatch(request)
        _on_cuda(request.x, "dispatch")
        runtime = self._alive("cached_dispatch")
        handle = IntranodeHandle.from_tuple(request.handle)
        num_recv = handle.num_recv_tokens
        outputs = self._outputs(request, size_class(max(num_recv, 1)), 0, with_source=False)
        self._launch_dispatch(
            runtime,
            request,
            outputs,
            num_experts=self._facts.num_ranks,
            rank_prefix=handle.rank_prefix_matrix.data_ptr(),
            send_head=handle.send_head.data_ptr(),
        )
        self._num_calls += 1
        outputs.cut(num_recv)
        return DispatchResult(
            recv_x=outputs.x, recv_scales=outputs.scales, is_on_output_stream=request.output_stream is not None
        )

    def _fresh_dispatch(self, request: DispatchRequest) -> DispatchResult:
        runtime = self._alive("dispatch")
        layout, waits = self._checked_layout(request), request.num_worst_tokens == 0
        num_ranks, num_tokens = self._facts.num_ranks, request.x.shape[0]
        num_experts = layout.num_tokens_per_expert.numel()
        num_topk = request.topk_idx.shape[1] if request.topk_idx is not None else 0
        # Blocks as large as the last call's are taken before the counts are known. Most often they are right again, and
        # then the launch follows the counts at once: from the counts to the launch the GPU idles.
        capacity = self._capacity if waits else size_class(request.num_worst_tokens)
        num_head, num_prefix = num_tokens * num_ranks, num_ranks * num_ranks
        numbers = torch.empty(num_head + num_prefix + num_ranks, dtype=torch.int32, device=request.x.device)
        outputs = self._outputs(request, capacity, num_topk, with_source=True)
        send_head = numbers.data_ptr()
        rank_prefix = send_head + num_head * _INT_BYTES
        sequence, self._num_calls = self._num_calls, self._num_calls + 1
        ticket = next(self._tickets) if waits else 0
        runtime.notify(
            fields=_fields(sequence, request),
            num_tokens=num_tokens,
            num_experts=num_experts,
            expert_alignment=request.expert_alignment,
            num_tokens_per_rank=layout.num_tokens_per_rank.data_ptr(),
            num_tokens_per_expert=layout.num_tokens_per_expert.data_ptr(),
            is_token_in_rank=layout.is_token_in_rank.data_ptr(),
            rank_prefix=rank_prefix,
            send_head=send_head,
            recv_tokens_per_expert=0,
            num_bad_indices=0,
            ticket=ticket,
            stream=self._handle,
            first_rows=rank_prefix + num_prefix * _INT_BYTES,
        )
        routing = {"num_experts": num_experts, "rank_prefix": rank_prefix, "send_head": send_head}
        num_recv, per_expert = request.num_worst_tokens, []
        is_launched = self._launch_dispatch(runtime, request, outputs, **routing, ticket=ticket)
        if waits:
            counts = runtime.wait_counts(ticket, 0.0)  # if they came, they came before the launch
            if not is_launched:
                try:
                    self._judge(runtime, counts, lambda: _header(sequence, request))
                except DeepEPError:
                    # The exchange may still be writing to memory that the caller's stream gets back now.
                    if request.output_stream is not None:
                        self._order.wait(request.output_stream, self._stream)
                    raise
                capacity = size_class(max(counts.num_recv_tokens, 1))
                outputs = self._outputs(request, capacity, num_topk, with_source=True)
                self._launch_dispatch(runtime, request, outputs, **routing)
            self._capacity = capacity
            num_recv, per_expert = counts.num_recv_tokens, counts.num_recv_tokens_per_expert
        # The GPU has its work; everything below takes place meanwhile.
        outputs.cut(num_recv)
        assert outputs.src_idx is not None
        handle = IntranodeHandle(
            rank_prefix_matrix=numbers.as_strided((num_ranks, num_ranks), (num_ranks, 1), num_head),
            channel_prefix_matrix=layout.num_tokens_per_rank.view(num_ranks, 1),
            recv_channel_prefix_matrix=numbers.as_strided((num_ranks, 1), (1, 1), num_head + num_prefix),
            recv_src_idx=outputs.src_idx,
            is_token_in_rank=layout.is_token_in_rank,
            send_head=numbers.as_strided((num_tokens, num_ranks), (num_ranks, 1)),
        )
        return DispatchResult(
            recv_x=outputs.x,
            recv_scales=outputs.scales,
            recv_topk_idx=outputs.topk_idx,
            recv_topk_weights=outputs.topk_weights,
            num_recv_tokens_per_expert=per_expert,
            handle=handle.to_tuple(),
            is_on_output_stream=request.output_stream is not None,
        )

    def _checked_layout(self, request: DispatchRequest) -> DispatchLayout:
        """The layout of a fresh dispatch that this backend can serve; anything else is refused on every rank."""
        try:
            _on_cuda(request.x, "dispatch")
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

    def _launch_dispatch(
        self,
        runtime: Any,
        request: DispatchRequest,
        outputs: Outputs,
        *,
        num_experts: int,
        rank_prefix: int,
        send_head: int,
        ticket: int = 0,
    ) -> bool:
        """Launch the kernel; with a ticket, after the counts have come, and only if ``outputs`` are right for them."""
        x, scales, topk_idx = request.x, request.scales, request.topk_idx
        num_tokens, hidden = x.shape
        how = runtime.dispatch(
            x=x.data_ptr(),
            num_row_bytes=hidden * x.element_size(),
            scales=_address(scales),
            num_scales=scales.shape[1] if scales is not None else 0,
            scales_stride_token=scales.stride(0) if scales is not None else 0,
            scales_stride_col=scales.stride(1) if scales is not None else 0,
            topk_idx=_address(topk_idx),
            topk_idx_bits=topk_idx.element_size() * 8 if topk_idx is not None else 64,
            topk_weights=_address(request.topk_weights),
            num_tokens=num_tokens,
            num_topk=topk_idx.shape[1] if topk_idx is not None else 0,
            num_experts=num_experts,
            rank_prefix=rank_prefix,
            send_head=send_head,
            recv_x=outputs.x.data_ptr(),
            recv_scales=_address(outputs.scales),
            recv_topk_idx=_address(outputs.topk_idx),
            recv_topk_weights=_address(outputs.topk_weights),
            recv_src_idx=_address(outputs.src_idx),
            has_src_idx=outputs.src_idx is not None,
            capacity=request.num_worst_tokens or outputs.capacity,
            fill_unused=request.num_worst_tokens > 0,
            num_sms=_num_sms(request, _ENOUGH_SMS_TO_DISPATCH),
            stream=self._handle,
            ticket=ticket,
            least_rows=least_rows(outputs.capacity),
            timeout_s=self._host_timeout_s,
        )
        if how is None:
            return False
        self._placement = {"recv_x": "in place" if how == "in_place" else how}
        return True

    def combine(self, request: CombineRequest) -> CombineResult:
        _on_cuda(request.x, "combine")
        runtime = self._alive("combine")
        handle = IntranodeHandle.from_tuple(request.handle)
        weights, device = request.topk_weights, request.x.device
        num_topk = weights.shape[1] if weights is not None else 0
        combined_weights: torch.Tensor | None = None
        combined = torch.empty((handle.num_tokens, request.x.shape[1]), dtype=torch.bfloat16, device=device)
        if weights is not None:
            combined_weights = torch.empty((handle.num_tokens, num_topk), dtype=torch.float32, device=device)
        self._follow(request.output_stream)
        relay, weights = self._relay(runtime, request)
        biases = [bias.data_ptr() for bias in request.biases] + [0, 0]
        how = runtime.combine(
            y=request.x.data_ptr(),
            num_recv_tokens=request.x.shape[0],
            num_row_bytes=request.x.shape[1] * 2,
            topk_weights=_address(weights),
            num_topk=num_topk,
            bias_0=biases[0],
            bias_1=biases[1],
            rank_prefix=handle.rank_prefix_matrix.data_ptr(),
            send_head=handle.send_head.data_ptr(),
            num_tokens=handle.num_tokens,
            out=combined.data_ptr(),
            out_topk_weights=_address(combined_weights),
            num_sms=_num_sms(request, _ENOUGH_SMS_TO_PULL if relay is None else request.num_sms),
            stream=self._handle,
            relay=_address(relay),
        )
        self._num_calls += 1
        self._placement = {"x": "pulled in place" if how == "pull" else how}
        return CombineResult(
            combined_x=combined,
            combined_topk_weights=combined_weights,
            is_on_output_stream=request.output_stream is not None,
        )

    def _relay(self, runtime: Any, request: CombineRequest) -> tuple[torch.Tensor | None, torch.Tensor | None]:
        """Room in symmetric memory for expert outputs that peers cannot reach, and weights that they can.

        ``None`` for the room where none is needed or left: rows then go through the staging window. Both live on
        the communication stream and may be dropped as soon as the kernel is launched.
        """
        x, weights = request.x, request.topk_weights
        if x.shape[0] == 0 or self._facts.num_ranks == 1 or runtime.is_symmetric(x.data_ptr(), x.numel() * 2):
            return None, weights
        try:
            with use_stream(self._stream), self._arena.allocate_here():
                relay = torch.empty((size_class(x.shape[0]), x.shape[1]), dtype=x.dtype, device=x.device)
                if weights is not None:
                    weights = weights.clone()
        except torch.OutOfMemoryError:
            return None, request.topk_weights
        # In a captured graph torch may allocate from a pool of its own.
        is_reachable = runtime.is_symmetric(relay.data_ptr(), relay.numel() * 2)
        return (relay, weights) if is_reachable else (None, request.topk_weights)

    def push_limit_gbps(self, num_sms: int) -> float | None:
        return measure_push_limit(self._extension, self._facts, self._arena, num_sms=num_sms, timeout_s=self._timeout_s)

    # --- memory -----------------------------------------------------------------------------------------------------

    def _outputs(self, request: DispatchRequest, capacity: int, num_topk: int, *, with_source: bool) -> Outputs:
        """Blocks of ``capacity`` rows, in symmetric memory if they fit, else anywhere.

        Rows that land elsewhere come through the staging window.
        """
        try:
            with self._arena.allocate_here():
                outputs = Outputs.allocate(request, capacity, num_topk, with_source=with_source)
        except torch.OutOfMemoryError:
            outputs = Outputs.allocate(request, capacity, num_topk, with_source=with_source)
        self._follow(request.output_stream)
        return outputs

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
        error = exception_for(record)
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

    def _refuse_and_raise(self, reason: str) -> None:
        self.refuse("dispatch", reason)
        raise ArgumentError(f"dispatch: {reason}")

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
        channel.all_agree(True, phase="reset", timeout_s=self._timeout_s)
        runtime.reset(stream=self._stream.cuda_stream)
        runtime.clear_abort()
        runtime.clear_error()
        self._stream.synchronize()
        self._broken, self._num_calls = "", 0
        channel.all_agree(True, phase="reset", timeout_s=self._timeout_s)

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


def _fields(sequence: int, request: DispatchRequest) -> list[int]:
    """What ranks compare on the device, as non-negative 32-bit numbers; `_header` says the same at length."""
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


def _header(sequence: int, request: DispatchRequest) -> CallHeader:
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


def _num_sms(request: DispatchRequest | CombineRequest, enough: int) -> int:
    """The user's number, or what is enough if the number is only a ceiling."""
    return request.num_sms if request.num_sms_is_exact else min(request.num_sms, enough)


def _address(tensor: torch.Tensor | None) -> int:
    return 0 if tensor is None else tensor.data_ptr()


def _on_cuda(tensor: torch.Tensor, call: str) -> None:
    if not tensor.is_cuda:
        raise ArgumentError(
            f"{call}: tensors are on {tensor.device}; backend 'nvlink' needs CUDA tensors. Move them, or "
            "build the buffer "
            "with backend='reference'."
        )
