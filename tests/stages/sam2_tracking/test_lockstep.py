"""Streams tracked side by side equal the same streams tracked one at a time.

To 5e-6 where memories are kept in float32. The engine keeps them in bfloat16, as the stock
predictor does, and a difference in float32's last bit can change bfloat16's last bit.
"""

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from stages.sam2_tracking.build import build_sam2
from stages.sam2_tracking.encoder import EncodedFrames
from stages.sam2_tracking.inputs import Sam2Prompt
from stages.sam2_tracking.tracker import (
    TrackedFrame,
    Tracker,
    TrackRequest,
)

SIZE, NUM_FRAMES = 128, 18  # longer than the bank is deep
TOLERANCE = 5e-6


def points(coordinates: Sequence[Sequence[float]], labels: Sequence[int]) -> Sam2Prompt:
    return Sam2Prompt(
        points_1P2=torch.tensor([coordinates]),
        point_labels_1P=torch.tensor([labels], dtype=torch.int32),
    )


def mask() -> Sam2Prompt:
    mask_11SS = torch.zeros(1, 1, SIZE, SIZE)
    mask_11SS[..., 30:90, 20:60] = 1
    return Sam2Prompt(mask_11SS=mask_11SS)


BOX = points([[18.0, 32.0], [62.0, 98.0]], [2, 3])
CLICK = points([[100.0, 30.0]], [1])
CLICKS = points([[54.0, 64.0], [70.0, 50.0], [110.0, 100.0]], [1, 1, 0])
FORWARD = tuple(range(NUM_FRAMES))
BACKWARD = FORWARD[::-1]


@pytest.fixture(scope="module")
def tracker(tiny_sam2: tuple[Path, Path]) -> Tracker:
    return Tracker(build_sam2(*tiny_sam2), precision="fp32")


@pytest.fixture
def exact(tracker: Tracker, monkeypatch: pytest.MonkeyPatch) -> Tracker:
    """With memories that are not rounded."""
    monkeypatch.setattr(tracker, "memory_dtype", torch.float32)
    return tracker


@pytest.fixture(scope="module")
def encoded_clips(tracker: Tracker) -> dict[int, EncodedFrames]:
    return {}


@pytest.fixture
def clips(
    tracker: Tracker,
    draw_frames: Callable[..., Any],
    encoded_clips: dict[int, EncodedFrames],
) -> list[EncodedFrames]:
    """Two clips, encoded once for all tests here."""
    for seed in range(2):
        if seed not in encoded_clips:
            encoded_clips[seed] = tracker.encode(draw_frames(NUM_FRAMES, SIZE, SIZE, seed=seed))
    return list(encoded_clips.values())


def run(tracker: Tracker, *requests: TrackRequest) -> list[list[TrackedFrame]]:
    """The frames of each request."""
    return [list(stream) for stream in zip(*tracker.track(requests), strict=True)]


def assert_close(
    ours: list[TrackedFrame], theirs: list[TrackedFrame], tolerance: float = TOLERANCE
) -> None:
    for one, other in zip(ours, theirs, strict=True):
        assert one.index == other.index
        assert one.visible == other.visible
        pairs = [(feature, other.features[kind]) for kind, feature in one.features.items()]
        pairs += [
            (one.mask_logits_HW, other.mask_logits_HW),
            (one.object_score, other.object_score),
        ]
        for value, expected in pairs:
            torch.testing.assert_close(value, expected, atol=tolerance, rtol=0)


STREAMS: dict[str, list[tuple[int, Any, Any]]] = {
    # Number of the clip, prompt, order.
    "two clips": [(0, BOX, FORWARD), (1, BOX, FORWARD)],
    "two directions": [(0, BOX, FORWARD), (0, mask(), BACKWARD)],
    "two subjects": [(0, BOX, FORWARD), (0, CLICK, FORWARD)],
    "parts of two clips": [(0, CLICKS, range(3, 12)), (1, mask(), range(9, 0, -1))],
    "all at once": [
        (0, BOX, FORWARD),
        (0, CLICK, FORWARD),
        (0, mask(), BACKWARD),
        (1, CLICKS, FORWARD),
        (1, BOX, BACKWARD),
    ],
}


@pytest.mark.parametrize("case", STREAMS)
def test_streams_side_by_side_equal_single_ones(
    case: str, exact: Tracker, clips: list[EncodedFrames]
) -> None:
    requests = [
        TrackRequest(encoded=clips[clip], prompt=prompt, order=order)
        for clip, prompt, order in STREAMS[case]
    ]
    for request, together in zip(requests, run(exact, *requests), strict=True):
        assert [frame.index for frame in together] == list(request.order)
        (alone,) = run(exact, request)
        assert_close(together, alone)


def test_with_rounded_memories_streams_differ_by_what_rounding_changes(
    tracker: Tracker, clips: list[EncodedFrames], nudged: Callable[[Any], Any]
) -> None:
    requests = [TrackRequest(encoded=clip, prompt=BOX, order=FORWARD) for clip in clips]
    other = Tracker(nudged(tracker.model), precision="fp32")
    for request, together in zip(requests, run(tracker, *requests), strict=True):
        (alone,) = run(tracker, request)
        (rounded,) = run(other, request)
        bound = 10 * largest_difference(alone, rounded)
        assert bound < 1e-2, "rounding would hide a difference"
        assert_close(together, alone, bound)


