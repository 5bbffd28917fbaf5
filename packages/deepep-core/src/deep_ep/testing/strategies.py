"""hypothesis strategies for whole multi-rank cases.

Everything is drawn as small integers with the simplest first, so a failing case shrinks to few ranks, few tokens, one
expert and no options, and its ``repr`` is all that is needed to run it again.
"""

from __future__ import annotations

from typing import Any, Literal, get_args

from hypothesis import strategies as st

from .conformance.low_latency_calls import CASTS, COMPLETIONS, LowLatencyOptions
from .conformance.normal_calls import OVERLAPS, NormalOptions
from .inputs import Case
from .routing import PATTERNS, Routing

Hard = Literal["a rank without tokens", "all choices on one rank"]
HARD: tuple[Hard, ...] = get_args(Hard)


def _divisors(number: int) -> list[int]:
    return [d for d in range(number, 0, -1) if number % d == 0]


@st.composite
def routings(
    draw: st.DrawFn,
    /,
    *,
    num_ranks: int,
    max_tokens: int = 10,
    max_local_experts: int = 4,
    max_topk: int = 8,
    hard: Hard | None = None,
) -> Routing:
    """A routing for ``num_ranks`` ranks: one that is ``hard`` in this way, or any."""
    tokens = st.integers(1, max_tokens)
    if draw(st.booleans()):
        tokens = st.integers(0, 2).map(lambda n: n and max_tokens // n)
    num_tokens = draw(st.lists(tokens, min_size=num_ranks, max_size=num_ranks))
    if hard == "a rank without tokens":
        num_tokens[draw(st.integers(0, num_ranks - 1))] = 0
    on_one_rank = hard == "all choices on one rank"
    if on_one_rank and not any(num_tokens):
        num_tokens[-1] = 1
    return Routing(
        num_tokens=tuple(num_tokens),
        num_experts=num_ranks * draw(st.integers(1, max_local_experts)),
        num_topk=draw(st.integers(1, max_topk)),
        pattern="skewed" if on_one_rank else draw(st.sampled_from(PATTERNS)),
        target=draw(st.integers(0, num_ranks - 1)),
        drop_percent=0 if on_one_rank else draw(st.sampled_from([0, 0, 30, 90])),
        seed=draw(st.integers(0, 2**16)),
    )


@st.composite
def normal_cases(
    draw: st.DrawFn, /, *, num_ranks: int, nodes: bool = True, **limits: Any
) -> tuple[Case, NormalOptions]:
    """A case of normal mode and how to call it. With ``nodes``, virtual nodes are drawn too."""
    dtype: Literal["bf16", "fp8"] = "fp8" if draw(st.booleans()) else "bf16"
    case = Case(
        routing=draw(routings(num_ranks=num_ranks, **limits)),
        hidden=16 * draw(st.integers(1, 8)) if dtype == "fp8" else 8 * draw(st.integers(1, 16)),
        ranks_per_node=draw(st.sampled_from(_divisors(num_ranks))) if nodes else None,
    )
    with_topk = draw(st.booleans())
    options = NormalOptions(
        dtype=dtype,
        scales=draw(st.sampled_from(["row_major", "column_major", "packed"])) if dtype == "fp8" else "none",
        num_scales=draw(st.integers(1, 5)),
        with_topk=with_topk,
        index_dtype=draw(st.sampled_from(["int64", "int32"])),
        with_combine_weights=draw(st.booleans()),
        num_biases=draw(st.integers(0, 2)),
        expert_alignment=draw(st.sampled_from([1, 4, 128])),
        num_spare_rows=draw(st.sampled_from([None, None, 0, 5])),
        overlap=draw(st.sampled_from(OVERLAPS)),
        replay_hidden=draw(st.sampled_from([None, 16, 48])),
    )
    return case, options


@st.composite
def low_latency_cases(draw: st.DrawFn, /, *, num_ranks: int, **limits: Any) -> tuple[Case, LowLatencyOptions]:
    """A case of low-latency mode and how to call it."""
    cast = draw(st.sampled_from(CASTS))
    case = Case(
        routing=draw(routings(num_ranks=num_ranks, **limits)),
        hidden={"bf16": 8, "ue8m0": 512}.get(cast, 128) * draw(st.integers(1, 1 if cast == "ue8m0" else 3)),
    )
    options = LowLatencyOptions(
        cast=cast,
        completion=draw(st.sampled_from(COMPLETIONS)),
        ll_reduce=draw(st.sampled_from(["rank", "expert"])),
        index_dtype=draw(st.sampled_from(["int64", "int32"])),
        num_spare_tokens=draw(st.integers(0, 3)),
        into_out=draw(st.booleans()),
        zero_copy=draw(st.booleans()),
        with_statistics=draw(st.booleans()),
        weights_in_dispatch=draw(st.booleans()),
    )
    return case, options
