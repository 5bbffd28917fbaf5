"""``enable_shrink``: ranks that are masked, late or gone cost their own rows and nothing else."""

from __future__ import annotations

import secrets
import socket
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from deep_ep import BackendUnavailableError, Buffer, BufferStateError, DeepEPError
from deep_ep.launch import RankContext, RankFailure, RankPool, run_ranks
from deep_ep.testing.conformance.errors import DEADLINE_S, HANG_S, NEVER_S, die_as
from deepep_reference import mesh
from deepep_reference.session import PeerIsAheadError
from deepep_reference.transport import Step

HIDDEN = 128


def new_buffer(context: RankContext, *, timeout_s: float = NEVER_S) -> Buffer:
    return Buffer(context.group, low_latency_mode=True, enable_shrink=True, backend="reference", timeout_s=timeout_s)


def masked(buffer: Buffer) -> list[int]:
    status = torch.empty(buffer.group_size, dtype=torch.int32)
    buffer.low_latency_query_mask_buffer(status)
    return status.tolist()


def round_trip(context: RankContext, buffer: Buffer) -> list[float]:
    """Every token names every expert, one expert per rank, with weights 1, 2, 4 ...; experts return what they get.

    Returns column 0 of what comes back: the weights of the ranks that took part, for tokens of value 1 and 2.
    """
    num_ranks = context.num_ranks
    x = torch.tensor([[1.0], [2.0]]).expand(2, HIDDEN).bfloat16().contiguous()
    topk_idx = torch.arange(num_ranks).repeat(2, 1)
    weights = 2.0 ** torch.arange(num_ranks).repeat(2, 1)
    recv_x, _, handle, _, _ = buffer.low_latency_dispatch(x, topk_idx, 2, num_ranks, use_fp8=False)
    return buffer.low_latency_combine(recv_x, topk_idx, weights, handle)[0][:, 0].tolist()


def killed_rank(context: RankContext, victim: int, folder: Path) -> tuple[list[list[float]], list[int]]:
    buffer = new_buffer(context)
    results = [round_trip(context, buffer)]
    die_as(victim, context, folder)
    results += [round_trip(context, buffer) for _ in range(3)]
    status = masked(buffer)
    buffer.destroy()
    return results, status


@pytest.mark.parametrize("victim", [0, 2])
def test_killed_rank_is_masked_at_once_and_the_others_go_on(victim: int, tmp_path: Path) -> None:
    """At once: the deadline is longer than the run may last."""
    with pytest.raises(RankFailure) as caught:
        run_ranks(killed_rank, victim, tmp_path, num_ranks=3, grace_s=HANG_S)
    assert set(caught.value.failures) == {victim}, str(caught.value)
    left = 7.0 - 2.0**victim
    for results, status in caught.value.results.values():
        assert results == [[7.0, 14.0]] + [[left, 2 * left]] * 3
        assert status == [int(rank == victim) for rank in range(3)]


def late_rank(context: RankContext, late: int) -> tuple[list[list[float]], list[list[int]]]:
    """One rank makes a call when the others have ended theirs without it; then all take each other in again."""
    buffer = new_buffer(context, timeout_s=DEADLINE_S)
    results, statuses = [round_trip(context, buffer)], []
    if context.rank == late:
        torch.distributed.barrier(context.group)
    results.append(round_trip(context, buffer))
    statuses.append(masked(buffer))
    if context.rank != late:
        torch.distributed.barrier(context.group)
    # The late rank has waited for a deadline of its own; meet before going on.
    torch.distributed.barrier(context.group)
    buffer.low_latency_clean_mask_buffer()
    statuses.append(masked(buffer))
    torch.distributed.barrier(context.group)
    results += [round_trip(context, buffer) for _ in range(2)]
    statuses.append(masked(buffer))
    buffer.destroy()
    return results, statuses


def test_late_rank_is_masked_at_the_deadline_and_can_be_taken_in_again() -> None:
    late = 1
    results = run_ranks(late_rank, late, num_ranks=3)
    for rank, (values, statuses) in enumerate(results):
        # Whoever comes late finds its peers gone on, so for the late rank all others are masked.
        alive = 2.0**late if rank == late else 7.0 - 2.0**late
        assert values == [[7.0, 14.0], [alive, 2 * alive], [7.0, 14.0], [7.0, 14.0]], f"rank {rank}"
        assert statuses[0] == [int((r == late) != (rank == late)) for r in range(3)], f"rank {rank}"
        assert statuses[1] == statuses[2] == [0, 0, 0], f"rank {rank}"


