"""The packaged tiny SAM2 follows figures that it was not trained on."""

import contextlib
import json
from collections.abc import Iterator, Sequence

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
from stages.sam2_tracking.encoder import EncodedFrames
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


@pytest.fixture(scope="module")
def encoded_clips(tracker, clips) -> Iterator[list[EncodedFrames]]:
    with contextlib.ExitStack() as stack:
        yield [
            stack.enter_context(tracker.encode(resize_for_sam2(clip.frames_THWC, 128)))
            for clip in clips
        ]


def request(encoded: EncodedFrames, prompt: SubjectPrompt, order: Sequence[int]) -> TrackRequest:
    converted = prompt_for_sam2(
        prompt, height=HEIGHT, width=WIDTH, image_size=128, device=torch.device("cpu")
    )
    return TrackRequest(encoded=encoded, prompt=converted, order=order)


def follow(tracker, frames_THWC, *prompts: SubjectPrompt) -> list[tuple[TrackedFrame, ...]]:
    with tracker.encode(resize_for_sam2(frames_THWC, 128)) as encoded:
        requests = [request(encoded, prompt, range(len(frames_THWC))) for prompt in prompts]
        return list(tracker.track(requests, features=()))


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


@pytest.mark.parametrize(
    ("kind", "least"), [("mask", 0.75), ("box", 0.75), ("point", 0.7), ("points", 0.75)]
)
def test_it_follows_unseen_figures_both_ways(tracker, clips, encoded_clips, kind, least):
    ious, visible = [], []
    for clip, encoded in zip(clips, encoded_clips, strict=True):
        forward = range(len(clip.frames_THWC))
        requests = [
            request(encoded, prompt_of(kind, clip.masks_THW[order[0]]), order)
            for order in (forward, forward[::-1])
        ]
        steps = list(tracker.track(requests, features=()))
        ious.append([[iou(one, clip.masks_THW[one.index]) for one in step] for step in steps[1:]])
        visible.append([[bool(one.visible) for one in step] for step in steps])
    ious_NTW, visible_NTW = np.array(ious), np.array(visible)
    assert (visible_NTW.mean((0, 1)) >= 0.9).all()
    assert (ious_NTW.mean((0, 1)) >= least).all()
    last_W, first_W = ious_NTW[:, -4:].mean((0, 1)), ious_NTW[:, :4].mean((0, 1))
    assert (last_W >= first_W - 0.1).all(), "it does not lose them with time"


def test_it_sees_that_the_subject_is_gone_and_comes_back(tracker, clips):
    says = []
    for clip in clips:
        frames_THWC = clip.frames_THWC.copy()
        frames_THWC[6:10] = clip.scenery_THWC[6:10]
        tracked = follow(tracker, frames_THWC, prompt_of("mask", clip.mask_HW))
        says.append([bool(one.visible) for (one,) in tracked])
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
        subjects = (front_THW, back_THW)
        prompts = [prompt_of("mask", subject_THW[0]) for subject_THW in subjects]
        tracked = zip(*follow(tracker, frames_THWC, *prompts), strict=True)
        for frames, subject_THW in zip(tracked, subjects, strict=True):
            pairs = zip(frames, subject_THW, strict=True)
            ious.append([iou(one, real) for one, real in pairs if real.sum() > 300][1:])
    assert np.mean([np.mean(row) for row in ious]) >= 0.6


def test_automatic_prompts_find_the_figure(tracker, clips, encoded_clips):
    found = []
    for clip, encoded in zip(clips, encoded_clips, strict=True):
        geometry = cover_and_crop(
            HEIGHT, WIDTH, height=HEIGHT, width=WIDTH, source_fps=8.0, sampling="consecutive"
        )
        given = Clip(key="clip", frames_THWC=clip.frames_THWC, geometry=geometry)
        with contextlib.suppress(ClipSkipped):  # one it is not sure of
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
