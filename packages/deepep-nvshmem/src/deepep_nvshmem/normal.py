"""Normal mode over NVLink: allocates outputs, starts the kernels, waits for counts, words the errors.

``T`` tokens here, ``K`` choices, ``H`` hidden, ``S`` scales, ``N`` ranks, ``E`` experts, ``R`` rows received here.
"""

from __future__ import annotations

import contextlib
import itertools
import statistics
import struct
from collections.abc import Callable, Iterator, Mapping
from typing import Any, NamedTuple

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
from deep_ep.events import use_stream
from deep_ep.handles import IntranodeHandle
from deep_ep.headers import CallHeader, dtype_code, judge

from .arena import SymmetricArena
from .backend import load_extension

MAX_LOCAL_EXPERTS = 1024
NUM_STAGING_BYTES = 64 << 20
# On four H200s these many are within 1 % of the best (docs/benchmarks.md). A relay gains from every further SM.
_ENOUGH_SMS_TO_DISPATCH, _ENOUGH_SMS_TO_PULL = 12, 16
_REFUSED = 1
_HARMLESS_ERRORS = ("mismatch", "bad_count", "layout_mismatch", "overflow")  # nothing was written that should not be
_HEADER_ERRORS = ("mismatch", "bad_count")  # every rank sees these alike, and nothing has moved
_OFFSET, _SECONDS = struct.Struct("<q"), struct.Struct("<d")
# What the push limit is measured with: large enough that launches and tails do not count, small enough for the heap.
_LIMIT_ROWS, _LIMIT_ROW_BYTES, _LIMIT_LAUNCHES, _LIMIT_REPETITIONS = 4096, 7168, 10, 5
_SIZE_CLASSES_PER_DOUBLING = 8


class _Outputs(NamedTuple):
    """What a dispatch writes: blocks of ``capacity`` rows, or what is left of them after `first_rows`."""

    capacity: int
    x: torch.Tensor | None
    scales: torch.Tensor | None
    topk_idx: torch.Tensor | None
    topk_weights: torch.Tensor | None
    src_idx: torch.Tensor | None

    def first_rows(self, num_rows: int) -> _Outputs:
        """The same memory, cut to ``num_rows`` rows."""
        return _Outputs(num_rows, *(t[:num_rows] if t is not None else None for t in self[1:]))


