"""The tracking engine against sam2's own SAM2VideoPredictor on the same weights."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from stages.clips.records import SubjectPrompt
from stages.sam2_tracking.build import build_sam2
from stages.sam2_tracking.encoder import EncodedFrames
from stages.sam2_tracking.inputs import (
    Sam2Prompt,
    normalise,
    prompt_for_sam2,
    resize_for_sam2,
)
from stages.sam2_tracking.tracker import (
    TrackedFrame,
    Tracker,
    TrackRequest,
)
from tests.bfloat16_attention import NEEDS_BFLOAT16_ATTENTION

HEIGHT, WIDTH, SIZE = 96, 144, 128
CPU = torch.device("cpu")
BOX = (20.0, 24.0, 70.0, 74.0)
POINTS = np.array([[43.0, 48.0], [50.0, 40.0], [120.0, 80.0]])
LABELS = np.array([1, 1, 0])


def tracker_of(tiny_sam2: tuple[Path, Path], **settings: Any) -> Tracker:
    return Tracker(build_sam2(*tiny_sam2), precision="fp32", **settings)


def square(prompt: SubjectPrompt) -> Any:
    return prompt_for_sam2(prompt, height=HEIGHT, width=WIDTH, image_size=SIZE, device=CPU)


def one(
    tracker: Tracker, encoded: EncodedFrames, prompt: Sam2Prompt, *, backward: bool = False
) -> list[TrackedFrame]:
    """A single stream over the whole clip."""
    order = range(encoded.num_frames)[:: -1 if backward else 1]
    steps = tracker.track([TrackRequest(encoded=encoded, prompt=prompt, order=order)])
    return [frame for (frame,) in steps]


def both_ways(
    tracker: Tracker, frames_THWC: np.ndarray, prompt: SubjectPrompt
) -> tuple[list[TrackedFrame], list[TrackedFrame]]:
    encoded = tracker.encode(resize_for_sam2(frames_THWC, SIZE))
    forward = one(tracker, encoded, square(prompt))
    last = tracker.prompt_from_logits(forward[-1].mask_logits_HW)
    return forward, one(tracker, encoded, last, backward=True)


def assert_equal_to_stock(tracked: list[TrackedFrame], stock: Any, tolerance: float = 5e-6) -> None:
    """`stock` numbers the frames as it visited them, which is the order of `tracked`."""
    for step, frame in enumerate(tracked):
        for ours, theirs in (
            (frame.features["memory_attention"], stock.attended[step]),
            (frame.features["memory_encoder"], stock.memories[step]),
            (frame.features["image_encoder"], stock.encoded[step]),
            (frame.mask_logits_HW, stock.logits[step]),
            (frame.object_score, stock.scores[step]),
        ):
            torch.testing.assert_close(ours, theirs, atol=tolerance, rtol=0)


# Of 24 frames the memories (7) and object pointers (16) of the first have left the bank.
@pytest.mark.parametrize(("kind", "num_frames"), [("mask", 24), ("box", 40), ("points", 24)])
def test_both_directions_equal_the_stock_predictor(
    kind: str,
    num_frames: int,
    tiny_sam2: tuple[Path, Path],
    stock: Callable[..., Any],
    draw_frames: Callable[..., np.ndarray],
    subject_mask: Callable[..., np.ndarray],
) -> None:
    frames_THWC = draw_frames(num_frames, HEIGHT, WIDTH)
    mask_HW = subject_mask(HEIGHT, WIDTH)
    ours, stock_prompt = {
        "mask": (
            SubjectPrompt(mask_HW=mask_HW),
            lambda p, state: p.add_new_mask(state, 0, 1, mask_HW),
        ),
        "box": (
            SubjectPrompt(box_xyxy=BOX),
            lambda p, state: p.add_new_points_or_box(state, 0, 1, box=list(BOX)),
        ),
        "points": (
            SubjectPrompt(points_xy=POINTS, point_labels=LABELS),
            lambda p, state: p.add_new_points_or_box(
                state, 0, 1, points=POINTS.astype(np.float32), labels=LABELS.astype(np.int32)
            ),
        ),
    }[kind]

    forward, backward = both_ways(tracker_of(tiny_sam2), frames_THWC, ours)

    stock_forward = stock(frames_THWC, stock_prompt)
    last_mask = stock_forward.last_mask()
    stock_backward = stock(
        frames_THWC[::-1], lambda p, state: p.add_new_mask(state, 0, 1, last_mask)
    )
    assert [frame.index for frame in forward] == list(range(num_frames))
    assert [frame.index for frame in backward] == list(range(num_frames))[::-1]
    assert_equal_to_stock(forward, stock_forward)
    assert_equal_to_stock(backward, stock_backward)


def test_the_oracle_is_not_degenerate(
    stock: Callable[..., Any],
    draw_frames: Callable[..., np.ndarray],
    subject_mask: Callable[..., np.ndarray],
) -> None:
    mask_HW = subject_mask(HEIGHT, WIDTH)
    track = stock(
        draw_frames(4, HEIGHT, WIDTH), lambda p, state: p.add_new_mask(state, 0, 1, mask_HW)
    )
    assert (track.attended[3] - track.attended[1]).abs().max() > 1e-3
    assert track.attended[3].std() > 0.1
    assert 0 < track.last_mask().mean() < 1


def test_only_reachable_memories_are_kept(
    tiny_sam2: tuple[Path, Path],
    draw_frames: Callable[..., np.ndarray],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    tracker = tracker_of(tiny_sam2)
    seen: dict[str, Any] = {}
    step = tracker.model._track_step

    def watching(**arguments: Any) -> Any:
        seen.update(arguments["output_dict"])
        return step(**arguments)

    monkeypatch.setattr(tracker.model, "_track_step", watching)
    encoded = tracker.encode(resize_for_sam2(draw_frames(22, HEIGHT, WIDTH), SIZE))
    one(tracker, encoded, square(SubjectPrompt(box_xyxy=BOX)))
    recent = seen["non_cond_frame_outputs"]
    assert sorted(recent) == list(range(7, 22))  # 15 object pointers
    held = [s for s, entry in recent.items() if entry["maskmem_features"] is not None]
    assert sorted(held) == list(range(16, 22))  # 6 memories
    assert list(seen["cond_frame_outputs"]) == [0]


def test_frames_are_prepared_as_sam2_loads_a_folder_of_images(
    tmp_path: Path, draw_frames: Callable[..., np.ndarray]
) -> None:
    from PIL import Image
    from sam2.utils.misc import load_video_frames

    frames_THWC = draw_frames(2, HEIGHT, WIDTH)
    for number, frame in enumerate(frames_THWC):
        Image.fromarray(frame).save(tmp_path / f"{number}.jpg", format="PNG")
    theirs, height, width = load_video_frames(str(tmp_path), SIZE, True, compute_device=CPU)
    ours = normalise(resize_for_sam2(frames_THWC, SIZE), CPU)
    assert (height, width) == (HEIGHT, WIDTH)
    assert torch.equal(ours, theirs)
    assert ours.is_contiguous()  # another layout is another rounding in the image encoder


def test_one_frame_is_refused(
    tiny_sam2: tuple[Path, Path], draw_frames: Callable[..., np.ndarray]
) -> None:
    tracker = tracker_of(tiny_sam2)
    encoded = tracker.encode(resize_for_sam2(draw_frames(1, HEIGHT, WIDTH), SIZE))
    with pytest.raises(ValueError, match="at least 2 frames, got 1"):
        one(tracker, encoded, square(SubjectPrompt(box_xyxy=BOX)))


def test_a_lost_subject_is_not_visible_and_makes_no_prompt(
    tiny_sam2: tuple[Path, Path], draw_frames: Callable[..., np.ndarray]
) -> None:
    tracker = tracker_of(tiny_sam2)
    with torch.no_grad():
        tracker.model.sam_mask_decoder.pred_obj_score_head.layers[-1].bias.fill_(-100.0)
    encoded = tracker.encode(resize_for_sam2(draw_frames(3, HEIGHT, WIDTH), SIZE))
    forward = one(tracker, encoded, square(SubjectPrompt(box_xyxy=BOX)))
    assert [frame.visible for frame in forward] == [False] * 3
    with pytest.raises(ValueError, match="the mask is empty"):
        tracker.prompt_from_logits(forward[-1].mask_logits_HW)


@pytest.mark.parametrize(
    "precision", [pytest.param("bf16", marks=NEEDS_BFLOAT16_ATTENTION), "fp16"]
)
def test_reduced_precision_stays_close(
    precision: Any, tiny_sam2: tuple[Path, Path], draw_frames: Callable[..., np.ndarray]
) -> None:
    frames_TSS3 = resize_for_sam2(draw_frames(4, HEIGHT, WIDTH), SIZE)
    features = []
    for arithmetic in ("fp32", precision):
        tracker = Tracker(build_sam2(*tiny_sam2), precision=arithmetic)
        encoded = tracker.encode(frames_TSS3)
        frames = one(tracker, encoded, square(SubjectPrompt(box_xyxy=BOX)))
        features.append(torch.stack([frame.features["memory_attention"] for frame in frames]))
    exact_TCHW, rough_TCHW = features
    assert rough_TCHW.dtype == torch.float32
    cosine = torch.nn.functional.cosine_similarity(exact_TCHW, rough_TCHW, dim=1)
    assert cosine.mean() > 0.99
    assert not torch.equal(exact_TCHW, rough_TCHW)


@pytest.mark.slow
def test_the_official_tiny_architecture_equals_the_stock_predictor(
    tmp_path: Path, draw_frames: Callable[..., np.ndarray], build_stock_model: Callable[..., Any]
) -> None:
    """sam2.1_hiera_t with random weights at 512 pixels."""
    predictor, run = build_stock_model(["++model.image_size=512"])
    checkpoint = tmp_path / "hiera_t.pt"
    torch.save({"model": predictor.state_dict()}, checkpoint)
    frames_THWC = draw_frames(3, 480, 720)
    box = (120.0, 110.0, 350.0, 370.0)
    tracker = Tracker(build_sam2("sam2.1_hiera_t", checkpoint, image_size=512), precision="fp32")
    prompt = prompt_for_sam2(
        SubjectPrompt(box_xyxy=box), height=480, width=720, image_size=512, device=CPU
    )
    encoded = tracker.encode(resize_for_sam2(frames_THWC, 512))
    forward = one(tracker, encoded, prompt)
    stock_forward = run(
        frames_THWC, lambda p, state: p.add_new_points_or_box(state, 0, 1, box=list(box))
    )
    assert_equal_to_stock(forward, stock_forward)
    last_mask = stock_forward.last_mask()
    last = tracker.prompt_from_logits(forward[-1].mask_logits_HW)
    backward = one(tracker, encoded, last, backward=True)
    stock_backward = run(frames_THWC[::-1], lambda p, state: p.add_new_mask(state, 0, 1, last_mask))
    assert_equal_to_stock(backward, stock_backward)
