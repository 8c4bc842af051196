"""Image and video encoders of transformers: what they make of a clip, and their patch tokens.

An image encoder gives a map of tokens per frame. A video encoder gives one per tubelet, a few
consecutive frames, starting at frame 1: frame 0 has a latent frame of its own in a causal VAE, and
without it no tubelet lies in two latent frames.

Legend: T frame, M map, B frame or window of a batch, C colour or channel, H W pixels or token grid,
N token.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F  # noqa: N812
from torch import Tensor

from stages.clips import ClipsConfig
from stages.extract_features.config import VisualConfig
from stages.local_gram_flow.alignment import TEMPORAL_COMPRESSION
from stages.visual_models.folders import find_folder, model_class

_VIDEO_CLASSES: Mapping[str, tuple[str, ...]] = {
    "vjepa2": ("VJEPA2Model", "VJEPA2ForVideoClassification"),
    "videomae": ("VideoMAEModel", "VideoMAEForPreTraining", "VideoMAEForVideoClassification"),
}
_CLASSES: Mapping[str, tuple[str, ...]] = {
    "dinov2": ("Dinov2Model", "Dinov2ForImageClassification"),
    "dinov2_with_registers": (
        "Dinov2WithRegistersModel",
        "Dinov2WithRegistersForImageClassification",
    ),
    "dinov3_vit": ("DINOv3ViTModel",),
    **_VIDEO_CLASSES,
}
"""Model classes by the model type in config.json, the one without heads first; heads are loaded,
checked and not used."""

REMEDY = (
    "set extract.visual.checkpoint to one such as facebook/dinov2-base, "
    "facebook/dinov3-vitb16-pretrain-lvd1689m, facebook/vjepa2-vitl-fpc64-256 or "
    "MCG-NJU/videomae-base"
)


@dataclass(frozen=True, kw_only=True, slots=True)
class VisualLayout:
    """An encoder, from its config.json, and what it makes of a clip."""

    model_class: Any
    own: Any
    """The encoder's configuration, an object of transformers."""
    image_size: tuple[int, int]
    """Height and width that frames are resized to."""
    grid: tuple[int, int]
    """Rows and columns of a map's tokens."""
    frames_per_map: int
    """Frames of a tubelet; 1 for an image encoder."""
    maps: int
    """Maps per clip."""
    window: int | None
    """Frames per pass of a video encoder; None for an image encoder."""

    @property
    def is_video(self) -> bool:
        """Whether maps are of tubelets, from frame 1 on, instead of frames."""
        return self.window is not None

    @property
    def model_type(self) -> str:
        """The encoder's family, as in config.json."""
        return str(self.own.model_type)

    @property
    def channels(self) -> int:
        """Channels of a token."""
        return int(self.own.hidden_size)


def find_encoder(config: VisualConfig, *, weights: bool = True) -> Path:
    """Return the folder of the encoder; a hub id is downloaded. `ValueError`: `find_folder`."""
    return find_folder(
        config.checkpoint,
        config.revision,
        setting="extract.visual.checkpoint",
        remedy=REMEDY,
        weights=weights,
    )


