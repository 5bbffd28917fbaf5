"""Kernels post real work requests, and the software NIC serves them: bytes, order, wrap-around, posters, faults.

Two ranks, each with its own arena, kernels and software NIC: in one process (on two GPUs, or on one), and as two
processes whose arenas travel as file descriptors. ``remote_kernels.cu`` is compiled here with nvcc. To run it:

    python3 -m pytest packages/deepep-ibgda/tests/gpu/test_remote.py

DEEPEP_BUILD_DIR names a build folder to take the extension ``_ibgda`` from, instead of the installed package.
"""

from __future__ import annotations

import ctypes
import os
import shutil
import subprocess
import sys
import time
from array import array
from dataclasses import dataclass, field
from pathlib import Path
from socket import AF_UNIX, CMSG_LEN, SCM_RIGHTS, SOCK_SEQPACKET, SOL_SOCKET, socket, socketpair
from typing import Any

import pytest
import torch

if build := os.environ.get("DEEPEP_BUILD_DIR"):
    sys.path.insert(0, build)
    import _ibgda
else:
    _ibgda = pytest.importorskip("deepep_ibgda._ibgda")

HERE = Path(__file__).parent
CSRC = HERE.parents[1] / "csrc"
INCLUDE = HERE.parents[2] / "deepep-core" / "src" / "deep_ep" / "include"
ARENA_BYTES = 4 << 20
RESULTS_AT, OUTGOING_AT, INCOMING_AT = 4096, 1 << 20, 2 << 20
NUM_POSTERS = 3
NUM_MESSAGES_TO_WRAP = (
    22_000  # of each poster; a row to the peer and a credit for a row of the peer's: more than 65536 requests
)
NUM_MESSAGES_BETWEEN_PROCESSES = 300  # few: on one GPU the two processes take turns
TIMEOUT, PEER_FAILED, POST = 1, 3, 10  # deepep/layout/status.hpp
REMOTE_OPERATION, RETRIES_EXHAUSTED = 0x14, 0x15  # deepep/rdma/wqe.hpp

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")


@pytest.fixture(scope="session")
def kernels(tmp_path_factory: pytest.TempPathFactory) -> Path:
    nvcc = shutil.which("nvcc")
    if nvcc is None:
        pytest.skip("no nvcc on this machine: the posting kernels cannot be compiled")
    library = tmp_path_factory.mktemp("remote") / "remote_kernels.so"
    major, minor = torch.cuda.get_device_capability()
    flags = [
        "-shared",
        "-std=c++17",
        "-O2",
        f"-arch=sm_{major}{minor}",
        "-Xcompiler",
        "-fPIC",
        f"-I{INCLUDE}",
        f"-I{CSRC}",
    ]
    result = subprocess.run(
        [nvcc, *flags, str(HERE / "remote_kernels.cu"), "-o", str(library)], capture_output=True, text=True
    )
    assert result.returncode == 0, result.stderr[-4000:]
    return library


@dataclass(frozen=True, kw_only=True)
class Failure:
    kind: int
    phase: int
    rank: int
    peer: int
    seen: int
    expected: int

    @property
    def words(self) -> str:
        return _ibgda.describe_rdma_failure(peer=self.peer, seen=self.seen, expected=self.expected)


