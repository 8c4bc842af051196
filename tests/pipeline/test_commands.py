"""What each command hands to its stage, and what it makes of the stage's summary."""

import json
import sys
import types
from dataclasses import asdict
from pathlib import Path

import numpy as np
import pytest

from cache_schema import (
    ArraySpec,
    CacheError,
    SkippedClip,
    StoreNotFound,
    StoreSettings,
    StoreWriter,
)
from pipeline.commands import extract, inspect, train
from pipeline.config.load import ConfigError, load_config
from stages.extract_features.summary import ExtractSummary, KindSummary
from stages.inspect_cache.drawing import Drawing
from stages.progress import SilentProgress
from stages.train_student.logging.rows import LossRow, PerformanceRow, ValidationRow
from stages.train_student.summary import TrainSummary
from tests.fingerprints import fingerprint_of

QUIET = SilentProgress()


@pytest.fixture
def config(minimal, tmp_path):
    return load_config(
        minimal,
        [
            f"cache={tmp_path}/cache",
            f"outputs={tmp_path}/outputs",
            f"train.run_dir={tmp_path}/runs/one",
            "data.num_frames=9",
            "data.height=32",
            "data.width=48",
        ],
    )


def replace_stage(monkeypatch, module, **functions):
    """Stand in for a stage's module without loading it."""
    monkeypatch.setitem(sys.modules, module, types.SimpleNamespace(**functions))


class TestExtract:
    @pytest.fixture
    def calls(self, monkeypatch):
        calls = []
        skipped = tuple(
            SkippedClip(
                key=f"clip/{n}",
                reason="too_short",
                detail="3 frames",
                fingerprint="0" * 32,
                shard="00000",
            )
            for n in range(30)
        )
        kind = KindSummary(
            kind="teacher",
            bucket=None,
            store=Path("cache/teacher-0"),
            clips_written=60,
            clips_already_there=10,
            skipped=skipped,
            seconds=90.0,
            bytes=67_700_000,
            captions_cut=2,
        )

        def stage(*sections, **options):
            calls.append((sections, options))
            return ExtractSummary(
                kinds=(kind,), dataset="one", failures=Path("cache/failures.jsonl")
            )

        replace_stage(monkeypatch, "stages.extract_features.run", extract_features=stage)
        return calls

    def test_the_stage_gets_its_sections_and_this_processes_share(self, config, calls, monkeypatch):
        monkeypatch.setenv("RANK", "2")
        monkeypatch.setenv("WORLD_SIZE", "4")
        extract.run(config, QUIET)
        ((sections, options),) = calls
        assert sections == (config.extract, config.data, config.model, config.cache_folder)
        assert (options["rank"], options["world_size"]) == (2, 4)
        assert options["provenance"]["libraries"]["torch"]
        assert options["retry_failed"] is False

    def test_retrying_is_passed_on(self, config, calls):
        extract.run(config, QUIET, retry_failed=True)
        assert calls[0][1]["retry_failed"] is True

    def test_skipped_clips_are_counted_by_reason_and_listed(self, config, calls):
        answer = extract.run(config, QUIET)
        rows = dict(answer.rows)
        assert rows["  clips"] == "60 written, 10 already there"
        assert rows["  skipped"] == "30 (30 too_short)"
        assert answer.notes[0] == "teacher skipped clip/0: too_short (3 frames)"
        assert "and 10 more" in answer.notes[20]
        assert answer.notes[22] == "all skipped clips, one per line: cache/failures.jsonl"
        assert "text encoder's length: 2" in answer.notes[21]
        assert answer.data["failures"] == "cache/failures.jsonl"
        assert len(answer.data["teacher"]["skipped"]) == 30
        json.dumps(answer.data)

    @pytest.mark.parametrize(("limit", "exit_code"), [(0.2, 3), (0.3, 0), (0.5, 0)])
    def test_more_skipped_clips_than_allowed_exit_with_3(self, config, calls, limit, exit_code):
        section = config.extract.model_copy(update={"max_skipped": limit})
        answer = extract.run(config.model_copy(update={"extract": section}), QUIET)
        assert answer.exit_code == exit_code
        assert any("extract.max_skipped" in note for note in answer.notes) == bool(exit_code)


