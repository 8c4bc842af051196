"""How VBench's networks see frames: sizes, crops, colour normalisation, padding.

Written from Vchitect/VBench at 45e79ec: `vbench/utils.py` (`load_video` gives float32 frames, so
that nothing is rounded or clipped to 8 bits on the way), `vbench2_beta_long/utils.py`, and the
padders of its RAFT and AMT; sizes as in torchvision's `Resize` and `CenterCrop`.
"""

import torch
import torch.nn.functional as F  # noqa: N812
from torch import Tensor

# Legend: B batch, C colour (RGB), H W pixels. Frames are float32, 0 to 255.

_IMAGENET = ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))
_CLIP = ((0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711))
_SIDE = 224
_DINOV2_SHORT_SIDE = 256


def dino_input(frames_BCHW: Tensor) -> Tensor:
    """Shorter side 224 by bilinear interpolation without antialiasing, whole frame."""
    return _normalised(_shorter_side(frames_BCHW, _SIDE, mode="bilinear"), _IMAGENET)


def clip_input(frames_BCHW: Tensor) -> Tensor:
    """Shorter side 224 by bicubic interpolation without antialiasing, centre of 224x224."""
    resized = _shorter_side(frames_BCHW, _SIDE, mode="bicubic")
    return _normalised(_centre(resized, _SIDE), _CLIP)


def dinov2_input(frames_BCHW: Tensor) -> Tensor:
    """Shorter side 256 by bicubic interpolation with antialiasing, centre of 224x224."""
    resized = _shorter_side(frames_BCHW, _DINOV2_SHORT_SIDE, mode="bicubic", antialias=True)
    return _normalised(_centre(resized, _SIDE), _IMAGENET)


def dreamsim_input(frames_BCHW: Tensor) -> Tensor:
    """224x224 by bicubic interpolation with antialiasing, 0 to 1; DreamSim normalises colours."""
    return F.interpolate(frames_BCHW, (_SIDE, _SIDE), mode="bicubic", antialias=True) / 255.0


def pad_to_multiple(images_BCHW: Tensor, multiple: int) -> Tensor:
    """Repeat the edges until both sides are multiples, as much on each side up to a pixel."""
    height, width = images_BCHW.shape[-2:]
    top, left = (-height % multiple) // 2, (-width % multiple) // 2
    bottom, right = -height % multiple - top, -width % multiple - left
    return F.pad(images_BCHW, (left, right, top, bottom), mode="replicate")


def remove_padding(padded_BCHW: Tensor, height: int, width: int) -> Tensor:
    """Undo `pad_to_multiple`."""
    top, left = (
        (now - before) // 2
        for now, before in zip(padded_BCHW.shape[-2:], (height, width), strict=True)
    )
    return padded_BCHW[..., top : top + height, left : left + width]


def _shorter_side(frames_BCHW: Tensor, side: int, *, mode: str, antialias: bool = False) -> Tensor:
    height, width = frames_BCHW.shape[-2:]
    shorter = min(height, width)
    size = (int(side * height / shorter), int(side * width / shorter))
    return F.interpolate(frames_BCHW, size, mode=mode, antialias=antialias)


def _centre(images_BCHW: Tensor, side: int) -> Tensor:
    top, left = (round((length - side) / 2) for length in images_BCHW.shape[-2:])
    return images_BCHW[..., top : top + side, left : left + side]


def _normalised(
    frames_BCHW: Tensor, statistics: tuple[tuple[float, ...], tuple[float, ...]]
) -> Tensor:
    mean_C11, spread_C11 = (
        torch.tensor(values, device=frames_BCHW.device)[:, None, None] for values in statistics
    )
    return (frames_BCHW / 255.0 - mean_C11) / spread_C11
