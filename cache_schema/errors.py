"""What can be wrong with a store; every message says what, where and what to do next.

Raised throughout `cache_schema`, caught by the commands of the pipeline.
"""

from cache_schema.shown_text import without_credentials

# ruff: noqa: N818 (the names say what was found; `CacheError` is what they all are)


class CacheError(Exception):
    """Base of everything a store can complain about, apart from wrong arguments (`ValueError`).

    Messages name stores by their URLs, and are printed, kept and sent between processes: they hold
    no credentials.
    """

    def __init__(self, *args: object) -> None:
        super().__init__(*(without_credentials(a) if isinstance(a, str) else a for a in args))

    def __str__(self) -> str:
        # KeyError would print the message quoted and escaped.
        return Exception.__str__(self)


class StoreNotFound(CacheError):
    """There is no store, or not exactly one, where one was expected."""


class ClipMissing(CacheError, KeyError):
    """The store has no committed clip of that key."""


class ClipChanged(CacheError):
    """A clip was made again, with other values, since the store was opened."""


class CorruptClip(CacheError):
    """A committed clip's bytes are absent, of the wrong size, or fail a checksum."""


class CorruptRecord(CacheError):
    """`store.json` or a commit record is damaged or contradicts the store it lies in."""


class UnknownSchemaVersion(CacheError):
    """The store was written by a version of this package that lays it out differently."""


class SettingsMismatch(CacheError):
    """The store on disk was made with other settings than the ones asked for."""


class SymlinkInStore(CacheError):
    """A store that is to be changed has a symbolic link where only its own files may be."""


class StoreUnreachable(CacheError):
    """A place behind a network did not answer; nothing is known about the store's bytes."""


class ShardBusy(CacheError):
    """Another process is writing this shard at the moment."""


class LockLost(CacheError):
    """Another process has taken over what this one was writing; nothing committed was changed."""


class LockUnsupported(CacheError):
    """The file system does not keep locks, so that nothing may be written there."""


class AlreadyCommitted(CacheError):
    """The shard is finished; it is never written twice."""
