"""Test settings of the whole repository: ranks are started once and shared by all tests; examples are always the same.

A commit passes or it does not, whenever it is tested: hypothesis draws the same examples in every run, and none fails
for being slow. With ``--hypothesis-profile=search`` it draws new ones.
"""

from __future__ import annotations

from hypothesis import HealthCheck, settings

from deep_ep.launch import preload

pytest_plugins = ["deep_ep.testing.plugin"]

# Ranks are forked from a server that has these already; any other module costs its import on each of eight ranks.
preload("deepep_reference")

_search = settings(derandomize=False, deadline=None, database=None, suppress_health_check=[HealthCheck.too_slow])
settings.register_profile("search", _search)
settings.register_profile("same", _search, derandomize=True)
settings.load_profile("same")
