"""The cost model across nodes: its fan-out is exact, its figures are those of plain arithmetic, its advice suffices."""

from __future__ import annotations

import itertools
import math
from dataclasses import replace
from typing import get_args

import pytest
from hypothesis import given
from hypothesis import strategies as st

from deep_ep import ArgumentError, Buffer
from deep_ep.buffer import Buffer as BufferClass
from deep_ep.internode_model import (
    H200_400G,
    H200_VIRTUAL_NODES,
    Machine,
    Operation,
    Ring,
    Shape,
    default_config,
    enough_ring,
    enough_sms,
    estimate,
    fan_out,
)

OPERATIONS: tuple[Operation, ...] = get_args(Operation)


def _by_hand(shape: Shape) -> tuple[float, float]:
    """Distinct nodes and ranks of a token, averaged over every order that its experts' scores can have."""
    group = shape.num_experts // shape.num_groups
    rank = shape.num_experts // shape.num_ranks
    node = rank * shape.ranks_per_node
    orders = list(itertools.permutations(range(shape.num_experts)))
    num_nodes = num_ranks = 0
    for order in orders:
        best = list(dict.fromkeys(expert // group for expert in order))[: shape.num_topk_groups]
        chosen = [expert for expert in order if expert // group in best][: shape.num_topk]
        num_nodes += len({expert // node for expert in chosen})
        num_ranks += len({expert // rank for expert in chosen})
    return num_nodes / len(orders), num_ranks / len(orders)


@pytest.mark.parametrize(
    "shape",
    [
        Shape(num_nodes=3, ranks_per_node=1, num_experts=6, num_topk=3),
        Shape(num_nodes=1, ranks_per_node=3, num_experts=6, num_topk=2),
        Shape(num_nodes=3, ranks_per_node=2, num_experts=6, num_topk=2, num_groups=3, num_topk_groups=2),
        Shape(num_nodes=3, ranks_per_node=1, num_experts=6, num_topk=4, num_groups=3, num_topk_groups=2),
        Shape(num_nodes=3, ranks_per_node=1, num_experts=6, num_topk=3, num_groups=6, num_topk_groups=4),
        Shape(num_nodes=2, ranks_per_node=1, num_experts=6, num_topk=2, num_groups=6, num_topk_groups=2),
        Shape(num_nodes=6, ranks_per_node=1, num_experts=6, num_topk=2, num_groups=2, num_topk_groups=1),
        Shape(num_nodes=2, ranks_per_node=3, num_experts=6, num_topk=3, num_groups=2, num_topk_groups=1),
    ],
    ids=lambda s: f"{s.num_nodes}x{s.ranks_per_node}, top-{s.num_topk} in {s.num_topk_groups} of {s.num_groups}",
)
def test_fan_out_is_the_mean_over_all_orders_of_the_experts(shape: Shape) -> None:
    reached = fan_out(shape)
    assert (reached.nodes, reached.ranks) == pytest.approx(_by_hand(shape), rel=1e-12)


def test_fan_out_of_the_usual_shape_is_what_is_published_about_it() -> None:
    """A token of DeepSeek-V3 goes to 5.30 of 8 ranks and 3.61 of 4."""
    assert fan_out(Shape(num_nodes=1, ranks_per_node=8)).ranks == pytest.approx(5.30, abs=0.01)
    assert fan_out(Shape(num_nodes=1, ranks_per_node=4)).ranks == pytest.approx(3.61, abs=0.01)
    without = math.comb(256 - 64, 8) / math.comb(256, 8)
    assert fan_out(Shape(num_nodes=4)).nodes == pytest.approx(4 * (1 - without), rel=1e-12)


@pytest.mark.parametrize("num_topk_groups", [1, 2, 4, 8])
def test_a_token_reaches_no_more_nodes_than_it_may_choose(num_topk_groups: int) -> None:
    shape = Shape(num_nodes=8, num_groups=8, num_topk_groups=num_topk_groups)
    limited, free = fan_out(shape), fan_out(Shape(num_nodes=8))
    assert 1 <= limited.nodes <= min(num_topk_groups, free.nodes + 1e-9)
    assert limited.ranks <= free.ranks + 1e-9


def test_groups_across_the_border_of_a_node_are_refused() -> None:
    with pytest.raises(ArgumentError, match="lie across the borders"):
        fan_out(Shape(num_nodes=2, ranks_per_node=1, num_experts=12, num_groups=3, num_topk=2, num_topk_groups=2))


@pytest.mark.parametrize(
    ("facts", "said"),
    [
        ({"num_experts": 250}, "multiple of the 16 ranks"),
        ({"num_groups": 4, "num_topk_groups": 5}, "5 of 4 groups"),
        ({"num_groups": 64, "num_topk_groups": 1}, "cannot choose 8"),
        ({"hidden": 0}, "positive int"),
        ({"num_tokens": 1.5}, "positive int"),
    ],
)
def test_a_shape_that_cannot_be_is_refused(facts: dict[str, int], said: str) -> None:
    with pytest.raises(ArgumentError, match=said):
        Shape(**({"num_nodes": 2} | facts))


def test_a_machine_without_a_rate_is_refused() -> None:
    with pytest.raises(ArgumentError, match="nic_gbps is 0"):
        replace(H200_400G, nic_gbps=0)


def test_messages_are_as_long_as_their_parts() -> None:
    shape = Shape(num_nodes=2)
    # 7168 e4m3 and 56 scales; 8 choices and weights; 8 destination rows and a token number; to 128 bytes.
    assert shape.message_bytes("dispatch") == -(-(7168 + 224 + 64 + 36) // 128) * 128 == 7552
    assert replace(shape, is_cached=True).message_bytes("dispatch") == 7424
    assert shape.message_bytes("combine") == -(-(14336 + 32) // 128) * 128 == 14464
    assert replace(shape, is_fp8=False).row_bytes("dispatch") == 14336


def test_the_nic_bounds_dispatch_between_two_nodes() -> None:
    shape = Shape(num_nodes=2, is_cached=True)
    found = estimate("dispatch", shape, H200_400G)
    remote_rows = 4096 * (1 - math.comb(128, 8) / math.comb(256, 8))
    assert found.bound_by == "NIC"
    assert found.network_bytes == pytest.approx(remote_rows * (7424 + 8))
    assert found.seconds == pytest.approx(remote_rows * 7432 / 45e9 + (4.0 + 2 * 1.3 + 2 * 5.0) / 1e6)
    assert found.logical_rdma_gbps == pytest.approx(2 * remote_rows * 7392 / found.seconds / 1e9)


def test_nodes_drawn_in_one_nvlink_domain_share_its_links() -> None:
    """Four GPUs as two nodes: 0.996 rows of a token cross between nodes, half of its 3.61 copies take another hop."""
    found = estimate("dispatch", Shape(num_nodes=2, ranks_per_node=2, is_cached=True), H200_VIRTUAL_NODES)
    assert set(found.resource_s) == {"NVLink"}
    assert found.seconds == pytest.approx(256e-6, rel=0.01)


SHAPES = st.builds(
    lambda nodes, local, per_rank, topk, hidden, tokens, fp8, cached: Shape(
        num_nodes=nodes,
        ranks_per_node=local,
        num_experts=nodes * local * per_rank,
        num_topk=min(topk, nodes * local * per_rank),
        hidden=hidden * 128,
        num_tokens=tokens,
        is_fp8=fp8,
        is_cached=cached,
    ),
    *(st.integers(1, most) for most in (64, 8, 8, 32, 64, 8192)),
    st.booleans(),
    st.booleans(),
)


@given(
    shape=SHAPES,
    operation=st.sampled_from(OPERATIONS),
    machine=st.sampled_from([H200_400G, H200_VIRTUAL_NODES]),
    name=st.sampled_from([n for n in vars(H200_400G) if n.endswith("gbps") and n != "nic_gbps"]),
    factor=st.floats(1, 10),
    num_sms=st.sampled_from([None, 2, 8, 24]),
)
def test_more_bandwidth_is_never_slower(
    shape: Shape, operation: Operation, machine: Machine, name: str, factor: float, num_sms: int | None
) -> None:
    faster = replace(machine, **{name: getattr(machine, name) * factor})
    if machine.nic_gbps is not None:
        faster = replace(faster, nic_gbps=machine.nic_gbps * factor)
    before = estimate(operation, shape, machine, num_sms=num_sms)
    after = estimate(operation, shape, faster, num_sms=num_sms)
    assert after.seconds <= before.seconds * (1 + 1e-12)
    if num_sms is not None:
        assert estimate(operation, shape, machine, num_sms=num_sms + 2).seconds <= before.seconds * (1 + 1e-12)


@given(shape=SHAPES, operation=st.sampled_from(OPERATIONS), machine=st.sampled_from([H200_400G, H200_VIRTUAL_NODES]))
def test_the_advice_suffices(shape: Shape, operation: Operation, machine: Machine) -> None:
    num_sms = enough_sms(operation, shape, machine)
    assert num_sms % 2 == 0
    links = estimate(operation, shape, machine)
    if max(links.resource_s.values()) > 0:
        assert estimate(operation, shape, machine, num_sms=num_sms).seconds == pytest.approx(links.seconds)
    if num_sms <= 132:
        ring = enough_ring(operation, shape, machine, num_sms=num_sms)
        assert 2 <= ring.num_slots <= (768 if operation == "combine" and shape.num_nodes == 2 else 384)
        assert ring.num_slots * ring.slot_rows * shape.message_bytes(operation) <= ring.num_bytes


@given(
    message=st.integers(1, 2000).map(lambda n: n * 128), extra=st.integers(0, 1 << 24), chunk=st.integers(1, 1 << 18)
)
def test_a_ring_holds_its_slots(message: int, extra: int, chunk: int) -> None:
    ring = Ring.of(2 * message + extra, message, chunk)
    assert ring.num_slots >= 2 and ring.slot_rows >= 1
    assert ring.num_slots * ring.slot_rows * message <= ring.num_bytes
    assert 1 <= ring.chunk_rows(1) <= ring.chunk_rows(1 << 20) == ring.slot_rows


def test_a_ring_of_one_message_is_refused() -> None:
    with pytest.raises(ArgumentError, match="does not hold two messages"):
        Ring.of(7552 * 2 - 1, 7552)


@pytest.mark.parametrize("num_ranks", [1, 4, 8])
def test_one_node_keeps_the_default_config(num_ranks: int) -> None:
    assert default_config("dispatch", num_ranks) == {}


@pytest.mark.parametrize("num_ranks", [9, 13, 16, 24, 32, 64, 160, 512, 2048])
@pytest.mark.parametrize("operation", OPERATIONS)
def test_configs_across_nodes_follow_the_model(
    operation: Operation, num_ranks: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(BufferClass, "num_sms", 20)
    monkeypatch.setattr(BufferClass, "_num_sms_was_set", False)
    asked = Buffer.get_dispatch_config if operation == "dispatch" else Buffer.get_combine_config
    config, expected = asked(num_ranks), default_config(operation, num_ranks)
    assert vars(config) == vars(type(config)(**expected)) and 8 <= config.num_sms <= 20
    # The hint pays for a ring to send from and one to receive into, for each node.
    row = 7168 * 2
    rows = config.num_max_rdma_chunked_recv_tokens * (config.num_sms // 2)
    assert config.get_rdma_buffer_size_hint(row, num_ranks) >= 2 * -(-num_ranks // 8) * rows * row
    monkeypatch.setattr(BufferClass, "num_sms", 24)
    monkeypatch.setattr(BufferClass, "_num_sms_was_set", True)
    assert asked(num_ranks).num_sms == 24
