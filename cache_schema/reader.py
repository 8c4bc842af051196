"""Reading a store by clip key, from a folder or over a network; used by training and inspection.

Clips are taken from commit records alone, or from the index of them. What is read has the size and
the checksums that were committed, or `CorruptClip` is raised: nothing ever stands in for bytes that
are not there.
"""

from collections import OrderedDict
from collections.abc import Callable, Mapping, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any, NoReturn

import numpy as np

from cache_schema.clip_file import DamagedFile, read_clip, read_part
from cache_schema.clip_index import ClipIndex, ShardFacts, commit_path, load_index, record_head
from cache_schema.errors import (
    CacheError,
    ClipMissing,
    CorruptClip,
    SettingsMismatch,
    StoreNotFound,
)
from cache_schema.layout import STORE_FILE, group_name, retry_number
from cache_schema.manifest import (
    ClipEntry,
    SkippedClip,
    mend_hint,
    parse_commit,
    parse_manifest,
    read_record_file,
)
from cache_schema.packed_text import SortedText
from cache_schema.places import is_url, open_place
from cache_schema.sealed_json import JSON
from cache_schema.settings import StoreSettings
from cache_schema.zarr_group import chunk_path

_MAX_RECORDS = 16
"""Commit records kept, for those who ask for the attributes of clip after clip."""


