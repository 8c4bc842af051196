"""Paths inside a store, limits, and validation of names and keys."""

import os
import re
from pathlib import Path

SCHEMA_VERSION = 4
"""Version of the format that README.md specifies; readers refuse every other."""

MAX_KEY_BYTES = 1024
"""Maximum length of a clip key, in bytes of UTF-8."""

MAX_RECORD_BYTES = 2**28
"""Maximum size of a record; a record of 100,000 clips takes about a quarter of it."""

MAX_INDEX_BYTES = 2**34
"""Maximum size of an index to read; an index of 100 million clips takes about half of it."""

MAX_GENERATION = 10**9 - 1
MAX_CLIP_INDEX = 2**31 - 1

STORE_FILE = "store.json"
INDEX_FILE = "index.npz"
ATTRIBUTES_FILE = "attributes.npz"
FINGERPRINT_DIGITS = 32
"""Length of every fingerprint, in hexadecimal digits."""

_CONTROL = re.compile(r"[\x00-\x1f\x7f-\x9f]")
"""Unicode's category Cc."""

_FINGERPRINT = re.compile(rf"[0-9a-f]{{{FINGERPRINT_DIGITS}}}", re.ASCII)
_IDENTIFIER = re.compile(r"[a-z][a-z0-9_]{0,63}", re.ASCII)
_RETRY = re.compile(r".+-retry([0-9]{1,9})", re.ASCII)
_GROUP = re.compile(r"([^~]+)(?:~([1-9][0-9]{0,8}))?", re.ASCII)
_SHARD_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,127}", re.ASCII)


def check_identifier(name: object, what: str) -> str:
    """Return `name` if it is a valid kind, array or dimension name, else raise `ValueError`."""
    if not isinstance(name, str) or not _IDENTIFIER.fullmatch(name):
        raise ValueError(
            f"{what} is {name!r}; it must be a lower-case letter, then at most 63 lower-case "
            "letters, digits and underscores, such as 'features'"
        )
    return name


def is_shard_name(name: object) -> bool:
    """Whether `name` can name a shard's files on disk without leaving the store."""
    return (
        isinstance(name, str)
        and _SHARD_NAME.fullmatch(name) is not None
        and not name.endswith(".lock")
    )


def check_shard_name(name: object) -> str:
    """Return `name` if it is a safe file name everywhere, else raise `ValueError`."""
    if not isinstance(name, str) or not is_shard_name(name):
        raise ValueError(
            f"unsafe shard name {name!r}; use at most 128 ASCII letters, digits, '.', '_' and '-', "
            "starting with a letter or a digit and not ending in '.lock', such as '00000'"
        )
    return name


def retry_number(shard: str) -> int:
    """Number of a retry shard, from its name `<shard>-retry<number>`; 0 for other shards."""
    retry = _RETRY.fullmatch(shard)
    return int(retry[1]) if retry else 0


def without_retry(shard: str) -> str:
    """The shard that a retry belongs to; other names are returned unchanged."""
    retry = _RETRY.fullmatch(shard)
    return shard[: shard.rindex("-retry")] if retry else shard


def check_key(key: object) -> str:
    """Return `key` if it is a valid clip key, else raise `ValueError`.

    A key is Unicode text without control characters. The store never uses keys as paths, but other
    tools may, so a key must neither start with '/' nor have '..' between slashes.
    """
    if not isinstance(key, str) or not key:
        raise ValueError(f"clip key is {key!r}; it must be non-empty text")
    try:
        size = len(key.encode("utf-8"))
    except UnicodeEncodeError:
        raise ValueError(f"clip key {key!r} is not valid Unicode text") from None
    if size > MAX_KEY_BYTES:
        raise ValueError(
            f"clip key {key[:40]!r}... has {size} bytes of UTF-8; the maximum is {MAX_KEY_BYTES}"
        )
    if _CONTROL.search(key):
        raise ValueError(f"clip key {key!r} contains a control character; rename the clip")
    if key.startswith("/") or ".." in key.split("/"):
        raise ValueError(
            f"clip key {key!r} leaves its folder; it must not start with '/' nor have '..' between "
            "slashes: rename the clip"
        )
    return key


def check_fingerprint(fingerprint: object) -> str:
    """Return `fingerprint` if it is 32 lower-case hexadecimal digits, or raise `ValueError`."""
    if not isinstance(fingerprint, str) or not _FINGERPRINT.fullmatch(fingerprint):
        raise ValueError(
            f"fingerprint is {fingerprint!r:.80}; it must be {FINGERPRINT_DIGITS} lower-case "
            "hexadecimal digits"
        )
    return fingerprint


def printable(name: str) -> str:
    """A file name from disk, with bytes that are not valid UTF-8 escaped."""
    return os.fsencode(name).decode("utf-8", "backslashreplace")


def group_name(shard: str, generation: int) -> str:
    """Folder name of a shard's group: the shard's name, and `~<generation>` unless that is 0."""
    return shard if generation == 0 else f"{shard}~{generation}"


def parse_group_name(name: str) -> tuple[str, int] | None:
    """Shard and generation from the name of a group's folder; None for any other name."""
    group = _GROUP.fullmatch(name)
    if group is None or not is_shard_name(group[1]):
        return None
    return group[1], int(group[2] or 0)


class StoreLayout:
    """The paths of one store. Accesses no file."""

    def __init__(self, root: Path) -> None:
        self.root = root
        self.store_file = root / STORE_FILE
        self.index = root / INDEX_FILE
        self.attributes = root / ATTRIBUTES_FILE
        self.shards = root / "shards"
        self.commits = root / "commits"
        self.quarantine = root / "quarantine"
        self.staging = root / ".staging"
        self.store_lock = self.staging / ".store.lock"

    def group(self, shard: str, generation: int) -> Path:
        """The published Zarr group of a shard; `generation` is `group` of its commit record."""
        return self.shards / group_name(shard, generation)

    def commit(self, name: str) -> Path:
        """The record that makes a shard visible to readers."""
        return self.commits / f"{name}.json"

    def lock(self, name: str) -> Path:
        """Lock file held by the shard's writer."""
        return self.staging / f"{name}.lock"

    def staged(self, name: str) -> Path:
        """Staging folder of a shard, with one subfolder per writer."""
        return self.staging / name
