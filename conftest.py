"""Test settings of the whole repository: ranks are started once and shared by all tests."""

from __future__ import annotations

from deep_ep.launch import preload

pytest_plugins = ["deep_ep.testing.plugin"]

# Ranks are forked from a server that has these already; any other module costs its import on each of eight ranks.
preload("deepep_reference")
