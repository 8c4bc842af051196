"""The comparison's plan, settings, estimates and report, on made-up results."""

import json
import math
import zlib
from dataclasses import replace

import numpy as np
import pytest
from diffusers import DiffusionPipeline
from hypothesis import given
from hypothesis import strategies as st

from pipeline.config.load import load_config
from stages.clips import read_video
from tests.benchmarks.evidence import data
from tests.benchmarks.evidence.arms import ARMS
from tests.benchmarks.evidence.data import draw_faster_clip, prepare, seeds_of
from tests.benchmarks.evidence.estimates import (
    STRUCTURE_SCORES,
    difference,
    structure_change,
    structure_errors,
)
from tests.benchmarks.evidence.plan import TUNING_SEED, arms_of, chosen_weight, next_runs
from tests.benchmarks.evidence.report import SCORES, write_report
from tests.benchmarks.evidence.runs import _CONFIG, Run, overrides, rows_of, take_rows
from tests.benchmarks.evidence.sizes import SIZES, BaseModels

DEFAULT = SIZES["default"]
SMALL = replace(DEFAULT, test_clips=4, tuning_clips=3, seeds=(0, 1))


def row_of(run, values=None, *, clips=5, **more):
    """A made-up result; `values` replaces scores of all videos."""
    random = np.random.default_rng(zlib.crc32(run.name.encode()))
    videos = {
        f"{number:04d}": {score: float(random.uniform(0.1, 0.9)) for score in SCORES}
        | (values or {})
        for number in range(clips)
    }
    return {
        "name": run.name,
        "arm": run.arm if isinstance(run.arm, str) else run.arm.name,
        "part": run.part,
        "seed": run.seed,
        "weight": run.weight,
        "steps": run.steps,
        "videos": videos,
        "motion_distance": {"value": 0.1},
        "validation": {"diffusion": 0.3},
        "seconds_per_step": 1.0,
        **more,
    }


def make_all(size, arms, make=row_of):
    """Make runs as the plan asks for them until none is left: the rows, and the names by phase."""
    rows, phases = {}, []
    while runs := next_runs(size, arms, rows):
        phases.append([run.name for run in runs])
        assert not set(phases[-1]) & rows.keys()
        rows |= {run.name: make(run) for run in runs}
    return rows, phases


@pytest.mark.parametrize("size", SIZES)
def test_the_settings_of_every_arm_are_valid(size, tmp_path):
    for arm in ARMS:
        run = Run(arm=arm, weight=None if arm.weight is None else 2.0, steps=30)
        config = load_config(str(_CONFIG), overrides(run, tmp_path, SIZES[size]))
        if arm.weight is not None:
            (objective,) = config.train.objectives
            assert config.train.settings_of(objective).weight == 2.0
        assert str(tmp_path) in config.extract.teacher.checkpoint


def test_all_arms_are_scored_with_the_same_settings(tmp_path):
    def scoring(run):
        config = load_config(str(_CONFIG), overrides(run, tmp_path, DEFAULT, scoring=True))
        return config.extract, config.evaluate, config.sample, config.train.lgf

    base = scoring(Run(arm="base"))
    for arm in ARMS:
        weight = None if arm.weight is None else 2.0
        assert scoring(Run(arm=arm, seed=0, weight=weight, steps=30)) == base, arm.name


def test_arms_differ_and_name_arms_that_are_there():
    settings = [
        (arm.train, arm.teacher, arm.tracker, arm.limbs, arm.group in ("full", "scratch"))
        for arm in ARMS
    ]
    assert len(set(settings)) == len(ARMS)
    assert {arm.weight_of for arm in ARMS} <= {arm.name for arm in ARMS} | {None}


