"""Video generation with a student's diffusers pipeline: assembly, input image, denoising loop."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image, ImageOps, UnidentifiedImageError

from stages.clips import ClipsConfig
from stages.clips.geometry import FrameGeometry, cover_and_crop
from stages.files.weight_checks import read_config
from stages.students.registry import read_model_index, student_of_pipeline
from stages.students.student import StudentConfigs


def pipeline_class(base: Path) -> str:
    """Name of the diffusers class of the pipeline in a folder.

    Raises:
        ValueError: The folder is not a pipeline of a supported student.
    """
    return str(read_model_index(base)[0]["_class_name"])


def takes_image(base: Path) -> bool:
    """Whether the pipeline in a folder makes videos from an image.

    Raises:
        ValueError: As `pipeline_class`.
    """
    index, student = read_model_index(base)
    return student.PIPELINES[index["_class_name"]]


def build_pipeline(base: Path, **parts: Any) -> Any:
    """Load the pipeline in a folder, with `parts` as components that are loaded already or None.

    Raises:
        ValueError: The folder is not a supported pipeline, or a component cannot be loaded.
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
        source_fps=clips.fps or 1.0,  # one picture has no rate
        sampling="consecutive",
    )
    return picture_HWC, geometry


def student_of(pipeline: Any) -> type[StudentConfigs]:
    """The family of a loaded pipeline."""
    found = (student_of_pipeline(one.__name__) for one in type(pipeline).__mro__)
    return next(student for student in found if student is not None)


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
        pipeline: Instance of a class in a student's `PIPELINES`.
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

    student = student_of(pipeline)
    video_THWC: np.ndarray = pipeline(
        height=clips.height,
        width=clips.width,
        num_frames=clips.num_frames,
        num_inference_steps=steps,
        guidance_scale=guidance,
        generator=torch.Generator().manual_seed(seed),
        output_type="np",
        callback_on_step_end=on_step_end,
        **student.sampling_arguments(pipeline, dynamic_cfg=dynamic_cfg),
        **inputs,
    ).frames[0]
    return video_THWC


def to_frames(video_THWC: np.ndarray) -> np.ndarray:
    """Convert a finite float video to uint8: frames_THWC."""
    return (video_THWC * 255).round().clip(0, 255).astype(np.uint8)