class TestTrain:
    @pytest.fixture
    def summary(self, config):
        def row(step, loss, auxiliary):
            return LossRow(
                step=step,
                loss=loss,
                diffusion=0.5,
                auxiliary=auxiliary,
                grad_norm=1.0,
                lr=1e-4,
                by_timestep={"count": [0] * 10},
            )

        lgf = {"lgf": 1.0}
        return lambda auxiliary=lgf, **changes: TrainSummary(
            **{
                "run_dir": config.train.run_dir,
                "steps_done": 20,
                "resumed_from": None,
                "first": row(1, 2.0, auxiliary),
                "last": row(20, 1.0, auxiliary),
                "skipped_steps": 0,
                "damaged_clips": 0,
                "gone_clips": 0,
                "seconds_per_step": 0.5,
                "peak_memory_bytes": 10**9,
                "export": config.train.run_dir / "export",
                "clips": 24,
                "left_out": {"teacher": 0, "latents": 2},
                "left_out_by_name": 3,
                "already_finished": False,
            }
            | changes
        )

    def answer(self, monkeypatch, config, summary):
        calls = []

        def stage(*sections, **options):
            calls.append((sections, options))
            return summary

        replace_stage(monkeypatch, "stages.train_student.train", train_student=stage)
        config.train.run_dir.mkdir(parents=True, exist_ok=True)
        (config.train.run_dir / "run.json").write_text("{}")
        return train.run(config, QUIET), calls

    def write(self, config, name, rows):
        config.train.run_dir.mkdir(parents=True, exist_ok=True)
        lines = "".join(json.dumps(row) + "\n" for row in rows)
        (config.train.run_dir / f"{name}.jsonl").write_text(lines)

    def test_the_stage_gets_its_sections_and_the_resolved_configuration(
        self, monkeypatch, config, summary
    ):
        _, ((sections, options),) = self.answer(monkeypatch, config, summary())
        assert sections == (config.train, config.data, config.model, config.cache_folder)
        assert type(config).model_validate(options["resolved_config"]) == config
        assert "arguments" in options["provenance"]

    def test_losses_and_rates_are_those_of_the_runs_page(self, monkeypatch, config, summary):
        seen = {0: (0.5, 0.4), 10: (0.4, 0.1), 20: (0.3, 0.2)}
        curves = {"timestep": [500], "diffusion": [0.1], "lgf": [0.1]}
        self.write(
            config,
            "validation",
            [
                asdict(
                    ValidationRow(
                        step=step,
                        clips=2,
                        diffusion=loss,
                        auxiliary={"lgf": lgf},
                        by_timestep=curves,
                    )
                )
                for step, (loss, lgf) in seen.items()
            ],
        )
        speeds = [
            asdict(
                PerformanceRow(
                    step=step,
                    seconds=seconds,
                    wait_seconds=0.0,
                    clips_per_second=4 / seconds,
                    peak_memory_bytes=1,
                    share_of_peak=None,
                )
            )
            for step, seconds in ((1, 3.0), (2, 1.0))
        ]
        self.write(config, "performance", speeds)
        answer, _ = self.answer(monkeypatch, config, summary())
        rows = dict(answer.rows)
        assert rows["held-out diffusion loss"] == "0.3000 (0.5000 before training)"
        assert rows["held-out lgf loss"].endswith("lowest 0.1000 at step 10, and risen since)")
        assert rows["a step"].startswith("2.00 s (mean; 4.00 s for 2 steps")
        assert answer.data["figures"]["clips a second"]["value"] == "2.000"
        assert "loss" not in rows
        assert (
            rows["clips"] == "24; not in every store: 2 of latents; 3 left out by train.leave_out"
        )

    def test_plain_fine_tuning_has_no_auxiliary_row(self, monkeypatch, config, summary):
        answer, _ = self.answer(monkeypatch, config, summary(auxiliary={}))
        assert {"lgf", "skipped steps", "damaged clips"}.isdisjoint(dict(answer.rows))
        assert answer.data["last"]["auxiliary"] == {}

    def test_skipped_steps_and_damaged_clips_are_told(self, monkeypatch, config, summary):
        answer, _ = self.answer(
            monkeypatch, config, summary(skipped_steps=2, damaged_clips=1, gone_clips=3)
        )
        rows = dict(answer.rows)
        assert (
            rows["skipped steps"].startswith("2, ")
            and "skipped_steps.jsonl" in rows["skipped steps"]
        )
        assert (
            rows["damaged clips"].startswith("1, ")
            and "damaged_clips.jsonl" in rows["damaged clips"]
        )
        assert rows["gone clips"].startswith("3, ")
        assert (answer.data["skipped_steps"], answer.data["damaged_clips"]) == (2, 1)

    def test_a_run_that_skipped_every_step_has_no_losses(self, monkeypatch, config, summary):
        nothing = summary(first=None, last=None, skipped_steps=20)
        answer, _ = self.answer(monkeypatch, config, nothing)
        assert not answer.data["figures"]
        assert answer.data["first"] is None
        json.dumps(answer.data)

    @pytest.mark.parametrize(
        ("changes", "text"),
        [
            ({"resumed_from": 10}, "20, resumed after 10"),
            ({"already_finished": True, "seconds_per_step": None}, "20, finished before"),
        ],
    )
    def test_a_run_that_went_on_says_from_where(self, monkeypatch, config, summary, changes, text):
        answer, _ = self.answer(monkeypatch, config, summary(**changes))
        assert dict(answer.rows)["steps"] == text
        json.dumps(answer.data)