@dataclass(kw_only=True)
class Rank:
    """One rank: arena, status page, NIC, stream."""

    rank: int
    device: int
    library: Any
    arena: torch.Tensor
    peer_arena_ptr: int
    nic_options: dict[str, Any] = field(default_factory=dict)
    timeout_s: float = 20.0
    num_epochs: int = 0

    def __post_init__(self) -> None:
        torch.cuda.set_device(self.device)
        where = f"cuda:{self.device}"
        self.host = torch.zeros(self.library.num_host_bytes(), dtype=torch.uint8).pin_memory()
        self.state = torch.zeros(self.library.num_state_bytes(), dtype=torch.uint8, device=where)
        self.bad_words = torch.zeros(1, dtype=torch.int64, device=where)
        self.failed_peer = torch.full((1,), -9, dtype=torch.int32, device=where)
        self.stream = torch.cuda.Stream(device=self.device)
        self.library.set_timeout(self.host.data_ptr(), int(self.timeout_s * 1e9))
        assert self.library.load_kernels() == 0
        self.arena.zero_()
        self.arena[INCOMING_AT:] = 0xFF
        ptrs = [self.peer_arena_ptr] * 2
        ptrs[self.rank] = self.arena.data_ptr()
        self.nic = _ibgda.SoftwareNic(
            rank=self.rank,
            device=self.device,
            arena_ptrs=ptrs,
            num_arena_bytes=ARENA_BYTES,
            is_remote=[self.rank != 0, self.rank != 1],
            **{"depth": 16, "num_queue_pairs": 1, **self.nic_options},
        )
        torch.cuda.synchronize(self.device)

    def launch(
        self, kernel: str, *, num_messages: int = 1, num_posters: int = NUM_POSTERS, num_row_words: int = 256
    ) -> None:
        torch.cuda.set_device(self.device)
        self.num_epochs += 1
        sizes = (ctypes.c_int32 * 6)(
            self.rank, 1 - self.rank, num_posters, num_messages, num_row_words, self.num_epochs
        )
        offsets = (ctypes.c_int64 * 5)(0, 2048, RESULTS_AT, OUTGOING_AT, INCOMING_AT)
        status = self.library.launch(
            kernel.encode(),
            ctypes.c_uint64(self.nic.view_ptr),
            ctypes.c_void_p(self.host.data_ptr()),
            ctypes.c_void_p(self.state.data_ptr()),
            ctypes.c_void_p(self.arena.data_ptr()),
            sizes,
            offsets,
            ctypes.c_void_p(self.bad_words.data_ptr()),
            ctypes.c_void_p(self.failed_peer.data_ptr()),
            ctypes.c_void_p(self.stream.cuda_stream),
        )
        assert status == 0, f"launching {kernel}: CUDA answered {status}"

    def error(self) -> Failure | None:
        out = (ctypes.c_int64 * 6)()
        self.library.read_error(ctypes.c_void_p(self.host.data_ptr()), out)
        kind, phase, rank, peer, seen, expected = out
        if kind == 0:
            return None
        return Failure(kind=kind, phase=phase, rank=rank, peer=peer, seen=seen, expected=expected)

    def forget_error(self) -> None:
        self.library.forget_error(ctypes.c_void_p(self.host.data_ptr()))

    def int64(self, offset: int, count: int) -> list[int]:
        return self.arena[offset : offset + 8 * count].view(torch.int64).tolist()

    def check(self) -> None:
        self.stream.synchronize()
        error = self.error()
        assert error is None, f"rank {self.rank}: {error}: {error.words}; {self.nic.first_fault(peer=1 - self.rank)}"
        assert self.bad_words.item() == 0, f"rank {self.rank}: {self.bad_words.item()} wrong words"
        # A kernel ends when its own rows have come; its last credits may still be on their way.
        assert self.nic.drain(timeout_s=20.0)


def load(path: Path) -> Any:
    library = ctypes.CDLL(str(path))
    library.set_timeout.argtypes = [ctypes.c_void_p, ctypes.c_uint64]
    return library


class Pair:
    """Two ranks in this process, on two GPUs where there are two."""

    def __init__(self, library: Any, *, num_devices: int | None = None, **options: Any) -> None:
        timeout_s = options.pop("timeout_s", 20.0)
        num_devices = num_devices or min(2, torch.cuda.device_count())
        devices = [rank % num_devices for rank in range(2)]
        for a in devices:  # torch's first copy between two devices enables peer access
            for b in devices:
                torch.ones(8, device=f"cuda:{a}").to(f"cuda:{b}")
        arenas = [torch.empty(ARENA_BYTES, dtype=torch.uint8, device=f"cuda:{d}") for d in devices]
        self.ranks = [
            Rank(
                rank=rank,
                device=devices[rank],
                library=library,
                arena=arenas[rank],
                peer_arena_ptr=arenas[1 - rank].data_ptr(),
                nic_options=options,
                timeout_s=timeout_s,
            )
            for rank in range(2)
        ]
        for rank in self.ranks:
            rank.nic.start()

    def __enter__(self) -> Pair:
        return self

    def __exit__(self, *_: object) -> None:
        for rank in self.ranks:
            rank.stream.synchronize()
        for rank in self.ranks:
            rank.nic.close()
            rank.nic.close()  # twice is allowed

    def run(self, kernel: str, **sizes: int) -> None:
        for rank in self.ranks:
            rank.launch(kernel, **sizes)
        for rank in self.ranks:
            rank.stream.synchronize()

    def check(self) -> None:
        for rank in self.ranks:
            rank.check()


