"""Reading a store by clip key, from a folder or over a network; used by training and inspection.

Clips are taken from commit records alone, or from the index of them. What is read has the size and
the checksums that were committed, or `CorruptClip` is raised: nothing ever stands in for bytes that
are not there. A shard that is replaced while the reader is open is followed to its next generation.
"""

from bisect import bisect_left
from collections import OrderedDict, defaultdict
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any, NoReturn

import numpy as np

from cache_schema.checksummed_json import JSON
from cache_schema.clip_index import (
    ClipIndex,
    ShardFacts,
    commit_path,
    index_of_records,
    load_index,
    record_head,
)
from cache_schema.errors import (
    CacheError,
    ClipChanged,
    ClipMissing,
    CorruptClip,
    CorruptRecord,
    SettingsMismatch,
    StoreNotFound,
)
from cache_schema.names import STORE_FILE, group_name, retry_number
from cache_schema.packed_strings import SortedText
from cache_schema.records import (
    ClipEntry,
    SkippedClip,
    mend_hint,
    parse_commit,
    parse_manifest,
    read_record_file,
)
from cache_schema.schema import StoreSettings
from cache_schema.storage import is_url, open_place
from cache_schema.zarr_shard import DamagedFile, FileFacts, chunk_path, read_clip, read_part

_MAX_RECORDS = 16
"""Commit records kept, for those who ask for the attributes of clip after clip."""

_MAX_REPLACEMENTS = 8
"""How often a shard may be replaced while one file of it is being opened."""


