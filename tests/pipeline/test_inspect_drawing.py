"""`inspect`: which store and clips are drawn, and what is printed."""

import json
from pathlib import Path

import numpy as np
import pytest

from cache_schema import (
    ArraySpec,
    CacheError,
    StoreNotFound,
    StoreSettings,
    StoreWriter,
)
from pipeline.commands import inspect
from pipeline.config.load import ConfigError
from pipeline.failures import error_text
from stages.inspect_cache.drawing import Drawing
from stages.progress import SilentProgress
from tests.fingerprints import fingerprint_of

QUIET = SilentProgress()


@pytest.fixture
def store(config):
    def write(kind, values, name="features", axes="thwc", keys=("walk/[7]",), note=1):
        spec = ArraySpec(dtype=str(values.dtype), shape=values.shape, dimension_names=tuple(axes))
        valid = ArraySpec(dtype="uint8", shape=values.shape[:1], dimension_names=("t",))
        specs = {name: spec, "valid": valid}
        settings = StoreSettings(kind=kind, arrays=specs, values={"note": note})
        writer = StoreWriter.open(config.cache_folder, settings, provenance={"by": "a test"})
        with writer.shard("00000", source="00000.tar") as shard:
            for key in keys:
                seen = np.ones(len(values), np.uint8)
                shard.add(
                    key,
                    {name: values, "valid": seen},
                    {"fps": 8},
                    fingerprint=fingerprint_of(key),
                )
            shard.skip("walk/[8]", "too_short", "3 frames", fingerprint=fingerprint_of("walk/[8]"))
            shard.commit()
        return writer.path

    return write


@pytest.fixture
def features():
    return np.random.default_rng(0).standard_normal((9, 2, 3, 8)).astype(np.float16)


def test_the_manifest_and_the_clip_are_told_and_drawn(config, store, features):
    path = store("teacher", features)
    answer = inspect.run(config, QUIET, verbose=True)
    rows = dict(answer.rows)
    assert rows["array features"] == "float16 [t 9, h 2, w 3, c 8]"
    assert rows["clips"] == "1, and 1 skipped"
    assert rows["clip"] == "walk/[7]"
    assert "teacher skipped walk/[8]: too_short (3 frames)" in answer.notes
    assert answer.data["keys"] == ["walk/[7]"]
    assert answer.data["clip"]["attributes"] == {"fps": 8}
    for made in (answer.data["picture"], answer.data["video"]):
        assert Path(made).is_file()
        assert made in answer.notes
        assert Path(made).parent == config.outputs / path.name
    json.dumps(answer.data)


def test_a_store_is_found_by_kind_folder_or_path(config, store, features):
    path = store("teacher", features)
    for name in ("teacher", path.name, str(path)):
        assert inspect.run(config, QUIET, store=name).data["store"] == str(path)


def test_one_of_several_stores_is_chosen_by_the_setting(config, store, features):
    first, second = store("teacher", features, note=1), store("teacher", features, note=2)
    with pytest.raises(CacheError, match="several teacher stores "):
        inspect.run(config, QUIET)
    section = config.train.model_copy(update={"stores": {"teacher": (second.name,)}})
    chosen = inspect.run(config.model_copy(update={"train": section}), QUIET)
    assert chosen.data["store"] == str(second) != str(first)


def test_all_clips_are_drawn_when_asked_for(config, store, features):
    store("teacher", features, keys=("walk/1", "walk/2"))
    answer = inspect.run(config, QUIET, every_clip=True)
    assert [drawn["key"] for drawn in answer.data["drawings"]] == ["walk/1", "walk/2"]
    for drawn in answer.data["drawings"]:
        assert Path(drawn["picture"]).is_file()
        assert drawn["video"] in answer.notes
    assert answer.data["picture"] == answer.data["drawings"][0]["picture"]


