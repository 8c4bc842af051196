"""Records of a dataset, their subject prompts, decoded clips, and the outcomes of loading."""

from dataclasses import dataclass, replace
from typing import Literal

import numpy as np

from stages.clips.geometry import FrameGeometry
from stages.clips.video.streams import VideoSource

# Legend: T frame, H W pixels, C colour (RGB), N points.

PromptKind = Literal["mask", "box", "points"]


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class SubjectPrompt:
    """Exactly one of a mask, a box, or points, in pixels of some frame.

    Raises:
        ValueError: Not exactly one is given, or it is empty or malformed.
    """

    mask_HW: np.ndarray | None = None
    """bool [H, W], at least one pixel set."""
    box_xyxy: tuple[float, float, float, float] | None = None
    """x0, y0, x1, y1 with x0 < x1 and y0 < y1; right and bottom edges exclusive."""
    points_xy: np.ndarray | None = None
    """float64 [N, 2], N >= 1."""
    point_labels: np.ndarray | None = None
    """int64 [N], 1 on the subject and 0 off it; at least one 1."""
    number: int | None = None
    """Number of the subject within the clip, the same on the first and the last frame; None if it
    is unknown."""

    def __post_init__(self) -> None:
        given = [
            name
            for name, value in (
                ("mask", self.mask_HW),
                ("box", self.box_xyxy),
                ("points", self.points_xy),
            )
            if value is not None
        ]
        if len(given) != 1:
            raise ValueError(
                f"a prompt must be a mask, a box or points; got {given or 'none of them'}"
            )
        if self.mask_HW is not None:
            _check_mask(self.mask_HW)
        elif self.box_xyxy is not None:
            _check_box(self.box_xyxy)
        elif self.points_xy is not None:
            _check_points(self.points_xy, self.point_labels)

    @property
    def kind(self) -> PromptKind:
        """Type of the prompt."""
        if self.mask_HW is not None:
            return "mask"
        return "box" if self.box_xyxy is not None else "points"

    def to_training_frame(self, geometry: FrameGeometry) -> "SubjectPrompt | None":
        """The prompt in training-frame pixels; None if it lies outside the crop.

        Boxes are clipped to the frame; points outside it are dropped.

        Raises:
            ValueError: The size of the mask differs from that of the source; or a point, or the
                middle of the box, lies outside the source.
        """
        if self.mask_HW is not None:
            mask_HW = geometry.mask(self.mask_HW)
            return replace(self, mask_HW=mask_HW) if mask_HW.any() else None
        if self.box_xyxy is not None:
            x0, y0, x1, y1 = self.box_xyxy
            _check_inside(np.array([[(x0 + x1) / 2, (y0 + y1) / 2]]), "the middle of box", geometry)
            box_xyxy = _crop_box(self.box_xyxy, geometry)
            return None if box_xyxy is None else replace(self, box_xyxy=box_xyxy)
        assert self.points_xy is not None and self.point_labels is not None
        _check_inside(self.points_xy, "point", geometry)
        points_xy = geometry.points(self.points_xy)
        inside = ((points_xy >= 0) & (points_xy < (geometry.width, geometry.height))).all(axis=1)
        if not (self.point_labels[inside] == 1).any():
            return None
        labels = self.point_labels[inside]
        return replace(self, points_xy=points_xy[inside], point_labels=labels)


def _check_mask(mask_HW: np.ndarray) -> None:
    if mask_HW.ndim != 2 or mask_HW.dtype != np.bool_:
        raise ValueError(f"mask must be bool [H, W], got {mask_HW.dtype} {mask_HW.shape}")
    if not mask_HW.any():
        raise ValueError("the mask is empty: no pixel is on the subject")


def _check_box(box_xyxy: tuple[float, float, float, float]) -> None:
    x0, y0, x1, y1 = box_xyxy
    if not (np.isfinite(box_xyxy).all() and x0 < x1 and y0 < y1):
        raise ValueError(f"box_xyxy must be finite with x0 < x1 and y0 < y1, got {box_xyxy}")


