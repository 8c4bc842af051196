"""Clip keys: the names that join a clip's entries across stores; used by both dataset forms."""

import hashlib
import unicodedata
from array import array
from collections.abc import Collection, Container

import numpy as np

VIDEO_SUFFIXES = (
    *("mp4", "mov", "m4v", "mkv", "webm", "avi", "mpg", "mpeg", "3gp", "asf", "wmv", "flv", "ogv"),
    *("ts", "mts", "m2ts", "m2v", "vob", "mxf", "dv", "y4m", "gif"),
)
"""File suffixes taken for videos, lower case."""

UNREAD_SUFFIXES = ("webp", "apng", "rm", "rmvb", "swf", "wtv", "r3d", "braw")
"""Suffixes of videos and animations that are not decoded."""

MAX_KEY_BYTES = 1024
"""Longest key a store accepts, in UTF-8."""


def has_video_suffix(name: str) -> bool:
    """Whether a file's name ends in a dot and one of `VIDEO_SUFFIXES`, in any case."""
    _, dot, suffix = name.rpartition(".")
    return bool(dot) and suffix.lower() in VIDEO_SUFFIXES


def videos_among(suffixes: Collection[str]) -> list[str]:
    """Those of one clip's suffixes that are videos'; a gif beside another is its preview."""
    found = [suffix for suffix in VIDEO_SUFFIXES if suffix in suffixes]
    return [suffix for suffix in found if suffix != "gif"] or found


class KeyBook:
    """Hands out every key once.

    A taken or unusable key must still be recorded as a bad record, under a key of its own.
    """

    def __init__(self, taken: Container[str] = ()) -> None:
        """Begin with keys that no stand-in may have; `claim` does not look at them."""
        self._taken_before = taken
        self._taken: set[str] = set()
        self._next_number: dict[str, int] = {}

    def claim(self, key: str) -> str | None:
        """Why `key` cannot be used, or None after taking it."""
        if key in self._taken:
            return f"a second entry has the key {key!r}"
        if problem := key_problem(key):
            return problem
        self._taken.add(key)
        return None

    def stand_in(self, key: str) -> str:
        """A usable free key that resembles `key`, taken at once."""
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
        return key in self._taken or key in self._taken_before


class KeyHashes(Container[str]):
    """Keys of numbered entries as hashes: 8 bytes each, where a set of them takes some 120."""

    NO_KEY = -1
    """Stands for an entry without a key; no text has this hash."""

    def __init__(self, hashes: array) -> None:
        """Take what `hash` gives for the key of each entry; int64."""
        self._hashes = np.frombuffer(hashes, np.int64)
        self._sorted = np.sort(self._hashes)

    def __contains__(self, key: object) -> bool:
        """Whether an entry has the key; at a million entries wrongly yes once in 10^13 keys."""
        wanted = hash(key)
        place = int(np.searchsorted(self._sorted, wanted))
        return place < len(self._sorted) and int(self._sorted[place]) == wanted

    def maybe_equal(self) -> np.ndarray:
        """Entries of whose hash there are several, ascending; int64. All others' keys differ."""
        several = self._sorted[1:][self._sorted[1:] == self._sorted[:-1]]
        several = several[several != self.NO_KEY]
        return np.flatnonzero(np.isin(self._hashes, several))


def key_problem(key: str) -> str | None:
    """Why no store would take `key`, or None."""
    if not key:
        return "the key is empty"
    try:
        size = len(key.encode("utf-8"))
    except UnicodeEncodeError:
        return f"the key {_printable(key)!r} is not UTF-8"
    if size > MAX_KEY_BYTES - 16:  # leaves room for a stand-in's number
        return f"the key has {size} bytes, at most {MAX_KEY_BYTES - 16} fit"
    if not key.isprintable() and any(unicodedata.category(letter) == "Cc" for letter in key):
        return f"the key {_printable(key)!r} holds control characters"
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
