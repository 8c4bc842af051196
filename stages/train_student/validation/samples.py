"""Sample videos generated during training, with the current weights of the student.

    <run_dir>/samples/
        prompts.safetensors      (text.py)
        step-000500/0.mp4 ...    a video per prompt
        step-000500/samples.json prompts and sampling settings; written last, marks the samples as
                                 complete

The diffusers pipeline denoises and decodes, with the student in place of its transformer. Every
forward pass thus goes through the module that the engine wraps, and ZeRO 3 gathers the weights one
block at a time, as in training.

The prompts are split over the ranks. All ranks generate the same number of videos, as ZeRO 3
requires: a rank without a prompt repeats one and discards the result.
"""

import json
import random
import shutil
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from cache_schema.atomic_io import write_atomic
from stages.clips import ClipsConfig, write_video
from stages.cogvideox.configs import resolve_base_model
from stages.cogvideox.sampler import (
    build_pipeline,
    first_frame,
    generate_video,
    output_fps,
    to_frames,
)
from stages.cogvideox.weights import model_class_of
from stages.config import BaseModelConfig
from stages.files.weight_checks import load_model
from stages.train_student.config import TrainingSamplesConfig
from stages.train_student.model.student import Student
from stages.train_student.parallel.process_group import World, gather, on_first_rank
from stages.train_student.report.records import SAMPLES_RECORD


@contextmanager
def eval_mode(student: nn.Module, device: torch.device) -> Iterator[None]:
    """Context manager: eval mode, no gradients; restores training modes and all RNG states after.

    Gradient checkpointing is inactive meanwhile, since there are no gradients.
    """
    modules = [module for module in student.modules() if module.training]
    devices = [device] if device.type == "cuda" else []
    python_state, numpy_state = random.getstate(), np.random.get_state()
    with torch.random.fork_rng(devices=devices), torch.no_grad():
        student.eval()
        try:
            yield
        finally:
            for module in modules:
                module.training = True
            random.setstate(python_state)
            np.random.set_state(numpy_state)


class _LiveTransformer:
    """Student with the interface of `CogVideoXTransformer3DModel` that the pipeline uses.

    Not an `nn.Module`, so the pipeline does not move it between devices.
    """

    def __init__(self, student: Student) -> None:
        self._student = student
        self.config = student.transformer.config

    def cache_context(self, name: str) -> Any:
        """Do nothing: nothing is cached between passes."""
        return nullcontext()

    def __call__(
        self,
        *,
        hidden_states: Tensor,
        encoder_hidden_states: Tensor,
        timestep: Tensor,
        ofs: Tensor | None = None,
        image_rotary_emb: tuple[Tensor, Tensor] | None = None,
        attention_kwargs: dict[str, Any] | None = None,
        return_dict: bool = False,
    ) -> tuple[Tensor]:
        """Return the predicted velocity."""
        if attention_kwargs is not None or return_dict:
            raise ValueError(
                "attention_kwargs and return_dict=True are not supported during training"
            )
        no_heads = (0, 0, 0)
        velocity_BFCHW, _ = self._student(
            hidden_states, encoder_hidden_states, timestep, no_heads, image_rotary_emb, ofs
        )
        return (velocity_BFCHW,)


@contextmanager
def live_pipeline(
    student: Student, base: Path, *, dtype: torch.dtype, device: torch.device
) -> Iterator[Any]:
    """Context manager: the base pipeline around the student, without tokenizer and text encoder.

    The VAE is loaded for the duration of the block; on a GPU it decodes in tiles, since training
    needs most of the memory. The student's heads are removed meanwhile.

    Args:
        base: the pipeline's folder, with vae/ and scheduler/.
        dtype: dtype of the VAE and the student.
    """
    vae = load_model(model_class_of("vae"), base / "vae", dtype=dtype)
    vae.requires_grad_(False).eval().to(device)
    if device.type == "cuda":
        vae.enable_slicing()
        vae.enable_tiling()
    pipeline = build_pipeline(base, tokenizer=None, text_encoder=None, transformer=None, vae=vae)
    pipeline.transformer = _LiveTransformer(student)
    pipeline.set_progress_bar_config(disable=True)
    heads, student.heads = student.heads, nn.ModuleDict()
    try:
        yield pipeline
    finally:
        student.heads = heads
        del pipeline, vae
        if device.type == "cuda":
            torch.cuda.empty_cache()


FOLDER = "samples"
NEGATIVE_PROMPT = ""
"""Negative prompt of classifier-free guidance; the pipelines' default."""


