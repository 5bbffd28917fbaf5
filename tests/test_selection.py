"""Which backend a buffer gets: argument, environment, file, or the best that can serve; what is said if none can."""

from __future__ import annotations

import logging
import os
import sys
from pathlib import Path
from typing import Any

import pytest

from deep_ep import Buffer, registry
from deep_ep.launch import RankContext, RankPool
from deep_ep.testing.conformance.errors import Outcome, outcome_of

# A stand-in for a fast first-party backend, and one of other people's. Both are the reference backend under another
# name, with a higher priority and an obstacle on demand.
PLUGINS = """
import dataclasses, os
from deep_ep.backend import Obstacle
from deepep_reference import ReferenceBackend

class Fast(ReferenceBackend):
    name = "ibgda"
    capabilities = dataclasses.replace(ReferenceBackend.capabilities, priority=90, modes=frozenset({"low_latency"}))

    @classmethod
    def probe(cls, environment):
        if os.environ.get("TEST_OBSTACLE"):
            return [Obstacle(cause="the cable is unplugged", cure="Plug it in")]
        return []

class Foreign(Fast):
    name = "foreign"
    capabilities = dataclasses.replace(ReferenceBackend.capabilities, priority=99)

class OneRank(ReferenceBackend):
    name = "one_rank"
    capabilities = dataclasses.replace(ReferenceBackend.capabilities, max_ranks=1)

class OnGpus(ReferenceBackend):
    name = "on_gpus"
    capabilities = dataclasses.replace(ReferenceBackend.capabilities, devices=frozenset({"tpu"}))

class OneNode(ReferenceBackend):
    name = "one_node"
    capabilities = dataclasses.replace(ReferenceBackend.capabilities, multi_node=False)
"""
ENTRY_POINTS = """[deep_ep.backends]
ibgda = test_plugins:Fast
foreign = test_plugins:Foreign
one_rank = test_plugins:OneRank
on_gpus = test_plugins:OnGpus
one_node = test_plugins:OneNode
broken = test_plugins:Missing
"""
NO_SETTINGS = dict.fromkeys(["DEEPEP_BACKEND", "DEEPEP_CONFIG", "DEEPEP_RANKS_PER_NODE", "TEST_OBSTACLE"])


@pytest.fixture(scope="module")
def plugins(tmp_path_factory) -> str:
    """A folder that looks to Python like an installed package of backends."""
    if "ibgda" in registry.installed_names():
        pytest.skip("a real backend 'ibgda' is installed; this test would add another of that name")
    folder = tmp_path_factory.mktemp("plugins")
    (folder / "test_plugins.py").write_text(PLUGINS)
    info = folder / "test_plugins-1.0.dist-info"
    info.mkdir()
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: test-plugins\nVersion: 1.0\n")
    (info / "entry_points.txt").write_text(ENTRY_POINTS)
    return str(folder)


def choose(
    context: RankContext, plugins: str, arguments: dict[str, Any], obstacle_on: int | None = None, directory: str = "."
) -> tuple[dict[str, str], Outcome, list[str]]:
    """Build a buffer; gives its backends, how construction ended, and what was logged."""
    sys.path.insert(0, plugins)
    before = os.getcwd()
    os.chdir(directory)
    if context.rank == obstacle_on:
        os.environ["TEST_OBSTACLE"] = "1"
    backends: dict[str, str] = {}
    lines: list[str] = []
    handler = logging.Handler()
    handler.emit = lambda record: lines.append(f"{record.levelname} {record.getMessage()}")  # type: ignore[method-assign]
    logger = logging.getLogger("deep_ep")
    logger.addHandler(handler)
    logger.setLevel(logging.INFO)

    def build() -> None:
        buffer = Buffer(context.group, **arguments)
        backends.update(buffer.backends)
        buffer.destroy()

    try:
        return backends, outcome_of(build), lines
    finally:
        logger.removeHandler(handler)
        os.environ.pop("TEST_OBSTACLE", None)
        os.chdir(before)
        sys.path.remove(plugins)


@pytest.fixture(scope="module")
def pool():
    """Ranks of this file's own: a process remembers the entry points that it saw first."""
    with RankPool(4) as pool:
        yield pool


@pytest.fixture
def run(pool, plugins):
    def run(arguments: dict[str, Any], *more: Any, num_ranks: int = 2, **environment: str) -> list[Any]:
        return pool.run(
            choose, plugins, arguments, *more, num_ranks=num_ranks, environment={**NO_SETTINGS, **environment}
        )

    return run


BOTH = {"low_latency_mode": True, "num_rdma_bytes": 1 << 16}


def names(results: list[Any]) -> dict[str, str]:
    """The backends, which have to be the same on every rank."""
    assert all(outcome.error == "" for _, outcome, _ in results), str(results)
    assert all(backends == results[0][0] for backends, _, _ in results)
    return results[0][0]


def error(results: list[Any], kind: str) -> str:
    """The text of the error, which has to be the same on every rank."""
    assert {outcome.error for _, outcome, _ in results} == {kind}, str(results)
    assert len({outcome.text for _, outcome, _ in results}) == 1, str(results)
    return results[0][1].text


def test_without_any_wish_the_best_first_party_backend_serves_each_mode(run):
    results = run(BOTH)
    assert names(results) == {"normal": "reference", "low_latency": "ibgda"}
    assert any("INFO backend ibgda serves low_latency mode" in line for line in results[0][2])


