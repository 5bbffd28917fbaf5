"""Generated multi-rank cases of both modes against plain arithmetic: at least 300 in each run.

A failing case shrinks by itself and is printed as two small objects; ``round_trip`` runs it again.
"""

from __future__ import annotations

from collections import Counter

import pytest
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st

from deep_ep.testing.conformance import Setup, low_latency, normal
from deep_ep.testing.conformance.base import environment_of
from deep_ep.testing.strategies import HARD, Hard, low_latency_cases, normal_cases

RANK_COUNTS = (1, 2, 3, 4, 8)
# Cases of each mode and number of ranks, by what makes them hard.
EXAMPLES: dict[Hard | None, int] = {None: 30, **dict.fromkeys(HARD, 10)}
KINDS = [
    pytest.param(num_ranks, hard, id=f"{num_ranks}-{hard or 'any'}")
    for num_ranks in RANK_COUNTS
    for hard in EXAMPLES
    if num_ranks > 1 or hard != "all choices on one rank"
]
SETUP = Setup(backend="reference", modes=frozenset({"normal", "low_latency"}))
CASES = settings(
    deadline=None,
    database=None,
    # Every case counts, and a run's time has a bound: no repeats of old failures, no search for a second one.
    phases=[Phase.generate, Phase.shrink],
    report_multiple_bugs=False,
    suppress_health_check=[HealthCheck.too_slow, HealthCheck.data_too_large],
)

tally: Counter[str] = Counter()


def count(case):
    tally["all"] += 1
    tally["with a rank without tokens"] += case.routing.has_empty_rank
    tally["with all choices on one rank of several"] += case.routing.is_maximally_skewed
    tally["without any choice"] += all((indices < 0).all() for indices in case.routing.all_topk_idx())


def check(rank_pool, case, run):
    count(case)
    setup = Setup(backend=SETUP.backend, modes=SETUP.modes, ranks_per_node=case.ranks_per_node)
    return rank_pool.run(run[0], setup, case, run[1], num_ranks=case.num_ranks, environment=environment_of(setup))


@pytest.mark.parametrize(("num_ranks", "hard"), KINDS)
def test_normal_mode_agrees_with_plain_arithmetic(rank_pool, num_ranks, hard):
    @settings(CASES, max_examples=EXAMPLES[hard])
    @given(drawn=normal_cases(num_ranks=num_ranks, hard=hard))
    def agrees(drawn):
        case, options = drawn
        received = check(rank_pool, case, (normal.round_trip, options))
        if options.num_spare_rows is None:
            assert received == [len(case.normal.sources(rank)) for rank in range(num_ranks)]

    agrees()


@pytest.mark.parametrize(("num_ranks", "hard"), KINDS)
def test_low_latency_mode_agrees_with_plain_arithmetic(rank_pool, num_ranks, hard):
    @settings(CASES, max_examples=EXAMPLES[hard])
    @given(drawn=low_latency_cases(num_ranks=num_ranks, hard=hard))
    def agrees(drawn):
        case, options = drawn
        check(rank_pool, case, (low_latency.round_trip, options))

    agrees()


def test_many_choices_of_many_experts(rank_pool):
    @settings(CASES, max_examples=8)
    @given(drawn=st.sampled_from(RANK_COUNTS).flatmap(lambda n: normal_cases(num_ranks=n, max_topk=32)))
    def agrees(drawn):
        case, options = drawn
        check(rank_pool, case, (normal.round_trip, options))

    agrees()


def test_generated_cases_were_many_and_hard(capsys):
    """Runs last; counts what the tests above ran."""
    if tally["all"] == 0:
        pytest.skip("needs the other tests of this file in the same run")
    shares = ", ".join(f"{number} {what}" for what, number in tally.items() if what != "all")
    with capsys.disabled():
        print(f"\n{tally['all']} generated cases agreed with plain arithmetic: {shares}")
    assert tally["all"] >= 300
    assert tally["with a rank without tokens"] >= 0.1 * tally["all"]
    assert tally["with all choices on one rank of several"] >= 0.1 * tally["all"]
