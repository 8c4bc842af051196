"""A shard's files, read only if they are what its commit record says; used to merge and to copy."""

from dataclasses import dataclass

from cache_schema.clip_file import DamagedFile, decode_clip
from cache_schema.errors import CorruptClip
from cache_schema.layout import group_name
from cache_schema.manifest import CommitRecord, StoredArray, StoredFile, mend_hint
from cache_schema.places import Place
from cache_schema.sealed_json import crc32c_hex
from cache_schema.settings import ArraySpec, StoreSettings


@dataclass(frozen=True, slots=True)
class GroupFile:
    """One file of a shard's group and what is recorded of it."""

    path: str
    """Relative to the group's folder."""
    recorded: StoredFile | StoredArray
    spec: ArraySpec | None
    """Of the array, where it is a clip's file."""
    key: str | None

    def is_intact(self, data: bytes) -> bool:
        """Whether these bytes are the ones that were committed."""
        if len(data) != self.recorded.bytes:
            return False
        if self.spec is None or isinstance(self.recorded, StoredFile):
            return crc32c_hex(data) == self.recorded.crc32c
        try:
            decode_clip(data, self.spec, self.recorded.facts)
        except DamagedFile:
            return False
        return True


def group_files(record: CommitRecord, settings: StoreSettings) -> list[GroupFile]:
    """All files of a shard's group: Zarr's metadata, then clip by clip."""
    metadata = [GroupFile(path, file, None, None) for path, file in record.files.items()]
    return metadata + [
        GroupFile(stored.path, stored, settings.arrays[name], clip.key)
        for clip in record.clips
        for name, stored in clip.arrays.items()
    ]


def num_bytes(record: CommitRecord) -> int:
    """Bytes of a shard's files, metadata included."""
    clips = sum(stored.bytes for clip in record.clips for stored in clip.arrays.values())
    return clips + sum(file.bytes for file in record.files.values())


def read_intact(place: Place, record: CommitRecord, file: GroupFile) -> bytes:
    """A file's bytes.

    Raises:
        CorruptClip: it is gone, or is not the one that was committed.
        StoreUnreachable: a network place did not answer.
    """
    path = f"shards/{group_name(record.shard, record.group)}/{file.path}"
    try:
        # One byte more than there should be: never all of a file that is something else.
        data = place.read_range(path, 0, file.recorded.bytes + 1)
    except (FileNotFoundError, NotADirectoryError, IsADirectoryError) as error:
        raise CorruptClip(
            f"{_subject(record, file, place.where)} cannot be found; if the store has changed "
            f"meanwhile, start again, else {mend_hint(place.where)}"
        ) from error
    if not file.is_intact(data):
        raise CorruptClip(
            f"{_subject(record, file, place.where)} is not the one that was committed; "
            f"{mend_hint(place.where)}"
        )
    return data


def _subject(record: CommitRecord, file: GroupFile, store: str) -> str:
    clip = "" if file.key is None else f" of clip {file.key!r}"
    return f"file {file.path}{clip} in shard {record.shard!r} of {store}"
