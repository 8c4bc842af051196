"""Summary of an extraction run."""

from collections import Counter
from dataclasses import dataclass
from pathlib import Path

from cache_schema import SkippedClip
from stages.extract_features.config import Kind


@dataclass(frozen=True, kw_only=True, slots=True)
class KindSummary:
    """One store: its clips of the dataset after a run, and what the run did."""

    kind: Kind
    bucket: str | None
    """Size bucket of its clips; None without buckets, and for text."""
    store: Path
    clips_written: int
    """Clips written by this process."""
    clips_already_there: int
    """Clips in finished shards that earlier runs or other processes wrote."""
    skipped: tuple[SkippedClip, ...]
    """Clips skipped by this run and earlier ones, except those that a retry has added since."""
    seconds: float
    """Wall-clock time of this run."""
    bytes: int
    """Size on disk of the clips in finished shards."""
    captions_cut: int = 0
    """Captions in this run that were truncated to the text encoder's length."""

    @property
    def name(self) -> str:
        """The kind, and the size bucket if there are buckets."""
        return self.kind if self.bucket is None else f"{self.kind} {self.bucket}"

    @property
    def clips(self) -> int:
        """Number of clips, including skipped ones."""
        return self.clips_written + self.clips_already_there + len(self.skipped)


@dataclass(frozen=True, kw_only=True, slots=True)
class ExtractSummary:
    """Summary of a whole run."""

    kinds: tuple[KindSummary, ...]
    """In the order in which they were written; one per kind and size."""
    dataset: str
    """The detected dataset layout."""
    failures: Path | None = None
    """List of all skipped clips."""
    notes: tuple[str, ...] = ()
    """Human-readable notes on store contents that do not match the dataset."""

    @property
    def skipped_share(self) -> float:
        """Largest fraction of skipped clips over the kinds, all sizes together; 0 without clips."""
        skipped, clips = Counter[Kind](), Counter[Kind]()
        for of_size in self.kinds:
            skipped[of_size.kind] += len(of_size.skipped)
            clips[of_size.kind] += of_size.clips
        return max(skipped[kind] / max(clips[kind], 1) for kind in clips)