class TrainingSamples:
    """Callable that generates a video of each prompt with the student."""

    def __init__(
        self,
        config: TrainingSamplesConfig,
        run_dir: Path,
        model: BaseModelConfig,
        clips: ClipsConfig,
        embeds: dict[str, Tensor],
        *,
        dtype: torch.dtype,
        world: World,
    ) -> None:
        """Load the first frames, if any; no model weights.

        Args:
            config: sampling settings, with at least one prompt.
            run_dir: the run's folder.
            model: the base pipeline.
            clips: size of the videos.
            embeds: text embeddings of all prompts and the negative prompt.
            dtype: dtype of the student.
        """
        self._config = config
        self._folder = run_dir / FOLDER
        self._model = model
        self._clips = clips
        self._embeds = embeds
        self._images = [first_frame(image, clips) for image in config.images]
        self._dtype = dtype
        self._world = world

    def is_complete(self, step: int) -> bool:
        """Whether the samples of that step are complete."""
        return (self._step_folder(step) / SAMPLES_RECORD).is_file()

    def delete_after(self, step: int) -> None:
        """Delete samples that an interrupted run generated after `step` steps."""
        for folder in self._folder.glob("step-*"):
            if int(folder.name.removeprefix("step-")) > step:
                shutil.rmtree(folder)

    def __call__(
        self, student: Student, step: int, note: Callable[[str], None]
    ) -> tuple[list[Path], float]:
        """Generate the samples after `step` steps; every rank must call this.

        Args:
            note: called with a progress text.

        Returns:
            The videos in the order of the prompts, and the largest fraction of NaN or infinite
            values in one video, which are clipped (NaN to black).
        """
        started = time.monotonic()
        config, world = self._config, self._world
        base = resolve_base_model(self._model, ("vae", "scheduler"))
        passes = -(-len(config.prompts) // world.size)
        nonfinite = 0.0
        done = 0

        def on_step() -> None:
            nonlocal done
            done += 1
            note(f"sampling {done}/{passes * config.steps}")

        with (
            eval_mode(student, world.device),
            live_pipeline(student, base, dtype=self._dtype, device=world.device) as pipeline,
        ):
            for pass_index in range(passes):
                number = pass_index * world.size + world.rank
                video_THWC = self._draw(pipeline, number % len(config.prompts), on_step)
                if number < len(config.prompts):
                    nonfinite = max(nonfinite, 1.0 - float(np.isfinite(video_THWC).mean()))
                    frames_THWC = to_frames(np.nan_to_num(video_THWC, posinf=1.0, neginf=0.0))
                    write_video(self._video(step, number), frames_THWC, output_fps(self._clips))
        nonfinite = max(
            gather(world, nonfinite)
        )  # also a barrier: all ranks have written their videos
        on_first_rank(world, lambda: self._record(step, time.monotonic() - started))
        return [self._video(step, number) for number in range(len(config.prompts))], nonfinite

    def _draw(self, pipeline: Any, number: int, on_step: Callable[[], None]) -> np.ndarray:
        config = self._config

        def embed(prompt: str) -> Tensor:
            return self._embeds[prompt].to(self._world.device)

        inputs: dict[str, Any] = {"prompt_embeds": embed(config.prompts[number])}
        if config.guidance > 1.0:
            inputs["negative_prompt_embeds"] = embed(NEGATIVE_PROMPT)
        if self._images:
            inputs["image"] = self._images[number]
        return generate_video(
            pipeline,
            self._clips,
            steps=config.steps,
            guidance=config.guidance,
            seed=config.seed,
            on_step=on_step,
            **inputs,
        )

    def _record(self, step: int, seconds: float) -> None:
        config = self._config
        record = {
            "step": step,
            "prompts": config.prompts,
            "images": [str(image) for image in config.images],
            "denoising_steps": config.steps,
            "guidance": config.guidance,
            "seed": config.seed,
            "fps": output_fps(self._clips),
            "seconds": round(seconds, 3),
        }
        path = self._step_folder(step) / SAMPLES_RECORD
        data = json.dumps(record, indent=1, ensure_ascii=False).encode()
        write_atomic(path, data, temporary=path.with_name(f".{path.name}.partial"))

    def _video(self, step: int, number: int) -> Path:
        return self._step_folder(step) / f"{number}.mp4"

    def _step_folder(self, step: int) -> Path:
        return self._folder / f"step-{step:06d}"
