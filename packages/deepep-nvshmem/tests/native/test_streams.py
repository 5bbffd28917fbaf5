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
NUM_SCHEDULES_BROKEN = 1_200
NUM_OPERATIONS_THREADED = 300
NUM_OPERATIONS_MISORDERED = 100
# Of what the schedules count: what has to happen in the five operations of every fourth, of every twentieth of them.
OFTEN = (
    "two slots of one row",
    "several rows in a slot",
    "slots used again",
    "more blocks than slots",
    "most tokens at one rank",
    "a rank without tokens",
    "a node without rows",
    "blocks of tokens without rows",
)
RARELY = (
    "slots of several rows used again",
    "without rows",
    "one block at a time",
    "teams of blocks",
    "senders without a deliverer",
    "teams, one block at a time",
    "senders relieved when they begin",
    "senders relieved amid chunks",
    "senders relieved with chunks to deliver",
    "collectors",
    "collectors that come too late",
    "forwarders that collect",
    "forwarders that answer directly",
)


def names_of(enum: str) -> list[str]:
    """The names behind the first one, which stands for 0."""
    (body,) = re.findall(rf"enum class {enum} : int {{(.*?)}};", (HERE / "streams.hpp").read_text(), flags=re.DOTALL)
    return re.findall(r"^    (k\w+),  ", body, flags=re.MULTILINE)


RULES = names_of("Rule")
ORDERS = names_of("Order")

# (what window.hpp computes, what it computes by mistake). The schedules must find each.
WORD = "signal_word(epoch, static_cast<uint32_t>(chunk + 1))"
IS_OF = "word >> 40 == (epoch & 0xFFFFFF)"
MISTAKES = {
    "slots overlap": ("slot * static_cast<int64_t>(num_slot_rows) * num_message_bytes", "slot * num_message_bytes"),
    "rings of different nodes overlap": ("peer < own ? peer : peer - 1", "0"),
    "what is sent and what is received share a ring": (
        "send_rings_offset() + (num_nodes - 1) * num_ring_bytes",
        "send_rings_offset()",
    ),
    "a ring has one slot too many": (
        "min_of(most_slots, num_messages / num_rows)",
        "min_of(most_slots, num_messages / num_rows + 1)",
    ),
    "chunks are larger than slots": (
        "min_of(num_slot_rows, max_of(1, ceil_div(num_rows, num_slots)))",
        "min_of(num_slot_rows + 1, max_of(1, ceil_div(num_rows, num_slots)))",
    ),
    "slots behind the last round of places are nobody's": (
        "num_last < 0 ? 0 : num_last < num_own ? num_last : num_own",
        "0",
    ),
    "a deliverer serves the places of the next team": ("is_sender ? member : 0", "member"),
    "a team without a deliverer has one place less": (
        "num_team_senders == 0 ? 0 : num_blocks / (num_team_senders + 1)",
        "num_team_senders == 0 ? 0 : (num_blocks - 1) / (num_team_senders + 1) + 1",
    ),
    "the last chunk is full": ("min_of(num_chunk_rows, num_rows - first_row(chunk))", "num_chunk_rows"),
    "a word of an earlier operation is taken for this one": (WORD, "signal_word(1, static_cast<uint32_t>(chunk + 1))"),
    "a word of an earlier chunk is taken for this one": (WORD, "signal_word(epoch, 1)"),
    "requests of earlier operations are served": (IS_OF, "word >> 40 != 0"),
    "the epoch of a request is not cut to its bits": (IS_OF, "word >> 40 == epoch"),
    "the count of a request reaches into its first row": (
        "static_cast<uint64_t>(begin) << 11",
        "static_cast<uint64_t>(begin) << 5",
    ),
    "requests of two operations share words": (
        "static_cast<int64_t>(epoch & 1) * num_nodes + writer",
        "static_cast<int64_t>(writer)",
    ),
    "credits and requests share words": ("credit_offset() + 8ll * num_nodes * kMaxSlots", "credit_offset()"),
    "dispatch and combine share their signals": (
        "static_cast<int64_t>(op) * num_nodes + writer",
        "static_cast<int64_t>(writer)",
    ),
}