def test_every_run_is_made_once_and_seeds_follow_each_other():
    rows, phases = make_all(DEFAULT, arms_of(DEFAULT), lambda run: row_of(run, clips=2))
    assert phases[0] == ["base-test", "base-tuning"]
    assert phases[1] == ["reconstruction-test"]
    assert all(f"-s{TUNING_SEED}-" in name for name in phases[2])
    of_seed = [{name.split("-s")[-1][0] for name in phase} for phase in phases[3:6]]
    assert of_seed == [{"0"}, {"1"}, {"2"}]
    scratch = [row["seed"] for row in rows.values() if row["arm"] == "scratch-lgf"]
    assert scratch == [seed for seed in DEFAULT.few_seeds for _ in DEFAULT.scratch_steps]
    assert {row["arm"] for row in rows.values()} == {
        "base",
        "reconstruction",
        *(arm.name for arm in ARMS),
    }


def test_a_run_from_random_weights_goes_on_from_its_last_score():
    arms = arms_of(DEFAULT, ["scratch-none"])
    _, phases = make_all(DEFAULT, arms, lambda run: row_of(run, clips=2))
    assert phases[2:5] == [[f"scratch-none-s0-{steps}-test"] for steps in DEFAULT.scratch_steps]


def test_the_weight_is_that_of_the_least_structure_error():
    def make(run):
        error = {0.1: 0.6, 0.5: 0.2, 2.0: 0.4}.get(run.weight, 0.5)
        return row_of(run, dict.fromkeys(STRUCTURE_SCORES, error) | {"limb_presence": 1 - error})

    arms = arms_of(SMALL, ["none", "lgf", "block-1"])
    rows, _ = make_all(SMALL, arms, make)
    for arm in arms:
        assert chosen_weight(arm, SMALL, rows) == (None if arm.name == "none" else 0.5)


def test_an_unknown_arm_is_refused():
    with pytest.raises(ValueError, match="no arm lgg; there are none, lgf"):
        arms_of(SIZES["smoke"], ["lgg"])


def test_clips_of_different_parts_and_of_the_models_training_differ():
    seeds = {part: seeds_of(part, 3, DEFAULT) for part in ("train", "tuning", "test")}
    assert len({seed for some in seeds.values() for seed in some}) == 9
    captions = [draw_faster_clip(seed, DEFAULT).caption for seed in seeds["test"]]
    assert len(set(captions)) == 3


@pytest.mark.slow
def test_a_size_of_its_own_pixels_trains_its_models_first(tmp_path, monkeypatch):
    models = BaseModels(
        image_size=64,
        vae_steps=1,
        transformer_steps=1,
        tracker_steps=1,
        clips=2,
        held_out_clips=1,
        device="cpu",
    )
    size = replace(
        SIZES["smoke"], height=64, width=96, models=models, scratch_steps=(1,), test_clips=1
    )
    prepare(tmp_path, size)
    for name in ("base", "scratch-0"):
        pipeline = DiffusionPipeline.from_pretrained(tmp_path / "models" / name)
        assert pipeline.transformer.config.sample_width == 96 // 8
    assert {file.name for file in (tmp_path / "models" / "sam2").iterdir()} == {
        "tiny.yaml",
        "tiny.safetensors",
        "training.json",
        "random.safetensors",
    }
    frames_THWC, _ = read_video(tmp_path / "reconstructions" / "0000.mp4")
    assert frames_THWC.shape == (17, 64, 96, 3)
    monkeypatch.setattr(data, "_once", lambda folder, _: folder.stat())
    for script in (data.sam2, data.vae, data.transformer):
        monkeypatch.delattr(script, "train")
    prepare(tmp_path, size)  # nothing is missing


def test_differences_are_means_over_pairs_with_values():
    none, lgf = (arms_of(DEFAULT, [name])[0] for name in ("none", "lgf"))
    others = [row_of(Run(arm=none, seed=seed, steps=1)) for seed in (0, 1)]
    mine = [row_of(Run(arm=lgf, seed=seed, steps=1)) for seed in (0, 1)]
    mine[1]["videos"]["0002"]["joint_gap"] = None
    pairs = [
        row["videos"][key]["joint_gap"] - other["videos"][key]["joint_gap"]
        for row, other in zip(mine, others, strict=True)
        for key in row["videos"]
        if row["videos"][key]["joint_gap"] is not None
    ]
    found = difference(mine, others, "joint_gap")
    assert found.value == pytest.approx(sum(pairs) / 9)
    assert found.low <= found.value <= found.high


