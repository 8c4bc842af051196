"""Masks of the subjects on a first frame, beside its image and the videos that begin with it.

    0000.png           the image, or the video
    0000.mask.png      the subject's mask; 0000.mask.0.png, 0000.mask.1.png, … of several subjects

Beside a video they are its prompts, as in a dataset (`stages.clips.dataset`).
"""

import io
import re
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
from PIL import Image

from cache_schema.atomic_io import make_directories, write_atomic
from stages.clips import ClipsConfig, SubjectPrompt
from stages.clips.dataset.fields import read_at_most
from stages.clips.dataset.masks import MAX_MASK_BYTES, decode_mask
from stages.students.sampler import first_frame_mask

# Legend: H W pixels.

_SUFFIX = re.compile(r"\.mask(?:\.[0-9]+)?\.png", re.IGNORECASE)


def masks_beside(file: Path) -> dict[str, Path]:
    """The masks beside an image or a video, by lower-case suffix in place of the file's own."""
    found = sorted(file.parent.iterdir()) if file.parent.is_dir() else []
    return {
        path.name.removeprefix(file.stem).lower(): path
        for path in found
        if path.name.startswith(file.stem) and _SUFFIX.fullmatch(path.name, len(file.stem))
    }


def write_subjects(image: Path, subjects: Sequence[SubjectPrompt]) -> None:
    """Write the masks of a frame's subjects beside its image, replacing those that are there.

    There are none afterwards unless every subject is given by a mask.

    Args:
        image: The frame.
        subjects: Its subjects, in pixels of the frame.
    """
    masks: dict[str, np.ndarray] = {}
    for number, subject in enumerate(subjects):
        if subject.mask_HW is None:
            masks.clear()
            break
        masks[".mask.png" if len(subjects) == 1 else f".mask.{number}.png"] = subject.mask_HW
    for suffix, path in masks_beside(image).items():
        if suffix not in masks:
            path.unlink()
    _write(image, masks)


def place_masks(image: Path, video: Path, size: ClipsConfig) -> None:
    """Write the masks beside an image also beside a video that begins with it, at its size.

    Args:
        image: First frame of the video, of any size.
        video: The video, whether or not it exists yet; earlier masks of the same names are
            replaced.
        size: Height and width of the video.

    Raises:
        ValueError: A mask cannot be read or does not fit the image, or the video has masks that
            the image does not have.
    """
    masks: dict[str, np.ndarray] = {}
    for suffix, path in masks_beside(image).items():
        try:
            mask_HW = decode_mask(read_at_most(path, MAX_MASK_BYTES, str(path)))
            masks[suffix] = first_frame_mask(mask_HW, image, size)
        except ValueError as error:
            raise ValueError(f"{path}: {error}") from error
    for suffix, path in masks_beside(video).items():
        if suffix not in masks:
            raise ValueError(
                f"{path} is a mask that the first frame {image} does not have; remove it"
            )
    _write(video, masks)


def _write(file: Path, masks: Mapping[str, np.ndarray]) -> None:
    make_directories(file.parent)
    for suffix, mask_HW in masks.items():
        png = io.BytesIO()
        Image.fromarray(mask_HW.astype(np.uint8) * 255).save(png, format="PNG")
        write_atomic(file.with_name(f"{file.stem}{suffix}"), png.getvalue())