def with_mistakes(window: str) -> str:
    """``window.hpp``, in which the environment variable ``MISTAKE`` chooses a mistake: 1 for the first, 0 for none."""
    choices: dict[str, str] = {}
    for number, (right, wrong) in enumerate(MISTAKES.values(), start=1):
        assert window.count(right) == 1, f"window.hpp has {window.count(right)} of: {right}"
        choices[right] = f"(kMistake == {number} ? ({wrong}) : ({choices.get(right, right)}))"
    for right, choice in choices.items():
        window = window.replace(right, choice)
    namespace = "namespace deepep::internode {\n"
    switch = '#include <cstdlib>\nstatic const int kMistake = std::atoi(std::getenv("MISTAKE"));\n'
    # What depends on the environment is not a constant.
    return window.replace(namespace, switch + namespace).replace("HOST_DEVICE constexpr", "HOST_DEVICE")


@dataclass(frozen=True, kw_only=True)
class Program:
    path: Path

    def run(self, *arguments: object, mistake: int = 0) -> subprocess.CompletedProcess[str]:
        """Run to the end, whatever the exit status."""
        environment = {**os.environ, "TSAN_OPTIONS": "halt_on_error=1", "MISTAKE": str(mistake)}
        command = [str(self.path), *map(str, arguments)]
        result = subprocess.run(command, capture_output=True, text=True, timeout=300, env=environment)
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
    """``compile_program(source, sanitizers="", has_mistakes=False)``: the program, compiled when first asked for."""
    compiler = shutil.which("g++")
    if compiler is None:
        pytest.skip("no g++ on this machine: the streams between nodes cannot be compiled for the CPU")
    folder = tmp_path_factory.mktemp("streams")
    programs: dict[tuple[object, ...], Program] = {}

    def compile_one(source: str, *, sanitizers: str = "", has_mistakes: bool = False) -> Program:
        key = (source, sanitizers, has_mistakes)
        if key in programs:
            return programs[key]
        program = folder / f"program-{len(programs)}"
        include = CSRC
        if has_mistakes:
            include = folder / "mistakes"
            (include / "internode").mkdir(parents=True)
            window = (CSRC / "internode" / "window.hpp").read_text()
            (include / "internode" / "window.hpp").write_text(with_mistakes(window))
        command = [compiler, "-std=c++17", "-pthread", f"-I{include}", f"-I{INCLUDE}"]
        command += ["-O1", "-w"] if has_mistakes else ["-O1", "-Wall", "-Wextra", "-Werror"]
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
    # The cases that matter occur.
    for name in ("dispatches", "combines", *OFTEN):
        assert tally[name] > num_schedules / 4, tally
    for name in RARELY:
        assert tally[name] > num_schedules / 20, tally


@pytest.mark.parametrize("rule", range(1, 1 + len(RULES)), ids=RULES)
def test_a_broken_rule_is_found(compile_program: Compile, rule: int) -> None:
    result = compile_program("scheduled_streams.cpp").run(1, NUM_SCHEDULES_BROKEN, rule)
    assert result.returncode == 1
    assert "does not hold" in result.stderr


def test_without_a_mistake_nothing_is_found(compile_program: Compile) -> None:
    compile_program("scheduled_streams.cpp", has_mistakes=True).check(1, NUM_SCHEDULES_CHECKED)


@pytest.mark.parametrize("mistake", range(1, 1 + len(MISTAKES)), ids=list(MISTAKES))
def test_a_mistake_in_the_layout_is_found(compile_program: Compile, mistake: int) -> None:
    program = compile_program("scheduled_streams.cpp", has_mistakes=True)
    assert program.run(1, NUM_SCHEDULES_BROKEN, mistake=mistake).returncode != 0


@pytest.mark.parametrize("seed", [1, 2, 3])
def test_threads_find_every_row_without_a_race(compile_program: Compile, seed: int) -> None:
    compile_program("threaded_streams.cpp", sanitizers="thread").check(seed, NUM_OPERATIONS_THREADED)


@pytest.mark.parametrize("order", range(1, 1 + len(ORDERS)), ids=ORDERS)
def test_a_missing_order_is_found(compile_program: Compile, order: int) -> None:
    result = compile_program("threaded_streams.cpp", sanitizers="thread").run(1, NUM_OPERATIONS_MISORDERED, order)
    assert result.returncode != 0
    assert "data race" in result.stderr