class TestInspect:
    @pytest.fixture
    def store(self, config):
        def write(kind, values, name="features", axes="thwc", keys=("walk/[7]",), note=1):
            spec = ArraySpec(
                dtype=str(values.dtype), shape=values.shape, dimension_names=tuple(axes)
            )
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
                shard.skip(
                    "walk/[8]", "too_short", "3 frames", fingerprint=fingerprint_of("walk/[8]")
                )
                shard.commit()
            return writer.path

        return write

    @pytest.fixture
    def features(self):
        return np.random.default_rng(0).standard_normal((9, 2, 3, 8)).astype(np.float16)

    def test_the_manifest_and_the_clip_are_told_and_drawn(self, config, store, features):
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

    def test_a_store_is_found_by_kind_folder_or_path(self, config, store, features):
        path = store("teacher", features)
        for name in ("teacher", path.name, str(path)):
            assert inspect.run(config, QUIET, store=name).data["store"] == str(path)

    def test_one_of_several_stores_is_chosen_by_the_setting(self, config, store, features):
        first, second = store("teacher", features, note=1), store("teacher", features, note=2)
        with pytest.raises(CacheError, match=r"several teacher stores .*train\.stores\.teacher"):
            inspect.run(config, QUIET)
        section = config.train.model_copy(update={"stores": {"teacher": (second.name,)}})
        chosen = inspect.run(config.model_copy(update={"train": section}), QUIET)
        assert chosen.data["store"] == str(second) != str(first)

    def test_all_clips_are_drawn_when_asked_for(self, config, store, features):
        store("teacher", features, keys=("walk/1", "walk/2"))
        answer = inspect.run(config, QUIET, every_clip=True)
        assert [drawn["key"] for drawn in answer.data["drawings"]] == ["walk/1", "walk/2"]
        for drawn in answer.data["drawings"]:
            assert Path(drawn["picture"]).is_file()
            assert drawn["video"] in answer.notes
        assert answer.data["picture"] == answer.data["drawings"][0]["picture"]

    def test_an_overlay_gets_the_store_the_clips_and_their_dataset(
        self, config, store, features, monkeypatch, tmp_path
    ):
        calls = []

        def draw(reader, keys, **options):
            calls.append((reader.path, keys, options))
            for key in keys:
                yield Drawing(
                    key=key, picture=tmp_path / "a.png", video=tmp_path / "a.mp4", notes=("dim",)
                )

        replace_stage(monkeypatch, "stages.inspect_cache.overlay", draw_overlay=draw)
        monkeypatch.setattr("stages.clips.open_dataset", lambda clips: (clips, "opened"))
        path = store("masks", np.zeros((9, 8, 12), np.uint8), name="forward", axes="thw")
        answer = inspect.run(config, QUIET, store="masks", overlay=True, out=tmp_path)
        ((drawn, keys, options),) = calls
        assert (drawn, keys, options["out_dir"]) == (path, ("walk/[7]",), tmp_path)
        assert options["dataset"] == (options["clips"], "opened") == (config.data, "opened")
        assert answer.notes[-3:] == ["dim", str(tmp_path / "a.png"), str(tmp_path / "a.mp4")]

    def test_a_gram_flow_store_is_told_and_drawn(self, config, store):
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
    def test_by_default_it_looks_at_what_training_reads(self, config, form, overlay, kind):
        train = config.train.model_copy(update={"teacher_form": form})
        config = config.model_copy(update={"train": train})
        with pytest.raises(StoreNotFound, match=f"no {kind} store"):
            inspect.run(config, QUIET, overlay=overlay)

    def test_only_masks_are_laid_over_frames(self, config, store, features):
        store("teacher", features)
        with pytest.raises(ConfigError, match="--overlay draws a masks store"):
            inspect.run(config, QUIET, store="teacher", overlay=True)

    def test_text_is_told_but_not_drawn(self, config, store):
        store("text", np.zeros((4, 8), np.float16), name="embeds", axes="ld")
        answer = inspect.run(config, QUIET, store="text")
        assert answer.notes[-1] == "a text store cannot be drawn by itself"
        assert "picture" not in answer.data

    def test_a_store_where_every_clip_was_skipped_is_told(self, config, store, features):
        store("teacher", features, keys=())
        answer = inspect.run(config, QUIET)
        assert answer.data["clips"] == 0
        assert "clip" not in answer.data

    @pytest.mark.parametrize("store", ["/", "teachr", "teacher-0123"])
    def test_what_is_no_store_is_bad_usage(self, config, store):
        with pytest.raises(ConfigError, match=r"neither a kind of store \(text, lat"):
            inspect.run(config, QUIET, store=store)

    def test_a_kind_that_was_not_extracted_names_the_command(self, config):
        with pytest.raises(CacheError, match="run sam2vx-pipeline extract-features"):
            inspect.run(config, QUIET)
