"""Conformance of a buffer's life: construction, sharing, destruction."""

from __future__ import annotations

import gc
import weakref
from typing import Any

import pytest
import torch

from deep_ep import Buffer, BufferStateError
from deep_ep.backend import Mode
from deep_ep.launch import RankContext

from ..inputs import Case
from ..routing import Routing, uneven_tokens
from . import low_latency_calls as low_latency
from . import normal_calls as normal
from .base import Conformance, Run, Setup


def modes_round_trip(buffer: Buffer, case: Case, context: RankContext, modes: tuple[Mode, ...]) -> None:
    """One checked dispatch and combine in each of these modes, in this order."""
    for mode in modes:
        if mode == "normal":
            recv_x, *_, handle, _ = normal.dispatch(buffer, case, context, normal.NormalOptions())
            normal.combine(buffer, case, context, normal.NormalOptions(), handle, len(recv_x))
        else:
            options = low_latency.LowLatencyOptions()
            buffer.clean_low_latency_buffer(
                low_latency.max_tokens(case, options), case.hidden, case.routing.num_experts
            )
            dispatched = low_latency.dispatch(buffer, case, context, options)
            low_latency.combine(buffer, case, context, options, dispatched)


# --- functions that run on every rank -------------------------------------------------------------------------------


def repeated_construction(context: RankContext, setup: Setup, case: Case, modes: tuple[Mode, ...], times: int) -> None:
    for _ in range(times):
        buffer = setup.buffer(context, low_latency="low_latency" in modes)
        modes_round_trip(buffer, case, context, modes)
        buffer.destroy()


def use_after_destroy(context: RankContext, setup: Setup, case: Case, modes: tuple[Mode, ...]) -> None:
    buffer = setup.buffer(context, low_latency="low_latency" in modes, explicitly_destroy=True)
    runtime = buffer.runtime
    assert runtime is not None
    modes_round_trip(buffer, case, context, modes)
    buffer.destroy()
    buffer.destroy()
    assert buffer.runtime is None
    topk_idx = torch.from_numpy(case.routing.topk_idx(context.rank)).to(context.device)
    x = torch.zeros((len(topk_idx), case.hidden), dtype=torch.bfloat16, device=context.device)
    with pytest.raises(BufferStateError, match="destroyed"):
        buffer.get_dispatch_layout(topk_idx, case.routing.num_experts)
    with pytest.raises(BufferStateError, match="destroyed"):
        buffer.low_latency_dispatch(x, topk_idx, 16, case.routing.num_experts)


def buffers_side_by_side(context: RankContext, setup: Setup, cases: list[Case], modes: tuple[Mode, ...]) -> None:
    """Calls on several buffers alternate; each is destroyed at another time, on odd ranks in another order."""
    buffers = [setup.buffer(context, low_latency="low_latency" in modes) for _ in cases]
    for buffer, case in [*zip(buffers, cases, strict=True), *zip(buffers, reversed(cases), strict=True)]:
        modes_round_trip(buffer, case, context, modes)
    buffers[0].destroy()
    modes_round_trip(buffers[1], cases[0], context, modes)
    for buffer in buffers if context.rank % 2 else reversed(buffers):
        buffer.destroy()


def modes_alternate_on_one_buffer(context: RankContext, setup: Setup, case: Case) -> None:
    buffer = setup.buffer(context, low_latency=True)
    modes_round_trip(buffer, case, context, ("normal", "low_latency", "normal", "low_latency", "normal"))
    buffer.destroy()


def forgotten_buffer(context: RankContext, setup: Setup, case: Case, modes: tuple[Mode, ...]) -> None:
    """Nothing but its user holds a buffer: dropping it without `destroy` releases it, and a new one can be built."""
    for _ in range(3):
        buffer = setup.buffer(context, low_latency="low_latency" in modes)
        modes_round_trip(buffer, case, context, modes)
        reference = weakref.ref(buffer)
        del buffer
        gc.collect()
        assert reference() is None, "something still refers to a buffer that its user dropped"


