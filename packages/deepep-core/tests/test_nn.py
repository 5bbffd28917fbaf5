"""The layer on several ranks against the same layer in one process, and its parts against plain arithmetic."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from typing import Any

import pytest
import torch
import torch.distributed as dist

from deep_ep import ArgumentError, Buffer, nn
from deep_ep.launch import RankContext, RankPool

HIDDEN, WIDTH, EXPERTS, TOPK = 128, 24, 24, 4
GATE = {"hidden": HIDDEN, "num_experts": EXPERTS, "num_topk": TOPK, "num_groups": 6, "num_selected_groups": 3}


@pytest.fixture(scope="module")
def pool() -> Iterator[RankPool]:
    with RankPool(4) as ranks:
        yield ranks


# --- the gate -------------------------------------------------------------------------------------------------------


def test_group_limited_choice_by_hand() -> None:
    scores = torch.tensor([[0.9, 0.1, 0.5, 0.6]])
    chosen, margin = nn.select_experts(scores, num_topk=1, num_groups=2, num_selected_groups=1)
    assert chosen.tolist() == [[3]]
    assert margin.item() == pytest.approx(0.1)


def test_ungrouped_choice_takes_the_largest_scores() -> None:
    chosen, margin = nn.select_experts(torch.tensor([[0.1, 0.7, 0.4, 0.6]]), num_topk=2)
    assert sorted(chosen[0].tolist()) == [1, 3]
    assert margin.item() == pytest.approx(0.2)


def test_choosing_everything_has_no_close_decision() -> None:
    chosen, margin = nn.select_experts(torch.rand(3, 4), num_topk=4)
    assert chosen.sort(-1).values.tolist() == [[0, 1, 2, 3]] * 3
    assert margin.isinf().all()


def test_choice_stays_inside_the_best_groups() -> None:
    torch.manual_seed(1)
    scores = torch.rand(200, EXPERTS)
    chosen, _ = nn.select_experts(scores, num_topk=TOPK, num_groups=6, num_selected_groups=3)
    for row, experts in zip(scores.tolist(), chosen.tolist(), strict=True):
        sums = [sum(sorted(row[g * 4 : g * 4 + 4])[-2:]) for g in range(6)]
        groups = sorted(range(6), key=lambda g: sums[g])[-3:]
        candidates = sorted((e for g in groups for e in range(g * 4, g * 4 + 4)), key=lambda e: row[e])
        assert set(experts) == set(candidates[-TOPK:])


def test_bias_chooses_but_does_not_weigh() -> None:
    torch.manual_seed(2)
    gate = nn.Gate(hidden=HIDDEN, num_experts=8, num_topk=2, route_scale=2.5)
    x = torch.randn(50, HIDDEN)
    gate.bias[5] = 10.0
    routing = gate(x)
    assert (routing.topk_idx == 5).any(-1).all()
    chosen = routing.scores.gather(1, routing.topk_idx)
    torch.testing.assert_close(routing.topk_weights, 2.5 * chosen / chosen.sum(-1, keepdim=True))
    assert routing.topk_weights.sum(-1).tolist() == pytest.approx([2.5] * 50, rel=1e-5)


def test_balancing_moves_the_bias_towards_idle_experts() -> None:
    gate = nn.Gate(hidden=HIDDEN, num_experts=4, num_topk=1)
    gate.balance(torch.tensor([10, 0, 5, 5]), speed=0.5)
    assert gate.bias.tolist() == [-0.5, 0.5, 0.0, 0.0]


@pytest.mark.parametrize(
    "change", [{"num_groups": 5}, {"num_selected_groups": 7}, {"num_topk": 13}], ids=["groups", "selected", "topk"]
)
def test_gate_refuses_what_cannot_be(change: dict[str, int]) -> None:
    with pytest.raises(ArgumentError):
        nn.Gate(**(GATE | change))


# --- experts --------------------------------------------------------------------------------------------------------


def test_any_split_over_ranks_holds_the_same_experts() -> None:
    whole = nn.Experts(hidden=HIDDEN, width=WIDTH, num_experts=6, seed=3)
    part = nn.Experts(hidden=HIDDEN, width=WIDTH, num_experts=2, first_expert=4, seed=3)
    assert torch.equal(whole.down[4:], part.down)
    assert torch.equal(whole.gate_up[4:], part.gate_up)


def test_experts_sum_what_each_row_chose() -> None:
    torch.manual_seed(4)
    experts = nn.Experts(hidden=HIDDEN, width=WIDTH, num_experts=3)
    rows, idx = torch.randn(4, HIDDEN), torch.tensor([[0, 2], [-1, 1], [-1, -1], [2, 2]])
    weights = torch.rand(4, 2)
    wanted = torch.zeros(4, HIDDEN)
    for r in range(4):
        for k in range(2):
            if idx[r, k] >= 0:
                gate, up = (experts.gate_up[idx[r, k]] @ rows[r]).chunk(2)
                wanted[r] += weights[r, k] * (experts.down[idx[r, k]] @ (torch.sigmoid(gate) * gate * up))
    torch.testing.assert_close(experts(rows, idx, weights), wanted, rtol=1e-4, atol=1e-4)
    blocks = experts.expert_major(rows[None].expand(3, -1, -1))
    torch.testing.assert_close(blocks[1, 1], wanted[1] / weights[1, 1], rtol=1e-4, atol=1e-4)


def test_no_rows_stay_connected_to_the_graph() -> None:
    experts = nn.Experts(hidden=HIDDEN, width=WIDTH, num_experts=3)
    rows = torch.empty(0, HIDDEN, requires_grad=True)
    weights = torch.empty(0, 2, requires_grad=True)
    experts(rows, torch.empty(0, 2, dtype=torch.int64), weights).sum().backward()
    assert rows.grad is not None
    assert weights.grad is not None
    assert experts.down.grad is not None
    assert not experts.down.grad.any()


# --- several ranks --------------------------------------------------------------------------------------------------


def _inputs(rank: int, tokens: int) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(100 + rank)
    x = torch.randn(tokens, HIDDEN, generator=generator).to(torch.bfloat16)
    return x, torch.randn(tokens, HIDDEN, generator=generator).to(torch.bfloat16)


def _gate() -> nn.Gate:
    torch.manual_seed(7)
    gate = nn.Gate(**GATE)
    gate.bias += 0.1 * torch.randn(EXPERTS)
    return gate


def _layer(context: RankContext, mode: Any = "normal") -> nn.MoELayer:
    held = EXPERTS // context.num_ranks
    buffer = Buffer.for_model(
        context.group, hidden=HIDDEN, num_experts=EXPERTS, num_topk=TOPK, max_tokens_per_rank=32, mode=mode
    )
    experts = nn.Experts(hidden=HIDDEN, width=WIDTH, num_experts=held, first_expert=context.rank * held)
    return nn.MoELayer(buffer, _gate(), experts, max_tokens=32)


def _forward_backward(context: RankContext, tokens: list[int]) -> dict[str, torch.Tensor]:
    layer = _layer(context)
    x, direction = _inputs(context.rank, tokens[context.rank])
    x.requires_grad_()
    routing = layer.gate(x)
    output = layer.routed(x, routing)
    output.backward(direction)
    gate_gradient = layer.gate.weight.grad
    if gate_gradient is None:
        gate_gradient = torch.zeros_like(layer.gate.weight)
    dist.all_reduce(gate_gradient, group=context.group)
    found = {
        "topk_idx": routing.topk_idx,
        "output": output,
        "grad x": x.grad,
        "grad gate": gate_gradient,
        "grad gate_up": layer.experts.gate_up.grad,
        "grad down": layer.experts.down.grad,
    }
    layer.buffer.destroy()
    return {name: value.detach() for name, value in found.items() if value is not None}


@pytest.mark.parametrize(
    "tokens",
    [[37], [20, 31], [16, 0, 29], [24, 17, 1, 40], [0, 0, 0, 0]],
    ids=["1 rank", "2 ranks", "3 ranks, one idle", "4 ranks", "4 ranks without tokens"],
)
def test_outputs_and_gradients_equal_one_process(pool: RankPool, tokens: list[int]) -> None:
    found = pool.run(_forward_backward, tokens, num_ranks=len(tokens))
    x, direction = (torch.cat(parts) for parts in zip(*(_inputs(r, n) for r, n in enumerate(tokens)), strict=True))
    topk_idx = torch.cat([rank["topk_idx"] for rank in found])
    experts = nn.Experts(hidden=HIDDEN, width=WIDTH, num_experts=EXPERTS)
    check = nn.OneProcessCheck(_gate(), experts, num_ranks=len(tokens))
    assert check.misrouted(x, topk_idx).numel() == 0
    for name, expected in check.normal(x, topk_idx, direction).items():
        if name == "grad gate":
            actual = found[0][name]
        else:
            actual = torch.cat([rank[name] for rank in found])
        difference = expected.difference(actual)
        assert difference.agrees, f"{name}: {difference}"


def _rows_everywhere(context: RankContext) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, list[int]]:
    """Every token to every rank; each rank's loss is (rank + 1) times the sum of what arrived."""
    buffer = Buffer(context.group, 1 << 20)
    num_ranks = context.num_ranks
    x = torch.full((2, 16), float(context.rank + 1), dtype=torch.bfloat16, requires_grad=True)
    weights = torch.ones(2, num_ranks, requires_grad=True)
    topk_idx = torch.arange(num_ranks).expand(2, -1).contiguous()
    arrived = nn.dispatch(buffer, x, topk_idx, weights, num_experts=num_ranks)
    own_weight = arrived.recv_topk_weights.sum(-1, keepdim=True)
    loss = ((context.rank + 1) * arrived.recv_x.float() * own_weight).sum()
    loss.backward()
    buffer.destroy()
    assert x.grad is not None
    assert weights.grad is not None
    return arrived.recv_x.detach(), x.grad, weights.grad, arrived.num_recv_tokens_per_expert


