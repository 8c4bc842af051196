"""What the networks see, against loops over pixels, and Pillow where a resize antialiases."""

import math

import numpy as np
import pytest
import torch
from PIL import Image

from stages.video_scores.vbench.preprocess import (
    clip_input,
    dino_input,
    dinov2_input,
    dreamsim_input,
    pad_to_multiple,
    remove_padding,
)

IMAGENET = ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))
CLIP = ((0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711))
SIZES = [(480, 720), (300, 260), (224, 224), (130, 171)]


def frame_of(height, width):
    return np.random.default_rng(0).integers(0, 256, (height, width, 3)).astype(np.float64)


def as_input(frame_HWC):
    return torch.from_numpy(frame_HWC).float().permute(2, 0, 1)[None]


def linear(distance):
    return max(0.0, 1 - abs(distance))


def cubic(distance):
    """Keys' kernel with a = -0.75."""
    x, a = abs(distance), -0.75
    if x <= 1:
        return (a + 2) * x**3 - (a + 3) * x**2 + 1
    return a * (x**3 - 5 * x**2 + 8 * x - 4) if x < 2 else 0.0


def resized(frame_HWC, size, kernel):
    """Without antialiasing: the nearest source pixels alone, edges repeated."""
    for axis, length in enumerate(size):
        source = frame_HWC.shape[axis]
        weights = np.zeros((length, source))
        for target in range(length):
            centre = (target + 0.5) * source / length - 0.5
            for tap in range(math.floor(centre) - 1, math.floor(centre) + 3):
                weights[target, min(max(tap, 0), source - 1)] += kernel(tap - centre)
        frame_HWC = np.moveaxis(np.tensordot(weights, frame_HWC, (1, axis)), 0, axis)
    return frame_HWC


def with_pillow(frame_HWC, size):
    """Bicubic with antialiasing, in floating point."""
    channels = [
        Image.fromarray(frame_HWC[..., channel].astype(np.float32)).resize(
            size[::-1], Image.Resampling.BICUBIC
        )
        for channel in range(3)
    ]
    return np.stack([np.asarray(channel) for channel in channels], axis=-1).astype(np.float64)


def shorter_side(height, width, side):
    if height <= width:
        return side, math.floor(side * width / height)
    return math.floor(side * height / width), side


def centre(frame_HWC):
    height, width, _ = frame_HWC.shape
    top, left = round((height - 224) / 2), round((width - 224) / 2)
    return frame_HWC[top : top + 224, left : left + 224]


def assert_close(found_BCHW, frame_HWC, statistics, atol):
    mean, spread = map(np.array, statistics)
    expected = (frame_HWC / 255 - mean) / spread
    np.testing.assert_allclose(found_BCHW[0].permute(1, 2, 0).numpy(), expected, atol=atol)


@pytest.mark.parametrize(("height", "width"), SIZES)
def test_dino_sees_the_whole_frame(height, width):
    frame = frame_of(height, width)
    expected = resized(frame, shorter_side(height, width, 224), linear)
    assert_close(dino_input(as_input(frame)), expected, IMAGENET, 2e-3)


@pytest.mark.parametrize(("height", "width"), SIZES)
def test_clip_sees_the_centre(height, width):
    frame = frame_of(height, width)
    expected = centre(resized(frame, shorter_side(height, width, 224), cubic))
    assert_close(clip_input(as_input(frame)), expected, CLIP, 2e-3)


def test_overshoots_of_clips_resize_are_not_clipped():
    frame = np.zeros((130, 171, 3))
    frame[:, 80:] = 255.0
    mean, spread = CLIP
    lowest = (clip_input(as_input(frame))[0, 0].min() * spread[0] + mean[0]) * 255
    assert lowest < -5


@pytest.mark.parametrize(("height", "width"), SIZES)
def test_dinov2_sees_the_centre_of_an_antialiased_frame(height, width):
    frame = frame_of(height, width)
    expected = centre(with_pillow(frame, shorter_side(height, width, 256)))
    assert_close(dinov2_input(as_input(frame)), expected, IMAGENET, 5e-3)


@pytest.mark.parametrize(("height", "width"), SIZES)
def test_dreamsim_sees_a_square(height, width):
    frame = frame_of(height, width)
    expected = with_pillow(frame, (224, 224))
    assert_close(dreamsim_input(as_input(frame)), expected, ((0, 0, 0), (1, 1, 1)), 1e-3)


@pytest.mark.parametrize("multiple", [8, 16])
@pytest.mark.parametrize(("height", "width"), [(130, 171), (128, 128), (129, 135)])
def test_padding_repeats_the_edges_on_both_sides(height, width, multiple):
    frame = frame_of(height, width)
    padded = pad_to_multiple(as_input(frame), multiple)
    (up, down), (left, right) = (
        (missing // 2, missing - missing // 2)
        for missing in ((-height) % multiple, (-width) % multiple)
    )
    expected = np.pad(frame, ((up, down), (left, right), (0, 0)), mode="edge")
    np.testing.assert_array_equal(padded[0].permute(1, 2, 0).numpy(), expected)
    assert torch.equal(remove_padding(padded, height, width), as_input(frame))
