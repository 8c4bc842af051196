"""Writing one shard: validates clips, stages them one by one, and commits them together."""

from collections.abc import Mapping
from types import TracebackType
from typing import Any, Self

import numpy as np

from cache_schema.checksummed_json import plain_mapping
from cache_schema.claim import ShardClaim
from cache_schema.commit import commit_group
from cache_schema.committed_shards import CommittedShards
from cache_schema.errors import AlreadyCommitted
from cache_schema.names import (
    StoreLayout,
    check_fingerprint,
    check_identifier,
    check_key,
    check_shard_name,
)
from cache_schema.records import CommitRecord
from cache_schema.schema import StoreSettings
from cache_schema.staging import IsCurrent, Staging


class ShardWriter:
    """Context manager for exclusive writing of one shard.

    Entering it takes the shard's lock and adopts the intact clips of a writer that was killed.
    Leaving it without `commit` keeps what is staged for a later writer.
    """

    def __init__(
        self,
        layout: StoreLayout,
        settings: StoreSettings,
        name: str,
        source: str,
        committed: CommittedShards,
        is_current: IsCurrent | None,
    ) -> None:
        """Touches no file before `__enter__`."""
        self._is_current = is_current
        self._layout = layout
        self._settings = settings
        self.name = check_shard_name(name)
        self._source = source
        self._committed = committed
        self._claim = ShardClaim(layout, name)
        self._staging: Staging | None = None

    def __enter__(self) -> Self:
        """Claim the shard; `ShardBusy` if it has a writer, `AlreadyCommitted` if committed."""
        self._claim.__enter__()
        try:
            if self._layout.commit(self.name).exists():
                self._claim.clear()
                raise AlreadyCommitted(
                    f"shard {self.name!r} of {self._layout.root} is already committed; check "
                    "is_committed before writing it"
                )
            self._committed.refresh(self.name)
            self._staging = Staging(self._claim, self._settings, self._source, self._is_current)
            self._clip_keys = {clip.key for clip in self._staging.clips}
            skipped = self._staging.skipped
            self._skips = {(clip.key, clip.reason, clip.detail) for clip in skipped}
            self._skipped_keys = {clip.key for clip in skipped}
        except BaseException:
            self._claim.__exit__(None, None, None)
            raise
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self._staging = None
        self._claim.__exit__(kind, error, traceback)

    def has(self, key: str) -> bool:
        """Whether the clip is already staged or skipped, by this writer or a killed one."""
        self._open_staging()
        return key in self._clip_keys or key in self._skipped_keys

    def shard_holding(self, key: str) -> str | None:
        """The other, committed shard that holds the clip, if `CommittedShards` knows one."""
        self._open_staging()
        return self._committed.shard_of(key)

    def add(
        self,
        key: str,
        arrays: Mapping[str, np.ndarray],
        attributes: Mapping[str, Any] | None = None,
        *,
        fingerprint: str,
    ) -> None:
        """Stage one clip; durable when this returns, visible to readers after `commit`.

        Args:
            key: the clip's name, unique in the store; see `CommittedShards`.
            arrays: every array of the settings, with exactly its data type and shape.
            attributes: JSON facts about this clip.
            fingerprint: identifies what the clip was made from; 32 lower-case hexadecimal digits.

        Raises:
            ValueError: invalid key, array, attribute or fingerprint, or a duplicate key; nothing is
                written.
            LockLost: another process took the shard over.
        """
        staging = self._open_staging()
        check_key(key)
        check_fingerprint(fingerprint)
        if self.has(key):
            raise ValueError(
                f"clip {key!r} is already in shard {self.name!r} of {self._layout.root}; keys must "
                "be unique; has() reports clips that an earlier run staged"
            )
        other_shard = self._committed.shard_of(key)
        if other_shard == self.name:
            self._claim.check()  # another process took the shard over and committed it
        if other_shard is not None:
            raise ValueError(
                f"clip {key!r} of shard {self.name!r} is already in shard "
                f"{other_shard!r} of {self._layout.root}; keys must be unique in a "
                "dataset, so rename one of the two clips"
            )
        subject = f"clip {key!r} for {self._layout.root}"
        plain = plain_mapping(attributes or {}, f"attributes of {subject}")
        staging.add(key, self._check_arrays(arrays, subject), plain, fingerprint)
        self._clip_keys.add(key)

    def skip(self, key: str, reason: str, detail: str, *, fingerprint: str) -> None:
        """Record that a clip is skipped, and why; repeating the same call has no effect.

        Args:
            key: the clip's name; it may also be in the store, if the skipped clip is a second one
                with that name.
            reason: a word for counting, such as `too_short`.
            detail: a sentence for users.
            fingerprint: fingerprint of what was available of the clip, as in `add`.
        """
        staging = self._open_staging()
        check_key(key)
        check_fingerprint(fingerprint)
        check_identifier(reason, f"reason for skipping clip {key!r}")
        detail = detail.encode("utf-8", "backslashreplace").decode("utf-8")
        if (key, reason, detail) not in self._skips:
            staging.skip(key, reason, detail, fingerprint)
            self._skips.add((key, reason, detail))
            self._skipped_keys.add(key)

    def commit(self) -> None:
        """Publish the shard: rename the group, then write the commit record.

        Then update the index, if it lacks many shards and no other process is doing so.

        Raises:
            LockLost: another writer took the shard over, with everything staged.
            CorruptRecord: the index cannot be written, since a record is damaged or two shards hold
                the same key. This shard is committed nevertheless.
        """
        staging = self._open_staging()
        group, files = staging.finish()
        record = CommitRecord(
            self.name, 0, 0, self._source, tuple(staging.clips), tuple(staging.skipped), files
        )
        commit_group(self._claim, self._settings, group, record, replaced=None)
        self._staging = None
        self._claim.clear()
        self._committed.add(record)
        self._committed.update_index()

    def _open_staging(self) -> Staging:
        if self._staging is None:
            raise ValueError(
                f"shard {self.name!r} of {self._layout.root} is not being written; use the writer "
                "inside its `with` block, and not after commit()"
            )
        return self._staging

    def _check_arrays(
        self, arrays: Mapping[str, np.ndarray], subject: str
    ) -> dict[str, np.ndarray]:
        if sorted(arrays) != sorted(self._settings.arrays):
            raise ValueError(
                f"{subject} has the arrays {sorted(arrays)}; the store holds "
                f"{sorted(self._settings.arrays)}"
            )
        for name, spec in self._settings.arrays.items():
            values = arrays[name]
            if not isinstance(values, np.ndarray):
                raise ValueError(
                    f"{name} of {subject} is a {type(values).__name__}, not an ndarray"
                )
            if values.dtype != spec.numpy_dtype or values.shape != spec.shape:
                raise ValueError(
                    f"{name} of {subject} is {values.dtype} {values.shape}; the store holds "
                    f"{spec.dtype} {spec.shape}"
                )
            if spec.numpy_dtype.kind == "f" and not np.isfinite(values).all():
                bad = int(values.size - np.isfinite(values).sum())
                raise ValueError(
                    f"{name} of {subject} has {bad} of {values.size} values that are NaN or "
                    "infinite"
                )
        return {name: arrays[name] for name in self._settings.arrays}
