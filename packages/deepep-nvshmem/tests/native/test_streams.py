"""Streams of rows between nodes (credits in dispatch, requests in combine), on the CPU: random schedules, and threads.

Every check has deliberate mistakes that it must find, in the model's rules and in ``window.hpp``: none can pass empty.
"""

from __future__ import annotations

import os
import re
import shutil
import subprocess
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import pytest

HERE = Path(__file__).parent
CSRC = HERE.parents[1] / "csrc"
INCLUDE = Path(os.environ.get("DEEPEP_INCLUDE_DIR", HERE.parents[2] / "deepep-core" / "src" / "deep_ep" / "include"))
MEMORY_CHECKS = "address,undefined"
NUM_SCHEDULES = 1_200
NUM_SCHEDULES_CHECKED = 150
NUM_SCHEDULES_BROKEN = 400
NUM_OPERATIONS_THREADED = 300
RULES = re.findall(r"^    (k\w+),  ", (HERE / "streams.hpp").read_text(), flags=re.MULTILINE)

# (old, new) in window.hpp. The schedules must find each.
MISTAKES = {
    "slots overlap": (
        "return slot * static_cast<int64_t>(num_slot_rows) * num_message_bytes;",
        "return slot * num_message_bytes;",
    ),
    "rings of different nodes overlap": ("return peer < own ? peer : peer - 1;", "return 0;"),
    "what is sent and what is received share a ring": (
        "return send_rings_offset() + (num_nodes - 1) * num_ring_bytes;",
        "return send_rings_offset();",
    ),
    "a ring has one slot too many": (
        "min_of(kMaxSlots, num_messages / num_rows)",
        "min_of(kMaxSlots, num_messages / num_rows + 1)",
    ),
    "chunks are larger than slots": (
        "min_of(num_slot_rows, max_of(1, ceil_div",
        "min_of(num_slot_rows + 1, max_of(1, ceil_div",
    ),
    "the last chunk is full": (
        "return static_cast<int>(min_of(num_chunk_rows, num_rows - first_row(chunk)));",
        "return static_cast<int>(num_chunk_rows);",
    ),
    "a word of an earlier operation is taken for this one": (
        "return signal_word(epoch, static_cast<uint32_t>(chunk + 1));",
        "return signal_word(1 + 0 * epoch, static_cast<uint32_t>(chunk + 1));",
    ),
    "a word of an earlier chunk is taken for this one": (
        "return signal_word(epoch, static_cast<uint32_t>(chunk + 1));",
        "return signal_word(epoch, static_cast<uint32_t>(0 * chunk + 1));",
    ),
    "requests of earlier operations are served": (
        "return word >> 40 == (epoch & 0xFFFFFF);",
        "return word >> 40 + 0 * epoch != 0;",
    ),
    "the epoch of a request is not cut to its bits": (
        "return word >> 40 == (epoch & 0xFFFFFF);",
        "return word >> 40 == epoch;",
    ),
    "the count of a request reaches into its first row": (
        "static_cast<uint64_t>(begin) << 11",
        "static_cast<uint64_t>(begin) << 5",
    ),
    "requests of two operations share words": (
        "(static_cast<int64_t>(epoch & 1) * num_nodes + writer) * kMaxSlots",
        "(static_cast<int64_t>(0 * epoch) * num_nodes + writer) * kMaxSlots",
    ),
    "credits and requests share words": (
        "request_offset() const { return credit_offset() + 8ll * num_nodes * kMaxSlots; }",
        "request_offset() const { return credit_offset(); }",
    ),
    "dispatch and combine share their signals": (
        "(static_cast<int64_t>(op) * num_nodes + writer) * kMaxSlots",
        "(static_cast<int64_t>(0 * op) * num_nodes + writer) * kMaxSlots",
    ),
}


@dataclass(frozen=True, kw_only=True)
class Program:
    path: Path

    def run(self, *arguments: object, timeout_s: float = 100.0) -> subprocess.CompletedProcess[str]:
        """Run to the end, whatever the exit status."""
        environment = {**os.environ, "TSAN_OPTIONS": "halt_on_error=1"}
        command = [str(self.path), *map(str, arguments)]
        result = subprocess.run(command, capture_output=True, text=True, timeout=timeout_s, env=environment)
        if "unexpected memory mapping" in result.stderr:
            pytest.skip(f"ThreadSanitizer of this g++ does not run on this kernel: {result.stderr.splitlines()[0]}")
        return result

    def check(self, *arguments: object) -> str:
        """Run and return what it prints; a failure shows what does not hold."""
        result = self.run(*arguments)
        assert result.returncode == 0, f"exit {result.returncode}: {result.stderr[-4000:]}{result.stdout[-1000:]}"
        return result.stdout


