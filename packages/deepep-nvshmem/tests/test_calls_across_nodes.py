"""How the backend ``nvshmem`` calls its extension and keeps NVSHMEM, on a machine without a GPU."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from deep_ep import ArgumentError, BackendUnavailableError, BufferStateError, PeersDisagreeError, PeerTimeoutError
from deep_ep.backend import (
    BufferOptions,
    CombineRequest,
    DispatchLayout,
    DispatchRequest,
    DispatchResult,
    GroupFacts,
)
from deep_ep.settings import NvshmemSettings
from deepep_nvshmem import internode
from deepep_nvshmem.internode import NvshmemNormal

EXTENSION = "_nvshmem"
NUM_RANKS, RANKS_PER_NODE, NUM_TOKENS, NUM_EXPERTS, NUM_TOPK, HIDDEN = 4, 2, 6, 8, 3, 64
NUM_NODES = NUM_RANKS // RANKS_PER_NODE


@pytest.fixture(autouse=True)
def nvshmem(machine: Any, monkeypatch: pytest.MonkeyPatch) -> Any:
    """NVSHMEM that starts and has memory; what is done with it is noted in the machine's log."""
    log = machine.log

    def allocate(facts: GroupFacts, *, num_bytes: int, **_how: Any) -> Any:
        log.append(f"allocate {num_bytes}")
        return SimpleNamespace(ptr=4096, num_bytes=num_bytes, close=lambda: log.append("leave memory"))

    fake = SimpleNamespace(least_ring_bytes=1000)
    monkeypatch.setattr(internode.nvshmem_runtime, "start", lambda *_what, **_how: log.append("start"))
    monkeypatch.setattr(internode.nvshmem_runtime, "allocate", allocate)
    machine.extension.network_quiet = lambda: log.append("quiet")
    runtime = machine.extension.Runtime
    monkeypatch.setattr(runtime, "network_bytes", staticmethod(lambda **sizes: 3 * sizes["num_ring_bytes"]))
    monkeypatch.setattr(runtime, "least_ring_bytes", staticmethod(lambda **_shape: fake.least_ring_bytes))
    return fake


def facts_of(machine: Any) -> GroupFacts:
    return GroupFacts(
        rank=0,
        num_ranks=NUM_RANKS,
        ranks_per_node=RANKS_PER_NODE,
        device=torch.device("cpu"),
        channel=machine.channel,
    )


@pytest.fixture
def part(machine: Any) -> Iterator[NvshmemNormal]:
    opened = NvshmemNormal(facts_of(machine), BufferOptions())
    machine.log.clear()
    yield opened
    opened.destroy()


