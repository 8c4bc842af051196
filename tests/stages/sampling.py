"""Sampled frames, before any file is written."""

import numpy as np
import torch

from stages.clips import ClipsConfig
from stages.config import BaseModelConfig
from stages.progress import Progress, SilentProgress
from stages.sample_videos.config import SampleConfig
from stages.sample_videos.requests import VideoRequest
from stages.sample_videos.sample import (
    check_images,
    finite_frames,
    generate_videos,
    open_video_model,
)


def sample_frames(
    config: SampleConfig,
    model: BaseModelConfig,
    clips: ClipsConfig,
    *,
    run_dir=None,
    prompt: str = "a person walks",
    image=None,
    progress: Progress | None = None,
) -> np.ndarray:
    """uint8 [T, H, W, 3]: the video of one prompt, with the seed of the settings."""
    video_model = open_video_model(config, model, clips, run_dir=run_dir)
    requests = [VideoRequest(prompt=prompt, seed=config.seed, image=image)]
    check_images(video_model, requests)
    (video_THWC,) = generate_videos(
        video_model,
        requests,
        device=torch.device("cpu"),
        progress=progress or SilentProgress(),
    )
    return finite_frames(video_THWC, config)


SAMPLING = SampleConfig(steps=2, guidance=3.0, precision="fp32", device="cpu", seed=5)
"""Settings of `plain_video`."""


def plain_video(pipeline, tiny, **inputs):
    """uint8 [T, H, W, 3]: the video of a pipeline of diffusers, with the settings of SAMPLING."""
    pipeline.set_progress_bar_config(disable=True)
    (video_THWC,) = pipeline(
        prompt="a person walks",
        height=tiny.HEIGHT,
        width=tiny.WIDTH,
        num_frames=tiny.FRAMES,
        num_inference_steps=SAMPLING.steps,
        guidance_scale=SAMPLING.guidance,
        generator=torch.Generator().manual_seed(SAMPLING.seed),
        **inputs,
    ).frames
    return (video_THWC * 255).round().astype(np.uint8)