class StoreReader:
    """One store, read lazily: its index when first needed, each clip when it is asked for.

    It sees the clips that were committed when it first looked, with the values that they had then.
    Where a shard has been replaced since (`drop`, `repair`), its new commit record is read once,
    when the first file is not where it was, and its clips are read from their new place. A clip
    that was taken out raises `ClipMissing`, one that was made again with other values
    `ClipChanged`; what the store has gained is not seen.

    It can be pickled, with its index: a copy sees the same clips. Forked processes see the same if
    this one has looked before, which asking for `keys` does.
    """

    def __init__(
        self, path: Path | str, *, kind: str | None = None, shards: Collection[str] | None = None
    ) -> None:
        """Open the store at `path`.

        Args:
            path: the store's folder or URL, as `find_store` returns it.
            kind: refuse a store of another kind with `SettingsMismatch`.
            shards: know these alone, as their commit records give them, and not the index; names
                of shards that are not finished are left out.

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
        self._only = shards
        self._replaced: dict[str, ClipIndex] = {}
        self._forget()

    @cached_property
    def _index(self) -> ClipIndex:
        if self._only is not None:
            return index_of_records(self._place, self.settings, self._only)
        return load_index(self._place, self.settings)

    def _forget(self) -> None:
        self._records: OrderedDict[str, tuple[ClipEntry, ...]] = OrderedDict()

    def __getstate__(self) -> dict[str, Any]:
        _ = self._index  # a copy that read its own could find other clips
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
        return tuple(self.iter_skipped())

    @cached_property
    def skipped_by_key(self) -> Mapping[str, Sequence[SkippedClip]]:
        """`skipped`, by key; a shard may give several reasons for one."""
        found: defaultdict[str, list[SkippedClip]] = defaultdict(list)
        for clip in self.skipped:
            found[clip.key].append(clip)
        return dict(found)

    def iter_skipped(self) -> Iterator[SkippedClip]:
        """`skipped`, one after the other, shard by shard; they are not held together."""
        unclear = self._index.skipped_elsewhere()
        newest: dict[str, str] = {}
        if unclear:
            said = (clip for clip in self._index.all_skipped() if clip.key in unclear)
            for clip in sorted(said, key=lambda clip: retry_number(clip.shard)):
                newest[clip.key] = clip.shard
        for clip in self._index.all_skipped():
            if clip.key not in unclear or (
                newest[clip.key] == clip.shard and self._holder(clip.key) in (None, clip.shard)
            ):
                yield clip

    @property
    def fingerprints(self) -> np.ndarray:
        """What each clip was made from, in the order of `keys`: 32 ASCII digits, dtype S32."""
        return self._index.columns["clips.fingerprint"]

    @property
    def shard_numbers(self) -> np.ndarray:
        """The shard of each clip, by its place in `shards`; unsigned, in the order of `keys`."""
        return self._index.columns["clips.shard"]

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
        clips = self.records(shard)
        return clips[bisect_left(clips, position, key=lambda clip: clip.index)]

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
            ClipMissing: the key is not in the store, or was taken out since it was opened.
            ClipChanged: the clip was made again with other values since the store was opened.
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
        return self._read_file(
            self._row(key),
            array,
            lambda path, facts: read_part(self._place, path, spec, facts, start, stop),
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
        def decode(path: str, facts: FileFacts) -> np.ndarray:
            # One byte more than there should be, and never all of a file that is something else.
            with self._place.open(path, 0, facts.bytes + 1) as file:
                return read_clip(file, self.settings.arrays[name], facts)

        return self._read_file(row, name, decode)

    def _read_file(
        self, row: int, name: str, decode: Callable[[str, FileFacts], np.ndarray]
    ) -> np.ndarray:
        for _ in range(_MAX_REPLACEMENTS):
            index, now = self._current(row)
            shard, group, position = index.place_of(now)
            file = chunk_path(name, self.settings.arrays[name], position)
            path = f"shards/{group_name(shard, group)}/{file}"
            try:
                return decode(path, index.file_of(now, name))
            except (OSError, DamagedFile) as error:
                if not self._reopen(shard, index):
                    raise CorruptClip(
                        f"clip {self.keys[row]!r} in shard {shard!r} of {self.path} is damaged: "
                        f"{path}: {_what_is_wrong(error)}; {mend_hint(self.path)}"
                    ) from error
        raise CorruptClip(
            f"clip {self.keys[row]!r} of {self.path} could not be read: its shard {shard!r} was "
            f"replaced {_MAX_REPLACEMENTS} times meanwhile; try again when nothing changes it"
        )

    def _current(self, row: int) -> tuple[ClipIndex, int]:
        """Where a clip is known to lie now: the index that says so, and the clip's row in it."""
        opened = self._index
        if not self._replaced:
            return opened, row
        shard, _, _ = opened.place_of(row)
        index = self._replaced.get(shard)
        if index is None:
            return opened, row
        now = index.keys.find(self.keys[row])
        if now is None:
            raise ClipMissing(self._taken_out(row, shard, index))
        for array in self.settings.arrays:
            if index.file_of(now, array).crc32c != opened.file_of(row, array).crc32c:
                raise ClipChanged(
                    f"clip {self.keys[row]!r} in shard {shard!r} of {self.path} was made again "
                    f"since the store was opened, and its {array} has other values now; open the "
                    "store again to read it"
                )
        return index, now

    def _taken_out(self, row: int, shard: str, index: ClipIndex) -> str:
        key = self.keys[row]
        why = ""
        for clip in index.all_skipped():
            if clip.key == key:
                why = f": skipped as {clip.reason} ({clip.detail})"
        return (
            f"no {self.settings.kind} of clip {key!r} in {self.path} any more: it was taken out of "
            f"shard {shard!r} since the store was opened{why}"
        )

    def _reopen(self, shard: str, index: ClipIndex) -> bool:
        """Read a shard's commit record again, if it is not the one that `index` is of.

        Raises `CorruptClip` if there is another one that cannot be trusted, or none.
        """
        try:
            if record_head(self._place, shard) == b"%08x" % index.record_crc32c(shard):
                return False
            newer = index_of_records(self._place, self.settings, [shard])
            if shard not in newer.shards:
                raise FileNotFoundError
        except FileNotFoundError as error:
            raise CorruptClip(
                f"{self.path}/{commit_path(shard)} cannot be found: it was there when the store "
                f"was opened; if no repair took shard {shard!r} out, {mend_hint(self.path)}"
            ) from error
        except CorruptRecord as error:
            raise CorruptClip(str(error)) from error
        except (OSError, CacheError):  # nothing is known of it
            return False
        self._replaced[shard] = newer
        return True

    def _changed(self, shard: str, error: BaseException | None = None) -> NoReturn:
        raise CorruptClip(
            f"{self.path} has changed since it was opened: shard {shard!r} is another one now; "
            "open it again"
        ) from error


def _what_is_wrong(error: OSError | DamagedFile) -> str:
    if isinstance(error, FileNotFoundError):
        return "it cannot be found"
    if isinstance(error, OSError):
        return f"it cannot be read ({error.strerror})"
    return str(error)