def test_gradient_of_dispatch_sums_over_ranks_by_hand(pool: RankPool) -> None:
    for rank, (recv_x, grad_x, grad_weights, counts) in enumerate(pool.run(_rows_everywhere, num_ranks=3)):
        assert recv_x[:, 0].tolist() == [1, 1, 2, 2, 3, 3]
        assert counts == [6]
        assert torch.equal(grad_x, torch.full((2, 16), 6.0, dtype=torch.bfloat16))  # 1 + 2 + 3
        # Rank d contributes (d + 1) times the row's sum, 16 (rank + 1), to the weight of its own column alone.
        assert grad_weights.dtype == torch.float32
        assert grad_weights.tolist() == [[16.0 * (rank + 1) * (d + 1) for d in range(3)]] * 2


def _weight_of_other_ranks(context: RankContext) -> torch.Tensor:
    """A rank that (wrongly) puts weights of other ranks' columns into its loss."""
    buffer = Buffer(context.group, 1 << 20)
    x = torch.ones(1, 16, dtype=torch.bfloat16)
    weights = torch.ones(1, 2, requires_grad=True)
    arrived = nn.dispatch(buffer, x, torch.tensor([[0, 1]]), weights, num_experts=2)
    arrived.recv_topk_weights.sum().backward()
    buffer.destroy()
    assert weights.grad is not None
    return weights.grad


