"""The writing thread: order, bounded, errors raised at once, nothing finished is thrown away."""

import threading
import time

import pytest

from stages.extract_features.execution.worker import BackgroundWriter


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

    with BackgroundWriter(lambda _: may_write.wait(60), waiting=2) as behind:
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