def dispatch(part: NvshmemNormal, machine: Any, **changes: Any) -> DispatchResult:
    layout = DispatchLayout(
        num_tokens_per_rank=torch.zeros(NUM_RANKS, dtype=torch.int32),
        num_tokens_per_rdma_rank=torch.zeros(NUM_NODES, dtype=torch.int32),
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


def combine(part: NvshmemNormal, machine: Any, result: DispatchResult) -> Any:
    assert result.handle is not None
    rows = torch.ones((result.recv_x.shape[0], HIDDEN), dtype=torch.bfloat16)
    weights = result.recv_topk_weights
    request = CombineRequest(x=rows, handle=result.handle, topk_weights=weights, output_stream=machine.caller)
    return part.combine(request)


# --- a buffer's life ------------------------------------------------------------------------------------------------


def test_nvshmem_is_started_before_its_memory_is_taken_and_left_once(machine: Any) -> None:
    part = NvshmemNormal(facts_of(machine), BufferOptions(nvshmem=NvshmemSettings(window_mb=0.5)))
    assert machine.log == ["start", f"allocate {3 << 18}", "all agree in construction"]
    for _ in range(2):
        part.destroy()
    assert machine.log.count("leave memory") == 1


def test_kernels_that_cannot_be_set_up_are_an_error_and_leave_the_memory(
    machine: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(self: Any, **_arguments: Any) -> None:
        raise machine.extension.NativeError("NVSHMEM did not accept the kernels (status 7).")

    monkeypatch.setattr(machine.extension.Runtime, "__init__", fail)
    with pytest.raises(BackendUnavailableError, match=r"backend 'nvshmem': kernels .* rank 0: NVSHMEM did not accept"):
        NvshmemNormal(facts_of(machine), BufferOptions())
    assert machine.log[-1] == "leave memory"


def test_different_windows_are_an_error_that_lists_them(machine: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    channel = machine.channel
    others = internode._RING.pack(1 << 20)
    monkeypatch.setattr(type(channel), "all_gather", lambda self, record, **_how: [record, others, others, others])
    with pytest.raises(PeersDisagreeError, match=r"DEEPEP_NVSHMEM_WINDOW_MB \(rank 0: 32, rank 1: 2,"):
        NvshmemNormal(facts_of(machine), BufferOptions())


def test_reset_waits_for_what_is_under_way_before_the_ranks_meet(part: NvshmemNormal, machine: Any) -> None:
    part.reset()
    assert machine.log == ["quiet", "all agree in reset", "reset", "all agree in reset"]


# --- dispatch -------------------------------------------------------------------------------------------------------


def test_layout_counts_nodes_too(part: NvshmemNormal, machine: Any) -> None:
    layout = part.layout(torch.zeros((NUM_TOKENS, NUM_TOPK), dtype=torch.int64), NUM_EXPERTS, machine.caller)
    (call,) = machine.of("layout")
    assert layout.num_tokens_per_rdma_rank is not None and layout.num_tokens_per_rdma_rank.shape == (NUM_NODES,)
    assert call["num_tokens_per_node"] == layout.num_tokens_per_rdma_rank.data_ptr()
    assert call["num_tokens_per_expert"] == layout.num_tokens_per_expert.data_ptr()
    assert layout.num_tokens_per_expert.shape == (NUM_EXPERTS,)


def test_results_have_the_shapes_of_the_contract(part: NvshmemNormal, machine: Any) -> None:
    result = dispatch(part, machine)
    assert result.recv_scales is not None and result.recv_topk_idx is not None and result.recv_topk_weights is not None
    assert result.recv_x.shape == (4, HIDDEN) and result.recv_x.dtype == torch.float8_e4m3fn
    assert result.recv_scales.shape == (4, 2) and result.recv_topk_idx.shape == (4, NUM_TOPK)
    assert result.num_recv_tokens_per_expert == [4] * 2 and result.is_on_output_stream
    shapes = [tuple(p.shape) for p in result.handle or () if p is not None]
    assert shapes == [(6, 4), (2, 1), (4, 1), (2, 1), (2,), (4, 1), (4,), (4, 8), (6, 2), (3, 8)]
    assert [p.dtype for p in result.handle or () if p is not None][7] == torch.uint8


@pytest.mark.parametrize("num_calls_before", [0, 1], ids=["first call", "same rows again"])
def test_kernels_write_to_what_the_handle_holds(part: NvshmemNormal, machine: Any, num_calls_before: int) -> None:
    for _ in range(num_calls_before):
        dispatch(part, machine)
    machine.calls.clear()
    handle = dispatch(part, machine).handle or ()
    assert all(isinstance(p, torch.Tensor) for p in handle)
    addresses = [p.data_ptr() for p in handle if p is not None]
    (notify,), launched = machine.of("notify"), machine.of("dispatch")[-1]
    names = ("rdma_channel_prefix", "gbl_channel_prefix", "recv_rdma_channel_prefix", "recv_rdma_rank_prefix")
    names += ("recv_gbl_channel_prefix", "recv_gbl_rank_prefix")
    assert [notify[name] for name in names] == addresses[1:7]
    assert notify["send_rdma_head"] == addresses[8] and launched["unlisted_rdma_head"] == 0
    assert (launched["recv_src_meta"], launched["send_nvl_head"]) == (addresses[7], addresses[9])
    assert (launched["dst_rows"], launched["tokens_to_node"]) == (notify["dst_rows"], notify["tokens_to_node"])
    sizes = dict.fromkeys(names, NUM_NODES) | {
        "gbl_channel_prefix": NUM_RANKS,
        "recv_gbl_channel_prefix": NUM_RANKS,
    }
    sizes |= {"recv_gbl_rank_prefix": NUM_RANKS, "send_rdma_head": NUM_TOKENS * NUM_NODES}
    sizes |= {"dst_rows": NUM_TOKENS * NUM_RANKS, "tokens_to_node": NUM_TOKENS * NUM_NODES}
    spans = [(notify[name], 4 * size) for name, size in sizes.items()]
    spans = sorted([*spans, (launched["send_nvl_head"], 32 * launched["forward_capacity"])])
    assert all(start + size <= after for (start, size), (after, _) in itertools.pairwise(spans))


def test_the_same_number_of_rows_again_is_launched_behind_its_counts(part: NvshmemNormal, machine: Any) -> None:
    dispatch(part, machine)
    machine.calls.clear()
    dispatch(part, machine)
    (launched,) = machine.of("dispatch")
    assert launched["ticket"] == machine.of("notify")[0]["ticket"] != 0
    assert launched["least_rows"] <= 4 <= launched["capacity"] and launched["forward_capacity"] >= 3


def test_own_stream_waits_after_each_allocation_on_the_callers(part: NvshmemNormal, machine: Any) -> None:
    waits = "own waits for caller"
    dispatch(part, machine)
    assert machine.log == [waits, "notify", waits, "dispatch", waits, "dispatch"]
    machine.log.clear()
    dispatch(part, machine)
    assert machine.log == [waits, "notify", waits, "dispatch"]
    machine.log.clear()
    dispatch(part, machine, num_worst_tokens=1001)
    assert machine.log == [waits, "notify", "dispatch"]
    machine.log.clear()
    assert not dispatch(part, machine, output_stream=None).is_on_output_stream
    assert machine.log == ["notify", "dispatch"]


@pytest.mark.parametrize(("num_rows", "num_forward_rows"), [(5000, 3), (100, 3), (1000, 400)])
def test_rows_that_do_not_fit_get_memory_of_their_own(
    part: NvshmemNormal, machine: Any, num_rows: int, num_forward_rows: int
) -> None:
    machine.num_rows = 1000
    dispatch(part, machine)
    machine.num_rows, machine.num_forward_rows = num_rows, num_forward_rows
    machine.calls.clear()
    result = dispatch(part, machine)
    declined, launched = machine.of("dispatch")
    assert declined["ticket"] != 0 and launched["ticket"] == 0
    assert num_rows <= launched["capacity"] <= num_rows * 9 // 8
    assert num_forward_rows <= launched["forward_capacity"] <= max(num_forward_rows * 9 // 8, 3)
    assert result.recv_x.shape == (num_rows, HIDDEN) and (result.handle or ())[9].shape == (num_forward_rows, 8)


def test_a_fixed_number_of_rows_waits_for_nothing_and_a_graph_keeps_its_memory(
    part: NvshmemNormal, machine: Any
) -> None:
    machine.is_capturing = True
    result = dispatch(part, machine, num_worst_tokens=1001)
    (launched,) = machine.of("dispatch")
    assert launched["ticket"] == 0 == machine.of("notify")[0]["ticket"] and not machine.of("wait_counts")
    assert launched["capacity"] == 1001 and launched["fill_unused"]
    assert launched["forward_capacity"] == RANKS_PER_NODE * 1001
    assert result.recv_x.shape == (1001, HIDDEN) and result.num_recv_tokens_per_expert == []
    assert (1024, HIDDEN) in [call["shape"] for call in machine.of("empty_lasting")]


def test_a_cached_dispatch_sends_rows_by_the_handle_alone(part: NvshmemNormal, machine: Any) -> None:
    handle = dispatch(part, machine).handle
    assert handle is not None
    (notify,) = machine.of("notify")
    machine.calls.clear()
    machine.log.clear()
    request = {"layout": None, "topk_idx": None, "topk_weights": None, "handle": handle}
    result = dispatch(part, machine, **request)
    (launched,) = machine.of("dispatch")
    assert launched["is_cached"] and launched["num_topk"] == 0 and launched["ticket"] == 0
    assert launched["dst_rows"] == launched["recv_src_meta"] == launched["topk_idx"] == 0
    assert launched["send_nvl_head"] == handle[9].data_ptr() and launched["forward_capacity"] == 3
    assert launched["tokens_to_node"] == notify["tokens_to_node"] and launched["unlisted_rdma_head"] == 0
    assert result.recv_x.shape == (4, HIDDEN) and result.handle is None and "notify" not in machine.log


def test_clones_of_a_handle_have_their_tokens_listed_again(part: NvshmemNormal, machine: Any) -> None:
    handle = dispatch(part, machine).handle
    assert handle is not None
    (notify,) = machine.of("notify")
    clones = tuple(p.clone() if p is not None else None for p in handle)
    for _ in range(2):
        machine.calls.clear()
        dispatch(part, machine, layout=None, topk_idx=None, topk_weights=None, handle=clones)
        (launched,) = machine.of("dispatch")
        assert clones[8] is not None and launched["unlisted_rdma_head"] == clones[8].data_ptr()
        assert launched["tokens_to_node"] not in (0, notify["tokens_to_node"], launched["unlisted_rdma_head"])


@pytest.mark.parametrize("part_number", [1, 8], ids=["another part", "send_rdma_head"])
def test_a_handle_that_was_written_to_has_its_tokens_listed_again(
    part: NvshmemNormal, machine: Any, part_number: int
) -> None:
    """Callers keep one handle for a graph and copy later ones into it."""
    handle = dispatch(part, machine).handle
    assert handle is not None
    written = handle[part_number]
    assert written is not None
    written.copy_(written.clone())
    machine.calls.clear()
    dispatch(part, machine, layout=None, topk_idx=None, topk_weights=None, handle=handle)
    (launched,) = machine.of("dispatch")
    assert handle[8] is not None and launched["unlisted_rdma_head"] == handle[8].data_ptr()


def test_handles_of_inference_mode_have_their_tokens_listed_again(part: NvshmemNormal, machine: Any) -> None:
    with torch.inference_mode():
        handle = dispatch(part, machine).handle
        machine.calls.clear()
        dispatch(part, machine, layout=None, topk_idx=None, topk_weights=None, handle=handle)
    (launched,) = machine.of("dispatch")
    assert launched["unlisted_rdma_head"] != 0


# --- memory that is too small ---------------------------------------------------------------------------------------


def test_a_full_heap_lets_the_peers_down_in_step_and_names_the_setting(part: NvshmemNormal, machine: Any) -> None:
    machine.heap_is_full = True
    with pytest.raises(BufferStateError, match=r"symmetric memory of rank 0, .* Raise DEEPEP_SYMMETRIC_HEAP_MB"):
        dispatch(part, machine)
    (launched,) = machine.of("dispatch")
    assert launched["capacity"] == 0 and launched["ticket"] == 0
    machine.heap_is_full = False
    dispatch(part, machine)


def test_a_fixed_number_of_rows_that_does_not_fit_is_refused_on_every_rank(part: NvshmemNormal, machine: Any) -> None:
    machine.heap_is_full = True
    with pytest.raises(BufferStateError, match="DEEPEP_SYMMETRIC_HEAP_MB"):
        dispatch(part, machine, num_worst_tokens=1001)
    assert "refuse" in machine.log and "dispatch" not in machine.log


def test_rows_that_no_window_holds_are_refused_with_the_size_that_would(
    part: NvshmemNormal, machine: Any, nvshmem: Any
) -> None:
    handle = dispatch(part, machine)
    nvshmem.least_ring_bytes = 17 << 20
    with pytest.raises(ArgumentError, match=r"need a window of 34 MiB .* 32 are there. Raise DEEPEP_NVSHMEM_WINDOW_MB"):
        dispatch(part, machine)
    assert machine.log[-1] == "refuse"
    with pytest.raises(ArgumentError, match=r"combine: rows .* DEEPEP_NVSHMEM_WINDOW_MB"):
        combine(part, machine, handle)


# --- combine --------------------------------------------------------------------------------------------------------


def test_combine_pulls_rows_where_they_lie(part: NvshmemNormal, machine: Any) -> None:
    result = dispatch(part, machine)
    combined = combine(part, machine, result)
    (call,) = machine.of("combine")
    handle = result.handle or ()
    assert combined.combined_x.shape == (NUM_TOKENS, HIDDEN) and call["out"] == combined.combined_x.data_ptr()
    assert combined.combined_topk_weights.shape == (NUM_TOKENS, NUM_TOPK)
    assert call["topk_weights"] == result.recv_topk_weights.data_ptr()  # type: ignore[union-attr]
    assert call["send_nvl_head"] == handle[9].data_ptr() and call["num_forward_rows"] == 3  # type: ignore[union-attr]
    assert (call["num_recv_tokens"], call["num_tokens"], call["num_row_bytes"]) == (4, NUM_TOKENS, 2 * HIDDEN)
    assert part.placement() == {"x": "pulled in place"}


def test_combine_copies_rows_that_peers_cannot_reach(part: NvshmemNormal, machine: Any) -> None:
    result = dispatch(part, machine)
    machine.is_symmetric = False
    combine(part, machine, result)
    (call,) = machine.of("combine")
    assert call["topk_weights"] != result.recv_topk_weights.data_ptr()  # type: ignore[union-attr]
    assert part.placement() == {"x": "copied"}
    machine.heap_is_full = True
    with pytest.raises(BufferStateError, match=r"DEEPEP_SYMMETRIC_HEAP_MB .*symmetric_memory\(\)"):
        combine(part, machine, result)


# --- faults ---------------------------------------------------------------------------------------------------------


def test_a_failed_wait_names_ranks_nodes_and_phase(part: NvshmemNormal, machine: Any) -> None:
    machine.record = SimpleNamespace(
        kind="timeout",
        op="combine",
        phase="window",
        rank=0,
        peer=3,
        epoch=5,
        seen=1,
        expected=2,
        elapsed_ns=2_000_000_000,
    )
    with pytest.raises(
        PeerTimeoutError, match=r"combine: rank 0 \(node 0\) waited 2.0 s for rank 3 \(node 1\) \(window,"
    ) as caught:
        dispatch(part, machine)
    assert caught.value.ranks == (3,) and caught.value.phase == "window"
    with pytest.raises(BufferStateError, match="failed before"):
        dispatch(part, machine)
    part.reset()
    dispatch(part, machine)
