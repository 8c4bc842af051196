"""Reading clips of a store by key, from a local folder or over a network.

Clips are located by commit records, or by the index of them. Everything read has the committed size
and checksums, or `CorruptClip` is raised; missing bytes are never filled in. If a shard is replaced
while the reader is open, its next generation is read.
"""

from bisect import bisect_left
from collections import OrderedDict, defaultdict
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any, NoReturn

import numpy as np

from cache_schema.attribute_table import ListedAttributes, listed_attributes
from cache_schema.checksummed_json import JSON, crc32c_digits
from cache_schema.errors import (
    CacheError,
    ClipChanged,
    ClipMissing,
    CorruptClip,
    CorruptRecord,
    SettingsMismatch,
    StoreNotFound,
)
from cache_schema.index import (
    ClipIndex,
    ShardFacts,
    commit_path,
    index_of_records,
    load_index,
)
from cache_schema.names import STORE_FILE, group_name, retry_number
from cache_schema.packed_strings import SortedText
from cache_schema.records import (
    ClipEntry,
    SkippedClip,
    parse_commit,
    parse_manifest,
    read_record_file,
)
from cache_schema.schema import StoreSettings
from cache_schema.storage import is_url, open_storage
from cache_schema.zarr_shard import DamagedFile, FileFacts, chunk_path, read_clip, read_part

_MAX_RECORDS = 16
"""Commit records to cache, for reading the attributes of many clips in turn."""

_MAX_REPLACEMENTS = 8
"""Number of times a shard may be replaced while one of its files is being opened."""


