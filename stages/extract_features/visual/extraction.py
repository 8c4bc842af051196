"""Extraction of the visual store: an encoder's tokens of each frame or tubelet."""

# Legend: T frame, M map (a frame, a tubelet or a latent frame), C colour or channel, H W pixels or
# token grid.

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from cache_schema import JSON, StoreSettings
from stages.clips import Clip, ClipRecord, ClipsConfig, load_clip
from stages.extract_features.config import Kind, VisualConfig
from stages.extract_features.extraction import Extracted, Outcome, clip_settings
from stages.extract_features.visual.encoder import (
    REMEDY,
    VisualEncoder,
    VisualLayout,
    find_encoder,
    layout_of,
    load_options,
)
from stages.files.weight_checks import check_weights, load_model
from stages.local_gram_flow import frames_to_latents, resample_to_grid
from stages.local_gram_flow.alignment import TEMPORAL_COMPRESSION
from stages.precision import DTYPES
from stages.teacher_store.features import encode_features, feature_arrays_spec
from stages.teacher_store.settings import valid_spec
from stages.visual_models.folders import hash_of, processor_file, processor_values


class VisualExtraction:
    """Encodes the whole frames of each clip, resized without a crop, and stores their tokens.

    Args:
        config: Checkpoint, input size, layer, grid and storage.
        clips: Size and length of clips.

    Raises:
        ValueError: The checkpoint is missing, damaged or of another family; or a setting does not
            fit it.
    """

    clips_per_batch = 1

    def __init__(self, config: VisualConfig, clips: ClipsConfig) -> None:
        self._config = config
        self.size: ClipsConfig | None = clips
        self._clips = clips
        self._folder = find_encoder(config)
        self._layout = layout_of(config, clips, self._folder)
        check_weights(self._layout.model_class, self._folder, **load_options(self._layout))
        values_file = processor_file(self._folder)
        self._processor = make_processor(values_file, self._layout)
        checkpoint = hash_of(self._folder, values_file)
        self.settings: Mapping[Kind, StoreSettings] = {
            "visual": visual_settings(config, clips, self._layout, checkpoint_sha256=checkpoint)
        }

    def prepare(self, record: ClipRecord) -> Clip:
        """Decode the clip.

        Raises:
            ClipSkipped: See `load_clip`.
        """
        return load_clip(record, self._clips)

    @contextmanager
    def load_model(
        self, device: torch.device
    ) -> Iterator[Callable[[Sequence[Clip]], Sequence[Outcome]]]:
        """Load the encoder."""
        whole = load_model(
            self._layout.model_class,
            self._folder,
            dtype=DTYPES[self._config.precision],
            **load_options(self._layout),
        )
        whole.requires_grad_(False).eval().to(device)
        encoder = VisualEncoder(whole, self._layout, self._config)
        yield lambda clips: [{"visual": self._extract(encoder, device, clip)} for clip in clips]

    @torch.inference_mode()
    def _extract(self, encoder: VisualEncoder, device: torch.device, clip: Clip) -> Extracted:
        inputs = self._processor(
            list(clip.frames_THWC), input_data_format="channels_last", return_tensors="pt"
        )
        pixels_TCHW = inputs["pixel_values"][0].to(device, DTYPES[self._config.precision])
        tokens_MHWC = encoder(pixels_TCHW).float()
        tokens_MHWC, valid_M = _at_rate(tokens_MHWC, self._layout, self._config)
        if self._config.grid == "student" and tokens_MHWC.shape[1:3] != self._clips.token_grid:
            tokens_MHWC = resample_to_grid(tokens_MHWC.permute(0, 3, 1, 2), *self._clips.token_grid)
        attributes: dict[str, JSON] = {
            "num_frames": len(clip.frames_THWC),
            "geometry": dict(clip.geometry.as_dict()),
        }
        arrays = encode_features(tokens_MHWC, self._config.dtype) | {"valid": valid_M}
        return Extracted(arrays=arrays, attributes=attributes)


def make_processor(file: Path, layout: VisualLayout) -> Any:
    """The PIL processor of transformers with a folder's values, at the layout's size, no crop.

    Frames have been cropped to the clip's size; another crop would leave tokens of the student
    without a counterpart.

    Raises:
        ValueError: A value is missing or not supported.
    """
    from transformers import VideoMAEImageProcessorPil

    values = processor_values(
        file, remedy=REMEDY, steps=("do_resize", "do_rescale", "do_normalize")
    )
    if missing := [name for name in ("image_mean", "image_std", "resample") if name not in values]:
        raise ValueError(f"{file} has no {missing[0]}; download the model again")
    height, width = layout.image_size
    values["size"] = {"height": height, "width": width}
    values.pop("crop_size", None)
    try:
        processor = VideoMAEImageProcessorPil(**values, do_center_crop=False)
        # Values of a wrong form are reported here, before any clip is read.
        processor([np.zeros((8, 8, 3), np.uint8)], input_data_format="channels_last")
    except (TypeError, ValueError, KeyError, AttributeError) as error:
        raise ValueError(f"{file} is not supported ({error}); {REMEDY}") from error
    return processor


def visual_settings(
    config: VisualConfig, clips: ClipsConfig, layout: VisualLayout, *, checkpoint_sha256: str
) -> StoreSettings:
    """Return the settings of the visual store.

    `time_rate` is frame, tubelet or latent. At the rate of tubelets, map m holds the frames
    `first_frame` + m * `frames_per_map` and on; at the others these are null.
    """
    height, width = clips.token_grid if config.grid == "student" else layout.grid
    tubelets = layout.is_video and config.time_rate == "encoder"
    maps = layout.maps if config.time_rate == "encoder" else clips.num_latent_frames
    rate = "tubelet" if tubelets else "latent" if config.time_rate == "latent" else "frame"
    values: dict[str, JSON] = {
        "clips": clip_settings(clips),
        "checkpoint_sha256": checkpoint_sha256,
        "model_type": layout.model_type,
        "image_size": [*layout.image_size],
        "resize": "whole frames, by PIL, values of the preprocessor's configuration",
        "precision": config.precision,
        "layer": config.layer,
        "window": layout.window,
        "time_rate": rate,
        "frames_per_map": layout.frames_per_map if tubelets else None,
        "first_frame": 1 if tubelets else None,
        "grid": [height, width],
        "grid_source": config.grid,
    }
    arrays = feature_arrays_spec((maps, height, width, layout.channels), config.dtype)
    return StoreSettings(kind="visual", arrays=arrays | {"valid": valid_spec(maps)}, values=values)


def _at_rate(
    tokens_MHWC: Tensor, layout: VisualLayout, config: VisualConfig
) -> tuple[Tensor, np.ndarray]:
    """Return the maps to store, and `valid`: 0 for latent frame 0 of a video encoder, which has no
    tubelet of frame 0."""
    if config.time_rate == "latent" and not layout.is_video:
        tokens_MHWC = frames_to_latents(tokens_MHWC)
    valid_M = np.ones(len(tokens_MHWC), np.uint8)
    if config.time_rate == "latent" and layout.is_video:
        per_latent = TEMPORAL_COMPRESSION // layout.frames_per_map
        means_MHWC = tokens_MHWC.unflatten(0, (-1, per_latent)).mean(1)
        tokens_MHWC = torch.cat([torch.zeros_like(means_MHWC[:1]), means_MHWC])
        valid_M = np.ones(len(tokens_MHWC), np.uint8)
        valid_M[0] = 0
    return tokens_MHWC, valid_M
