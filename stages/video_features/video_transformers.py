"""VideoMAE and V-JEPA 2 in transformers' format as feature networks."""

from pathlib import Path
from typing import Any

import numpy as np
import torch

from stages.clips import ClipsConfig
from stages.files.weight_checks import check_weights, load_model
from stages.video_features.config import FeaturesConfig
from stages.video_features.network import FeatureFunction, FeatureProtocol, read_at
from stages.visual_models.folders import (
    find_folder,
    hash_of,
    model_class,
    processor_file,
    processor_values,
)

# Legend: B clip, T frame, H W pixels, C colour (RGB), N token, D feature.

_CLASSES = {
    "videomae": ("VideoMAEModel", "VideoMAEForPreTraining", "VideoMAEForVideoClassification"),
    "vjepa2": ("VJEPA2Model", "VJEPA2ForVideoClassification"),
}
"""Model classes by the model type in config.json; heads are loaded, checked and not used."""

_REMEDY = (
    "set evaluate.features.network to a VideoMAE or V-JEPA 2 such as MCG-NJU/videomae-base or "
    "facebook/vjepa2-vitl-fpc64-256"
)


class VideoTransformer:
    """The mean over all tokens of the encoder's last hidden state.

    Frames are resized, cropped and normalised with the values of the model's folder by the PIL
    processor of transformers, which needs no torchvision and gives equal results on every machine.

    Args:
        config: Folder or hub id, revision and number of frames.
        clips: Size and rate of the clips.

    Raises:
        ValueError: The download fails, a file is missing or damaged, it is another model, or the
            model cannot process that number of frames.
    """

    def __init__(self, config: FeaturesConfig, clips: ClipsConfig) -> None:
        name = str(config.network)
        self._folder = find_folder(
            name, config.revision, setting="evaluate.features.network", remedy=_REMEDY
        )
        self._class = model_class(self._folder, _CLASSES, remedy=_REMEDY)
        check_weights(self._class, self._folder)
        own = self._class.config_class.from_pretrained(self._folder, local_files_only=True)
        values_file = processor_file(self._folder)
        self._processor = _make_processor(values_file, own)
        size, crop = self._processor.size, self._processor.crop_size
        self.protocol = FeatureProtocol(
            network=self._folder.resolve().name if Path(name).expanduser().is_dir() else name,
            sha256=hash_of(self._folder, values_file),
            clips=read_at(clips, _num_frames(config, own)),
            resize=(
                f"shortest edge to {size.shortest_edge}, centre crop of {crop.height}x{crop.width},"
                f" values by {values_file.name}"
            ),
            features="mean over the tokens of the last hidden state",
        )

    def load(self, device: torch.device) -> FeatureFunction:
        """Load the model; see `FeatureNetwork.load`."""
        whole = load_model(self._class, self._folder, dtype=torch.float32)
        model = whole.base_model.requires_grad_(False).eval().to(device)
        options = {"skip_predictor": True} if model.config.model_type == "vjepa2" else {}

        @torch.inference_mode()
        def features_of(frames_THWC: np.ndarray) -> np.ndarray:
            inputs = self._processor(
                list(frames_THWC), input_data_format="channels_last", return_tensors="pt"
            )
            with torch.backends.cudnn.flags(enabled=True, allow_tf32=False):
                tokens_BND = model(inputs["pixel_values"].to(device), **options).last_hidden_state
            features_D: np.ndarray = tokens_BND[0].mean(dim=0).cpu().numpy()
            return features_D

        return features_of


def _make_processor(file: Path, config: Any) -> Any:
    """The PIL processor with the values of a folder.

    V-JEPA 2 has a processor for torchvision only, whose steps are those of VideoMAE's; it resizes
    to 256 / 224 of its crop, whatever size the file names (transformers 5.23,
    `video_processing_vjepa2.py`).
    """
    from transformers import VideoMAEImageProcessorPil
    from transformers.image_utils import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD

    values = processor_values(file, remedy=_REMEDY)
    image_size = config.image_size if config.model_type == "videomae" else config.crop_size
    try:
        if config.model_type == "vjepa2":
            crop = values.get("crop_size", 256)
            crop = crop["height"] if isinstance(crop, dict) else crop
            values = {
                "image_mean": IMAGENET_DEFAULT_MEAN,
                "image_std": IMAGENET_DEFAULT_STD,
                **values,
                "crop_size": {"height": crop, "width": crop},
                "size": {"shortest_edge": int(crop * 256 / 224)},
            }
        processor = VideoMAEImageProcessorPil(**values)
        found = (processor.crop_size.height, processor.crop_size.width)
        edge = processor.size.shortest_edge
        # Values of a wrong form are reported here, before any clip is read.
        processor([np.zeros((8, 8, 3), np.uint8)], input_data_format="channels_last")
    except (TypeError, ValueError, KeyError, AttributeError) as error:
        raise ValueError(f"{file} is not supported ({error}); {_REMEDY}") from error
    sides = (image_size, image_size) if isinstance(image_size, int) else tuple(image_size)
    if found != sides or not edge or edge < max(found):
        raise ValueError(
            f"{file}: frames are resized to {edge} and cropped to {found[0]}x{found[1]}, but the "
            f"model takes {sides[0]}x{sides[1]}; download the model again"
        )
    return processor


def _num_frames(config: FeaturesConfig, own: Any) -> int:
    if own.model_type == "videomae":
        if config.num_frames not in (None, own.num_frames):
            raise ValueError(
                f"evaluate.features.num_frames={config.num_frames}, but {config.network} takes "
                f"{own.num_frames} frames, no more and no fewer; set it to null"
            )
        return int(own.num_frames)
    frames = config.num_frames or int(own.frames_per_clip)
    if frames % own.tubelet_size:
        raise ValueError(
            f"evaluate.features.num_frames={frames}, but {config.network} takes multiples of "
            f"{own.tubelet_size}; {own.frames_per_clip} is its own"
        )
    return frames
