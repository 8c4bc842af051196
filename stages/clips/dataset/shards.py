"""Opens a dataset of any layout as a list of shards."""

import hashlib
import re
from collections import Counter
from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import ClassVar, Protocol

from cache_schema.shown_text import first_few
from stages.clips.config import ClipsConfig
from stages.clips.dataset.layouts import (
    LAYOUTS,
    Layout,
    conversion_hint,
    describe_contents,
    find_layout,
)
from stages.clips.dataset.metadata import MetadataFile
from stages.clips.dataset.rows import CAPTION_LISTS, VIDEO_LISTS, PairedLines
from stages.clips.dataset.tars import count_records, tar_records
from stages.clips.dataset.video_files import VideoFiles
from stages.clips.records import BadRecord, ClipRecord

_SAFE_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9_-]{0,79}")
_RETRY_NAME = re.compile(r"(.+)-retry[0-9]+")


class InputShard(Protocol):
    """A part of the dataset that one worker processes and writes as one shard of each store."""

    @property
    def name(self) -> str:
        """Name of the shard: a safe file name, unique in the dataset and stable between runs."""

    @property
    def source(self) -> str:
        """Where its clips come from, relative to the dataset."""

    @property
    def key_prefix(self) -> str:
        """Common prefix of the keys of its clips; empty if they have none."""

    @property
    def listed_clips(self) -> int | None:
        """Number of records if it is known without reading the shard, otherwise None."""

    def num_clips(self) -> int:
        """Number of records, including bad ones; of a tar only the headers are read."""

    def num_bytes(self) -> int:
        """Size on disk of the files its clips are read from."""

    def records(self) -> Iterator[ClipRecord | BadRecord]:
        """The records in stored order; keys are unique in the dataset."""


@dataclass(frozen=True)
class ClipDataset:
    """The shards of a dataset, in a fixed order."""

    shards: tuple[InputShard, ...]
    layout: str
    """One-line description of the recognised layout, including ignored files and fields."""

    @cached_property
    def by_name(self) -> Mapping[str, InputShard]:
        """The shards by name."""
        return {shard.name: shard for shard in self.shards}


def retry_shard_name(name: str, attempt: int) -> str:
    """Name of the store shard with the results of retry `attempt` (1, 2, …) of shard `name`."""
    return f"{name}-retry{attempt}"


def input_shard_name(store_shard: str, dataset: ClipDataset) -> str | None:
    """Name of the dataset shard from which a store shard was made; None if there is none."""
    if store_shard in dataset.by_name:
        return store_shard
    retry = _RETRY_NAME.fullmatch(store_shard)
    return retry[1] if retry and retry[1] in dataset.by_name else None


class _ClipList(Protocol):
    """Clips in a fixed order, read by ranges."""

    @property
    def name(self) -> str:
        """Name of the list in `InputShard.source`."""

    def __len__(self) -> int: ...

    def records(self, start: int, stop: int) -> Iterator[ClipRecord | BadRecord]: ...

    def num_bytes(self, start: int, stop: int) -> int: ...


@dataclass(frozen=True, slots=True)
class _TarShard:
    name: str
    source: str
    path: Path
    listed_clips: ClassVar[None] = None

    @property
    def key_prefix(self) -> str:
        return f"{self.name}/"

    def num_clips(self) -> int:
        return count_records(self.path)

    def num_bytes(self) -> int:
        return self.path.stat().st_size

    def records(self) -> Iterator[ClipRecord | BadRecord]:
        return tar_records(self.path, key_prefix=self.key_prefix)


@dataclass(frozen=True, slots=True)
class _RowsShard:
    name: str
    clips: _ClipList
    start: int
    stop: int
    key_prefix: ClassVar[str] = ""

    @property
    def source(self) -> str:
        return f"{self.clips.name} entries {self.start} to {self.stop - 1}"

    @property
    def listed_clips(self) -> int:
        return self.stop - self.start

    def num_clips(self) -> int:
        return self.listed_clips

    def num_bytes(self) -> int:
        return self.clips.num_bytes(self.start, self.stop)

    def records(self) -> Iterator[ClipRecord | BadRecord]:
        return self.clips.records(self.start, self.stop)


@dataclass(frozen=True, slots=True)
class _SelectedClips:
    shard: InputShard
    keys: frozenset[str]
    listed_clips: ClassVar[None] = None

    @property
    def name(self) -> str:
        return self.shard.name

    @property
    def source(self) -> str:
        return self.shard.source

    @property
    def key_prefix(self) -> str:
        return self.shard.key_prefix

    def num_clips(self) -> int:
        return sum(1 for _ in self.records())

    def num_bytes(self) -> int:
        return self.shard.num_bytes()

    def records(self) -> Iterator[ClipRecord | BadRecord]:
        return (record for record in self.shard.records() if record.key in self.keys)


def open_dataset(config: ClipsConfig) -> ClipDataset:
    """List the shards of the dataset at `config.path`, without opening tars or videos.

    A tar is one shard named after its stem. The keys of its clips are "<shard>/<member key>", so
    that different tars may use the same member keys. In other layouts every
    `config.clips_per_shard` clips are one shard, named by its number; keys are file names without
    the video suffix.

    Raises:
        ValueError: There is no dataset at the path, or more than one; or it is malformed as a
            whole.
    """
    layout = find_layout(config.path)
    if layout.kind == "tars":
        return _tar_dataset(layout)
    clips, description = _clip_list(layout)
    if len(clips) == 0:
        raise ValueError(f"{layout.named} lists no clips")
    return ClipDataset(_rows_shards(clips, config), layout=description)


