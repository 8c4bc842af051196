"""Training of the demo's tracker: its examples, and runs that are stopped and resumed."""

import json

import numpy as np
import pytest
import torch

from stages.demo import DemoConfig, draw_clip
from stages.demo.training.drawn_clips import HELD_OUT_SEEDS, TRAINING_SEEDS
from stages.demo.training.figure_tracks import draw_tracks, points_of, square_clip
from stages.demo.training.run import TrainingRun
from stages.demo.training.sam2 import train
from stages.demo.training.track_loss import track_loss
from stages.sam2_tracking.build import build_sam2

SIDE = 128


def tracks_of(step, num_frames=5, batch_size=8, absence="gone"):
    return draw_tracks(
        step,
        seed=0,
        batch_size=batch_size,
        num_frames=num_frames,
        side=SIDE,
        second_figure=0.5,
        absence=absence,
        absent=0.5,
        degraded=0.2,
    )


def test_examples_depend_on_seed_and_step_alone():
    first = tracks_of(3)
    square_clip.cache_clear()
    again, other = tracks_of(3), tracks_of(4)
    assert np.array_equal(first.frames_BTSSC, again.frames_BTSSC)
    assert np.array_equal(first.masks_BTSS, again.masks_BTSS)
    assert not np.array_equal(first.frames_BTSSC, other.frames_BTSSC)


def test_neither_the_demos_clips_nor_the_held_out_ones_are_trained_on():
    demo = DemoConfig()
    used = range(demo.seed * demo.num_clips, (demo.seed + 1) * demo.num_clips)
    for others in (used, HELD_OUT_SEEDS):
        assert others.stop <= TRAINING_SEEDS.start


def test_the_mask_covers_the_limbs_on_every_frame():
    """Saturated colours are those of limbs; walls, floors and posts are muted."""
    for seed in range(6):
        clip = draw_clip(seed, num_frames=9, height=128, width=192)
        vivid_THW = np.ptp(clip.frames_THWC.astype(int), axis=-1) > 110
        assert (vivid_THW & ~clip.masks_THW).sum() <= 0.02 * clip.masks_THW.sum()
        assert (vivid_THW & clip.masks_THW).sum() > 0.5 * clip.masks_THW.sum()


def test_scenery_is_the_clip_without_its_figure():
    for seed in range(6):
        clip = draw_clip(seed, num_frames=5, height=128, width=192)
        same_THW = (clip.scenery_THWC == clip.frames_THWC).all(-1)
        assert not same_THW[clip.masks_THW].any()
        upper_THW = same_THW[:, :20]  # above the shadow
        figure_THW = clip.masks_THW[:, :20]
        assert upper_THW[~figure_THW].mean() > 0.95
        vivid_THW = np.ptp(clip.scenery_THWC.astype(int), axis=-1) > 110
        assert not vivid_THW.any()


def test_the_subject_is_visible_at_first_and_sometimes_absent_later():
    batches = [tracks_of(step, absence=("cut", "gone")[step % 2]) for step in range(6)]
    visible_NT = np.concatenate([batch.masks_BTSS.any((2, 3)) for batch in batches])
    assert visible_NT[:, 0].all()
    assert 0 < (~visible_NT[:, 1:]).mean() < 0.3
    two = [{0, 1, 2} == set(np.unique(one)) for batch in batches for one in batch.figures_BSS]
    assert 0.2 < np.mean(two) < 0.7
    for batch in batches:
        assert np.array_equal(batch.figures_BSS == 1, batch.masks_BTSS[:, 0])


@pytest.mark.parametrize(("kind", "labels"), [("box", [2, 3]), ("point", [1]), ("points", [1] * 3)])
def test_prompts_lie_on_the_subject(kind, labels):
    masks_BSS = tracks_of(0).masks_BTSS[:, 0]
    points_BP2, labels_BP = points_of(np.random.default_rng(0), masks_BSS, kind)
    assert labels_BP.tolist() == [labels] * len(masks_BSS)
    for points_P2, mask_SS in zip(points_BP2, masks_BSS, strict=True):
        if kind == "box":
            y, x = np.nonzero(mask_SS)
            corners = np.array([[x.min(), y.min()], [x.max() + 1, y.max() + 1]])
            assert np.abs(points_P2 - corners).max() < 0.25 * SIDE
        else:
            x, y = np.floor(points_P2).astype(int).T
            assert mask_SS[y, x].all()


def test_the_loss_is_low_for_the_packaged_tracker_and_reaches_every_weight(packaged_sam2):
    model = build_sam2(packaged_sam2 / "tiny.yaml", packaged_sam2 / "tiny.safetensors")
    model.requires_grad_(True)
    model.sam_mask_decoder.train()
    losses = [
        track_loss(model, tracks_of(step, batch_size=4), np.random.default_rng(step))
        for step in range(6)
    ]
    assert np.mean([iou for _, iou in losses]) > 0.5
    torch.stack([loss for loss, _ in losses]).sum().backward()
    untouched = {name for name, weight in model.named_parameters() if weight.grad is None}
    assert untouched == {"no_mem_pos_enc"}, "SAM2 does not read it with directly_add_no_mem_embed"


class StoppedError(Exception):
    pass


@pytest.mark.slow
def test_a_stopped_run_ends_with_the_same_weights(tmp_path, monkeypatch):
    monkeypatch.setattr("stages.demo.training.run._CHECKPOINT_EVERY", 2)
    settings = {"steps": 4, "seed": 0, "held_out_clips": 1}
    train(tmp_path / "whole", **settings)

    update = TrainingRun.update

    def update_until_killed(self, loss, *, rate):
        if self.done == 3:
            raise StoppedError
        update(self, loss, rate=rate)

    with monkeypatch.context() as patched:
        patched.setattr(TrainingRun, "update", update_until_killed)
        with pytest.raises(StoppedError):
            train(tmp_path / "stopped", **settings)
    assert not (tmp_path / "stopped" / "tiny.safetensors").exists()
    train(tmp_path / "stopped", **settings)

    for name in ("tiny.safetensors", "tiny.yaml", "training.json"):
        whole, stopped = (tmp_path / run / name for run in ("whole", "stopped"))
        assert whole.read_bytes() == stopped.read_bytes(), name
    record = json.loads((tmp_path / "whole" / "training.json").read_text())
    assert (record["steps"], record["seed"]) == (4, 0)
    assert set(record["held_out"]["mean_iou"]) >= {"mask forward", "mask backward"}

    with pytest.raises(ValueError, match="'steps': 4"):
        train(tmp_path / "whole", steps=5, seed=0, held_out_clips=1)
