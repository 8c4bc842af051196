"""Settings of the memory allocator, on machines with and without glibc."""

import ctypes
import platform
from typing import Any

import pytest

from stages.processes.allocator import return_freed_memory


def test_glibc_accepts_the_settings(monkeypatch: pytest.MonkeyPatch) -> None:
    if platform.libc_ver()[0] != "glibc":
        pytest.skip("not glibc")
    libc = ctypes.CDLL(None)
    results: list[int] = []

    class Recorded:
        def mallopt(self, parameter: int, value: int) -> None:
            results.append(libc.mallopt(parameter, value))

    monkeypatch.setattr(ctypes, "CDLL", lambda _: Recorded())
    return_freed_memory()
    assert results == [1, 1]


def test_other_libraries_are_left_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: Any) -> Any:
        raise AssertionError("no library may be loaded")

    monkeypatch.setattr(platform, "libc_ver", lambda: ("", ""))
    monkeypatch.setattr(ctypes, "CDLL", refuse)
    return_freed_memory()
