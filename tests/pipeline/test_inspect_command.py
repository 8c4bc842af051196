"""`inspect`: printed facts, lists of clips, and suggestions for misspelt keys."""

import csv
import io
import json
from pathlib import Path

import numpy as np
import pytest
from typer.testing import CliRunner

from cache_schema import ArraySpec, ClipMissing, StoreReader, StoreSettings, StoreWriter
from pipeline.cli import app
from pipeline.commands import inspect
from pipeline.commands.inspect import similar_keys
from pipeline.commands.inspect_list import list_clips
from pipeline.config.load import NOT_GIVEN, ConfigError, load_config
from stages.progress import SilentProgress
from tests.fingerprints import fingerprint_of

QUIET = SilentProgress()
FRAMES = 9
CUT = {"num_frames": FRAMES, "height": 32, "width": 48, "fps": 12.0, "frames": "in words"}
TRACKS = {
    "walk/0001": {"quality": 0.91, "valid_frames": 9, "lost_at": None},
    "walk/0002": {"quality": 0.25, "valid_frames": 4, "lost_at": 4},
    "run/0001": {"quality": None, "valid_frames": 8, "lost_at": None},
}


def attributes(**changes):
    prompt = {"source": "dataset", "kinds": ["mask"], "frame": 0, "confidence": None}
    return {"num_frames": FRAMES, "prompt": prompt} | changes


@pytest.fixture
def store(tmp_path):
    features = np.random.default_rng(0).standard_normal((FRAMES, 2, 3, 8)).astype(np.float16)
    spec = ArraySpec(dtype="float16", shape=features.shape, dimension_names=tuple("thwc"))
    valid = ArraySpec(dtype="uint8", shape=(FRAMES,), dimension_names=("t",))
    settings = StoreSettings(
        kind="teacher", arrays={"features": spec, "valid": valid}, values={"clips": CUT}
    )
    made = {"sam2videox": "0.1.0", "date": "2026-01-02T03:04:05+00:00", "commit": "c" * 40}
    writer = StoreWriter.open(tmp_path / "cache", settings, provenance=made)
    with writer.shard("00000", source="00000.tar") as shard:
        for key, track in TRACKS.items():
            arrays = {"features": features, "valid": np.ones(FRAMES, np.uint8)}
            shard.add(key, arrays, attributes(**track), fingerprint=fingerprint_of(key))
        gone = {"fingerprint": fingerprint_of("walk/0003")}
        shard.skip("walk/0003", "too_short", "3 frames", **gone)
        shard.commit()
    return writer.path


@pytest.fixture
def config(tmp_path, store):
    settings = [f"cache={tmp_path}/cache", f"outputs={tmp_path}/outputs"]
    return load_config(None, settings, needed=())


def run(*arguments):
    return CliRunner().invoke(app, ["inspect", *map(str, arguments)])


def test_ten_facts_and_the_picture_at_the_end(config):
    answer = inspect.run(config, QUIET)
    assert len(answer.rows) <= 10
    rows = dict(answer.rows)
    assert rows["clips"] == "3, and 1 skipped (1 too_short)"
    assert rows["each clip"] == "features float16 [9, 2, 3, 8], valid uint8 [9]"
    assert rows["made"] == "2026-01-02 03:04, sam2videox 0.1.0"
    assert rows["clip"] == "run/0001"
    assert rows["  track"] == "prompt: dataset mask on frame 0, 8 of 9 frames valid"
    assert "c" * 40 not in json.dumps(answer.rows)
    assert answer.notes[-2:] == [answer.data["picture"], answer.data["video"]]
    assert Path(answer.data["picture"]).is_file()


def test_everything_is_there_for_the_asking(config):
    rows = dict(inspect.run(config, QUIET, verbose=True).rows)
    assert "c" * 40 in rows["made with"]
    assert json.loads(rows["  clips"]) == CUT
    assert json.loads(rows["  attributes"])["valid_frames"] == 8


def test_a_store_is_drawn_at_its_own_size_without_a_configuration(config):
    """The settings say 49 frames of 480x720; the store 9 frames at 12 a second."""
    assert str(config.data.path) == NOT_GIVEN
    answer = inspect.run(config, QUIET)
    assert any("no dataset at (not given)" in note for note in answer.notes)


def test_masks_need_their_frames(config, store):
    with pytest.raises(ConfigError, match=r"set data\.path=… or --config"):
        inspect._overlays(config, QUIET, StoreReader(store), (), Path())


