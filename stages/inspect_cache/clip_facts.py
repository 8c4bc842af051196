"""What a store knows of its clips, in words and in columns; used by `overlay` and `inspect`."""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from cache_schema import StoreReader

COLUMNS = ("clip", "quality", "valid", "lost", "lost_at", "prompt", "confidence", "shard")
"""Of `ClipLine`, as they are named in lists and in `--sort`."""


@dataclass(frozen=True, kw_only=True, slots=True)
class ClipLine:
    """One clip of a list; None where the store's kind does not know it."""

    clip: str
    quality: float | None
    """How well the forward and the backward track agree, 0 to 1; also None for one direction."""
    valid: int | None
    """Frames that training uses."""
    lost: int | None
    """Frames that it leaves out."""
    lost_at: int | None
    """The first frame where the subject was lost for good."""
    prompt: str | None
    """Source and form, such as `dataset mask`."""
    confidence: float | None
    """Of a prompt that was found."""
    shard: str


def clip_lines(reader: StoreReader) -> Iterator[ClipLine]:
    """Every clip of a store, in the order of its shards.

    Raises:
        CacheError: A record is damaged.
    """
    for shard in reader.shards:
        for entry in reader.records(shard):
            known = entry.attributes
            prompt: Any = known.get("prompt") or {}
            frames, valid = _number(known.get("num_frames")), _number(known.get("valid_frames"))
            lost = None if frames is None or valid is None else int(frames - valid)
            lost_at = _number(known.get("lost_at"))
            yield ClipLine(
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


def facts_of(attributes: Mapping[str, Any], num_frames: int) -> tuple[str, ...]:
    """What a store of tracks knows of a clip, in a few words each: the prompt, then the track."""
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
