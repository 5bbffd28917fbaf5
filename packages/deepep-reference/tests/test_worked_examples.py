"""Cases small enough to check by hand, with all their numbers written out.

bf16 has 8 significant bits: next to 1 the step is 2^-7, and 1 + 2^-8 lies half-way and rounds to the even neighbour, 1.
float32 holds all sums here exactly, unless a test says otherwise. So ``1, 2^-8, 2^-8`` adds up to 1 + 2^-7 = 1.0078125
if it is rounded once, and to 1 if the first two are rounded on their own.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch

from deep_ep import Buffer
from deep_ep.launch import RankContext, RankPool
from deepep_reference import expert_major, fp8, logfmt, routing, sums

HALF_STEP = 2.0**-8
HIDDEN = 8


def column(*values: float) -> torch.Tensor:
    """bf16 ``[n, 1]``."""
    return torch.tensor(values, dtype=torch.bfloat16)[:, None]


def rows_of(*values: float, hidden: int = HIDDEN) -> torch.Tensor:
    """bf16 ``[n, hidden]``: each row holds one value throughout."""
    return column(*values).repeat(1, hidden)


# --- counting -------------------------------------------------------------------------------------------------------


def test_layout_counts_a_token_once_per_rank_and_once_per_choice() -> None:
    topk_idx = torch.tensor([[0, 1], [1, 3], [-1, 2], [2, 2], [-1, -1]])
    layout = routing.layout_of(topk_idx, num_experts=4, num_ranks=2, ranks_per_node=2)
    assert layout.is_token_in_rank.int().tolist() == [[1, 0], [1, 1], [0, 1], [0, 1], [0, 0]]
    assert layout.num_tokens_per_rank.tolist() == [2, 3]
    assert layout.num_tokens_per_expert.tolist() == [1, 2, 3, 1]
    assert layout.num_tokens_per_rdma_rank is None


def test_layout_counts_a_token_once_per_node() -> None:
    # Ranks 0 and 1 are node 0; one expert per rank.
    topk_idx = torch.tensor([[0, 1], [1, 2], [3, 2], [-1, 3]], dtype=torch.int32)
    layout = routing.layout_of(topk_idx, num_experts=4, num_ranks=4, ranks_per_node=2)
    assert layout.num_tokens_per_rdma_rank is not None
    assert layout.num_tokens_per_rdma_rank.tolist() == [2, 3]
    assert layout.num_tokens_per_rank.tolist() == [1, 2, 2, 2]


def test_rows_go_out_by_expert_and_token_and_once_per_pair() -> None:
    experts, tokens = expert_major.routes(torch.tensor([[2, 0], [0, 0], [-1, 2]]))
    assert experts.tolist() == [0, 0, 2, 2]
    assert tokens.tolist() == [0, 1, 0, 2]


def test_received_rows_lie_by_expert_then_source_then_token() -> None:
    # From rank 0: expert 0, expert 1, expert 1; from rank 1: expert 0, expert 0.
    placed = expert_major.place(
        torch.tensor([0, 1, 1, 0, 0]), torch.tensor([0, 0, 0, 1, 1]), num_local_experts=2, num_ranks=2
    )
    assert placed.order.tolist() == [0, 3, 4, 1, 2]
    assert placed.expert.tolist() == [0, 0, 0, 1, 1]
    assert placed.row.tolist() == [0, 1, 2, 0, 1]
    assert placed.layout_range.tolist() == [[(0 << 32) | 1, (1 << 32) | 2], [(0 << 32) | 2, (2 << 32) | 0]]
    sources, experts, row = expert_major.rows_by_source(placed.layout_range)
    assert list(zip(sources.tolist(), experts.tolist(), row.tolist(), strict=True)) == [
        (0, 0, 0),
        (0, 1, 0),
        (0, 1, 1),
        (1, 0, 1),
        (1, 0, 2),
    ]


# --- sums -----------------------------------------------------------------------------------------------------------


def combine_ranks(ranks_per_node: int, *values: float, biases: tuple[float, ...] = ()) -> float:
    """One token, one column, one row from each rank."""
    total = sums.sum_over_ranks(
        [column(value) for value in values],
        [torch.tensor([0])] * len(values),
        num_tokens=1,
        ranks_per_node=ranks_per_node,
        biases=[column(bias) for bias in biases],
        dtype=torch.bfloat16,
    )
    return total.item()


def test_one_node_rounds_once() -> None:
    assert combine_ranks(3, 1.0, HALF_STEP, HALF_STEP) == 1.0078125


def test_each_node_partial_is_rounded_the_own_one_too() -> None:
    # Node 0: 1 + 2^-8 rounds to 1. Node 1: 2^-8. 1 + 2^-8 rounds to 1.
    assert combine_ranks(2, 1.0, HALF_STEP, HALF_STEP, 0.0) == 1.0
    # Node 0: 2^-8 + 2^-8 = 2^-7. Node 1: 1. The sum 1 + 2^-7 needs no rounding.
    assert combine_ranks(2, HALF_STEP, HALF_STEP, 1.0, 0.0) == 1.0078125


def test_biases_come_first() -> None:
    # (1 + -1) + 2^-30 = 2^-30; with the row first, 2^-30 would be lost in float32.
    assert combine_ranks(1, 2.0**-30, biases=(1.0, -1.0)) == 2.0**-30
    assert combine_ranks(1, -1.0, biases=(1.0, 2.0**-30)) == 0.0


def test_biases_are_outside_the_node_partials() -> None:
    # Node partials 2^-8 and 2^-8; 1 + 2^-8 + 2^-8 in float32.
    assert combine_ranks(1, HALF_STEP, HALF_STEP, biases=(1.0,)) == 1.0078125


def test_ranks_add_in_ascending_order() -> None:
    # 2^30 + -2^30 + 1 = 1, but 1 + 2^30 = 2^30 in float32.
    assert combine_ranks(3, 2.0**30, -(2.0**30), 1.0) == 1.0
    assert combine_ranks(3, 1.0, 2.0**30, -(2.0**30)) == 0.0


def test_sum_of_nothing_is_plus_zero() -> None:
    total = sums.sum_over_ranks(
        [rows_of(), rows_of()],
        [torch.empty(0, dtype=torch.int64)] * 2,
        num_tokens=2,
        ranks_per_node=2,
        dtype=torch.bfloat16,
    )
    assert total.view(torch.int16).tolist() == [[0] * HIDDEN] * 2


def test_sum_of_minus_zeros_is_plus_zero() -> None:
    assert str(combine_ranks(2, -0.0, -0.0)) == "0.0"


def choices_sum(reduce: str, values: list[float], weights: list[float], ranks: list[int]) -> float:
    """One token, one column; choice ``k`` has row ``values[k]`` and lies on ``ranks[k]``."""
    arguments: dict[str, Any] = {"travelled": torch.Tensor.float}
    row_of_choice = torch.arange(len(values))[None]
    weight = torch.tensor([weights], dtype=torch.float32)
    if reduce == "expert":
        return sums.sum_over_choices(column(*values), row_of_choice, weight, **arguments).item()
    return sums.sum_over_ranks_of_choices(
        column(*values), row_of_choice, weight, torch.tensor([ranks]), num_ranks=max(ranks) + 1, **arguments
    ).item()


def test_reduce_by_expert_rounds_once_and_by_rank_rounds_each_partial() -> None:
    values, weights = [1.0, HALF_STEP, HALF_STEP], [1.0, 1.0, 1.0]
    assert choices_sum("expert", values, weights, [0, 0, 1]) == 1.0078125
    assert choices_sum("rank", values, weights, [0, 0, 1]) == 1.0
    # Rank 0 holds only the first choice; the partial of rank 1 is 2^-7.
    assert choices_sum("rank", values, weights, [0, 1, 1]) == 1.0078125


def test_reduce_by_rank_adds_ranks_in_ascending_order_whatever_the_columns() -> None:
    # By column: 1 + 2^30 loses the 1. By rank: 2^30 - 2^30 + 1.
    values, weights = [1.0, 2.0**30, -(2.0**30)], [1.0, 1.0, 1.0]
    assert choices_sum("expert", values, weights, [2, 0, 1]) == 0.0
    assert choices_sum("rank", values, weights, [2, 0, 1]) == 1.0


def test_product_and_sum_round_separately() -> None:
    """A fused multiply-add would keep the 2^-27 of the product.

    Column 0: -1. Column 1: (1 + 2^-20)(1 + 2^-7) = 1 + 2^-7 + 2^-20 + 2^-27, in float32 1 + 2^-7 + 2^-20. Column 2:
    -2^-7. What remains is 2^-20; fused, it would be 2^-20 (1 + 2^-7), which bf16 can tell from 2^-20.
    """
    values, weights = [1.0, 1.0 + 2.0**-7, 2.0**-7], [-1.0, 1.0 + 2.0**-20, -1.0]
    assert choices_sum("expert", values, weights, [0, 0, 0]) == 2.0**-20
    assert choices_sum("rank", values, weights, [0, 0, 0]) == 2.0**-20


# --- formats --------------------------------------------------------------------------------------------------------


def test_fp8_scale_maps_the_largest_magnitude_to_448() -> None:
    x = torch.zeros(1, 128, dtype=torch.bfloat16)
    x[0, :4] = torch.tensor([2.0, -1.0, 0.5, 2.0**-8])
    q, scale = fp8.cast(x)
    assert scale.item() == torch.tensor(2.0 / 448, dtype=torch.float32).item()
    # 2^-8 * 224 = 0.875.
    assert q[0, :5].float().tolist() == [448.0, -224.0, 112.0, 0.875, 0.0]


def test_fp8_scale_is_rounded_up_to_a_power_of_two() -> None:
    x = torch.zeros(1, 512, dtype=torch.bfloat16)
    x[0, :2] = torch.tensor([2.0, -1.0])
    q, scale = fp8.cast(x, round_scale=True)
    # 2 / 448 = 0.00446 lies between 2^-8 and 2^-7; blocks of zeros count as 1e-4: 1e-4 / 448 = 2.23e-7 < 2^-22.
    assert scale.tolist() == [[2.0**-7, 2.0**-22, 2.0**-22, 2.0**-22]]
    assert q[0, :3].float().tolist() == [256.0, -128.0, 0.0]
    # 127 - 7 = 120 = 0x78, 127 - 22 = 105 = 0x69.
    assert fp8.pack_ue8m0(scale).item() == 0x69696978


def test_logfmt_levels_of_one_octave() -> None:
    x = torch.ones(1, 128, dtype=torch.bfloat16)
    x[0, :4] = torch.tensor([2.0, -2.0, 1.4140625, 0.0])
    encoded = logfmt.encode(x)
    assert (encoded.low.item(), encoded.high.item()) == (1.0, 2.0)
    # log2(1.4140625) = 0.499846; 510 * 0.499846 = 254.92, so level 1 + 255, which decodes to 2^(255/510) = 1.41421.
    assert encoded.level[0, 0, :5].tolist() == [511, 511, 256, 0, 1]
    assert logfmt.decode(encoded)[0, :5].tolist() == pytest.approx([2.0, -2.0, 2.0**0.5, 0.0, 1.0], rel=1e-6)


# --- two ranks, both ways -------------------------------------------------------------------------------------------

# Two experts per rank: rank 0 holds 0 and 1, rank 1 holds 2 and 3.
TOPK_IDX = [[[0, 3], [1, 0], [-1, 2]], [[2, -1], [3, 0]]]
TOPK_WEIGHTS = [[[0.5, 0.25], [0.5, 0.125], [9.0, 1.0]], [[0.5, 9.0], [1.0, 0.75]]]
X = [[10.0, 11.0, 12.0], [20.0, 21.0]]


def two_ranks_normal(context: RankContext) -> dict[str, Any]:
    rank = context.rank
    buffer = Buffer(context.group, backend="reference")
    topk_idx, weights = torch.tensor(TOPK_IDX[rank]), torch.tensor(TOPK_WEIGHTS[rank])
    per_rank, _, per_expert, in_rank, _ = buffer.get_dispatch_layout(topk_idx, 4)
    recv_x, recv_idx, recv_weights, counts, handle, _ = buffer.dispatch(
        rows_of(*X[rank]),
        num_tokens_per_rank=per_rank,
        is_token_in_rank=in_rank,
        num_tokens_per_expert=per_expert,
        topk_idx=topk_idx,
        topk_weights=weights,
        expert_alignment=4,
    )
    combined, combined_weights, _ = buffer.combine(recv_x + rank, handle, recv_weights, bias=rows_of(*X[rank]))
    buffer.destroy()
    return {
        "recv_x": recv_x[:, 0].tolist(),
        "recv_topk_idx": recv_idx.tolist(),
        "recv_topk_weights": recv_weights.tolist(),
        "counts": counts,
        "handle": [part.tolist() for part in handle],
        "combined_x": combined[:, 0].tolist(),
        "combined_topk_weights": combined_weights.tolist(),
    }


def test_normal_round_trip_of_two_ranks(rank_pool: RankPool) -> None:
    first, second = rank_pool.run(two_ranks_normal, num_ranks=2)
    # Rank 0 gets its own tokens 0 and 1 (experts 0, 1) and token 1 of rank 1 (expert 0).
    assert first["recv_x"] == [10.0, 11.0, 21.0]
    assert first["recv_topk_idx"] == [[0, -1], [1, 0], [-1, 0]]
    assert first["recv_topk_weights"] == [[0.5, 0.0], [0.5, 0.125], [0.0, 0.75]]
    assert first["counts"] == [4, 4]  # 3 choices of expert 0 and 1 of expert 1, rounded up
    # Rank 1 gets tokens 0 and 2 of rank 0 (experts 3, 2) and both of its own (experts 2, 3).
    assert second["recv_x"] == [10.0, 12.0, 20.0, 21.0]
    assert second["recv_topk_idx"] == [[-1, 1], [-1, 0], [0, -1], [1, -1]]
    assert second["recv_topk_weights"] == [[0.0, 0.25], [0.0, 1.0], [0.5, 0.0], [1.0, 0.0]]
    assert second["counts"] == [4, 4]
    # Rank prefix matrix, tokens to each rank, first row of each source, source tokens, mask, destination rows.
    assert first["handle"] == [
        [[2, 2], [3, 4]],
        [[2], [2]],
        [[0], [2]],
        [0, 1, 1],
        [[True, True], [True, False], [False, True]],
        [[0, 0], [1, -1], [-1, 1]],
    ]
    assert second["handle"] == [
        [[2, 2], [3, 4]],
        [[1], [2]],
        [[0], [2]],
        [0, 2, 0, 1],
        [[False, True], [True, True]],
        [[-1, 2], [2, 3]],
    ]
    # Rank 1 added 1 to its rows; the bias is x again: 10 + 10 + 11, 11 + 11, 12 + 13; 20 + 21, 21 + 21 + 22.
    assert first["combined_x"] == [31.0, 22.0, 25.0]
    assert second["combined_x"] == [41.0, 64.0]
    assert first["combined_topk_weights"] == [[0.5, 0.25], [0.5, 0.125], [0.0, 1.0]]
    assert second["combined_topk_weights"] == [[0.5, 0.0], [1.0, 0.75]]


def two_ranks_low_latency(context: RankContext) -> dict[str, Any]:
    rank, hidden, max_tokens = context.rank, 128, 3
    buffer = Buffer(context.group, low_latency_mode=True, backend="reference")
    topk_idx, weights = torch.tensor(TOPK_IDX[rank]), torch.tensor(TOPK_WEIGHTS[rank])
    recv_x, recv_count, handle, _, hook = buffer.low_latency_dispatch(
        rows_of(*X[rank], hidden=hidden), topk_idx, max_tokens, 4, use_fp8=False, return_recv_hook=True
    )
    before = (bool(recv_x.isnan().all()), recv_count.tolist())
    assert hook is not None
    hook()
    scaled = recv_x * torch.tensor([1.0, 2.0])[:, None, None].bfloat16()  # the second expert of each rank doubles
    combined, _, _ = buffer.low_latency_combine(scaled, topk_idx, weights, handle)
    buffer.destroy()
    return {
        "before": before,
        "recv_x": [recv_x[expert, : recv_count[expert], 0].tolist() for expert in range(2)],
        "src_info": [handle[0][expert, : recv_count[expert]].tolist() for expert in range(2)],
        "ranges": [[divmod(value, 1 << 32) for value in row] for row in handle[1].tolist()],
        "combined_x": combined[:, 0].tolist(),
    }


def test_low_latency_round_trip_of_two_ranks(rank_pool: RankPool) -> None:
    first, second = rank_pool.run(two_ranks_low_latency, num_ranks=2)
    assert first["before"] == second["before"] == (True, [-1, -1])
    # Expert 0: tokens 0 and 1 of rank 0, token 1 of rank 1. Expert 1: token 1 of rank 0.
    assert first["recv_x"] == [[10.0, 11.0, 21.0], [11.0]]
    assert first["src_info"] == [[0, 1, 1], [1]]
    assert first["ranges"] == [[(0, 2), (2, 1)], [(0, 1), (1, 0)]]
    # Expert 2: token 2 of rank 0, token 0 of rank 1. Expert 3: token 0 of rank 0, token 1 of rank 1.
    assert second["recv_x"] == [[12.0, 20.0], [10.0, 21.0]]
    assert second["src_info"] == [[2, 0], [0, 1]]
    assert second["ranges"] == [[(0, 1), (1, 1)], [(0, 1), (1, 1)]]
    # Experts 1 and 3 double: 0.5 * 10 + 0.25 * 20; 0.5 * 22 + 0.125 * 11 = 12.375; 1 * 12.
    assert first["combined_x"] == [10.0, 12.375, 12.0]
    # 0.5 * 20; 1 * 42 + 0.75 * 21 = 57.75.
    assert second["combined_x"] == [10.0, 57.75]


def one_expert_named_twice(context: RankContext) -> dict[str, Any]:
    """A token names expert 1 three times, and in low-latency mode every slot of the buffer is taken."""
    buffer = Buffer(context.group, low_latency_mode=True, backend="reference")
    topk_idx = torch.tensor([[1, 1, 1], [1, 1, 1]])
    weights = torch.tensor([[0.5, 0.25, 1.0], [1.0, 1.0, 2.0]])
    x = rows_of(4.0, 8.0, hidden=128)
    per_rank, _, per_expert, in_rank, _ = buffer.get_dispatch_layout(topk_idx, 2)
    recv_x, recv_idx, _, counts, handle, _ = buffer.dispatch(
        x,
        num_tokens_per_rank=per_rank,
        is_token_in_rank=in_rank,
        num_tokens_per_expert=per_expert,
        topk_idx=topk_idx,
        topk_weights=weights,
    )
    combined, _, _ = buffer.combine(recv_x, handle)
    expert_x, expert_count, expert_handle, _, _ = buffer.low_latency_dispatch(x, topk_idx, 2, 2, use_fp8=False)
    weighted, _, _ = buffer.low_latency_combine(expert_x, topk_idx, weights, expert_handle)
    buffer.destroy()
    return {
        "recv": (recv_x[:, 0].tolist(), recv_idx.tolist(), counts),
        "combined": combined[:, 0].tolist(),
        "expert_count": expert_count.tolist(),
        "weighted": weighted[:, 0].tolist(),
    }


def test_expert_named_several_times_gets_the_token_once_and_every_weight_counts(rank_pool: RankPool) -> None:
    first, second = rank_pool.run(one_expert_named_twice, num_ranks=2)
    assert first["recv"] == ([], [], [0])
    # Choices are counted as choices: 2 ranks of 2 tokens with 3 each.
    assert second["recv"] == ([4.0, 8.0, 4.0, 8.0], [[0, 0, 0]] * 4, [12])
    assert first["combined"] == second["combined"] == [4.0, 8.0]
    assert first["expert_count"] == [0]
    assert second["expert_count"] == [4]
    assert first["weighted"] == second["weighted"] == [1.75 * 4.0, 4.0 * 8.0]


# --- four ranks as two nodes ----------------------------------------------------------------------------------------


def two_nodes(context: RankContext) -> list[Any]:
    """One expert per rank. Only ranks 0 and 1 have tokens."""
    rank = context.rank
    topk_idx = torch.tensor({0: [[3, 2], [0, 3]], 1: [[1, 2]]}.get(rank, []), dtype=torch.int64).view(-1, 2)
    buffer = Buffer(context.group, backend="reference")
    per_rank, per_node, per_expert, in_rank, _ = buffer.get_dispatch_layout(topk_idx, 4)
    handle = buffer.dispatch(
        rows_of(*range(topk_idx.shape[0])),
        num_tokens_per_rank=per_rank,
        num_tokens_per_rdma_rank=per_node,
        is_token_in_rank=in_rank,
        num_tokens_per_expert=per_expert,
        topk_idx=topk_idx,
        topk_weights=torch.ones(topk_idx.shape),
    )[4]
    buffer.destroy()
    parts = [part.tolist() for part in handle]
    parts[7] = handle[7].view(torch.int32).tolist()
    return parts


def test_handles_of_two_nodes(rank_pool: RankPool) -> None:
    handles = rank_pool.run(two_nodes, num_ranks=4, environment={"DEEPEP_RANKS_PER_NODE": "2"})
    none = [-1] * 6
    # Rank 0: token 0 goes to node 1 (ranks 2, 3), token 1 to ranks 0 and 3. It forwards on node 0 what ranks 0 and 2
    # send there: its own token 1.
    assert handles[0] == [
        [[False, False, True, True], [True, False, False, True]],
        [[1], [2]],
        [[1], [0], [1], [2]],
        [[1], [0]],
        [1, 1],
        [[0], [1], [1], [1]],
        [1, 1, 1, 1],
        [[0, 1]],
        [[-1, 0], [0, 1]],
        [[0, -1, *none]],
    ]
    # Rank 1: its token goes to ranks 1 and 2, over itself on node 0 and over rank 3 on node 1.
    assert handles[1][0] == [[False, True, True, False]]
    assert handles[1][7] == [[1, 0]]
    assert handles[1][8] == [[0, 0]]
    assert handles[1][9] == [[-1, 0, *none]]
    # Rank 2 receives token 0 of rank 0 and token 0 of rank 1; it forwards on node 1 what rank 0 sends there: token 0 to
    # row 0 here and row 0 of rank 3, token 1 to row 1 of rank 3.
    assert handles[2][3:8] == [[[2], [0]], [2, 2], [[0], [1], [2], [2]], [1, 2, 2, 2], [[0, 0], [1, 0]]]
    assert handles[2][9] == [[0, 0, *none], [-1, 1, *none]]
    # Rank 3 receives both tokens of rank 0; it forwards on node 1 the token of rank 1, to row 1 of rank 2.
    assert handles[3][3:8] == [[[1], [0]], [1, 1], [[0], [2], [2], [2]], [2, 2, 2, 2], [[0, 0], [0, 1]]]
    assert handles[3][9] == [[1, -1, *none]]
