"""Bad input on one rank of three: the right error on every rank, at once, and a buffer that works for the next call.

"At once" is seen without a clock: the buffers' deadline is longer than a run may last.

Each kind of bad input has a name, so one can be run alone: ``pytest tests/test_bad_input.py -k bias-of-wrong-shape``.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch

from deep_ep import Buffer
from deep_ep.launch import RankContext
from deep_ep.testing.conformance.errors import NEVER_S, Calls, Outcome, outcome_of
from deep_ep.testing.conformance.lifecycle import modes_round_trip
from deep_ep.testing.inputs import Case
from deep_ep.testing.routing import Routing

NUM_RANKS = 3
OFFENDER = 1
CASE = Case(
    routing=Routing(num_tokens=(5, 6, 4), num_experts=6, num_topk=3, seed=4),
    hidden=512,
)

Wrong = Callable[[Calls], dict[str, Any]]


def fp8(calls: Calls) -> torch.Tensor:
    return calls.x.to(torch.float32).to(torch.float8_e4m3fn)


def scales(calls: Calls) -> torch.Tensor:
    return torch.ones(len(calls.x), 4)


def layout(calls: Calls) -> tuple[Any, ...]:
    return calls.buffer.get_dispatch_layout(calls.topk_idx, calls.case.routing.num_experts)


def with_value(tensor: torch.Tensor, value: int) -> torch.Tensor:
    changed = tensor.clone()
    changed[0, 0] = value
    return changed


# What the offender passes wrong, and what its error has to say.

FRESH_DISPATCH: dict[str, tuple[str, Wrong]] = {
    "x-is-no-tensor": ("x is a str", lambda c: {"x": "tokens"}),
    "x-has-one-dimension": ("x has shape", lambda c: {"x": c.x.flatten()}),
    "x-is-float32": ("float32", lambda c: {"x": c.x.float()}),
    "x-is-float16": ("float16", lambda c: {"x": c.x.half()}),
    "x-is-not-contiguous": ("contiguous", lambda c: {"x": c.x.t().contiguous().t()}),
    "row-of-24-bytes": ("24 bytes", lambda c: {"x": c.x[:, :12].contiguous()}),
    "row-of-no-bytes": ("0 bytes", lambda c: {"x": c.x[:, :0].contiguous()}),
    "fp8-without-scales": ("float8_e4m3fn", lambda c: {"x": fp8(c)}),
    "bf16-with-scales": ("comes with scales", lambda c: {"x": (c.x, scales(c))}),
    "scales-for-other-tokens": ("scales have", lambda c: {"x": (fp8(c), scales(c)[1:])}),
    "scales-of-float16": ("scales has dtype float16", lambda c: {"x": (fp8(c), scales(c).half())}),
    "three-tensors-as-x": ("tuple of 3", lambda c: {"x": (fp8(c), scales(c), scales(c))}),
    "no-layout": ("num_tokens_per_rank is None", lambda c: {"num_tokens_per_rank": None}),
    "counts-of-int64": ("num_tokens_per_rank has dtype int64", lambda c: {"num_tokens_per_rank": layout(c)[0].long()}),
    "counts-for-too-few-ranks": ("num_tokens_per_rank has shape", lambda c: {"num_tokens_per_rank": layout(c)[0][1:]}),
    "counts-of-another-routing": ("num_tokens_per_rank", lambda c: {"num_tokens_per_rank": layout(c)[0] + 1}),
    "mask-of-integers": ("is_token_in_rank has dtype int32", lambda c: {"is_token_in_rank": layout(c)[3].int()}),
    "mask-for-other-tokens": ("is_token_in_rank has shape", lambda c: {"is_token_in_rank": layout(c)[3][1:]}),
    "mask-of-another-routing": ("is_token_in_rank", lambda c: {"is_token_in_rank": ~layout(c)[3]}),
    "expert-counts-of-7-experts": ("num_experts is 7", lambda c: {"num_tokens_per_expert": torch.zeros(7).int()}),
    "choices-without-weights": ("topk_idx is given alone", lambda c: {"topk_weights": None}),
    "weights-without-choices": ("topk_weights is given alone", lambda c: {"topk_idx": None}),
    "choices-of-float": ("topk_idx has dtype float32", lambda c: {"topk_idx": c.topk_idx.float()}),
    "choices-for-other-tokens": ("topk_idx has", lambda c: {"topk_idx": c.topk_idx[1:]}),
    "choice-of-an-expert-too-many": ("is 6", lambda c: {"topk_idx": with_value(c.topk_idx, 6)}),
    "choice-below-minus-one": ("is -2", lambda c: {"topk_idx": with_value(c.topk_idx, -2)}),
    "33-choices": ("33 columns", lambda c: {"topk_idx": c.topk_idx.repeat(1, 11)}),
    "weights-of-float64": ("topk_weights has dtype float64", lambda c: {"topk_weights": c.topk_weights.double()}),
    "weights-of-wrong-shape": ("topk_weights has shape", lambda c: {"topk_weights": c.topk_weights[:, 1:]}),
    "alignment-of-zero": ("expert_alignment is 0", lambda c: {"expert_alignment": 0}),
    "alignment-of-a-half": ("expert_alignment is 0.5", lambda c: {"expert_alignment": 0.5}),
    "negative-worst-tokens": ("num_worst_tokens is -1", lambda c: {"num_worst_tokens": -1}),
    "config-is-a-dict": ("config is a dict", lambda c: {"config": {"num_sms": 20}}),
    "event-is-a-number": ("previous_event is a int", lambda c: {"previous_event": 3}),
    "comm-stream-without-event": ("allocate_on_comm_stream", lambda c: {"allocate_on_comm_stream": True}),
}
CACHED_DISPATCH: dict[str, tuple[str, Wrong]] = {
    "handle-is-a-number": ("handle is a int", lambda c: {"handle": 5}),
    "handle-of-too-few-parts": ("handle has 2 parts", lambda c: {"handle": (c.topk_idx, c.topk_idx)}),
    "handle-of-low-latency-mode": ("handle has 5 parts", lambda c: {"handle": (c.topk_idx, c.topk_idx, 1, 2, 3)}),
    "choices-beside-a-handle": ("do not go with a handle", lambda c: {"topk_idx": c.topk_idx}),
    "other-tokens-than-the-handle": ("tokens", lambda c: {"x": c.x[1:]}),
}
COMBINE: dict[str, tuple[str, Wrong]] = {
    "combine-rows-of-float32": ("float32", lambda c: {"x": torch.zeros(1, 512)}),
    "combine-of-too-few-rows": ("rows", lambda c: {"x": torch.zeros(1, 512, dtype=torch.bfloat16)}),
    "combine-handle-of-none": ("handle is a NoneType", lambda c: {"handle": None}),
    "combine-weights-for-other-rows": ("topk_weights has shape", lambda c: {"topk_weights": torch.ones(1, 3)}),
    "combine-weights-of-int": ("topk_weights has dtype", lambda c: {"topk_weights": torch.ones(1, 3).int()}),
    "bias-of-wrong-shape": ("bias", lambda c: {"bias": c.x[:, :64]}),
    "bias-of-float32": ("bias", lambda c: {"bias": c.x.float()}),
    "combine-config-is-a-number": ("config is a int", lambda c: {"config": 20}),
    "three-biases": ("3 tensors", lambda c: {"bias": (c.x, c.x, c.x)}),
}
LOW_LATENCY_DISPATCH: dict[str, tuple[str, Wrong]] = {
    "low-latency-rows-of-float32": ("float32", lambda c: {"x": c.x.float()}),
    "low-latency-more-tokens-than-the-most": ("tokens", lambda c: {"x": c.x.repeat(3, 1)}),
    "low-latency-hidden-of-100": ("hidden is 100", lambda c: {"x": c.x[:, :100].contiguous()}),
    "low-latency-most-tokens-of-zero": (
        "num_max_dispatch_tokens_per_rank is 0",
        lambda c: {"num_max_dispatch_tokens_per_rank": 0},
    ),
    "low-latency-7-experts": ("num_experts is 7", lambda c: {"num_experts": 7}),
    "low-latency-expert-too-many": ("is 6", lambda c: {"topk_idx": with_value(c.topk_idx, 6)}),
    "ue8m0-without-rounding": ("use_ue8m0", lambda c: {"use_ue8m0": True}),
    "hook-and-async": ("exclude each other", lambda c: {"async_finish": True, "return_recv_hook": True}),
    "statistics-of-int64": (
        "cumulative_local_expert_recv_stats has dtype int64",
        lambda c: {"cumulative_local_expert_recv_stats": torch.zeros(2, dtype=torch.int64)},
    ),
    "wait-statistics-for-too-few-ranks": (
        "dispatch_wait_recv_cost_stats has shape",
        lambda c: {"dispatch_wait_recv_cost_stats": torch.zeros(2, dtype=torch.int64)},
    ),
}
LOW_LATENCY_COMBINE: dict[str, tuple[str, Wrong]] = {
    "low-latency-outputs-of-two-dimensions": ("x has shape", lambda c: {"x": c.x}),
    "low-latency-handle-of-normal-mode": ("handle has 6 parts", lambda c: {"handle": (c.topk_idx,) * 6}),
    "low-latency-weights-of-float64": ("topk_weights has dtype", lambda c: {"topk_weights": c.topk_weights.double()}),
    "zero-copy-and-logfmt": ("exclude each other", lambda c: {"zero_copy": True, "use_logfmt": True}),
    "out-of-wrong-shape": ("out has shape", lambda c: {"out": c.x[:, :128].contiguous()}),
    "out-of-float32": ("out has dtype", lambda c: {"out": c.x.float()}),
}
REFUSED = {
    **{name: ("dispatch", *kind) for name, kind in FRESH_DISPATCH.items()},
    **{name: ("cached_dispatch", *kind) for name, kind in CACHED_DISPATCH.items()},
    **{name: ("combine", *kind) for name, kind in COMBINE.items()},
    **{name: ("low_latency_dispatch", *kind) for name, kind in LOW_LATENCY_DISPATCH.items()},
    **{name: ("low_latency_combine", *kind) for name, kind in LOW_LATENCY_COMBINE.items()},
}


def prepared(calls: Calls, operation: str) -> Callable[..., tuple[Any, ...]]:
    """The call, everything that has to come before it done."""
    if operation == "dispatch":
        return calls.dispatch
    if operation in ("cached_dispatch", "combine"):
        handle = calls.dispatch()[4]
        if operation == "combine":
            return lambda **wrong: calls.combine(**({"handle": handle} | wrong))
        return lambda **wrong: calls.buffer.dispatch(**({"x": calls.x, "handle": handle} | wrong))
    if operation == "low_latency_dispatch":
        return calls.low_latency_dispatch
    low_latency_handle = calls.low_latency_dispatch()[2]
    return lambda **wrong: calls.low_latency_combine(**({"handle": low_latency_handle} | wrong))


def refused_call(context: RankContext, kind: str) -> Outcome:
    operation, _, wrong = REFUSED[kind]
    with_buffer = buffer_of(context)
    calls = Calls(buffer=with_buffer, case=CASE, context=context)
    call = prepared(calls, operation)
    arguments = wrong(calls) if context.rank == OFFENDER else {}
    outcome = outcome_of(lambda: call(**arguments))
    finish(with_buffer, context)
    return outcome


def buffer_of(context: RankContext) -> Buffer:
    return Buffer(
        context.group,
        1 << 16,
        1 << 16,
        low_latency_mode=True,
        timeout_s=NEVER_S,
        backend="reference",
        ll_reduce="rank",
    )


def finish(buffer: Buffer, context: RankContext) -> None:
    """The next correct calls on the same buffer give right results."""
    modes_round_trip(buffer, CASE, context, ("normal", "low_latency"))
    buffer.destroy()


def test_kinds_of_bad_input_are_at_least_thirty():
    assert len(REFUSED) + len(DISAGREEING) + len(CONSTRUCTION) >= 30


@pytest.mark.parametrize("kind", REFUSED)
def test_refused_arguments(rank_pool, kind):
    outcomes = rank_pool.run(refused_call, kind, num_ranks=NUM_RANKS)
    own = outcomes[OFFENDER]
    assert own.error == "ArgumentError"
    assert REFUSED[kind][1] in own.text
    for rank, outcome in enumerate(outcomes):
        if rank != OFFENDER:
            assert outcome.error == "PeerRefusedError", f"rank {rank}: {outcome}"
            assert outcome.ranks == (OFFENDER,)
            assert f"rank {OFFENDER}" in outcome.text
            assert own.text[:120] in outcome.text, "peers are told the reason"
    assert outcomes[0].text == outcomes[2].text


# On two nodes of two ranks.
SEVERAL_NODES: dict[str, tuple[str, str, Wrong]] = {
    "node-counts-for-too-few-nodes": (
        "dispatch",
        "num_tokens_per_rdma_rank has shape",
        lambda c: {"num_tokens_per_rdma_rank": layout(c)[1][1:]},
    ),
    "node-counts-of-int64": (
        "dispatch",
        "num_tokens_per_rdma_rank has dtype",
        lambda c: {"num_tokens_per_rdma_rank": layout(c)[1].long()},
    ),
    "node-counts-of-another-routing": (
        "dispatch",
        "num_tokens_per_rdma_rank",
        lambda c: {"num_tokens_per_rdma_rank": layout(c)[1] + 1},
    ),
    "handle-of-one-node": ("cached_dispatch", "handle has 6 parts", lambda c: {"handle": (c.topk_idx,) * 6}),
    "combine-handle-of-one-node": ("combine", "handle has 6 parts", lambda c: {"handle": (c.topk_idx,) * 6}),
}
NODES_CASE = Case(
    routing=Routing(num_tokens=(5, 6, 4, 3), num_experts=8, num_topk=3, seed=4), hidden=512, ranks_per_node=2
)


def refused_call_across_nodes(context: RankContext, kind: str) -> Outcome:
    operation, _, wrong = SEVERAL_NODES[kind]
    buffer = buffer_of(context)
    calls = Calls(buffer=buffer, case=NODES_CASE, context=context)
    call = prepared(calls, operation)
    arguments = wrong(calls) if context.rank == OFFENDER else {}
    outcome = outcome_of(lambda: call(**arguments))
    modes_round_trip(buffer, NODES_CASE, context, ("normal",))
    buffer.destroy()
    return outcome


@pytest.mark.parametrize("kind", SEVERAL_NODES)
def test_refused_arguments_across_nodes(rank_pool, kind):
    environment = {"DEEPEP_RANKS_PER_NODE": "2"}
    outcomes = rank_pool.run(refused_call_across_nodes, kind, num_ranks=4, environment=environment)
    assert [o.error for o in outcomes] == ["PeerRefusedError", "ArgumentError", "PeerRefusedError", "PeerRefusedError"]
    assert SEVERAL_NODES[kind][1] in outcomes[OFFENDER].text


# --- ranks that disagree: each is right alone -----------------------------------------------------------------------


def low_latency_or_normal(calls: Calls, odd: bool) -> object:
    return calls.low_latency_dispatch() if odd else calls.dispatch()


def dispatch_or_combine(calls: Calls, odd: bool) -> object:
    handle = calls.dispatch()[4]
    return calls.combine(handle) if odd else calls.dispatch()


def dispatch_or_replay(calls: Calls, odd: bool) -> object:
    handle = calls.dispatch()[4]
    return calls.buffer.dispatch(calls.x, handle=handle) if odd else calls.dispatch()


def clean_or_dispatch(calls: Calls, odd: bool) -> object:
    if odd:
        return calls.buffer.clean_low_latency_buffer(6, CASE.hidden, CASE.routing.num_experts)
    return calls.low_latency_dispatch()


def combine_twice_or_dispatch_in_between(calls: Calls, odd: bool) -> object:
    handle = calls.low_latency_dispatch()[2]
    calls.low_latency_combine(handle)
    return calls.low_latency_dispatch() if odd else calls.low_latency_combine(handle)


def handles_of_two_dispatches(calls: Calls, odd: bool) -> object:
    """The routing of the second dispatch differs, so handles mixed up cannot pass unnoticed."""
    first = calls.dispatch()[4]
    nobody = torch.full_like(calls.topk_idx, -1)
    per_rank, per_node, per_expert, in_rank, _ = calls.buffer.get_dispatch_layout(nobody, CASE.routing.num_experts)
    second = calls.dispatch(
        num_tokens_per_rank=per_rank,
        num_tokens_per_rdma_rank=per_node,
        is_token_in_rank=in_rank,
        num_tokens_per_expert=per_expert,
        topk_idx=nobody,
    )[4]
    return calls.buffer.dispatch(calls.x, handle=second if odd else first)


def other_experts(calls: Calls, odd: bool) -> object:
    """The odd rank has 12 experts where the others have 6."""
    if not odd:
        return calls.dispatch()
    per_rank, per_node, per_expert, in_rank, _ = calls.buffer.get_dispatch_layout(calls.topk_idx, 12)
    return calls.dispatch(
        num_tokens_per_rank=per_rank,
        num_tokens_per_rdma_rank=per_node,
        is_token_in_rank=in_rank,
        num_tokens_per_expert=per_expert,
    )


def replay_of_another_width(calls: Calls, odd: bool) -> object:
    handle = calls.dispatch()[4]
    return calls.buffer.dispatch(calls.x[:, :64].contiguous() if odd else calls.x, handle=handle)


def dispatch_with(wrong: Wrong) -> Callable[[Calls, bool], object]:
    return lambda calls, odd: calls.dispatch(**(wrong(calls) if odd else {}))


def low_latency_with(wrong: Wrong) -> Callable[[Calls, bool], object]:
    return lambda calls, odd: calls.low_latency_dispatch(**(wrong(calls) if odd else {}))


def narrower(topk: torch.Tensor) -> torch.Tensor:
    return topk[:, :2].contiguous()


DISAGREEING: dict[str, tuple[str, Callable[[Calls, bool], object]]] = {
    "hidden": ("disagree on hidden", dispatch_with(lambda c: {"x": c.x[:, :64].contiguous()})),
    "dtype": ("disagree on", dispatch_with(lambda c: {"x": (fp8(c), scales(c))})),
    "alignment": ("expert_alignment", dispatch_with(lambda c: {"expert_alignment": 8})),
    "worst-tokens": ("num_worst_tokens", dispatch_with(lambda c: {"num_worst_tokens": 64})),
    "no-choices": ("num_topk", dispatch_with(lambda c: {"topk_idx": None, "topk_weights": None})),
    "expert-count": ("num_experts", other_experts),
    "replay-of-another-width": ("hidden", replay_of_another_width),
    "handles-of-two-dispatches": ("handles of different dispatches", handles_of_two_dispatches),
    "mode": ("different calls", low_latency_or_normal),
    "dispatch-against-combine": ("different calls", dispatch_or_combine),
    "dispatch-against-replay": ("different calls", dispatch_or_replay),
    "clean-against-dispatch": ("different calls", clean_or_dispatch),
    "order-of-low-latency-calls": ("different calls", combine_twice_or_dispatch_in_between),
    "low-latency-hidden": ("hidden", low_latency_with(lambda c: {"x": c.x[:, :128].contiguous()})),
    "low-latency-cast": ("flags", low_latency_with(lambda c: {"use_fp8": False})),
    "low-latency-experts": ("num_experts", low_latency_with(lambda c: {"num_experts": 12})),
    "low-latency-most-tokens": ("max_tokens", low_latency_with(lambda c: {"num_max_dispatch_tokens_per_rank": 9})),
    "low-latency-choices": ("num_topk", low_latency_with(lambda c: {"topk_idx": narrower(c.topk_idx)})),
}


def disagreeing_call(context: RankContext, kind: str) -> Outcome:
    buffer = buffer_of(context)
    calls = Calls(buffer=buffer, case=CASE, context=context)
    outcome = outcome_of(lambda: DISAGREEING[kind][1](calls, context.rank == OFFENDER))
    finish(buffer, context)
    return outcome


@pytest.mark.parametrize("kind", DISAGREEING)
def test_disagreement(rank_pool, kind):
    outcomes = rank_pool.run(disagreeing_call, kind, num_ranks=NUM_RANKS)
    assert [outcome.error for outcome in outcomes] == ["PeersDisagreeError"] * NUM_RANKS, str(outcomes)
    assert len({outcome.text for outcome in outcomes}) == 1, "the same text on every rank"
    assert DISAGREEING[kind][0] in outcomes[0].text
    if kind != "handles-of-two-dispatches":
        assert OFFENDER in outcomes[0].ranks


# --- construction ---------------------------------------------------------------------------------------------------

# Arguments of the offender alone; then the offender's error, its peers' error, and what both have to mention.
CONSTRUCTION: dict[str, tuple[dict[str, Any], str, str, str]] = {
    "negative-bytes": ({"num_nvl_bytes": -1}, "ArgumentError", "PeerRefusedError", "num_nvl_bytes is -1"),
    "bytes-of-text": ({"num_rdma_bytes": "1G"}, "ArgumentError", "PeerRefusedError", "num_rdma_bytes is '1G'"),
    "no-queue-pairs": ({"num_qps_per_rank": 0}, "ArgumentError", "PeerRefusedError", "num_qps_per_rank is 0"),
    "deadline-of-zero": ({"timeout_s": 0}, "ArgumentError", "PeerRefusedError", "timeout_s is 0"),
    "unknown-reduction": ({"ll_reduce": "sum"}, "ArgumentError", "PeerRefusedError", "ll_reduce is 'sum'"),
    "backend-of-a-number": ({"backend": 5}, "ArgumentError", "PeerRefusedError", "backend is 5"),
    "other-reduction": ({"ll_reduce": "expert"}, "PeersDisagreeError", "PeersDisagreeError", "ll_reduce=expert"),
    "other-mode": ({"low_latency_mode": False}, "PeersDisagreeError", "PeersDisagreeError", "low_latency_mode=False"),
    "other-shrinking": ({"enable_shrink": True}, "PeersDisagreeError", "PeersDisagreeError", "enable_shrink=True"),
    "unknown-backend": ({"backend": "absent"}, "BackendNotFoundError", "BackendNotFoundError", "'absent'"),
    "other-backend": ({"backend": {"normal": "reference"}}, "ArgumentError", "ArgumentError", "different backends"),
}


def misguided_construction(context: RankContext, kind: str) -> Outcome:
    arguments: dict[str, Any] = {
        "low_latency_mode": True,
        "backend": "reference",
        "ll_reduce": "rank",
        "timeout_s": NEVER_S,
    }
    if context.rank == OFFENDER:
        arguments |= CONSTRUCTION[kind][0]
    outcome = outcome_of(lambda: Buffer(context.group, **arguments))
    finish(buffer_of(context), context)
    return outcome


@pytest.mark.parametrize("kind", CONSTRUCTION)
def test_construction(rank_pool, kind):
    outcomes = rank_pool.run(misguided_construction, kind, num_ranks=NUM_RANKS)
    _, own, of_peers, text = CONSTRUCTION[kind]
    assert [outcome.error for outcome in outcomes] == [of_peers, own, of_peers], str(outcomes)
    assert all(text in outcome.text for outcome in outcomes)
    assert outcomes[0].text == outcomes[2].text


def misguided_setting(context: RankContext, name: str, value: str) -> Outcome:
    import os

    if context.rank == OFFENDER:
        os.environ[name] = value
    outcome = outcome_of(lambda: Buffer(context.group, backend="reference"))
    os.environ.pop(name, None)
    finish(buffer_of(context), context)
    return outcome


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("DEEPEP_TIMEOUT_S", "soon"),
        ("DEEPEP_TIMEOUT_S", "-1"),
        ("DEEPEP_RANKS_PER_NODE", "two"),
        ("DEEPEP_LL_REDUCE", "max"),
        ("DEEPEP_LOW_LATENCY_SMS", "0"),
        ("DEEPEP_RDMA_PROVIDER", "hardware"),
        ("DEEPEP_DEBUG", "perhaps"),
        ("DEEPEP_BACKEND", "normal="),
        ("DEEPEP_CONFIG", "/nowhere/deepep.toml"),
    ],
)
def test_environment_variable_with_a_bad_value(rank_pool, name, value):
    outcomes = rank_pool.run(misguided_setting, name, value, num_ranks=NUM_RANKS)
    assert [o.error for o in outcomes] == ["PeerRefusedError", "SettingError", "PeerRefusedError"], str(outcomes)
    assert all((name if name != "DEEPEP_CONFIG" else value) in outcome.text for outcome in outcomes)


def uneven_nodes(context: RankContext, ranks_per_node: str) -> Outcome:
    import os

    os.environ["DEEPEP_RANKS_PER_NODE"] = ranks_per_node
    outcome = outcome_of(lambda: Buffer(context.group, backend="reference"))
    os.environ.pop("DEEPEP_RANKS_PER_NODE")
    finish(buffer_of(context), context)
    return outcome


def test_ranks_per_node_have_to_divide_the_group(rank_pool):
    outcomes = rank_pool.run(uneven_nodes, "2", num_ranks=NUM_RANKS)
    assert {outcome.error for outcome in outcomes} == {"SettingError"}
    assert len({outcome.text for outcome in outcomes}) == 1


# --- local calls: the offender alone is concerned -------------------------------------------------------------------

LOCAL: dict[str, tuple[str, Callable[[Calls], object]]] = {
    "layout-of-7-experts": ("num_experts is 7", lambda c: c.buffer.get_dispatch_layout(c.topk_idx, 7)),
    "layout-of-no-experts": ("num_experts is 0", lambda c: c.buffer.get_dispatch_layout(c.topk_idx, 0)),
    "layout-of-float": ("float32", lambda c: c.buffer.get_dispatch_layout(c.topk_idx.float(), 6)),
    "layout-of-one-dimension": ("shape", lambda c: c.buffer.get_dispatch_layout(c.topk_idx.flatten(), 6)),
    "layout-of-unknown-expert": ("is 99", lambda c: c.buffer.get_dispatch_layout(with_value(c.topk_idx, 99), 6)),
    "scratch-beyond-its-end": ("do not fit", lambda c: c.buffer.get_local_buffer_tensor(torch.int32, offset=1 << 17)),
    "scratch-out-of-line": ("do not fit", lambda c: c.buffer.get_local_buffer_tensor(torch.int32, offset=2)),
    "masks-without-shrinking": ("enable_shrink", lambda c: c.buffer.low_latency_update_mask_buffer(0, True)),
}


def local_call(context: RankContext, kind: str) -> Outcome:
    buffer = buffer_of(context)
    outcome = Outcome(error="", text="", ranks=(), seconds=0.0)
    if context.rank == OFFENDER:
        outcome = outcome_of(lambda: LOCAL[kind][1](Calls(buffer=buffer, case=CASE, context=context)))
    finish(buffer, context)
    return outcome


@pytest.mark.parametrize("kind", LOCAL)
def test_local_call(rank_pool, kind):
    outcome = rank_pool.run(local_call, kind, num_ranks=NUM_RANKS)[OFFENDER]
    assert outcome.error in ("ArgumentError", "BufferStateError")
    assert LOCAL[kind][0] in outcome.text