def rank_that_sits_out(context: RankContext, absent: int) -> list[list[float]]:
    """A rank that all others have masked makes no calls for a while; its call numbers fall behind."""
    buffer = new_buffer(context)
    results = [round_trip(context, buffer)]
    if context.rank != absent:
        buffer.low_latency_update_mask_buffer(absent, True)
        results += [round_trip(context, buffer) for _ in range(4)]
        buffer.low_latency_update_mask_buffer(absent, False)
    torch.distributed.barrier(context.group)
    results += [round_trip(context, buffer) for _ in range(2)]
    # Normal mode needs everybody, and everybody is there again.
    topk_idx = torch.zeros((1, 1), dtype=torch.int64)
    per_rank, _, per_expert, in_rank, _ = buffer.get_dispatch_layout(topk_idx, 3)
    recv_x = buffer.dispatch(
        torch.full((1, HIDDEN), float(context.rank), dtype=torch.bfloat16),
        num_tokens_per_rank=per_rank,
        is_token_in_rank=in_rank,
        num_tokens_per_expert=per_expert,
        topk_idx=topk_idx,
        topk_weights=torch.ones(1, 1),
    )[0]
    results.append(recv_x[:, 0].tolist())
    buffer.destroy()
    return results


def test_rank_that_sat_out_calls_is_taken_in_again() -> None:
    absent = 2
    results = run_ranks(rank_that_sits_out, absent, num_ranks=3)
    for rank, values in enumerate(results):
        without = [] if rank == absent else [[3.0, 6.0]] * 4
        received = [0.0, 1.0, 2.0] if rank == 0 else []
        assert values == [[7.0, 14.0], *without, [7.0, 14.0], [7.0, 14.0], received], f"rank {rank}"


def normal_call_with_a_killed_rank(context: RankContext, folder: Path) -> tuple[str, tuple[int, ...], str]:
    buffer = new_buffer(context)
    survivors = torch.distributed.new_group([0, 1])
    topk_idx = torch.zeros((1, 1), dtype=torch.int64)
    per_rank, _, per_expert, in_rank, _ = buffer.get_dispatch_layout(topk_idx, 3)
    die_as(2, context, folder)

    def dispatch() -> Any:
        return buffer.dispatch(
            torch.ones((1, HIDDEN), dtype=torch.bfloat16),
            num_tokens_per_rank=per_rank,
            is_token_in_rank=in_rank,
            num_tokens_per_expert=per_expert,
        )

    with pytest.raises(DeepEPError) as first:
        dispatch()
    with pytest.raises(BufferStateError) as second:
        dispatch()
    # Nobody leaves before the other survivor has seen who is missing.
    torch.distributed.barrier(survivors)
    buffer.destroy()
    return type(first.value).__name__, getattr(first.value, "ranks", ()), str(second.value)


def test_normal_mode_cannot_go_on_without_a_rank(tmp_path: Path) -> None:
    with pytest.raises(RankFailure) as caught:
        run_ranks(normal_call_with_a_killed_rank, tmp_path, num_ranks=3, grace_s=HANG_S)
    for error, ranks, second in caught.value.results.values():
        assert (error, ranks) == ("PeerLostError", (2,))
        assert "broke in an earlier call" in second


def aborted(context: RankContext) -> str:
    buffer, text = new_buffer(context), ""
    if context.rank == 0:
        timer = threading.Timer(0.3, buffer.abort)
        timer.start()
        with pytest.raises(BufferStateError) as caught:
            round_trip(context, buffer)
        text = str(caught.value)
    torch.distributed.barrier(context.group)
    buffer.destroy()
    return text


def test_abort_ends_a_pairwise_wait() -> None:
    assert "aborted" in run_ranks(aborted, num_ranks=2)[0]


