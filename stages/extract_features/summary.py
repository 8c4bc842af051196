"""What stage one reports when it is done; the command line prints it."""

from dataclasses import dataclass
from pathlib import Path

from cache_schema import SkippedClip
from stages.extract_features.config import Kind


@dataclass(frozen=True, kw_only=True, slots=True)
class KindSummary:
    """One kind of store: what it holds of the dataset after a run, and what the run did."""

    kind: Kind
    store: Path
    clips_written: int
    """By this process."""
    clips_already_there: int
    """By earlier runs, or by processes beside this one; in finished shards."""
    skipped: tuple[SkippedClip, ...]
    """By this run and earlier ones, without those that a retry brought in."""
    busy_shards: tuple[str, ...]
    """Left alone because another process was writing them."""
    seconds: float
    """Wall-clock time of this run."""
    bytes: int
    """On disk, of the finished shards' clips."""

    @property
    def skipped_share(self) -> float:
        """Skipped clips over all clips; 0 when there are none."""
        skipped = len(self.skipped)
        total = self.clips_written + self.clips_already_there + skipped
        return skipped / total if total else 0.0


@dataclass(frozen=True, kw_only=True, slots=True)
class ExtractSummary:
    """All kinds, in the order in which they were written."""

    kinds: tuple[KindSummary, ...]
    failures: Path | None = None
    """The list of everything that was left out."""

    @property
    def skipped_share(self) -> float:
        """The largest share of skipped clips of any kind."""
        return max(kind.skipped_share for kind in self.kinds)
