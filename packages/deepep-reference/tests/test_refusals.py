"""What only the backend can see to be wrong is told to every rank, moves nothing, and leaves the buffer usable."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import pytest
import torch

from deep_ep import Buffer, DeepEPError
from deep_ep.launch import RankContext, RankPool

NUM_RANKS = 3
NUM_EXPERTS = 6
MAX_TOKENS = 4
HIDDEN = 128
OFFENDER = 1


@dataclass(kw_only=True)
class Rank:
    """One rank's tokens and buffer. Every token has two choices; experts return what they get."""

    context: RankContext
    buffer: Buffer

    @property
    def is_offender(self) -> bool:
        return self.context.rank == OFFENDER

    def topk_idx(self, seed: int = 0) -> torch.Tensor:
        """``[3, 2]``: other routes for another seed."""
        random = torch.Generator().manual_seed(100 * seed + self.context.rank)
        return torch.stack([torch.randperm(NUM_EXPERTS, generator=random)[:2] for _ in range(3)])

    @property
    def x(self) -> torch.Tensor:
        return (torch.arange(3)[:, None] + 10 * self.context.rank).expand(3, HIDDEN).bfloat16().contiguous()

    def layout(self, seed: int = 0) -> dict[str, torch.Tensor | None]:
        per_rank, per_node, per_expert, in_rank, _ = self.buffer.get_dispatch_layout(self.topk_idx(seed), NUM_EXPERTS)
        return {
            "num_tokens_per_rank": per_rank,
            "num_tokens_per_rdma_rank": per_node,
            "num_tokens_per_expert": per_expert,
            "is_token_in_rank": in_rank,
        }

    def dispatch(self, seed: int = 0, **wrong: Any) -> Any:
        topk_idx = self.topk_idx(seed)
        arguments: dict[str, Any] = {"topk_idx": topk_idx, "topk_weights": torch.ones(topk_idx.shape)}
        return self.buffer.dispatch(self.x, **(arguments | self.layout(seed) | wrong))

    def low_latency_dispatch(self, seed: int = 0, **options: Any) -> Any:
        return self.buffer.low_latency_dispatch(
            self.x, self.topk_idx(seed), MAX_TOKENS, NUM_EXPERTS, **({"use_fp8": False} | options)
        )

    def low_latency_combine(self, recv_x: torch.Tensor, handle: Any, seed: int = 0, **options: Any) -> Any:
        topk_idx = self.topk_idx(seed)
        return self.buffer.low_latency_combine(recv_x, topk_idx, torch.ones(topk_idx.shape), handle, **options)

    def check_round_trips(self) -> None:
        """The buffer still works, in both modes."""
        recv_x, _, _, _, handle, _ = self.dispatch()
        combined = self.buffer.combine(recv_x, handle)[0]
        num_ranks = self.layout()["is_token_in_rank"].sum(dim=1)  # type: ignore[union-attr]
        assert torch.equal(combined, self.x * num_ranks[:, None])
        recv_x, _, handle, _, _ = self.low_latency_dispatch()
        assert torch.equal(self.low_latency_combine(recv_x, handle)[0], self.x * 2)


Scenario = Callable[[Rank], None]
SCENARIOS: dict[str, tuple[Scenario, str, str]] = {}


def scenario(offender: str, others: str) -> Callable[[Scenario], Scenario]:
    """Register what happens, and how it ends on the offender and on the others (names of errors)."""

    def register(function: Scenario) -> Scenario:
        SCENARIOS[function.__name__] = (function, offender, others)
        return function

    return register


@scenario("ArgumentError", "PeerRefusedError")
def layout_of_other_choices(rank: Rank) -> None:
    rank.dispatch(**rank.layout(seed=1) if rank.is_offender else {})


@scenario("ArgumentError", "PeerRefusedError")
def count_that_does_not_fit(rank: Rank) -> None:
    wrong = rank.layout()["num_tokens_per_rank"]
    assert wrong is not None
    rank.dispatch(**{"num_tokens_per_rank": wrong + 1} if rank.is_offender else {})


@scenario("ArgumentError", "PeerRefusedError")
def expert_count_that_does_not_fit(rank: Rank) -> None:
    wrong = rank.layout()["num_tokens_per_expert"]
    assert wrong is not None
    rank.dispatch(**{"num_tokens_per_expert": wrong.flip(0)} if rank.is_offender else {})


@scenario("ArgumentError", "ArgumentError")
def too_few_rows_for_the_worst_case(rank: Rank) -> None:
    rank.dispatch(num_worst_tokens=2)


@scenario("ArgumentError", "PeerRefusedError")
def handle_of_another_group(rank: Rank) -> None:
    handle = rank.dispatch()[4]
    if rank.is_offender:
        handle = (torch.zeros((5, 5), dtype=torch.int32), *handle[1:])
    rank.buffer.dispatch(rank.x, handle=handle)


@scenario("ArgumentError", "PeerRefusedError")
def handle_with_impossible_counts(rank: Rank) -> None:
    recv_x, _, _, _, handle, _ = rank.dispatch()
    if rank.is_offender:
        handle = (-handle[0], *handle[1:])
    rank.buffer.combine(recv_x, handle)


