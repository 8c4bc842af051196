"""Clip keys: validation, uniqueness and compact sets."""

import hashlib
import unicodedata
from array import array
from collections.abc import Collection, Container

import numpy as np

from stages.clips.records import BadRecord

VIDEO_SUFFIXES = (
    *("mp4", "mov", "m4v", "mkv", "webm", "avi", "mpg", "mpeg", "3gp", "asf", "wmv", "flv", "ogv"),
    *("ts", "mts", "m2ts", "m2v", "vob", "mxf", "dv", "y4m", "gif"),
)
"""File suffixes of supported videos, lower case."""

UNSUPPORTED_SUFFIXES = ("webp", "apng", "rm", "rmvb", "swf", "wtv", "r3d", "braw")
"""File suffixes of videos and animations that are not supported, lower case."""

MAX_KEY_BYTES = 1024
"""Longest key accepted by a store, in UTF-8."""


def has_video_suffix(name: str) -> bool:
    """Whether a file name ends in a dot and one of `VIDEO_SUFFIXES`, ignoring case."""
    _, dot, suffix = name.rpartition(".")
    return bool(dot) and suffix.lower() in VIDEO_SUFFIXES


def videos_among(suffixes: Collection[str]) -> list[str]:
    """The video suffixes among a clip's suffixes; a gif beside another video is its preview."""
    found = [suffix for suffix in VIDEO_SUFFIXES if suffix in suffixes]
    return [suffix for suffix in found if suffix != "gif"] or found


class KeyRegistry:
    """Ensures that keys are unique.

    Entries with a duplicate or invalid key are recorded as bad records under a substitute key.
    """

    def __init__(self, reserved: Container[str] = ()) -> None:
        """Reserve keys that no substitute may have; `claim` ignores them."""
        self._reserved = reserved
        self._taken: set[str] = set()
        self._next_number: dict[str, int] = {}

    def claim(self, key: str) -> str | None:
        """Register `key`; returns None, or the reason why it cannot be used."""
        if key in self._taken:
            return f"another entry has the same key {key!r}"
        if problem := key_problem(key):
            return problem
        self._taken.add(key)
        return None

    def reject(self, key: str, problem: str | None) -> BadRecord | None:
        """Register the key of an entry; a bad record if the key or the entry is unusable."""
        if reason := self.claim(key):
            return BadRecord(key=self.substitute(key), reason="bad_record", detail=reason)
        return BadRecord(key=key, reason="bad_record", detail=problem) if problem else None

    def substitute(self, key: str) -> str:
        """Register and return an unused valid key that resembles `key`."""
        readable = key if key_problem(key) is None else _printable(key)
        if _leaves_folder(readable):
            readable = readable.replace("/", "\\x2f")
        number = self._next_number.get(readable, 2)
        while self._is_taken(candidate := f"{readable} ({number})"):
            number += 1
        self._taken.add(candidate)
        self._next_number[readable] = number + 1
        return candidate

    def _is_taken(self, key: str) -> bool:
        return key in self._taken or key in self._reserved


class KeyHashes(Container[str]):
    """Set of the keys of numbered entries, as hashes: 8 bytes per key instead of about 120."""

    NO_KEY = -1
    """Marks an entry without a key; no string has this hash."""

    def __init__(self, hashes: array) -> None:
        """Takes the int64 `hash` of each entry's key."""
        self._hashes = np.frombuffer(hashes, np.int64)
        self._sorted = np.sort(self._hashes)

    def __contains__(self, key: object) -> bool:
        """Whether an entry has the key; at a million entries one in 10^13 is a false positive."""
        key_hash = hash(key)
        index = int(np.searchsorted(self._sorted, key_hash))
        return index < len(self._sorted) and int(self._sorted[index]) == key_hash

    def duplicate_candidates(self) -> np.ndarray:
        """Entries that share their hash with another, int64, ascending; other keys are unique."""
        repeated = self._sorted[1:][self._sorted[1:] == self._sorted[:-1]]
        repeated = repeated[repeated != self.NO_KEY]
        return np.flatnonzero(np.isin(self._hashes, repeated))


def key_problem(key: str) -> str | None:
    """Why `key` is invalid, or None."""
    if not key:
        return "the key is empty"
    try:
        size = len(key.encode("utf-8"))
    except UnicodeEncodeError:
        return f"the key {_printable(key)!r} is not UTF-8"
    if size > MAX_KEY_BYTES - 16:  # leaves room for the number of a substitute key
        return f"the key has {size} bytes; the limit is {MAX_KEY_BYTES - 16}"
    if not key.isprintable() and any(unicodedata.category(letter) == "Cc" for letter in key):
        return f"the key {_printable(key)!r} contains control characters"
    if _leaves_folder(key):
        return f"the key {key!r} starts with '/' or has '..' between slashes"
    return None


def _leaves_folder(key: str) -> bool:
    return key.startswith("/") or (".." in key and ".." in key.split("/"))


def _printable(key: str) -> str:
    escaped = "".join(
        letter if letter.isprintable() else f"\\x{ord(letter) & 0xFFFF:02x}" for letter in key
    )
    if len(escaped.encode("utf-8")) <= 200 and escaped:
        return escaped
    digest = hashlib.sha256(key.encode("utf-8", "surrogatepass")).hexdigest()[:12]
    return f"{escaped[:40]}…{digest}"
