import json
from fractions import Fraction

import numpy as np
import pytest

from stages.clips import ClipSkipped, SubjectPrompt, load_clip, probe_clip
from stages.clips.video.decoding import orientation_of

ONE = 1 << 16
MATRICES = {
    "as stored": (1, 0, 0, 1),
    "quarter turn": (0, 1, -1, 0),
    "half turn": (-1, 0, 0, -1),
    "three quarter turn": (0, -1, 1, 0),
    "hflip": (-1, 0, 0, 1),
    "vflip": (1, 0, 0, -1),
    "transpose": (0, 1, 1, 0),
    "transverse": (0, -1, -1, 0),
}


def matrix_of(a: float, b: float, c: float, d: float, u: float = 0, v: float = 0) -> list[int]:
    """The nine numbers as they stand in a file."""
    values = [round(value * ONE) for value in (a, b, c, d)]
    perspective = [round(value * (1 << 30)) for value in (u, v)]
    return [*values[:2], perspective[0], *values[2:], perspective[1], 0, 0, 1 << 30]


def encoded(image_HWC: np.ndarray, matrix: list[int], tools) -> bytes:
    frames = np.repeat(image_HWC[None], 9, axis=0)
    return tools.encode(frames, display_matrix=matrix)


def shown(image_HWC: np.ndarray, a: int, b: int, c: int, d: int) -> np.ndarray:
    """Where the format's definition puts every pixel: (X, Y) at (aX + cY, bX + dY)."""
    height, width, _ = image_HWC.shape
    places = {
        (a * X + c * Y, b * X + d * Y): image_HWC[Y, X] for Y in range(height) for X in range(width)
    }
    left, top = (min(place[axis] for place in places) for axis in (0, 1))
    size = (width, height) if a else (height, width)
    out = np.empty((size[1], size[0], 3), np.uint8)
    for (x, y), colour in places.items():
        out[y - top, x - left] = colour
    return out


@pytest.mark.parametrize("name", MATRICES)
def test_frames_and_prompts_are_as_the_file_asks_them_to_be_shown(name, tools, config):
    stored = tools.corner_frame(32, 64)
    stored[4:12, 8:24] = (255, 255, 0)  # the subject, nearer to the top left
    upright = shown(stored, *MATRICES[name])
    height, width, _ = upright.shape
    subject_HW = (upright[..., 0] > 200) & (upright[..., 1] > 200) & (upright[..., 2] < 50)
    rows, columns = np.nonzero(subject_HW)
    box = (columns.min(), rows.min(), columns.max() + 1, rows.max() + 1)
    prompts = (
        SubjectPrompt(mask_HW=subject_HW),
        SubjectPrompt(box_xyxy=tuple(map(float, box))),
        SubjectPrompt(
            points_xy=np.array([[columns.mean() + 0.5, rows.mean() + 0.5]]),
            point_labels=np.array([1]),
        ),
    )
    video = encoded(stored, matrix_of(*MATRICES[name]), tools)
    clip = load_clip(tools.record_of(video, *prompts), config(height=height, width=width))
    frame_HWC = clip.frames_THWC[0].astype(int)
    assert np.abs(frame_HWC - upright).max() < 40 and np.abs(frame_HWC - upright).mean() < 2
    for prompt, given in zip(clip.prompts, prompts, strict=True):
        if prompt.mask_HW is not None:
            inside = frame_HWC[prompt.mask_HW]
        elif prompt.box_xyxy is not None:
            x0, y0, x1, y1 = map(int, prompt.box_xyxy)
            inside = frame_HWC[y0:y1, x0:x1].reshape(-1, 3)
        else:
            x, y = prompt.points_xy[0].astype(int)
            inside = frame_HWC[y, x][None]
        assert (np.abs(inside - (255, 255, 0)).max(axis=1) < 60).mean() > 0.9, given.kind
    assert json.loads(json.dumps(clip.geometry.as_dict())) == clip.geometry.as_dict()


def test_anamorphic_pixels_are_turned_with_their_frame(tools, config):
    # 24 x 32 stored, pixels twice as high as wide: 48 x 32 on the screen, turned 32 x 48.
    stored = tools.corner_frame(24, 32)
    video = tools.encode(
        np.repeat(stored[None], 9, axis=0),
        display_matrix=matrix_of(0, 1, -1, 0),
        pixel_aspect=Fraction(1, 2),
    )
    clip = load_clip(tools.record_of(video), config())
    assert (clip.geometry.scale_x, clip.geometry.scale_y) == (2.0, 1.0)
    wide = shown(tools.corner_frame(48, 32), 0, 1, -1, 0)
    assert np.abs(clip.frames_THWC[0].astype(int) - wide)[:, :20].mean() < 4


@pytest.mark.parametrize(
    ("matrix", "words"),
    [
        (matrix_of(0.7071, 0.7071, -0.7071, 0.7071), "neither a rotation"),
        (matrix_of(1, 0.2, 0, 1), "neither a rotation"),
        (matrix_of(0, 0, 0, 0), "neither a rotation"),
        (matrix_of(1, 0, 0, 1, u=0.1), "perspective"),
        (matrix_of(0, 2, -1, 0), "scales them unevenly"),
    ],
    ids=["45 degrees", "shear", "nothing", "perspective", "stretched turn"],
)
def test_what_cannot_be_shown_pixel_by_pixel_is_skipped(matrix, words, tools, config):
    with pytest.raises(ValueError, match=words):
        orientation_of(np.array(matrix, np.int32))
    video = encoded(tools.corner_frame(32, 48), matrix, tools)
    with pytest.raises(ClipSkipped, match=words) as caught:
        load_clip(tools.record_of(video), config())
    assert caught.value.reason == "undecodable"
    probe_clip(tools.record_of(video), config())  # headers do not tell


def test_a_scaled_matrix_turns_as_an_unscaled_one():
    assert orientation_of(np.array(matrix_of(0, 3, -3, 0), np.int32)) == orientation_of(
        np.array(matrix_of(0, 1, -1, 0), np.int32)
    )
