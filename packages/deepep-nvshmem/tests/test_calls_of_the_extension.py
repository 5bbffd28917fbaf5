"""How the backend ``nvlink`` calls its extension, on a machine without a GPU."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from typing import Any

import pytest
import torch

from deep_ep import ArgumentError, BufferStateError, PeerRefusedError, PeerTimeoutError
from deep_ep.backend import BufferOptions, DispatchLayout, DispatchRequest, DispatchResult, GroupFacts
from deepep_nvshmem.normal import NvlinkNormal

EXTENSION = "_nvlink"
NUM_RANKS, NUM_TOKENS, NUM_EXPERTS, NUM_TOPK, HIDDEN = 2, 6, 8, 3, 64


@pytest.fixture
def part(machine: Any) -> Iterator[NvlinkNormal]:
    facts = GroupFacts(
        rank=0,
        num_ranks=NUM_RANKS,
        ranks_per_node=NUM_RANKS,
        device=torch.device("cpu"),
        channel=machine.channel,
    )
    opened = NvlinkNormal(facts, BufferOptions())
    machine.log.clear()
    yield opened
    opened.destroy()


def dispatch(part: NvlinkNormal, machine: Any, **changes: Any) -> DispatchResult:
    layout = DispatchLayout(
        num_tokens_per_rank=torch.zeros(NUM_RANKS, dtype=torch.int32),
        num_tokens_per_rdma_rank=None,
        num_tokens_per_expert=torch.zeros(NUM_EXPERTS, dtype=torch.int32),
        is_token_in_rank=torch.zeros((NUM_TOKENS, NUM_RANKS), dtype=torch.bool),
    )
    arguments: dict[str, Any] = {
        "x": torch.zeros((NUM_TOKENS, HIDDEN), dtype=torch.float8_e4m3fn),
        "scales": torch.zeros((NUM_TOKENS, 2)),
        "layout": layout,
        "topk_idx": torch.zeros((NUM_TOKENS, NUM_TOPK), dtype=torch.int64),
        "topk_weights": torch.zeros((NUM_TOKENS, NUM_TOPK)),
        "output_stream": machine.caller,
    }
    return part.dispatch(DispatchRequest(**(arguments | changes)))


def test_results_have_the_shapes_of_the_contract(part: NvlinkNormal, machine: Any) -> None:
    result = dispatch(part, machine)
    assert result.recv_scales is not None and result.recv_topk_idx is not None and result.recv_topk_weights is not None
    assert result.recv_x.shape == (4, HIDDEN) and result.recv_x.dtype == torch.float8_e4m3fn
    assert result.recv_scales.shape == (4, 2)
    assert result.recv_topk_idx.shape == (4, NUM_TOPK) and result.recv_topk_idx.dtype == torch.int64
    assert result.recv_topk_weights.shape == (4, NUM_TOPK)
    assert result.num_recv_tokens_per_expert == [4] * 4 and result.is_on_output_stream
    shapes = [tuple(p.shape) for p in result.handle or () if p is not None]
    assert shapes == [(2, 2), (2, 1), (2, 1), (4,), (NUM_TOKENS, 2), (NUM_TOKENS, 2)]


def test_kernels_write_to_what_the_handle_holds(part: NvlinkNormal, machine: Any) -> None:
    rank_prefix, _, first_rows, src_idx, _, send_head = dispatch(part, machine).handle or ()
    assert rank_prefix is not None and first_rows is not None and src_idx is not None and send_head is not None
    (notify,), launched = machine.of("notify"), machine.of("dispatch")[-1]
    assert notify["rank_prefix"] == launched["rank_prefix"] == rank_prefix.data_ptr()
    assert notify["send_head"] == launched["send_head"] == send_head.data_ptr()
    assert notify["first_rows"] == first_rows.data_ptr()
    assert launched["recv_src_idx"] == src_idx.data_ptr()
    spans = sorted((t.data_ptr(), t.numel() * 4) for t in (rank_prefix, first_rows, send_head))
    assert all(start + size <= after for (start, size), (after, _) in itertools.pairwise(spans))


def test_the_same_number_of_rows_again_is_launched_behind_its_counts(part: NvlinkNormal, machine: Any) -> None:
    dispatch(part, machine)
    machine.calls.clear()
    dispatch(part, machine)
    (launched,) = machine.of("dispatch")
    assert launched["ticket"] == machine.of("notify")[0]["ticket"] != 0
    assert launched["least_rows"] <= 4 <= launched["capacity"]


@pytest.mark.parametrize("num_rows", [5000, 100])
def test_rows_that_do_not_fit_get_memory_of_their_own(part: NvlinkNormal, machine: Any, num_rows: int) -> None:
    machine.num_rows = 1000
    dispatch(part, machine)
    machine.num_rows = num_rows
    machine.calls.clear()
    result = dispatch(part, machine)
    declined, launched = machine.of("dispatch")
    assert declined["ticket"] != 0 and launched["ticket"] == 0
    assert num_rows <= launched["capacity"] <= num_rows * 9 // 8
    assert launched["recv_x"] == result.recv_x.data_ptr() and result.recv_x.shape == (num_rows, HIDDEN)


def test_a_fixed_number_of_rows_waits_for_nothing(part: NvlinkNormal, machine: Any) -> None:
    machine.is_capturing = True
    result = dispatch(part, machine, num_worst_tokens=1001)
    (launched,) = machine.of("dispatch")
    assert launched["ticket"] == 0 == machine.of("notify")[0]["ticket"] and not machine.of("wait_counts")
    assert launched["capacity"] == 1001 and launched["fill_unused"]
    assert result.recv_x.shape == (1001, HIDDEN) and result.num_recv_tokens_per_expert == []


def test_own_stream_waits_after_each_allocation_on_the_callers(part: NvlinkNormal, machine: Any) -> None:
    machine.num_rows = 50
    dispatch(part, machine)
    waits = "own waits for caller"
    assert machine.log == [waits, "notify", "dispatch", waits, "dispatch"]
    machine.log.clear()
    part.layout(torch.zeros((NUM_TOKENS, NUM_TOPK), dtype=torch.int64), NUM_EXPERTS, machine.caller)  # type: ignore[arg-type]
    assert machine.log == [waits, "layout"]
    assert {arguments["stream"] for _, arguments in machine.calls if "stream" in arguments} == {99}
    machine.log.clear()
    assert not dispatch(part, machine, output_stream=None).is_on_output_stream
    assert machine.log == ["notify", "dispatch"]


def test_what_another_rank_refused_is_raised_with_its_reason(part: NvlinkNormal, machine: Any) -> None:
    machine.mismatch_mask, machine.refusal = 2, "scales have 0 columns"
    with pytest.raises(PeerRefusedError, match="scales have 0 columns"):
        dispatch(part, machine)
    # notify may still be writing to memory that the caller's stream gets back.
    assert machine.log == ["own waits for caller", "notify", "dispatch", "caller waits for own"]
    machine.mismatch_mask = 0
    dispatch(part, machine)


def test_counts_that_never_come_break_the_buffer(part: NvlinkNormal, machine: Any) -> None:
    machine.has_counts = False
    with pytest.raises(PeerTimeoutError, match="heard nothing"):
        dispatch(part, machine)
    machine.has_counts = True
    with pytest.raises(BufferStateError, match="failed before"):
        dispatch(part, machine)


def test_a_capture_without_fixed_rows_is_refused_before_anything_is_enqueued(part: NvlinkNormal, machine: Any) -> None:
    machine.is_capturing = True
    with pytest.raises(ArgumentError, match="num_worst_tokens"):
        dispatch(part, machine)
    assert machine.log == []
    machine.is_capturing = False
    dispatch(part, machine)


def test_refused_arguments_are_told_to_the_peers(part: NvlinkNormal, machine: Any) -> None:
    part.refuse("dispatch", "scales have 0 columns")
    assert machine.log == ["refuse"] and machine.current is machine.caller
