"""The command ``deepep``: demo, bench, backends, doctor."""

from __future__ import annotations

import dataclasses
import json
import os
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from typer.testing import CliRunner, Result

from deep_ep import Buffer, Config
from deep_ep import settings as library_settings
from deep_ep.cli import backends as cli_backends
from deep_ep.cli import bench_data, bench_floor, bench_report, demo, machine, show, tune
from deep_ep.cli.app import app
from deep_ep.cli.bench_job import BenchResult, BenchSettings, Measurement, rated, run_bench
from deep_ep.cli.demo_job import DemoReport, DemoSettings, run_demo, token_range
from deep_ep.launch import RankContext, RankPool

TEXT = b"It was the best of times, it was the worst of times, it was the age of wisdom, it was the age of foolishness."
SMALL = {"hidden": 128, "width": 32, "num_experts": 16, "num_topk": 4, "num_groups": 4, "num_selected_groups": 2}
SMALL_OPTIONS = "--hidden 128 --width 32 --experts 16 --topk 4 --groups 4 --selected-groups 2 --low-latency-tokens 8"


@pytest.fixture(scope="module")
def pool() -> Iterator[RankPool]:
    with RankPool(4) as ranks:
        yield ranks


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty working directory, no launcher, no settings of this library, 100 columns."""
    monkeypatch.chdir(tmp_path)
    for name in [n for n in os.environ if n.startswith("DEEPEP_") or n in ("RANK", "WORLD_SIZE")]:
        monkeypatch.delenv(name)
    monkeypatch.setenv("COLUMNS", "100")
    return tmp_path


def run(command: str) -> Result:
    return CliRunner().invoke(app, command.split())


# --- the demo -------------------------------------------------------------------------------------------------------


def settings(**changes: Any) -> DemoSettings:
    return dataclasses.replace(DemoSettings(text=TEXT, tokens=24, low_latency_tokens=8, **SMALL), **changes)


@pytest.mark.parametrize("num_ranks", [2, 4])
def test_demo_agrees_and_leaves_a_picture(here: Path, num_ranks: int) -> None:
    (here / "README.md").write_bytes(TEXT)
    result = run(f"demo --ranks {num_ranks} --tokens 24 --picture out/load.png {SMALL_OPTIONS}")
    assert result.exit_code == 0, result.output
    assert "All values agree" in result.output
    assert f"README.md, {min(len(TEXT), num_ranks * 24)} bytes" in result.output
    assert "output, second batch, fp8" in result.output
    picture = (here / "out" / "load.png").read_bytes()
    assert picture.startswith(b"\x89PNG")
    assert len(picture) > 20_000


def test_demo_takes_any_file_and_no_picture(here: Path) -> None:
    (here / "bytes.bin").write_bytes(bytes(range(256)))
    result = run(f"demo bytes.bin --ranks 2 --tokens 24 --no-picture {SMALL_OPTIONS}")
    assert result.exit_code == 0, result.output
    assert not list(here.glob("*.png"))


def test_demo_of_fewer_bytes_than_ranks_agrees(pool: RankPool) -> None:
    report, *others = pool.run(run_demo, settings(text=b"abc"))
    assert report.agrees, report.first_token
    assert report.num_tokens == [0, 1, 1, 1]
    assert others == [True] * 3


def test_demo_names_the_token_of_a_planted_error(here: Path) -> None:
    (here / "text").write_bytes(TEXT)
    result = run(f"demo text --ranks 2 --tokens 24 --no-picture --plant-error 30 {SMALL_OPTIONS}")
    assert result.exit_code == 1
    assert "First differing token: 30 (normal, output)" in result.output
    assert "byte 30, token 6 of rank 1" in result.output
    assert TEXT[22:38].decode() in result.output.replace("│\n│ ", "")


def test_report_counts_what_was_sent(pool: RankPool) -> None:
    report = pool.run(run_demo, settings(), num_ranks=3 if 16 % 3 == 0 else 4)[0]
    assert report.num_tokens == [24] * 4
    assert sum(report.expert_load) == 4 * 24 * SMALL["num_topk"]
    for row in report.sent:
        assert 24 <= sum(row) <= 24 * 4
        assert max(row) <= 24


def _with_corruption(context: RankContext, what: str) -> DemoReport | bool:
    """The demo on a library that does one thing wrong on rank 1."""
    originals = {name: getattr(Buffer, name) for name in ("combine", "dispatch", "low_latency_combine")}

    def combine(self: Buffer, x: Any, handle: Any, *args: Any, **rest: Any) -> Any:
        combined, weights, event = originals["combine"](self, x, handle, *args, **rest)
        if what == "weight gradient" and weights is not None:
            weights[4] *= 1.01
        if what == "lost row" and weights is None:
            combined[4] = 0
        return combined, weights, event

    def dispatch(self: Buffer, *args: Any, **rest: Any) -> Any:
        found = originals["dispatch"](self, *args, **rest)
        if what == "replay" and rest.get("handle") is not None:
            return (found[0].roll(1, 0), *found[1:])
        return found

    def low_latency_combine(self: Buffer, *args: Any, **rest: Any) -> Any:
        combined, event, receive = originals["low_latency_combine"](self, *args, **rest)

        def receive_and_spoil() -> None:
            receive()
            combined[3, 7] *= 1.5

        return combined, event, receive_and_spoil

    replacements = {"combine": combine, "dispatch": dispatch}
    if what == "low latency":
        replacements["low_latency_combine"] = low_latency_combine
    try:
        if context.rank == 1:
            for name, function in replacements.items():
                setattr(Buffer, name, function)
        return run_demo(context, settings())
    finally:
        for name, function in originals.items():
            setattr(Buffer, name, function)


@pytest.mark.parametrize(
    ("what", "seen_in", "token"),
    [
        ("nothing", None, None),
        ("lost row", "output", 28),
        ("low latency", "output, first batch, bf16", 27),
        ("replay", "gradient, experts' gate_up", None),
        ("weight gradient", "gradient, gate", None),
    ],
)
def test_demo_finds_each_kind_of_error(pool: RankPool, what: str, seen_in: str | None, token: int | None) -> None:
    report, *others = pool.run(_with_corruption, what)
    assert others == [seen_in is None] * 3
    failed = {check.what: check.first for check in report.checks if not check.agrees}
    if seen_in is None:
        assert not failed
    else:
        assert seen_in in failed
    if token is not None:
        assert failed[seen_in] == token
        assert report.first_token.first == token


@pytest.mark.parametrize(
    ("options", "complaint"),
    [
        ("--ranks 3", "spread evenly over 3 ranks"),
        ("--topk 9", "top-9"),
        ("--hidden 100", "128"),
        ("--groups 5", "groups"),
        ("--plant-error 5000", "token 5000"),
        ("--device tpu", "tpu"),
        ("nowhere.txt", "nowhere.txt"),
    ],
)
def test_demo_refuses_what_cannot_work_before_it_starts(here: Path, options: str, complaint: str) -> None:
    (here / "README.md").write_bytes(TEXT)
    given = options.split()[0]
    usual = SMALL_OPTIONS if not given.startswith("--") else re.sub(rf"{given} \d+", "", SMALL_OPTIONS)
    result = run(f"demo {usual} {options}")
    assert result.exit_code == 2
    assert complaint in " ".join(re.sub(r"[│╭╮╰╯─]", " ", result.output).split())


def test_demo_says_which_backend_is_missing(here: Path) -> None:
    (here / "README.md").write_bytes(TEXT)
    result = run(f"demo --ranks 2 --backend nonsense {SMALL_OPTIONS}")
    assert result.exit_code == 1
    assert "error No backend named 'nonsense' is installed" in result.output
    assert "Traceback" not in result.output


def test_text_is_found_in_parents_then_in_the_package(here: Path) -> None:
    inner = here / "a" / "b"
    inner.mkdir(parents=True)
    os.chdir(inner)
    (here / "a" / "README.rst").write_text("upstairs")
    assert demo.find_text(None) == (str(here / "a" / "README.rst"), b"upstairs")
    (inner / "README.md").write_text("here")
    assert demo.find_text(None) == ("README.md", b"here")


def test_text_of_the_installed_package_is_there(here: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(demo, "README_NAMES", ())
    source, text = demo.find_text(None)
    assert "deepep-core" in source
    assert b"mixture-of-experts" in text


def test_tokens_are_split_evenly() -> None:
    assert [token_range(10, 4, 100, rank) for rank in range(4)] == [(0, 2), (2, 5), (5, 7), (7, 10)]
    assert [token_range(1000, 2, 8, rank) for rank in range(2)] == [(0, 8), (8, 16)]


def test_excerpt_marks_the_byte() -> None:
    assert demo.excerpt(b"one\ntwo three", 4, around=4).plain == "one⏎two t…"
    assert demo.excerpt(TEXT, 50, around=5).plain.startswith("…")


def test_demo_under_torchrun(here: Path) -> None:
    (here / "README.md").write_bytes(TEXT)
    command = f"-m torch.distributed.run --standalone --nproc-per-node 2 -m deep_ep demo --tokens 16 {SMALL_OPTIONS}"
    environment = os.environ | {"GLOO_SOCKET_IFNAME": "lo", "OMP_NUM_THREADS": "1"}
    good = subprocess.run(
        [sys.executable, *command.split()], capture_output=True, text=True, env=environment, timeout=300, check=False
    )
    assert good.returncode == 0, good.stderr[-2000:]
    assert good.stdout.count("All values agree") == 1
    assert "2 ranks" in good.stdout


# --- the benchmark --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("mode", ["normal", "low-latency"])
@pytest.mark.parametrize("dtype", ["bf16", "fp8"])
def test_bench_measures_checks_and_writes(here: Path, mode: str, dtype: str) -> None:
    result = run(
        f"bench --mode {mode} --dtype {dtype} --ranks 2 --tokens 12 --hidden 256 --topk 3 --experts 8 --iterations 3 "
        "--warmup 1 --output results/small.json"
    )
    assert result.exit_code == 0, result.output
    assert "equal bit for bit" in result.output
    record = json.loads((here / "results" / "small.json").read_text())
    assert (here / "results" / "small.png").read_bytes().startswith(b"\x89PNG")
    assert record["format"] == 1
    assert record["num_ranks"] == 2
    assert record["checked"] == {"equal": True, "faults": []}
    assert record["shape"]["dtype"] == dtype
    assert record["versions"]["torch"] == torch.__version__
    assert "deepep-reference" in record["versions"]
    by_contender: dict[str, set[str]] = {}
    for m in record["measurements"]:
        assert not m["failure"]
        assert 0 < m["fastest"] <= m["seconds"] <= m["slowest"]
        assert 0 < m["physical_bytes"] < m["logical_bytes"]
        by_contender.setdefault(m["contender"], set()).add(m["operation"])
    assert set(by_contender) == {"deep_ep", "all-to-all", "all-gather + reduce-scatter"}
    assert all({"pair", "dispatch", "combine"} <= operations for operations in by_contender.values())


def test_bench_of_virtual_nodes_counts_what_two_hops_move(here: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("DEEPEP_RANKS_PER_NODE", "2")
    result = run(
        "bench --ranks 4 --tokens 8,12 --hidden 256 --topk 3 --experts 8 --groups 4 --topk-groups 2 --iterations 2 "
        "--warmup 1 --no-rivals --no-plot --output small.json"
    )
    assert result.exit_code == 0, result.output
    assert "top-3 of 8 experts, from 2 of 4 groups" in result.output
    for tokens in (8, 12):
        record = json.loads((here / f"small-{tokens}.json").read_text())
        facts = record["shape"]
        assert (facts["tokens"], facts["num_groups"], facts["num_topk_groups"]) == (tokens, 4, 2)
        assert (record["ranks_per_node"], record["checked"]["equal"]) == (2, True)
        assert {m["contender"] for m in record["measurements"]} == {"deep_ep"}
        shape = bench_data.Shape(**facts)
        out_and_back = bench_floor.two_hop_bytes(shape, 2, 2)
        for m in record["measurements"]:
            assert m["two_hop_bytes"] == out_and_back[m["operation"].partition(",")[0]]
            assert m["two_hop_efficiency"] is None, "the reference cannot measure the links"


@pytest.mark.parametrize("tokens", ["0", "8,x", "8,8"])
def test_bench_refuses_token_counts_that_are_none(here: Path, tokens: str) -> None:
    result = run(f"bench --tokens {tokens}")
    assert result.exit_code == 2
    assert "different positive numbers" in result.output


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ("--groups 3 --topk-groups 2", "8 experts in 3 groups"),
        ("--groups 2 --topk-groups 3", "3 of them chosen"),
        ("--groups 4 --topk-groups 1", "too few"),
        ("--groups 2 --topk-groups 2 --routing skewed", "no groups"),
    ],
)
def test_bench_refuses_groups_that_cannot_be(here: Path, options: str, message: str) -> None:
    result = run(f"bench --ranks 2 --topk 3 --experts 8 {options}")
    assert result.exit_code == 2
    assert message in result.output


def _shape(**changes: Any) -> bench_data.Shape:
    usual = {"mode": "normal", "tokens": 6, "hidden": 128, "topk": 2, "experts": 4, "dtype": "bf16", "num_ranks": 2}
    return bench_data.Shape(**(usual | changes))


def _bench_of_a_wrong_library(context: RankContext, mode: Any) -> BenchResult:
    original = Buffer.combine
    original_low_latency = Buffer.low_latency_combine

    def combine(self: Buffer, *args: Any, **rest: Any) -> Any:
        combined, *others = original(self, *args, **rest)
        combined[5, 3] += 0.25
        return (combined, *others)

    def low_latency_combine(self: Buffer, *args: Any, **rest: Any) -> Any:
        combined, *others = original_low_latency(self, *args, **rest)
        combined[5, 3] += 0.25
        return (combined, *others)

    try:
        if context.rank == 1:
            Buffer.combine = combine  # type: ignore[method-assign]
            Buffer.low_latency_combine = low_latency_combine  # type: ignore[method-assign]
        return run_bench(context, BenchSettings(shape=_shape(mode=mode), iterations=2, warmup=1, progress=False))
    finally:
        Buffer.combine = original  # type: ignore[method-assign]
        Buffer.low_latency_combine = original_low_latency  # type: ignore[method-assign]


@pytest.mark.parametrize("mode", ["normal", "low_latency"])
def test_bench_says_when_results_are_wrong(pool: RankPool, mode: str) -> None:
    for result in pool.run(_bench_of_a_wrong_library, mode, num_ranks=2):
        assert [fault.split(":")[0] for fault in result.faults] == ["before, rank 1", "after, rank 1"]
        assert "combine differs from plain arithmetic" in result.faults[0]


def test_bench_bytes_by_hand() -> None:
    assert _shape(hidden=256, dtype="fp8").dispatch_row_bytes == 256 + 2 * 4
    assert _shape(hidden=256, dtype="bf16").dispatch_row_bytes == 512
    assert _shape(hidden=256, dtype="fp8").combine_row_bytes == 512


def test_a_rate_beside_the_two_hop_floor_by_hand() -> None:
    measured = Measurement(contender="deep_ep", operation="dispatch", num_sms=24, seconds=250e-6, physical_bytes=40e6)
    found = rated(measured, 400.0, 80e6)
    assert found.wire_efficiency == pytest.approx(0.4)
    assert found.two_hop_efficiency == pytest.approx(0.8)
    assert bench_report.floor_line(found) == (
        "dispatch, 24 SMs: 250 us; two-hop floor 200 us (76.3 MiB out of the busiest rank): [bold]0.80[/]"
    )
    assert rated(measured, None, 80e6).two_hop_efficiency is None
    assert rated(measured, 400.0, None).two_hop_efficiency is None


def test_bench_data_differ_between_rows_and_are_exact() -> None:
    shape = _shape(tokens=300)
    x = torch.cat([bench_data.rows(shape, rank, torch.arange(300), seed=3) for rank in range(2)])
    assert torch.unique(x, dim=0).shape[0] == 600
    assert x.float().mul(64).frac().eq(0).all()
    assert 0.9 < x.float().std() < 1.4
    again = bench_data.rows(shape, torch.tensor([1, 0]), torch.tensor([7, 299]), seed=3)
    assert torch.equal(again, torch.stack([x[307], x[299]]))


def test_bench_refuses_sm_counts_on_a_cpu(here: Path) -> None:
    result = run("bench --device cpu --num-sms 8,16")
    assert result.exit_code == 2
    assert "no SMs on a CPU" in result.output


# --- tuning ---------------------------------------------------------------------------------------------------------


def test_fewest_sms_win_unless_they_cost_time() -> None:
    assert tune.winner({4: 2.0, 8: 1.02, 12: 1.0, 16: 1.0}) == 8
    assert tune.winner({4: 2.0, 8: 1.04, 12: 1.0, 16: 0.99}) == 12


def test_winners_replace_their_tables_and_nothing_else() -> None:
    mine = '# mine\n[deepep]\nbackend = "reference"\n'
    before = f"{mine}\n[tuning.dispatch.2]\nnum_sms = 99\n\n[tuning.dispatch.8]\nnum_sms = 6\n"
    result = tune.TuneResult(
        num_ranks=2, backend="reference", winners={o: dataclasses.asdict(Config(num_sms=4)) for o in tune.OPERATIONS}
    )
    once = tune.merge(before, result, BenchSettings(shape=_shape()))
    assert once.startswith(mine)
    assert "99" not in once
    assert once.count("[tuning.dispatch.2]") == once.count("[tuning.combine.2]") == 1
    assert "[tuning.dispatch.8]\nnum_sms = 6\n" in once
    assert tune.merge(once, result, BenchSettings(shape=_shape())) == once


def test_tune_writes_what_the_library_reads(here: Path) -> None:
    options = "--device cpu --tokens 8 --hidden 128 --topk 2 --experts 4 --iterations 2 --warmup 1"
    result = run(f"tune --ranks 2 --num-sms 2,4 {options}")
    assert result.exit_code == 0, result.output
    assert result.output.count("chosen") == 2
    table = library_settings.load(directory=here).tuning
    assert table["dispatch"][2]["hidden"] == 128
    assert Buffer.get_dispatch_config(2) == Config(num_sms=table["dispatch"][2]["num_sms"])
    assert Buffer.get_combine_config(2).num_sms == table["combine"][2]["num_sms"] in (2, 4)
    nothing = run(f"tune --ranks 2 {options} --output other.toml")
    assert nothing.exit_code == 1
    assert "nothing to vary" in nothing.output
    assert not (here / "other.toml").exists()


# --- backends and doctor --------------------------------------------------------------------------------------------


def test_backends_lists_installed_and_missing_ones(here: Path) -> None:
    result = run("backends")
    assert result.exit_code == 0
    assert "can serve" in result.output
    found = {finding["name"]: finding for finding in json.loads(run("backends --json").output)}
    assert found["reference"]["serves"]
    assert found["reference"]["distribution"] == "deepep-reference"
    assert set(found["reference"]["modes"]) == {"normal", "low_latency"}
    for name, finding in found.items():
        assert finding["serves"] or finding["obstacles"], name


def test_doctor_is_content_without_a_gpu_and_not_with_what_cannot_work(here: Path) -> None:
    result = run("doctor")
    assert result.exit_code == 0, result.output
    assert torch.__version__ in result.output
    if not torch.cuda.is_available():
        missing = run("doctor --need-gpus 2")
        assert missing.exit_code == 1
        assert "2 GPUs were asked for" in missing.output
    unknown = run("doctor --need nonsense")
    assert unknown.exit_code == 1
    assert "no backend named nonsense" in unknown.output


def test_doctor_finds_a_bad_setting(here: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("DEEPEP_TIMEOUT_S", "soon")
    result = run("doctor")
    assert result.exit_code == 1
    assert "DEEPEP_TIMEOUT_S" in result.output


def test_doctor_finds_a_misspelt_variable(here: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("DEEPEP_TIMEOUT", "5")
    facts = {fact.name: fact for fact in machine.examine()}
    assert facts["DEEPEP_TIMEOUT"].level is machine.Level.AMISS
    assert "DEEPEP_TIMEOUT_S" in facts["DEEPEP_TIMEOUT"].cure


def test_doctor_finds_an_nvshmem_that_cannot_be_used_and_shows_its_variables(
    here: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("NVSHMEM_DIR", str(here))
    monkeypatch.setenv("NVSHMEM_IB_SL", "3")
    facts = {fact.name: fact for fact in machine.examine()}
    unusable = facts["NVSHMEM for backend nvshmem"]
    assert unusable.level is machine.Level.AMISS and "has no lib/libnvshmem_host.so.3" in unusable.cause
    assert unusable.cure == "Correct or unset it"
    assert facts["NVSHMEM's variables"].found == "NVSHMEM_IB_SL=3"


def test_doctor_json_has_cause_and_cure_together(here: Path) -> None:
    facts = json.loads(run("doctor --json").output)
    assert {"Versions", "Limits", "Backends"} <= {fact["section"] for fact in facts}
    for fact in facts:
        assert bool(fact["cause"]) == bool(fact["cure"]), fact


def test_link_matrix_is_read_from_nvidia_smi() -> None:
    text = (
        "\t\x1b[4mGPU0\tGPU1\tGPU2\tNIC0\tCPU Affinity\tNUMA Affinity\x1b[0m\n"
        "GPU0\t X \tNV18\tSYS\tPIX\t0-15\t0\n"
        "GPU1\tNV18\t X \tNV18\tSYS\t0-15\t0\n"
        "GPU2\tSYS\tNV18\t X \tSYS\t16-31\t1\n"
        "NIC0\tPIX\tSYS\tSYS\t X \n\nLegend:\n  X = Self\n"
    )
    matrix = machine.link_matrix(text)
    assert matrix["GPU0"] == {"GPU0": "X", "GPU1": "NV18", "GPU2": "SYS"}
    assert set(matrix) == {"GPU0", "GPU1", "GPU2"}
    assert machine.link_matrix("no GPUs") == {}


def test_absent_tools_are_no_error() -> None:
    assert machine.query(["no-such-tool-of-this-name"]) is None
    assert machine.query([sys.executable, "-c", "raise SystemExit(3)"]) is None


def test_unloadable_backend_is_reported_not_raised(monkeypatch: pytest.MonkeyPatch) -> None:
    from deep_ep import registry
    from deep_ep.errors import BackendUnavailableError

    def load(name: str) -> Any:
        raise BackendUnavailableError(f"{name} is broken")

    monkeypatch.setattr(registry, "load", load)
    assert all("is broken" in f.obstacles[0] for f in cli_backends.find() if f.version is not None)


# --- the command itself ---------------------------------------------------------------------------------------------


def _python(code: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=300, check=False)


def test_importing_the_library_imports_no_part_of_the_command_line() -> None:
    done = _python("import sys, deep_ep, deep_ep.cli; print({'typer', 'rich', 'matplotlib'} & set(sys.modules))")
    assert done.stdout.strip() == "set()", done.stderr


def test_missing_extra_is_named() -> None:
    done = _python("import sys; sys.modules['typer'] = None\nfrom deep_ep.cli import main\nmain()")
    assert done.returncode == 2
    assert "typer" in done.stderr
    assert "pip install 'deepep-core[cli]'" in done.stderr


def test_module_and_version() -> None:
    done = subprocess.run(
        [sys.executable, "-m", "deep_ep", "--version"], capture_output=True, text=True, timeout=300, check=False
    )
    assert done.returncode == 0
    assert re.fullmatch(r"deepep \d+\.\d+.*", done.stdout.strip())


def test_numbers_are_shown_with_units() -> None:
    assert [show.bytes_text(n) for n in (0, 1023, 1536, 3 << 20)] == ["0 B", "1023 B", "1.5 KiB", "3.0 MiB"]
    assert [show.duration(s) for s in (2.5e-6, 0.000123, 0.0123)] == ["2.50 us", "123 us", "12.3 ms"]
    assert show.span(0.00621, 0.0147) == "6.21-14.7 ms"
    assert show.bar(0, 10) == " "
    assert show.bar(0.1, 10) == "▁"
    assert show.bar(10, 10) == "█"
