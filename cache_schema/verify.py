"""Checking a whole store against its commit records; used by the console's inspection."""

from dataclasses import dataclass
from pathlib import Path

from cache_schema.errors import CacheError
from cache_schema.layout import StoreLayout, is_shard_name
from cache_schema.manifest import (
    CommitRecord,
    StoredFile,
    committed_shards,
    mend_hint,
    read_commit,
    read_manifest,
)
from cache_schema.sealed_json import crc32c_hex
from cache_schema.settings import StoreSettings
from cache_schema.zarr_group import ClipArray, content_crc32c, open_array


@dataclass(frozen=True, slots=True)
class Problem:
    """One thing that is wrong."""

    shard: str
    key: str | None
    """The clip, where it is one clip's problem."""
    what: str


@dataclass(frozen=True, slots=True)
class VerifyReport:
    """What `verify_store` found."""

    problems: tuple[Problem, ...]
    num_clips: int
    """Committed clips, damaged ones included."""
    num_bytes: int
    """Bytes of their files, as recorded."""


def verify_store(path: Path, *, full: bool = True) -> VerifyReport:
    """Compare every file of every committed shard with its commit record.

    Args:
        path: the store's folder.
        full: decode every clip and compare checksums; otherwise sizes only.

    Raises:
        StoreNotFound, UnknownSchemaVersion, CorruptRecord: from `store.json`. Everything else that
            is wrong is in the report.
    """
    layout = StoreLayout(Path(path))
    settings = read_manifest(layout).settings
    shards = committed_shards(layout)
    problems = _uncommitted(layout, shards)
    shard_of_key: dict[str, str] = {}
    num_clips = num_bytes = 0
    for shard in shards:
        try:
            record = read_commit(layout, settings, shard)
        except CacheError as error:
            problems.append(Problem(shard, None, str(error)))
            continue
        for clip in record.clips:
            other = shard_of_key.setdefault(clip.key, shard)
            if other != shard:
                problems.append(Problem(shard, clip.key, f"the key is in shard {other!r} too"))
            num_bytes += sum(array.bytes for array in clip.arrays.values())
        num_clips += len(record.clips)
        problems += _verify_shard(layout, settings, record, full=full)
    return VerifyReport(tuple(problems), num_clips, num_bytes)


def _uncommitted(layout: StoreLayout, committed: list[str]) -> list[Problem]:
    if not layout.shards.is_dir():
        return []
    names = sorted(entry.name for entry in layout.shards.iterdir())
    return [
        Problem(
            name,
            None,
            "there is no commit record for it, so readers ignore it; run sam2vx-pipeline "
            "extract-features to finish it",
        )
        for name in names
        if is_shard_name(name) and name not in committed
    ]


def _verify_shard(
    layout: StoreLayout, settings: StoreSettings, record: CommitRecord, *, full: bool
) -> list[Problem]:
    folder = layout.group(record.shard, record.generation)
    hint = mend_hint(layout.root)
    problems = []

    def report(key: str | None, what: str) -> None:
        problems.append(Problem(record.shard, key, f"{what}; {hint}"))

    for path, file in record.files.items():
        if what := _check_file(folder / path, file):
            report(None, f"file {path} {what}")
    known = set(record.files)
    readable = not problems
    arrays = {name: open_array(folder, name) for name in settings.arrays} if readable else {}
    for clip in record.clips:
        for name, stored in clip.arrays.items():
            known.add(stored.path)
            what = _check_size(folder / stored.path, stored.bytes)
            if not what and full and readable:
                what = _check_content(arrays[name], clip.index, stored.crc32c)
            if what:
                report(clip.key, f"file {stored.path} {what}")
    for entry in sorted(folder.rglob("*")):
        relative = entry.relative_to(folder).as_posix()
        if not entry.is_dir() and relative not in known:
            report(None, f"file {relative} does not belong to the shard")
    return problems


def _check_file(path: Path, file: StoredFile) -> str:
    what = _check_size(path, file.bytes)
    if what:
        return what
    try:
        data = path.read_bytes()
    except OSError as error:
        return f"cannot be read ({error.strerror})"
    return "" if crc32c_hex(data) == file.crc32c else "is not the one that was committed"


def _check_size(path: Path, size: int) -> str:
    try:
        found = path.stat().st_size
    except OSError:
        return "cannot be found"
    return "" if found == size else f"has {found} bytes instead of {size}"


def _check_content(array: ClipArray, index: int, crc32c: str) -> str:
    try:
        values = array.read(index)
    except Exception as error:  # whatever damaged bytes make the codecs raise
        return f"cannot be decoded ({error})"
    return "" if content_crc32c(values) == crc32c else "fails its checksum"
