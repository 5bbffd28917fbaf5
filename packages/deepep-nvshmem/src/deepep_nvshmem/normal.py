"""Normal mode over NVLink: allocates outputs, starts the kernels, waits for counts.

``T`` tokens here, ``K`` choices, ``H`` hidden, ``S`` scales, ``N`` ranks, ``E`` experts, ``R`` rows received here.
"""

from __future__ import annotations

from typing import Any, ClassVar

import torch

from deep_ep.backend import (
    BufferOptions,
    CombineRequest,
    CombineResult,
    DispatchRequest,
    DispatchResult,
    GroupFacts,
)
from deep_ep.errors import DeepEPError
from deep_ep.events import use_stream
from deep_ep.handles import IntranodeHandle

from .arena import SymmetricArena
from .backend import load_extension
from .base import INT_BYTES, MAX_LOCAL_EXPERTS, KernelNormal, address_of, call_header, header_fields, sms_for
from .outputs import Outputs, least_rows, size_class
from .push_limit import measure_push_limit

NUM_STAGING_BYTES = 64 << 20
# On four H200s these many are within 1 % of the best (docs/benchmarks.md). A relay gains from every further SM.
_ENOUGH_SMS_TO_DISPATCH, _ENOUGH_SMS_TO_PULL = 12, 16


class NvlinkNormal(KernelNormal):
    """One buffer's normal mode on the backend ``nvlink``."""

    name: ClassVar[str] = "nvlink"

    def __init__(self, facts: GroupFacts, options: BufferOptions) -> None:
        self._extension = load_extension()
        runtime_class = self._extension.Runtime
        num_window_bytes = runtime_class.window_bytes(
            num_ranks=facts.num_ranks, max_local_experts=MAX_LOCAL_EXPERTS, num_staging_bytes=NUM_STAGING_BYTES
        )
        arena = SymmetricArena(
            self._extension,
            facts,
            num_window_bytes=num_window_bytes,
            num_heap_bytes=options.symmetric_heap_bytes,
            timeout_s=options.timeout_s,
            backend=self.name,
        )
        runtime = runtime_class(
            rank=facts.rank,
            num_ranks=facts.num_ranks,
            device=facts.device.index,
            arena_ptrs=arena.arena_ptrs,
            num_arena_bytes=arena.num_bytes,
            max_local_experts=MAX_LOCAL_EXPERTS,
            num_staging_bytes=NUM_STAGING_BYTES,
        )
        self._capacity = 1  # of the last dispatch that had to ask for its row count
        super().__init__(facts, options, arena, runtime)

    # --- calls ------------------------------------------------------------------------------------------------------

    def _cached_dispatch(self, request: DispatchRequest) -> DispatchResult:
        assert request.handle is not None
        self._on_cuda(request.x, "dispatch")
        runtime = self._alive("cached_dispatch")
        handle = IntranodeHandle.from_tuple(request.handle)
        num_recv = handle.num_recv_tokens
        outputs = self._outputs(request, size_class(max(num_recv, 1)), 0, source_shape=None)
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
        outputs = self._outputs(request, capacity, num_topk, source_shape=())
        send_head = numbers.data_ptr()
        rank_prefix = send_head + num_head * INT_BYTES
        sequence, self._num_calls = self._num_calls, self._num_calls + 1
        ticket = next(self._tickets) if waits else 0
        runtime.notify(
            fields=header_fields(sequence, request),
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
            first_rows=rank_prefix + num_prefix * INT_BYTES,
        )
        routing = {"num_experts": num_experts, "rank_prefix": rank_prefix, "send_head": send_head}
        num_recv, per_expert = request.num_worst_tokens, []
        is_launched = self._launch_dispatch(runtime, request, outputs, **routing, ticket=ticket)
        if waits:
            counts = runtime.wait_counts(ticket, 0.0)  # if they came, they came before the launch
            if not is_launched:
                try:
                    self._judge(runtime, counts, lambda: call_header(sequence, request))
                except DeepEPError:
                    # The exchange may still be writing to memory that the caller's stream gets back now.
                    if request.output_stream is not None:
                        self._order.wait(request.output_stream, self._stream)
                    raise
                capacity = size_class(max(counts.num_recv_tokens, 1))
                outputs = self._outputs(request, capacity, num_topk, source_shape=())
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
            scales=address_of(scales),
            num_scales=scales.shape[1] if scales is not None else 0,
            scales_stride_token=scales.stride(0) if scales is not None else 0,
            scales_stride_col=scales.stride(1) if scales is not None else 0,
            topk_idx=address_of(topk_idx),
            topk_idx_bits=topk_idx.element_size() * 8 if topk_idx is not None else 64,
            topk_weights=address_of(request.topk_weights),
            num_tokens=num_tokens,
            num_topk=topk_idx.shape[1] if topk_idx is not None else 0,
            num_experts=num_experts,
            rank_prefix=rank_prefix,
            send_head=send_head,
            recv_x=outputs.x.data_ptr(),
            recv_scales=address_of(outputs.scales),
            recv_topk_idx=address_of(outputs.topk_idx),
            recv_topk_weights=address_of(outputs.topk_weights),
            recv_src_idx=address_of(outputs.src_idx),
            has_src_idx=outputs.src_idx is not None,
            capacity=request.num_worst_tokens or outputs.capacity,
            fill_unused=request.num_worst_tokens > 0,
            num_sms=sms_for(request, _ENOUGH_SMS_TO_DISPATCH),
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
        self._on_cuda(request.x, "combine")
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
            topk_weights=address_of(weights),
            num_topk=num_topk,
            bias_0=biases[0],
            bias_1=biases[1],
            rank_prefix=handle.rank_prefix_matrix.data_ptr(),
            send_head=handle.send_head.data_ptr(),
            num_tokens=handle.num_tokens,
            out=combined.data_ptr(),
            out_topk_weights=address_of(combined_weights),
            num_sms=sms_for(request, _ENOUGH_SMS_TO_PULL if relay is None else request.num_sms),
            stream=self._handle,
            relay=address_of(relay),
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

    def _outputs(
        self, request: DispatchRequest, capacity: int, num_topk: int, *, source_shape: tuple[int, ...] | None
    ) -> Outputs:
        """Blocks of ``capacity`` rows, in symmetric memory if they fit, else anywhere.

        Rows that land elsewhere come through the staging window.
        """
        try:
            with self._arena.allocate_here():
                outputs = Outputs.allocate(request, capacity, num_topk, source_shape=source_shape)
        except torch.OutOfMemoryError:
            outputs = Outputs.allocate(request, capacity, num_topk, source_shape=source_shape)
        self._follow(request.output_stream)
        return outputs