def test_padding_columns_carry_no_gradient(pool: RankPool) -> None:
    # Every weight arrives once, at the rank of its expert; the zeros elsewhere are constants.
    for gradient in pool.run(_weight_of_other_ranks, num_ranks=2):
        assert gradient.tolist() == [[1.0, 1.0]]


def _low_latency(context: RankContext, tokens: list[int]) -> tuple[torch.Tensor, torch.Tensor]:
    layer = _layer(context, "low_latency")
    x, y = _inputs(context.rank, tokens[context.rank])
    step = layer.low_latency(x)
    step.compute()
    other = layer.low_latency(y)  # two operations in flight
    first = step.result()
    second = other.result()
    assert torch.equal(step.result(), first)
    layer.buffer.destroy()
    return torch.cat([first, second]), torch.cat([layer.gate(x).topk_idx, layer.gate(y).topk_idx])


@pytest.mark.parametrize("tokens", [[9], [0, 12], [5, 32, 1, 0]], ids=["1 rank", "2 ranks, one idle", "4 ranks"])
def test_low_latency_outputs_equal_one_process(pool: RankPool, tokens: list[int]) -> None:
    found = pool.run(_low_latency, tokens, num_ranks=len(tokens))
    x = torch.cat([torch.cat(_inputs(rank, n)) for rank, n in enumerate(tokens)])
    topk_idx = torch.cat([idx for _, idx in found])
    experts = nn.Experts(hidden=HIDDEN, width=WIDTH, num_experts=EXPERTS)
    check = nn.OneProcessCheck(_gate(), experts, num_ranks=len(tokens))
    assert check.misrouted(x, topk_idx).numel() == 0
    difference = check.low_latency(x, topk_idx, use_fp8=False).difference(torch.cat([out for out, _ in found]))
    assert difference.agrees, difference