Compile = Callable[..., Program]


@pytest.fixture(scope="module")
def compile_program(tmp_path_factory: pytest.TempPathFactory) -> Compile:
    """``compile_program(source, *flags, sanitizers="", mistake=None)``: the program, compiled when first asked for."""
    compiler = shutil.which("g++")
    if compiler is None:
        pytest.skip("no g++ on this machine: the streams between nodes cannot be compiled for the CPU")
    folder = tmp_path_factory.mktemp("streams")
    programs: dict[tuple[object, ...], Program] = {}

    def compile_one(source: str, *flags: str, sanitizers: str = "", mistake: str | None = None) -> Program:
        key = (source, flags, sanitizers, mistake)
        if key in programs:
            return programs[key]
        program = folder / f"program-{len(programs)}"
        include = CSRC
        if mistake is not None:
            include = folder / f"mistake-{len(programs)}"
            (include / "internode").mkdir(parents=True)
            old, new = MISTAKES[mistake]
            text = (CSRC / "internode" / "window.hpp").read_text()
            assert text.count(old) == 1, f"window.hpp has {text.count(old)} of: {old}"
            (include / "internode" / "window.hpp").write_text(text.replace(old, new))
        command = [compiler, "-std=c++17", "-pthread", f"-I{include}", f"-I{INCLUDE}", *flags]
        # What runs briefly is compiled quickly.
        command += ["-O0" if mistake is not None or sanitizers == MEMORY_CHECKS else "-O1"]
        command += ["-w"] if mistake is not None else ["-Wall", "-Wextra", "-Werror"]
        if sanitizers:
            command += ["-g1", f"-fsanitize={sanitizers}", "-fno-sanitize-recover=all"]
        result = subprocess.run([*command, str(HERE / source), "-o", str(program)], capture_output=True, text=True)
        assert result.returncode == 0, result.stderr[-4000:]
        programs[key] = Program(path=program)
        return programs[key]

    return compile_one


@pytest.mark.parametrize(
    ("sanitizers", "num_schedules"),
    [("", NUM_SCHEDULES), (MEMORY_CHECKS, NUM_SCHEDULES_CHECKED)],
    ids=["plain", "memory-checked"],
)
def test_every_row_arrives_once_in_its_place_and_every_operation_ends(
    compile_program: Compile, sanitizers: str, num_schedules: int
) -> None:
    first_seed = 1_000_000 if sanitizers else 1
    printed = compile_program("scheduled_streams.cpp", sanitizers=sanitizers).check(first_seed, num_schedules)
    tally = {name: int(count) for name, count in (line.split("\t") for line in printed.splitlines())}
    assert tally["schedules"] == num_schedules
    assert tally["rows"] > 100 * num_schedules
    # The cases that matter occur: small and large slots, slots that are used again, nothing to send.
    for name in ("dispatches", "combines", "two slots of one row", "several rows in a slot", "slots used again"):
        assert tally[name] > num_schedules / 4, tally
    assert tally["without rows"] > num_schedules / 20, tally


@pytest.mark.parametrize("rule", range(1, 1 + len(RULES)), ids=RULES)
def test_a_broken_rule_is_found(compile_program: Compile, rule: int) -> None:
    result = compile_program("scheduled_streams.cpp").run(1, NUM_SCHEDULES_BROKEN, rule)
    assert result.returncode == 1
    assert "does not hold" in result.stderr


@pytest.mark.parametrize("name", MISTAKES)
def test_a_mistake_in_the_layout_is_found(compile_program: Compile, name: str) -> None:
    assert compile_program("scheduled_streams.cpp", mistake=name).run(1, NUM_SCHEDULES_BROKEN).returncode != 0


@pytest.mark.parametrize("seed", [1, 2, 3])
def test_threads_find_every_row_without_a_race(compile_program: Compile, seed: int) -> None:
    compile_program("threaded_streams.cpp", sanitizers="thread").check(seed, NUM_OPERATIONS_THREADED)


@pytest.mark.parametrize("switch", ["-DRELAXED_SIGNALS", "-DRELAXED_WORDS"])
def test_a_missing_order_is_found(compile_program: Compile, switch: str) -> None:
    result = compile_program("threaded_streams.cpp", switch, sanitizers="thread").run(1, NUM_OPERATIONS_THREADED)
    assert result.returncode != 0
    assert "data race" in result.stderr