class StoreReader:
    """One store, read lazily: its index when first needed, each clip when it is asked for.

    It sees the clips that were committed when it first looked. It can be pickled, and used in
    processes made by fork or spawn; a copy sees the same clips.
    """

    def __init__(self, path: Path | str, *, kind: str | None = None) -> None:
        """Open the store at `path`.

        Args:
            path: the store's folder or URL, as `find_store` returns it.
            kind: refuse a store of another kind with `SettingsMismatch`.

        Raises:
            StoreNotFound, UnknownSchemaVersion, CorruptRecord: from `store.json`.
            StoreUnreachable: a network place did not answer.
        """
        self.path: Path | str = path if is_url(path) else Path(path)
        self._place = open_place(self.path)
        file = f"{self.path}/{STORE_FILE}"
        try:
            data = read_record_file(self._place, STORE_FILE)
        except (FileNotFoundError, NotADirectoryError):
            raise StoreNotFound(
                f"{self.path} is not a feature store: it has no {STORE_FILE}; run "
                "sam2vx-pipeline extract-features to make one"
            ) from None
        manifest = parse_manifest(data, where=file, store=self.path)
        self.settings: StoreSettings = manifest.settings
        self.provenance: dict[str, JSON] = manifest.provenance
        if kind is not None and kind != self.settings.kind:
            raise SettingsMismatch(
                f"{self.path} is a store of kind {self.settings.kind!r}, not {kind!r}"
            )
        self._forget()

    @cached_property
    def _index(self) -> ClipIndex:
        return load_index(self._place, self.settings)

    def _forget(self) -> None:
        self._records: OrderedDict[str, tuple[ClipEntry, ...]] = OrderedDict()

    def __getstate__(self) -> dict[str, Any]:
        return {k: v for k, v in self.__dict__.items() if k != "_records"}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        self._forget()

    @property
    def name(self) -> str:
        """The name of the store's folder."""
        return str(self.path).rstrip("/").rsplit("/", 1)[-1]

    @property
    def keys(self) -> SortedText:
        """Keys of all clips, in ascending order of code points."""
        return self._index.keys

    @cached_property
    def skipped(self) -> tuple[SkippedClip, ...]:
        """The clips of the input that are not here, with reasons; as the newest retry found."""
        said = list(self._index.all_skipped())
        newest: dict[str, str] = {}
        for clip in sorted(said, key=lambda clip: retry_number(clip.shard)):
            newest[clip.key] = clip.shard
        return tuple(
            clip
            for clip in said
            if newest[clip.key] == clip.shard and self._holder(clip.key) in (None, clip.shard)
        )

    @property
    def fingerprints(self) -> np.ndarray:
        """What each clip was made from, in the order of `keys`: 32 ASCII digits, dtype S32."""
        return self._index.columns["clips.fingerprint"]

    @property
    def shards(self) -> Mapping[str, ShardFacts]:
        """The finished shards by name, sorted."""
        return self._index.shards

    @cached_property
    def num_bytes(self) -> int:
        """Bytes of all clips on disk, without metadata."""
        return sum(shard.num_bytes for shard in self.shards.values())

    def __contains__(self, key: object) -> bool:
        return key in self._index.keys

    def __len__(self) -> int:
        return len(self._index)

    def shard_of(self, key: str) -> str:
        """The shard that holds a clip; `ClipMissing` if it is not here."""
        return self._index.place_of(self._row(key))[0]

    def record(self, key: str) -> ClipEntry:
        """Where a clip lies and what is known of it, from its shard's commit record.

        Raises:
            ClipMissing: the key is not in the store.
            CorruptRecord: the record is damaged.
            CorruptClip: the store has changed since it was opened.
        """
        shard, _, position = self._index.place_of(self._row(key))
        return self.records(shard)[position]

    def records(self, shard: str) -> tuple[ClipEntry, ...]:
        """All clips of a finished shard, in its order; `KeyError` for another name."""
        if shard in self._records:
            self._records.move_to_end(shard)
            return self._records[shard]
        _ = self.shards[shard]
        path = commit_path(shard)
        try:
            data = read_record_file(self._place, path)
        except FileNotFoundError:
            self._changed(shard)
        where = f"{self.path}/{path}"
        record = parse_commit(data, self.settings, shard, where=where, store=self.path)
        if data[14:22] != b"%08x" % self._index.record_crc32c(shard):
            self._changed(shard)
        self._records[shard] = record.clips
        if len(self._records) > _MAX_RECORDS:
            self._records.popitem(last=False)
        return record.clips

    def read(self, key: str, arrays: Sequence[str] | None = None) -> dict[str, np.ndarray]:
        """Arrays of one clip, by name; all of them unless `arrays` names some.

        Each is a new array of the settings' type and shape.

        Raises:
            ClipMissing: the key is not in the store.
            CorruptClip: bytes are absent or differ from what was committed.
            StoreUnreachable: a network place did not answer.
            ValueError: `arrays` has a name that the store does not hold.
        """
        names = tuple(self.settings.arrays) if arrays is None else tuple(arrays)
        self._know(names)
        row = self._row(key)
        return {name: self._read_array(row, name) for name in names}

    def read_part(self, key: str, array: str, start: int, stop: int) -> np.ndarray:
        """Entries `start` to `stop` of the leading axis of one array of a clip.

        Only their bytes are read and checked, each inner chunk by itself: the clip's record binds
        the file's table of checksums, and so each of them, to the clip.

        Raises:
            As `read`, and `ValueError` for entries that the array does not have.
        """
        self._know((array,))
        spec = self.settings.arrays[array]
        if not 0 <= start < stop <= spec.shape[0]:
            raise ValueError(
                f"{array} of {self.path} has entries 0 to {spec.shape[0]}; {start} to {stop} are "
                "not a part of them"
            )
        row = self._row(key)
        facts = self._index.file_of(row, array)
        return self._read_file(
            row, array, lambda path: read_part(self._place, path, spec, facts, start, stop)
        )

    def _know(self, arrays: Sequence[str]) -> None:
        unknown = sorted(set(arrays) - set(self.settings.arrays))
        if unknown:
            raise ValueError(
                f"{self.path} holds no array {', '.join(unknown)}; it holds "
                f"{', '.join(self.settings.arrays)}"
            )

    def _row(self, key: str) -> int:
        row = self._index.keys.find(key)
        if row is None:
            raise ClipMissing(self._missing(key))
        return row

    def _missing(self, key: str) -> str:
        message = f"no {self.settings.kind} of clip {key!r} in {self.path}"
        for clip in self.skipped:
            if clip.key == key:
                return f"{message}: it was skipped as {clip.reason} ({clip.detail})"
        return f"{message}; run sam2vx-pipeline extract-features"

    def _holder(self, key: str) -> str | None:
        row = self._index.keys.find(key)
        return None if row is None else self._index.place_of(row)[0]

    def _read_array(self, row: int, name: str) -> np.ndarray:
        facts = self._index.file_of(row, name)

        def decode(path: str) -> np.ndarray:
            # One byte more than there should be, and never all of a file that is something else.
            with self._place.open(path, 0, facts.bytes + 1) as file:
                return read_clip(file, self.settings.arrays[name], facts)

        return self._read_file(row, name, decode)

    def _read_file(self, row: int, name: str, decode: Callable[[str], np.ndarray]) -> np.ndarray:
        try:
            return decode(self._path_of(row, name))
        except FileNotFoundError as error:
            self._corrupt(row, name, "it cannot be found", error)
        except OSError as error:
            self._corrupt(row, name, f"it cannot be read ({error.strerror})", error)
        except DamagedFile as error:
            self._corrupt(row, name, str(error), error)

    def _path_of(self, row: int, name: str) -> str:
        shard, generation, position = self._index.place_of(row)
        path = chunk_path(name, self.settings.arrays[name], position)
        return f"shards/{group_name(shard, generation)}/{path}"

    def _corrupt(
        self, row: int, name: str, what: str, error: BaseException | None = None
    ) -> NoReturn:
        shard, _, _ = self._index.place_of(row)
        if not self._is_as_opened(shard):
            self._changed(shard, error)
        raise CorruptClip(
            f"clip {self.keys[row]!r} in shard {shard!r} of {self.path} is damaged: "
            f"{self._path_of(row, name)}: {what}; {mend_hint(self.path)}"
        ) from error

    def _is_as_opened(self, shard: str) -> bool:
        try:
            return record_head(self._place, shard) == b"%08x" % self._index.record_crc32c(shard)
        except FileNotFoundError:
            return False
        except (OSError, CacheError):
            return True

    def _changed(self, shard: str, error: BaseException | None = None) -> NoReturn:
        raise CorruptClip(
            f"{self.path} has changed since it was opened: shard {shard!r} is another one now; "
            "open it again"
        ) from error
