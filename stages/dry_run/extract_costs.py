"""Cost of each extraction model per clip: FLOPs, weights and memory, from shapes alone.

The models are built from their configurations on torch's meta device and run there under a
`FlopCounter`, so that no weights are needed and nothing is computed.
"""

# Legend: T frame, S side of SAM2's square input, L text token.

import math
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path

import numpy as np
import torch

from stages.clips import ClipsConfig
from stages.compute_cost.flop_counter import FlopCounter, weight_bytes
from stages.extract_features.config import LatentsConfig, TeacherConfig, TextConfig, VisualConfig
from stages.extract_features.teacher.stores import feature_grid
from stages.extract_features.visual.encoder import VisualEncoder, VisualLayout, load_options
from stages.precision import DTYPES
from stages.sam2_tracking.encoder import EncodedFrames
from stages.sam2_tracking.inputs import Sam2Prompt
from stages.sam2_tracking.opening import build_without_weights
from stages.sam2_tracking.tracker import Tracker, TrackRequest
from stages.students.student import StudentConfigs

_FIRST_STEPS = 2
"""Measured steps after the prompted one: with one memory in the bank, and with two."""
_META = torch.device("meta")


@dataclass(frozen=True, kw_only=True, slots=True)
class ModelCost:
    """Cost of one model: per clip, and in memory while it runs."""

    clip_flops: float
    """FLOPs per clip, without those per subject."""
    subject_flops: float = 0.0
    """SAM2's FLOPs per subject: the forward pass, and the backward pass if there is one."""
    weight_bytes: int
    working_bytes: int
    """Peak of activations while the model runs."""
    waiting_bytes: int = 0
    """Other data on the device: encoded frames, and feature maps of unfinished tracks."""

    @property
    def flops_per_clip(self) -> float:
        """FLOPs of a clip with one subject."""
        return self.clip_flops + self.subject_flops

    @property
    def memory_bytes(self) -> int:
        """Memory on the device, without libraries and allocator overhead."""
        return self.weight_bytes + self.working_bytes + self.waiting_bytes

    def flops(self, num_clips: float, num_subjects: float) -> float:
        """Return the FLOPs of clips with a total number of subjects."""
        return num_clips * self.clip_flops + num_subjects * self.subject_flops


def text_cost(config: TextConfig, base: StudentConfigs) -> ModelCost:
    """Return the cost of the text encoder for one padded caption."""
    model_class = base.model_class("text_encoder")
    assert base.text_encoder is not None
    settings = model_class.config_class.from_dict(base.text_encoder)
    with _META:
        encoder = model_class(settings).to(DTYPES[config.precision]).eval()
        tokens_1L = torch.zeros(1, base.text_shape[0], dtype=torch.long)
    with FlopCounter() as meter:
        encoder(tokens_1L)
    return ModelCost(
        clip_flops=meter.flops,
        weight_bytes=weight_bytes(encoder),
        working_bytes=meter.peak_bytes,
    )


def latents_cost(config: LatentsConfig, clips: ClipsConfig, base: StudentConfigs) -> ModelCost:
    """Return the cost of the VAE's encoder for a clip, and for the noisy draws of its first frame
    for image-to-video."""
    model_class = base.model_class("vae")
    with _META:
        vae = model_class.from_config(dict(base.vae)).eval()
        for parameter in vae.parameters():
            parameter.data = parameter.data.to(DTYPES[config.precision])
    if config.tiling:
        vae.enable_tiling()
    pixels = torch.empty(
        (1, 3, clips.num_frames, clips.height, clips.width),
        dtype=DTYPES[config.precision],
        device=_META,
    )
    with FlopCounter() as meter:
        vae.encode(pixels)
        if base.image_to_video:
            base.run_first_frame(vae, pixels, draws=config.image_draws)
    return ModelCost(
        clip_flops=meter.flops,
        weight_bytes=weight_bytes(vae),
        working_bytes=meter.peak_bytes + pixels.numel() * pixels.element_size(),
    )


