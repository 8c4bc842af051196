"""Videos drawn while a model is trained."""

import json

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file

from stages.clips import encode_video, read_video
from stages.config import BaseModelConfig
from stages.sample_videos.config import SampleConfig
from stages.sample_videos.runs import LORA_FILE
from stages.train_student.report.charts import sample_charts
from stages.train_student.report.records import read_run
from stages.video_scores.appearance import APPEARANCE, appearance_scores
from tests.stages.sampling import sample_frames

SAMPLES = {"prompts": ["a person walks to the right", "a cat"], "steps": 2, "every": 2}
ONE = {"prompts": ["a cat"], "steps": 1}
HELD_OUT = {"clips": 2, "timesteps": [500]}
STRONG = {"learning_rate": 0.3, "warmup_steps": 0}


def bytes_of(run_dir, step):
    folder = run_dir / "samples" / f"step-{step:06d}"
    return [(folder / f"{number}.mp4").read_bytes() for number in range(2)]


def sampled_frames(run_dir, base, tiny, prompt, image=None):
    """The frames that `sample` makes with the export of the run."""
    return sample_frames(
        SampleConfig(steps=2, precision="fp32", device="cpu"),
        BaseModelConfig(path=str(base)),
        tiny.CLIPS,
        run_dir=run_dir,
        prompt=prompt,
        image=image,
    )


def sampled(*arguments):
    """The same as a video without tags."""
    return encode_video(sampled_frames(*arguments), 8.0)


@pytest.mark.parametrize(
    "changes",
    [
        {"deepspeed": {"zero_stage": 2}},
        {"deepspeed": {"zero_stage": 3}, "method": "full"},
        pytest.param(
            {"deepspeed": {"zero_stage": 0}, "gradient_checkpointing": False, "objectives": []},
            marks=pytest.mark.slow,
        ),
    ],
)
def test_the_last_drawing_is_what_sample_draws_with_the_export(
    tiny, train_whole, whole_base, tmp_path, changes
):
    run = tmp_path / "run"
    train_whole(run, steps=2, samples=SAMPLES, optimizer=STRONG, checkpoint_every=9, **changes)
    for number, prompt in enumerate(SAMPLES["prompts"]):
        assert sampled(run, whole_base, tiny, prompt) == bytes_of(run, 2)[number]
    base = sampled(None, whole_base, tiny, SAMPLES["prompts"][0])
    assert base == bytes_of(run, 0)[0]
    assert base != bytes_of(run, 2)[0], "training shows"
    record = json.loads((run / "samples" / "step-000002" / "samples.json").read_text())
    assert record["prompts"] == SAMPLES["prompts"]
    assert (record["denoising_steps"], record["guidance"], record["seed"]) == (2, 6.0, 0)
    frames_THWC = sampled_frames(run, whole_base, tiny, SAMPLES["prompts"][1])
    assert record["scores"][1] == appearance_scores(frames_THWC)


def test_scores_are_curves_and_washed_out_samples_are_reported(train_whole, tmp_path, lines):
    """The base model's samples are recorded as twice as colourful as they were."""
    run = tmp_path / "run"
    changes = {"samples": SAMPLES | {"scores": ["appearance", "vbench"]}, "checkpoint_every": 1}
    train_whole(run, steps=1, **changes)
    file = run / "samples" / "step-000000" / "samples.json"
    record = json.loads(file.read_text())
    names = {score.name for score in APPEARANCE}
    assert set(record["scores"][0]) == names | {"temporal_flickering"}, "no network is needed"
    for of_video in record["scores"]:
        of_video["saturation"] *= 2
    file.write_text(json.dumps(record))
    train_whole(run, steps=2, progress=lines, **changes)
    (warning,) = [text for text in lines.lines if "washed out" in text]
    assert "saturation" in warning
    assert "contrast" not in warning
    titles = {chart.title for chart in sample_charts(read_run(run))}
    assert titles >= {"Saturation", "Contrast", "Temporal flickering"}


def test_without_scores_none_are_computed(train_whole, tmp_path):
    run = tmp_path / "run"
    train_whole(run, steps=1, samples=ONE | {"scores": []})
    record = json.loads((run / "samples" / "step-000001" / "samples.json").read_text())
    assert record["scores"] == [{}]
    assert not sample_charts(read_run(run))


@pytest.mark.parametrize("whole_base", ["i2v"], indirect=True)
def test_a_model_that_takes_images_draws_from_them(tiny, train_whole, whole_base, tmp_path):
    pixels = np.random.default_rng(0).integers(0, 255, (40, 70, 3), dtype=np.uint8)
    images = [str(tmp_path / f"{number}.png") for number in range(2)]
    Image.fromarray(pixels).save(images[0])
    Image.fromarray(255 - pixels).save(images[1])
    run = tmp_path / "run"
    train_whole(run, steps=1, samples=SAMPLES | {"images": images}, optimizer=STRONG)
    drawn = sampled(run, whole_base, tiny, SAMPLES["prompts"][1], tmp_path / "1.png")
    assert drawn == bytes_of(run, 1)[1]


