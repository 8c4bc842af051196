"""The automatic source on drawn scenes, with given mask proposals and with a tiny SAM2."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F  # noqa: N812

from stages.clips import ClipSkipped
from stages.extract_features.prompts import salience
from stages.extract_features.prompts.automatic import AutomaticSource, motion_of_tokens
from stages.sam2_tracking.build import build_sam2
from stages.sam2_tracking.inputs import resize_for_sam2
from stages.sam2_tracking.step import MaskProposals
from stages.sam2_tracking.tracker import Tracker
from tests.stages.extract_features.prompts.noise_clip import make_clip

SIZE, FRAMES = 256, 9
Box = tuple[int, int, int, int]


class DrawnFrames:
    """Encoded frames whose second level holds random projections of 8x8 patches of the picture."""

    def __init__(self, frames_TSS3: np.ndarray) -> None:
        side = frames_TSS3.shape[1] // 8
        self.num_frames = len(frames_TSS3)
        self.sizes = ((2 * side, 2 * side), (side, side), (side // 2, side // 2))
        kernel = torch.randn(24, 3, 8, 8, generator=torch.Generator().manual_seed(0))
        images_T3SS = torch.from_numpy(frames_TSS3).permute(0, 3, 1, 2).float() / 255 - 0.5
        self._level_NTC = F.conv2d(images_T3SS, kernel, stride=8).flatten(2).permute(2, 0, 1)

    def levels_at(self, indices: Sequence[int]) -> list[Any]:
        return [None, self._level_NTC[:, list(indices)], None]


class GivenProposals:
    """A tracker whose decoder proposes, for every point, the boxes it lies in."""

    def __init__(self, *boxes: Box) -> None:
        side = SIZE // 4
        self.logits_NSS = torch.full((len(boxes), side, side), -10.0)
        for number, box in enumerate(boxes):
            x0, y0, x1, y1 = (edge // 4 for edge in box)
            self.logits_NSS[number, y0:y1, x0:x1] = 10.0
        self.points_N2 = torch.empty(0, 2)

    def propose_masks(self, encoded: Any, index: int, points_N2: torch.Tensor) -> MaskProposals:
        assert index == 0
        self.points_N2 = points_N2
        x, y = (points_N2 // 4).long().unbind(-1)
        hit_NM = self.logits_NSS[:, y, x].T > 0
        logits = torch.where(hit_NM[..., None, None], self.logits_NSS, -10.0)
        return MaskProposals(logits=logits, predicted_iou=torch.full(hit_NM.shape, 0.9))


def scene(pan: int, square: Box | None, speed: int) -> np.ndarray:
    """uint8 frames: a texture that pans, a still-standing box painted on it, a moving square."""
    noise = np.random.default_rng(0)
    world = noise.integers(0, 256, (SIZE // 8, SIZE // 4, 3), dtype=np.uint8)
    world = world.repeat(8, 0).repeat(8, 1)
    paint = noise.integers(0, 256, (SIZE // 8, SIZE // 8, 3), dtype=np.uint8)
    paint = paint.repeat(8, 0).repeat(8, 1)
    frames = []
    for t in range(FRAMES):
        frame = world[:, SIZE // 2 - pan * t : SIZE // 2 - pan * t + SIZE].copy()
        if square is not None:
            x0, y0, x1, y1 = square
            shift = speed * t
            frame[y0:y1, x0 + shift : x1 + shift] = paint[y0:y1, x0:x1]
        frames.append(frame)
    return np.stack(frames)


def find(frames_TSS3: np.ndarray, tracker: Any) -> Any:
    clip = make_clip(frames_THWC=frames_TSS3[:, ::4, ::4])
    return AutomaticSource(SIZE).find(clip, tracker, DrawnFrames(frames_TSS3))  # type: ignore[arg-type]


def box_of(mask_HW: np.ndarray) -> Box:
    """In pixels of SAM2's square."""
    y, x = np.nonzero(mask_HW)
    return tuple(4 * int(edge) for edge in (x.min(), y.min(), x.max() + 1, y.max() + 1))  # type: ignore[return-value]


