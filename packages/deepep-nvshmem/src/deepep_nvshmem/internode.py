"""Normal mode across nodes: starts NVSHMEM, allocates outputs and handles, starts the kernels, waits for counts.

``T`` tokens here, ``K`` choices, ``H`` hidden, ``S`` scales, ``N`` ranks, ``D`` nodes, ``P = N / D`` ranks of a node,
``E`` experts, ``R`` rows received here, ``F`` rows that this rank passes on to its node (its own node's included).
"""

from __future__ import annotations

import struct
from typing import Any, ClassVar, NamedTuple

import torch

from deep_ep import nvshmem_runtime
from deep_ep.backend import (
    BufferOptions,
    CombineRequest,
    CombineResult,
    DispatchRequest,
    DispatchResult,
    GroupFacts,
)
from deep_ep.errors import (
    ArgumentError,
    BackendUnavailableError,
    BufferStateError,
    DeepEPError,
    PeersDisagreeError,
)
from deep_ep.events import use_stream
from deep_ep.handles import InternodeHandle

from .arena import SymmetricArena
from .backend import load_extension, load_internode_extension
from .base import MAX_LOCAL_EXPERTS, KernelNormal, address_of, call_header, header_fields
from .outputs import Outputs, least_rows, size_class
from .push_limit import measure_push_limit_of_host

# All windows of a rank, where the number of nodes leaves each its share between two limits; an only one has more slots.
_ALL_WINDOWS_MB, _MOST_WINDOW_MB, _LEAST_WINDOW_MB, _ONLY_WINDOW_MB = 192, 24, 6, 32
_WIDTH = 8  # of send_nvl_head
_ALIGNMENT, _LEAST_RING_BYTES = 128, 4096
_RING = struct.Struct("<q")
_TOKENS = "_deepep_tokens_to_node"
_MORE_HEAP = "Raise DEEPEP_SYMMETRIC_HEAP_MB on every rank."


class Routing(NamedTuple):
    """int32 tensors that the kernels fill: parts of a handle, and what only one dispatch needs."""

    send_rdma_head: torch.Tensor
    rdma_channel_prefix: torch.Tensor
    gbl_channel_prefix: torch.Tensor
    recv_rdma_channel_prefix: torch.Tensor
    recv_rdma_rank_prefix: torch.Tensor
    recv_gbl_channel_prefix: torch.Tensor
    recv_gbl_rank_prefix: torch.Tensor
    dst_rows: torch.Tensor
    tokens_to_node: torch.Tensor

    @staticmethod
    def allocate(num_tokens: int, num_ranks: int, num_nodes: int, device: torch.device) -> Routing:
        """One block for all, so that a handle keeps alive what its dispatch reads on another stream."""
        shapes = (
            (num_tokens, num_nodes),
            (num_nodes, 1),
            (num_ranks, 1),
            (num_nodes, 1),
            (num_nodes,),
            (num_ranks, 1),
            (num_ranks,),
            (num_tokens, num_ranks),
            (num_nodes, num_tokens),
        )
        sizes = [shape[0] * shape[-1] if len(shape) == 2 else shape[0] for shape in shapes]
        block = torch.empty(sum(sizes), dtype=torch.int32, device=device)
        return Routing(*(part.view(shape) for part, shape in zip(block.split(sizes), shapes, strict=True)))


