"""The teacher store: SAM2's memory features of each clip, both ways, aligned and fused."""

# Legend: T frame, S side of SAM2's square input, C channel, H W token grid, G fused channel.

import hashlib
import json
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from cache_schema import JSON, ArraySpec, StoreSettings
from stages.clips import (
    ClipRecord,
    ClipsConfig,
    ClipSkipped,
    FrameGeometry,
    SubjectPrompt,
    load_clip,
)
from stages.extract_features.config import TeacherConfig
from stages.extract_features.content_hash import sha256_of_file
from stages.extract_features.extraction import Extracted, clip_settings, to_float16
from stages.extract_features.sam2_inputs import prompt_for_sam2, resize_for_sam2
from stages.extract_features.sam2_tracker import build_sam2, load_sam2_config
from stages.extract_features.two_way_tracking import (
    SubjectLostError,
    TrackedFrame,
    TwoWayTracker,
)
from stages.local_gram_flow import frames_to_latents, fuse_directions, resample_to_grid

_PROMPT_RULE = "the dataset's on frame 0; backward: the forward track's mask on the last frame"
_FRAMES_PER_BATCH_ON_GPU = 4


@dataclass(frozen=True, kw_only=True, slots=True)
class _Prepared:
    """A decoded clip, ready for SAM2."""

    frames_TSS3: np.ndarray
    prompt: SubjectPrompt
    geometry: FrameGeometry


class TeacherExtraction:
    """Tracks each clip's subject and keeps the fused features.

    Args:
        config: Which SAM2, which features, how they are fused.
        clips: The size and length clips are brought to.

    Raises:
        ValueError: The configuration or the checkpoint is missing, or they do not fit each other.
    """

    def __init__(self, config: TeacherConfig, clips: ClipsConfig) -> None:
        self._config = config
        self._clips = clips
        # Built once in advance: a checkpoint that does not fit must not show after hours of work.
        model = self._build(torch.device("cpu"))
        width = model.hidden_dim if config.features == "memory_attention" else model.mem_dim
        self.settings = self._settings(width * (2 if config.fusion == "gram_flow" else 1))

    def _build(self, device: torch.device) -> Any:
        config = self._config
        return build_sam2(
            config.config,
            config.checkpoint.expanduser(),
            image_size=config.image_size,
            device=device,
        )

    def _settings(self, channels: int) -> StoreSettings:
        config, clips = self._config, self._clips
        height, width = clips.token_grid
        length = clips.num_frames if config.time_rate == "frame" else clips.num_latent_frames
        architecture = load_sam2_config(config.config, image_size=config.image_size)
        canonical = json.dumps(architecture, sort_keys=True)
        values: dict[str, JSON] = {
            "clips": clip_settings(clips),
            "checkpoint_sha256": sha256_of_file(config.checkpoint.expanduser()),
            "sam2_config_sha256": hashlib.sha256(canonical.encode()).hexdigest(),
            "image_size": config.image_size,
            "features": config.features,
            "fusion": config.fusion,
            "forward_weight": None if config.fusion == "forward" else config.forward_weight,
            "time_rate": config.time_rate,
            "grid": [height, width],
            "precision": config.precision,
            "prompt": _PROMPT_RULE,
        }
        features = ArraySpec(
            dtype="float16",
            shape=(length, height, width, channels),
            dimension_names=("t", "h", "w", "c"),
        )
        return StoreSettings(kind="teacher", arrays={"features": features}, values=values)

    def prepare(self, record: ClipRecord) -> _Prepared:
        """Decode the clip and squash its frames to SAM2's square.

        Raises:
            ClipSkipped: no_prompt, or what `load_clip` raises.
        """
        if record.prompt is None:
            raise ClipSkipped("no_prompt", "the dataset gives no mask, box or points for this clip")
        clip = load_clip(record, self._clips)
        assert clip.prompt is not None
        return _Prepared(
            frames_TSS3=resize_for_sam2(clip.frames_THWC, self._config.image_size),
            prompt=clip.prompt,
            geometry=clip.geometry,
        )

    @contextmanager
    def opened(self, device: torch.device) -> Iterator[Callable[[_Prepared], Extracted]]:
        """Load SAM2."""
        tracker = TwoWayTracker(
            self._build(device),
            precision=self._config.precision,
            frames_per_batch=_FRAMES_PER_BATCH_ON_GPU if device.type == "cuda" else 1,
        )
        yield lambda prepared: self._extract(tracker, prepared)

    @torch.inference_mode()
    def _extract(self, tracker: TwoWayTracker, prepared: _Prepared) -> Extracted:
        config, clips = self._config, self._clips
        encoded = tracker.encode(prepared.frames_TSS3)
        prompt = prompt_for_sam2(
            prepared.prompt,
            height=clips.height,
            width=clips.width,
            image_size=config.image_size,
            device=tracker.model.device,
        )
        forward_THWC, last = self._aligned(tracker.track(encoded, prompt))
        backward_THWC = None
        if config.fusion != "forward":
            try:
                prompt = tracker.prompt_from_track(last)
            except SubjectLostError as error:
                raise ClipSkipped("subject_lost", str(error)) from error
            backward_THWC, _ = self._aligned(tracker.track(encoded, prompt, backward=True))
        fused_THWG = fuse_directions(
            forward_THWC,
            backward_THWC,
            fusion=config.fusion,
            forward_weight=config.forward_weight,
        )
        return Extracted(
            arrays={"features": to_float16(fused_THWG)},
            attributes={
                "prompt": prepared.prompt.kind,
                "geometry": dict(prepared.geometry.as_dict()),
            },
        )

    def _aligned(self, frames: Iterable[TrackedFrame]) -> tuple[torch.Tensor, TrackedFrame]:
        """One direction's features on the student's grid and rate, and the last frame visited."""
        maps_THWC: dict[int, torch.Tensor] = {}
        for frame in frames:
            features_1CHW = frame.features[self._config.features][None]
            maps_THWC[frame.index] = resample_to_grid(features_1CHW, *self._clips.token_grid)
        stacked_THWC = torch.cat([maps_THWC[index] for index in sorted(maps_THWC)])
        if self._config.time_rate == "latent":
            stacked_THWC = frames_to_latents(stacked_THWC)
        return stacked_THWC, frame