def _wrong_share(context: RankContext) -> str:
    buffer = Buffer(context.group, 1 << 20)
    try:
        nn.MoELayer(buffer, _gate(), nn.Experts(hidden=HIDDEN, width=WIDTH, num_experts=5))
    except ArgumentError as error:
        return str(error)
    finally:
        buffer.destroy()
    return "accepted"


def test_layer_refuses_experts_of_another_rank(pool: RankPool) -> None:
    assert all("12 per rank" in text for text in pool.run(_wrong_share, num_ranks=2))


# --- the check itself -----------------------------------------------------------------------------------------------


def _transported(check: nn.OneProcessCheck, x: torch.Tensor, topk_idx: torch.Tensor) -> torch.Tensor:
    """The layer in one process in float32, rounded to bf16 where two ranks would round."""
    gate, experts = check.gate, check.experts
    weights = gate.weigh(gate.scores(x), topk_idx)
    held = EXPERTS // 2
    total = torch.zeros(x.shape, dtype=torch.float32)
    for rank in range(2):
        mine = torch.where(topk_idx // held == rank, topk_idx, -1)
        total += experts(x, mine, weights).to(torch.bfloat16).float()
    return total.to(torch.bfloat16)


def test_check_accepts_rounding_and_finds_what_is_larger() -> None:
    x = torch.cat([_inputs(rank, 50)[0] for rank in range(2)])
    check = nn.OneProcessCheck(_gate(), nn.Experts(hidden=HIDDEN, width=WIDTH, num_experts=EXPERTS), num_ranks=2)
    topk_idx = check.gate(x).topk_idx
    expected = check.normal(x, topk_idx)["output"]
    honest = _transported(check, x, topk_idx).detach()
    difference = expected.difference(honest)
    assert difference.agrees
    assert difference.max_share > 0.05  # the tolerance is not far wider than what rounding does
    for name, wrong in {
        "a row of another token": honest.index_copy(0, torch.tensor([61]), honest[60:61]),
        "a row lost": honest.index_fill(0, torch.tensor([61]), 0.0),
        "one value off by 2 %": honest.clone().index_put_(
            (torch.tensor(61), honest[61].abs().argmax()), honest[61, honest[61].abs().argmax()] * 1.02
        ),
        "not a number": honest.index_fill(0, torch.tensor([61]), float("nan")),
    }.items():
        assert expected.difference(wrong).first_row == 61, name


def test_check_finds_a_misrouted_token_and_forgives_a_tie() -> None:
    x = _inputs(0, 40)[0]
    torch.manual_seed(5)
    gate = nn.Gate(hidden=HIDDEN, num_experts=8, num_topk=2)
    check = nn.OneProcessCheck(gate, nn.Experts(hidden=HIDDEN, width=WIDTH, num_experts=8), num_ranks=2)
    topk_idx = gate(x).topk_idx
    assert check.misrouted(x, topk_idx).numel() == 0
    worst = gate.scores(x).argmin(-1)
    wrong = topk_idx.clone()
    wrong[13, 0] = worst[13]
    assert check.misrouted(x, wrong).tolist() == [13]
    with torch.no_grad():
        gate.weight[:] = gate.weight[:1]  # all experts alike: any choice is as good
    assert check.misrouted(x, wrong).numel() == 0


def test_fp8_blocks_by_hand() -> None:
    x = torch.zeros(1, 256, dtype=torch.bfloat16)
    x[0, 0], x[0, 1] = 448.0, 1.0
    values, scales = nn.quantise_fp8_blocks(x)
    assert values[0, :2].float().tolist() == [448.0, 1.0]
    assert scales[0, 0].item() == pytest.approx(1.0, rel=1e-6)
    assert scales[0, 1].item() == pytest.approx(1e-4 / 448, rel=1e-6)
    torch.testing.assert_close(nn.dequantise(values, scales), x.float(), rtol=1e-6, atol=0)


def test_local_layer_is_gate_and_experts() -> None:
    layer = nn.LocalMoELayer(_gate(), nn.Experts(hidden=HIDDEN, width=WIDTH, num_experts=EXPERTS))
    x = _inputs(0, 6)[0]
    double = copy.deepcopy(layer).double()
    torch.testing.assert_close(layer(x).double(), double(x), rtol=1e-4, atol=1e-4)
