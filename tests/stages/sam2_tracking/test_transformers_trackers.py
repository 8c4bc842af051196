"""SAM2, EdgeTAM and SAM3's tracker through transformers.

Against the sam2 package on the same weights, and against the library's own inference sessions.
"""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from transformers import EdgeTamVideoConfig, Sam2VideoConfig, Sam3VideoConfig

from stages.sam2_tracking.inputs import Sam2Prompt
from stages.sam2_tracking.opening import build_without_weights
from stages.sam2_tracking.tracker import TrackedFrame, Tracker, TrackRequest
from tests.stages.sam2_tracking.transformers_families import (
    drawn,
    run_session,
    tiny_edgetam,
    tiny_sam3,
)
from tests.stages.sam2_tracking.transformers_weights import to_transformers

NUM_FRAMES = 9  # more than the banks of the tiny EdgeTAM and SAM3 hold, and SAM2's memories
FAMILIES = ["sam2", "edgetam", "sam3"]
KINDS = ["mask", "box", "points"]
IMAGENET = ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))
PIXELS = {"sam2": IMAGENET, "edgetam": IMAGENET, "sam3": ((0.5,) * 3, (0.5,) * 3)}


@pytest.fixture(scope="module")
def trackers(wide_sam2: Any) -> dict[str, Tracker]:
    models = {
        "sam2": to_transformers(wide_sam2),
        "edgetam": tiny_edgetam(),
        "sam3": tiny_sam3(),
    }
    return {name: Tracker(model, precision="fp32") for name, model in models.items()}


@pytest.fixture(scope="module")
def package(wide_sam2: Any) -> Tracker:
    return Tracker(wide_sam2, precision="fp32")


@pytest.fixture
def frames_of(draw_frames: Callable[..., np.ndarray]) -> Callable[[Tracker], np.ndarray]:
    return lambda tracker: draw_frames(NUM_FRAMES, *[tracker.model.image_size] * 2)


