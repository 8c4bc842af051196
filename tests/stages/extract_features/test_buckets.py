"""Size buckets: each clip is in the stores of one size, and not reported as skipped elsewhere."""

import functools
import io
import json
import shutil
import tarfile
from pathlib import Path

import pytest

from cache_schema import StoreReader
from stages.clips import ClipsConfig, encode_video, open_dataset
from stages.config import BaseModelConfig
from stages.dry_run.survey import survey_shards
from stages.extract_features.config import ExtractConfig
from stages.extract_features.summary import ExtractSummary
from stages.progress import SilentProgress
from tests.stages.conftest import make_frames
from tests.stages.extract_features.conftest import Extract

SHAPES = {
    "wide0": (12, 32, 48),
    "wide1": (12, 32, 48),
    "tall0": (12, 48, 32),
    "long0": (20, 32, 48),
    "short": (5, 48, 32),
    "wide2": (12, 32, 48),
    "broken": None,
    "tall1": (12, 48, 32),
}
BUCKETS = ("17x32x48", "9x32x48", "9x48x32")
HELD = {
    "17x32x48": {"0/long0"},
    "9x32x48": {"0/wide0", "0/wide1", "1/wide2"},
    "9x48x32": {"0/tall0", "1/tall1"},
}


@pytest.fixture(scope="module")
def mixed(tmp_path_factory: pytest.TempPathFactory) -> ClipsConfig:
    folder = tmp_path_factory.mktemp("mixed")
    for shard, names in (("0", list(SHAPES)[:4]), ("1", list(SHAPES)[4:])):
        with tarfile.open(folder / f"{shard}.tar", "w") as tar:
            for name in names:
                shape = SHAPES[name]
                video = b"no video"
                if shape is not None:
                    video = encode_video(make_frames(*shape, seed=1), 8.0)
                for suffix, content in (("mp4", video), ("txt", b"a thing moves")):
                    member = tarfile.TarInfo(f"{name}.{suffix}")
                    member.size = len(content)
                    tar.addfile(member, io.BytesIO(content))
    return ClipsConfig(path=folder, fps=8.0, buckets=BUCKETS)


@pytest.fixture
def extract(extract: Extract, stub_tracking: object, mixed: ClipsConfig) -> Extract:
    base = BaseModelConfig(path="unused")
    return functools.partial(extract, clips=mixed, base=base, kinds=("teacher", "masks"))


def held(summary: ExtractSummary, kind: str) -> dict[str | None, set[str]]:
    return {
        one.bucket: set(StoreReader(one.store).keys) for one in summary.kinds if one.kind == kind
    }


def test_every_clip_goes_into_the_stores_of_one_size(extract, tmp_path: Path) -> None:
    summary = extract()
    assert held(summary, "teacher") == held(summary, "masks") == HELD
    assert len(list(tmp_path.glob("teacher-*"))) == 3


def test_clips_of_other_sizes_are_no_failures(extract, tmp_path: Path) -> None:
    summary = extract()
    lines = [json.loads(line) for line in (tmp_path / "failures.jsonl").read_text().splitlines()]
    assert {(line["key"], line["reason"]) for line in lines} == {
        ("1/short", "too_short"),
        ("1/broken", "undecodable"),
    }
    assert len(lines) == 4, "of the teacher and of the masks, each once"
    # Two of eight clips, though half of what the smallest size was given.
    assert summary.skipped_share == pytest.approx(2 / 8)


def test_a_second_run_and_a_second_process_find_nothing_to_do(extract) -> None:
    first = extract()
    again = extract(rank=1, world_size=2)
    assert [one.clips_written for one in again.kinds] == [0] * len(again.kinds)
    assert held(again, "teacher") == held(first, "teacher")
    assert again.skipped_share == first.skipped_share


@pytest.mark.parametrize("bucket", BUCKETS)
def test_a_shard_that_one_size_lacks_is_made_again_for_it_alone(
    extract, tmp_path: Path, bucket: str
) -> None:
    first = extract()
    lost = [one.store for one in first.kinds if one.bucket == bucket]
    for store in lost:
        (store / "index.npz").unlink()
        (store / "commits" / "1.json").unlink()
        shutil.rmtree(store / "shards" / "1")
    others = {
        path: path.stat().st_mtime_ns
        for path in tmp_path.glob("*/commits/*")
        if path.parent.parent not in lost
    }
    again = extract()
    assert held(again, "teacher") == held(again, "masks") == HELD
    assert again.skipped_share == first.skipped_share
    assert {path: path.stat().st_mtime_ns for path in others} == others


def test_a_retry_leaves_the_other_sizes_alone(extract) -> None:
    before = held(extract(), "teacher")
    assert held(extract(retry_failed=True), "teacher") == before


def test_a_run_of_one_size_never_takes_a_part_of_its_clips_for_the_whole(
    extract, mixed: ClipsConfig
) -> None:
    from stages.extract_features.extraction import clip_settings

    (size, *_) = mixed.sizes
    alone = mixed.model_copy(update={"buckets": (), "num_frames": 17, "height": 32, "width": 48})
    assert clip_settings(size) != clip_settings(alone)
    shuffled = mixed.model_copy(update={"buckets": BUCKETS[::-1]})
    assert clip_settings(shuffled.sizes[-1]) == clip_settings(size)


def test_the_survey_counts_each_clip_at_its_size(
    extract_config: ExtractConfig, mixed: ClipsConfig
) -> None:
    config = extract_config.model_copy(update={"kinds": ("text", "latents")})
    surveys = survey_shards(open_dataset(mixed).shards, config, mixed, SilentProgress())
    assert list(surveys) == [None, *BUCKETS]
    for size, keys in HELD.items():
        of_size = surveys[size]
        skipped = [clip.key for one in of_size for clip in one.skipped.get("latents", ())]
        elsewhere = sum(len(one.other_size) for one in of_size)
        assert sum(one.num_clips for one in of_size) - elsewhere - len(skipped) == len(keys)
    assert not any(one.skipped or one.other_size for one in surveys[None])