@scenario("PeersDisagreeError", "PeersDisagreeError")
def replay_of_different_dispatches(rank: Rank) -> None:
    handles = [rank.dispatch(seed)[4] for seed in (0, 1)]
    rank.buffer.dispatch(rank.x, handle=handles[rank.is_offender])


@scenario("PeersDisagreeError", "PeersDisagreeError")
def combine_of_different_dispatches(rank: Rank) -> None:
    results = [rank.dispatch(seed) for seed in (0, 1)]
    recv_x, _, _, _, handle, _ = results[rank.is_offender]
    rank.buffer.combine(recv_x, handle)


@scenario("PeersDisagreeError", "PeersDisagreeError")
def different_calls(rank: Rank) -> None:
    handle = rank.dispatch()[4]
    if rank.is_offender:
        rank.buffer.dispatch(rank.x, handle=handle)
    else:
        rank.dispatch()


@scenario("PeersDisagreeError", "PeersDisagreeError")
def different_casts(rank: Rank) -> None:
    rank.low_latency_dispatch(use_fp8=rank.is_offender)


@scenario("PeersDisagreeError", "PeersDisagreeError")
def different_most_tokens(rank: Rank) -> None:
    most = MAX_TOKENS + rank.is_offender
    rank.buffer.low_latency_dispatch(rank.x, rank.topk_idx(), most, NUM_EXPERTS)


@scenario("PeersDisagreeError", "PeersDisagreeError")
def logfmt_on_one_rank(rank: Rank) -> None:
    recv_x, _, handle, _, _ = rank.low_latency_dispatch()
    rank.low_latency_combine(recv_x, handle, use_logfmt=rank.is_offender)


@scenario("PeersDisagreeError", "PeersDisagreeError")
def low_latency_combine_of_different_dispatches(rank: Rank) -> None:
    results = [rank.low_latency_dispatch(seed) for seed in (0, 1)]
    recv_x, _, handle, _, _ = results[rank.is_offender]
    rank.low_latency_combine(recv_x, handle, seed=int(rank.is_offender))


@scenario("ArgumentError", "")
def choices_that_were_not_dispatched(rank: Rank) -> None:
    """The tokens of one rank in another order: as many rows for each expert, but not those."""
    recv_x, _, handle, _, _ = rank.low_latency_dispatch()
    topk_idx = rank.topk_idx()
    if rank.is_offender:
        topk_idx = topk_idx.roll(1, dims=0)
    rank.buffer.low_latency_combine(recv_x, topk_idx, torch.ones(topk_idx.shape), handle)


@scenario("BufferStateError", "PeerRefusedError")
def third_operation_in_flight(rank: Rank) -> None:
    hooks = [rank.low_latency_dispatch(return_recv_hook=True)[4] for _ in range(2)]
    if not rank.is_offender:
        hooks[1]()
    try:
        rank.low_latency_dispatch(return_recv_hook=True)
    finally:
        hooks[0]()


@scenario("ArgumentError", "PeerRefusedError")
def combine_before_receive(rank: Rank) -> None:
    recv_x, _, handle, _, hook = rank.low_latency_dispatch(return_recv_hook=True)
    if not rank.is_offender:
        hook()
    rank.low_latency_combine(recv_x, handle)


@scenario("ArgumentError", "PeerRefusedError")
def zero_copy_without_its_buffer(rank: Rank) -> None:
    recv_x, _, handle, _, _ = rank.low_latency_dispatch()
    if not rank.is_offender:
        rank.buffer.get_next_low_latency_combine_buffer(handle).copy_(recv_x)
    rank.low_latency_combine(recv_x, handle, zero_copy=True)


@scenario("ArgumentError", "PeerRefusedError")
def handle_that_names_rows_beyond_the_end(rank: Rank) -> None:
    recv_x, _, handle, _, _ = rank.low_latency_dispatch()
    if rank.is_offender:
        handle = (handle[0], handle[1] + 1000, *handle[2:])
    rank.low_latency_combine(recv_x, handle)


def play(context: RankContext, name: str) -> tuple[str, str]:
    """Error and text of a scenario on this rank, after which both modes still work."""
    rank = Rank(
        context=context,
        buffer=Buffer(context.group, low_latency_mode=True, backend="reference"),
    )
    outcome = ("", "")
    try:
        SCENARIOS[name][0](rank)
    except DeepEPError as error:
        outcome = (type(error).__name__, str(error))
    rank.check_round_trips()
    rank.buffer.destroy()
    return outcome


@pytest.mark.parametrize("name", SCENARIOS)
def test_every_rank_raises_and_the_next_calls_work(rank_pool: RankPool, name: str) -> None:
    outcomes = rank_pool.run(play, name, num_ranks=NUM_RANKS)
    _, offender, others = SCENARIOS[name]
    expected = [offender if rank == OFFENDER else others for rank in range(NUM_RANKS)]
    assert [error for error, _ in outcomes] == expected, outcomes
    if offender == others:
        assert len({text for _, text in outcomes}) == 1, outcomes
    elif others:
        assert all(outcomes[OFFENDER][1][:60] in text for _, text in outcomes), outcomes


def test_a_disagreeing_call_says_who_passed_what(rank_pool: RankPool) -> None:
    _, text = rank_pool.run(play, "different_most_tokens", num_ranks=NUM_RANKS)[0]
    assert "max_tokens" in text and "ranks 0, 2: 4" in text and "rank 1: 5" in text
