"""A simulation of normal mode across nodes, chunk by chunk; ``benchmarks/internode_simulation.py`` runs it."""

from .cluster import (
    BEFORE,
    COMBINE_BEFORE,
    COMBINE_NOW,
    EARLIER,
    NOW,
    CombineTimes,
    DispatchTimes,
    Kernel,
    Outcome,
    Scenario,
)
from .combine import Combine
from .dispatch import Dispatch


def simulate(scenario: Scenario, routing: object = None) -> Outcome:
    """Run one call. ``routing``: bool ``[N, T, D, P]`` instead of a drawn one.

    Raises:
        RuntimeError: something waits for ever.
    """
    cluster = (Dispatch if scenario.operation == "dispatch" else Combine)(scenario, routing)
    cluster.clock.run()
    cluster.finish()
    return cluster.outcome()


__all__ = [
    "BEFORE",
    "COMBINE_BEFORE",
    "COMBINE_NOW",
    "EARLIER",
    "NOW",
    "CombineTimes",
    "DispatchTimes",
    "Kernel",
    "Outcome",
    "Scenario",
    "simulate",
]
