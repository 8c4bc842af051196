"""Generating videos with a base pipeline and the weights of a run."""

import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch

from stages.clips import ClipsConfig, write_video
from stages.cogvideox.configs import resolve_base_model
from stages.cogvideox.sampler import (
    PIPELINES,
    build_pipeline,
    first_frame,
    generate_video,
    output_fps,
    pipeline_class,
    to_frames,
)
from stages.cogvideox.weights import Part, check_base_weights, load_tokenizer, model_class_of
from stages.config import BaseModelConfig
from stages.files.weight_checks import load_model
from stages.precision import DTYPES
from stages.progress import Progress
from stages.sample_videos.config import SampleConfig
from stages.sample_videos.runs import add_lora, find_export, load_full_transformer

_WEIGHTS: tuple[Part, ...] = ("tokenizer", "text_encoder", "vae", "transformer")
_PARTS = (*_WEIGHTS, "scheduler")


@dataclass(frozen=True, kw_only=True, slots=True)
class SampleSummary:
    """A generated video, and how it was generated."""

    out: Path
    prompt: str
    run_dir: Path | None
    weights: Literal["lora", "full", "base"]
    num_frames: int
    height: int
    width: int
    fps: float
    seconds: float
    """Time of generating and writing; for the first video including loading the models."""


def image_mismatch(model: BaseModelConfig, image: Path | None) -> str | None:
    """Why the base model cannot start from this image, or from none; None if it can.

    Raises:
        ValueError: It is not a CogVideoX pipeline.
    """
    takes_image = PIPELINES[pipeline_class(resolve_base_model(model, ()))]
    if takes_image and image is None:
        return f"{model.path} is an image-to-video model; add --image FILE"
    if not takes_image and image is not None:
        return f"{model.path} is a text-to-video model; remove --image"
    return None


def sample_videos(
    config: SampleConfig,
    model: BaseModelConfig,
    clips: ClipsConfig,
    *,
    run_dir: Path | None,
    prompts: Sequence[str],
    image: Path | None,
    outs: Sequence[Path],
    progress: Progress,
) -> Iterator[SampleSummary]:
    """Generate a video of each prompt and write it as mp4; the models are loaded once.

    Args:
        config: Denoising steps, guidance, seed (the same for each video), length, device.
        model: The base pipeline, CogVideoXPipeline or CogVideoXImageToVideoPipeline.
        clips: Height, width, frame rate and default length of the videos, as in training; the first
            of several sizes.
        run_dir: The training run whose export is applied; None uses the base model alone.
        prompts: One prompt per video.
        image: First frame, scaled and cropped like clips; image-to-video only.
        outs: The file to write for each prompt; ends in .mp4.
        progress: Reports loading and each denoising step.

    Raises:
        ValueError: The export is missing or does not fit the base model, or the image does not
            (`image_mismatch`).
    """
    started = time.monotonic()
    if (mismatch := image_mismatch(model, image)) is not None:
        raise ValueError(mismatch)
    if not all(prompt.strip() for prompt in prompts):
        raise ValueError("the prompt is empty; describe the video")
    clips = clips.sizes[0]
    device = _device(config)
    export = None if run_dir is None else find_export(run_dir)
    base = resolve_base_model(model, _PARTS)
    condition = {} if image is None else {"image": first_frame(image, clips)}
    tuned = export is not None and export.method == "full"
    check_base_weights(base, [part for part in _WEIGHTS if not (tuned and part == "transformer")])
    dtype = DTYPES[config.precision]
    with progress.task("load the models", 1, unit="pipeline") as task:
        parts: dict[str, Any] = {"tokenizer": load_tokenizer(base)}
        for part in _WEIGHTS[1:]:
            if part == "transformer" and export is not None and export.method == "full":
                parts[part] = load_full_transformer(export, base, dtype)
            else:
                parts[part] = load_model(model_class_of(part), base / part, dtype=dtype)
        pipeline = build_pipeline(base, **parts)
        pipeline.set_progress_bar_config(disable=True)
        if export is not None and export.method == "lora":
            add_lora(pipeline, export)
        _place(pipeline, config, device)
        task.advance()
    if config.num_frames is not None:
        clips = clips.model_copy(update={"num_frames": config.num_frames})
    fps = output_fps(clips)
    for prompt, out in zip(prompts, outs, strict=True):
        frames_THWC = _draw(pipeline, clips, config, progress, prompt=prompt, **condition)
        write_video(out, frames_THWC, fps)
        yield SampleSummary(
            out=out,
            prompt=prompt,
            run_dir=run_dir,
            weights="base" if export is None else export.method,
            num_frames=len(frames_THWC),
            height=frames_THWC.shape[1],
            width=frames_THWC.shape[2],
            fps=fps,
            seconds=time.monotonic() - started,
        )
        started = time.monotonic()


def _draw(
    pipeline: Any, clips: ClipsConfig, config: SampleConfig, progress: Progress, **inputs: Any
) -> np.ndarray:
    """The frames of one video: uint8 [T, H, W, 3]."""
    with progress.task("denoise", config.steps, unit="steps") as task:
        video_THWC = generate_video(
            pipeline,
            clips,
            steps=config.steps,
            guidance=config.guidance,
            seed=config.seed,
            on_step=task.advance,
            **inputs,
        )
    if not np.isfinite(video_THWC).all():
        raise ValueError(
            f"the video has NaN or infinite values at sample.precision={config.precision}; bf16 or "
            "fp32 may help, unless training itself diverged"
        )
    return to_frames(video_THWC)


def _device(config: SampleConfig) -> torch.device:
    name = config.device
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    try:
        device = torch.device(name)
    except RuntimeError as error:
        raise ValueError(f"sample.device={name} is not a torch device; auto is usual") from error
    if config.cpu_offload and device.type == "cpu":
        raise ValueError("sample.cpu_offload moves models to a GPU, but sample.device is the CPU")
    return device


def _place(pipeline: Any, config: SampleConfig, device: torch.device) -> None:
    if not config.cpu_offload:
        pipeline.to(device)
        return
    pipeline.enable_model_cpu_offload(device=device)
    # Decoding 49 frames of 480x720 at once would dominate peak memory.
    pipeline.vae.enable_slicing()
    pipeline.vae.enable_tiling()
