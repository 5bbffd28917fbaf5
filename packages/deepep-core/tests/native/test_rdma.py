"""Queue pairs, work requests and the software NIC, on the CPU: bytes, cases, threads, and random schedules of faults.

Every check has deliberate mistakes (mutants) that it must catch, so none of them can pass empty.
"""

from __future__ import annotations

import re
import shutil
import subprocess
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

if TYPE_CHECKING:
    from .conftest import Compile

HERE = Path(__file__).parent
INCLUDE = HERE.parents[1] / "src" / "deep_ep" / "include"
RDMA_CORE = Path("/usr/include/infiniband/mlx5dv.h")
MEMORY_CHECKS = "address,undefined"
NUM_SCHEDULES = 1_000_000
NUM_SCHEDULES_CHECKED = 100_000
NUM_SCHEDULES_MUTANT = 2_000
NUM_MESSAGES = 1_000  # of each of three posters, two requests each: request numbers wrap in the midst of them
CASES = [
    pytest.param(source, case, id=case)
    for source in ("rdma_cases.cpp", "mover_cases.cpp")
    for case in re.findall(r"^    CASE\((\w+)\),$", (HERE / source).read_text(), flags=re.MULTILINE)
]

# (header, old, new): the mistake, by name. The schedules must find each.
MISTAKES = {
    "error completions are ignored": (
        "rdma/queue_pair.hpp",
        "if (opcode != CompletionOpcode::kRequest) {",
        "if (false) {",
    ),
    "request numbers are compared without their wrap": (
        "rdma/queue_pair.hpp",
        "completed + static_cast<uint16_t>(request + 1 - static_cast<uint16_t>(completed))",
        "(request + 1ull > completed ? request + 1ull : completed)",
    ),
    "request numbers are written without their wrap": (
        "rdma/wqe.hpp",
        "(static_cast<uint32_t>(place.index) & kIndexMask) << 8 |",
        "static_cast<uint32_t>(place.index) << 8 |",
    ),
    "the ring wraps one slot early": ("rdma/queue_pair.hpp", "index & (depth - 1)]", "index % (depth - 1)]"),
    "a full ring holds nobody back": (
        "rdma/queue_pair.hpp",
        "&pair.state->completed) + pair.depth) {",
        "&pair.state->completed) + 2 * pair.depth) {",
    ),
    "batches are published out of order": (
        "rdma/queue_pair.hpp",
        "while (load_acquire_gpu(&pair.state->ready) != begin) {",
        "while (false) {",
    ),
    "the doorbell record is not written": (
        "rdma/queue_pair.hpp",
        "store_release_sys(pair.record, doorbell_record(ready).bits);",
        "",
    ),
    "the doorbell is not rung": (
        "rdma/queue_pair.hpp",
        "store_release_sys(pair.doorbell, doorbell_word(pair.number, ready));",
        "",
    ),
    "a poster that cannot wait takes its slots anyway": (
        "rdma/queue_pair.hpp",
        "if (count == 0 || count > pair.depth) return pair.status(Outcome::kBadBatch);",
        "*begin = pair.state->reserved, pair.state->reserved += count; return pair.status(Outcome::kOk);",
    ),
    "the NIC loses data that is not inline": (
        "rdma/software_nic.hpp",
        "mover_.copy(destination, source, num_bytes);",
        "if (is_inline) mover_.copy(destination, source, num_bytes);",
    ),
    "the NIC goes on after an error": ("rdma/software_nic.hpp", "if (queue.is_in_error) {", "if (false) {"),
    "the NIC does not check bounds": (
        "rdma/software_nic.hpp",
        "if (offset > region.num_bytes || num_bytes > region.num_bytes - offset) return nullptr;",
        "",
    ),
    "the NIC does not check whose memory it is": ("rdma/software_nic.hpp", "region.peer != peer || ", ""),
    "the NIC does not check rights": ("rdma/software_nic.hpp", "(region.access & access) == 0 || ", ""),
}
# Orderings that a schedule on one thread cannot see; ThreadSanitizer does.
RACES = {
    "batches are published without release": (
        "rdma/atomics.hpp",
        "__atomic_store_n(address, value, __ATOMIC_RELEASE));\n}\nDEEPEP_HOST_DEVICE void store_release_gpu(uint32_t",
        "__atomic_store_n(address, value, __ATOMIC_RELAXED));\n}\nDEEPEP_HOST_DEVICE void store_release_gpu(uint32_t",
    ),
    "the doorbell is rung without release": (
        "rdma/queue_pair.hpp",
        "store_release_sys(pair.record, doorbell_record(ready).bits);\n"
        "    store_release_sys(pair.doorbell, doorbell_word(pair.number, ready));",
        "__atomic_store_n(pair.record, doorbell_record(ready).bits, __ATOMIC_RELAXED);\n"
        "    __atomic_store_n(pair.doorbell, doorbell_word(pair.number, ready), __ATOMIC_RELAXED);",
    ),
    "slots are taken again without acquiring their completion": (
        "rdma/queue_pair.hpp",
        "if (reserved + count <= load_acquire_gpu(",
        "if (reserved + count <= load_relaxed_gpu(",
    ),
    "the NIC completes without release": (
        "rdma/software_nic.hpp",
        "Be32::of(entry).bits, __ATOMIC_RELEASE);",
        "Be32::of(entry).bits, __ATOMIC_RELAXED);",
    ),
}

