"""Frames and prompts in SAM2's input format: resized to a square like in its own predictor."""

# Legend: T frame, S side of SAM2's square input, P point, H W pixels of the training frame.

from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F  # noqa: N812
from PIL import Image

from stages.clips.records import ClipSkipped, SubjectPrompt

IMAGENET_MEAN = (0.485, 0.456, 0.406)
IMAGENET_STD = (0.229, 0.224, 0.225)
_ON_SUBJECT = 0.5
_BOX_LABELS = (2, 3)


@dataclass(frozen=True, kw_only=True, slots=True)
class Sam2Prompt:
    """A prompt on the first visited frame, in coordinates of SAM2's square: a mask, or points."""

    mask_11SS: torch.Tensor | None = None
    """1 on the subject, 0 elsewhere, float32."""
    points_1P2: torch.Tensor | None = None
    """x, y in pixels of the square, float32."""
    point_labels_1P: torch.Tensor | None = None
    """1 on the subject, 0 off it, 2 and 3 the first and last corner of a box; int32."""


def resize_for_sam2(frames_THWC: np.ndarray, image_size: int) -> np.ndarray:
    """Resize frames to SAM2's square as sam2 does for a folder of images: bicubic, with PIL.

    Args:
        frames_THWC: uint8 RGB.
        image_size: S.

    Returns:
        uint8 [T, S, S, 3].
    """
    size = (image_size, image_size)
    # Filled in place: a list of frames and their stack would take twice the memory.
    frames_TSS3 = np.empty((len(frames_THWC), *size, 3), dtype=np.uint8)
    for t, frame_HWC in enumerate(frames_THWC):
        frames_TSS3[t] = np.asarray(Image.fromarray(frame_HWC).resize(size))
    return frames_TSS3


def normalise(
    frames_TSS3: np.ndarray,
    device: torch.device,
    pixel_mean: tuple[float, float, float] = IMAGENET_MEAN,
    pixel_std: tuple[float, float, float] = IMAGENET_STD,
) -> torch.Tensor:
    """uint8 frames -> [T, 3, S, S] float32, normalised with a mean and a standard deviation.

    Channels-first in memory, as in sam2: another memory layout rounds differently.
    """
    bytes_TSS3 = torch.from_numpy(frames_TSS3)
    if device.type == "cuda":
        # A copy from page-locked memory overlaps with the GPU's current work.
        bytes_TSS3 = bytes_TSS3.pin_memory()
    mean = torch.tensor(pixel_mean, device=device)[:, None, None]
    std = torch.tensor(pixel_std, device=device)[:, None, None]
    images_T3SS = bytes_TSS3.to(device, non_blocking=True).permute(0, 3, 1, 2).contiguous()
    return (images_T3SS.float() / 255 - mean) / std


def prompt_for_sam2(
    prompt: SubjectPrompt, *, height: int, width: int, image_size: int, device: torch.device
) -> Sam2Prompt:
    """Convert a prompt from training-frame pixels to SAM2's square.

    The arithmetic is that of SAM2VideoPredictor.add_new_mask and add_new_points_or_box.

    Args:
        prompt: A mask, a box or points on frame 0.
        height: Height of the training frame in pixels.
        width: Width of the training frame in pixels.
        image_size: S.
        device: Device of the result.

    Raises:
        ClipSkipped: bad_prompt, if the mask is empty at SAM2's size.
    """
    if prompt.mask_HW is not None:
        mask_11SS = _square_mask(torch.from_numpy(prompt.mask_HW), image_size)
        if not mask_11SS.any():
            raise ClipSkipped("bad_prompt", f"the mask vanishes at SAM2's {image_size} pixels")
        return Sam2Prompt(mask_11SS=mask_11SS.to(device))
    if prompt.box_xyxy is not None:
        points_P2 = torch.tensor(prompt.box_xyxy, dtype=torch.float32).reshape(2, 2)
        labels_P = torch.tensor(_BOX_LABELS, dtype=torch.int32)
    else:
        points_P2 = torch.as_tensor(prompt.points_xy, dtype=torch.float32)
        labels_P = torch.as_tensor(prompt.point_labels, dtype=torch.int32)
    points_P2 = points_P2 / torch.tensor([width, height]) * image_size
    return Sam2Prompt(
        points_1P2=points_P2[None].to(device), point_labels_1P=labels_P[None].to(device)
    )


def _square_mask(mask_HW: torch.Tensor, image_size: int) -> torch.Tensor:
    mask_11HW = mask_HW[None, None].float()
    if mask_HW.shape == (image_size, image_size):
        return mask_11HW
    resized_11SS = F.interpolate(
        mask_11HW,
        size=(image_size, image_size),
        mode="bilinear",
        align_corners=False,
        antialias=True,
    )
    return (resized_11SS >= _ON_SUBJECT).float()