def sized_by_model_facts(context: RankContext, setup: Setup, case: Case, mode: Any, modes: tuple[Mode, ...]) -> None:
    buffer = Buffer.for_model(
        context.group,
        hidden=case.hidden,
        num_experts=case.routing.num_experts,
        num_topk=case.routing.num_topk,
        max_tokens_per_rank=max(case.routing.num_tokens),
        mode=mode,
        backend=dict.fromkeys(modes, setup.backend),
    )
    assert all(buffer.backends[m] == setup.backend for m in modes)
    modes_round_trip(buffer, case, context, modes)
    buffer.destroy()


def overwritten_scratch(context: RankContext, setup: Setup, case: Case, modes: tuple[Mode, ...]) -> None:
    """What `get_local_buffer_tensor` shows may be overwritten between calls."""
    buffer = setup.buffer(context, low_latency="low_latency" in modes)
    for mode in modes:
        modes_round_trip(buffer, case, context, modes)
        try:
            scratch = buffer.get_local_buffer_tensor(torch.uint8, use_rdma_buffer=mode == "low_latency")
        except BufferStateError:
            continue
        scratch.fill_(0xFF)
        assert scratch.device.type == context.device.type
        modes_round_trip(buffer, case, context, modes)
    buffer.destroy()


# --- the tests ------------------------------------------------------------------------------------------------------


class LifecycleConformance(Conformance):
    """Buffers come, go and live beside each other."""

    def case(self, num_ranks: int, *, seed: int = 1) -> Case:
        routing = Routing(
            num_tokens=uneven_tokens(num_ranks, 6, seed=seed),
            num_experts=2 * num_ranks,
            num_topk=2,
            seed=seed,
        )
        return Case(routing=routing, hidden=128, ranks_per_node=self.ranks_per_node)

    @property
    def modes(self) -> tuple[Mode, ...]:
        served = self.capabilities().modes
        return tuple(mode for mode in ("normal", "low_latency") if mode in served)

    def test_buffer_is_built_and_destroyed_repeatedly(self, run: Run, setup: Setup, num_ranks: int) -> None:
        run(repeated_construction, self.case(num_ranks), self.modes, 10, num_ranks=num_ranks)

    def test_destroy_may_be_called_twice_and_ends_the_buffer(self, run: Run, setup: Setup, num_ranks: int) -> None:
        run(use_after_destroy, self.case(num_ranks), self.modes, num_ranks=num_ranks)

    def test_buffers_live_side_by_side(self, run: Run, setup: Setup, num_ranks: int) -> None:
        cases = [self.case(num_ranks, seed=seed) for seed in (1, 2, 3)]
        run(buffers_side_by_side, cases, self.modes, num_ranks=num_ranks)

    def test_both_modes_alternate_on_one_buffer(self, run: Run, setup: Setup, num_ranks: int) -> None:
        if len(self.modes) < 2:
            pytest.skip(f"backend {self.backend!r} serves {self.modes[0]} mode only")
        run(modes_alternate_on_one_buffer, self.case(num_ranks), num_ranks=num_ranks)

    def test_forgotten_buffer_is_released(self, run: Run, setup: Setup, num_ranks: int) -> None:
        run(forgotten_buffer, self.case(num_ranks), self.modes, num_ranks=num_ranks)

    @pytest.mark.parametrize("mode", ["normal", "low_latency", "both"])
    def test_buffer_sized_by_model_facts(self, run: Run, setup: Setup, num_ranks: int, mode: Any) -> None:
        wanted: tuple[Mode, ...] = ("normal", "low_latency") if mode == "both" else (mode,)
        if not set(wanted) <= set(self.modes):
            pytest.skip(f"backend {self.backend!r} serves {' and '.join(self.modes)} mode only")
        run(sized_by_model_facts, self.case(num_ranks), mode, wanted, num_ranks=num_ranks)

    def test_scratch_may_be_overwritten_between_calls(self, run: Run, setup: Setup, num_ranks: int) -> None:
        run(overwritten_scratch, self.case(num_ranks), self.modes, num_ranks=num_ranks)