@pytest.mark.parametrize("num_row_words", [4, 256, 4096], ids=["16B", "1KiB", "16KiB"])
def test_rows_arrive_as_they_were_sent(kernels: Path, num_row_words: int) -> None:
    with Pair(load(kernels)) as pair:
        pair.run("exchange_rows", num_messages=50, num_row_words=num_row_words)
        pair.check()
        for rank in pair.ranks:
            counters = rank.nic.counters()
            assert counters["writes"] == counters["inline_writes"] == NUM_POSTERS * 50
            assert counters["bytes"] == NUM_POSTERS * 50 * (num_row_words * 4 + 8)
            assert 0 < counters["doorbells"] <= 2 * NUM_POSTERS * 50
            assert counters["errors"] == 0


def test_several_posters_share_a_ring_through_the_wrap_of_request_numbers(kernels: Path) -> None:
    with Pair(load(kernels), depth=8, timeout_s=60.0) as pair:
        pair.run("exchange_rows", num_messages=NUM_MESSAGES_TO_WRAP, num_row_words=16)
        pair.check()
        for rank in pair.ranks:
            counters = rank.nic.counters()
            assert counters["writes"] + counters["inline_writes"] == 2 * NUM_POSTERS * NUM_MESSAGES_TO_WRAP > 65536


def test_queue_pairs_go_on_from_operation_to_operation(kernels: Path) -> None:
    with Pair(load(kernels), num_queue_pairs=2) as pair:
        for round_ in range(20):
            for rank in pair.ranks:
                rank.arena[:2048].zero_()  # credits count from the start of an operation
                torch.cuda.synchronize(rank.device)
            pair.run("exchange_rows", num_messages=7)
            pair.check()
            assert pair.ranks[0].nic.counters()["writes"] == (round_ + 1) * NUM_POSTERS * 7


def test_inline_writes_of_every_length_land_where_they_should(kernels: Path) -> None:
    with Pair(load(kernels)) as pair:
        pair.run("post_words")
        pair.check()
        expected = [100 * count + i for count in range(1, 8) for i in range(count)]
        for rank in pair.ranks:
            end = INCOMING_AT + 4 * len(expected)
            assert rank.arena[INCOMING_AT:end].view(torch.int32).tolist() == expected
            assert rank.arena[end : end + 4].tolist() == [0xFF] * 4


def test_atomics_count_and_tell_each_value_once(kernels: Path) -> None:
    with Pair(load(kernels)) as pair:
        pair.run("add_ones", num_messages=40)
        pair.check()
        for rank in pair.ranks:
            assert rank.int64(2048, 2) == [NUM_POSTERS * 40, 0]
            assert sorted(rank.int64(RESULTS_AT, NUM_POSTERS * 40)) == list(range(NUM_POSTERS * 40))


def test_harmless_faults_harm_nobody(kernels: Path) -> None:
    faults = {"delay": 20_000, "reorder": 50_000, "drop completion": 10_000}
    with Pair(load(kernels), num_queue_pairs=3, seed=5, faults_per_million=faults) as pair:
        pair.run("exchange_rows", num_messages=2000, num_row_words=64)
        pair.check()
        for rank in pair.ranks:
            counters = rank.nic.counters()
            assert counters["fault_delay"] > 0
            assert counters["fault_reorder"] > 0
            assert counters["fault_drop_completion"] > 0
            assert counters["errors"] == 0


def test_an_error_completion_names_the_peer_and_the_cause(kernels: Path) -> None:
    # A ring so short that posters wait for completions, and hear of the failure that way.
    with Pair(load(kernels), timeout_s=3.0, depth=4) as pair:
        first, second = pair.ranks
        request = first.nic.inject(peer=1, fault="error completion", request=100, syndrome=RETRIES_EXHAUSTED)
        assert request == 100
        pair.run("exchange_rows", num_messages=500)
        error = first.error()
        assert error is not None
        assert (error.kind, error.phase, error.rank, error.peer) == (PEER_FAILED, POST, 0, 1)
        assert "to rank 1" in error.words
        assert "failed" in error.words
        assert first.nic.first_fault(peer=1) == "request 100: retries exhausted (the peer's NIC does not answer)"
        assert first.nic.counters()["fault_error_completion"] == 1
        assert not first.nic.drain(timeout_s=1.0)
        # The peer's NIC is healthy: its kernel waited for rows that never came.
        other = second.error()
        assert other is not None
        assert (other.kind, other.peer) == (TIMEOUT, 0)
        assert second.nic.first_fault(peer=0) is None


