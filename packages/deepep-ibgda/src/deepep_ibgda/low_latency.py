"""Low-latency mode on the backend ``ibgda``: allocates outputs, starts the kernels, words the errors.

Symbols: ``T`` tokens of this rank, ``K`` choices per token, ``H`` hidden size, ``N`` ranks, ``E`` experts,
``L = E / N`` experts of one rank, ``X`` the most tokens a rank may send, ``M = N * X`` rows per local expert.
"""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable
from typing import Any, NamedTuple

import torch

from deep_ep.backend import (
    BufferOptions,
    GroupFacts,
    LowLatencyBackend,
    LowLatencyCombineRequest,
    LowLatencyCombineResult,
    LowLatencyDispatchRequest,
    LowLatencyDispatchResult,
    Operation,
)
from deep_ep.errors import ArgumentError, BufferStateError, DeepEPError
from deep_ep.handles import LowLatencyHandle
from deep_ep.outstanding import Outstanding, Receive

from .backend import load_extension
from .chain import Chain
from .faults import failure
from .reach import agree_on_reach
from .window import Window

logger = logging.getLogger("deep_ep")

# Zero-copy buffers are as large as expert outputs: two for two micro-batches, no more.
_MAX_COMBINE_BUFFERS = 2
_RING_SLOTS = 3  # of each kind of operation; the kernels' ring
_FP8_BLOCK, _SCALES_PER_INT32 = 128, 4
_INT32_BYTES = 4
_DISPATCH_OUTPUTS = ("recv_x", "recv_scales", "recv_count", "layout_range", "cumulative_stats", "wait_stats")
_COMBINE_OUTPUTS = ("out", "wait_stats")


class _Shape(NamedTuple):
    """What calls of one shape need."""

    window_bytes: int
    handle_words: int
    num_local_experts: int
    num_rows: int


class _Half(NamedTuple):
    """The receiving kernel of a split operation.

    Attributes:
        kernel: native call.
        touched: memory that it reads or writes, kept until it has been enqueued.
        arguments: all but phases and stream.
    """

    kernel: Callable[..., None]
    touched: tuple[torch.Tensor | None, ...]
    arguments: dict[str, Any]