def test_an_overlay_gets_the_store_the_clips_and_their_dataset(
    config, store, features, replace_stage, monkeypatch, tmp_path
):
    calls = []

    def draw(reader, keys, **options):
        calls.append((reader.path, keys, options))
        for key in keys:
            yield Drawing(
                key=key, picture=tmp_path / "a.png", video=tmp_path / "a.mp4", notes=("dim",)
            )

    replace_stage("stages.inspect_cache.overlay", draw_overlay=draw)
    monkeypatch.setattr("stages.clips.open_dataset", lambda clips: (clips, "opened"))
    path = store("masks", np.zeros((9, 8, 12), np.uint8), name="forward", axes="thw")
    answer = inspect.run(config, QUIET, store="masks", overlay=True, out=tmp_path)
    ((drawn, keys, options),) = calls
    assert (drawn, keys, options["out_dir"]) == (path, ("walk/[7]",), tmp_path)
    assert options["dataset"] == (options["clips"], "opened") == (config.data, "opened")
    assert answer.notes[-3:] == ["dim", str(tmp_path / "a.png"), str(tmp_path / "a.mp4")]


def test_a_gram_flow_store_is_told_and_drawn(config, store):
    flow = np.random.default_rng(0).standard_normal((8, 2, 3, 9)).astype(np.float16)
    valid = ArraySpec(dtype="uint8", shape=(9,), dimension_names=("t",))
    spec = ArraySpec(
        dtype="float16",
        shape=flow.shape,
        dimension_names=("p", "h", "w", "k"),
        compression="blosc-zstd-shuffle",
    )
    arrays = {"gram_flow": spec, "valid": valid}
    settings = StoreSettings(kind="gram_flow", arrays=arrays, values={})
    writer = StoreWriter.open(config.cache_folder, settings, provenance={})
    with writer.shard("00000", source="00000.tar") as shard:
        shard.add(
            "walk/7",
            {"gram_flow": flow, "valid": np.ones(9, np.uint8)},
            fingerprint=fingerprint_of("walk/7"),
        )
        shard.commit()
    answer = inspect.run(config, QUIET, store="gram_flow", verbose=True)
    told = "float16 [p 8, h 2, w 3, k 9], blosc-zstd-shuffle"
    assert dict(answer.rows)["array gram_flow"] == told
    assert answer.data["arrays"]["gram_flow"]["compression"] == "blosc-zstd-shuffle"
    assert "flow of radius 1, the largest stored" in answer.notes
    assert Path(answer.data["picture"]).is_file()


@pytest.mark.parametrize(
    ("form", "overlay", "kind"),
    [
        ("features", False, "teacher"),
        ("gram_flow", False, "gram_flow"),
        ("features", True, "masks"),
    ],
)
def test_by_default_it_looks_at_what_training_reads(config, form, overlay, kind):
    train = config.train.model_copy(update={"teacher_form": form})
    config = config.model_copy(update={"train": train})
    with pytest.raises(StoreNotFound, match=f"no {kind} store"):
        inspect.run(config, QUIET, overlay=overlay)


def test_only_masks_are_laid_over_frames(config, store, features):
    store("teacher", features)
    with pytest.raises(ConfigError, match="--overlay draws a masks store"):
        inspect.run(config, QUIET, store="teacher", overlay=True)


def test_text_is_told_but_not_drawn(config, store):
    store("text", np.zeros((4, 8), np.float16), name="embeds", axes="ld")
    answer = inspect.run(config, QUIET, store="text")
    assert answer.notes[-1] == "a text store cannot be drawn by itself"
    assert "picture" not in answer.data


def test_a_store_where_every_clip_was_skipped_is_told(config, store, features):
    store("teacher", features, keys=())
    answer = inspect.run(config, QUIET)
    assert answer.data["clips"] == 0
    assert "clip" not in answer.data


@pytest.mark.parametrize("store", ["/", "teachr", "teacher-0123"])
def test_what_is_no_store_is_bad_usage(config, store):
    with pytest.raises(ConfigError, match=r"neither a kind of store \(text, lat"):
        inspect.run(config, QUIET, store=store)


def test_a_kind_that_was_not_extracted_names_the_command(config):
    with pytest.raises(CacheError) as caught:
        inspect.run(config, QUIET)
    assert "run sam2vx-pipeline extract-features" in error_text(caught.value)
