"""Normal mode across nodes: starts NVSHMEM, allocates outputs and handles, starts the kernels, waits for counts.

``T`` tokens here, ``K`` choices, ``H`` hidden, ``S`` scales, ``N`` ranks, ``D`` nodes, ``P = N / D`` ranks of a node,
``E`` experts, ``R`` rows received here, ``F`` rows that this rank passes on to its node (its own node's included).
"""

from __future__ import annotations

import itertools
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
from .base import INT_BYTES, MAX_LOCAL_EXPERTS, KernelNormal, address_of, call_header, header_fields
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
    """Addresses of int32 arrays that the kernels fill: parts of a handle, and what only one dispatch needs.

    A cached dispatch reads some of them, the others are 0 then.
    """

    send_nvl_head: int
    send_rdma_head: int
    rdma_channel_prefix: int
    gbl_channel_prefix: int
    recv_rdma_channel_prefix: int
    recv_rdma_rank_prefix: int
    recv_gbl_channel_prefix: int
    recv_gbl_rank_prefix: int
    dst_rows: int
    tokens_to_node: int


class RoutingBlock:
    """One block for all of `Routing`, so that a handle keeps alive what its dispatch reads on another stream.

    The kernels need addresses alone. Tensors of the parts are made for the handle once the GPU has its work.
    """

    __slots__ = ("_block", "_num_nodes", "_num_ranks", "_num_tokens", "_starts", "addresses")

    def __init__(
        self, num_tokens: int, num_ranks: int, num_nodes: int, forward_capacity: int, device: torch.device
    ) -> None:
        sizes = Routing(
            send_nvl_head=forward_capacity * _WIDTH,  # first, because its rows are loaded in bulk: 16-byte alignment
            send_rdma_head=num_tokens * num_nodes,
            rdma_channel_prefix=num_nodes,
            gbl_channel_prefix=num_ranks,
            recv_rdma_channel_prefix=num_nodes,
            recv_rdma_rank_prefix=num_nodes,
            recv_gbl_channel_prefix=num_ranks,
            recv_gbl_rank_prefix=num_ranks,
            dst_rows=num_tokens * num_ranks,
            tokens_to_node=num_nodes * num_tokens,
        )
        *starts, num_words = itertools.accumulate(sizes, initial=0)
        self._num_tokens, self._num_ranks, self._num_nodes = num_tokens, num_ranks, num_nodes
        self._block = torch.empty(num_words, dtype=torch.int32, device=device)
        address = self._block.data_ptr()
        self._starts = Routing(*starts)
        self.addresses = Routing(*[address + start * INT_BYTES for start in starts])

    def send_nvl_head(self, num_forward_rows: int) -> torch.Tensor:
        """The first rows of it."""
        return self._block.as_strided((num_forward_rows, _WIDTH), (_WIDTH, 1), self._starts.send_nvl_head)

    def handle(
        self, *, is_token_in_rank: torch.Tensor, recv_src_meta: torch.Tensor, send_nvl_head: torch.Tensor
    ) -> InternodeHandle:
        """The handle of these parts and the block's.

        Its send_rdma_head brings tokens_to_node along (`_kept_tokens`), which spares its cached dispatches a kernel.
        """
        part, starts, num_ranks, num_nodes = self._block.as_strided, self._starts, self._num_ranks, self._num_nodes
        send_rdma_head = part((self._num_tokens, num_nodes), (num_nodes, 1), starts.send_rdma_head)
        # Tensors of inference mode have no version.
        if not send_rdma_head.is_inference():
            kept = _KeptTokens(self._block, self.addresses.tokens_to_node, send_rdma_head._version)
            setattr(send_rdma_head, _TOKENS, kept)
        return InternodeHandle(
            is_token_in_rank=is_token_in_rank,
            rdma_channel_prefix_matrix=part((num_nodes, 1), (1, 1), starts.rdma_channel_prefix),
            gbl_channel_prefix_matrix=part((num_ranks, 1), (1, 1), starts.gbl_channel_prefix),
            recv_rdma_channel_prefix_matrix=part((num_nodes, 1), (1, 1), starts.recv_rdma_channel_prefix),
            recv_rdma_rank_prefix_sum=part((num_nodes,), (1,), starts.recv_rdma_rank_prefix),
            recv_gbl_channel_prefix_matrix=part((num_ranks, 1), (1, 1), starts.recv_gbl_channel_prefix),
            recv_gbl_rank_prefix_sum=part((num_ranks,), (1,), starts.recv_gbl_rank_prefix),
            recv_src_meta=recv_src_meta,
            send_rdma_head=send_rdma_head,
            send_nvl_head=send_nvl_head,
        )


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
        block = RoutingBlock(num_tokens, num_ranks, num_nodes, forward_capacity, device)
        routing, own_heads, outputs = block.addresses, None, None
        if waits:
            self._follow(request.output_stream)  # the outputs are allocated while the counts travel
        else:
            outputs = self._outputs(request, capacity, num_topk, source_shape=(2,))
            if outputs is None:
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
            send_rdma_head=routing.send_rdma_head,
            rdma_channel_prefix=routing.rdma_channel_prefix,
            gbl_channel_prefix=routing.gbl_channel_prefix,
            recv_rdma_channel_prefix=routing.recv_rdma_channel_prefix,
            recv_rdma_rank_prefix=routing.recv_rdma_rank_prefix,
            recv_gbl_channel_prefix=routing.recv_gbl_channel_prefix,
            recv_gbl_rank_prefix=routing.recv_gbl_rank_prefix,
            dst_rows=routing.dst_rows,
            tokens_to_node=routing.tokens_to_node,
        )
        if waits:
            # As in `nvlink`: blocks as large as the last call's are most often right, and then the launch follows at
            # once.
            outputs = self._outputs(request, capacity, num_topk, source_shape=(2,))
        num_recv, num_forward, per_expert = request.num_worst_tokens, forward_capacity, []
        is_launched = outputs is not None and self._launch(
            runtime, request, outputs, routing, forward_capacity, num_experts=num_experts, ticket=ticket
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
                own_heads = torch.empty((forward_capacity, _WIDTH), dtype=torch.int32, device=device)
                routing = routing._replace(send_nvl_head=own_heads.data_ptr())
                outputs = self._outputs_of_known_size(
                    runtime, request, capacity, forward_capacity, num_topk, routing, num_experts
                )
                self._launch(runtime, request, outputs, routing, forward_capacity, num_experts=num_experts)
            self._capacity, self._forward_capacity = capacity, forward_capacity
            num_recv, per_expert = counts.num_recv_tokens, counts.num_recv_tokens_per_expert
            num_forward = counts.num_forward_rows
        # The GPU has its work; everything below takes place meanwhile.
        assert outputs is not None and outputs.src_idx is not None
        outputs.cut(num_recv)
        handle = block.handle(
            is_token_in_rank=layout.is_token_in_rank,
            recv_src_meta=outputs.src_idx.view(torch.uint8),
            send_nvl_head=block.send_nvl_head(num_forward) if own_heads is None else own_heads[:num_forward],
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
    ) -> Outputs:
        """Blocks for rows whose number is known now.

        The peers are on their way already: where the heap is full they are let down in step, and the next call works.
        """
        outputs = self._outputs(request, capacity, num_topk, source_shape=(2,))
        if outputs is not None:
            return outputs
        nothing = Outputs.allocate(request, 0, num_topk, source_shape=(2,))
        self._launch(runtime, request, nothing, routing, forward_capacity, num_experts=num_experts)
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
        num_recv = handle.num_recv_tokens
        outputs = self._outputs(request, size_class(max(num_recv, 1)), 0, source_shape=None)
        if outputs is None:
            raise BufferStateError(f"dispatch: {self._heap_is_full(num_recv)}")
        tokens_to_node = _kept_tokens(handle.send_rdma_head)
        makes_tokens = tokens_to_node == 0
        routing = Routing(
            send_nvl_head=handle.send_nvl_head.data_ptr(),
            send_rdma_head=handle.send_rdma_head.data_ptr(),
            rdma_channel_prefix=handle.rdma_channel_prefix_matrix.data_ptr(),
            gbl_channel_prefix=0,
            recv_rdma_channel_prefix=0,
            recv_rdma_rank_prefix=handle.recv_rdma_rank_prefix_sum.data_ptr(),
            recv_gbl_channel_prefix=0,
            recv_gbl_rank_prefix=handle.recv_gbl_rank_prefix_sum.data_ptr(),
            dst_rows=0,
            tokens_to_node=self._room_for_tokens(handle.num_tokens) if makes_tokens else tokens_to_node,
        )
        self._launch(
            runtime,
            request,
            outputs,
            routing,
            handle.send_nvl_head.shape[0],
            num_experts=self._facts.num_ranks,
            makes_tokens=makes_tokens,
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
        forward_capacity: int,
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
            dst_rows=routing.dst_rows,
            tokens_to_node=routing.tokens_to_node,
            unlisted_rdma_head=routing.send_rdma_head if makes_tokens else 0,
            rdma_channel_prefix=routing.rdma_channel_prefix,
            recv_rdma_rank_prefix=routing.recv_rdma_rank_prefix,
            recv_gbl_rank_prefix=routing.recv_gbl_rank_prefix,
            send_nvl_head=routing.send_nvl_head,
            forward_capacity=forward_capacity,
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

    def _room_for_tokens(self, num_tokens: int) -> int:
        """Where a cached dispatch may list the tokens again, because it was handed clones of a handle's parts.

        One dispatch after the other uses it, in the order of the communication stream.
        """
        num_words, device = self._facts.num_nodes * num_tokens, self._facts.device
        if torch.cuda.is_current_stream_capturing():
            return self._arena.empty_lasting((num_words,), dtype=torch.int32, device=device).data_ptr()
        if self._found_tokens is None or self._found_tokens.numel() < num_words:
            with use_stream(self._stream):
                self._found_tokens = torch.empty(size_class(num_words), dtype=torch.int32, device=device)
        return self._found_tokens.data_ptr()

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


class _KeptTokens(NamedTuple):
    """A list of tokens made by one dispatch.

    The version is that of the handle's part that carries it. It says whether somebody has written to the handle since,
    as with a later handle copied into this one.
    """

    block: torch.Tensor  # in which the list lies
    address: int
    version: int


def _kept_tokens(send_rdma_head: torch.Tensor) -> int:
    """Address of the tokens_to_node that the handle's part has brought along; 0 for none."""
    kept: _KeptTokens | None = getattr(send_rdma_head, _TOKENS, None)
    return kept.address if kept is not None and kept.version == send_rdma_head._version else 0


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