def test_a_dead_link_ends_at_the_deadline_and_says_who(kernels: Path) -> None:
    with Pair(load(kernels), timeout_s=2.0, depth=4) as pair:
        first = pair.ranks[0]
        first.nic.inject(peer=1, fault="dead link")
        first.launch("post_and_leave", num_messages=50)
        first.stream.synchronize()
        error = first.error()
        assert error is not None
        assert (error.kind, error.phase, error.peer) == (TIMEOUT, POST, 1)
        assert first.nic.counters()["fault_dead_link"] == 1
        assert first.nic.counters()["writes"] == 0


def test_retries_of_a_dead_link_are_exhausted_after_a_while(kernels: Path) -> None:
    with Pair(load(kernels), dead_link_steps=1000, depth=4) as pair:
        first = pair.ranks[0]
        first.nic.inject(peer=1, fault="dead link")
        first.launch("post_and_leave", num_messages=50)
        first.stream.synchronize()
        error = first.error()
        assert error is not None
        assert (error.kind, error.peer) == (PEER_FAILED, 1)
        assert "retries exhausted" in str(first.nic.first_fault(peer=1))


def test_who_never_waits_hears_of_a_failure_at_the_next_operation(kernels: Path) -> None:
    with Pair(load(kernels)) as pair:
        first = pair.ranks[0]
        first.launch("look_at_completions")
        first.check()
        assert first.failed_peer.item() == -1
        first.nic.inject(peer=1, fault="error completion")
        first.launch("post_and_leave", num_messages=3)
        first.stream.synchronize()
        assert not first.nic.drain(timeout_s=10.0)
        first.forget_error()  # in case posting heard of it already
        first.launch("look_at_completions")
        first.stream.synchronize()
        error = first.error()
        assert error is not None
        assert first.failed_peer.item() == error.peer == 1
        assert error.kind == PEER_FAILED
        # As new after a reset.
        first.forget_error()
        first.nic.reset()
        for rank in pair.ranks:
            rank.arena[:2048].zero_()
            torch.cuda.synchronize(rank.device)
        pair.run("exchange_rows", num_messages=10)
        pair.check()


def test_a_probe_shows_where_each_queue_pair_leads(kernels: Path) -> None:
    with Pair(load(kernels), num_queue_pairs=2) as pair:

        def facts(rank: Rank, nonce: int) -> dict[str, int]:
            return {
                "rank": rank.rank,
                "device": rank.device,
                "arena_ptr": rank.arena.data_ptr(),
                "view_ptr": rank.nic.view_ptr,
                "nonce": nonce,
            }

        for rank in pair.ranks:
            assert _ibgda.post_probe(**facts(rank, 77), timeout_s=20.0) == ""
        for rank in pair.ranks:
            assert _ibgda.missing_of_probe(**facts(rank, 77)) == []
            assert _ibgda.missing_of_probe(**facts(rank, 78)) == [(1 - rank.rank, 0), (1 - rank.rank, 1)]
        first = pair.ranks[0]
        first.nic.inject(peer=1, lane=1, fault="error completion", syndrome=RETRIES_EXHAUSTED)
        assert "to rank 1: request 1 failed: retries exhausted" in _ibgda.post_probe(**facts(first, 79), timeout_s=20.0)
        first.nic.reset()
        first.nic.inject(peer=1, lane=0, fault="dead link")
        assert "to rank 1: waited until the deadline" in _ibgda.post_probe(**facts(first, 80), timeout_s=1.0)


def test_the_nic_serves_while_another_thread_records_a_graph(kernels: Path) -> None:
    with Pair(load(kernels), timeout_s=60.0) as pair:
        first = pair.ranks[0]
        x = torch.zeros(1, device=f"cuda:{first.device}")
        torch.cuda.set_device(first.device)
        side = torch.cuda.Stream(device=first.device)
        with torch.cuda.stream(side):
            x.add_(1)
        side.synchronize()
        for rank in pair.ranks:
            rank.launch("exchange_rows", num_messages=5000, num_row_words=16)
        torch.cuda.set_device(first.device)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.stream(side):
            graph.capture_begin()
            num_before = first.nic.counters()["completions"]
            x.add_(1)
            time.sleep(0.02)
            num_after = first.nic.counters()["completions"]
            graph.capture_end()
        assert num_after > num_before, "nothing was served during the recording, so this shows nothing"
        for rank in pair.ranks:
            rank.stream.synchronize()
        pair.check()
        graph.replay()
        torch.cuda.synchronize(first.device)
        assert x.item() == 2


