"""Arenas that ranks map from each other, with memory files in the place of GPU memory: they tell who wrote them."""

from __future__ import annotations

import gc
import os
from typing import Any

import torch

from deep_ep import BackendUnavailableError
from deep_ep.backend import GroupFacts
from deep_ep.channel import open_channel
from deep_ep.launch import RankContext, RankPool
from deep_ep.symmetric import GRANULE_BYTES, MappedArena, whole_granules

NUM_RANKS = 4


class Extension:
    """A native module whose arenas are memory files; an arena's address tells which rank wrote the file."""

    class NativeError(RuntimeError):
        pass

    def __init__(self, rank: int, *, fails: str = "") -> None:
        self.closed: list[str] = []
        extension = self

        class Arena:
            def __init__(self, *, device: int, num_reserved_bytes: int) -> None:
                if fails == "reserve":
                    raise extension.NativeError("out of memory")
                self.file = os.memfd_create("arena")
                os.write(self.file, bytes([100 + rank]))
                self.base, self.num_bytes = 100 + rank, 0

            def grow(self, num_bytes: int) -> int:
                self.num_bytes += num_bytes
                return 0

            def export_fd(self, segment: int) -> int:
                return os.dup(self.file)

            def close(self) -> None:
                os.close(self.file)
                extension.closed.append("own")

        class PeerArena:
            def __init__(self, *, device: int, num_reserved_bytes: int) -> None:
                self.base = 0

            def map(self, fd: int, num_bytes: int) -> None:
                if fails == "map":
                    raise extension.NativeError("no such device")
                self.base = os.pread(fd, 1, 0)[0]

            def close(self) -> None:
                extension.closed.append("peer")

        self.Arena, self.PeerArena = Arena, PeerArena


def facts_of(context: RankContext) -> GroupFacts:
    return GroupFacts(
        rank=context.rank,
        num_ranks=context.num_ranks,
        ranks_per_node=context.num_ranks,
        device=torch.device("cuda", 0),
        channel=open_channel(context.group, None),
    )


def map_arenas(context: RankContext, hosts: str) -> tuple[list[int], list[str]]:
    extension: Any = Extension(context.rank)
    on_host = [rank for rank, host in enumerate(hosts) if host == hosts[context.rank]]
    gc.collect()  # what earlier runs in this process left is closed before it is counted
    num_open = len(os.listdir("/proc/self/fd"))
    arena = MappedArena(
        extension,
        facts_of(context),
        num_bytes=GRANULE_BYTES,
        timeout_s=30.0,
        backend="test",
        cure="Ask for less.",
        mapped_ranks=on_host,
    )
    assert arena.num_bytes == GRANULE_BYTES and arena.base == 100 + context.rank
    arena.close()
    arena.close()
    assert len(os.listdir("/proc/self/fd")) == num_open, "a descriptor stayed open"
    return arena.arena_ptrs, extension.closed


def test_ranks_of_one_host_map_all_others(rank_pool: RankPool) -> None:
    for ptrs, closed in rank_pool.run(map_arenas, "aaaa", num_ranks=NUM_RANKS):
        assert ptrs == [100, 101, 102, 103]
        assert closed == ["peer", "peer", "peer", "own"]


def test_ranks_of_other_hosts_are_not_mapped(rank_pool: RankPool) -> None:
    pointers = [ptrs for ptrs, _ in rank_pool.run(map_arenas, "aabb", num_ranks=NUM_RANKS)]
    assert pointers == [[100, 101, 0, 0], [100, 101, 0, 0], [0, 0, 102, 103], [0, 0, 102, 103]]


def map_with_trouble(context: RankContext, unlucky: int, fails: str) -> tuple[str, list[str]]:
    extension: Any = Extension(context.rank, fails=fails if context.rank == unlucky else "")
    try:
        MappedArena(
            extension, facts_of(context), num_bytes=GRANULE_BYTES, timeout_s=30.0, backend="test", cure="Ask for less."
        )
    except BackendUnavailableError as error:
        return str(error), extension.closed
    return "", extension.closed


def test_trouble_of_one_rank_is_the_same_error_on_all(rank_pool: RankPool) -> None:
    for fails, says in (
        (
            "reserve",
            "backend 'test': rank 2 could not reserve 2 MiB of shareable GPU memory: out of memory. Ask for less.",
        ),
        ("map", "backend 'test': rank 2 could not map a peer's GPU memory: no such device. Ask for less."),
    ):
        results = rank_pool.run(map_with_trouble, 2, fails, num_ranks=NUM_RANKS)
        assert {text for text, _ in results} == {says}
        for rank, (_, closed) in enumerate(results):
            assert ("own" in closed) == (rank != 2 or fails != "reserve"), f"rank {rank} released {closed}"


def test_whole_granules() -> None:
    assert [whole_granules(n) for n in (0, 1, GRANULE_BYTES, GRANULE_BYTES + 1)] == [
        0,
        GRANULE_BYTES,
        GRANULE_BYTES,
        2 * GRANULE_BYTES,
    ]