# (case, old, new) in the software NIC: what only a mover that lands later can show.
MOVER_MISTAKES = {
    "completions do not wait for the bytes": (
        "completions_wait_until_the_bytes_are_there",
        "if (progress == Progress::kPending) return true;",
        "",
    ),
    "errors do not wait for what came before": (
        "an_error_does_not_overtake_what_has_not_landed",
        "queue.unreported.push_back({request, mover_.batch(), syndrome});",
        "syndrome == Syndrome::kNone ? queue.unreported.push_back({request, mover_.batch(), syndrome})"
        " : queue.unreported.push_front({request, 0, syndrome});",
    ),
    "moves that failed count as landed": (
        "moves_that_fail_fail_their_requests",
        "if (progress == Progress::kFailed && next.syndrome == Syndrome::kNone) lose(queue, next);",
        "",
    ),
    "work is what has no completion yet": (
        "work_is_what_has_not_landed",
        "bool has_some = mover_.progress(mover_.batch()) == Progress::kPending;",
        "bool has_some = false;",
    ),
    "a reset does not wait": ("a_reset_waits_for_what_was_taken", "mover_.drain();", ""),
}


def test_requests_equal_those_of_rdma_core_byte_for_byte(compile_program: Compile) -> None:
    if not RDMA_CORE.exists():
        pytest.skip(f"{RDMA_CORE} not found: install rdma-core's headers (Debian: libibverbs-dev)")
    compile_program("wqe_against_mlx5dv.cpp", sanitizers="undefined").check()


@pytest.mark.parametrize(
    ("old", "new"),
    [
        ("Be64::of(remote.address)", "Be64{remote.address}"),
        ("place.is_signalled ? kSignalled : 0", "place.is_signalled ? kSignalled << 8 : 0"),
        ("Be32::of(num_bytes | kInlineFlag)", "Be32::of(num_bytes)"),
        (".addend = Be64::of(addend), .compare = {0}", ".addend = {0}, .compare = Be64::of(addend)"),
        ("Be32::of(queue_pair << 8).bits", "Be32::of(queue_pair).bits"),
    ],
    ids=["byte-order", "completion-flag", "inline-flag", "addend", "doorbell"],
)
def test_a_wrong_byte_is_found(compile_program: Compile, mutant_of: type, old: str, new: str) -> None:
    if not RDMA_CORE.exists():
        pytest.skip(f"{RDMA_CORE} not found: install rdma-core's headers (Debian: libibverbs-dev)")
    mutant = mutant_of(name=old, header="rdma/wqe.hpp", old=old, new=new)
    assert compile_program("wqe_against_mlx5dv.cpp", "-O0", mutant=mutant).run().returncode == 1


