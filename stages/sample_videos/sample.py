"""Generating videos with a base pipeline and the weights of a run."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, get_args

import numpy as np
import torch

from cache_schema import JSON
from stages.clips import ClipsConfig
from stages.clips.fingerprints import hash_parts
from stages.config import BaseModelConfig, Expert
from stages.files.weight_checks import load_model
from stages.precision import DTYPES
from stages.progress import Progress
from stages.sample_videos.config import SampleConfig
from stages.sample_videos.loading import add_lora, load_full_transformer
from stages.sample_videos.requests import VideoRequest
from stages.sample_videos.runs import (
    Export,
    by_transformer,
    export_hash,
    find_export,
    runs_in,
)
from stages.students.hub import resolve_base_model
from stages.students.registry import (
    has_two_transformers,
    image_parts,
    read_configs,
    student_at,
)
from stages.students.sampler import (
    build_pipeline,
    first_frame,
    generate_video,
    student_of,
    takes_image,
    to_frames,
)
from stages.students.weights import (
    Part,
    check_base_weights,
    hash_pipeline,
    load_tokenizer,
    model_class_of,
    sampling_parts,
)

BASE = "base"
"""Name of a base model that is used alone."""


@dataclass(frozen=True, kw_only=True, slots=True)
class VideoModel:
    """A base model, alone or with the exported weights of a run, and the settings of its videos."""

    name: str
    """`base`, or the name of the run's folder."""
    base: Path
    """Folder of the base pipeline, complete."""
    run_dir: Path | None
    """The training run, the folder of an export, or one that holds those of two experts; None for
    the base alone."""
    exports: Mapping[Part, Export]
    """The run's weights, by the transformer that they are of; empty for the base alone."""
    config: SampleConfig
    size: ClipsConfig
    """Height, width, length and frame rate of the videos."""
    fps: float
    """Frames per second of the videos."""
    settings: dict[str, JSON]
    """What changes the pixels, besides prompt, seed and image."""

    @property
    def weights(self) -> str:
        """What the videos are made with: base, lora or full; lora+full if two experts differ."""
        return "+".join(sorted({one.method for one in self.exports.values()})) or BASE

    @property
    def untrained(self) -> Expert | None:
        """Which of two transformers is the base model's, though the other one was trained."""
        trained = {one.expert for one in self.exports.values()} - {None}
        others = [expert for expert in get_args(Expert) if expert not in trained]
        return others[0] if trained and others else None

    @property
    def warning(self) -> str | None:
        """What the user should know of the weights before sampling."""
        if self.untrained is None:
            return None
        return (
            f"{self.run_dir} trained one of two transformers: the {self.untrained} one is the base "
            f"model's. Train it too, and name the folder that holds both runs as "
            f"{' and '.join(get_args(Expert))}"
        )

    def made_from(self, request: VideoRequest) -> dict[str, JSON]:
        """Everything that changes the pixels of a video; the image by a hash of its bytes."""
        image = None if request.image is None else hash_parts([request.image.read_bytes()])
        return {"prompt": request.prompt, "seed": request.seed, "image": image, **self.settings}


def open_video_model(
    config: SampleConfig, model: BaseModelConfig, clips: ClipsConfig, *, run_dir: Path | None
) -> VideoModel:
    """Find the base model and a run's export, and check both without loading them.

    Args:
        config: Settings of sampling.
        model: The base pipeline.
        clips: Size, length and rate of the videos where `config` names none, as in training.
        run_dir: The training run whose export is applied, or the folder of both experts' runs; None
            uses the base model alone.

    Raises:
        ValueError: Weights are missing, damaged or do not fit, or a setting does not fit them.
    """
    found = [] if run_dir is None else [find_export(one) for one in runs_in(run_dir)]
    folders = ["tokenizer", "text_encoder", "vae", "transformer", "scheduler"]
    base = resolve_base_model(model, folders)
    two = has_two_transformers(base)
    more = [*image_parts(base), *(["transformer_2"] if two else [])]
    if more:
        base = resolve_base_model(model, folders + more)
    exports = by_transformer(found, base)
    tuned = [part for part, export in exports.items() if export.method == "full"]
    if tuned and config.lora_scale != 1.0:
        raise ValueError(
            f"{run_dir} holds a whole transformer, which sample.lora_scale={config.lora_scale:g} "
            "cannot scale; it must be 1"
        )
    used = [part for part in sampling_parts(base) if part not in tuned]
    check_base_weights(base, used)
    size = config.video_size(clips)
    student = read_configs(base, model.expert)
    student.check_video_size(size)
    student.check_sampling(scheduler=config.scheduler, dynamic_cfg=config.dynamic_cfg)
    fps = size.fps or student.DEFAULT_FPS
    weights: dict[Part, JSON] = {part: export_hash(one) for part, one in exports.items()}
    settings: dict[str, JSON] = {
        "base": hash_pipeline(base, used),
        "weights": weights.get("transformer"),
        "lora_scale": config.lora_scale if len(exports) > len(tuned) else None,
        "steps": config.steps,
        "guidance": config.guidance,
        "dynamic_cfg": config.dynamic_cfg,
        "scheduler": config.scheduler,
        "size": size.size_name,
        "fps": fps,
        "precision": config.precision,
        "tiling": config.tiling,
    }
    if two:
        settings |= {
            "weights_2": weights.get("transformer_2"),
            "boundary_ratio": student.boundary_ratio,
        }
    return VideoModel(
        name=BASE if run_dir is None else run_dir.resolve().name,
        run_dir=run_dir,
        base=base,
        exports=exports,
        config=config,
        size=size,
        fps=fps,
        settings=settings,
    )