def _check_points(points_xy: np.ndarray, labels: np.ndarray | None) -> None:
    if points_xy.ndim != 2 or points_xy.shape[1:] != (2,) or len(points_xy) == 0:
        raise ValueError(f"points must be a list of x, y pairs, got shape {points_xy.shape}")
    if labels is None or labels.shape != (len(points_xy),):
        got = None if labels is None else labels.shape
        raise ValueError(
            f"point_labels must contain one label per point ({len(points_xy)}), got {got}"
        )
    if not np.isin(labels, (0, 1)).all() or not (labels == 1).any():
        raise ValueError(
            "point_labels must be 0 or 1 with at least one 1 (on the subject), "
            f"got {labels.tolist()}"
        )


def _check_inside(points_xy: np.ndarray, what: str, geometry: FrameGeometry) -> None:
    """Reject coordinates outside the source, which were made for a video of a different size."""
    size = (geometry.source_width, geometry.source_height)
    outside = ((points_xy < 0) | (points_xy > size)).any(axis=1)
    if outside.any():
        x, y = points_xy[outside][0].tolist()
        raise ValueError(
            f"{what} ({x:g}, {y:g}) lies outside the video of {size[0]}x{size[1]} pixels (WxH)"
        )


def _crop_box(
    box_xyxy: tuple[float, float, float, float], geometry: FrameGeometry
) -> tuple[float, float, float, float] | None:
    corners_22 = geometry.points(np.array(box_xyxy, dtype=np.float64).reshape(2, 2))
    (x0, y0), (x1, y1) = np.clip(corners_22, 0, (geometry.width, geometry.height)).tolist()
    return (x0, y0, x1, y1) if x0 < x1 and y0 < y1 else None


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class ClipRecord:
    """One clip of the dataset, not decoded; prompts in source pixels."""

    key: str
    """Unique in the dataset; never used as a path."""
    video: VideoSource
    caption: str | None = None
    prompts: tuple[SubjectPrompt, ...] = ()
    """The subjects on frame 0, one prompt each."""
    last_frame_prompts: tuple[SubjectPrompt, ...] = ()
    """The same subjects on the last training frame, index num_frames - 1 after sampling."""
    phrase: str | None = None
    """Phrase that describes the subject for grounding, such as "the brown bear"."""


@dataclass(frozen=True, kw_only=True, slots=True)
class BadRecord:
    """An invalid entry of the dataset and the reason; it must be recorded, never dropped."""

    key: str
    """Unique in the dataset, like a clip's; an entry with a duplicate key gets a suffix."""
    reason: str
    """bad_record or bad_prompt."""
    detail: str


class ClipSkipped(Exception):  # noqa: N818 - an outcome that callers record, not a failure
    """A clip that cannot be used.

    Attributes:
        reason: A slug. From loading: undecodable, too_short, fps_too_low; callers add their own,
            such as no_prompt, bad_prompt and no_caption.
        detail: One-line explanation.
    """

    def __init__(self, reason: str, detail: str) -> None:
        super().__init__(f"{reason}: {detail}")
        self.reason = reason
        self.detail = detail


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class Clip:
    """A decoded clip at the training size, rate and length; prompts in training-frame pixels."""

    key: str
    frames_THWC: np.ndarray
    """uint8 [num_frames, height, width, 3], RGB."""
    geometry: FrameGeometry
    caption: str | None = None
    prompts: tuple[SubjectPrompt, ...] = ()
    """The subjects within the crop on frame 0."""
    last_frame_prompts: tuple[SubjectPrompt, ...] = ()
    """The subjects within the crop on frame num_frames - 1."""
    phrase: str | None = None
    """Phrase that describes the subject."""
    prompt_problem: str | None = None
    """Why `prompts` is empty although the dataset has prompts for this clip; otherwise None."""
