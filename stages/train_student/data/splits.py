"""Clips that a run does not train on: excluded, missing from some store, or held out for
validation.

Held-out clips are chosen by the hash of the key, so the choice does not depend on the seed or on
the order of clips, and new clips change it only if their hashes are lower.
"""

import heapq
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from hashlib import blake2b
from pathlib import Path

from cache_schema import JSON, SkippedClip
from cache_schema.checksummed_json import parse_json


@dataclass(frozen=True, kw_only=True, slots=True)
class ExcludedClips:
    """Numbers of excluded clips."""

    not_in_every_store: dict[str, int]
    """By kind: clips that some other kind lacks."""
    skipped: dict[str, dict[str, int]]
    """By kind and reason: clips that extraction skipped."""
    manifest: str | None
    """Path of the manifest `train.leave_out`."""
    named: int
    """Clips present in every store that the manifest excludes."""

    def as_dict(self) -> dict[str, JSON]:
        """Convert to JSON, for run.json."""
        return {
            "not_in_every_store": dict(self.not_in_every_store),
            "skipped": {kind: dict(reasons) for kind, reasons in self.skipped.items()},
            "manifest": self.manifest,
            "named": self.named,
        }

    def describe(self) -> list[str]:
        """Clauses for the log, one per reason of exclusion."""
        clauses = []
        lacking = [f"{n} of {kind}" for kind, n in self.not_in_every_store.items() if n]
        if lacking:
            clauses.append(f"left out, not in every store: {', '.join(lacking)}")
        skipped = [
            f"{sum(reasons.values())} of {kind} ({_format_counts(reasons)})"
            for kind, reasons in self.skipped.items()
            if reasons
        ]
        if skipped:
            clauses.append(f"skipped by extraction: {', '.join(skipped)}")
        if self.manifest is not None:
            clauses.append(f"left out by {self.manifest}: {self.named}")
        return clauses


def _format_counts(reasons: Mapping[str, int]) -> str:
    return ", ".join(f"{reason} {count}" for reason, count in reasons.items())


def count_reasons(skipped: tuple[SkippedClip, ...]) -> dict[str, int]:
    """Count skipped clips by reason, the most frequent first."""
    counts = Counter(clip.reason for clip in skipped)
    return dict(sorted(counts.items(), key=lambda item: (-item[1], item[0])))


def read_keys(manifest: Path) -> frozenset[str]:
    """Read the keys of a manifest: JSON lines, each an object with a `key`.

    Other members (as in extraction's failures.jsonl) and empty lines are ignored.

    Raises:
        ValueError: the file cannot be read, or a line has no key; names the line.
    """
    try:
        text = manifest.expanduser().read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise ValueError(
            f"train.leave_out {manifest} cannot be read ({error}); give a JSON lines file with a "
            "key per line, such as the cache's failures.jsonl, or null"
        ) from error
    keys = set()
    for number, line in enumerate(text.split("\n"), start=1):
        if line.strip():
            keys.add(_key(line, f"{manifest} line {number}"))
    return frozenset(keys)


def _key(line: str, place: str) -> str:
    try:
        found = parse_json(line)
    except ValueError as error:
        raise ValueError(f"{place} is not JSON ({error}): {line[:80]!r}") from error
    key = found.get("key") if isinstance(found, dict) else None
    if not isinstance(key, str) or not key:
        raise ValueError(
            f'{place} names no clip; expected an object with a key, such as {{"key": '
            f'"00000/walk"}}, got {line[:80]!r}'
        )
    return key


def choose_held_out(keys: Sequence[Iterable[str]], count: int) -> tuple[str, ...]:
    """The `count` keys with the lowest hashes, lowest first; all keys if there are fewer.

    Args:
        keys: keys of every bucket; a key in several buckets counts once.
    """
    if count == 0:
        return ()
    ranked: set[tuple[bytes, str]] = set()
    for of_bucket in keys:
        ranked.update(heapq.nsmallest(count, ((_rank(key), key) for key in of_bucket)))
    return tuple(key for _, key in heapq.nsmallest(count, ranked))


def seed_of_held_out(key: str, timestep: int) -> int:
    """63-bit seed of a held-out clip's random numbers at a timestep."""
    digest = blake2b(f"{timestep}/{key}".encode(), digest_size=8, person=b"validation")
    return int.from_bytes(digest.digest(), "little") >> 1


def _rank(key: str) -> bytes:
    return blake2b(key.encode(), digest_size=8, person=b"held out").digest()
