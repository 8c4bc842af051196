"""Arguments that commands pass to their stage, and their output for the stage's summary."""

import json
from dataclasses import asdict
from pathlib import Path

import pytest

from cache_schema import (
    SkippedClip,
)
from pipeline.commands import extract, train
from stages.extract_features.summary import ExtractSummary, KindSummary
from stages.progress import SilentProgress
from stages.train_student.logging.rows import LossRow, PerformanceRow, ValidationRow
from stages.train_student.train import TrainSummary

QUIET = SilentProgress()


class TestExtract:
    @pytest.fixture
    def calls(self, replace_stage):
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

        replace_stage("stages.extract_features.run", extract_features=stage)
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
                "excluded": {"teacher": 0, "latents": 2},
                "excluded_by_name": 3,
                "already_finished": False,
            }
            | changes
        )

    def answer(self, replace_stage, config, summary):
        calls = []

        def stage(*sections, **options):
            calls.append((sections, options))
            return summary

        replace_stage("stages.train_student.train", train_student=stage)
        config.train.run_dir.mkdir(parents=True, exist_ok=True)
        (config.train.run_dir / "run.json").write_text("{}")
        return train.run(config, QUIET), calls

    def write(self, config, name, rows):
        config.train.run_dir.mkdir(parents=True, exist_ok=True)
        lines = "".join(json.dumps(row) + "\n" for row in rows)
        (config.train.run_dir / f"{name}.jsonl").write_text(lines)

    def test_the_stage_gets_its_sections_and_the_resolved_configuration(
        self, replace_stage, config, summary
    ):
        _, ((sections, options),) = self.answer(replace_stage, config, summary())
        assert sections == (config.train, config.data, config.model, config.cache_folder)
        assert type(config).model_validate(options["resolved_config"]) == config
        assert "arguments" in options["provenance"]

    def test_losses_and_rates_are_those_of_the_runs_page(self, replace_stage, config, summary):
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
        answer, _ = self.answer(replace_stage, config, summary())
        rows = dict(answer.rows)
        assert rows["held-out diffusion loss"] == "0.3000 (0.5000 before training)"
        assert rows["held-out lgf loss"].endswith("lowest 0.1000 at step 10, and risen since)")
        assert rows["a step"].startswith("2.00 s (mean; 4.00 s for 2 steps")
        assert answer.data["figures"]["clips a second"]["value"] == "2.000"
        assert "loss" not in rows
        assert (
            rows["clips"] == "24; not in every store: 2 of latents; 3 left out by train.leave_out"
        )

    def test_plain_fine_tuning_has_no_auxiliary_row(self, replace_stage, config, summary):
        answer, _ = self.answer(replace_stage, config, summary(auxiliary={}))
        assert {"lgf", "skipped steps", "damaged clips"}.isdisjoint(dict(answer.rows))
        assert answer.data["last"]["auxiliary"] == {}

    def test_skipped_steps_and_damaged_clips_are_told(self, replace_stage, config, summary):
        answer, _ = self.answer(
            replace_stage, config, summary(skipped_steps=2, damaged_clips=1, gone_clips=3)
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

    def test_a_run_that_skipped_every_step_has_no_losses(self, replace_stage, config, summary):
        nothing = summary(first=None, last=None, skipped_steps=20)
        answer, _ = self.answer(replace_stage, config, nothing)
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
    def test_a_run_that_went_on_says_from_where(
        self, replace_stage, config, summary, changes, text
    ):
        answer, _ = self.answer(replace_stage, config, summary(**changes))
        assert dict(answer.rows)["steps"] == text
        json.dumps(answer.data)
