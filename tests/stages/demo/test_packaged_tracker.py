"""The packaged tiny SAM2 follows figures that it was not trained on."""

import contextlib
import json

import numpy as np
import pytest
import torch
import torch.nn.functional as F  # noqa: N812

from stages.clips import Clip, ClipSkipped
from stages.clips.geometry import cover_and_crop
from stages.clips.records import SubjectPrompt
from stages.demo import FigureClip, draw_clip
from stages.demo.training.drawn_clips import TRAINING_SEEDS
from stages.extract_features.prompts.automatic import AutomaticSource
from stages.sam2_tracking.build import build_sam2
from stages.sam2_tracking.inputs import prompt_for_sam2, resize_for_sam2
from stages.sam2_tracking.tracker import TrackedFrame, Tracker, TrackRequest

HEIGHT, WIDTH = 128, 192
SEEDS = range(9000, 9012)
"""Four figures of each kind, with and without a post, with and without a pan."""


@pytest.fixture(scope="module")
def tracker(packaged_sam2) -> Tracker:
    model = build_sam2(packaged_sam2 / "tiny.yaml", packaged_sam2 / "tiny.safetensors")
    return Tracker(model, precision="fp32")


@pytest.fixture(scope="module")
def clips() -> list[FigureClip]:
    assert SEEDS.stop <= TRAINING_SEEDS.start
    return [draw_clip(seed, num_frames=17, height=HEIGHT, width=WIDTH) for seed in SEEDS]


def follow(tracker, frames_THWC, prompt: SubjectPrompt) -> list[TrackedFrame]:
    converted = prompt_for_sam2(
        prompt, height=HEIGHT, width=WIDTH, image_size=128, device=torch.device("cpu")
    )
    with tracker.encode(resize_for_sam2(frames_THWC, 128)) as encoded:
        request = TrackRequest(encoded=encoded, prompt=converted, order=range(len(frames_THWC)))
        return [frame for (frame,) in tracker.track([request], features=())]


def iou(frame: TrackedFrame, real_HW: np.ndarray) -> float:
    logits = F.interpolate(frame.mask_logits_HW[None, None], size=(HEIGHT, WIDTH), mode="bilinear")
    found_HW = (logits[0, 0] > 0).numpy()
    return (found_HW & real_HW).sum() / (found_HW | real_HW).sum()


def prompt_of(kind: str, mask_HW: np.ndarray) -> SubjectPrompt:
    if kind == "mask":
        return SubjectPrompt(mask_HW=mask_HW)
    y, x = np.nonzero(mask_HW)
    if kind == "box":
        return SubjectPrompt(box_xyxy=(x.min(), y.min(), x.max() + 1, y.max() + 1))
    inner = [0.5] if kind == "point" else [0.25, 0.5, 0.75]
    chosen = (np.array(inner) * len(x)).astype(int)
    return SubjectPrompt(
        points_xy=np.stack([x[chosen], y[chosen]], axis=-1) + 0.5,
        point_labels=np.ones(len(chosen), dtype=np.int64),
    )


@pytest.mark.parametrize("way", [1, -1], ids=["forward", "backward"])
@pytest.mark.parametrize(
    ("kind", "least"), [("mask", 0.75), ("box", 0.75), ("point", 0.7), ("points", 0.75)]
)
def test_it_follows_unseen_figures(tracker, clips, kind, least, way):
    ious, visible = [], []
    for clip in clips:
        masks_THW = clip.masks_THW[::way]
        tracked = follow(tracker, clip.frames_THWC[::way], prompt_of(kind, masks_THW[0]))
        ious.append([iou(one, real) for one, real in zip(tracked, masks_THW, strict=True)][1:])
        visible.append([bool(one.visible) for one in tracked])
    assert np.mean(visible) >= 0.9
    assert np.mean(ious) >= least
    last, first = np.mean([row[-4:] for row in ious]), np.mean([row[:4] for row in ious])
    assert last >= first - 0.1, "it does not lose them with time"


def test_it_sees_that_the_subject_is_gone_and_comes_back(tracker, clips):
    says = []
    for clip in clips:
        frames_THWC = clip.frames_THWC.copy()
        frames_THWC[6:10] = clip.scenery_THWC[6:10]
        tracked = follow(tracker, frames_THWC, prompt_of("mask", clip.mask_HW))
        says.append([bool(one.visible) for one in tracked])
    says_NT = np.array(says)
    assert says_NT[:, :6].mean() >= 0.9
    assert says_NT[:, 6:10].mean() <= 0.2
    assert says_NT[:, 10:].mean() >= 0.9


def test_it_follows_the_prompted_one_of_two_figures(tracker, clips):
    """The same frames with either figure as the subject give different masks."""
    ious = []
    for clip, other in zip(clips[::2], clips[1::2], strict=True):
        offset = WIDTH // 2
        frames_THWC, front_THW = clip.frames_THWC.copy(), np.zeros_like(other.masks_THW)
        front_THW[:, :, offset:] = other.masks_THW[:, :, : WIDTH - offset]
        shifted_THWC = np.roll(other.frames_THWC, offset, axis=2)
        frames_THWC[front_THW] = shifted_THWC[front_THW]
        back_THW = clip.masks_THW & ~front_THW
        for subject_THW in (front_THW, back_THW):
            tracked = follow(tracker, frames_THWC, prompt_of("mask", subject_THW[0]))
            pairs = zip(tracked, subject_THW, strict=True)
            ious.append([iou(one, real) for one, real in pairs if real.sum() > 300][1:])
    assert np.mean([np.mean(row) for row in ious]) >= 0.6


def test_automatic_prompts_find_the_figure(tracker, clips):
    found = []
    for clip in clips:
        geometry = cover_and_crop(
            HEIGHT, WIDTH, height=HEIGHT, width=WIDTH, source_fps=8.0, sampling="consecutive"
        )
        given = Clip(key="clip", frames_THWC=clip.frames_THWC, geometry=geometry)
        with (
            tracker.encode(resize_for_sam2(clip.frames_THWC, 128)) as encoded,
            contextlib.suppress(ClipSkipped),  # one it is not sure of
        ):
            found.append((AutomaticSource(128).find(given, tracker, encoded), clip))
    assert len(found) >= len(clips) - 2
    ious = []
    for prompt, clip in found:
        (subject,) = prompt.subjects
        assert subject.mask_HW is not None
        shared = (subject.mask_HW & clip.mask_HW).sum()
        ious.append(shared / (subject.mask_HW | clip.mask_HW).sum())
    assert np.mean(ious) >= 0.7


def test_the_record_says_how_the_weights_were_made(packaged_sam2):
    record = json.loads((packaged_sam2 / "training.json").read_text())
    assert record["steps"] > 0 and record["seed"] >= 0
    assert {"torch", "sam2"} <= set(record["versions"])
    assert min(record["held_out"]["mean_iou"].values()) > 0.7
    assert {file.name for file in packaged_sam2.iterdir()} == {
        "tiny.yaml", "tiny.safetensors", "training.json",
    }  # fmt: skip
    assert (packaged_sam2 / "tiny.safetensors").stat().st_size < 3_000_000