def visual_cost(config: VisualConfig, clips: ClipsConfig, layout: VisualLayout) -> ModelCost:
    """Return the cost of an image or video encoder for a clip, from its config.json."""
    own = layout.own.from_dict(layout.own.to_dict() | load_options(layout))
    with _META:
        model = layout.model_class(own).to(DTYPES[config.precision]).eval()
    frames = min(config.frames_per_batch, clips.num_frames)
    passes = clips.num_frames / frames
    if layout.window is not None:
        frames = 1 + layout.window  # frame 0 is not encoded
        passes = math.ceil((clips.num_frames - 1) / layout.window)
    size = (frames, 3, *layout.image_size)
    pixels = torch.empty(size, dtype=DTYPES[config.precision], device=_META)
    encoder = VisualEncoder(model, layout, config)
    with FlopCounter() as meter:
        encoder(pixels)
    return ModelCost(
        clip_flops=meter.flops * passes,
        weight_bytes=weight_bytes(model),
        working_bytes=meter.peak_bytes + pixels.numel() * pixels.element_size(),
    )


def tracker_cost(
    config: TeacherConfig, clips: ClipsConfig, source: str | Path
) -> tuple[ModelCost, int, int]:
    """Return the cost of a tracker over a clip in the configured directions, the channels of one
    direction's features, and the pixels of its input per token.

    Counted in float32: with bf16, which torch does not simulate here, activations take about half.
    Not included: the seek to frame 0 from a later prompt, the search for prompts, and the memory of
    a full memory bank, a few per cent of the rest.

    Args:
        config: Image size, batch sizes, directions, and storage of encoded frames.
        clips: Length of clips.
        source: See `opening.build_without_weights`.
    """
    model = build_without_weights(source, image_size=config.image_size)
    tracker = Tracker(
        model, precision="fp32", frames_per_batch=min(config.frames_per_batch, clips.num_frames)
    )
    with FlopCounter() as encoding:
        encoded = tracker.encode(_frames(tracker.frames_per_batch, config.image_size))
    steps, tracking_peak = _step_flops(tracker, encoded, config, clips)
    directions = 1 if config.fusion == "forward" else 2
    channels = model.mem_dim if config.features == "memory_encoder" else model.hidden_dim
    cost = ModelCost(
        clip_flops=encoding.flops / tracker.frames_per_batch * clips.num_frames,
        subject_flops=directions * steps,
        weight_bytes=weight_bytes(model),
        working_bytes=max(encoding.peak_bytes, tracking_peak),
        waiting_bytes=_waiting_bytes(encoded, channels, config, clips),
    )
    return cost, channels, _stride(encoded, config)


def _frames(num_frames: int, image_size: int) -> np.ndarray:
    return np.zeros((num_frames, image_size, image_size, 3), np.uint8)


def _step_flops(
    tracker: Tracker, encoded: EncodedFrames, config: TeacherConfig, clips: ClipsConfig
) -> tuple[float, int]:
    """Return the FLOPs of one pass over the clip, and its peak bytes.

    Every memory in the bank costs the same, so all steps are extrapolated from the first ones.
    Object pointers kept longer than their memories, a few tokens each, are not counted.
    """
    box = Sam2Prompt(
        points_1P2=torch.zeros(1, 2, 2, device=_META),
        point_labels_1P=torch.zeros(1, 2, dtype=torch.int32, device=_META),
    )
    # The cost does not depend on which frame is visited.
    order = [0] * (_FIRST_STEPS + 1)
    request = TrackRequest(encoded=encoded, prompt=box, order=order)
    flops: list[int] = []
    with FlopCounter() as meter:
        for frames in tracker.track([request] * config.clips_per_batch, features=[config.features]):
            flops.append(meter.flops)
            del frames
    prompted, first, second = (after - before for before, after in pairwise([0, *flops]))
    memories = [min(step, tracker.model.num_maskmem) for step in range(1, clips.num_frames)]
    whole = prompted + sum(first + (second - first) * (count - 1) for count in memories)
    return whole / config.clips_per_batch, meter.peak_bytes


def _stride(encoded: EncodedFrames, config: TeacherConfig) -> int:
    """Return the pixels of the input per token of the features."""
    return config.image_size // encoded.sizes[-1][0]


def _waiting_bytes(
    encoded: EncodedFrames, channels: int, config: TeacherConfig, clips: ClipsConfig
) -> int:
    """Return the bytes of encoded frames, feature maps and mask logits of a batch of clips."""
    if config.keep_encoded != "device":
        return 0
    itemsize = DTYPES[config.precision].itemsize
    frame = sum(level.numel() for level in encoded.levels_at([0])) * itemsize
    height, width = feature_grid(config, clips, _stride(encoded, config))
    logits = math.prod(encoded.sizes[0])
    float32 = torch.float32.itemsize
    maps = (1 if config.fusion == "forward" else 2) * (height * width * channels + logits) * float32
    return config.clips_per_batch * clips.num_frames * (frame + maps)
