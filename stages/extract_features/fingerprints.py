"""Fingerprints of a dataset's clips: hashes of the inputs of each kind.

They cover captions, prompts and samples of the videos; see `stages.clips.fingerprints` for the
format.
"""

from collections.abc import Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from itertools import islice

import numpy as np

from cache_schema import SortedText
from cache_schema.names import FINGERPRINT_DIGITS
from stages.clips import BadRecord, ClipRecord, InputShard
from stages.clips.fingerprints import NO_CLIP, hash_parts, hash_prompts, hash_video
from stages.extract_features.config import Kind, TeacherConfig
from stages.extract_features.kinds import group_kinds
from stages.extract_features.prompts.chooser import usable_sources
from stages.extract_features.prompts.grounding import phrases_of
from stages.progress import Progress

SOURCES: dict[Kind, str] = {
    "text": "caption",
    "latents": "video",
    "visual": "video",
    "teacher": "video or prompt",
    "gram_flow": "video or prompt",
    "masks": "video or prompt",
}
"""Inputs of each kind, for messages."""


def fingerprint_of(
    record: ClipRecord | BadRecord,
    kind: Kind,
    teacher: TeacherConfig,
    video_hash: str | None = None,
) -> str:
    """Return the fingerprint of a clip's entry of a kind; it covers only the inputs of the kind.

    Args:
        record: The clip's record in the dataset.
        kind: Kind of the store; kinds written in one pass of SAM2 have equal fingerprints.
        teacher: Sources of prompts.
        video_hash: `hash_video` of the record's video, if it is known.
    """
    if isinstance(record, BadRecord):
        return hash_parts([record.reason, record.detail]) + NO_CLIP
    if video_hash is None:
        video_hash = hash_video(record.video)
    if kind == "text":
        return hash_parts([record.caption]) + video_hash
    if kind in ("latents", "visual"):
        return hash_parts([video_hash]) + video_hash
    return hash_parts([video_hash, *_prompt_parts(record, teacher)]) + video_hash


def _prompt_parts(record: ClipRecord, config: TeacherConfig) -> list[str]:
    """Return the inputs of the prompt sources that may be used for this clip."""
    sources = usable_sources(config, record)
    consulted = sources if config.prompt_fallback else sources[:1]
    parts: list[str] = []
    for source in consulted:
        parts.append(source)
        if source == "dataset":
            parts.append(hash_prompts(record.prompts))
        elif source == "grounding":
            parts += phrases_of(config.grounding, record)
    if config.backward_prompt == "dataset":
        parts.append(hash_prompts(record.last_frame_prompts))
    return parts


_NUM_THREADS = 8
"""Shards read at once: on network storage each sample of a video takes a round trip."""


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class DatasetSources:
    """All clips of some shards, including bad records, in ascending order of keys."""

    keys: SortedText
    shard_names: tuple[str, ...]
    shard_N: np.ndarray
    """uint32, index of each clip's shard in `shard_names`."""
    fingerprints: Mapping[Kind, np.ndarray]
    """S32 [N] by kind."""

    def keys_by_shard(self, mask_N: np.ndarray) -> dict[str, frozenset[str]]:
        """Return the keys of masked clips by shard name; shards without any are omitted.

        Args:
            mask_N: bool [N].
        """
        rows = np.flatnonzero(mask_N)
        rows = rows[np.argsort(self.shard_N[rows], kind="stable")]
        places, starts = np.unique(self.shard_N[rows], return_index=True)
        stops = [*starts[1:].tolist(), len(rows)]
        return {
            self.shard_names[place]: frozenset(self.keys[int(row)] for row in rows[start:stop])
            for place, start, stop in zip(places.tolist(), starts.tolist(), stops, strict=False)
        }


def read_sources(
    shards: Sequence[InputShard],
    kinds: tuple[Kind, ...],
    teacher: TeacherConfig,
    progress: Progress,
    *,
    max_clips: int | None = None,
) -> DatasetSources:
    """Compute the fingerprints of shards; of videos, only samples are read.

    Args:
        shards: Shards of the dataset.
        kinds: Kinds to compute fingerprints for.
        teacher: Sources of prompts.
        progress: Shows a bar.
        max_clips: Maximum number of clips per shard, from its start; None for all.
    """
    groups = group_kinds(kinds)
    keys: list[bytes] = []
    digits = [bytearray() for _ in groups]
    counts: list[int] = []
    with (
        progress.task("compare with the cache", len(shards), unit="shards") as task,
        ThreadPoolExecutor(_NUM_THREADS) as threads,
    ):
        for result in threads.map(
            lambda shard: _read_shard(islice(shard.records(), max_clips), teacher, groups), shards
        ):
            keys += result[0]
            counts.append(len(result[0]))
            for all_of_group, of_shard in zip(digits, result[1], strict=True):
                all_of_group += of_shard
            task.advance()
    order = np.array(sorted(range(len(keys)), key=keys.__getitem__), np.int64)
    shard_N = np.repeat(np.arange(len(counts), dtype=np.uint32), counts)[order]
    sorted_digits = [np.frombuffer(one, f"S{FINGERPRINT_DIGITS}")[order] for one in digits]
    return DatasetSources(
        keys=SortedText.from_utf8(keys[row] for row in order.tolist()),
        shard_names=tuple(shard.name for shard in shards),
        shard_N=shard_N,
        fingerprints={
            kind: of_group
            for kinds, of_group in zip(groups, sorted_digits, strict=True)
            for kind in kinds
        },
    )


def _read_shard(
    records: Iterable[ClipRecord | BadRecord],
    teacher: TeacherConfig,
    groups: Sequence[tuple[Kind, ...]],
) -> tuple[list[bytes], list[bytes]]:
    """Return the keys, and per group of kinds the concatenated digits of all fingerprints."""
    keys = []
    digits = [bytearray() for _ in groups]
    for record in records:
        keys.append(record.key.encode("utf-8"))
        video = None if isinstance(record, BadRecord) else hash_video(record.video)
        for of_group, kinds in zip(digits, groups, strict=True):
            fingerprint = fingerprint_of(record, kinds[0], teacher, video)
            of_group += fingerprint.encode("ascii")
    return keys, [bytes(of_group) for of_group in digits]