def test_the_interval_of_a_normal_difference_is_the_textbooks():
    """One seed and many videos: mean +- 1.96 standard errors."""
    none, lgf = (arms_of(DEFAULT, [name])[0] for name in ("none", "lgf"))
    others, mine = (
        row_of(Run(arm=arm, steps=1), {"joint_gap": 0.0}, clips=400) for arm in (none, lgf)
    )
    values = np.random.default_rng(5).normal(0.3, 1.0, 400)
    for video, value in zip(mine["videos"].values(), values, strict=True):
        video["joint_gap"] = float(value)
    found = difference([mine], [others], "joint_gap")
    error = 1.96 * values.std() / math.sqrt(400)
    assert found.low == pytest.approx(values.mean() - error, abs=0.15 * error)
    assert found.high == pytest.approx(values.mean() + error, abs=0.15 * error)


def test_there_is_no_interval_over_few_clips():
    none, lgf = (arms_of(DEFAULT, [name])[0] for name in ("none", "lgf"))
    others, mine = (
        row_of(Run(arm=arm, steps=1), {"joint_gap": gap}, clips=4)
        for arm, gap in ((none, 0.25), (lgf, 0.75))
    )
    found = difference([mine], [others], "joint_gap")
    assert (found.text(), found.is_decided) == ("+0.500", False)


@given(factor=st.floats(0.1, 3.0), size=st.floats(0.05, 0.3))
def test_a_structure_error_scaled_by_a_factor_changes_by_it(factor, size):
    none, lgf = (arms_of(DEFAULT, [name])[0] for name in ("none", "lgf"))

    def errors(value):
        return dict.fromkeys(STRUCTURE_SCORES, value) | {"limb_presence": 1 - value}

    base = row_of(Run(arm="base"), errors(0.5))
    others = row_of(Run(arm=none, steps=1), errors(size))
    mine = row_of(Run(arm=lgf, steps=1), errors(factor * size))
    assert structure_errors([base], base) == pytest.approx(1)
    found = structure_change([mine], [others], base)
    assert (found.value, found.low, found.high) == pytest.approx((factor - 1,) * 3)


def test_the_report_compares_arms_over_the_seeds_that_both_have(tmp_path):
    names = ["none", "lgf", "lgf-random-tracker", "block-1", "scratch-none", "scratch-lgf"]
    arms = arms_of(SMALL, names)
    rows, _ = make_all(SMALL, arms)
    del rows[next(name for name in rows if name.startswith("lgf-w") and "-s1-" in name)]
    page = write_report(tmp_path, rows, SMALL, machine="a processor", name="small")
    text = page.read_text()
    of_lgf = [line.split(" | ") for line in text.splitlines() if line.startswith("| lgf: ")]
    assert [cells[2] for cells in of_lgf] == ["1", "1"]
    assert of_lgf[1][3].endswith("of the base model's"), "block-1 is compared with it"
    assert text.count("scratch-lgf: ") == len(SMALL.scratch_steps)
    assert (tmp_path / "differences.png").exists()
    assert len((tmp_path / "results.jsonl").read_text().splitlines()) == len(rows)


def test_rows_of_another_machine_do_not_replace_those_that_are_there(tmp_path):
    rows = [row_of(Run(arm="base")), row_of(Run(arm="reconstruction"))]
    (tmp_path / "rows").mkdir()
    (tmp_path / "rows" / "base-test.json").write_text(json.dumps(rows[0] | {"seed": 7}))
    results = tmp_path / "results.jsonl"
    results.write_text("".join(f"{json.dumps(row)}\n" for row in rows))
    take_rows(tmp_path, results)
    found = rows_of(tmp_path)
    assert found == {"base-test": rows[0] | {"seed": 7}, "reconstruction-test": rows[1]}
