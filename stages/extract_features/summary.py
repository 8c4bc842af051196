"""What stage one reports when it is done; the command line prints it."""

from collections import Counter
from dataclasses import dataclass
from pathlib import Path

from cache_schema import SkippedClip
from stages.extract_features.config import Kind


@dataclass(frozen=True, kw_only=True, slots=True)
class KindSummary:
    """One kind of store: what it holds of the dataset after a run, and what the run did."""

    kind: Kind
    bucket: str | None
    """The size of its clips, where there are several; None for text too."""
    store: Path
    clips_written: int
    """By this process."""
    clips_already_there: int
    """By earlier runs, or by processes beside this one; in finished shards."""
    skipped: tuple[SkippedClip, ...]
    """By this run and earlier ones, without those that a retry brought in."""
    seconds: float
    """Wall-clock time of this run."""
    bytes: int
    """On disk, of the finished shards' clips."""
    captions_cut: int = 0
    """Captions of this run that were longer than the text encoder reads."""

    @property
    def name(self) -> str:
        """The kind, and the size where there are several."""
        return self.kind if self.bucket is None else f"{self.kind} {self.bucket}"

    @property
    def clips(self) -> int:
        """All clips, skipped ones included."""
        return self.clips_written + self.clips_already_there + len(self.skipped)


@dataclass(frozen=True, kw_only=True, slots=True)
class ExtractSummary:
    """All kinds, in the order in which they were written."""

    kinds: tuple[KindSummary, ...]
    """Of each, one for every size."""
    dataset: str
    """Which layout was recognised."""
    failures: Path | None = None
    """The list of everything that was left out."""
    notes: tuple[str, ...] = ()
    """What of the stores the dataset does not account for, in lines for people."""

    @property
    def skipped_share(self) -> float:
        """The largest share of skipped clips of any kind, its sizes together; 0 without clips."""
        skipped, clips = Counter[Kind](), Counter[Kind]()
        for of_size in self.kinds:
            skipped[of_size.kind] += len(of_size.skipped)
            clips[of_size.kind] += of_size.clips
        return max(skipped[kind] / max(clips[kind], 1) for kind in clips)