class NvshmemNormal(KernelNormal):
    """One buffer's normal mode on the backend ``nvshmem``."""

    name: ClassVar[str] = "nvshmem"

    def __init__(self, facts: GroupFacts, options: BufferOptions) -> None:
        self._ring_bytes = _agreed_ring_bytes(facts, options)
        settings, timeout_s = options.nvshmem, options.timeout_s
        nvshmem_runtime.start(facts, settings=settings, timeout_s=timeout_s, backend=self.name)
        # The heap is that of `nvlink`: torch finds the heap of a freed address in one extension only.
        memory, self._extension = load_extension(), load_internode_extension()
        runtime_class, device = self._extension.Runtime, facts.device.index
        exchange = nvshmem_runtime.Exchange(facts, timeout_s, self.name)
        sizes = {
            "num_ranks": facts.num_ranks,
            "ranks_per_node": facts.ranks_per_node,
            "max_local_experts": MAX_LOCAL_EXPERTS,
            "num_ring_bytes": self._ring_bytes,
        }
        num_network_bytes = runtime_class.network_bytes(**sizes)
        self._network = nvshmem_runtime.allocate(
            facts, num_bytes=num_network_bytes, settings=settings, timeout_s=timeout_s, backend=self.name
        )
        arena: SymmetricArena | None = None
        try:
            arena = SymmetricArena(
                memory,
                facts,
                num_window_bytes=runtime_class.window_bytes(ranks_per_node=facts.ranks_per_node),
                num_heap_bytes=options.symmetric_heap_bytes,
                timeout_s=timeout_s,
                backend=self.name,
            )
            runtime = exchange.attempt(
                lambda: self._make_runtime(
                    rank=facts.rank,
                    device=device,
                    arena_ptrs=arena.arena_ptrs,
                    num_arena_bytes=arena.num_bytes,
                    network_ptr=self._network.ptr,
                    **sizes,
                )
            )
        except BaseException:
            if arena is not None:
                arena.close()
            self._network.close()
            raise
        # Of the last dispatch that had to ask for its row counts.
        self._capacity, self._forward_capacity = 1, 1
        self._found_tokens: torch.Tensor | None = None
        super().__init__(facts, options, arena, runtime)

    def _make_runtime(self, **arguments: Any) -> Any:
        try:
            return self._extension.Runtime(**arguments)
        except self._extension.NativeError as error:
            raise BackendUnavailableError(
                f"kernels could not be set up on rank {arguments['rank']}: {error}"
            ) from error

    # --- dispatch ---------------------------------------------------------------------------------------------------

    def _fresh_dispatch(self, request: DispatchRequest) -> DispatchResult:
        runtime = self._alive("dispatch")
        layout, waits = self._checked_layout(request), request.num_worst_tokens == 0
        assert layout.num_tokens_per_rdma_rank is not None
        num_ranks, num_nodes, num_tokens = self._facts.num_ranks, self._facts.num_nodes, request.x.shape[0]
        num_experts, device = layout.num_tokens_per_expert.numel(), request.x.device
        num_topk = request.topk_idx.shape[1] if request.topk_idx is not None else 0
        if too_small := self._window_obstacle(request, num_topk):
            self._refuse_and_raise(too_small)
        if waits:
            capacity, forward_capacity = self._capacity, self._forward_capacity
        else:
            capacity = size_class(request.num_worst_tokens)
            forward_capacity = request.num_worst_tokens * self._facts.ranks_per_node
        routing = Routing.allocate(num_tokens, num_ranks, num_nodes, device)
        send_nvl_head = _heads(forward_capacity, device)
        # As in `nvlink`: blocks as large as the last call's are most often right, and then the launch follows at once.
        outputs = self._outputs(request, capacity, num_topk, source_shape=(2,))
        if outputs is None and not waits:
            self._refuse_and_raise(self._heap_is_full(capacity), BufferStateError)
        sequence, self._num_calls = self._num_calls, self._num_calls + 1
        ticket = next(self._tickets) if waits else 0
        runtime.notify(
            fields=header_fields(sequence, request),
            num_tokens=num_tokens,
            num_experts=num_experts,
            expert_alignment=request.expert_alignment,
            num_tokens_per_rank=layout.num_tokens_per_rank.data_ptr(),
            num_tokens_per_node=layout.num_tokens_per_rdma_rank.data_ptr(),
            num_tokens_per_expert=layout.num_tokens_per_expert.data_ptr(),
            is_token_in_rank=layout.is_token_in_rank.data_ptr(),
            recv_tokens_per_expert=0,
            num_bad_indices=0,
            ticket=ticket,
            stream=self._handle,
            **{name: part.data_ptr() for name, part in routing._asdict().items()},
        )
        num_recv, per_expert = request.num_worst_tokens, []
        is_launched = outputs is not None and self._launch(
            runtime, request, outputs, routing, send_nvl_head, num_experts=num_experts, ticket=ticket
        )
        if waits:
            counts = runtime.wait_counts(ticket, 0.0 if outputs is not None else self._host_timeout_s)
            if not is_launched:
                try:
                    self._judge(runtime, counts, lambda: call_header(sequence, request))
                except DeepEPError:
                    # The exchange may still be writing to memory that the caller's stream gets back now.
                    if request.output_stream is not None:
                        self._order.wait(request.output_stream, self._stream)
                    raise
                capacity = size_class(max(counts.num_recv_tokens, 1))
                forward_capacity = size_class(max(counts.num_forward_rows, 1))
                del outputs  # its blocks may be what there is no room beside
                outputs, send_nvl_head = self._outputs_of_known_size(
                    runtime, request, capacity, forward_capacity, num_topk, routing, num_experts
                )
                self._launch(runtime, request, outputs, routing, send_nvl_head, num_experts=num_experts)
            self._capacity, self._forward_capacity = capacity, forward_capacity
            num_recv, per_expert = counts.num_recv_tokens, counts.num_recv_tokens_per_expert
            send_nvl_head.resize_(counts.num_forward_rows, _WIDTH)
        assert outputs is not None and outputs.src_idx is not None
        outputs.cut(num_recv)
        _keep_tokens(routing)
        handle = InternodeHandle(
            is_token_in_rank=layout.is_token_in_rank,
            rdma_channel_prefix_matrix=routing.rdma_channel_prefix,
            gbl_channel_prefix_matrix=routing.gbl_channel_prefix,
            recv_rdma_channel_prefix_matrix=routing.recv_rdma_channel_prefix,
            recv_rdma_rank_prefix_sum=routing.recv_rdma_rank_prefix,
            recv_gbl_channel_prefix_matrix=routing.recv_gbl_channel_prefix,
            recv_gbl_rank_prefix_sum=routing.recv_gbl_rank_prefix,
            recv_src_meta=outputs.src_idx.view(torch.uint8),
            send_rdma_head=routing.send_rdma_head,
            send_nvl_head=send_nvl_head,
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

    def _outputs_of_known_size(
        self,
        runtime: Any,
        request: DispatchRequest,
        capacity: int,
        forward_capacity: int,
        num_topk: int,
        routing: Routing,
        num_experts: int,
    ) -> tuple[Outputs, torch.Tensor]:
        """Blocks for rows whose number is known now, and room for their heads.

        The peers are on their way already: where the heap is full they are let down in step, and the next call works.
        """
        send_nvl_head = _heads(forward_capacity, request.x.device)
        outputs = self._outputs(request, capacity, num_topk, source_shape=(2,))
        if outputs is not None:
            return outputs, send_nvl_head
        nothing = Outputs.allocate(request, 0, num_topk, source_shape=(2,))
        self._launch(runtime, request, nothing, routing, send_nvl_head, num_experts=num_experts)
        self._stream.synchronize()
        runtime.clear_error()  # it says what is said here
        raise BufferStateError(f"dispatch: {self._heap_is_full(capacity)}")

    def _cached_dispatch(self, request: DispatchRequest) -> DispatchResult:
        assert request.handle is not None
        self._on_cuda(request.x, "dispatch")
        runtime = self._alive("cached_dispatch")
        handle = InternodeHandle.from_tuple(request.handle)
        if too_small := self._window_obstacle(request, 0):
            raise ArgumentError(f"dispatch: {too_small}")
        num_recv, device = handle.num_recv_tokens, request.x.device
        outputs = self._outputs(request, size_class(max(num_recv, 1)), 0, source_shape=None)
        if outputs is None:
            raise BufferStateError(f"dispatch: {self._heap_is_full(num_recv)}")
        nothing = torch.empty(0, dtype=torch.int32, device=device)
        tokens_to_node = _kept_tokens(handle.send_rdma_head)
        routing = Routing(
            send_rdma_head=handle.send_rdma_head,
            rdma_channel_prefix=handle.rdma_channel_prefix_matrix,
            gbl_channel_prefix=nothing,
            recv_rdma_channel_prefix=nothing,
            recv_rdma_rank_prefix=handle.recv_rdma_rank_prefix_sum,
            recv_gbl_channel_prefix=nothing,
            recv_gbl_rank_prefix=handle.recv_gbl_rank_prefix_sum,
            dst_rows=nothing,
            tokens_to_node=self._room_for_tokens(handle.num_tokens) if tokens_to_node is None else tokens_to_node,
        )
        self._launch(
            runtime,
            request,
            outputs,
            routing,
            handle.send_nvl_head,
            num_experts=self._facts.num_ranks,
            makes_tokens=tokens_to_node is None,
        )
        self._num_calls += 1
        outputs.cut(num_recv)
        return DispatchResult(
            recv_x=outputs.x, recv_scales=outputs.scales, is_on_output_stream=request.output_stream is not None
        )

    def _launch(
        self,
        runtime: Any,
        request: DispatchRequest,
        outputs: Outputs,
        routing: Routing,
        send_nvl_head: torch.Tensor,
        *,
        num_experts: int,
        makes_tokens: bool = False,
        ticket: int = 0,
    ) -> bool:
        """Launch the kernel; with a ticket, after the counts have come, and only if there is room for them."""
        x, scales, topk_idx = request.x, request.scales, request.topk_idx
        num_tokens, hidden = x.shape
        is_cached = request.handle is not None
        is_launched: bool = runtime.dispatch(
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
            is_cached=is_cached,
            dst_rows=routing.dst_rows.data_ptr(),
            tokens_to_node=routing.tokens_to_node.data_ptr(),
            unlisted_rdma_head=routing.send_rdma_head.data_ptr() if makes_tokens else 0,
            rdma_channel_prefix=routing.rdma_channel_prefix.data_ptr(),
            recv_rdma_rank_prefix=routing.recv_rdma_rank_prefix.data_ptr(),
            recv_gbl_rank_prefix=routing.recv_gbl_rank_prefix.data_ptr(),
            send_nvl_head=send_nvl_head.data_ptr(),
            forward_capacity=send_nvl_head.shape[0],
            recv_x=outputs.x.data_ptr(),
            recv_scales=address_of(outputs.scales),
            recv_topk_idx=address_of(outputs.topk_idx),
            recv_topk_weights=address_of(outputs.topk_weights),
            recv_src_meta=address_of(outputs.src_idx),
            capacity=min(request.num_worst_tokens or outputs.capacity, outputs.capacity),
            fill_unused=request.num_worst_tokens > 0,
            num_sms=request.num_sms,
            stream=self._handle,
            ticket=ticket,
            least_rows=least_rows(outputs.capacity),
            timeout_s=self._host_timeout_s,
        )
        if is_launched:
            self._placement = {"recv_x": "in place"}
        return is_launched

    def _room_for_tokens(self, num_tokens: int) -> torch.Tensor:
        """Room for what a cached dispatch has to find out again, because it was handed clones of a handle's parts.

        One dispatch after the other uses it, in the order of the communication stream.
        """
        num_words, device = self._facts.num_nodes * num_tokens, self._facts.device
        if torch.cuda.is_current_stream_capturing():
            return self._arena.empty_lasting((num_words,), dtype=torch.int32, device=device)
        if self._found_tokens is None or self._found_tokens.numel() < num_words:
            with use_stream(self._stream):
                self._found_tokens = torch.empty(size_class(num_words), dtype=torch.int32, device=device)
        return self._found_tokens

    # --- combine ----------------------------------------------------------------------------------------------------

    def combine(self, request: CombineRequest) -> CombineResult:
        self._on_cuda(request.x, "combine")
        runtime = self._alive("combine")
        handle = InternodeHandle.from_tuple(request.handle)
        x, weights, device = request.x, request.topk_weights, request.x.device
        num_topk = weights.shape[1] if weights is not None else 0
        if too_small := self._window_obstacle(request, num_topk):
            raise ArgumentError(f"combine: {too_small}")
        combined_weights: torch.Tensor | None = None
        combined = torch.empty((handle.num_tokens, x.shape[1]), dtype=torch.bfloat16, device=device)
        if weights is not None:
            combined_weights = torch.empty((handle.num_tokens, num_topk), dtype=torch.float32, device=device)
        self._follow(request.output_stream)
        x, is_copied = self._reachable(runtime, x)
        if weights is not None:
            weights, _ = self._reachable(runtime, weights)
        biases = [bias.data_ptr() for bias in request.biases] + [0, 0]
        runtime.combine(
            x=x.data_ptr(),
            num_recv_tokens=request.x.shape[0],
            num_row_bytes=request.x.shape[1] * 2,
            topk_weights=address_of(weights),
            num_topk=num_topk,
            bias_0=biases[0],
            bias_1=biases[1],
            recv_rdma_rank_prefix=handle.recv_rdma_rank_prefix_sum.data_ptr(),
            send_rdma_head=handle.send_rdma_head.data_ptr(),
            send_nvl_head=handle.send_nvl_head.data_ptr(),
            num_forward_rows=handle.send_nvl_head.shape[0],
            num_tokens=handle.num_tokens,
            out=combined.data_ptr(),
            out_topk_weights=address_of(combined_weights),
            num_sms=request.num_sms,
            stream=self._handle,
        )
        self._num_calls += 1
        self._placement = {"x": "copied" if is_copied else "pulled in place"}
        return CombineResult(
            combined_x=combined,
            combined_topk_weights=combined_weights,
            is_on_output_stream=request.output_stream is not None,
        )

    def _reachable(self, runtime: Any, rows: torch.Tensor) -> tuple[torch.Tensor, bool]:
        """The rows where the ranks of the node can load them; whether they had to be copied there.

        A copy lives on the communication stream and may be dropped as soon as the kernel is launched.
        """
        if rows.numel() == 0 or runtime.is_symmetric(rows.data_ptr(), rows.numel() * rows.element_size()):
            return rows, False
        num_rows, width = rows.shape
        try:
            with use_stream(self._stream):
                shape = (size_class(num_rows), width)
                if torch.cuda.is_current_stream_capturing():
                    copy = self._arena.empty_lasting(shape, dtype=rows.dtype, device=rows.device)
                else:
                    with self._arena.allocate_here():
                        copy = torch.empty(shape, dtype=rows.dtype, device=rows.device)
                return copy[:num_rows].copy_(rows), True
        except torch.OutOfMemoryError as error:
            raise BufferStateError(
                f"combine: {self._heap_is_full(num_rows)} Rows made inside Buffer.symmetric_memory() need no copy."
            ) from error

    def push_limit_gbps(self, num_sms: int) -> float | None:
        return measure_push_limit_of_host(
            load_extension(), self._facts, num_sms=num_sms, timeout_s=self._timeout_s, backend=self.name
        )

    # --- memory -----------------------------------------------------------------------------------------------------

    def _outputs(
        self, request: DispatchRequest, capacity: int, num_topk: int, *, source_shape: tuple[int, ...] | None
    ) -> Outputs | None:
        """Blocks of ``capacity`` rows in symmetric memory; ``None`` if they do not fit."""
        try:
            if torch.cuda.is_current_stream_capturing():
                outputs = Outputs.allocate(
                    request, capacity, num_topk, source_shape=source_shape, empty=self._arena.empty_lasting
                )
            else:
                with self._arena.allocate_here():
                    outputs = Outputs.allocate(request, capacity, num_topk, source_shape=source_shape)
        except torch.OutOfMemoryError:
            self._follow(request.output_stream)
            return None
        self._follow(request.output_stream)
        return outputs

    def _heap_is_full(self, num_rows: int) -> str:
        return (
            f"{num_rows} rows do not fit in the symmetric memory of rank {self._facts.rank}, of which "
            f"{self._arena.num_free_bytes >> 20} MiB are free. {_MORE_HEAP}"
        )

    def _window_obstacle(self, request: DispatchRequest | CombineRequest, num_topk: int) -> str:
        """Why rows of this size cannot travel; the same on all ranks that make the same call."""
        x, scales = request.x, request.scales if isinstance(request, DispatchRequest) else None
        least = self._extension.Runtime.least_ring_bytes(
            num_row_bytes=x.shape[1] * x.element_size(),
            num_scales=scales.shape[1] if scales is not None else 0,
            num_topk=num_topk,
            ranks_per_node=self._facts.ranks_per_node,
        )
        if least <= self._ring_bytes:
            return ""
        return (
            f"rows of {x.shape[1]} columns need a window of {2 * least / (1 << 20):.3g} MiB for each node, and "
            f"{2 * self._ring_bytes / (1 << 20):.3g} are there. Raise DEEPEP_NVSHMEM_WINDOW_MB on every rank."
        )

    # --- faults -----------------------------------------------------------------------------------------------------

    def _settle(self) -> None:
        self._extension.network_quiet()

    def destroy(self) -> None:
        is_first = self._runtime is not None
        super().destroy()
        if is_first:
            self._network.close()
            self._found_tokens = None


def _keep_tokens(routing: Routing) -> None:
    """Let the handle's send_rdma_head bring its tokens_to_node along, which spares its cached dispatches a kernel.

    The version says whether somebody has written to the handle since, as with a later handle copied into this one.
    Tensors of inference mode have none.
    """
    head = routing.send_rdma_head
    if not head.is_inference():
        setattr(head, _TOKENS, (routing.tokens_to_node, head._version))


def _kept_tokens(send_rdma_head: torch.Tensor) -> torch.Tensor | None:
    tokens, version = getattr(send_rdma_head, _TOKENS, (None, 0))
    return tokens if tokens is not None and version == send_rdma_head._version else None


def default_window_mb(num_nodes: int) -> float:
    """MiB of the window for each other node: 24; 32 for an only one; less beyond nine: more streams share the NIC."""
    if num_nodes == 2:
        return _ONLY_WINDOW_MB
    return max(_LEAST_WINDOW_MB, min(_MOST_WINDOW_MB, _ALL_WINDOWS_MB / max(num_nodes - 1, 1)))


def _agreed_ring_bytes(facts: GroupFacts, options: BufferOptions) -> int:
    """Bytes of one ring: half a window, because a row has a place at its sender and one at its receiver."""
    window_mb = options.nvshmem.window_mb or default_window_mb(facts.num_nodes)
    own = max(int(window_mb * (1 << 20)) // 2 // _ALIGNMENT * _ALIGNMENT, _LEAST_RING_BYTES)
    gathered = facts.channel.all_gather(_RING.pack(own), phase="construction", timeout_s=options.timeout_s)
    sizes = [_RING.unpack(record)[0] for record in gathered]
    if len(set(sizes)) > 1:
        listing = ", ".join(f"rank {rank}: {2 * size / (1 << 20):.3g}" for rank, size in enumerate(sizes))
        raise PeersDisagreeError(
            f"ranks have different settings of DEEPEP_NVSHMEM_WINDOW_MB ({listing}). Set it alike on every rank.",
            phase="construction",
        )
    return own


def _heads(num_rows: int, device: torch.device) -> torch.Tensor:
    return torch.empty((num_rows, _WIDTH), dtype=torch.int32, device=device)