def layout_of(config: VisualConfig, clips: ClipsConfig, folder: Path) -> VisualLayout:
    """Read an encoder's config.json and apply the settings to it.

    Raises:
        ValueError: It is of another family, or a setting does not fit it.
    """
    cls = model_class(folder, _CLASSES, remedy=REMEDY)
    try:
        own = cls.config_class.from_pretrained(folder, local_files_only=True)
    except Exception as error:  # the library raises errors of many kinds
        raise ValueError(
            f"{folder / 'config.json'} does not describe a {cls.__name__} "
            f"({type(error).__name__}: {error}); download the model again"
        ) from error
    if config.layer is not None and config.layer > own.num_hidden_layers:
        raise ValueError(
            f"extract.visual.layer={config.layer}, but {config.checkpoint} has "
            f"{own.num_hidden_layers} blocks; null stores the encoder's output"
        )
    size = _image_size(config, clips, own)
    video = own.model_type in _VIDEO_CLASSES
    tubelet = int(own.tubelet_size) if video else 1
    if TEMPORAL_COMPRESSION % tubelet:
        raise ValueError(
            f"{config.checkpoint} has tubelets of {tubelet} frames, which lie in two latent frames "
            f"of {TEMPORAL_COMPRESSION}; {REMEDY}"
        )
    return VisualLayout(
        model_class=cls,
        own=own,
        image_size=size,
        grid=(size[0] // int(own.patch_size), size[1] // int(own.patch_size)),
        frames_per_map=tubelet,
        maps=(clips.num_frames - 1) // tubelet if video else clips.num_frames,
        window=_window(config, clips, own, tubelet) if video else None,
    )


def _image_size(config: VisualConfig, clips: ClipsConfig, own: Any) -> tuple[int, int]:
    patch = int(own.patch_size)
    if config.image_size is None:
        if own.model_type not in _VIDEO_CLASSES:
            rows, columns = clips.token_grid
            return rows * patch, columns * patch
        size = own.crop_size if own.model_type == "vjepa2" else own.image_size
        return (size, size) if isinstance(size, int) else (int(size[0]), int(size[1]))
    height, width = config.image_size
    if height % patch or width % patch:
        fitting = [max(patch, round(side / patch) * patch) for side in (height, width)]
        raise ValueError(
            f"extract.visual.image_size={list(config.image_size)}, but {config.checkpoint} takes "
            f"multiples of {patch} pixels, such as {fitting}"
        )
    if own.model_type == "vjepa2" and height != width:
        raise ValueError(
            f"extract.visual.image_size={list(config.image_size)}, but V-JEPA 2 takes squares, to "
            f"which the whole frame is resized; {[own.crop_size] * 2} is its own"
        )
    return height, width


def _window(config: VisualConfig, clips: ClipsConfig, own: Any, tubelet: int) -> int:
    frames = clips.num_frames - 1
    if config.window is not None and config.window % tubelet:
        raise ValueError(
            f"extract.visual.window={config.window}, but {config.checkpoint} takes multiples of "
            f"{tubelet} frames"
        )
    trained = own.frames_per_clip if own.model_type == "vjepa2" else own.num_frames
    return min(config.window or int(trained), frames)


class VisualEncoder:
    """Patch tokens of a clip's frames; class and register tokens are dropped.

    Args:
        whole: A model of the layout's class, loaded with the options of `load_options`.
        layout: From `layout_of`.
        config: Layer, and frames per batch of an image encoder.
    """

    def __init__(self, whole: Any, layout: VisualLayout, config: VisualConfig) -> None:
        headless = type(whole).__name__ == _CLASSES[layout.model_type][0]
        # DINOv3's `base_model` is its stack of blocks alone.
        self._model = whole if headless else whole.base_model
        self._layout = layout
        self._config = config
        if layout.model_type == "videomae":
            _set_size(self._model.embeddings, layout)

    @torch.inference_mode()
    def __call__(self, pixels_TCHW: Tensor) -> Tensor:
        """Encode all frames of a clip, on the model's device and in its dtype: tokens_MHWC."""
        if not self._layout.is_video:
            batches = pixels_TCHW.split(self._config.frames_per_batch)
            tokens_MNC = torch.cat([self._tokens(frames_BCHW) for frames_BCHW in batches])
        else:
            tokens_MNC = self._of_windows(pixels_TCHW[1:])
        return tokens_MNC.unflatten(1, self._layout.grid)

    def _of_windows(self, pixels_TCHW: Tensor) -> Tensor:
        """Tokens of tubelets, window by window; the last window may overlap the one before it, of
        which the tokens are kept."""
        layout, frames = self._layout, len(pixels_TCHW)
        assert layout.window is not None, "an image encoder has no windows"
        kept: list[Tensor] = []
        for start in range(0, frames, layout.window):
            first = min(start, frames - layout.window)
            window_1TCHW = pixels_TCHW[None, first : first + layout.window]
            tokens_MNC = self._tokens(window_1TCHW)[0].unflatten(
                0, (layout.window // layout.frames_per_map, -1)
            )
            kept.append(tokens_MNC[(start - first) // layout.frames_per_map :])
        return torch.cat(kept)

    def _tokens(self, pixels: Tensor) -> Tensor:
        """Patch tokens of a batch of frames or windows: tokens_BNC."""
        layer, options = self._config.layer, dict[str, Any]()
        if self._layout.model_type == "vjepa2":
            options["skip_predictor"] = True
        if layer is not None:
            options["output_hidden_states"] = True
        output = self._model(pixels, **options)
        tokens_BNC: Tensor = output.last_hidden_state
        if layer is not None:
            tokens_BNC = output.hidden_states[layer]
        rows, columns = self._layout.grid
        patches = rows * columns
        if self._layout.is_video:
            patches *= pixels.shape[1] // self._layout.frames_per_map
        return tokens_BNC[:, -patches:]  # class and register tokens come first


def load_options(layout: VisualLayout) -> dict[str, Any]:
    """Options of `from_pretrained` that set the input's size; V-JEPA 2 has it in its attention."""
    return {"crop_size": layout.image_size[0]} if layout.model_type == "vjepa2" else {}


def _set_size(embeddings: Any, layout: VisualLayout) -> None:
    """Let a VideoMAE take windows of another size, with its position table interpolated.

    As VideoREPA does for VideoMAE (v1 and v2): bicubic in space, then linear in time
    (aHapBean/VideoREPA@8002687, models/ssl/VideoMAE.py, `interpolate_pos_embed`).
    """
    own, patches = layout.own, embeddings.patch_embeddings
    height, width = patches.image_size
    trained = (
        own.num_frames // layout.frames_per_map,
        height // int(own.patch_size),
        width // int(own.patch_size),
    )
    assert layout.window is not None, "a video encoder has windows"
    wanted = (layout.window // layout.frames_per_map, *layout.grid)
    patches.image_size = layout.image_size
    if wanted == trained:
        return
    table_MCHW = embeddings.position_embeddings[0].unflatten(0, trained).permute(0, 3, 1, 2)
    space_MCHW = F.interpolate(table_MCHW, wanted[1:], mode="bicubic", align_corners=False)
    space_1CMHW = space_MCHW.transpose(0, 1)[None]
    time_1CMHW = F.interpolate(space_1CMHW, wanted, mode="trilinear", align_corners=False)
    embeddings.position_embeddings = time_1CMHW.flatten(2).transpose(1, 2).contiguous()
