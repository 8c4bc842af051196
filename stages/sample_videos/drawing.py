"""What every drawing of a video has in common, whatever the weights come from.

`sampling` draws with a run's export, `stages.train_student.validation` with the weights as they are
while they are trained.
"""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image, ImageOps, UnidentifiedImageError

from stages.clips import ClipsConfig
from stages.clips.geometry import cover_and_crop
from stages.weight_checks import read_json

PIPELINES = {"CogVideoXPipeline": False, "CogVideoXImageToVideoPipeline": True}
"""Classes a base model may be of, and whether they take an image."""
_USUAL_FPS = 8.0
"""CogVideoX 1.0's rate, for a configuration that keeps each clip's own."""


def pipeline_class(base: Path) -> str:
    """Name of the diffusers class of the pipeline in this folder.

    Raises:
        ValueError: It is no CogVideoX pipeline.
    """
    index = read_json(base / "model_index.json")
    class_name = index.get("_class_name")
    if class_name not in PIPELINES:
        raise ValueError(
            f"the base model {base} is a {class_name}; model.path must be one of {list(PIPELINES)}"
        )
    return str(class_name)


def fps_of(clips: ClipsConfig) -> float:
    """Frames per second of what is drawn."""
    return clips.fps or _USUAL_FPS


def first_frame(image: Path, clips: ClipsConfig) -> Image.Image:
    """The image, scaled and cropped as clips are.

    Raises:
        ValueError: It cannot be read.
    """
    try:
        with Image.open(image) as opened:
            picture_HWC = np.asarray(ImageOps.exif_transpose(opened).convert("RGB"))
    except (UnidentifiedImageError, OSError) as error:
        raise ValueError(f"cannot read the image {image} ({error})") from error
    geometry = cover_and_crop(
        *picture_HWC.shape[:2],
        height=clips.height,
        width=clips.width,
        source_fps=fps_of(clips),
        sampling="consecutive",
    )
    return Image.fromarray(geometry.frame(picture_HWC))


def draw(
    pipeline: Any,
    clips: ClipsConfig,
    *,
    steps: int,
    guidance: float,
    seed: int,
    on_step: Callable[[], None],
    **inputs: Any,
) -> np.ndarray:
    """Draw one video with a diffusers pipeline.

    Args:
        pipeline: Of one of the classes in `PIPELINES`.
        clips: Height, width and number of frames.
        steps: Denoising steps.
        guidance: Classifier-free guidance scale; 1 turns it off.
        seed: Of the initial noise, which is drawn on the CPU: the same on every device.
        on_step: Called after each denoising step.
        inputs: The prompt or its embeddings; the first frame, for image-to-video.

    Returns:
        video_THWC, float32 in 0..1; not finite where the model is not.
    """

    def after(_: Any, __: int, ___: Any, tensors: dict[str, Any]) -> dict[str, Any]:
        on_step()
        return tensors

    video_THWC: np.ndarray = pipeline(
        height=clips.height,
        width=clips.width,
        num_frames=clips.num_frames,
        num_inference_steps=steps,
        guidance_scale=guidance,
        max_sequence_length=pipeline.transformer.config.max_text_seq_length,
        generator=torch.Generator().manual_seed(seed),
        output_type="np",
        callback_on_step_end=after,
        **inputs,
    ).frames[0]
    return video_THWC


def to_frames(video_THWC: np.ndarray) -> np.ndarray:
    """Bytes of a finite video: frames_THWC."""
    return (video_THWC * 255).round().clip(0, 255).astype(np.uint8)