def videos_below(config: ClipsConfig) -> ClipDataset:
    """List all videos in the folder `config.path` and below, whatever else it holds.

    Unlike `open_dataset`, it needs no captions, and ignores metadata files and tars.

    Raises:
        ValueError: There are no videos.
    """
    found = VideoFiles.in_folder(config.path)
    if len(found) == 0:
        raise ValueError(f"{config.path} holds no videos")
    return ClipDataset(_rows_shards(found, config), layout=f"{len(found)} videos")


def select_clips(dataset: ClipDataset, keys: Collection[str]) -> ClipDataset:
    """The clips with these keys; keys that the dataset does not have are ignored.

    Shards are read until all keys are found, and those without any are left out.
    """
    wanted, found, shards = frozenset(keys), 0, []
    for shard in dataset.shards:
        if found == len(wanted):
            break
        selected = _SelectedClips(shard, wanted)
        if count := selected.num_clips():
            shards.append(selected)
            found += count
    return ClipDataset(tuple(shards), layout=f"{found} clips of: {dataset.layout}")


def _rows_shards(clips: _ClipList, config: ClipsConfig) -> tuple[InputShard, ...]:
    starts = range(0, len(clips), config.clips_per_shard)
    return tuple(
        _RowsShard(f"{number:05d}", clips, start, min(start + config.clips_per_shard, len(clips)))
        for number, start in enumerate(starts)
    )


def _tar_dataset(layout: Layout) -> ClipDataset:
    stem_counts = Counter(tar.stem.lower() for tar in layout.files)
    shards = []
    for tar in layout.files:
        name = _shard_name(tar, layout.root, unique=stem_counts[tar.stem.lower()] == 1)
        shards.append(_TarShard(name, tar.relative_to(layout.root).as_posix(), tar))
    return ClipDataset(tuple(shards), layout=f"webdataset, {layout.description}")


def _shard_name(tar: Path, root: Path, *, unique: bool) -> str:
    # A tar named like a retry shard could clash with the retry shard of another tar.
    if unique and _SAFE_NAME.fullmatch(tar.stem) and not _RETRY_NAME.fullmatch(tar.stem):
        return tar.stem
    readable = re.sub(r"[^A-Za-z0-9_-]+", "-", tar.stem).strip("-_")[:60]
    identity = tar.relative_to(root).as_posix()
    digest = hashlib.sha256(identity.encode("utf-8", "surrogateescape")).hexdigest()[:12]
    return f"{readable or 'shard'}-{digest}"


def _clip_list(layout: Layout) -> tuple[_ClipList, str]:
    """The clips of a layout other than tars, and its description."""
    if layout.kind == "videos":
        return _videos(layout)
    if layout.kind == "line lists":
        captions, videos = layout.files
        lists = MetadataFile.of_rows(videos, PairedLines(captions, videos))
        return lists, f"{layout.description}, line by line"
    metadata = MetadataFile.open(layout.files[0])
    description = [metadata.name]
    if metadata.caption_field != "caption":
        description.append(f"captions from its {metadata.caption_field}")
    if metadata.unread_fields:
        description.append(f"fields not read: {first_few(metadata.unread_fields, 8)}")
    return metadata, "; ".join(description)


def _videos(layout: Layout) -> tuple[VideoFiles, str]:
    found = (
        VideoFiles.of_videos(layout.root, layout.files)
        if layout.files
        else VideoFiles.in_folder(layout.root)
    )
    if len(found) == 0:
        raise ValueError(
            f"no dataset at data.path {layout.root}{describe_contents(layout.root)}. Expected "
            f"{LAYOUTS}"
        )
    without = len(found) - found.num_with_caption
    if without == len(found):
        raise ValueError(_no_captions(found, layout))
    description = f"{len(found)} video{'s' if len(found) > 1 else ''} with captions beside them"
    if without:
        description += f", {without} without"
    if found.unmatched_captions:
        shown = ", ".join(found.unmatched_captions[:3])
        description += (
            f"; {len(found.unmatched_captions)} .txt without a video of the same name: {shown}"
        )
    return found, description


def _no_captions(found: VideoFiles, layout: Layout) -> str:
    first = found.clip(0)
    lists = [name for name in CAPTION_LISTS if (layout.root / name).is_file()]
    paired = (
        f"; or, beside {lists[0]}, a {VIDEO_LISTS[0]} with the video of each line" if lists else ""
    )
    where = layout.named if layout.files else layout.root
    elsewhere = "" if layout.files else conversion_hint(layout.root)
    return (
        f"{where} has {len(found)} video{'s' if len(found) > 1 else ''} and no caption. "
        f"{elsewhere}{'. ' if elsewhere else ''}"
        f"Expected {first.key}.txt beside {first.video_name}{paired}; or a metadata.jsonl with a "
        f'line per video, such as {{"file_name": "{first.video_name}", "caption": "…"}}'
    )
