"""Writes the demo's clips as webdataset tars."""

import io
import json
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from PIL import Image

from stages.clips import encode_video
from stages.demo.scenes import FigureClip, draw_clip
from stages.progress import Task


def write_clip_tars(
    out: Path,
    seeds: Sequence[int],
    *,
    clips_per_tar: int,
    num_frames: int,
    height: int,
    width: int,
    fps: float,
    task: Task,
) -> None:
    """Draw one clip per seed and write them as 00000.tar, 00001.tar, …

    Each clip has `<key>.mp4`, `<key>.txt` (caption), `<key>.mask.png` (the figure on frame 0) and
    `<key>.joints.json` (see `FigureClip.ground_truth`). Equal arguments give equal bytes.

    Args:
        out: Output folder; created if missing.
        seeds: One seed per clip.
        clips_per_tar: Clips per tar; the last one may have fewer.
        num_frames: Frames per clip.
        height: Pixels.
        width: Pixels.
        fps: Frames per second.
        task: Advanced by one per clip.
    """
    # Imported here, so that a complete demo does not import torch.
    from webdataset import TarWriter

    out.mkdir(parents=True, exist_ok=True)
    for number, start in enumerate(range(0, len(seeds), clips_per_tar)):
        with (
            (out / f"{number:05d}.tar").open("wb") as file,
            TarWriter(file, encoder=False, mtime=0) as tar,
        ):
            for seed in seeds[start : start + clips_per_tar]:
                clip = draw_clip(seed, num_frames=num_frames, height=height, width=width, fps=fps)
                tar.write({"__key__": f"{clip.kind}-{seed:06d}", **_members(clip)})
                task.advance()


def _members(clip: FigureClip) -> dict[str, bytes]:
    return {
        "joints.json": json.dumps(clip.ground_truth()).encode(),
        "mask.png": _png(clip.mask_HW),
        "mp4": encode_video(clip.frames_THWC, clip.fps),
        "txt": clip.caption.encode(),
    }


def _png(mask_HW: np.ndarray) -> bytes:
    out = io.BytesIO()
    Image.fromarray(mask_HW.astype(np.uint8) * 255).save(out, format="PNG")
    return out.getvalue()
