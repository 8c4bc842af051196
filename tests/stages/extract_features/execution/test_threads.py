"""Prefetching and background writing: order, errors, bounds, early stop."""

import threading
import time
from collections.abc import Iterator

import pytest

from stages.extract_features.execution.threads import BackgroundWriter, prefetch, prefetch_map


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


def test_what_threads_make_comes_in_the_order_of_the_items() -> None:
    later_is_done = threading.Event()

    def first_waits_for_second(number: int) -> int:
        if number == 0:
            assert later_is_done.wait(60)
        if number == 1:
            later_is_done.set()
        return -number

    got = prefetch_map(first_waits_for_second, range(50), ahead=3, threads=2, describe=str)
    assert list(got) == [-number for number in range(50)]
    assert list(prefetch_map(first_waits_for_second, [], ahead=3, threads=2, describe=str)) == []


def failing_at(place: int) -> Iterator[int]:
    yield from range(place)
    raise OSError("disk")


def test_an_error_of_the_items_or_of_the_function_is_raised_at_its_place() -> None:
    got = prefetch_map(lambda number: number, failing_at(2), ahead=4, threads=2, describe=str)
    assert [next(got), next(got)] == [0, 1]
    with pytest.raises(OSError, match="disk"):
        next(got)
    got = prefetch_map(lambda number: 1 // (2 - number), range(9), ahead=4, threads=2, describe=str)
    assert [next(got), next(got)] == [0, 1]
    with pytest.raises(ZeroDivisionError):
        next(got)


def test_no_more_is_under_way_than_asked_for() -> None:
    made: list[int] = []
    got = prefetch_map(made.append, range(100), ahead=3, threads=2, describe=str)
    next(got)
    while len(made) < 4:  # taken, and three ahead
        time.sleep(0.01)
    time.sleep(0.1)
    assert len(made) == 4
    got.close()
    assert not [t for t in threading.enumerate() if t.name.startswith(("prefetch", "prepare"))]


def test_items_are_written_in_order_in_another_thread() -> None:
    written: list[tuple[int, str]] = []

    def write(item: int) -> None:
        written.append((item, threading.current_thread().name))

    with BackgroundWriter(write) as behind:
        for number in range(20):
            behind.put(number)
        behind.drain()
        assert written == [(number, "write-behind") for number in range(20)]
    assert "write-behind" not in {thread.name for thread in threading.enumerate()}


def test_putting_waits_when_too_much_is_waiting() -> None:
    may_write, put = threading.Event(), []

    def produce(behind: BackgroundWriter[int]) -> None:
        for number in range(5):
            behind.put(number)
            put.append(number)

    def write(_: int) -> None:
        may_write.wait(60)

    with BackgroundWriter(write, waiting=2) as behind:
        producer = threading.Thread(target=produce, args=(behind,))
        producer.start()
        while len(put) < 3:  # one being written, two waiting
            time.sleep(0.01)
        time.sleep(0.1)
        assert len(put) == 3
        may_write.set()
        producer.join()


def test_after_an_error_nothing_more_is_written_and_it_is_raised() -> None:
    tried: list[int] = []

    def write(item: int) -> None:
        tried.append(item)
        raise OSError("disk full")

    with pytest.raises(OSError, match="disk full"), BackgroundWriter(write) as behind:
        behind.put(0)
        with pytest.raises(OSError, match="disk full"):
            behind.drain()
        with pytest.raises(OSError, match="disk full"):
            behind.put(1)
    assert tried == [0]


def test_what_was_put_in_before_another_error_is_still_written() -> None:
    written: list[int] = []
    with (
        pytest.raises(RuntimeError, match="out of memory"),
        BackgroundWriter(written.append) as behind,
    ):
        behind.put(7)
        raise RuntimeError("out of memory")
    assert written == [7]


def test_of_two_errors_the_second_becomes_a_note() -> None:
    def write(item: int) -> None:
        raise OSError("disk full")

    with (
        pytest.raises(RuntimeError, match="out of memory") as caught,
        BackgroundWriter(write) as behind,
    ):
        behind.put(7)
        raise RuntimeError("out of memory")
    assert caught.value.__notes__ == ["writing what was computed before failed too: disk full"]
