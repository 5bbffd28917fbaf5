"""Low-latency mode: a row for each expert of a token, in an expert-major layout, and weighted sums on the way back.

Symbols: ``T`` tokens of this rank, ``K`` choices per token, ``H`` hidden size, ``N`` ranks, ``E`` experts,
``L = E / N`` experts of one rank, ``X`` the most tokens a rank may send, ``M = N * X`` rows per local expert, ``n``
rows that travel.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

import torch

from deep_ep.backend import (
    LowLatencyBackend,
    LowLatencyCombineRequest,
    LowLatencyCombineResult,
    LowLatencyDispatchRequest,
    LowLatencyDispatchResult,
    Operation,
)
from deep_ep.errors import ArgumentError, PeerError, PeersDisagreeError
from deep_ep.handles import LowLatencyHandle
from deep_ep.headers import dtype_code
from deep_ep.outstanding import Outstanding

from . import expert_major, fp8, logfmt, rows
from .expert_major import ExpertMajor
from .scratch import Scratch
from .session import Call, Session
from .sums import sum_over_choices, sum_over_ranks_of_choices

_USE_FP8, _ROUND_SCALE, _USE_UE8M0, _USE_LOGFMT = 1, 2, 4, 8
# Zero-copy buffers are remembered for this many handles: two in flight, two being written.
_MAX_COMBINE_BUFFERS = 4
# Extra columns of such a buffer, so that a client which ignores its row stride notices.
_COMBINE_BUFFER_PADDING = 8
# All bits set: NaN in bf16, e4m3 and float32, and -1 in integers.
_POISON = 0xFF


class ReferenceLowLatency(LowLatencyBackend):
    """Low-latency mode over the same exchanges as normal mode. The host waits in the call, never in ``receive``."""

    def __init__(self, session: Session) -> None:
        self._session = session
        self._facts = session.facts
        self._stream = torch.cuda.Stream(self._facts.device) if self._facts.device.type == "cuda" else None
        self._scratch = Scratch(self._facts.device)
        self._outstanding = Outstanding()
        self._combine_buffers: dict[int, torch.Tensor] = {}
        self._is_destroyed = False
        session.acquire()

    @property
    def comm_stream(self) -> torch.cuda.Stream | None:
        return self._stream

    # --- dispatch ---------------------------------------------------------------------------------------------------

    def dispatch(self, request: LowLatencyDispatchRequest) -> LowLatencyDispatchResult:
        num_ranks = self._facts.num_ranks
        with self._session.refusing("low_latency_dispatch"):
            self._outstanding.check_room("low_latency_dispatch")
            self._check_dispatch(request)
        num_local_experts = request.num_experts // num_ranks
        experts, tokens = expert_major.routes(request.topk_idx)
        place_and_token = torch.stack([experts % num_local_experts, tokens], dim=1).to(torch.int32)
        columns = _cast(request)
        packed = torch.cat([rows.pack(columns)[tokens], rows.pack([place_and_token])], dim=1)
        wait = _Wait(self._session)
        with self._session.call(
            "low_latency_dispatch",
            hidden=request.x.shape[1],
            dtype=dtype_code(request.x.dtype),
            num_experts=request.num_experts,
            num_topk=request.topk_idx.shape[1],
            has_weights=int(request.topk_weights is not None),
            max_tokens=request.max_tokens,
            flags=request.use_fp8 * _USE_FP8 | request.round_scale * _ROUND_SCALE | request.use_ue8m0 * _USE_UE8M0,
            num_tokens=request.x.shape[0],
        ) as call:
            received, src_ranks = self._exchange(call, packed, experts // num_local_experts, wait)
            *values, place_and_token = rows.unpack(received, like=[*columns, place_and_token])
            local_experts, src_tokens = place_and_token.long().unbind(dim=1)
            _check_bounds("low_latency_dispatch", local_experts, num_local_experts)
            _check_bounds("low_latency_dispatch", src_tokens, request.max_tokens)
            placed = expert_major.place(
                local_experts, src_ranks, num_local_experts=num_local_experts, num_ranks=num_ranks
            )
            _check_bounds("low_latency_dispatch", placed.count, request.max_tokens + 1)
        result, receive = self._dispatch_outputs(request, placed, values, src_tokens, wait)
        if request.split:
            return LowLatencyDispatchResult(**result, receive=self._outstanding.begin(receive))
        receive()
        return LowLatencyDispatchResult(**result, receive=None)

    def _dispatch_outputs(
        self,
        request: LowLatencyDispatchRequest,
        placed: ExpertMajor,
        values: list[torch.Tensor],
        src_tokens: torch.Tensor,
        wait: _Wait,
    ) -> tuple[dict[str, Any], Callable[[], None]]:
        """Poisoned outputs, and what fills them."""
        num_ranks, device = self._facts.num_ranks, request.x.device
        num_local_experts = request.num_experts // num_ranks
        shape = (num_local_experts, num_ranks * request.max_tokens)
        recv_x = _poisoned((*shape, values[0].shape[1]), values[0].dtype, device)
        recv_scales = None
        if len(values) > 1:
            by_scale = _poisoned((shape[0], values[1].shape[1], shape[1]), values[1].dtype, device)
            recv_scales = by_scale.transpose(1, 2)
        recv_count = _poisoned(shape[:1], torch.int32, device)
        handle = LowLatencyHandle(
            src_info=_poisoned(shape, torch.int32, device),
            layout_range=_poisoned((num_local_experts, num_ranks), torch.int64, device),
            max_tokens=request.max_tokens,
            hidden=request.x.shape[1],
            num_experts=request.num_experts,
        )
        where = (placed.expert, placed.row)
        stats, wait_stats = request.cumulative_local_expert_recv_stats, request.wait_recv_cost_stats

        def receive() -> None:
            recv_x.view(torch.uint8)[where] = values[0].view(torch.uint8)[placed.order]
            if recv_scales is not None:
                recv_scales[where] = values[1][placed.order]
            recv_count.copy_(placed.recv_count)
            handle.src_info[where] = src_tokens[placed.order].to(torch.int32)
            handle.layout_range.copy_(placed.layout_range)
            if stats is not None:
                stats.add_(placed.recv_count)
            wait.add_to(wait_stats)

        result = {
            "recv_x": recv_x,
            "recv_scales": recv_scales,
            "recv_count": recv_count,
            "handle": handle.to_tuple(),
        }
        return result, receive

    # --- combine ----------------------------------------------------------------------------------------------------

    def combine(self, request: LowLatencyCombineRequest) -> LowLatencyCombineResult:
        num_ranks = self._facts.num_ranks
        with self._session.refusing("low_latency_combine"):
            self._outstanding.check_room("low_latency_combine")
            handle = self._checked_handle(request.handle)
            x = self._checked_rows(request, handle)
            _check_topk("low_latency_combine", request.topk_idx, handle.num_experts)
        num_tokens = request.topk_idx.shape[0]
        num_local_experts = handle.num_experts // num_ranks
        src_ranks, local_experts, row = expert_major.rows_by_source(handle.layout_range)
        expert_and_token = torch.stack(
            [local_experts + self._facts.rank * num_local_experts, handle.src_info[local_experts, row].long()], dim=1
        ).to(torch.int32)
        columns = [x[local_experts, row], expert_and_token]
        # A choice whose rank was masked in dispatch has no row; where no rank can be missing, all have.
        expected = torch.bincount(
            expert_major.routes(request.topk_idx)[0] // num_local_experts, minlength=num_ranks
        ).tolist()
        wait = _Wait(self._session)
        with self._session.call(
            "low_latency_combine",
            hidden=handle.hidden,
            dtype=dtype_code(x.dtype),
            num_experts=handle.num_experts,
            num_topk=request.topk_idx.shape[1],
            has_weights=1,
            max_tokens=handle.max_tokens,
            flags=request.use_logfmt * _USE_LOGFMT,
            num_tokens=num_tokens,
        ) as call:
            received, _ = self._exchange(call, rows.pack(columns), src_ranks, wait, expected)
            values, expert_and_token = rows.unpack(received, like=columns)
            experts, tokens = expert_and_token.long().unbind(dim=1)
            _check_bounds("low_latency_combine", experts, handle.num_experts)
            _check_bounds("low_latency_combine", tokens, handle.max_tokens)
        is_known = tokens < num_tokens
        row_of_choice = expert_major.row_of_choice(request.topk_idx, experts[is_known], tokens[is_known])
        values = values[is_known]
        if not self._session.options.enable_shrink and bool(((row_of_choice < 0) & (request.topk_idx >= 0)).any()):
            raise ArgumentError(
                "low_latency_combine: topk_idx names experts to which these tokens were not dispatched. Pass the "
                "topk_idx of the dispatch that returned this handle."
            )
        combined = self._sum(request, values, row_of_choice, num_local_experts)
        out = request.out if request.out is not None else torch.empty_like(combined)

        def receive() -> None:
            out.copy_(combined)
            wait.add_to(request.wait_recv_cost_stats)

        if request.split:
            out.fill_(torch.nan)
            return LowLatencyCombineResult(combined_x=out, receive=self._outstanding.begin(receive))
        receive()
        return LowLatencyCombineResult(combined_x=out, receive=None)

    def _sum(
        self,
        request: LowLatencyCombineRequest,
        values: torch.Tensor,
        row_of_choice: torch.Tensor,
        num_local_experts: int,
    ) -> torch.Tensor:
        # What a row looks like after its way does not depend on where it is computed, so rows come here as they are
        # and the partial sums of other ranks are made here too.
        travelled = logfmt.round_trip if request.use_logfmt else torch.Tensor.float
        if self._session.options.ll_reduce == "expert":
            return sum_over_choices(values, row_of_choice, request.topk_weights, travelled=travelled)
        return sum_over_ranks_of_choices(
            values,
            row_of_choice,
            request.topk_weights,
            request.topk_idx.long() // num_local_experts,
            num_ranks=self._facts.num_ranks,
            travelled=travelled,
        )

    def next_combine_buffer(self, handle: tuple[Any, ...]) -> torch.Tensor:
        typed = LowLatencyHandle.from_tuple(handle)
        key = typed.src_info.data_ptr()
        shape = (*typed.src_info.shape, typed.hidden)
        known = self._combine_buffers.pop(key, None)
        if known is None or known.shape != shape:
            padded = _poisoned((*shape[:2], shape[2] + _COMBINE_BUFFER_PADDING), torch.bfloat16, typed.src_info.device)
            known = padded[..., : typed.hidden]
        self._combine_buffers[key] = known
        while len(self._combine_buffers) > _MAX_COMBINE_BUFFERS:
            del self._combine_buffers[next(iter(self._combine_buffers))]
        return known

    # --- both directions --------------------------------------------------------------------------------------------

    def _exchange(
        self,
        call: Call,
        packed: torch.Tensor,
        dst_ranks: torch.Tensor,
        wait: _Wait,
        expected: list[int] | None = None,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Send each row to its rank and get what comes; leave out rows of and for ranks that do not take part.

        Args:
            packed: uint8 ``[n, bytes]`` by destination.
            dst_ranks: int64 ``[n]``, ascending.
            expected: how many rows have to come from each rank; compared on every rank unless ranks may be missing.

        Returns:
            Rows by source rank, and the source rank of each row.
        """
        num_ranks, rank = self._facts.num_ranks, self._facts.rank
        counts = torch.bincount(dst_ranks, minlength=num_ranks).tolist()
        table = call.gather_counts([wait.started_ns, *counts, *(expected or [])])
        sent = table[:, 1 : 1 + num_ranks]
        if expected is not None and not self._session.options.enable_shrink:
            _check_same_dispatch(sent, table[:, 1 + num_ranks :])
        takes_part = torch.zeros(num_ranks, dtype=torch.bool, device=packed.device)
        takes_part[list(call.ranks)] = True
        received, recv_counts = call.all_to_all(
            packed[takes_part[dst_ranks]],
            [count if r in call.ranks else 0 for r, count in enumerate(counts)],
            sent[:, rank].tolist(),
        )
        wait.end(table[:, 0], call.ranks)
        repeats = torch.tensor(recv_counts, device=packed.device)
        return received, torch.repeat_interleave(torch.arange(num_ranks, device=packed.device), repeats)

    def _check_dispatch(self, request: LowLatencyDispatchRequest) -> None:
        where = "low_latency_dispatch"
        num_tokens, hidden = request.x.shape
        if num_tokens > request.max_tokens:
            raise ArgumentError(f"{where}: x has {num_tokens} tokens, this call allows {request.max_tokens}.")
        if request.num_experts % self._facts.num_ranks:
            raise ArgumentError(
                f"{where}: num_experts is {request.num_experts}; it has to be a multiple of the "
                f"{self._facts.num_ranks} ranks."
            )
        needed = fp8.BLOCK * (fp8.SCALES_PER_INT32 if request.use_ue8m0 else 1)
        if request.use_fp8 and hidden % needed:
            raise ArgumentError(f"{where}: hidden is {hidden}; this cast needs a multiple of {needed}.")
        _check_topk(where, request.topk_idx, request.num_experts)

    def _checked_handle(self, parts: tuple[Any, ...]) -> LowLatencyHandle:
        where = "low_latency_combine"
        handle = LowLatencyHandle.from_tuple(parts)
        num_ranks = self._facts.num_ranks
        rows_shape = (handle.num_experts // num_ranks, num_ranks * handle.max_tokens)
        if tuple(handle.src_info.shape) != rows_shape or handle.layout_range.shape != (rows_shape[0], num_ranks):
            raise ArgumentError(
                f"{where}: the handle's tensors have shapes {tuple(handle.src_info.shape)} and "
                f"{tuple(handle.layout_range.shape)}, on this buffer they have {rows_shape} and "
                f"{(rows_shape[0], num_ranks)}. Pass the handle that low_latency_dispatch on this buffer returned."
            )
        begin, count = expert_major.unpack_range(handle.layout_range)
        if bool((begin < 0).any()):
            raise ArgumentError(f"{where}: the handle's dispatch has not been received yet. Call its hook first.")
        if bool((begin + count > rows_shape[1]).any()):
            raise ArgumentError(f"{where}: the handle names rows beyond {rows_shape[1]}. Pass it as it was returned.")
        return handle

    def _checked_rows(self, request: LowLatencyCombineRequest, handle: LowLatencyHandle) -> torch.Tensor:
        where = "low_latency_combine"
        if request.use_logfmt and handle.hidden % logfmt.BLOCK:
            raise ArgumentError(f"{where}: hidden is {handle.hidden}; LogFMT needs a multiple of {logfmt.BLOCK}.")
        x = request.x
        if request.zero_copy:
            known = self._combine_buffers.get(handle.src_info.data_ptr())
            if known is None:
                raise ArgumentError(
                    f"{where}: zero_copy without a buffer for this handle. Write the rows to the tensor that "
                    "get_next_low_latency_combine_buffer(handle) returns."
                )
            x = known
        expected = (*handle.src_info.shape, handle.hidden)
        if tuple(x.shape) != expected:
            raise ArgumentError(f"{where}: x has shape {tuple(x.shape)}; it has to be {expected}, as in dispatch.")
        return x

    # --- the rest ---------------------------------------------------------------------------------------------------

    def clean(self, max_tokens: int, hidden: int, num_experts: int) -> None:
        with self._session.call("clean", max_tokens=max_tokens, hidden=hidden, num_experts=num_experts):
            self._combine_buffers.clear()

    def refuse(self, operation: Operation, reason: str) -> None:
        self._session.refuse(operation, reason)

    def update_mask(self, rank: int, masked: bool) -> None:
        self._check_masks("update_mask")
        if not 0 <= rank < self._facts.num_ranks or rank == self._facts.rank:
            raise ArgumentError(
                f"update_mask: rank is {rank}; it has to be another rank of 0 to {self._facts.num_ranks - 1}."
            )
        (self._session.masked.add if masked else self._session.masked.discard)(rank)

    def query_mask(self, out: torch.Tensor) -> None:
        self._check_masks("query_mask")
        masked = [int(r in self._session.masked) for r in range(self._facts.num_ranks)]
        out.copy_(torch.tensor(masked, dtype=torch.int32))

    def clean_mask(self) -> None:
        self._check_masks("clean_mask")
        self._session.masked.clear()

    def _check_masks(self, what: str) -> None:
        if not self._session.options.enable_shrink:
            raise ArgumentError(f"{what}: ranks can be masked only in a buffer built with enable_shrink=True.")

    def local_tensor(self, num_bytes: int) -> torch.Tensor:
        return self._scratch.at_least(num_bytes)

    def abort(self) -> None:
        self._session.abort()

    def destroy(self) -> None:
        if not self._is_destroyed:
            self._is_destroyed = True
            self._combine_buffers.clear()
            self._scratch.release()
            self._session.release()


class _Wait:
    """How long one call waited for each rank: from its own start to the other's, by their wall clocks.

    An all-to-all ends for all sources at once, so the arrival of a single source's rows cannot be timed; what keeps a
    rank waiting is the late start of another. Never more than the call took, whatever the clocks say. A rank that was
    lost during the call cost all of it.
    """

    def __init__(self, session: Session) -> None:
        self._own = session.facts.rank
        self._awaited = set(range(session.facts.num_ranks)) - session.masked
        self._begun_ns = time.perf_counter_ns()
        self._waited = torch.zeros(session.facts.num_ranks, dtype=torch.int64)
        self.started_ns = time.time_ns()

    def end(self, started_ns: torch.Tensor, ranks: tuple[int, ...]) -> None:
        """The exchange is over: ``started_ns`` int64 ``[N]`` of all ranks, ``ranks`` took part to the end."""
        total = time.perf_counter_ns() - self._begun_ns
        came = torch.zeros_like(self._waited, dtype=torch.bool)
        came[list(ranks)] = True
        awaited = torch.zeros_like(came)
        awaited[list(self._awaited)] = True
        behind = (started_ns - self.started_ns).clamp(0, total)
        self._waited = torch.where(came, behind, torch.where(awaited, total, 0))
        self._waited[self._own] = 0

    def add_to(self, stats: torch.Tensor | None) -> None:
        """Add nanoseconds to int64 ``[N]``."""
        if stats is not None:
            stats.add_(self._waited.to(stats.device))


def _cast(request: LowLatencyDispatchRequest) -> list[torch.Tensor]:
    """The rows as they travel: bf16, or e4m3 and its scales."""
    if not request.use_fp8:
        return [request.x]
    q, scale = fp8.cast(request.x, round_scale=request.round_scale or request.use_ue8m0)
    return [q, fp8.pack_ue8m0(scale) if request.use_ue8m0 else scale]


def _poisoned(shape: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> torch.Tensor:
    """A tensor of NaN, or of -1 for integers: whoever reads it before it was filled will notice."""
    values = torch.empty(shape, dtype=dtype, device=device)
    if values.numel():
        values.view(torch.uint8).fill_(_POISON)
    return values


def _check_topk(where: str, topk_idx: torch.Tensor, num_experts: int) -> None:
    if bool(((topk_idx < -1) | (topk_idx >= num_experts)).any()):
        raise ArgumentError(f"{where}: topk_idx has values outside -1 to {num_experts - 1}.")


def _check_bounds(where: str, indices: torch.Tensor, bound: int) -> None:
    """Numbers that peers sent are checked before they index memory."""
    if bool(((indices < 0) | (indices >= bound)).any()):
        raise PeerError(f"{where}: a peer sent a number outside 0 to {bound - 1}. Destroy this buffer.", phase=where)


def _check_same_dispatch(sent: torch.Tensor, expected: torch.Tensor) -> None:
    """Raise the same error on every rank unless each brings back what its peers sent to it.

    Args:
        sent: int64 ``[N, N]``, rows from each rank (row) to each rank (column).
        expected: int64 ``[N, N]``, rows that each rank (row) awaits from each rank (column).
    """
    wrong = (sent != expected.t()).nonzero()
    if wrong.shape[0]:
        source, destination = wrong[0].tolist()
        raise PeersDisagreeError(
            f"low_latency_combine: rank {source} has {sent[source, destination]} rows for rank {destination}, which "
            f"awaits {expected[destination, source]}. Pass the handle and the topk_idx of one dispatch on every rank.",
            ranks=(source, destination),
            phase="low_latency_combine",
        )