class IbgdaLowLatency(LowLatencyBackend):
    """One buffer's low-latency mode. The host waits for nobody, except where a window has to grow."""

    def __init__(self, facts: GroupFacts, options: BufferOptions) -> None:
        """Collective. Raises `BackendUnavailableError` on every rank if any rank cannot do its part."""
        self._facts, self._options = facts, options
        extension = self._extension = load_extension()
        self._send, self._receive = int(extension.SEND), int(extension.RECEIVE)
        self._both = self._send | self._receive
        self._reach = agree_on_reach(extension, facts, options)
        # Windows that have become too small serve what was sent or captured in them; the last one serves new calls.
        self._windows: list[Window] = []
        self._add_window(self._reach.num_window_bytes)
        self._ticket_words = int(extension.Runtime.ticket_words(num_ranks=facts.num_ranks))
        self._num_sms = options.low_latency_sms or 0  # 0: as many as suit the shape
        self._stream = torch.cuda.Stream(facts.device, priority=-1)
        self._chain = Chain(extension, facts.device.index)
        self._outstanding = Outstanding()
        # By call: how many have begun, and the numbers of those that were sent and not yet received.
        self._num_sent = {"low_latency_dispatch": 0, "low_latency_combine": 0}
        self._unreceived: dict[str, list[int]] = {call: [] for call in self._num_sent}
        self._shapes: dict[tuple[int, int, int, int], _Shape] = {}
        self._combine_buffers: dict[int, torch.Tensor] = {}
        self._scratch: torch.Tensor | None = None  # made when somebody asks for it; no kernel uses it
        self._broken = ""
        self._generation = 0  # counts resets
        self._lock = threading.RLock()  # hooks run in any thread

    @property
    def comm_stream(self) -> torch.cuda.Stream:
        return self._stream

    # --- dispatch ---------------------------------------------------------------------------------------------------

    def dispatch(self, request: LowLatencyDispatchRequest) -> LowLatencyDispatchResult:
        where = "low_latency_dispatch"
        x, topk_idx, weights, device = request.x, request.topk_idx, request.topk_weights, request.x.device
        _on_cuda(x, where)
        self._begin(where)
        num_tokens, hidden = x.shape
        num_topk, max_tokens, num_experts = topk_idx.shape[1], request.max_tokens, request.num_experts
        shape = self._shape(where, max_tokens, hidden, num_experts, num_topk)
        runtime = self._window_for(where, shape).runtime
        num_local, num_rows = shape.num_local_experts, shape.num_rows
        use_fp8, use_ue8m0, split = request.use_fp8, request.use_ue8m0, request.split
        recv_x = torch.empty(
            (num_local, num_rows, hidden), dtype=torch.float8_e4m3fn if use_fp8 else torch.bfloat16, device=device
        )
        scales: torch.Tensor | None = None
        if use_fp8:
            num_scales = hidden // (_FP8_BLOCK * _SCALES_PER_INT32 if use_ue8m0 else _FP8_BLOCK)
            kind = torch.int32 if use_ue8m0 else torch.float32
            scales = torch.empty_strided(
                (num_local, num_rows, num_scales), (num_rows * num_scales, 1, num_rows), dtype=kind, device=device
            )
        recv_count = torch.empty(num_local, dtype=torch.int32, device=device)
        layout_range = torch.empty((num_local, self._facts.num_ranks), dtype=torch.int64, device=device)
        # src_info, and behind it what combine needs: whoever keeps the one keeps the other.
        memory = torch.empty(shape.handle_words, dtype=torch.int32, device=device)
        arguments: dict[str, Any] = {
            "x": x.data_ptr(),
            "topk_idx": topk_idx.data_ptr(),
            "topk_idx_bits": topk_idx.element_size() * 8,
            "topk_weights": _address(weights),
            "has_weights": weights is not None,
            "num_tokens": num_tokens,
            "hidden": hidden,
            "num_topk": num_topk,
            "max_tokens": max_tokens,
            "num_experts": num_experts,
            "use_fp8": use_fp8,
            "round_scale": request.round_scale,
            "use_ue8m0": use_ue8m0,
            "recv_x": recv_x.data_ptr(),
            "recv_scales": _address(scales),
            "recv_count": recv_count.data_ptr(),
            "layout_range": layout_range.data_ptr(),
            "handle": memory.data_ptr(),
            "cumulative_stats": _address(request.cumulative_local_expert_recv_stats),
            "wait_stats": _address(request.wait_recv_cost_stats),
            "num_sms": self._num_sms,
        }
        capture = self._launch(runtime.dispatch, arguments, phases=self._send if split else self._both)
        src_info = memory.as_strided((num_local, num_rows), (num_rows, 1))
        receive: Callable[[], None] | None = None
        if split:
            # All that the receiving kernel touches lives as long as somebody may start it.
            stats = (request.cumulative_local_expert_recv_stats, request.wait_recv_cost_stats)
            touched = (recv_x, scales, recv_count, layout_range, memory, *stats)
            later = {**arguments, "x": 0, "topk_idx": 0}
            receive = self._later(
                where,
                capture,
                _Half(runtime.dispatch, touched, later),
                _Half(runtime.dispatch, (memory,), later | dict.fromkeys(_DISPATCH_OUTPUTS, 0)),
            )
        return LowLatencyDispatchResult(
            recv_x=recv_x,
            recv_scales=scales,
            recv_count=recv_count,
            handle=(src_info, layout_range, max_tokens, hidden, num_experts),
            receive=receive,
        )

    # --- combine ----------------------------------------------------------------------------------------------------

    def combine(self, request: LowLatencyCombineRequest) -> LowLatencyCombineResult:
        where = "low_latency_combine"
        src_info, _, max_tokens, hidden, num_experts = request.handle
        topk_idx, weights, device = request.topk_idx, request.topk_weights, request.topk_idx.device
        _on_cuda(topk_idx, where)
        num_tokens, num_topk = topk_idx.shape
        shape = self._shape(where, max_tokens, hidden, num_experts, num_topk)
        memory = _memory_behind(src_info, shape.handle_words, num_topk)
        x = request.x if not request.zero_copy else self._written_rows(src_info)
        self._begin(where)
        runtime = self._window_for(where, shape).runtime
        out = request.out
        if out is None:
            out = torch.empty((num_tokens, hidden), dtype=torch.bfloat16, device=device)
        split = request.split
        ticket = torch.empty(self._ticket_words, dtype=torch.int32, device=device) if split else None
        arguments: dict[str, Any] = {
            "x": x.data_ptr(),
            "row_stride": x.stride(1),
            "topk_idx": topk_idx.data_ptr(),
            "topk_idx_bits": topk_idx.element_size() * 8,
            "topk_weights": weights.data_ptr(),
            "handle": memory,
            "ticket": _address(ticket),
            "num_tokens": num_tokens,
            "hidden": hidden,
            "num_topk": num_topk,
            "max_tokens": max_tokens,
            "num_experts": num_experts,
            "use_logfmt": request.use_logfmt,
            "out": out.data_ptr(),
            "wait_stats": _address(request.wait_recv_cost_stats),
            "num_sms": self._num_sms,
        }
        capture = self._launch(runtime.combine, arguments, phases=self._send if split else self._both)
        receive: Callable[[], None] | None = None
        if split:
            read = (topk_idx, weights, src_info, ticket)
            touched = (*read, out, request.wait_recv_cost_stats)
            later = {**arguments, "x": 0}
            receive = self._later(
                where,
                capture,
                _Half(runtime.combine, touched, later),
                _Half(runtime.combine, read, later | dict.fromkeys(_COMBINE_OUTPUTS, 0)),
            )
        return LowLatencyCombineResult(combined_x=out, receive=receive)

    def _written_rows(self, src_info: torch.Tensor) -> torch.Tensor:
        """The expert outputs that were written to this handle's buffer."""
        known = self._combine_buffers.get(src_info.data_ptr())
        if known is None:
            raise ArgumentError(
                "low_latency_combine: zero_copy without a buffer for this handle. Write the rows to the tensor that "
                "get_next_low_latency_combine_buffer(handle) returns."
            )
        # It was allocated on the stream that asked for it, and goes when later handles ask for theirs.
        known.record_stream(self._chain.current_stream())
        return known

    def next_combine_buffer(self, handle: tuple[Any, ...]) -> torch.Tensor:
        typed = LowLatencyHandle.from_tuple(handle)
        key = typed.src_info.data_ptr()
        shape = (*typed.src_info.shape, typed.hidden)
        known = self._combine_buffers.pop(key, None)
        if known is None or known.shape != shape:
            while len(self._combine_buffers) >= _MAX_COMBINE_BUFFERS:
                del self._combine_buffers[next(iter(self._combine_buffers))]
            known = torch.empty(shape, dtype=torch.bfloat16, device=typed.src_info.device)
        self._combine_buffers[key] = known
        return known

    # --- starting kernels -------------------------------------------------------------------------------------------

    def _begin(self, call: str) -> None:
        """Refuse what cannot be, and finish what users dropped, before an operation begins."""
        self._check_alive(call)
        self._outstanding.check_room(call)
        unreceived = self._unreceived[call]
        if unreceived and self._num_sent[call] - unreceived[0] >= _RING_SLOTS - 1:
            raise BufferStateError(
                f"{call}: an earlier one has not been received yet, and {_RING_SLOTS - 1} later ones have begun, "
                "the most there is room for. Call its hook (or drop it) first."
            )
        self._num_sent[call] += 1

    def _launch(self, kernel: Callable[..., None], arguments: dict[str, Any], **more: Any) -> int:
        """Start it on the current stream behind the operation before; returns the capture it went into, 0 for none."""
        stream = self._chain.current_stream()
        with self._lock:
            capture = self._chain.enter(stream)
            try:
                kernel(stream=stream.cuda_stream, **more, **arguments)
            except self._extension.ArgumentError as error:
                raise ArgumentError(str(error)) from error
            self._chain.leave(stream, capture)
        return capture

    def _later(self, call: str, sent_in: int, receive: _Half, discard: _Half) -> Receive:
        """What receives an operation sent in the capture ``sent_in``; ``discard`` takes its place if nobody asks."""
        generation, sent = self._generation, self._num_sent[call]
        self._unreceived[call].append(sent)

        def complete() -> None:
            self._check_alive(call)
            if generation != self._generation:
                raise BufferStateError(f"{call}: the buffer was reset after this call; its hook leads nowhere.")
            if self._chain.capture_of(self._chain.current_stream()) != sent_in:
                raise BufferStateError(
                    f"{call}: its hook has to be called where the call was made: both inside one capture of a CUDA "
                    "graph, or both outside."
                )
            self._launch(receive.kernel, receive.arguments, phases=self._receive)
            self._unreceived[call].remove(sent)

        def drop() -> bool:
            stream = self._chain.current_stream()
            if self._chain.capture_of(stream) != sent_in:
                if sent_in:
                    logger.warning(
                        "%s: a CUDA graph was captured in which this call's hook is never called. Replaying that graph "
                        "ends in time-outs: call the hook inside the capture.",
                        call,
                    )
                    self._unreceived[call].remove(sent)
                return bool(sent_in)
            for tensor in discard.touched:
                if tensor is not None:
                    tensor.record_stream(stream)
            self._launch(discard.kernel, discard.arguments, phases=self._receive)
            self._unreceived[call].remove(sent)
            return True

        return self._outstanding.begin(complete, drop)

    # --- windows ----------------------------------------------------------------------------------------------------

    def _shape(self, call: str, max_tokens: int, hidden: int, num_experts: int, num_topk: int) -> _Shape:
        key = (max_tokens, hidden, num_experts, num_topk)
        known = self._shapes.get(key)
        if known is not None:
            return known
        sizes = {
            "num_ranks": self._facts.num_ranks,
            "max_tokens": max_tokens,
            "num_experts": num_experts,
            "num_topk": num_topk,
        }
        runtime_class = self._extension.Runtime
        try:
            window_bytes = runtime_class.window_bytes(
                **sizes, hidden=hidden, ll_reduce=self._options.ll_reduce, has_remote=any(self._reach.is_remote)
            )
            handle_words = runtime_class.handle_words(**sizes)
        except self._extension.ArgumentError as error:
            raise ArgumentError(f"{call}: {error}") from error
        num_ranks = self._facts.num_ranks
        shape = self._shapes[key] = _Shape(
            int(window_bytes), int(handle_words), num_experts // num_ranks, num_ranks * max_tokens
        )
        return shape

    def _window_for(self, call: str, shape: _Shape) -> Window:
        """The window for new calls; a larger one is made first if this shape needs it, alike on every rank."""
        if shape.window_bytes > self._windows[-1].num_bytes:
            self._grow(call, shape.window_bytes)
        return self._windows[-1]

    def _grow(self, call: str, num_bytes: int) -> None:
        """Collective, and the host waits for all ranks."""
        window = self._windows[-1]
        needs = f"{call}: calls of this size need {num_bytes >> 20} MiB, this buffer has {window.num_bytes >> 20}"
        cure = (
            "Build the buffer with num_rdma_bytes=Buffer.get_low_latency_rdma_size_hint(...), or make one such call "
            "before."
        )
        if self._reach.provider == "nvshmem":
            raise BufferStateError(f"{needs}, and memory that NVSHMEM holds cannot grow. {cure}")
        if torch.cuda.is_current_stream_capturing():
            raise BufferStateError(f"{needs}, and it cannot grow while a CUDA graph is captured. {cure}")
        if self._options.enable_shrink:
            masked = torch.zeros(self._facts.num_ranks, dtype=torch.int32, device=self._facts.device)
            self.query_mask(masked)
            if bool(masked.any()):
                raise BufferStateError(f"{needs}, and it cannot grow while ranks are masked. {cure}")
        logger.info("%s. A larger window is made now; num_rdma_bytes avoids this.", needs)
        self._add_window(max(num_bytes, 2 * window.num_bytes))

    def _add_window(self, num_bytes: int) -> None:
        self._windows.append(Window(self._extension, self._facts, self._options, self._reach, num_bytes=num_bytes))

    def clean(self, max_tokens: int, hidden: int, num_experts: int) -> None:
        # Nothing else uses a window, and its words are empty whenever no message is on its way: there are no leftovers.
        self._check_alive("clean_low_latency_buffer")
        self._outstanding.finish_dropped()
        self._combine_buffers.clear()

    def local_tensor(self, num_bytes: int) -> torch.Tensor:
        if self._scratch is None or self._scratch.numel() < num_bytes:
            self._scratch = torch.zeros(num_bytes, dtype=torch.uint8, device=self._facts.device)
        return self._scratch

    # --- masks ------------------------------------------------------------------------------------------------------

    def update_mask(self, rank: int, masked: bool) -> None:
        self._check_alive("update_mask")
        for window in self._windows:
            self._launch(window.runtime.update_mask, {"rank": rank, "masked": masked})

    def clean_mask(self) -> None:
        self._check_alive("clean_mask")
        for window in self._windows:
            self._launch(window.runtime.clean_mask, {})

    def query_mask(self, out: torch.Tensor) -> None:
        self._check_alive("query_mask")
        on_device = out if out.is_cuda and out.is_contiguous() else torch.empty_like(out, device=self._facts.device)
        self._launch(self._windows[-1].runtime.query_mask, {"out": on_device.data_ptr()})
        if on_device is not out:
            out.copy_(on_device)

    # --- faults -----------------------------------------------------------------------------------------------------

    def _check_alive(self, call: str) -> None:
        """Raise what the kernels of an earlier call reported."""
        if not self._windows:
            raise BufferStateError(f"{call}: this buffer was destroyed. Build a new one.")
        if self._broken:
            raise BufferStateError(
                f"{call}: this buffer failed before ({self._broken}). Call reset() on every rank, or build a new one."
            )
        for window in self._windows:
            record = window.runtime.error()
            if record is not None:
                error: DeepEPError = failure(self._extension, record)
                self._broken = str(error)
                raise error

    def refuse(self, operation: Operation, reason: str) -> None:
        """These calls exchange no headers: peers learn of it at their deadline."""

    def abort(self) -> None:
        for window in tuple(self._windows):
            window.runtime.abort()

    def reset(self) -> None:
        """Collective: make the mode usable again after a fault. Masks are forgotten; graphs stay valid."""
        if not self._windows:
            raise BufferStateError("reset: this buffer was destroyed. Build a new one.")
        if self._reach.provider == "nvshmem":
            raise BufferStateError("reset: NVSHMEM's queue pairs cannot be reset. Start the group anew.")
        channel, timeout_s = self._facts.channel, self._options.timeout_s
        self.abort()
        self._synchronize()
        self._outstanding, self._generation = Outstanding(), self._generation + 1
        self._unreceived = {call: [] for call in self._num_sent}
        for window in self._windows:
            window.drop_requests()
        channel.all_agree(True, phase="reset", timeout_s=timeout_s)
        for window in self._windows:
            window.reset(self._stream.cuda_stream)
        self._stream.synchronize()
        self._broken = ""
        channel.all_agree(True, phase="reset", timeout_s=timeout_s)

    def _synchronize(self) -> None:
        """Let the host wait for all kernels of this rank; each of their waits ends within its deadline."""
        self._chain.synchronize()
        torch.cuda.synchronize(self._facts.device)

    def destroy(self) -> None:
        windows, self._windows = self._windows, []
        if not windows:
            return
        if self._broken:
            for window in windows:
                window.runtime.abort()
        self._synchronize()
        for window in windows:
            window.close()
        self._combine_buffers.clear()
        self._scratch = None


def _memory_behind(src_info: torch.Tensor, handle_words: int, num_topk: int) -> int:
    """Address of the handle's memory, of which ``src_info`` shows the beginning."""
    has_all = (
        src_info.is_contiguous()
        and src_info.storage_offset() == 0
        and src_info.untyped_storage().nbytes() == handle_words * _INT32_BYTES
    )
    if not has_all:
        raise ArgumentError(
            "low_latency_combine: handle[0] is not the tensor that low_latency_dispatch returned on this backend with "
            f"top-{num_topk} (what combine needs lies behind it in the same memory; a copy of it does not have that). "
            "Pass the handle as it was returned, and the topk_idx of its dispatch."
        )
    return src_info.data_ptr()


def _address(tensor: torch.Tensor | None) -> int:
    return 0 if tensor is None else tensor.data_ptr()


def _on_cuda(tensor: torch.Tensor, call: str) -> None:
    if not tensor.is_cuda:
        raise ArgumentError(
            f"{call}: tensors are on {tensor.device}; backend 'ibgda' needs CUDA tensors. Move them, or build the "
            "buffer with backend='reference'."
        )