def test_wrong_arguments_are_refused_in_words(kernels: Path) -> None:
    with Pair(load(kernels)) as pair:
        nic = pair.ranks[0].nic
        with pytest.raises(_ibgda.ArgumentError, match="no queue pair to rank 0"):
            nic.inject(peer=0, fault="delay")
        with pytest.raises(_ibgda.ArgumentError, match="fault is 'slow'"):
            nic.inject(peer=1, fault="slow")
        with pytest.raises(_ibgda.ArgumentError, match="not mapped into this process"):
            nic.register_arenas(arena_ptrs=[pair.ranks[0].arena.data_ptr(), 0], num_arena_bytes=ARENA_BYTES)
    with pytest.raises(_ibgda.ArgumentError, match="it has been closed"):
        nic.start()


class RawMemory:
    """Device memory that torch did not allocate, as ``torch.as_tensor`` takes it."""

    def __init__(self, address: int, num_bytes: int) -> None:
        self.__cuda_array_interface__ = {
            "shape": (num_bytes,),
            "typestr": "|u1",
            "data": (address, False),
            "version": 3,
        }


def send_descriptor(link: socket, descriptor: int) -> None:
    link.sendmsg([b"m"], [(SOL_SOCKET, SCM_RIGHTS, array("i", [descriptor]))])


def receive_descriptor(link: socket) -> int:
    _, ancillary, _, _ = link.recvmsg(1, CMSG_LEN(4))
    return array("i", ancillary[0][2])[0]


def serve_one_rank(rank: int, link: socket, library: Path) -> None:
    """One of two processes: rank ``rank`` in full, its peer known by a mapped arena only."""
    device = rank % torch.cuda.device_count()
    torch.cuda.set_device(device)
    own = _ibgda.Arena(device=device, num_reserved_bytes=ARENA_BYTES)
    descriptor = own.export_fd(own.grow(ARENA_BYTES))
    send_descriptor(link, descriptor)
    os.close(descriptor)
    peer = _ibgda.PeerArena(device=device, num_reserved_bytes=ARENA_BYTES)
    descriptor = receive_descriptor(link)
    peer.map(descriptor, own.segment_bytes(0))
    os.close(descriptor)
    me = Rank(
        rank=rank,
        device=device,
        library=load(library),
        arena=torch.as_tensor(RawMemory(own.base, ARENA_BYTES), device=f"cuda:{device}"),
        peer_arena_ptr=peer.base,
        nic_options={"depth": 16},
        timeout_s=60.0,
    )
    me.nic.start()

    def meet() -> None:
        link.send(b"b")
        assert link.recv(1) == b"b", "the other process has ended"

    meet()
    me.launch("exchange_rows", num_messages=NUM_MESSAGES_BETWEEN_PROCESSES, num_row_words=1792)
    me.check()
    me.launch("add_ones", num_messages=20)
    me.check()
    meet()
    assert me.int64(2048, 1) == [NUM_POSTERS * 20]
    counters = me.nic.counters()
    assert counters["writes"] == NUM_POSTERS * NUM_MESSAGES_BETWEEN_PROCESSES
    assert counters["atomics"] == NUM_POSTERS * 20
    meet()
    me.nic.close()
    peer.close()
    own.close()


def test_two_processes_reach_each_other_by_requests_alone(kernels: Path) -> None:
    links = socketpair(AF_UNIX, SOCK_SEQPACKET)
    processes = [
        subprocess.Popen(
            [sys.executable, __file__, str(rank), str(links[rank].fileno()), str(kernels)],
            pass_fds=[links[rank].fileno()],
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        for rank in range(2)
    ]
    for link in links:
        link.close()
    try:
        printed = [process.communicate(timeout=240)[0] for process in processes]
    finally:
        for process in processes:
            process.kill()
    for rank, process in enumerate(processes):
        assert process.returncode == 0, f"rank {rank} ended with {process.returncode}: {printed[rank][-3000:]}"


if __name__ == "__main__":
    serve_one_rank(int(sys.argv[1]), socket(fileno=int(sys.argv[2])), Path(sys.argv[3]))
