"""The tracking engine against another implementation: transformers' Sam2VideoModel.

Point and box prompts only: transformers puts mask prompts into the memory in another way.
"""

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from transformers import Sam2VideoInferenceSession, Sam2VideoModel

from stages.sam2_tracking.inputs import Sam2Prompt, normalise
from stages.sam2_tracking.tracker import (
    TrackedFrame,
    Tracker,
    TrackRequest,
)
from tests.stages.sam2_tracking.transformers_weights import to_transformers

SIZE, WIDTH = 128, 128
CPU = torch.device("cpu")


def track_with(
    oracle: Sam2VideoModel, frames_TSS3: np.ndarray, prompt: Sam2Prompt
) -> list[tuple[torch.Tensor, torch.Tensor, torch.Tensor | None]]:
    """Mask logits, score, and the output of memory attention, frame by frame."""
    session = Sam2VideoInferenceSession(
        video=normalise(frames_TSS3, CPU),
        video_height=SIZE,
        video_width=SIZE,
        dtype=torch.float32,
    )
    index = session.obj_id_to_idx(1)
    assert prompt.points_1P2 is not None and prompt.point_labels_1P is not None
    session.add_point_inputs(
        index,
        0,
        {
            "point_coords": prompt.points_1P2[:, None],
            "point_labels": prompt.point_labels_1P[:, None],
        },
    )
    session.obj_with_new_inputs = [1]
    attended: list[torch.Tensor] = []
    hook = oracle.memory_attention.register_forward_hook(
        lambda module, inputs, output: attended.append(output)
    )
    tracked = []
    for t in range(len(frames_TSS3)):
        attended.clear()
        output = oracle(session, frame_idx=t)
        tracked.append(
            (
                output.pred_masks[0, 0],
                output.object_score_logits.flatten()[0],
                attended[0] if attended else None,
            )
        )
    hook.remove()
    return tracked


def track(model: Any, frames_TSS3: np.ndarray, prompt: Sam2Prompt) -> list[TrackedFrame]:
    tracker = Tracker(model, precision="fp32")
    encoded = tracker.encode(frames_TSS3)
    request = TrackRequest(encoded=encoded, prompt=prompt, order=range(encoded.num_frames))
    return [frame for (frame,) in tracker.track([request])]


def values_of(frame: TrackedFrame) -> dict[str, torch.Tensor]:
    return {
        "mask": frame.mask_logits_HW,
        "score": frame.object_score,
        "attended": frame.features["memory_attention"],
    }


def effect_of_rounding(
    nudged_model: Any, ours: list[TrackedFrame], frames_TSS3: np.ndarray, prompt: Sam2Prompt
) -> dict[str, float]:
    """How far the memories that are a step off carry each value, at most, on any frame."""
    changes: dict[str, list[float]] = {"mask": [], "score": [], "attended": []}
    for frame, other in zip(ours, track(nudged_model, frames_TSS3, prompt), strict=True):
        for name, value in values_of(frame).items():
            changes[name].append(float((value - values_of(other)[name]).abs().max()))
    return {name: max(values) for name, values in changes.items()}


PROMPTS = {
    "one point": ([[54.0, 64.0]], [1]),
    "points on and off": ([[54.0, 64.0], [70.0, 50.0], [110.0, 100.0]], [1, 1, 0]),
    "box": ([[18.0, 32.0], [62.0, 98.0]], [2, 3]),
}


@pytest.mark.parametrize("kind", PROMPTS)
def test_points_and_boxes_are_tracked_as_transformers_does(
    kind: str,
    wide_sam2: Any,
    draw_frames: Callable[..., np.ndarray],
    nudged: Callable[[Any], Any],
) -> None:
    frames_TSS3 = draw_frames(20, SIZE, SIZE)  # more than the bank holds
    points, labels = PROMPTS[kind]
    prompt = Sam2Prompt(
        points_1P2=torch.tensor([points]),
        point_labels_1P=torch.tensor([labels], dtype=torch.int32),
    )

    ours = track(wide_sam2, frames_TSS3, prompt)
    theirs = track_with(to_transformers(wide_sam2), frames_TSS3, prompt)
    rounding = effect_of_rounding(nudged(wide_sam2), ours, frames_TSS3, prompt)

    assert sum(frame.visible for frame in ours) > 10
    for frame, (mask_HW, score, attended) in zip(ours, theirs, strict=True):
        expected = {"mask": mask_HW, "score": score}
        if frame.index > 0:  # transformers too skips memory attention on the prompted frame
            assert attended is not None
            expected["attended"] = attended.squeeze().T.reshape(WIDTH, SIZE // 16, SIZE // 16)
        for name, value in expected.items():
            bound = 10 * rounding[name]
            assert bound < 2**-8 * float(value.abs().max()), "rounding would hide a difference"
            torch.testing.assert_close(values_of(frame)[name], value, atol=bound, rtol=0)