@pytest.mark.parametrize(("source", "case"), CASES)
def test_case(compile_program: Compile, source: str, case: str) -> None:
    compile_program(source, "-O0", sanitizers=MEMORY_CHECKS).check(case)


@pytest.mark.parametrize("name", MOVER_MISTAKES)
def test_moves_that_land_late_find_the_mistake(compile_program: Compile, mutant_of: type, name: str) -> None:
    case, old, new = MOVER_MISTAKES[name]
    mutant = mutant_of(name=name, header="rdma/software_nic.hpp", old=old, new=new)
    assert compile_program("mover_cases.cpp", "-O0", mutant=mutant).run(case).returncode == 1


@pytest.mark.parametrize("sanitizers", ["thread", MEMORY_CHECKS])
def test_posters_share_queue_pairs_and_every_message_arrives(compile_program: Compile, sanitizers: str) -> None:
    compile_program("threaded_rings.cpp", sanitizers=sanitizers).check(NUM_MESSAGES)


@pytest.mark.parametrize("name", RACES)
def test_a_missing_order_is_found(compile_program: Compile, mutant_of: type, name: str) -> None:
    header, old, new = RACES[name]
    mutant = mutant_of(name=name, header=header, old=old, new=new)
    program = compile_program("threaded_rings.cpp", sanitizers="thread", mutant=mutant)
    result = program.run(NUM_MESSAGES)
    assert result.returncode != 0
    assert "data race" in result.stderr


@pytest.mark.parametrize(
    ("sanitizers", "num_schedules"),
    [("", NUM_SCHEDULES), (MEMORY_CHECKS, NUM_SCHEDULES_CHECKED)],
    ids=["plain", "memory-checked"],
)
def test_every_fault_ends_well_or_with_its_name(compile_program: Compile, sanitizers: str, num_schedules: int) -> None:
    printed = compile_program("fault_schedules.cpp", sanitizers=sanitizers).check(1, num_schedules)
    tally = {name: int(count) for name, count in (line.split("\t") for line in printed.splitlines())}
    assert tally["schedules"] == num_schedules
    # Not only did each kind of fault take effect: each occurred in at least one schedule of a thousand.
    faults = {name: count for name, count in tally.items() if name.startswith("fault: ")}
    assert len(faults) == 5
    assert all(count > num_schedules / 1000 for count in faults.values()), faults
    assert tally["messages_checked"] > num_schedules


@pytest.mark.parametrize("switch", ["-DMUTANT_SIGNAL_FIRST", "-DMUTANT_NO_FAULTS"])
def test_schedules_that_show_nothing_fail(compile_program: Compile, switch: str) -> None:
    assert compile_program("fault_schedules.cpp", "-O0", switch).run(1, NUM_SCHEDULES_MUTANT).returncode == 1


@pytest.mark.parametrize("name", MISTAKES)
def test_schedules_find_the_mistake(compile_program: Compile, mutant_of: type, name: str) -> None:
    header, old, new = MISTAKES[name]
    mutant = mutant_of(name=name, header=header, old=old, new=new)
    result = compile_program("fault_schedules.cpp", "-O0", mutant=mutant).run(1, NUM_SCHEDULES_MUTANT)
    assert result.returncode != 0


def test_headers_compile_for_the_device(tmp_path: Path) -> None:
    nvcc = shutil.which("nvcc")
    if nvcc is None:
        pytest.skip("no nvcc on this machine: the headers cannot be compiled for a GPU")
    assembly = tmp_path / "device.ptx"
    command = [nvcc, "-std=c++17", "-arch=sm_90", "-ptx", f"-I{INCLUDE}", HERE / "device_compiles.cu", "-o", assembly]
    result = subprocess.run(list(map(str, command)), capture_output=True, text=True)
    assert result.returncode == 0, result.stderr[-4000:]
    text = assembly.read_text()
    # The doorbell is one 8-byte store behind all that this thread saw published; a request goes out in wide stores.
    assert "st.release.sys.global.u64" in text
    assert "st.v4" in text
