"""The look-ahead thread: order, errors in place, bounded, stopped when it is no longer wanted."""

import threading
import time
from collections.abc import Iterator

import pytest

from stages.extract_features.prefetch import prefetch


def test_items_come_in_order() -> None:
    assert list(prefetch(range(100))) == list(range(100))
    assert list(prefetch([])) == []


def test_items_are_made_in_another_thread() -> None:
    def names() -> Iterator[str]:
        yield threading.current_thread().name

    assert list(prefetch(names())) == ["prefetch"]


def test_an_error_is_raised_at_its_place() -> None:
    def two_then_fail() -> Iterator[int]:
        yield 1
        yield 2
        raise OSError("disk")

    got = prefetch(two_then_fail())
    assert [next(got), next(got)] == [1, 2]
    with pytest.raises(OSError, match="disk"):
        next(got)


def test_no_more_than_asked_for_is_made_ahead() -> None:
    made: list[int] = []

    def counting() -> Iterator[int]:
        for number in range(100):
            made.append(number)
            yield number

    got = prefetch(counting(), ahead=2)
    assert next(got) == 0
    while len(made) < 4:  # taken, two waiting, one in the thread's hands
        time.sleep(0.01)
    time.sleep(0.1)
    assert len(made) == 4
    got.close()


def test_closing_stops_the_thread() -> None:
    def endless() -> Iterator[int]:
        while True:
            yield 0

    got = prefetch(endless())
    next(got)
    got.close()
    assert "prefetch" not in {thread.name for thread in threading.enumerate()}
