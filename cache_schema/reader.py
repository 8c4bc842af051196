"""Reading a store by clip key; used by training and inspection.

Clips are taken from commit records alone. What is read has the size and the checksum its commit
record gives, or `CorruptClip` is raised: a reader never returns Zarr's fill values for bytes that
are not there.
"""

import os
from collections import OrderedDict
from collections.abc import Mapping, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any, NoReturn

import numpy as np

from cache_schema.errors import ClipMissing, CorruptClip, CorruptRecord, SettingsMismatch
from cache_schema.layout import StoreLayout, retry_number
from cache_schema.manifest import (
    ClipEntry,
    CommitRecord,
    SkippedClip,
    StoredArray,
    committed_shards,
    mend_hint,
    read_commit,
    read_manifest,
)
from cache_schema.sealed_json import JSON, crc32c_hex
from cache_schema.settings import StoreSettings
from cache_schema.zarr_group import ClipArray, content_crc32c, open_array

_MAX_OPEN_SHARDS = 256


class _Index:
    """The committed clips at one moment."""

    def __init__(self, records: list[CommitRecord], path: Path) -> None:
        self.records = {record.shard: record for record in records}
        self.clips: dict[str, ClipEntry] = {}
        for record in records:
            for clip in record.clips:
                other = self.clips.setdefault(clip.key, clip)
                if other is not clip:
                    raise CorruptRecord(
                        f"clip {clip.key!r} is in shards {other.shard!r} and {clip.shard!r} of "
                        f"{path}; keys must be unique, so rename one of the two in the dataset, "
                        "delete both shards' commit records and run sam2vx-pipeline "
                        "extract-features again"
                    )
        self.skipped = _still_left_out(records, self.clips)


def _still_left_out(
    records: Sequence[CommitRecord], clips: Mapping[str, ClipEntry]
) -> tuple[SkippedClip, ...]:
    """Without clips that another shard holds; of several shards' records, the newest retry's."""
    newest: dict[str, str] = {}
    for record in sorted(records, key=lambda record: retry_number(record.shard)):
        newest.update((skipped.key, record.shard) for skipped in record.skipped)
    return tuple(
        skipped
        for record in records
        for skipped in record.skipped
        if newest[skipped.key] == record.shard
        and (skipped.key not in clips or clips[skipped.key].shard == record.shard)
    )


