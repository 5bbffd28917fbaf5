"""Low-latency mode: a row for each expert of a token, in an expert-major layout, and weighted sums on the way back.

Symbols: ``T`` tokens of this rank, ``K`` choices per token, ``H`` hidden size, ``N`` ranks, ``E`` experts, ``L = E / N``
experts of one rank, ``X`` the most tokens a rank may send, ``M = N * X`` rows per local expert.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from functools import partial
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
from deep_ep.errors import ArgumentError, BufferStateError, PeerError, PeersDisagreeError
from deep_ep.handles import LowLatencyHandle
from deep_ep.headers import dtype_code

from . import expert_major, fp8, logfmt, rows
from .expert_major import ExpertMajor
from .outstanding import Outstanding
from .routing import exclusive_sum
from .scratch import Scratch
from .session import Call, Session
from .sums import sum_over_choices, sum_over_ranks_of_choices
from .waits import Waits

_USE_FP8, _ROUND_SCALE, _USE_UE8M0, _USE_LOGFMT = 1, 2, 4, 8
# Buffers handed out for zero-copy combines are remembered for this many handles: two in flight, two being prepared.
_MAX_COMBINE_BUFFERS = 4
# Extra columns of such a buffer, so that clients which ignore its row stride are noticed.
_COMBINE_BUFFER_PADDING = 8


class ReferenceLowLatency(LowLatencyBackend):
    """Low-latency mode over the same exchanges as normal mode. The host waits in every call, not in ``receive``."""

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
        num_ranks, rank = self._facts.num_ranks, self._facts.rank
        num_local_experts = request.num_experts // num_ranks
        hidden, device = request.x.shape[1], request.x.device
        with self._session.refusing("low_latency_dispatch"):
            self._outstanding.check_room("low_latency_dispatch")
            _check_dispatch(request)
        experts, tokens = expert_major.routes(request.topk_idx)
        columns = _cast(request)
        num_row_columns = len(columns)
        columns = [column[tokens] for column in map(_indexable, columns)]
        columns.append(torch.stack([experts % num_local_experts, tokens], dim=1).to(torch.int32))
        like = [*_cast_like(request), columns[-1]]
        waits = Waits(num_ranks, rank)
        with self._session.call("low_latency_dispatch", **_dispatch_fields(request)) as call:
            pass
        raise NotImplementedError(num_row_columns, like, call, waits, hidden, device)