def test_training_is_the_same_to_the_last_bit_with_and_without_looking(train_whole, tmp_path):
    """Every module's mode, the random numbers and ZeRO 3's order of weights are as before."""
    common = {"steps": 2, "deepspeed": {"zero_stage": 3}, "checkpoint_every": 9}
    look = {"validation": HELD_OUT | {"every": 1}, "samples": ONE | {"every": 1}}
    train_whole(tmp_path / "seldom", **common, validation=HELD_OUT | {"every": 100})
    train_whole(tmp_path / "often", **common, **look)
    seldom, often = tmp_path / "seldom", tmp_path / "often"
    assert (seldom / "losses.jsonl").read_bytes() == (often / "losses.jsonl").read_bytes()
    left, right = (load_file(run / "export" / LORA_FILE) for run in (seldom, often))
    assert left.keys() == right.keys()
    assert all(torch.equal(left[name], right[name]) for name in left)


def test_videos_reach_the_boards(train_whole, tmp_path):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    train_whole(tmp_path, steps=1, samples=ONE, validation=HELD_OUT)
    board = EventAccumulator(str(tmp_path / "tensorboard")).Reload()
    assert [event.step for event in board.Images("samples/0")] == [0, 1]
    assert [event.step for event in board.Scalars("validation/diffusion")] == [0, 1]
    rows = [json.loads(line) for line in (tmp_path / "validation.jsonl").open()]
    shown = [event.value for event in board.Scalars("validation/lgf")]
    np.testing.assert_allclose(shown, [row["auxiliary"]["lgf"] for row in rows], rtol=1e-6)


def test_a_resume_draws_what_is_owed_and_drops_what_came_later(train_whole, tmp_path):
    """As if it had been killed between its checkpoint and what follows, and after more steps."""
    settings = {
        "samples": ONE | {"every": 1},
        "validation": HELD_OUT | {"every": 1},
        "checkpoint_every": 1,
        "objectives": [],
    }
    train_whole(tmp_path / "whole", steps=2, **settings)
    run = tmp_path / "run"
    train_whole(run, steps=1, **settings)
    rows = (run / "validation.jsonl").read_text().splitlines(keepends=True)
    (run / "validation.jsonl").write_text(rows[0])
    (run / "samples" / "step-000001" / "samples.json").unlink()
    late = run / "samples" / "step-000003"
    late.mkdir()
    train_whole(run, steps=2, **settings)
    assert not late.exists()
    for name in ("validation.jsonl", "losses.jsonl"):
        assert (run / name).read_bytes() == (tmp_path / "whole" / name).read_bytes()
    for step in range(3):
        video = f"samples/step-{step:06d}/0.mp4"
        assert (run / video).read_bytes() == (tmp_path / "whole" / video).read_bytes()


@pytest.mark.slow
def test_two_ranks_draw_and_measure_what_one_does(
    train_whole, train_process, whole_base, whole_cache, tmp_path
):
    """Three prompts and three clips: one rank has one more of each than the other."""
    prompts = {"prompts": ["a person walks", "a cat", "a dog"], "steps": 2, "every": 2}
    settings = {
        "steps": 2,
        "checkpoint_every": 9,
        "deepspeed": {"zero_stage": 3},
        "validation": {"clips": 3, "every": 2, "timesteps": [100, 800]},
        "samples": prompts,
        "optimizer": STRONG,
    }
    train_whole(tmp_path / "one", **settings)
    process = train_process(
        tmp_path / "two", processes=2, base=whole_base, cache_root=whole_cache, **settings
    )
    _, errors = process.communicate(timeout=250)
    assert process.returncode == 0, errors
    one, two = (
        [json.loads(line) for line in (tmp_path / name / "validation.jsonl").open()]
        for name in ("one", "two")
    )
    assert len(one) == len(two) == 2
    for left, right in zip(one, two, strict=True):
        assert left["diffusion"] == pytest.approx(right["diffusion"], rel=1e-4)
        for name, values in left["by_timestep"].items():
            assert values == pytest.approx(right["by_timestep"][name], rel=1e-3)
    for number in range(3):
        videos = [
            read_video(tmp_path / name / "samples" / "step-000002" / f"{number}.mp4")[0]
            for name in ("one", "two")
        ]
        assert np.abs(videos[0].astype(int) - videos[1].astype(int)).mean() < 2