class StoreReader:
    """One store, read lazily: commit records when first needed, arrays shard by shard.

    It sees the clips that were committed when it first looked. It can be pickled, and used in
    processes made by fork or spawn; a copy sees the same clips.
    """

    def __init__(self, path: Path, *, kind: str | None = None, check: bool = True) -> None:
        """Open the store in folder `path`.

        Args:
            path: the store's folder, as `find_store` returns it.
            kind: refuse a store of another kind with `SettingsMismatch`.
            check: compare a clip's decoded values with its checksum when it is first read, and
                again whenever its file changes. Sizes, and Zarr's own checksums, are always
                checked.

        Raises:
            StoreNotFound, UnknownSchemaVersion, CorruptRecord: from `store.json`.
        """
        self.path = Path(path)
        self._layout = StoreLayout(self.path)
        manifest = read_manifest(self._layout)
        self.settings: StoreSettings = manifest.settings
        self.provenance: dict[str, JSON] = manifest.provenance
        if kind is not None and kind != self.settings.kind:
            raise SettingsMismatch(
                f"{self.path} is a store of kind {self.settings.kind!r}, not {kind!r}"
            )
        self._check = check
        self._forget_files()

    @cached_property
    def _index(self) -> _Index:
        shards = committed_shards(self._layout)
        records = [read_commit(self._layout, self.settings, shard) for shard in shards]
        return _Index(records, self.path)

    def _forget_files(self) -> None:
        self._open: OrderedDict[str, dict[str, ClipArray]] = OrderedDict()
        self._checked: dict[tuple[str, int, str], tuple[int, int, int]] = {}

    def __getstate__(self) -> dict[str, Any]:
        return {k: v for k, v in self.__dict__.items() if k not in ("_open", "_checked")}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        self._forget_files()

    @cached_property
    def keys(self) -> tuple[str, ...]:
        """Keys of all clips, shard by shard in the order they were written."""
        return tuple(self._index.clips)

    @property
    def skipped(self) -> tuple[SkippedClip, ...]:
        """The clips of the input that are not here, with reasons; as the newest retry found."""
        return self._index.skipped

    @property
    def shards(self) -> tuple[str, ...]:
        """Names of the finished shards, sorted."""
        return tuple(self._index.records)

    def source_of(self, shard: str) -> str:
        """The input that a finished shard was made from; `KeyError` for another name."""
        return self._index.records[shard].source

    @property
    def num_bytes(self) -> int:
        """Bytes of all clips on disk, without metadata."""
        clips = self._index.clips.values()
        return sum(array.bytes for clip in clips for array in clip.arrays.values())

    def __contains__(self, key: object) -> bool:
        return key in self._index.clips

    def __len__(self) -> int:
        return len(self._index.clips)

    def record(self, key: str) -> ClipEntry:
        """Where a clip lies and what is known of it; `ClipMissing` if it is not here."""
        try:
            return self._index.clips[key]
        except KeyError:
            raise ClipMissing(self._missing(key)) from None

    def _missing(self, key: str) -> str:
        message = f"no {self.settings.kind} of clip {key!r} in {self.path}"
        for clip in self.skipped:
            if clip.key == key:
                return f"{message}: it was skipped as {clip.reason} ({clip.detail})"
        return f"{message}; run sam2vx-pipeline extract-features"

    def read(self, key: str, arrays: Sequence[str] | None = None) -> dict[str, np.ndarray]:
        """Arrays of one clip, by name; all of them unless `arrays` names some.

        Each is a new array of the settings' type and shape.

        Raises:
            ClipMissing: the key is not in the store.
            CorruptClip: bytes are absent or differ from what was committed.
            ValueError: `arrays` has a name that the store does not hold.
        """
        clip = self.record(key)
        names = tuple(self.settings.arrays) if arrays is None else tuple(arrays)
        unknown = sorted(set(names) - set(self.settings.arrays))
        if unknown:
            raise ValueError(
                f"{self.path} holds no array {', '.join(unknown)}; it holds "
                f"{', '.join(self.settings.arrays)}"
            )
        return {name: self._read_array(clip, name) for name in names}

    def _read_array(self, clip: ClipEntry, name: str) -> np.ndarray:
        stored = clip.arrays[name]
        file = self._folder(clip.shard) / stored.path
        try:
            status = file.stat()
        except OSError as error:
            self._corrupt(clip, f"file {stored.path} cannot be found", error)
        if status.st_size != stored.bytes:
            self._corrupt(
                clip, f"file {stored.path} has {status.st_size} bytes instead of {stored.bytes}"
            )
        array = self._arrays(clip)[name]
        try:
            values = array.read(clip.index)
        except Exception as error:  # whatever damaged bytes make the codecs raise
            self._corrupt(clip, f"file {stored.path} cannot be decoded: {error}", error)
        if self._check:
            self._check_content(clip, name, stored, values, status)
        return values

    def _folder(self, shard: str) -> Path:
        return self._layout.group(shard, self._index.records[shard].generation)

    def _check_content(
        self,
        clip: ClipEntry,
        name: str,
        stored: StoredArray,
        values: np.ndarray,
        status: os.stat_result,
    ) -> None:
        place = (clip.shard, clip.index, name)
        version = (status.st_ino, status.st_mtime_ns, status.st_size)
        if self._checked.get(place) == version:
            return
        if content_crc32c(values) != stored.crc32c:
            self._corrupt(clip, f"the values in {stored.path} fail their checksum")
        self._checked[place] = version

    def _arrays(self, clip: ClipEntry) -> dict[str, ClipArray]:
        """The open arrays of a clip's shard, whose metadata is as committed."""
        if clip.shard in self._open:
            self._open.move_to_end(clip.shard)
            return self._open[clip.shard]
        folder = self._folder(clip.shard)
        record = self._index.records[clip.shard]
        for path, file in record.files.items():
            try:
                data = (folder / path).read_bytes()
            except OSError as error:
                self._corrupt(clip, f"file {path} cannot be read", error)
            if len(data) != file.bytes or crc32c_hex(data) != file.crc32c:
                self._corrupt(clip, f"file {path} is not the one that was committed")
        opened = {}
        for name, spec in self.settings.arrays.items():
            try:
                array = open_array(folder, name)
            except Exception as error:  # whatever odd metadata makes zarr raise
                self._corrupt(clip, f"array {name} cannot be opened: {error}", error)
            if array.shape != (len(record.clips), *spec.shape) or array.dtype != spec.numpy_dtype:
                self._corrupt(clip, f"array {name} is {array.dtype} {array.shape}")
            opened[name] = array
        self._open[clip.shard] = opened
        if len(self._open) > _MAX_OPEN_SHARDS:
            self._open.popitem(last=False)
        return opened

    def _corrupt(self, clip: ClipEntry, what: str, error: BaseException | None = None) -> NoReturn:
        raise CorruptClip(
            f"clip {clip.key!r} in shard {clip.shard!r} of {self.path} is damaged: {what}; "
            f"{mend_hint(self.path)}"
        ) from error
