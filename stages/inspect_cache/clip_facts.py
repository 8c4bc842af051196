"""Facts recorded about clips, as columns of a table and as short phrases."""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from cache_schema import ClipEntry, StoreReader

COLUMNS = ("clip", "quality", "valid", "lost", "lost_at", "prompt", "confidence", "shard")
"""Columns of `ClipLine`, as named in lists and in `--sort`."""


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
    for shard in reader.shards:
        yield from map(clip_line, reader.records(shard))


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
