"""The oracle on cases small enough to check by hand, and generated routings on what they promise."""

from __future__ import annotations

import numpy as np
import pytest

from deep_ep.testing.formats import round_to_bf16
from deep_ep.testing.oracle import LowLatencyOracle, NormalOracle
from deep_ep.testing.routing import PATTERNS, Routing

# Two ranks with two experts each (0, 1 | 2, 3); rank 0 has three tokens, rank 1 has one.
TOPK_IDX = [np.array([[0, 1], [3, 1], [-1, -1]]), np.array([[2, -1]])]


def column(*values):
    return np.array(values, dtype=np.float32)[:, None]


def test_layout_counts_a_token_once_for_each_rank():
    oracle = NormalOracle(TOPK_IDX, 4)
    assert oracle.is_token_in_rank(0).tolist() == [[True, False], [True, True], [False, False]]
    assert oracle.num_tokens_per_rank(0).tolist() == [2, 1]
    assert oracle.num_tokens_per_expert(0).tolist() == [1, 2, 0, 1]
    assert oracle.rank_prefix_matrix().tolist() == [[2, 1], [2, 2]]


def test_rows_arrive_by_source_rank_then_token():
    oracle = NormalOracle(TOPK_IDX, 4)
    assert oracle.sources(0).tolist() == [[0, 0], [0, 1]]
    assert oracle.sources(1).tolist() == [[0, 1], [1, 0]]
    assert oracle.received_topk_idx(1).tolist() == [[1, -1], [0, -1]]
    weights = [np.full((3, 2), 0.5, np.float32), np.full((1, 2), 0.25, np.float32)]
    assert oracle.received_topk_weights(1, weights).tolist() == [[0.5, 0.0], [0.25, 0.0]]
    assert oracle.num_received_per_expert(1) == [1, 1]
    assert oracle.num_received_per_expert(1, 128) == [128, 128]
    assert oracle.num_received_per_expert(0, 4) == [4, 4]


def test_combine_adds_rows_of_all_ranks_that_held_the_token():
    oracle = NormalOracle(TOPK_IDX, 4)
    rows = [column(1, 10), column(100, 1000)]
    assert oracle.combine(0, rows).ravel().tolist() == [1, 110, 0]
    assert oracle.combine(1, rows).ravel().tolist() == [1000]
    assert oracle.combine(0, rows, [column(5, 5, 5), column(0.5, 0.5, 0.5)]).ravel().tolist() == [6.5, 115.5, 5.5]


def test_one_node_rounds_once_and_several_nodes_round_each_partial():
    everywhere = [np.array([[0, 1, 2, 3]])] + [np.full((0, 4), -1)] * 3
    # In bf16 at 256 the step is 2: 256 + 1 rounds back to 256, but 256 + (1 + 1) does not.
    rows = [column(256), column(1), column(1), column(0)]
    assert NormalOracle(everywhere, 4).combine(0, rows).item() == 258
    assert NormalOracle(everywhere, 4, ranks_per_node=2).combine(0, rows).item() == 256
    assert NormalOracle(everywhere, 4, ranks_per_node=2).combine_weights(0, rows).item() == 258


def test_biases_come_before_ranks():
    everywhere = [np.array([[0, 1]]), np.full((0, 2), -1)]
    # float32 at 2**24 has a step of 2: (-2**24 + 2**24) + 1 is 1, but (2**24 + 1) - 2**24 would be 0.
    big = float(2**24)
    rows = [column(1), column(0)]
    assert NormalOracle(everywhere, 2).combine(0, rows, [column(big), column(-big)]).item() == 1


def test_several_nodes_count_a_token_once_for_each_node():
    oracle = NormalOracle([np.array([[0, 1], [2, 0], [-1, 3]])] + [np.full((0, 2), -1)] * 3, 4, ranks_per_node=2)
    assert oracle.num_tokens_per_node(0).tolist() == [2, 2]


def test_low_latency_rows_belong_to_each_chosen_expert():
    oracle = LowLatencyOracle(TOPK_IDX, 4)
    assert oracle.tokens(0, 1, 0).tolist() == [0, 1]
    assert oracle.num_received(0) == [1, 2]
    assert oracle.num_received(1) == [1, 1]


def test_low_latency_sum_rounds_partials_of_ranks_only_in_that_tree():
    topk_idx = [np.array([[0, 2, 1, 3]]), np.full((0, 4), -1)]
    rows = {0: column(256), 1: column(1), 2: column(1), 3: column(0)}
    weights = np.ones((1, 4), dtype=np.float32)
    oracle = LowLatencyOracle(topk_idx, 4)

    def expert_rows(expert, _source):
        return rows[expert]

    assert oracle.combine(0, expert_rows, weights, reduce="expert").item() == 258
    assert oracle.combine(0, expert_rows, weights, reduce="rank").item() == 256


def test_masked_rank_gets_and_gives_nothing():
    oracle = LowLatencyOracle(TOPK_IDX, 4, masked=[1])
    assert oracle.num_received(0) == [1, 2]
    ones = np.ones((3, 2), dtype=np.float32)
    combined = oracle.combine(0, lambda _expert, _source: column(1, 1, 1), ones, reduce="rank")
    assert combined.ravel().tolist() == [2, 1, 0]


@pytest.mark.parametrize("pattern", PATTERNS)
@pytest.mark.parametrize("num_topk", [1, 4, 20])
def test_generated_routing_chooses_known_experts_at_most_once(pattern, num_topk):
    routing = Routing(num_tokens=(50, 0, 7), num_experts=12, num_topk=num_topk, pattern=pattern, target=2, seed=5)
    for rank, indices in enumerate(routing.all_topk_idx()):
        assert indices.shape == (routing.num_tokens[rank], num_topk)
        assert indices.min(initial=0) >= -1
        assert indices.max(initial=0) < 12
        for token in indices:
            chosen = token[token >= 0].tolist()
            assert len(chosen) == len(set(chosen))
            wanted = {"uniform": 12, "grouped": 8, "packed": 4, "skewed": 4}[pattern]
            assert len(chosen) == min(num_topk, wanted)
            ranks = {expert // 4 for expert in chosen}
            assert {"grouped": len(ranks) <= 2, "packed": len(ranks) == 1, "skewed": ranks == {2}}.get(pattern, True)


def test_routing_follows_from_its_numbers_alone():
    routing = Routing(num_tokens=(20, 20), num_experts=8, num_topk=3, drop_percent=30, seed=1)
    again = Routing(num_tokens=(20, 20), num_experts=8, num_topk=3, drop_percent=30, seed=1)
    assert np.array_equal(routing.topk_idx(1), again.topk_idx(1))
    assert not np.array_equal(routing.topk_idx(0), routing.topk_idx(1))
    dropped = (routing.topk_idx(0) < 0).mean()
    assert 0.1 < dropped < 0.6
    assert not routing.is_maximally_skewed
    assert Routing(num_tokens=(3, 3), num_experts=4, num_topk=1, pattern="skewed").is_maximally_skewed


def test_bf16_rounding_of_the_oracle_is_visible_in_its_examples():
    assert round_to_bf16(np.array([257.0, 258.0], np.float32)).tolist() == [256.0, 258.0]