@pytest.mark.parametrize(
    ("wanted", "near"),
    [
        ("0002", "did you mean walk/0002?"),
        ("walk/002", "did you mean walk/0002"),
        ("WALK/0001", "did you mean walk/0001?"),
        ("walk/0003", "it was skipped as too_short"),
        ("zebra", "inspect --list prints every clip"),
    ],
)
def test_an_unknown_clip_suggests_near_ones(store, wanted, near):
    said = run(store, "--clip", wanted)
    assert said.exit_code == 1
    assert near in " ".join(said.stderr.split())


def test_many_keys_are_searched_for_words_alone():
    keys = [f"clip/{number:06d}" for number in range(30_000)]
    assert similar_keys("029999", keys) == ["clip/029999"]
    assert similar_keys("clip-029999", keys) == []


class TestList:
    """One line a clip."""

    def test_clips_with_quality_lost_frames_and_prompt(self, store):
        lines = run(store, "--list").stdout.splitlines()
        assert lines == [
            f"3 clips in {store.name}, and 1 skipped: 1 too_short",
            "clip       quality  valid  lost  lost_at  prompt        shard",
            "walk/0001  0.91     9      0     -        dataset mask  00000",
            "walk/0002  0.25     4      5     4        dataset mask  00000",
            "run/0001   -        8      1     -        dataset mask  00000",
        ]

    @pytest.mark.parametrize(
        ("sort", "order"),
        [
            (None, ["walk/0001", "walk/0002", "run/0001"]),
            ("quality", ["walk/0002", "walk/0001", "run/0001"]),
            ("-quality", ["walk/0001", "walk/0002", "run/0001"]),
            ("-lost", ["walk/0002", "run/0001", "walk/0001"]),
            ("clip", ["run/0001", "walk/0001", "walk/0002"]),
            ("lost_at", ["walk/0002", "walk/0001", "run/0001"]),
        ],
    )
    def test_is_sorted_with_the_unknown_last(self, store, sort, order):
        answer = list_clips(StoreReader(store), sort=sort, as_csv=False)
        assert [clip["clip"] for clip in answer.data["clips"]] == order

    def test_csv_is_all_there_is_on_stdout(self, store):
        rows = list(csv.DictReader(io.StringIO(run(store, "--list", "--csv").stdout)))
        assert [row["clip"] for row in rows] == list(TRACKS)
        assert rows[1] == {
            "clip": "walk/0002",
            "quality": "0.25",
            "valid": "4",
            "lost": "5",
            "lost_at": "4",
            "prompt": "dataset mask",
            "confidence": "",
            "shard": "00000",
        }

    def test_json_has_the_skipped_clips_too(self, store):
        data = json.loads(run(store, "--list", "--json").stdout)
        assert [clip["clip"] for clip in data["clips"]] == list(TRACKS)
        assert [clip["key"] for clip in data["skipped"]] == ["walk/0003"]

    @pytest.mark.parametrize(
        ("arguments", "words"),
        [
            (["--list", "--sort", "qualty"], "there are clip, quality"),
            (["--list", "--clip", "walk/0001"], "--list draws nothing"),
            (["--list", "--all"], "--list draws nothing"),
            (["--sort", "quality"], "need --list"),
            (["--csv"], "need --list"),
            (["--list", "--csv", "--json"], "exclude each other"),
        ],
    )
    def test_what_does_not_go_together_is_bad_usage(self, store, arguments, words):
        said = run(store, *arguments)
        assert said.exit_code == 2
        assert words in " ".join(said.stderr.replace("│", " ").split())

    def test_a_store_without_tracks_lists_its_clips(self, tmp_path):
        spec = ArraySpec(dtype="float16", shape=(2, 2), dimension_names=("l", "d"))
        settings = StoreSettings(kind="text", arrays={"embeds": spec}, values={})
        writer = StoreWriter.open(tmp_path / "text", settings, provenance={})
        with writer.shard("00000", source="00000.tar") as shard:
            embeds = {"embeds": np.zeros((2, 2), np.float16)}
            shard.add("a", embeds, {"caption": "x"}, fingerprint=fingerprint_of("a"))
            shard.commit()
        lines = run(writer.path, "--list").stdout.splitlines()
        assert lines[1:] == ["clip  shard", "a     00000"]


def test_raises_what_the_store_raises(config):
    with pytest.raises(ClipMissing) as caught:
        inspect.run(config, QUIET, clip="walk/2")
    assert caught.value.__notes__
