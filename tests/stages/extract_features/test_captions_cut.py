"""Captions longer than the text encoder reads are counted, and marked clip by clip."""

from pathlib import Path

from cache_schema import StoreReader
from stages.clips import ClipsConfig
from stages.config import BaseModelConfig
from stages.extract_features.config import ExtractConfig
from stages.extract_features.run import extract_features
from stages.progress import SilentProgress


def test_captions_cut_are_counted(
    extract_config: ExtractConfig,
    two_shards: ClipsConfig,
    tiny_base: BaseModelConfig,
    tmp_path: Path,
) -> None:
    captions = {"a": "a red ellipse", "b": "a red ellipse drifts " * 20, "c": "grey " * 60}
    (tmp_path / "data").mkdir()
    for key, caption in captions.items():
        (tmp_path / "data" / f"{key}.mp4").write_bytes(b"not read for its caption")
        (tmp_path / "data" / f"{key}.txt").write_text(caption)
    config = extract_config.model_copy(update={"kinds": ("text",)})
    clips = two_shards.model_copy(update={"path": tmp_path / "data", "clips_per_shard": 2})
    for expected in (2, 0):  # the second run writes none
        summary = extract_features(
            config,
            clips,
            tiny_base,
            tmp_path / "cache",
            provenance={},
            progress=SilentProgress(),
        )
        (text,) = summary.kinds
        assert text.captions_cut == expected
        assert summary.dataset == "3 videos with captions beside them"
    reader = StoreReader(text.store)
    cut = {key: reader.record(key).attributes["tokens_cut"] for key in captions}
    assert cut["a"] == 0 and cut["b"] > 0 and cut["c"] > 0
