"""Which shards a dataset has; `open_dataset` is the door to it for every stage."""

import hashlib
import re
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

from stages.clips.config import ClipsConfig
from stages.clips.metadata_folder import MetadataFile
from stages.clips.records import BadRecord, ClipRecord
from stages.clips.tars import count_records, tar_records

_METADATA_NAMES = ("metadata.jsonl", "metadata.csv")
_SAFE_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9_-]{0,79}")
_RETRY_NAME = re.compile(r"(.+)-retry[0-9]+")
_LAYOUTS = (
    "expected a folder of webdataset tars (00000.tar holding key.mp4 with key.txt or key.json, and "
    "key.mask.png), one tar, or a folder with metadata.jsonl or metadata.csv (file_name, caption, "
    "box_xyxy, points, point_labels, mask, subjects, last_frame, subject)"
)


class InputShard(Protocol):
    """A part of the dataset that one worker processes and that becomes one shard of each store."""

    @property
    def name(self) -> str:
        """Safe as a file name, unique in the dataset, the same at every run."""

    @property
    def source(self) -> str:
        """Where its clips come from, relative to the dataset."""

    def num_clips(self) -> int:
        """How many records there are, bad ones included; reads a tar's headers only."""

    def num_bytes(self) -> int:
        """Size on disk of what its clips are read from."""

    def records(self) -> Iterator[ClipRecord | BadRecord]:
        """The records in their stored order; keys are unique over the whole dataset."""


@dataclass(frozen=True, slots=True)
class ClipDataset:
    """The shards of a dataset, in a fixed order."""

    shards: tuple[InputShard, ...]


def retry_shard_name(name: str, attempt: int) -> str:
    """The store shard that holds what attempt `attempt` (1, 2, …) made of `name`'s failures."""
    return f"{name}-retry{attempt}"


def input_shard_name(store_shard: str, dataset: ClipDataset) -> str | None:
    """The dataset's shard that a store's shard came from; None when the dataset lacks it."""
    names = {shard.name for shard in dataset.shards}
    if store_shard in names:
        return store_shard
    retry = _RETRY_NAME.fullmatch(store_shard)
    return retry[1] if retry and retry[1] in names else None


@dataclass(frozen=True, slots=True)
class _TarShard:
    name: str
    path: Path

    @property
    def source(self) -> str:
        return self.path.name

    def num_clips(self) -> int:
        return count_records(self.path)

    def num_bytes(self) -> int:
        return self.path.stat().st_size

    def records(self) -> Iterator[ClipRecord | BadRecord]:
        return tar_records(self.path, key_prefix=f"{self.name}/")


@dataclass(frozen=True, slots=True)
class _RowsShard:
    name: str
    metadata: MetadataFile
    start: int
    stop: int

    @property
    def source(self) -> str:
        return f"{self.metadata.path.name} entries {self.start} to {self.stop - 1}"

    def num_clips(self) -> int:
        return self.stop - self.start

    def num_bytes(self) -> int:
        return self.metadata.num_bytes(self.start, self.stop)

    def records(self) -> Iterator[ClipRecord | BadRecord]:
        return self.metadata.records(self.start, self.stop)


def open_dataset(config: ClipsConfig) -> ClipDataset:
    """List the shards at `config.path`; no tar and no video is opened.

    A tar is one shard named after its stem; its clips' keys are "<shard>/<member key>", so that
    tars may number their clips alike. `config.clips_per_shard` entries of a metadata file are one
    shard named by its number; keys are file names without the video suffix.

    Raises:
        ValueError: There is no dataset at the path, or two kinds of them.
    """
    path = config.path.expanduser()
    if path.is_file() and path.suffix == ".tar":
        return _tar_dataset([path])
    if not path.is_dir():
        raise ValueError(f"no dataset at data.path {config.path}: {_LAYOUTS}")
    tars = sorted(entry for entry in path.glob("*.tar") if entry.is_file())
    metadata = [path / name for name in _METADATA_NAMES if (path / name).is_file()]
    if len(metadata) + bool(tars) > 1:
        found = [entry.name for entry in metadata + tars[:1]]
        raise ValueError(
            f"data.path {config.path} holds several datasets ({', '.join(found)}); keep one"
        )
    if tars:
        return _tar_dataset(tars)
    if metadata:
        return _metadata_dataset(metadata[0], config.clips_per_shard)
    raise ValueError(f"no dataset in data.path {config.path}: {_LAYOUTS}")


def _tar_dataset(tars: list[Path]) -> ClipDataset:
    taken = Counter(tar.stem.lower() for tar in tars)
    return ClipDataset(
        tuple(_TarShard(_shard_name(tar, unique=taken[tar.stem.lower()] == 1), tar) for tar in tars)
    )


def _shard_name(tar: Path, *, unique: bool) -> str:
    # A tar named like a retry would claim the name of another's.
    if unique and _SAFE_NAME.fullmatch(tar.stem) and not _RETRY_NAME.fullmatch(tar.stem):
        return tar.stem
    readable = re.sub(r"[^A-Za-z0-9_-]+", "-", tar.stem).strip("-_")[:60]
    digest = hashlib.sha256(tar.name.encode("utf-8", "surrogateescape")).hexdigest()[:12]
    return f"{readable or 'shard'}-{digest}"


def _metadata_dataset(path: Path, clips_per_shard: int) -> ClipDataset:
    metadata = MetadataFile.open(path)
    num_entries = len(metadata)
    if num_entries == 0:
        raise ValueError(f"{path} lists no clip: {_LAYOUTS}")
    starts = range(0, num_entries, clips_per_shard)
    return ClipDataset(
        tuple(
            _RowsShard(f"{number:05d}", metadata, start, min(start + clips_per_shard, num_entries))
            for number, start in enumerate(starts)
        )
    )