class StoreReader:
    """Lazy reader of one store: loads the index when first needed, and each clip when requested.

    It sees the clips that were committed when the index was loaded, with the values they had then.
    If a shard has been replaced since (`drop`, `repair`), its new commit record is read once, when
    the first file is not found in its old place, and its clips are read from the new group. A
    removed clip raises `ClipMissing`, a clip extracted again with other values `ClipChanged`; clips
    added to the store are not seen.

    It can be pickled with its index: a copy sees the same clips. Forked processes see the same
    clips if the index was loaded before the fork, for example by accessing `keys`.
    """

    def __init__(
        self, path: Path | str, *, kind: str | None = None, shards: Collection[str] | None = None
    ) -> None:
        """Open the store at `path`.

        Args:
            path: the store's folder or URL, as `find_store` returns it.
            kind: raise `SettingsMismatch` for a store of another kind.
            shards: read only these shards, from their commit records instead of the index; names of
                shards that are not committed are ignored.

        Raises:
            StoreNotFound, UnknownSchemaVersion, CorruptRecord: from `store.json`.
            StoreUnreachable: a network storage did not respond.
        """
        self.path: Path | str = path if is_url(path) else Path(path)
        self._storage = open_storage(self.path)
        file = f"{self.path}/{STORE_FILE}"
        try:
            data = read_record_file(self._storage, STORE_FILE)
        except (FileNotFoundError, NotADirectoryError):
            raise StoreNotFound(
                f"{self.path} is not a feature store: it has no {STORE_FILE}", remedy="make"
            ) from None
        manifest = parse_manifest(data, location=file, store=self.path)
        self.settings: StoreSettings = manifest.settings
        self.provenance: dict[str, JSON] = manifest.provenance
        if kind is not None and kind != self.settings.kind:
            raise SettingsMismatch(
                f"{self.path} is a store of kind {self.settings.kind!r}, not {kind!r}"
            )
        self._only = shards
        self._replaced: dict[str, ClipIndex] = {}
        self._clear_records()

    @cached_property
    def _index(self) -> ClipIndex:
        if self._only is not None:
            return index_of_records(self._storage, self.settings, self._only)
        return load_index(self._storage, self.settings)

    def _clear_records(self) -> None:
        self._records: OrderedDict[str, tuple[ClipEntry, ...]] = OrderedDict()

    def __getstate__(self) -> dict[str, Any]:
        _ = self._index  # a copy that loaded its own index could see other clips
        return {k: v for k, v in self.__dict__.items() if k != "_records"}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        self._clear_records()

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
        """The clips of the input that are not in the store, with the newest retry's reasons."""
        return tuple(self.iter_skipped())

    @cached_property
    def skipped_by_key(self) -> Mapping[str, Sequence[SkippedClip]]:
        """`skipped` by key; a shard may give several reasons for one key."""
        found: defaultdict[str, list[SkippedClip]] = defaultdict(list)
        for clip in self.skipped:
            found[clip.key].append(clip)
        return dict(found)

    def iter_skipped(self) -> Iterator[SkippedClip]:
        """Iterate over `skipped`, shard by shard, without holding all of it in memory."""
        ambiguous = self._index.ambiguous_skips()
        newest: dict[str, str] = {}
        if ambiguous:
            candidates = (clip for clip in self._index.all_skipped() if clip.key in ambiguous)
            for clip in sorted(candidates, key=lambda clip: retry_number(clip.shard)):
                newest[clip.key] = clip.shard
        for clip in self._index.all_skipped():
            if clip.key not in ambiguous or (
                newest[clip.key] == clip.shard and self._holder(clip.key) in (None, clip.shard)
            ):
                yield clip

    @property
    def fingerprints(self) -> np.ndarray:
        """Fingerprint of each clip, in the order of `keys`: 32 ASCII digits, dtype S32."""
        return self._index.columns["clips.fingerprint"]

    @property
    def shard_numbers(self) -> np.ndarray:
        """Index in `shards` of each clip's shard; unsigned, in the order of `keys`."""
        return self._index.columns["clips.shard"]

    def listed_attributes(self) -> ListedAttributes:
        """Attributes for lists of all clips, in the order of `keys`, without parsing records.

        What `attributes.npz` does not hold is in `records` of the shards in `missing`.

        Raises:
            StoreUnreachable: a network storage did not respond.
        """
        return listed_attributes(self._storage, self.settings, self._index)

    def rows_by_record(self) -> np.ndarray:
        """Rows in `keys` of all clips, shard by shard as in `shards`, in their records' order."""
        return self._index.rows_by_record()

    @property
    def shards(self) -> Mapping[str, ShardFacts]:
        """The committed shards by name, sorted."""
        return self._index.shards

    @cached_property
    def num_bytes(self) -> int:
        """Size of all clips on disk, without metadata."""
        return sum(shard.num_bytes for shard in self.shards.values())

    def __contains__(self, key: object) -> bool:
        return key in self._index.keys

    def __len__(self) -> int:
        return len(self._index)

    def shard_of(self, key: str) -> str:
        """The shard that holds a clip; `ClipMissing` if the key is not in the store."""
        return self._index.locate(self._row(key))[0]

    def record(self, key: str) -> ClipEntry:
        """A clip's entry in its shard's commit record.

        Raises:
            ClipMissing: the key is not in the store.
            CorruptRecord: the record is damaged.
            CorruptClip: the store has changed since it was opened.
        """
        shard, _, position = self._index.locate(self._row(key))
        clips = self.records(shard)
        return clips[bisect_left(clips, position, key=lambda clip: clip.index)]

    def records(self, shard: str) -> tuple[ClipEntry, ...]:
        """All clips of a committed shard, in its order; `KeyError` for another name."""
        if shard in self._records:
            self._records.move_to_end(shard)
            return self._records[shard]
        _ = self.shards[shard]
        path = commit_path(shard)
        try:
            data = read_record_file(self._storage, path)
        except FileNotFoundError:
            self._raise_changed(shard)
        location = f"{self.path}/{path}"
        record = parse_commit(data, self.settings, shard, location=location, store=self.path)
        if crc32c_digits(data) != b"%08x" % self._index.record_crc32c(shard):
            self._raise_changed(shard)
        self._records[shard] = record.clips
        if len(self._records) > _MAX_RECORDS:
            self._records.popitem(last=False)
        return record.clips

    def read(self, key: str, arrays: Sequence[str] | None = None) -> dict[str, np.ndarray]:
        """Read arrays of one clip, by name; all of them unless `arrays` is given.

        Each is a new array with the data type and shape of the settings.

        Raises:
            ClipMissing: the key is not in the store, or was removed since the store was opened.
            ClipChanged: the clip was extracted again with other values since the store was opened.
            CorruptClip: bytes are missing or differ from what was committed.
            StoreUnreachable: a network storage did not respond.
            ValueError: `arrays` contains a name that is not in the store.
        """
        names = tuple(self.settings.arrays) if arrays is None else tuple(arrays)
        self._check_arrays(names)
        row = self._row(key)
        return {name: self._read_array(row, name) for name in names}

    def read_part(self, key: str, array: str, start: int, stop: int) -> np.ndarray:
        """Read entries `start` to `stop` of the leading axis of one array of a clip.

        Only their bytes are read, and each inner chunk is verified separately: the clip's record
        contains the checksum of the file's table of chunks, and the table those of the chunks.

        Raises:
            As `read`, and `ValueError` for entries that the array does not have.
        """
        self._check_arrays((array,))
        spec = self.settings.arrays[array]
        if not 0 <= start < stop <= spec.shape[0]:
            raise ValueError(
                f"{array} of {self.path} has entries 0 to {spec.shape[0]}; {start} to {stop} are "
                "not a part of them"
            )
        return self._read_file(
            self._row(key),
            array,
            lambda path, facts: read_part(self._storage, path, spec, facts, start, stop),
        )

    def _check_arrays(self, arrays: Sequence[str]) -> None:
        unknown = sorted(set(arrays) - set(self.settings.arrays))
        if unknown:
            raise ValueError(
                f"{self.path} holds no array {', '.join(unknown)}; it holds "
                f"{', '.join(self.settings.arrays)}"
            )

    def _row(self, key: str) -> int:
        row = self._index.keys.find(key)
        if row is None:
            raise self._missing_error(key)
        return row

    def _missing_error(self, key: str) -> ClipMissing:
        message = f"no {self.settings.kind} of clip {key!r} in {self.path}"
        for clip in self.skipped:
            if clip.key == key:
                return ClipMissing(f"{message}: it was skipped as {clip.reason} ({clip.detail})")
        return ClipMissing(message, remedy="make")

    def _holder(self, key: str) -> str | None:
        row = self._index.keys.find(key)
        return None if row is None else self._index.locate(row)[0]

    def _read_array(self, row: int, name: str) -> np.ndarray:
        def decode(path: str, facts: FileFacts) -> np.ndarray:
            # One byte more than recorded reveals a longer file without reading all of it.
            with self._storage.open(path, 0, facts.bytes + 1) as file:
                return read_clip(file, self.settings.arrays[name], facts)

        return self._read_file(row, name, decode)

    def _read_file(
        self, row: int, name: str, decode: Callable[[str, FileFacts], np.ndarray]
    ) -> np.ndarray:
        for _ in range(_MAX_REPLACEMENTS):
            index, current_row = self._current(row)
            shard, group, position = index.locate(current_row)
            file = chunk_path(name, self.settings.arrays[name], position)
            path = f"shards/{group_name(shard, group)}/{file}"
            try:
                return decode(path, index.file_facts(current_row, name))
            except (OSError, DamagedFile) as error:
                if not self._reopen(shard, index):
                    raise CorruptClip(
                        f"clip {self.keys[row]!r} in shard {shard!r} of {self.path} is damaged: "
                        f"{path}: {_describe_error(error)}",
                        remedy="repair",
                        subject=self.path,
                    ) from error
        raise CorruptClip(
            f"clip {self.keys[row]!r} of {self.path} could not be read: its shard {shard!r} was "
            f"replaced {_MAX_REPLACEMENTS} times meanwhile; try again when nothing is changing it"
        )

    def _current(self, row: int) -> tuple[ClipIndex, int]:
        """The index that currently describes a clip, and the clip's row in it."""
        opened = self._index
        if not self._replaced:
            return opened, row
        shard, _, _ = opened.locate(row)
        index = self._replaced.get(shard)
        if index is None:
            return opened, row
        current_row = index.keys.find(self.keys[row])
        if current_row is None:
            raise ClipMissing(self._removed_message(row, shard, index))
        for array in self.settings.arrays:
            if index.file_facts(current_row, array).crc32c != opened.file_facts(row, array).crc32c:
                raise ClipChanged(
                    f"clip {self.keys[row]!r} in shard {shard!r} of {self.path} was made again "
                    f"since the store was opened, and its {array} has other values now; open the "
                    "store again to read it"
                )
        return index, current_row

    def _removed_message(self, row: int, shard: str, index: ClipIndex) -> str:
        key = self.keys[row]
        why = ""
        for clip in index.all_skipped():
            if clip.key == key:
                why = f": skipped as {clip.reason} ({clip.detail})"
        return (
            f"no {self.settings.kind} of clip {key!r} in {self.path} any more: it was removed from "
            f"shard {shard!r} since the store was opened{why}"
        )

    def _reopen(self, shard: str, index: ClipIndex) -> bool:
        """Read a shard's commit record again if it differs from the one `index` was built from.

        Raises `CorruptClip` if the new record is damaged or missing.
        """
        try:
            if index.has_record_of(self._storage, shard):
                return False
            newer = index_of_records(self._storage, self.settings, [shard])
            if shard not in newer.shards:
                raise FileNotFoundError
        except FileNotFoundError as error:
            raise CorruptClip(
                f"{self.path}/{commit_path(shard)} cannot be found, but existed when the store "
                f"was opened: it is lost, unless a repair removed shard {shard!r}",
                remedy="repair",
                subject=self.path,
            ) from error
        except CorruptRecord as error:
            raise CorruptClip(str(error), remedy=error.remedy, subject=error.subject) from error
        except (OSError, CacheError):  # the record's state is unknown
            return False
        self._replaced[shard] = newer
        return True

    def _raise_changed(self, shard: str, error: BaseException | None = None) -> NoReturn:
        raise CorruptClip(
            f"{self.path} has changed since it was opened: shard {shard!r} was replaced; "
            "open it again"
        ) from error


def _describe_error(error: OSError | DamagedFile) -> str:
    if isinstance(error, FileNotFoundError):
        return "it cannot be found"
    if isinstance(error, OSError):
        return f"it cannot be read ({error.strerror})"
    return str(error)
