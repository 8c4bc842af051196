"""Errors of stores. Every message says what is wrong and where; `remedy` names what to do next."""

from pathlib import Path
from typing import Literal

from cache_schema.shown_text import without_credentials

# ruff: noqa: N818 (names describe the condition; all derive from `CacheError`)


Remedy = Literal[
    "repair",
    "extract",
    "copy",
    "by hand",
    "rewrite",
    "make",
    "make again",
    "choose",
    "choose or make",
    "prefix",
    "drop",
    "merge",
]
"""What to do about an error or a problem; the command line words it as commands and settings.

* `repair`: repair the store, then make the removed clips again.
* `extract`: nothing; readers ignore a leftover, and the next extraction finishes or removes it.
* `copy`: copy the store again from the one it was copied from.
* `by hand`: nothing here repairs it.
* `rewrite`: write `store.json` again, by opening the store with the settings it was made with.
* `make`: make the store, or the clip.
* `make again`: make the store again elsewhere, or in its place after removing it.
* `choose`: name the folder of the store to use; `choose or make`: that, or make it.
* `prefix`: merge with a prefix to the names of shards.
* `drop`: remove the clips from one of the stores.
* `merge`: merge the stores instead of copying.
"""


class _WithRemedy(Exception):
    """Messages contain store URLs and are printed, saved and sent between processes, so credentials
    are removed.
    """

    def __init__(
        self, *args: object, remedy: Remedy | None = None, subject: Path | str = ""
    ) -> None:
        super().__init__(*(without_credentials(a) if isinstance(a, str) else a for a in args))
        self.remedy = remedy
        """What to do next; None if the message says it, or nothing helps."""
        self.subject = without_credentials(str(subject))
        """What the remedy is applied to: a store, or the kind of one for `choose`."""


class Refused(_WithRemedy, ValueError):
    """A request that would lose or mix up clips; nothing was done."""


class CacheError(_WithRemedy):
    """Base class of all store errors, except for wrong arguments (`ValueError`)."""

    def __str__(self) -> str:
        # KeyError.__str__ would quote and escape the message.
        return Exception.__str__(self)


class StoreNotFound(CacheError):
    """No store was found, or more than one."""


class ClipMissing(CacheError, KeyError):
    """The store has no committed clip with this key."""


class ClipChanged(CacheError):
    """A clip was extracted again, with other values, since the store was opened."""


class CorruptClip(CacheError):
    """A committed clip's file is missing, has the wrong size, or fails a checksum."""


class CorruptRecord(CacheError):
    """`store.json` or a commit record is damaged or contradicts its store."""


class UnknownSchemaVersion(CacheError):
    """The store was written with another schema version."""


class SettingsMismatch(CacheError):
    """The store on disk has other settings than requested."""


class SymlinkInStore(CacheError):
    """A store to be changed contains a symbolic link among its own files."""


class StoreUnreachable(CacheError):
    """A network storage did not respond; the state of the store's data is unknown."""


class ShardBusy(CacheError):
    """Another process is writing this shard."""


class LockLost(CacheError):
    """Another process has taken over the shard being written; nothing committed was changed."""


class LockUnsupported(CacheError):
    """The file system does not support locks, so writing is refused."""


class AlreadyCommitted(CacheError):
    """The shard is committed; a committed shard is never written again."""
