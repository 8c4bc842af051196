"""The tracking engine on a GPU: against the CPU, wherever frames wait, in bounded memory."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from stages.demo.build import PRETRAINED
from stages.sam2_tracking.build import build_sam2
from stages.sam2_tracking.inputs import Sam2Prompt
from stages.sam2_tracking.tracker import Tracker, TrackRequest

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device"),
]

SIZE = 128


@pytest.fixture
def weights() -> Path:
    return PRETRAINED / "sam2"


def tracked(weights: Path, device: str, num_frames: int, **settings: Any) -> torch.Tensor:
    """Features of a forward track, [T, C, h, w] on the host."""
    frames = np.random.default_rng(0).integers(0, 255, (num_frames, SIZE, SIZE, 3), dtype=np.uint8)
    model = build_sam2(weights / "tiny.yaml", weights / "tiny.safetensors", device=device)
    tracker = Tracker(model, **{"precision": "fp32", **settings})
    prompt = Sam2Prompt(
        points_1P2=torch.tensor([[[30.0, 40.0], [90.0, 100.0]]], device=device),
        point_labels_1P=torch.tensor([[2, 3]], dtype=torch.int32, device=device),
    )
    with tracker.encode(frames) as encoded:
        request = TrackRequest(encoded=encoded, prompt=prompt, order=range(num_frames))
        maps = [frame.features["memory_attention"].cpu() for (frame,) in tracker.track([request])]
    return torch.stack(maps)


def cosine(a: torch.Tensor, b: torch.Tensor) -> float:
    return torch.nn.functional.cosine_similarity(a, b, dim=1).mean().item()


def test_features_equal_those_of_the_cpu(weights: Path) -> None:
    assert cosine(tracked(weights, "cpu", 9), tracked(weights, "cuda", 9)) > 0.9999


def test_bf16_and_several_frames_a_batch_stay_close(weights: Path) -> None:
    exact = tracked(weights, "cuda", 9)
    rough = tracked(weights, "cuda", 9, precision="bf16", frames_per_batch=4)
    assert cosine(exact, rough) > 0.99


@pytest.mark.parametrize("keep", ["host", "disk"])
def test_where_frames_wait_changes_no_bit(weights: Path, keep: str) -> None:
    # Copies that the device is not done with would show here.
    expected = tracked(weights, "cuda", 49, keep_encoded="device")
    assert torch.equal(tracked(weights, "cuda", 49, keep_encoded=keep), expected)


@pytest.mark.parametrize("keep", ["host", "disk"])
def test_memory_on_the_device_does_not_grow_with_the_clip(weights: Path, keep: str) -> None:
    peaks = []
    for num_frames in (40, 500):
        torch.cuda.reset_peak_memory_stats()
        tracked(weights, "cuda", num_frames, keep_encoded=keep)
        peaks.append(torch.cuda.max_memory_allocated())
    assert peaks[1] < 1.02 * peaks[0]