def log_warnings(models: Sequence[VideoModel], progress: Progress) -> None:
    """Show what the user should know of the models' weights, each warning once."""
    for warning in dict.fromkeys(model.warning for model in models):
        if warning is not None:
            progress.log(f"warning: {warning}")


def check_images(video_model: VideoModel, requests: Sequence[VideoRequest]) -> None:
    """Check that every video has a first frame if the model needs one, and that it can be read.

    Raises:
        ValueError: An image is missing, unreadable, or given to a text-to-video model.
    """
    needs_image = takes_image(video_model.base)
    for request in requests:
        if needs_image and request.image is None:
            raise ValueError(
                f"{video_model.base} is an image-to-video model, but the prompt "
                f"{request.prompt!r:.80} has no image; add --image FILE"
            )
        if not needs_image and request.image is not None:
            raise ValueError(
                f"{video_model.base} is a text-to-video model; remove the image {request.image}"
            )
    for image in dict.fromkeys(one.image for one in requests if one.image is not None):
        first_frame(image, video_model.size)


def generate_videos(
    video_model: VideoModel,
    requests: Sequence[VideoRequest],
    *,
    device: torch.device,
    progress: Progress,
) -> Iterator[np.ndarray]:
    """Generate a video per request; the models are loaded once, before the first.

    Each video depends on its own request only: the same seed gives the same pixels on one device,
    whatever else is generated.

    Args:
        video_model: Base model, weights and settings.
        requests: Prompts, seeds and images.
        device: Where the models run.
        progress: Reports loading and each denoising step.

    Yields:
        video_THWC, float32 in 0..1, or NaN and infinite where the model's output is.
    """
    config = video_model.config
    with progress.task("load the models", 1, unit="pipeline") as loading:
        pipeline = _load(video_model, device)
        loading.advance()
    with progress.task(
        f"{video_model.name}: denoise", config.steps * len(requests), unit="steps"
    ) as task:
        for number, request in enumerate(requests, start=1):
            task.note(f"video {number}/{len(requests)}")
            condition = {}
            if request.image is not None:
                condition["image"] = first_frame(request.image, video_model.size)
            yield generate_video(
                pipeline,
                video_model.size,
                steps=config.steps,
                guidance=config.guidance,
                dynamic_cfg=config.dynamic_cfg,
                seed=request.seed,
                on_step=task.advance,
                prompt=request.prompt,
                **condition,
            )


def finite_frames(video_THWC: np.ndarray, config: SampleConfig) -> np.ndarray:
    """Convert a video to uint8: frames_THWC.

    Raises:
        ValueError: It has NaN or infinite values.
    """
    if not np.isfinite(video_THWC).all():
        raise ValueError(
            f"the video has NaN or infinite values at sample.precision={config.precision}; bf16 or "
            "fp32 may help, unless training itself diverged"
        )
    return to_frames(video_THWC)


def _load(video_model: VideoModel, device: torch.device) -> Any:
    """The diffusers pipeline with the run's weights, on its device."""
    config, exports = video_model.config, video_model.exports
    dtype = DTYPES[config.precision]
    parts: dict[str, Any] = {"tokenizer": load_tokenizer(video_model.base)}
    alone = student_at(video_model.base).FLOAT32_PARTS
    for part in sampling_parts(video_model.base)[1:]:
        if part in exports and exports[part].method == "full":
            parts[part] = load_full_transformer(exports[part], video_model.base, part, dtype)
        else:
            parts[part] = load_model(
                model_class_of(part, video_model.base),
                video_model.base / part,
                dtype=torch.float32 if part in alone else dtype,
            )
    pipeline = build_pipeline(video_model.base, **parts)
    pipeline.set_progress_bar_config(disable=True)
    student_of(pipeline).set_scheduler(pipeline, config.scheduler)
    for part, export in exports.items():
        if export.method == "lora":
            add_lora(pipeline, export, part, scale=config.lora_scale)
    if config.offload == "model":
        pipeline.enable_model_cpu_offload(device=device)
    elif config.offload == "sequential":
        pipeline.enable_sequential_cpu_offload(device=device)
    else:
        pipeline.to(device)
    if config.tiling:
        pipeline.vae.enable_slicing()
        pipeline.vae.enable_tiling()
    return pipeline


def sampling_device(config: SampleConfig, *, local_rank: int) -> torch.device:
    """The device of `sample.device`; without an index, each process of a machine has its own GPU.

    Raises:
        ValueError: There is no such device, or models cannot be offloaded from it.
    """
    name = config.device
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    try:
        device = torch.device(name)
    except RuntimeError as error:
        raise ValueError(f"sample.device={name} is not a torch device; auto is usual") from error
    if config.offload != "none" and device.type == "cpu":
        raise ValueError(
            f"sample.offload={config.offload} moves models to a GPU, but sample.device is the CPU"
        )
    if device.type == "cuda" and device.index is None:
        return torch.device("cuda", local_rank)
    return device