def test_backend_that_one_rank_cannot_use_is_used_by_none_and_the_log_says_why(run):
    results = run(BOTH, 1)
    assert names(results) == {"normal": "reference", "low_latency": "reference"}
    logged = "\n".join(results[1][2])
    assert "ibgda cannot: the cable is unplugged" in logged
    assert "ibgda cannot: rank 1 cannot use it" in "\n".join(results[0][2])


def test_argument_wins_over_environment_and_environment_over_file(run, tmp_path):
    (tmp_path / "deepep.toml").write_text('[deepep]\nbackend = "foreign"\n')
    where = (None, str(tmp_path))
    assert names(run({}, *where))["normal"] == "foreign"
    assert names(run({}, *where, DEEPEP_BACKEND="one_node"))["normal"] == "one_node"
    assert names(run({"backend": "reference"}, *where, DEEPEP_BACKEND="one_node"))["normal"] == "reference"
    assert names(run({"backend": "auto"}, *where, DEEPEP_BACKEND="one_node"))["normal"] == "reference"


def test_file_named_by_the_environment_wins_over_the_one_in_the_working_directory(run, tmp_path):
    (tmp_path / "deepep.toml").write_text('[deepep]\nbackend = "foreign"\n')
    (tmp_path / "other.toml").write_text('[deepep.backend]\nnormal = "one_node"\nlow_latency = "foreign"\n')
    results = run(BOTH, None, str(tmp_path), DEEPEP_CONFIG=str(tmp_path / "other.toml"))
    assert names(results) == {"normal": "one_node", "low_latency": "foreign"}


@pytest.mark.parametrize(
    ("wish", "expected"),
    [
        ("foreign", {"normal": "foreign", "low_latency": "foreign"}),
        ("ibgda", {"normal": "reference", "low_latency": "ibgda"}),
        ({"normal": "foreign"}, {"normal": "foreign", "low_latency": "ibgda"}),
        ({"low_latency": "foreign"}, {"normal": "reference", "low_latency": "foreign"}),
        ({"normal": "one_node", "low_latency": "auto"}, {"normal": "one_node", "low_latency": "ibgda"}),
    ],
    ids=["one-name", "name-of-one-mode", "normal-only", "low-latency-only", "auto-for-one"],
)
def test_name_binds_the_modes_it_serves_and_the_others_are_chosen(run, wish, expected):
    assert names(run({**BOTH, "backend": wish})) == expected
    if isinstance(wish, dict):
        text = ",".join(f"{mode}={name}" for mode, name in wish.items())
        assert names(run(BOTH, DEEPEP_BACKEND=text)) == expected


@pytest.mark.parametrize("num_ranks", [1, 2, 4])
def test_unknown_name_lists_what_is_installed(run, num_ranks):
    text = error(run({"backend": "absent"}, num_ranks=num_ranks), "BackendNotFoundError")
    assert text.startswith("No backend named 'absent' is installed (found: ")
    assert "reference" in text and "foreign" in text


def test_known_name_that_is_not_installed_names_the_package_to_install(run):
    missing = [n for n in ("nvlink", "nvshmem") if n not in registry.installed_names()]
    if not missing:
        pytest.skip("all first-party backends are installed")
    text = error(run({"backend": missing[0]}), "BackendNotFoundError")
    assert f"Install the package {registry.FIRST_PARTY[missing[0]]}" in text


@pytest.mark.parametrize("num_ranks", [2, 3])
def test_obstacle_on_one_rank_is_the_same_error_with_its_cure_on_all(run, num_ranks):
    text = error(run({"backend": "foreign"}, num_ranks - 1, num_ranks=num_ranks), "BackendUnavailableError")
    assert "backend 'foreign' cannot serve normal mode here: the cable is unplugged. Plug it in" in text
    assert f"rank {num_ranks - 1}" in text


@pytest.mark.parametrize(
    ("name", "environment", "reason"),
    [
        ("one_rank", {}, "at most 1 ranks, the group has 4"),
        ("on_gpus", {}, "it needs tpu tensors"),
        ("one_node", {"DEEPEP_RANKS_PER_NODE": "2"}, "it serves one node, the group spans 2"),
        ("broken", {}, "is installed but does not load"),
    ],
)
def test_declared_limits_are_explained(run, name, environment, reason):
    text = error(run({"backend": name}, num_ranks=4, **environment), "BackendUnavailableError")
    assert f"backend {name!r}" in text
    assert reason in text


def test_mode_nobody_was_asked_to_serve_is_not_opened(run):
    assert set(names(run({}))) == {"normal"}


@pytest.mark.parametrize(
    "content",
    [
        pytest.param("[deepep]\nbackend = 3\n", id="number"),
        pytest.param("[deepep]\nbackends = 'reference'\n", id="unknown-key"),
        pytest.param("[deep_ep]\nbackend = 'reference'\n", id="unknown-table"),
        pytest.param("backend = \n", id="not-toml"),
    ],
)
def test_unreadable_file_is_an_error_that_names_it(run, tmp_path, content):
    file = Path(tmp_path / "deepep.toml")
    file.write_text(content)
    for _, outcome, _ in run({}, None, str(tmp_path)):
        assert outcome.error == "SettingError"
        assert "deepep.toml" in outcome.text