def prompt_of(kind: str, side: int) -> Sam2Prompt:
    if kind == "mask":
        mask_11SS = torch.zeros(1, 1, side, side)
        mask_11SS[..., side // 4 : side // 2, side // 5 : side // 2] = 1
        return Sam2Prompt(mask_11SS=mask_11SS)
    points, labels = {
        "box": ([[18.0, 32.0], [62.0, 98.0]], [2, 3]),
        "points": ([[44.0, 64.0], [50.0, 50.0], [100.0, 90.0]], [1, 1, 0]),
    }[kind]
    return Sam2Prompt(
        points_1P2=torch.tensor([points]),
        point_labels_1P=torch.tensor([labels], dtype=torch.int32),
    )


def track(tracker: Tracker, frames_TSS3: np.ndarray, *requests: Any) -> list[list[TrackedFrame]]:
    """Streams, each a prompt and an order of frames."""
    with tracker.encode(frames_TSS3) as encoded:
        asked = [TrackRequest(encoded=encoded, prompt=p, order=order) for p, order in requests]
        return [list(stream) for stream in zip(*tracker.track(asked), strict=True)]


def values_of(frame: TrackedFrame) -> dict[str, torch.Tensor]:
    features = {str(kind): value for kind, value in frame.features.items()}
    return {"mask": frame.mask_logits_HW, "score": frame.object_score, **features}


def changes(some: list[TrackedFrame], others: list[TrackedFrame]) -> dict[str, float]:
    """The largest difference of each value on any frame."""
    largest: dict[str, float] = {}
    for one, other in zip(some, others, strict=True):
        assert one.index == other.index
        for name, value in values_of(one).items():
            change = float((value - values_of(other)[name]).abs().max())
            largest[name] = max(largest.get(name, 0.0), change)
    return largest


@pytest.mark.parametrize("kind", KINDS)
def test_sam2_is_the_same_both_ways(
    kind: str,
    trackers: dict[str, Tracker],
    package: Tracker,
    frames_of: Any,
    nudged: Callable[[Any], Any],
) -> None:
    """Mask prompts included: both follow sam2's predictor."""
    frames_TSS3 = frames_of(package)
    forward = range(NUM_FRAMES)
    asked = [
        (prompt_of(kind, package.model.image_size), order) for order in (forward, forward[::-1])
    ]
    rough = Tracker(nudged(package.model), precision="fp32")
    for request in asked:
        [ours] = track(trackers["sam2"], frames_TSS3, request)
        [theirs] = track(package, frames_TSS3, request)
        rounding = changes(track(rough, frames_TSS3, request)[0], theirs)
        found = changes(ours, theirs)
        scales = {
            name: max(float(values_of(frame)[name].abs().max()) for frame in theirs)
            for name in found
        }
        assert found["image_encoder"] < 1e-5
        # Before its rounding to bfloat16; it has a sigmoid of twenty times the mask.
        assert found["memory_encoder"] < 2e-3 * scales["memory_encoder"]
        for name in ("mask", "score", "memory_attention"):
            bound = 10 * rounding[name]
            assert bound < 2**-7 * scales[name], "rounding would hide a difference"
            assert found[name] <= bound, name


def test_proposals_and_a_hidden_subject_are_the_same_both_ways(
    trackers: dict[str, Tracker], package: Tracker, frames_of: Any
) -> None:
    frames_TSS3 = frames_of(package)[:3]
    points_N2 = torch.tensor([[30.0, 40.0], [60.0, 60.0], [100.0, 20.0]])
    proposals = []
    hidden = []
    for tracker, head in (
        (trackers["sam2"], trackers["sam2"].model.mask_decoder.pred_obj_score_head.proj_out),
        (package, package.model.sam_mask_decoder.pred_obj_score_head.layers[-1]),
    ):
        with tracker.encode(frames_TSS3) as encoded:
            proposals.append(tracker.propose_masks(encoded, 1, points_N2, points_per_batch=2))
        visible = head.bias.clone()
        head.bias.fill_(-100.0)
        hidden.append(track(tracker, frames_TSS3, (prompt_of("mask", 128), range(3)))[0])
        head.bias.copy_(visible)
    for name in ("logits", "predicted_iou"):
        ours, theirs = (getattr(one, name) for one in proposals)
        assert ours.shape[:2] == (3, 3)
        torch.testing.assert_close(ours, theirs, atol=1e-5, rtol=0)
    # With the embedding of a hidden subject, which sam2 adds after the memory encoder.
    assert [bool(frame.visible) for frame in hidden[0]] == [True, False, False]
    for ours, theirs in zip(*hidden, strict=True):
        torch.testing.assert_close(
            ours.features["memory_encoder"], theirs.features["memory_encoder"], atol=2e-2, rtol=0
        )
        torch.testing.assert_close(ours.mask_logits_HW, theirs.mask_logits_HW, atol=1e-3, rtol=0)


# SAM2's boxes and points: test_transformers_oracle.py.
@pytest.mark.parametrize(
    ("family", "kind"),
    [("sam2", "mask"), *((family, kind) for family in FAMILIES[1:] for kind in KINDS)],
)
def test_every_family_tracks_as_its_own_session(
    family: str, kind: str, trackers: dict[str, Tracker], frames_of: Any
) -> None:
    """Masks where the session treats them as the trackers' own predictors do, in two things."""
    tracker = trackers[family]
    frames_TSS3 = frames_of(tracker)
    prompt = prompt_of(kind, tracker.model.image_size)
    [ours] = track(tracker, frames_TSS3, (prompt, range(NUM_FRAMES)))
    images_T3SS = drawn(frames_TSS3, *PIXELS[family])
    theirs = run_session(tracker.model, images_T3SS, prompt, as_predictors=kind == "mask")
    for frame, expected in zip(ours, theirs, strict=True):
        pairs = [
            (frame.mask_logits_HW, expected.logits_HW),
            (frame.object_score, expected.score),
        ]
        if frame.index > 0:
            assert expected.attended_CHW is not None
            pairs.append((frame.features["memory_attention"], expected.attended_CHW))
        for value, other in pairs:
            # Pixels are normalised by numpy there.
            torch.testing.assert_close(value, other, atol=5e-4, rtol=0)
    attended = [frame.features["memory_attention"] for frame in ours]
    assert (attended[5] - attended[6]).abs().max() > 0.1


def test_transformers_treats_masks_otherwise(trackers: dict[str, Tracker], frames_of: Any) -> None:
    """So that the two differences are known to be there."""
    tracker = trackers["sam3"]
    frames_TSS3 = frames_of(tracker)[:4]
    prompt = prompt_of("mask", tracker.model.image_size)
    images_T3SS = drawn(frames_TSS3, *PIXELS["sam3"])
    plain = run_session(tracker.model, images_T3SS, prompt)
    changed = run_session(tracker.model, images_T3SS, prompt, as_predictors=True)
    assert plain[2].attended_CHW is not None and changed[2].attended_CHW is not None
    assert (plain[2].attended_CHW - changed[2].attended_CHW).abs().max() > 1e-3


@pytest.mark.parametrize("family", FAMILIES)
def test_streams_side_by_side_equal_single_ones(
    family: str, trackers: dict[str, Tracker], frames_of: Any
) -> None:
    tracker = trackers[family]
    frames_TSS3 = frames_of(tracker)[:3]
    side = tracker.model.image_size
    requests = [(prompt_of("box", side), range(3)), (prompt_of("mask", side), range(3)[::-1])]
    together = track(tracker, frames_TSS3, *requests)
    for request, stream in zip(requests, together, strict=True):
        [alone] = track(tracker, frames_TSS3, request)
        assert max(changes(stream, alone).values()) < 5e-3


@pytest.mark.parametrize(
    ("config", "size", "grid", "stored"),
    [
        (Sam2VideoConfig, 1024, 64, (4096, 64)),
        # The configuration's own backbone, a Hiera; EdgeTAM's RepViT needs timm.
        (EdgeTamVideoConfig, 1024, 64, (512, 64)),
        (Sam3VideoConfig, 1008, 72, (5184, 64)),
    ],
)
def test_official_sizes_have_their_grids(
    config: Any, size: int, grid: int, stored: tuple[int, int], tmp_path: Path
) -> None:
    """On shapes: tokens, features, and the memory that later frames attend to."""
    (tmp_path / "config.json").write_text(json.dumps(config().to_dict()))
    tracker = Tracker(build_without_weights(tmp_path, image_size=size), precision="fp32")
    prompt = Sam2Prompt(
        points_1P2=torch.zeros(1, 2, 2, device="meta"),
        point_labels_1P=torch.zeros(1, 2, dtype=torch.int32, device="meta"),
    )
    encoded = tracker.encode(np.zeros((1, size, size, 3), np.uint8))
    memories: list[torch.Size] = []
    network = tracker._network
    encode_memory = network.encode_memory

    def watching(*inputs: Any, **options: Any) -> Any:
        memory = encode_memory(*inputs, **options)
        memories.append(memory.stored.shape)
        return memory

    network.encode_memory = watching  # type: ignore[method-assign]
    request = TrackRequest(encoded=encoded, prompt=prompt, order=[0, 0])
    frames = [frame for (frame,) in tracker.track([request])]
    assert encoded.sizes == ((4 * grid,) * 2, (2 * grid,) * 2, (grid,) * 2)
    assert memories == [(1, *stored)] * 2
    for frame in frames:
        assert frame.features["memory_attention"].shape == (256, grid, grid)
        assert frame.features["memory_encoder"].shape == (64, grid, grid)
        assert frame.features["image_encoder"].shape == (256, grid, grid)
        assert frame.mask_logits_HW.shape == (4 * grid, 4 * grid)