class NvlinkNormal(NormalBackend):
    """One buffer's normal mode on the backend ``nvlink``."""

    def __init__(self, facts: GroupFacts, options: BufferOptions) -> None:
        self._facts = facts
        self._timeout_s = options.timeout_s
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
        self._tickets = itertools.count(1)
        self._num_calls = 0
        self._placement: dict[str, str] = {}
        self._broken = ""
        self._last_num_recv = 0
        self._scratch: torch.Tensor | None = None  # made when somebody asks for it; no kernel uses it
        # Peers may store to this arena as soon as they leave the constructor: it has to be zeroed everywhere first.
        facts.channel.all_agree(True, phase="construction", timeout_s=options.timeout_s)

    # --- calls ------------------------------------------------------------------------------------------------------

    def _current(self) -> int:
        """Handle of the stream to launch on."""
        return int(torch.cuda.current_stream(self._facts.device.index).cuda_stream)

    @property
    def comm_stream(self) -> torch.cuda.Stream:
        return self._stream

    def layout(self, topk_idx: torch.Tensor, num_experts: int) -> DispatchLayout:
        num_tokens, num_topk = topk_idx.shape
        num_ranks, device = self._facts.num_ranks, topk_idx.device
        _on_cuda(topk_idx, "get_dispatch_layout")
        counts = torch.empty(num_ranks + num_experts, dtype=torch.int32, device=device)
        is_token_in_rank = torch.empty((num_tokens, num_ranks), dtype=torch.bool, device=device)
        per_rank, per_expert = counts[:num_ranks], counts[num_ranks:]
        self._alive("get_dispatch_layout").layout(
            topk_idx=topk_idx.data_ptr(),
            topk_idx_bits=topk_idx.element_size() * 8,
            num_tokens=num_tokens,
            num_topk=num_topk,
            num_experts=num_experts,
            num_tokens_per_rank=per_rank.data_ptr(),
            num_tokens_per_expert=per_expert.data_ptr(),
            is_token_in_rank=is_token_in_rank.data_ptr(),
            num_bad_indices=0,
            stream=self._current(),
        )
        return DispatchLayout(
            num_tokens_per_rank=per_rank,
            num_tokens_per_rdma_rank=None,
            num_tokens_per_expert=per_expert,
            is_token_in_rank=is_token_in_rank,
        )

    def dispatch(self, request: DispatchRequest) -> DispatchResult:
        if request.handle is None:
            return self._fresh_dispatch(request)
        _on_cuda(request.x, "dispatch")
        runtime = self._alive("cached_dispatch")
        handle = IntranodeHandle.from_tuple(request.handle)
        with _allocating_on(request.output_stream):
            outputs = self._outputs(request, handle.num_recv_tokens, 0, with_source=False)
        self._launch_dispatch(
            runtime,
            request,
            outputs,
            num_experts=self._facts.num_ranks,
            rank_prefix=handle.rank_prefix_matrix,
            send_head=handle.send_head,
        )
        self._num_calls += 1
        outputs = outputs.first_rows(handle.num_recv_tokens)
        assert outputs.x is not None
        return DispatchResult(
            recv_x=outputs.x, recv_scales=outputs.scales, is_on_output_stream=request.output_stream is not None
        )

    def _fresh_dispatch(self, request: DispatchRequest) -> DispatchResult:
        runtime = self._alive("dispatch")
        try:
            _on_cuda(request.x, "dispatch")
        except ArgumentError as error:
            self.refuse("dispatch", str(error))
            raise
        layout = request.layout
        assert layout is not None
        num_ranks, device = self._facts.num_ranks, request.x.device
        num_tokens = request.x.shape[0]
        num_experts = layout.num_tokens_per_expert.numel()
        num_local = num_experts // num_ranks
        if num_local > MAX_LOCAL_EXPERTS:
            self._refuse_and_raise(f"num_experts is {num_experts}; at most {MAX_LOCAL_EXPERTS} experts per rank.")
        waits = request.num_worst_tokens == 0
        if waits and torch.cuda.is_current_stream_capturing():
            self._refuse_and_raise(
                "a CUDA graph is being captured; pass num_worst_tokens, so that the host need not wait."
            )
        num_topk = request.topk_idx.shape[1] if request.topk_idx is not None else 0
        # Blocks of the size that the last call needed are taken before the counts are known: most often they are right
        # again, and between the counts and the launch the GPU idles.
        guess = self._last_num_recv if waits else request.num_worst_tokens
        with _allocating_on(request.output_stream):
            numbers = torch.empty(num_ranks * (num_ranks + 1 + num_tokens), dtype=torch.int32, device=device)
            outputs = self._outputs(request, guess, num_topk, with_source=True)
        heads, prefixes = numbers.split((num_tokens * num_ranks, num_ranks * (num_ranks + 1)))
        send_head = heads.view(num_tokens, num_ranks)
        rank_prefix = prefixes[: num_ranks * num_ranks].view(num_ranks, num_ranks)
        first_rows = prefixes[num_ranks * num_ranks :].view(num_ranks, 1)
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
            rank_prefix=rank_prefix.data_ptr(),
            send_head=send_head.data_ptr(),
            recv_tokens_per_expert=0,
            num_bad_indices=0,
            ticket=ticket,
            stream=self._current(),
            first_rows=first_rows.data_ptr(),
        )
        counts = self._wait_counts(runtime, ticket, lambda: _header(sequence, request)) if waits else None
        num_recv = request.num_worst_tokens
        if counts is not None:
            self._last_num_recv = num_recv = counts.num_recv_tokens
            if num_recv > outputs.capacity or _size_class(max(num_recv, 1)) < outputs.capacity:
                with _allocating_on(request.output_stream):
                    outputs = self._outputs(request, num_recv, num_topk, with_source=True)
        self._launch_dispatch(
            runtime,
            request,
            outputs if waits else outputs.first_rows(num_recv),
            num_experts=num_experts,
            rank_prefix=rank_prefix,
            send_head=send_head,
            fill_unused=not waits,
        )
        outputs = outputs.first_rows(num_recv)
        assert outputs.x is not None and outputs.src_idx is not None
        handle = IntranodeHandle(
            rank_prefix_matrix=rank_prefix,
            channel_prefix_matrix=layout.num_tokens_per_rank.view(num_ranks, 1),
            recv_channel_prefix_matrix=first_rows,
            recv_src_idx=outputs.src_idx,
            is_token_in_rank=layout.is_token_in_rank,
            send_head=send_head,
        )
        return DispatchResult(
            recv_x=outputs.x,
            recv_scales=outputs.scales,
            recv_topk_idx=outputs.topk_idx,
            recv_topk_weights=outputs.topk_weights,
            num_recv_tokens_per_expert=list(counts.num_recv_tokens_per_expert) if counts is not None else [],
            handle=handle.to_tuple(),
            is_on_output_stream=request.output_stream is not None,
        )

    def _launch_dispatch(
        self,
        runtime: Any,
        request: DispatchRequest,
        outputs: _Outputs,
        *,
        num_experts: int,
        rank_prefix: torch.Tensor,
        send_head: torch.Tensor,
        fill_unused: bool = False,
    ) -> None:
        x, scales, topk_idx = request.x, request.scales, request.topk_idx
        how = runtime.dispatch(
            x=x.data_ptr(),
            num_row_bytes=x.shape[1] * x.element_size(),
            scales=_address(scales),
            num_scales=scales.shape[1] if scales is not None else 0,
            scales_stride_token=scales.stride(0) if scales is not None else 0,
            scales_stride_col=scales.stride(1) if scales is not None else 0,
            topk_idx=_address(topk_idx),
            topk_idx_bits=topk_idx.element_size() * 8 if topk_idx is not None else 64,
            topk_weights=_address(request.topk_weights),
            num_tokens=x.shape[0],
            num_topk=topk_idx.shape[1] if topk_idx is not None else 0,
            num_experts=num_experts,
            rank_prefix=rank_prefix.data_ptr(),
            send_head=send_head.data_ptr(),
            recv_x=_address(outputs.x),
            recv_scales=_address(outputs.scales),
            recv_topk_idx=_address(outputs.topk_idx),
            recv_topk_weights=_address(outputs.topk_weights),
            recv_src_idx=_address(outputs.src_idx),
            has_src_idx=outputs.src_idx is not None,
            capacity=outputs.capacity,
            fill_unused=fill_unused,
            num_sms=_num_sms(request, _ENOUGH_SMS_TO_DISPATCH),
            stream=self._current(),
        )
        self._placement = {"recv_x": "in place" if how == "in_place" else how}

    def combine(self, request: CombineRequest) -> CombineResult:
        _on_cuda(request.x, "combine")
        runtime = self._alive("combine")
        handle = IntranodeHandle.from_tuple(request.handle)
        weights, device = request.topk_weights, request.x.device
        num_topk = weights.shape[1] if weights is not None else 0
        combined_weights: torch.Tensor | None = None
        with _allocating_on(request.output_stream):
            combined = torch.empty((handle.num_tokens, request.x.shape[1]), dtype=torch.bfloat16, device=device)
            if weights is not None:
                combined_weights = torch.empty((handle.num_tokens, num_topk), dtype=torch.float32, device=device)
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
            stream=self._current(),
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
            with self._arena.allocate_here():
                relay = torch.empty((_size_class(x.shape[0]), x.shape[1]), dtype=x.dtype, device=x.device)
                if weights is not None:
                    weights = weights.clone()
        except torch.OutOfMemoryError:
            return None, request.topk_weights
        # In a captured graph torch may allocate from a pool of its own.
        is_reachable = runtime.is_symmetric(relay.data_ptr(), relay.numel() * 2)
        return (relay, weights) if is_reachable else (None, request.topk_weights)

    def push_limit_gbps(self, num_sms: int) -> float | None:
        if self._facts.num_ranks == 1:
            return None
        num_ranks, channel, device = self._facts.num_ranks, self._facts.channel, self._facts.device
        num_bytes = _LIMIT_ROWS * _LIMIT_ROW_BYTES
        with self._arena.allocate_here():
            landing = torch.empty(num_ranks * num_bytes, dtype=torch.uint8, device=device)
        source = torch.randint(0, 256, ((num_ranks - 1) * num_bytes,), dtype=torch.uint8, device=device)
        own_offset = landing.data_ptr() - self._arena.arena_ptrs[self._facts.rank]
        record = _OFFSET.pack(own_offset)
        offsets = channel.all_gather(record, phase="push limit", timeout_s=self._timeout_s)
        targets = [p + _OFFSET.unpack(o)[0] for p, o in zip(self._arena.arena_ptrs, offsets, strict=True)]
        seconds: list[float] = []
        for _ in range(_LIMIT_REPETITIONS):
            torch.cuda.synchronize()
            channel.all_agree(True, phase="push limit", timeout_s=self._timeout_s)
            begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            begin.record()
            for _ in range(_LIMIT_LAUNCHES):
                self._extension.fabric_limit(
                    direction="push",
                    rank=self._facts.rank,
                    arena_ptrs=targets,
                    local=source.data_ptr(),
                    num_rows=_LIMIT_ROWS,
                    num_row_bytes=_LIMIT_ROW_BYTES,
                    num_sms=num_sms,
                    stream=self._current(),
                )
            end.record()
            end.synchronize()
            own = _SECONDS.pack(begin.elapsed_time(end) * 1e-3 / _LIMIT_LAUNCHES)
            everybody = channel.all_gather(own, phase="push limit", timeout_s=self._timeout_s)
            seconds.append(max(_SECONDS.unpack(s)[0] for s in everybody))
        return (num_ranks - 1) * num_bytes / statistics.median(seconds) / 1e9

    # --- memory -----------------------------------------------------------------------------------------------------

    def _outputs(self, request: DispatchRequest, num_rows: int, num_topk: int, *, with_source: bool) -> _Outputs:
        """Blocks for at least ``num_rows`` rows, in symmetric memory if they fit, else anywhere.

        Rows that land elsewhere come through the staging window. Row counts differ from call to call; rounding them up
        to a few size classes lets torch's allocator reuse blocks, where exact sizes would shatter the heap.
        """
        x, scales = request.x, request.scales
        capacity = _size_class(max(num_rows, 1))
        shapes: list[tuple[tuple[int, ...], torch.dtype] | None] = [
            ((capacity, x.shape[1]), x.dtype),
            ((capacity, scales.shape[1]), scales.dtype) if scales is not None else None,
            ((capacity, num_topk), torch.int64) if num_topk else None,
            ((capacity, num_topk), torch.float32) if num_topk else None,
            ((capacity,), torch.int32) if with_source else None,
        ]

        def allocate() -> list[torch.Tensor | None]:
            return [torch.empty(s[0], dtype=s[1], device=x.device) if s is not None else None for s in shapes]

        try:
            with self._arena.allocate_here():
                blocks = allocate()
        except torch.OutOfMemoryError:
            blocks = allocate()
        return _Outputs(capacity, *blocks)

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
        elapsed_s = record.elapsed_ns / 1e9
        where = f"{record.op}: rank {record.rank}"
        what = (
            f"{record.phase}, epoch {record.epoch}: saw {record.seen}, expected {record.expected} after "
            f"{elapsed_s:.3f} s"
        )
        error: DeepEPError
        if record.kind == "timeout":
            error = PeerTimeoutError(
                f"{where} waited {elapsed_s:.1f} s for rank {record.peer} ({what}). Either rank {record.peer} is late "
                "(raise the deadline: DEEPEP_TIMEOUT_S), or it made no such call, or it is gone.",
                ranks=[record.peer],
                phase=record.phase,
                waited_s=elapsed_s,
            )
        elif record.kind == "overflow":
            error = ArgumentError(
                f"{where}: more rows came from rank {record.peer} than the output holds ({what}). "
                "Pass a larger num_worst_tokens."
            )
        elif record.kind == "aborted":
            error = BufferStateError(f"{where}: aborted while it waited for rank {record.peer} ({what}).")
        else:
            error = PeersDisagreeError(
                f"{where} and rank {record.peer} disagree: {record.kind} ({what}).",
                ranks=[record.peer],
                phase=record.phase,
            )
        if record.kind in _HARMLESS_ERRORS:
            self._runtime.clear_error()
        else:
            self._broken = str(error)
        return error

    def _wait_counts(self, runtime: Any, ticket: int, header: Callable[[], CallHeader]) -> Any:
        # The kernel has its own deadline and reports who is missing; the host waits a little longer to hear it.
        counts = runtime.wait_counts(ticket, self._timeout_s * 1.25 + 5)
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
        return counts

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
        header = CallHeader(operation="dispatch", sequence=self._num_calls, refusal=reason)
        self._num_calls += 1
        with use_stream(self._stream):
            ticket = next(self._tickets)
            self._runtime.refuse(
                fields=[],
                num_experts=self._facts.num_ranks,
                reason=_REFUSED,
                ticket=ticket,
                stream=self._current(),
            )
            # What the peers say to this has no place in the caller's own error.
            with contextlib.suppress(DeepEPError):
                self._wait_counts(self._runtime, ticket, lambda: header)

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


@contextlib.contextmanager
def _allocating_on(stream: torch.cuda.Stream | None) -> Iterator[None]:
    """Allocate inside on ``stream``; the current stream then waits for what may still use the memory there."""
    if stream is None:
        yield
        return
    current = torch.cuda.current_stream(stream.device_index)
    with use_stream(stream):
        yield
    current.wait_stream(stream)


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


def _size_class(num_rows: int) -> int:
    """``num_rows`` rounded up so that there are only a few sizes per doubling."""
    step = 1 << max(0, (num_rows - 1).bit_length() - _SIZE_CLASSES_PER_DOUBLING.bit_length())
    return -(-num_rows // step) * step