def on_different_hosts(context: RankContext) -> list[float]:
    """As if every rank were on a host of its own, all of which reach the master at the loopback address."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(mesh, "host_identity", lambda: bytes([context.rank]) * 16)
        patch.setenv("MASTER_ADDR", "127.0.0.1")
        buffer = new_buffer(context)
    values = round_trip(context, buffer)
    buffer.destroy()
    return values


def test_ranks_on_different_hosts_connect_through_the_interface_towards_the_master(rank_pool: RankPool) -> None:
    assert rank_pool.run(on_different_hosts, num_ranks=3) == [[7.0, 14.0]] * 3


def rank_that_cannot_listen(context: RankContext, victim: int) -> str:
    def refuse(*_: Any, **__: Any) -> None:
        raise OSError("no port is free")

    with pytest.MonkeyPatch.context() as patch:
        if context.rank == victim:
            patch.setattr(socket, "create_server", refuse)
        with pytest.raises(BackendUnavailableError) as caught:
            new_buffer(context)
    new_buffer(context).destroy()
    return str(caught.value)


def test_buffer_that_one_rank_cannot_connect_is_an_error_on_every_rank(rank_pool: RankPool) -> None:
    texts = rank_pool.run(rank_that_cannot_listen, 1, num_ranks=3)
    assert len(set(texts)) == 1
    assert "rank 1 cannot listen for its peers (no port is free)" in texts[0]


# --- connections ----------------------------------------------------------------------------------------------------


def step(sequence: int, number: int) -> Step:
    return Step(phase="test", sequence=sequence, number=number, ranks=(0, 1), is_tolerant=True)


@pytest.fixture
def pair() -> Iterator[list[mesh.MeshTransport]]:
    """Two transports of ranks 0 and 1 in this process."""
    with socket.create_server(("127.0.0.1", 0)) as listener:
        near = socket.create_connection(listener.getsockname())
        far, _ = listener.accept()
    transports = [
        mesh.MeshTransport(0, {1: near}, timeout_s=HANG_S),
        mesh.MeshTransport(1, {0: far}, timeout_s=HANG_S),
    ]
    yield transports
    for transport in transports:
        transport.close()


def both(first: Any, second: Any) -> list[Any]:
    """Run two functions at once; their results, or what they raised."""
    results: list[Any] = [None, None]

    def call(place: int, function: Any) -> None:
        try:
            results[place] = function()
        except Exception as error:
            results[place] = error

    threads = [threading.Thread(target=call, args=pair) for pair in enumerate((first, second))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return results


def test_rows_larger_than_every_socket_buffer_cross_in_both_directions(pair: Any) -> None:
    rows = [torch.randint(0, 256, (3000, 4096), dtype=torch.uint8), torch.zeros((0, 4096), dtype=torch.uint8)]

    def exchange(rank: int) -> Any:
        counts = [rows[rank].shape[0] // 2] * 2
        return pair[rank].all_to_all(rows[rank], counts, [1500, 0], step(0, 2))

    first, second = both(lambda: exchange(0), lambda: exchange(1))
    assert first[1].shape == (0, 4096) and torch.equal(first[0], rows[0][:1500])
    assert torch.equal(second[0], rows[0][1500:])


def test_frames_of_earlier_calls_are_skipped(pair: Any) -> None:
    pair[0]._timeout_s = 0.1
    assert pair[0].gather(b"stale", step(3, 0)) == {0: b"stale"}, "rank 1 did not come, and the step is tolerant"
    pair[0]._timeout_s = HANG_S
    results = both(lambda: pair[0].gather(b"from0", step(7, 0)), lambda: pair[1].gather(b"from1", step(7, 0)))
    assert results == [{0: b"from0", 1: b"from1"}] * 2


def test_rank_in_an_earlier_call_learns_the_number_of_its_peers(pair: Any) -> None:
    def behind() -> Any:
        with pytest.raises(PeerIsAheadError) as caught:
            pair[0].gather(b"too early", step(2, 0))
        assert caught.value.sequence == 9
        return pair[0].gather(b"from0", step(9, 0))

    assert both(behind, lambda: pair[1].gather(b"from1", step(9, 0))) == [{0: b"from0", 1: b"from1"}] * 2


def test_something_that_is_not_a_frame_ends_the_connection() -> None:
    with socket.create_server(("127.0.0.1", 0)) as listener:
        stranger = socket.create_connection(listener.getsockname())
        accepted, _ = listener.accept()
    transport = mesh.MeshTransport(0, {1: accepted}, timeout_s=HANG_S)
    stranger.sendall(b"GET / HTTP/1.1\r\nHost: example\r\n\r\n")
    assert transport.gather(b"x", step(0, 0)) == {0: b"x"}
    stranger.close()
    transport.close()


def test_connection_without_the_token_is_closed() -> None:
    token = secrets.token_bytes(16)
    with socket.create_server(("127.0.0.1", 0)) as listener:
        port = listener.getsockname()[1]
        deadline = time.monotonic() + HANG_S
        wrong = mesh._connect("127.0.0.1", port, bytes(16), 1, deadline)
        right = mesh._connect("127.0.0.1", port, token, 2, deadline)
        rank, accepted = mesh._accept(listener, token, deadline)
    assert rank == 2
    assert wrong.recv(1) == b""
    for connection in (wrong, right, accepted):
        connection.close()