def largest_difference(ours: list[TrackedFrame], theirs: list[TrackedFrame]) -> float:
    """Of what attends to memories."""
    return max(
        float((one.features["memory_attention"] - other.features["memory_attention"]).abs().max())
        for one, other in zip(ours, theirs, strict=True)
    )


def test_streams_are_not_all_alike(tracker: Tracker, clips: list[EncodedFrames]) -> None:
    streams = run(
        tracker,
        TrackRequest(encoded=clips[0], prompt=BOX, order=FORWARD),
        TrackRequest(encoded=clips[1], prompt=BOX, order=FORWARD),
        TrackRequest(encoded=clips[0], prompt=CLICK, order=FORWARD),
        TrackRequest(encoded=clips[0], prompt=BOX, order=BACKWARD),
    )
    last = [stream[-1].features["memory_attention"] for stream in streams]
    for other in last[1:]:
        assert (last[0] - other).abs().max() > 100 * TOLERANCE


def test_a_lost_subject_does_not_disturb_its_neighbour(
    tiny_sam2: tuple[Path, Path], clips: list[EncodedFrames]
) -> None:
    model = build_sam2(*tiny_sam2)
    tracker = Tracker(model, precision="fp32")
    tracker.memory_dtype = torch.float32
    requests = [
        TrackRequest(encoded=clips[0], prompt=prompt, order=range(6)) for prompt in (BOX, CLICK)
    ]
    # Between the lowest scores of the two lies a bias with which one of them is lost at times.
    lowest = sorted(
        min(float(frame.object_score) for frame in stream) for stream in run(tracker, *requests)
    )
    with torch.no_grad():
        model.sam_mask_decoder.pred_obj_score_head.layers[-1].bias.sub_(sum(lowest) / 2)
    streams = run(tracker, *requests)
    seen = [[frame.visible for frame in stream] for stream in streams]
    assert not all(map(all, seen)) and any(map(any, seen))
    assert seen[0] != seen[1]
    for request, together in zip(requests, streams, strict=True):
        assert_close(together, run(tracker, request)[0])


def test_a_part_of_a_clip_is_tracked_like_a_clip_of_that_part(
    tracker: Tracker, clips: list[EncodedFrames], draw_frames: Callable[..., Any]
) -> None:
    frames_TSS3: np.ndarray = draw_frames(NUM_FRAMES, SIZE, SIZE, seed=0)
    cut = tracker.encode(frames_TSS3[9:2:-1].copy())
    (part,) = run(tracker, TrackRequest(encoded=clips[0], prompt=BOX, order=range(9, 2, -1)))
    (whole,) = run(tracker, TrackRequest(encoded=cut, prompt=BOX, order=range(7)))
    for one, other in zip(part, whole, strict=True):
        assert torch.equal(one.mask_logits_HW, other.mask_logits_HW)
        for kind, feature in one.features.items():
            assert torch.equal(feature, other.features[kind])


@pytest.mark.parametrize(
    "wanted", [(), ("memory_attention",), ("memory_encoder",), ("image_encoder",)]
)
def test_features_that_are_not_wanted_change_nothing_else(
    wanted: Any, tracker: Tracker, clips: list[EncodedFrames]
) -> None:
    request = TrackRequest(encoded=clips[0], prompt=BOX, order=range(4))
    for (some,), (everything,) in zip(
        tracker.track([request], features=wanted), tracker.track([request]), strict=True
    ):
        assert set(some.features) == set(wanted)
        assert torch.equal(some.mask_logits_HW, everything.mask_logits_HW)
        for kind, feature in some.features.items():
            assert torch.equal(feature, everything.features[kind])


def test_objects_of_different_clips_may_overlap(
    tiny_sam2: tuple[Path, Path], clips: list[EncodedFrames]
) -> None:
    """sam2 can keep the masks of one video's objects apart; here a batch is no one video."""
    model = build_sam2(*tiny_sam2)
    model.non_overlap_masks_for_mem_enc = True
    tracker = Tracker(model, precision="fp32")
    tracker.memory_dtype = torch.float32
    request = TrackRequest(encoded=clips[0], prompt=mask(), order=range(3))
    streams = run(tracker, request, request)
    assert_close(streams[1], streams[0])
    assert_close(streams[0], run(tracker, request)[0])


@pytest.mark.parametrize(
    ("orders", "message"),
    [
        ([], "nothing to track"),
        ([range(4), range(5)], r"orders of 4 and 5 frames cannot be tracked in one batch"),
        ([range(1)], "at least 2 frames, got 1"),
        ([range(15, 19)], "visits frames 15 to 18 of a clip of 18"),
        ([range(2, -2, -1)], "visits frames -1 to 2 of a clip of 18"),
    ],
)
def test_orders_that_cannot_be_tracked_are_refused_at_once(
    orders: list[Sequence[int]], message: str, tracker: Tracker, clips: list[EncodedFrames]
) -> None:
    requests = [TrackRequest(encoded=clips[0], prompt=BOX, order=order) for order in orders]
    with pytest.raises(ValueError, match=message):
        tracker.track(requests)
