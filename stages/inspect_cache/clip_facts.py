"""Facts recorded about clips, as columns of a table and as short phrases."""

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from cache_schema import ClipEntry, ListedAttributes, PackedText, StoreReader, TextColumn

COLUMNS = ("clip", "quality", "valid", "lost", "lost_at", "prompt", "confidence", "shard")
"""Columns of `ClipLine`, as named in lists and in `--sort`."""


_WHOLE = ("valid", "lost", "lost_at")


@dataclass(frozen=True, kw_only=True, slots=True)
class ClipLine:
    """One row of the clip table; None for facts that the store's kind does not record."""

    clip: str
    quality: float | None
    """Agreement of the forward and backward tracks, 0 to 1; None for a single direction."""
    valid: int | None
    """Number of frames that training uses."""
    lost: int | None
    """Number of frames that training masks out."""
    lost_at: int | None
    """The first frame from which the subject stays lost."""
    prompt: str | None
    """Source and kind, such as `dataset mask`."""
    confidence: float | None
    """Confidence of an automatically found prompt."""
    shard: str


def clip_lines(reader: StoreReader) -> Iterator[ClipLine]:
    """Yield a row for every clip of a store, in shard order.

    Raises:
        CacheError: A record is damaged.
    """
    listed = reader.listed_attributes()
    columns, missing = clip_columns(listed), set(listed.missing)
    rows, first = reader.rows_by_record().tolist(), 0
    for shard, facts in reader.shards.items():
        if shard in missing:
            yield from map(clip_line, reader.records(shard))
        else:
            of_shard = rows[first : first + facts.num_clips]
            yield from (columns.line(row, reader.keys[row], shard) for row in of_shard)
        first += facts.num_clips


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class ClipColumns:
    """What `ClipLine` has of every clip, in the order of a reader's keys."""

    numbers: Mapping[str, np.ndarray]
    """float64 by the name in `ClipLine`; NaN for None."""
    prompts: TextColumn

    def line(self, row: int, key: str, shard: str) -> ClipLine:
        """The row of a clip."""
        value = {name: float(column[row]) for name, column in self.numbers.items()}
        known = {name: None if math.isnan(one) else one for name, one in value.items()}
        whole = {name: None if (one := known[name]) is None else int(one) for name in _WHOLE}
        return ClipLine(
            clip=key,
            quality=known["quality"],
            valid=whole["valid"],
            lost=whole["lost"],
            lost_at=whole["lost_at"],
            prompt=self.prompts.of(row),
            confidence=known["confidence"],
            shard=shard,
        )


def clip_columns(listed: ListedAttributes) -> ClipColumns:
    """The columns of all clips; `clip_line` gives the same values clip by clip."""
    numbers = listed.numbers
    frames, valid = numbers["num_frames"], numbers["valid_frames"]
    sources, kinds = listed.texts["prompt.source"], listed.texts["prompt.kinds"]
    known = (sources.rows >= 0) & (kinds.rows >= 0)
    both = sources.rows.astype(np.int64) * len(kinds.texts) + kinds.rows
    different, places = np.unique(both[known], return_inverse=True)
    prompts = np.full(len(known), -1, np.int32)
    prompts[known] = places
    return ClipColumns(
        numbers={
            "quality": numbers["quality"],
            "valid": np.trunc(valid),
            "lost": np.trunc(frames - valid),
            "lost_at": np.trunc(numbers["lost_at"]),
            "confidence": numbers["prompt.confidence"],
        },
        prompts=TextColumn(
            rows=prompts,
            texts=PackedText.from_strings(
                f"{sources.texts[pair // len(kinds.texts)]} {kinds.texts[pair % len(kinds.texts)]}"
                for pair in different.tolist()
            ),
        ),
    )


def clip_line(entry: ClipEntry) -> ClipLine:
    """The row of a clip, from its record."""
    known = entry.attributes
    prompt: Any = known.get("prompt") or {}
    frames, valid = _number(known.get("num_frames")), _number(known.get("valid_frames"))
    lost = None if frames is None or valid is None else int(frames - valid)
    lost_at = _number(known.get("lost_at"))
    return ClipLine(
        clip=entry.key,
        quality=_number(known.get("quality")),
        valid=None if valid is None else int(valid),
        lost=lost,
        lost_at=None if lost_at is None else int(lost_at),
        prompt=f"{prompt['source']} {'+'.join(prompt['kinds'])}" if prompt else None,
        confidence=_number(prompt.get("confidence")),
        shard=entry.shard,
    )


def _number(value: Any) -> float | None:
    return value if isinstance(value, int | float) else None


def describe_track(attributes: Mapping[str, Any], num_frames: int) -> tuple[str, ...]:
    """Short phrases about a tracked clip: first its prompt, then its track."""
    prompt = attributes["prompt"]
    kinds = "+".join(prompt["kinds"])
    facts = [f"prompt: {prompt['source']} {kinds} on frame {prompt['frame']}"]
    if prompt.get("phrase"):
        facts.append(f"looked for {prompt['phrase']!r}")
    if "moves" in prompt:
        speed = f"moves {prompt['tokens_per_frame']:.2f} tokens a frame"
        facts.append(speed if prompt["moves"] else "stands still")
    if prompt["confidence"] is not None:
        facts.append(f"confidence {prompt['confidence']:.2f}")
    if attributes["quality"] is not None:
        facts.append(f"cycle consistency {attributes['quality']:.2f}")
    facts.append(f"{attributes['valid_frames']} of {num_frames} frames valid")
    if attributes["lost_at"] is not None:
        facts.append(f"lost at frame {attributes['lost_at']}")
    return tuple(facts)
