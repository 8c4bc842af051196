"""Where everything of a store lies, and which names are safe there; used by every other module."""

import os
import re
from pathlib import Path

SCHEMA_VERSION = 4
"""Version of everything README.md describes; a reader refuses every other."""

MAX_KEY_BYTES = 1024
"""Longest clip key, in bytes of UTF-8."""

MAX_RECORD_BYTES = 2**28
"""Largest record that is read or written; one of 100,000 clips has about a quarter of it."""

MAX_INDEX_BYTES = 2**34
"""Largest index that is read; one of 100 million clips has about half of it."""

MAX_GENERATION = 10**9 - 1
MAX_CLIP_INDEX = 2**31 - 1

STORE_FILE = "store.json"
INDEX_FILE = "index.npz"
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
    """`name` if it is a lower-case identifier, as kinds, arrays and dimensions are named."""
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
    """`name` if it is safe as a file name on every system, else `ValueError`."""
    if not isinstance(name, str) or not is_shard_name(name):
        raise ValueError(
            f"unsafe shard name {name!r}; use at most 128 ASCII letters, digits, '.', '_' and '-', "
            "starting with a letter or a digit and not ending in '.lock', such as '00000'"
        )
    return name


def retry_number(shard: str) -> int:
    """Which retry a shard is, by its name `<shard>-retry<number>`; 0 where it is none."""
    retry = _RETRY.fullmatch(shard)
    return int(retry[1]) if retry else 0


def without_retry(shard: str) -> str:
    """The shard that a retry is of; itself where it is none."""
    retry = _RETRY.fullmatch(shard)
    return shard[: shard.rindex("-retry")] if retry else shard


def check_key(key: object) -> str:
    """`key` if it can be a clip's key: Unicode text without control characters.

    The store never uses it as a path. Tools that name files by it may: so it neither starts with
    '/' nor has '..' between slashes.
    """
    if not isinstance(key, str) or not key:
        raise ValueError(f"clip key is {key!r}; it must be non-empty text")
    try:
        size = len(key.encode("utf-8"))
    except UnicodeEncodeError:
        raise ValueError(f"clip key {key!r} is not valid Unicode text") from None
    if size > MAX_KEY_BYTES:
        raise ValueError(
            f"clip key {key[:40]!r}... has {size} bytes of UTF-8; at most {MAX_KEY_BYTES} fit"
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
    """`fingerprint` if it is one: lower-case hexadecimal digits of the one length."""
    if not isinstance(fingerprint, str) or not _FINGERPRINT.fullmatch(fingerprint):
        raise ValueError(
            f"fingerprint is {fingerprint!r:.80}; it must be {FINGERPRINT_DIGITS} lower-case "
            "hexadecimal digits"
        )
    return fingerprint


def printable(name: str) -> str:
    """A name that lies on disk, with bytes that are no UTF-8 written as escapes."""
    return os.fsencode(name).decode("utf-8", "backslashreplace")


def group_name(shard: str, generation: int) -> str:
    """The folder of a shard's group; a shard that was replaced has its generation behind a '~'."""
    return shard if generation == 0 else f"{shard}~{generation}"


def parse_group_name(name: str) -> tuple[str, int] | None:
    """Shard and generation of a group's folder; None for any other name."""
    group = _GROUP.fullmatch(name)
    if group is None or not is_shard_name(group[1]):
        return None
    return group[1], int(group[2] or 0)


class StoreLayout:
    """The paths of one store; pure, touches no file."""

    def __init__(self, root: Path) -> None:
        self.root = root
        self.store_file = root / STORE_FILE
        self.index = root / INDEX_FILE
        self.shards = root / "shards"
        self.commits = root / "commits"
        self.quarantine = root / "quarantine"
        self.staging = root / ".staging"
        self.store_lock = self.staging / ".store.lock"

    def group(self, shard: str, generation: int) -> Path:
        """The published Zarr group of a shard; `group` of its record is the generation."""
        return self.shards / group_name(shard, generation)

    def commit(self, name: str) -> Path:
        """The record that makes a shard visible to readers."""
        return self.commits / f"{name}.json"

    def lock(self, name: str) -> Path:
        """The file whose lock the shard's writer holds."""
        return self.staging / f"{name}.lock"

    def staged(self, name: str) -> Path:
        """Everything of a shard that is not committed yet, in a folder of its writer."""
        return self.staging / name
