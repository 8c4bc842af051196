"""Errors of stores. Every message says what is wrong, where, and what to do next."""

from cache_schema.shown_text import without_credentials

# ruff: noqa: N818 (names describe the condition; all derive from `CacheError`)


class CacheError(Exception):
    """Base class of all store errors, except for wrong arguments (`ValueError`).

    Messages contain store URLs and are printed, saved and sent between processes, so credentials
    are removed.
    """

    def __init__(self, *args: object) -> None:
        super().__init__(*(without_credentials(a) if isinstance(a, str) else a for a in args))

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
