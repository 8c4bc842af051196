"""Video generation with a CogVideoX diffusers pipeline: assembly, input image, denoising loop."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image, ImageOps, UnidentifiedImageError

from stages.clips import ClipsConfig
from stages.clips.geometry import FrameGeometry, cover_and_crop
from stages.cogvideox.configs import VAE_SPATIAL_COMPRESSION, read_model_index
from stages.config import SchedulerName
from stages.files.weight_checks import read_config

PIPELINES = {"CogVideoXPipeline": False, "CogVideoXImageToVideoPipeline": True}
"""Supported pipeline classes, and whether they take an image."""
_DEFAULT_FPS = 8.0
"""CogVideoX 1.0's frame rate, used if `data.fps` is null."""


def pipeline_class(base: Path) -> str:
    """Name of the diffusers class of the pipeline in a folder.

    Raises:
        ValueError: The folder is not a CogVideoX pipeline.
    """
    class_name = read_model_index(base).get("_class_name")
    if not isinstance(class_name, str) or class_name not in PIPELINES:
        raise ValueError(
            f"the base model {base} is a {class_name}; model.path must be one of {list(PIPELINES)}"
        )
    return class_name


def build_pipeline(base: Path, **parts: Any) -> Any:
    """Load the pipeline in a folder, with `parts` as components that are loaded already or None.

    Raises:
        ValueError: The folder is not a CogVideoX pipeline, or a component cannot be loaded.
    """
    import diffusers

    class_name = pipeline_class(base)
    scheduler = base / "scheduler" / "scheduler_config.json"
    read_config(scheduler)
    try:
        return getattr(diffusers, class_name).from_pretrained(base, local_files_only=True, **parts)
    except torch.OutOfMemoryError:
        raise
    except Exception as error:  # diffusers hardly validates the files
        raise ValueError(
            f"the pipeline in {base} cannot be built ({type(error).__name__}: {error}); check its "
            f"model_index.json and {scheduler}"
        ) from error


def set_scheduler(pipeline: Any, name: SchedulerName) -> None:
    """Choose a pipeline's sampler; `ddim` and `dpm` as CogVideoX's own scripts build them."""
    import diffusers

    if name == "model":
        return
    scheduler = (
        diffusers.CogVideoXDDIMScheduler if name == "ddim" else diffusers.CogVideoXDPMScheduler
    )
    pipeline.scheduler = scheduler.from_config(
        pipeline.scheduler.config, timestep_spacing="trailing"
    )


def check_size(base: Path, clips: ClipsConfig) -> None:
    """Check that the pipeline in a folder can generate videos of a size (`ValueError`).

    Learned position embeddings (CogVideoX-5b-I2V) fit one height and width.
    """
    config = read_config(base / "transformer" / "config.json")
    if not config.get("use_learned_positional_embeddings"):
        return
    height = int(config.get("sample_height", 60)) * VAE_SPATIAL_COMPRESSION
    width = int(config.get("sample_width", 90)) * VAE_SPATIAL_COMPRESSION
    if (clips.height, clips.width) != (height, width):
        raise ValueError(
            f"{base} has learned positions for {height}x{width} and generates no other size, got "
            f"{clips.height}x{clips.width}; set sample.height={height} sample.width={width}"
        )


def output_fps(clips: ClipsConfig) -> float:
    """Frames per second of generated videos."""
    return clips.fps or _DEFAULT_FPS


def first_frame(image: Path, clips: ClipsConfig) -> Image.Image:
    """Read an image, scaled and cropped as clips are.

    Raises:
        ValueError: The image cannot be read.
    """
    picture_HWC, geometry = _read_image(image, clips)
    return Image.fromarray(geometry.frame(picture_HWC))


def first_frame_mask(mask_HW: np.ndarray, image: Path, clips: ClipsConfig) -> np.ndarray:
    """Scale and crop a mask as `first_frame` does its image.

    Args:
        mask_HW: bool, of the size of the upright image.
        image: The image.
        clips: Height and width of the video.

    Returns:
        bool [clips.height, clips.width], at least one pixel set.

    Raises:
        ValueError: The image cannot be read or has another size, or nothing of the mask is left.
    """
    _, geometry = _read_image(image, clips)
    size = (geometry.source_height, geometry.source_width)
    if mask_HW.shape != size:
        raise ValueError(
            f"the mask is {mask_HW.shape[0]}x{mask_HW.shape[1]} (HxW), but the image {image} is "
            f"{size[0]}x{size[1]}; draw it at the image's own size"
        )
    placed_HW = geometry.mask(mask_HW)
    if not placed_HW.any():
        raise ValueError(
            f"the mask's subject lies outside the crop of {image} to {clips.height}x{clips.width}, "
            "or vanishes at this size; remove the mask, or set another sample.height and "
            "sample.width"
        )
    return placed_HW


def _read_image(image: Path, clips: ClipsConfig) -> tuple[np.ndarray, FrameGeometry]:
    """The upright image, and how it becomes a frame."""
    try:
        with Image.open(image) as opened:
            picture_HWC = np.asarray(ImageOps.exif_transpose(opened).convert("RGB"))
    except (UnidentifiedImageError, OSError) as error:
        raise ValueError(f"cannot read the image {image} ({error})") from error
    geometry = cover_and_crop(
        *picture_HWC.shape[:2],
        height=clips.height,
        width=clips.width,
        source_fps=output_fps(clips),
        sampling="consecutive",
    )
    return picture_HWC, geometry


def generate_video(
    pipeline: Any,
    clips: ClipsConfig,
    *,
    steps: int,
    guidance: float,
    seed: int,
    on_step: Callable[[], None],
    dynamic_cfg: bool = False,
    **inputs: Any,
) -> np.ndarray:
    """Generate one video with a diffusers pipeline.

    Args:
        pipeline: Instance of a class in `PIPELINES`.
        clips: Height, width and number of frames.
        steps: Denoising steps.
        guidance: Classifier-free guidance scale; 1 disables it.
        seed: Seed of the initial noise, which is drawn on the CPU: the same on every device.
        on_step: Called after each denoising step.
        dynamic_cfg: Vary the guidance over the steps, as diffusers' `use_dynamic_cfg`.
        inputs: The prompt or its embeddings; the first frame, for image-to-video.

    Returns:
        video_THWC, float32 in 0..1; NaN or infinite where the model's output is.
    """

    def on_step_end(_: Any, __: int, ___: Any, tensors: dict[str, Any]) -> dict[str, Any]:
        on_step()
        return tensors

    video_THWC: np.ndarray = pipeline(
        height=clips.height,
        width=clips.width,
        num_frames=clips.num_frames,
        num_inference_steps=steps,
        guidance_scale=guidance,
        use_dynamic_cfg=dynamic_cfg,
        max_sequence_length=pipeline.transformer.config.max_text_seq_length,
        generator=torch.Generator().manual_seed(seed),
        output_type="np",
        callback_on_step_end=on_step_end,
        **inputs,
    ).frames[0]
    return video_THWC


def to_frames(video_THWC: np.ndarray) -> np.ndarray:
    """Convert a finite float video to uint8: frames_THWC."""
    return (video_THWC * 255).round().clip(0, 255).astype(np.uint8)
