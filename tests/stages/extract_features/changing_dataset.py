"""A dataset whose rows a test changes after its cache was extracted."""

import json
from pathlib import Path
from typing import Any

from cache_schema import StoreReader, verify_store
from stages.clips import ClipsConfig
from stages.config import BaseModelConfig
from stages.dry_run.extract import Estimate, estimate
from stages.extract_features.config import ExtractConfig
from stages.extract_features.run import extract_features
from stages.extract_features.summary import ExtractSummary
from stages.progress import SilentProgress

NUM_CLIPS = 8


class Dataset:
    """A folder with metadata.jsonl, three clips a shard, and the cache made from it."""

    def __init__(
        self, root: Path, videos: list[bytes], config: ExtractConfig, base: BaseModelConfig
    ) -> None:
        self.folder = root / "data"
        self.cache = root / "cache"
        self.videos = videos
        self.config = config
        self.base = base
        self.rows: list[dict[str, Any]] = []
        self.folder.mkdir()
        for number in range(NUM_CLIPS):
            self.append(number)

    def append(self, number: int, *, place: int | None = None) -> None:
        row = {"file_name": f"clip{number}.mp4", "caption": f"an ellipse drifts, take {number}"}
        (self.folder / row["file_name"]).write_bytes(self.videos[number % len(self.videos)])
        self.rows.insert(len(self.rows) if place is None else place, row)
        self.write()

    def write(self) -> None:
        lines = "".join(f"{json.dumps(row)}\n" for row in self.rows)
        (self.folder / "metadata.jsonl").write_text(lines)

    @property
    def clips(self) -> ClipsConfig:
        return ClipsConfig(
            path=self.folder, num_frames=9, height=64, width=96, fps=8.0, clips_per_shard=3
        )

    def extract(self, **options: Any) -> ExtractSummary:
        return extract_features(
            self.config,
            self.clips,
            self.base,
            self.cache,
            provenance={},
            progress=SilentProgress(),
            **options,
        )

    def estimate(self, **options: Any) -> Estimate:
        return estimate(
            self.config, self.clips, self.base, self.cache, progress=SilentProgress(), **options
        )

    def reader(self, kind: str) -> StoreReader:
        (store,) = self.cache.glob(f"{kind}-*")
        # What a run that is stopped leaves is harmless.
        assert {problem.remedy for problem in verify_store(store).problems} <= {"extract"}
        return StoreReader(store)

    def commits(self) -> dict[str, int]:
        return {
            str(path.relative_to(self.cache)): path.stat().st_mtime_ns
            for path in self.cache.glob("*/commits/*.json")
        }


def written(summary: ExtractSummary) -> dict[str, int]:
    return {kind.kind: kind.clips_written for kind in summary.kinds}
