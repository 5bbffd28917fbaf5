"""Normal mode: rows go once to every rank that holds one of their experts, and come back to be summed over ranks.

Symbols: ``T`` tokens of this rank, ``K`` choices per token, ``H`` hidden size, ``S`` scales per row, ``N`` ranks, ``D``
nodes, ``E`` experts, ``L = E / N``, ``R`` received rows.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch

from deep_ep.backend import (
    CombineRequest,
    CombineResult,
    DispatchLayout,
    DispatchRequest,
    DispatchResult,
    NormalBackend,
    Operation,
)
from deep_ep.errors import ArgumentError, PeersDisagreeError
from deep_ep.headers import dtype_code

from . import handles, rows
from .handles import Route
from .routing import is_token_in_node, layout_of, local_choices, tokens_by_destination
from .scratch import Scratch
from .session import Call, Session
from .sums import sum_over_ranks


class ReferenceNormal(NormalBackend):
    """Normal mode over an all-to-all of packed rows. The host waits in every call."""

    def __init__(self, session: Session) -> None:
        self._session = session
        self._facts = session.facts
        self._stream = torch.cuda.Stream(self._facts.device) if self._facts.device.type == "cuda" else None
        self._scratch = Scratch(self._facts.device)
        self._is_destroyed = False
        session.acquire()

    @property
    def comm_stream(self) -> torch.cuda.Stream | None:
        return self._stream

    def layout(
        self, topk_idx: torch.Tensor, num_experts: int, output_stream: torch.cuda.Stream | None = None
    ) -> DispatchLayout:
        return layout_of(
            topk_idx,
            num_experts=num_experts,
            num_ranks=self._facts.num_ranks,
            ranks_per_node=self._facts.ranks_per_node,
        )

    def dispatch(self, request: DispatchRequest) -> DispatchResult:
        return self._fresh_dispatch(request) if request.handle is None else self._cached_dispatch(request)

    def _fresh_dispatch(self, request: DispatchRequest) -> DispatchResult:
        num_ranks, num_nodes, rank = self._facts.num_ranks, self._facts.num_nodes, self._facts.rank
        with self._session.refusing("dispatch"):
            layout = self._checked_layout(request)
            row_fields = _row_fields(request)
        is_token_in_rank = layout.is_token_in_rank
        num_experts = layout.num_tokens_per_expert.shape[0]
        num_local_experts = num_experts // num_ranks
        num_tokens, device = request.x.shape[0], request.x.device
        per_rank = is_token_in_rank.sum(dim=0)
        per_node = is_token_in_node(is_token_in_rank, self._facts.ranks_per_node).sum(dim=0)
        columns = _columns(request)
        columns.append(torch.arange(num_tokens, dtype=torch.int32, device=device)[:, None])
        if request.topk_idx is not None:
            columns.append(request.topk_idx.long())
        if request.topk_weights is not None:
            columns.append(request.topk_weights)

        with self._session.call(
            "dispatch",
            **row_fields,
            num_experts=num_experts,
            num_topk=request.topk_idx.shape[1] if request.topk_idx is not None else 0,
            has_weights=int(request.topk_weights is not None),
            expert_alignment=request.expert_alignment,
            num_worst_tokens=request.num_worst_tokens,
        ) as call:
            table = call.gather_counts([*per_rank.tolist(), *per_node.tolist(), *layout.num_tokens_per_expert.tolist()])
            rank_counts, node_counts, expert_counts = table.split([num_ranks, num_nodes, num_experts], dim=1)
            _check_worst(rank_counts, request.num_worst_tokens)
            num_rows = int(rank_counts[:, rank].sum())
            x, *rest = _send(
                call,
                columns,
                is_token_in_rank,
                rank_counts[rank].tolist(),
                rank_counts[:, rank].tolist(),
                num_padding=max(0, request.num_worst_tokens - num_rows),
            )
            scales = rest.pop(0) if request.scales is not None else None
            src_tokens = rest.pop(0).flatten()
            src_tokens[num_rows:] = -1
            handle = handles.build(
                self._facts,
                call,
                is_token_in_rank=is_token_in_rank,
                rank_counts=rank_counts,
                node_counts=node_counts,
                src_tokens=src_tokens,
            )

        topk_idx = topk_weights = None
        if request.topk_idx is not None:
            topk_idx = rest.pop(0)
            topk_idx[num_rows:] = -1
            topk_weights = rest.pop(0) if request.topk_weights is not None else None
            topk_idx, topk_weights = local_choices(
                topk_idx, topk_weights, rank=rank, num_local_experts=num_local_experts
            )
        own_experts = slice(rank * num_local_experts, (rank + 1) * num_local_experts)
        per_own_expert = expert_counts[:, own_experts].sum(dim=0).tolist()
        return DispatchResult(
            recv_x=x,
            recv_scales=scales,
            recv_topk_idx=topk_idx,
            recv_topk_weights=topk_weights,
            num_recv_tokens_per_expert=(
                []
                if request.num_worst_tokens
                else [_round_up(count, request.expert_alignment) for count in per_own_expert]
            ),
            handle=handle,
        )

    def _cached_dispatch(self, request: DispatchRequest) -> DispatchResult:
        assert request.handle is not None
        with self._session.refusing("cached_dispatch"):
            route = handles.read(request.handle, self._facts)
            if route.is_token_in_rank.shape[0] != request.x.shape[0]:
                raise ArgumentError(
                    f"dispatch (cached): x has {request.x.shape[0]} tokens, the handle's dispatch had "
                    f"{route.is_token_in_rank.shape[0]}."
                )
            row_fields = _row_fields(request)
        with self._session.call("cached_dispatch", **row_fields) as call:
            self._check_same_dispatch(call, "cached_dispatch", route)
            x, *rest = _send(
                call,
                _columns(request),
                route.is_token_in_rank,
                route.send_counts,
                route.recv_counts,
                num_padding=route.num_recv_rows - sum(route.recv_counts),
            )
        return DispatchResult(recv_x=x, recv_scales=rest[0] if rest else None)

    def combine(self, request: CombineRequest) -> CombineResult:
        with self._session.refusing("combine"):
            route = handles.read(request.handle, self._facts)
            num_tokens = route.is_token_in_rank.shape[0]
            if request.x.shape[0] != route.num_recv_rows:
                raise ArgumentError(
                    f"combine: x has {request.x.shape[0]} rows, the handle's dispatch delivered {route.num_recv_rows}."
                )
            for bias in request.biases:
                if bias.shape != (num_tokens, request.x.shape[1]):
                    raise ArgumentError(
                        f"combine: a bias has shape {tuple(bias.shape)}; it has to be "
                        f"{(num_tokens, request.x.shape[1])}."
                    )
        columns = [request.x] + ([request.topk_weights] if request.topk_weights is not None else [])
        with self._session.call(
            "combine",
            hidden=request.x.shape[1],
            dtype=dtype_code(request.x.dtype),
            num_topk=request.topk_weights.shape[1] if request.topk_weights is not None else 0,
            has_weights=int(request.topk_weights is not None),
            num_tokens=request.x.shape[0],
        ) as call:
            self._check_same_dispatch(call, "combine", route)
            # Rows lie by source rank already, which is where they go back to; padding stays.
            packed = rows.pack(columns)[: sum(route.recv_counts)]
            received, _ = call.all_to_all(packed, route.recv_counts, route.send_counts)
        x, *weights = rows.unpack(received, like=columns)
        tokens = tokens_by_destination(route.is_token_in_rank).split(route.send_counts)
        combined_x = sum_over_ranks(
            x.split(route.send_counts),
            tokens,
            num_tokens=num_tokens,
            ranks_per_node=self._facts.ranks_per_node,
            biases=request.biases,
            dtype=torch.bfloat16,
        )
        combined_weights = None
        if weights:
            combined_weights = sum_over_ranks(
                weights[0].split(route.send_counts),
                tokens,
                num_tokens=num_tokens,
                ranks_per_node=self._facts.ranks_per_node,
                dtype=torch.float32,
            )
        return CombineResult(combined_x=combined_x, combined_topk_weights=combined_weights)

    def _checked_layout(self, request: DispatchRequest) -> DispatchLayout:
        """The layout of a fresh dispatch. Raises `ArgumentError` where it contradicts itself or ``topk_idx``."""
        layout = request.layout
        assert layout is not None
        num_experts = layout.num_tokens_per_expert.shape[0]
        if num_experts == 0 or num_experts % self._facts.num_ranks:
            raise ArgumentError(
                f"dispatch: num_tokens_per_expert has {num_experts} entries; the number of experts has to be a "
                f"multiple of the {self._facts.num_ranks} ranks."
            )
        given: dict[str, tuple[torch.Tensor, torch.Tensor]] = {}
        if request.topk_idx is not None:
            if bool(((request.topk_idx < -1) | (request.topk_idx >= num_experts)).any()):
                raise ArgumentError(f"dispatch: topk_idx has values outside -1 to {num_experts - 1}.")
            true = self.layout(request.topk_idx, num_experts)
            given["is_token_in_rank"] = (layout.is_token_in_rank, true.is_token_in_rank)
            given["num_tokens_per_expert"] = (layout.num_tokens_per_expert, true.num_tokens_per_expert)
        per_rank = layout.is_token_in_rank.sum(dim=0, dtype=torch.int32)
        given["num_tokens_per_rank"] = (layout.num_tokens_per_rank, per_rank)
        if layout.num_tokens_per_rdma_rank is not None:
            in_node = is_token_in_node(layout.is_token_in_rank, self._facts.ranks_per_node)
            given["num_tokens_per_rdma_rank"] = (layout.num_tokens_per_rdma_rank, in_node.sum(dim=0, dtype=torch.int32))
        for name, (value, expected) in given.items():
            if not torch.equal(value, expected):
                place = tuple((value != expected).nonzero()[0].tolist()) if value.shape == expected.shape else ()
                raise ArgumentError(
                    f"dispatch: {name} does not fit the routing (first difference at {place}). Pass what "
                    "get_dispatch_layout returned for these topk_idx."
                )
        return layout

    def _check_same_dispatch(self, call: Call, operation: Operation, route: Route) -> None:
        """Raise the same error on every rank unless all handles are of one dispatch."""
        table = call.gather_counts([*route.send_counts, *route.recv_counts])
        sent, received = table.split(self._facts.num_ranks, dim=1)
        wrong = (sent != received.t()).nonzero()
        if wrong.shape[0]:
            source, destination = wrong[0].tolist()
            raise PeersDisagreeError(
                f"{operation}: ranks pass handles of different dispatches (rank {source}: {sent[source, destination]} "
                f"tokens for rank {destination}; rank {destination}: {received[destination, source]} rows from rank "
                f"{source}). Pass the handle of the same dispatch on every rank.",
                ranks=(source, destination),
                phase=operation,
            )

    # --- the rest ---------------------------------------------------------------------------------------------------

    def refuse(self, operation: Operation, reason: str) -> None:
        self._session.refuse(operation, reason)

    def local_tensor(self, num_bytes: int) -> torch.Tensor:
        return self._scratch.at_least(num_bytes)

    def placement(self) -> Mapping[str, str]:
        way = self._session.transport.description
        return {"recv_x": f"packed, {way}, unpacked", "combined_x": f"packed, {way}, summed"}

    def abort(self) -> None:
        self._session.abort()

    def destroy(self) -> None:
        if not self._is_destroyed:
            self._is_destroyed = True
            self._scratch.release()
            self._session.release()


def _columns(request: DispatchRequest) -> list[torch.Tensor]:
    return [request.x] + ([request.scales] if request.scales is not None else [])


def _row_fields(request: DispatchRequest) -> dict[str, int]:
    """Header fields that describe the rows. Raises `ArgumentError` for a dtype that does not travel."""
    try:
        dtype = dtype_code(request.x.dtype)
    except ValueError:
        raise ArgumentError(
            f"dispatch: x has dtype {request.x.dtype}, which no backend moves. View it as uint8."
        ) from None
    return {
        "hidden": request.x.shape[1],
        "dtype": dtype,
        "num_scales": request.scales.shape[1] if request.scales is not None else 0,
        "scale_dtype": dtype_code(request.scales.dtype) if request.scales is not None else 0,
        "num_tokens": request.x.shape[0],
    }


def _check_worst(rank_counts: torch.Tensor, num_worst_tokens: int) -> None:
    """Every rank sees all counts, so every rank raises."""
    totals = rank_counts.sum(dim=0)
    most = int(totals.argmax())
    if num_worst_tokens and int(totals[most]) > num_worst_tokens:
        raise ArgumentError(
            f"dispatch: rank {most} would receive {int(totals[most])} rows, but num_worst_tokens allows "
            f"{num_worst_tokens}. Nothing was sent. Raise num_worst_tokens: the tokens of all ranks together always "
            "suffice."
        )


def _send(
    call: Call,
    columns: Sequence[torch.Tensor],
    is_token_in_rank: torch.Tensor,
    send_counts: Sequence[int],
    recv_counts: Sequence[int],
    *,
    num_padding: int,
) -> list[torch.Tensor]:
    """``columns`` of the tokens that come here, by source rank, then by token; ``num_padding`` zero rows after."""
    packed = rows.pack(columns)[tokens_by_destination(is_token_in_rank)]
    received, _ = call.all_to_all(packed, send_counts, recv_counts)
    if num_padding:
        received = torch.cat([received, received.new_zeros((num_padding, received.shape[1]))])
    return rows.unpack(received, like=columns)


def _round_up(count: int, alignment: int) -> int:
    return (count + alignment - 1) // alignment * alignment
