"""Fused features for the cache benchmarks: of tracked clips, and synthetic ones of known roughness.

Compression depends on how alike neighbouring tokens are. Random weights give features that are
smoother than a trained tracker's; the synthetic fields are as rough as that, and rougher.
"""

# Legend: T frame, H W token grid, C channel of one direction, G fused channel, P frame pair,
# K neighbour.

from collections.abc import Iterator
from pathlib import Path

import numpy as np
import torch
from sam2_sides import HEIGHT, WIDTH
from torch import Tensor

from stages.clips import ClipRecord, ClipsConfig, SubjectPrompt, load_clip, open_dataset
from stages.demo.scenes import draw_clip
from stages.local_gram_flow import fuse_directions, resample_to_grid
from stages.sam2_tracking.inputs import prompt_for_sam2, resize_for_sam2
from stages.sam2_tracking.tracker import Tracker, TrackRequest

FRAMES = 49
GRID = HEIGHT // 16, WIDTH // 16
CHANNELS = 256
RADIUS = 3
FIELDS = {
    "middle": (1.5, 1.0),
    "rough": (0.7, 0.5),
    "adverse": (1.0, 0.0),
}
"""By name: over how many tokens noise is blurred, and how strong what all tokens share is beside
it. The demo's trained tracker lies between `middle` and `rough`; in `adverse` the values of a
window differ by 1 and no neighbour stands out, which rounding hurts most."""
_FRAMES_BLURRED = 2.0


def field(name: str, *, seed: int = 0, channels: int = CHANNELS) -> Tensor:
    """fused_THWG of a synthetic clip."""
    blur, common = FIELDS[name]
    random = torch.Generator().manual_seed(seed)
    noise = torch.randn(FRAMES, *GRID, 2 * channels, generator=random)
    for axis, width in enumerate((_FRAMES_BLURRED, blur, blur)):
        noise = torch.tensordot(_gaussian(noise.shape[axis], width), noise, dims=([1], [axis]))
        noise = noise.movedim(0, axis)
    noise = noise / noise.std() + common * torch.randn(2 * channels, generator=random)
    return fuse_directions(
        noise[..., :channels], noise[..., channels:], fusion="gram_flow", forward_weight=0.5
    )


def _gaussian(size: int, width: float) -> Tensor:
    places = torch.arange(size)
    weights = torch.exp(-((places[:, None] - places) ** 2) / (2 * width**2))
    return weights / weights.sum(1, keepdim=True)


def clips(folder: Path | None, count: int) -> Iterator[tuple[str, np.ndarray, SubjectPrompt]]:
    """Name, frames and prompt of a dataset's clips, or of figures drawn as in the demo."""
    if folder is None:
        for seed in range(count):
            drawn = draw_clip(seed, num_frames=FRAMES, height=HEIGHT, width=WIDTH)
            prompt = SubjectPrompt(mask_HW=drawn.mask_HW)
            yield f"{drawn.kind}-{seed}", drawn.frames_THWC, prompt
        return
    config = ClipsConfig(path=folder, num_frames=FRAMES, height=HEIGHT, width=WIDTH)
    found = 0
    for shard in open_dataset(config).shards:
        for record in shard.records():
            if isinstance(record, ClipRecord) and found < count:
                clip = load_clip(record, config)
                yield clip.key, clip.frames_THWC, clip.prompts[0]
                found += 1


@torch.inference_mode()
def track(
    tracker: Tracker,
    frames_THWC: np.ndarray,
    prompt: SubjectPrompt,
    *,
    grid: tuple[int, int] = GRID,
) -> Tensor:
    """fused_THWG of a clip tracked both ways, where the tracker is."""
    size = tracker.model.image_size
    started = prompt_for_sam2(
        prompt, height=HEIGHT, width=WIDTH, image_size=size, device=tracker.model.device
    )
    order = range(len(frames_THWC))
    directions = []
    with tracker.encode(resize_for_sam2(frames_THWC, size)) as encoded:
        for visited in (order, order[::-1]):
            maps: dict[int, Tensor] = {}
            request = TrackRequest(encoded=encoded, prompt=started, order=visited)
            for (frame,) in tracker.track([request]):
                features_1CHW = frame.features["memory_attention"][None]
                maps[frame.index] = resample_to_grid(features_1CHW, *grid)[0]
            started = tracker.prompt_from_logits(frame.mask_logits_HW)
            directions.append(torch.stack([maps[index] for index in order]))
    return fuse_directions(*directions, fusion="gram_flow", forward_weight=0.5)