CENTRE: Box = (96, 96, 160, 160)
CORNER: Box = (16, 176, 64, 224)


@pytest.mark.parametrize("pan", [0, 8, -8])
def test_a_square_moving_over_a_panning_background_is_found(pan: int) -> None:
    frames_TSS3 = scene(pan, CORNER, speed=pan + 8)
    chosen = find(frames_TSS3, GivenProposals(CENTRE, CORNER, (0, 0, SIZE, 96)))
    assert (chosen.source, chosen.frame) == ("automatic", 0)
    assert box_of(chosen.subjects[0].mask_HW) == CORNER
    assert chosen.detail["moves"] is True
    assert 0.3 < chosen.detail["tokens_per_frame"] < 1.05
    assert 0.3 < chosen.confidence <= 1


def test_a_square_that_stands_while_the_background_pans_is_found() -> None:
    frames_TSS3 = scene(8, CORNER, speed=0)
    chosen = find(frames_TSS3, GivenProposals(CENTRE, CORNER))
    assert box_of(chosen.subjects[0].mask_HW) == CORNER


@pytest.mark.parametrize("pan", [0, 8])
def test_when_nothing_moves_the_object_in_the_middle_is_found(pan: int) -> None:
    tracker = GivenProposals(CORNER, CENTRE, (0, 0, SIZE, 96))
    chosen = find(scene(pan, None, speed=0), tracker)
    assert box_of(chosen.subjects[0].mask_HW) == CENTRE
    assert chosen.detail["moves"] is False
    assert chosen.detail["candidates"] == 3


def test_the_points_are_the_centres_of_a_grid() -> None:
    tracker = GivenProposals(CENTRE)
    find(scene(0, None, speed=0), tracker)
    centres = (np.arange(16) + 0.5) * SIZE / 16
    expected = np.stack(np.meshgrid(centres, centres), axis=-1).reshape(-1, 2)
    np.testing.assert_array_equal(tracker.points_N2.numpy(), expected)


def test_no_sure_mask_is_nothing_found() -> None:
    with pytest.raises(ClipSkipped, match=r"nothing_found: none of SAM2's 256 masks"):
        find(scene(0, None, speed=0), GivenProposals((0, 0, 4, 4)))


def test_a_clip_shorter_than_the_longest_gap_is_measured_over_what_there_is() -> None:
    frames_TSS3 = scene(0, CORNER, speed=8)
    short = motion_of_tokens(DrawnFrames(frames_TSS3[:3]))  # type: ignore[arg-type]
    assert short.speed_HW.shape == (32, 32)
    assert short.speed_HW[22:28, 2:8].mean() == pytest.approx(1.0, abs=0.05)


def test_a_real_sam2_gives_one_mask_of_the_clips_size_and_always_the_same(
    tiny_sam2: tuple[Path, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    for bound in ("_MIN_PREDICTED_IOU", "_MIN_STABILITY", "_MIN_AREA"):
        monkeypatch.setattr(salience, bound, -1e9)  # random weights are sure of nothing
    monkeypatch.setattr(salience, "_MAX_AREA", 1.0)
    configuration, checkpoint = tiny_sam2
    tracker = Tracker(build_sam2(configuration, checkpoint, image_size=128), precision="fp32")
    clip = make_clip()
    with tracker.encode(resize_for_sam2(clip.frames_THWC, 128)) as encoded:
        first, second = (AutomaticSource(128).find(clip, tracker, encoded) for _ in range(2))
    mask_HW = first.subjects[0].mask_HW
    assert mask_HW is not None
    assert mask_HW.shape == clip.frames_THWC.shape[1:3]
    np.testing.assert_array_equal(mask_HW, second.subjects[0].mask_HW)
    assert first.detail == second.detail
