"""What becomes of split operations: completed, dropped, or failed in between."""

from __future__ import annotations

import gc

import pytest

from deep_ep import BufferStateError
from deep_ep.outstanding import MAX_OUTSTANDING, Outstanding


def is_full(operations: Outstanding) -> bool:
    try:
        operations.check_room("dispatch")
    except BufferStateError:
        return True
    return False


def test_room_comes_back_when_an_operation_is_completed_once() -> None:
    operations, done = Outstanding(), []
    first, second = (operations.begin(lambda number=number: done.append(number)) for number in range(MAX_OUTSTANDING))
    assert is_full(operations)
    second()
    second()
    assert done == [1] and not is_full(operations)
    first()
    assert done == [1, 0]


def test_dropped_operation_ends_at_once_if_nothing_is_left_to_do() -> None:
    operations = Outstanding()
    for _ in range(10):
        operations.begin(lambda: None)
        gc.collect()
    assert not is_full(operations)


def test_dropped_operation_is_discarded_by_the_next_call_and_not_by_garbage_collection() -> None:
    operations, discarded = Outstanding(), []

    def discard() -> bool:
        discarded.append(1)
        return True

    for _ in range(MAX_OUTSTANDING):
        operations.begin(lambda: None, discard)
    gc.collect()
    assert discarded == []
    assert not is_full(operations)
    assert discarded == [1] * MAX_OUTSTANDING


def test_discarding_is_tried_again_until_it_succeeds() -> None:
    operations, answers = Outstanding(), [False, False, True]
    operations.begin(lambda: None, lambda: answers.pop(0))
    gc.collect()
    for left in (2, 1, 0, 0):
        operations.finish_dropped()
        assert len(answers) == left


def test_completed_operation_is_not_discarded() -> None:
    operations, discarded = Outstanding(), []
    receive = operations.begin(lambda: None, lambda: bool(discarded.append(1)) or True)
    receive()
    del receive
    gc.collect()
    operations.finish_dropped()
    assert discarded == []


def test_operation_whose_receive_failed_is_outstanding_still() -> None:
    operations, failures = Outstanding(), [RuntimeError("too early")]

    def complete() -> None:
        if failures:
            raise failures.pop()

    receive, other = operations.begin(complete), operations.begin(lambda: None)
    with pytest.raises(RuntimeError, match="too early"):
        receive()
    assert is_full(operations)
    receive()
    assert not is_full(operations)
    other()
