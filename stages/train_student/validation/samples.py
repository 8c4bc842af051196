"""Sample videos drawn while a model is trained, with the student as it is.

    <run_dir>/samples/
        prompts.safetensors      (text.py)
        step-000500/0.mp4 ...    a video per prompt
        step-000500/samples.json what was drawn and how; written last: without it the samples are
                                 incomplete

The diffusers pipeline denoises and decodes; where it calls its transformer, the student answers. So
every pass goes through the module that the engine wraps, and ZeRO 3 gathers one block's weights
after the other, as in training.

The ranks share the prompts, and all draw the same number of videos, which ZeRO 3 needs: a rank
without a prompt draws one again and discards it.
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

from cache_schema.atomic_io import write_whole
from stages.clips import ClipsConfig, write_video
from stages.cogvideox.configs import resolve_base_model
from stages.cogvideox.sampler import build_pipeline, draw, first_frame, fps_of, to_frames
from stages.cogvideox.weights import model_class_of
from stages.config import BaseModelConfig
from stages.files.weight_checks import load_model
from stages.train_student.config import TrainingSamplesConfig
from stages.train_student.model.student import Student
from stages.train_student.parallel.process_group import World, gather, on_first_rank
from stages.train_student.report.records import SAMPLES_RECORD


@contextmanager
def undisturbed(student: nn.Module, device: torch.device) -> Iterator[None]:
    """Evaluation mode without gradients; afterwards modes and random numbers go on as before.

    Gradient checkpointing rests meanwhile: it is for passes with gradients.
    """
    modules = [module for module in student.modules() if module.training]
    devices = [device] if device.type == "cuda" else []
    of_python, of_numpy = random.getstate(), np.random.get_state()
    with torch.random.fork_rng(devices=devices), torch.no_grad():
        student.eval()
        try:
            yield
        finally:
            for module in modules:
                module.training = True
            random.setstate(of_python)
            np.random.set_state(of_numpy)


class _LiveTransformer:
    """What a pipeline needs of a `CogVideoXTransformer3DModel`; no module, so it is never moved."""

    def __init__(self, student: Student) -> None:
        self._student = student
        self.config = student.transformer.config

    def cache_context(self, name: str) -> Any:
        """Nothing is cached between passes."""
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
        """The student's velocity."""
        if attention_kwargs is not None or return_dict:
            raise ValueError("the pipeline asks its transformer for more than training gives")
        no_heads = (0, 0, 0)
        velocity_BFCHW, _ = self._student(
            hidden_states, encoder_hidden_states, timestep, no_heads, image_rotary_emb, ofs
        )
        return (velocity_BFCHW,)


@contextmanager
def live_pipeline(
    student: Student, base: Path, *, dtype: torch.dtype, device: torch.device
) -> Iterator[Any]:
    """The base's pipeline around the student, without tokenizer and text encoder.

    The VAE is loaded for the length of the block; on a GPU it decodes in tiles, since the training
    needs most of the memory. The student's heads are set aside meanwhile.

    Args:
        base: the pipeline's folder, with vae/ and scheduler/.
        dtype: arithmetic of the VAE: that of the student.
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
"""What guidance leads away from; the pipelines' own default."""


class TrainingSamples:
    """Draws the prompts with the student, as often as it is called."""

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
        """Get ready; nothing big is loaded.

        Args:
            config: what is drawn, with at least one prompt.
            run_dir: the run's folder.
            model: the base pipeline.
            clips: the size of the videos.
            embeds: of every prompt and of the negative one.
            dtype: arithmetic of the student.
        """
        self._config = config
        self._folder = run_dir / FOLDER
        self._model = model
        self._clips = clips
        self._embeds = embeds
        self._images = [first_frame(image, clips) for image in config.images]
        self._dtype = dtype
        self._world = world

    def drawn(self, step: int) -> bool:
        """Whether the videos of that step are complete."""
        return (self._folder_of(step) / SAMPLES_RECORD).is_file()

    def drop_after(self, step: int) -> None:
        """Remove what an interrupted run drew after `step` steps: it is drawn again."""
        for folder in self._folder.glob("step-*"):
            if int(folder.name.removeprefix("step-")) > step:
                shutil.rmtree(folder)

    def __call__(
        self, student: Student, step: int, note: Callable[[str], None]
    ) -> tuple[list[Path], float]:
        """Draw after `step` steps; every rank must call this.

        Args:
            note: told how far it is.

        Returns:
            The videos in the order of the prompts, and the largest share of a video's values that
            were no numbers and are drawn black.
        """
        started = time.monotonic()
        config, world = self._config, self._world
        base = resolve_base_model(self._model, ("vae", "scheduler"))
        passes = -(-len(config.prompts) // world.size)
        spoiled = 0.0
        done = 0

        def on_step() -> None:
            nonlocal done
            done += 1
            note(f"drawing {done}/{passes * config.steps}")

        with (
            undisturbed(student, world.device),
            live_pipeline(student, base, dtype=self._dtype, device=world.device) as pipeline,
        ):
            for turn in range(passes):
                number = turn * world.size + world.rank
                video_THWC = self._draw(pipeline, number % len(config.prompts), on_step)
                if number < len(config.prompts):
                    spoiled = max(spoiled, 1.0 - float(np.isfinite(video_THWC).mean()))
                    frames_THWC = to_frames(np.nan_to_num(video_THWC, posinf=1.0, neginf=0.0))
                    write_video(self._video(step, number), frames_THWC, fps_of(self._clips))
        spoiled = max(gather(world, spoiled))  # everything is written when this returns
        on_first_rank(world, lambda: self._record(step, time.monotonic() - started))
        return [self._video(step, number) for number in range(len(config.prompts))], spoiled

    def _draw(self, pipeline: Any, number: int, on_step: Callable[[], None]) -> np.ndarray:
        config = self._config

        def embeds_of(prompt: str) -> Tensor:
            return self._embeds[prompt].to(self._world.device)

        inputs: dict[str, Any] = {"prompt_embeds": embeds_of(config.prompts[number])}
        if config.guidance > 1.0:
            inputs["negative_prompt_embeds"] = embeds_of(NEGATIVE_PROMPT)
        if self._images:
            inputs["image"] = self._images[number]
        return draw(
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
        about = {
            "step": step,
            "prompts": config.prompts,
            "images": [str(image) for image in config.images],
            "denoising_steps": config.steps,
            "guidance": config.guidance,
            "seed": config.seed,
            "fps": fps_of(self._clips),
            "seconds": round(seconds, 3),
        }
        path = self._folder_of(step) / SAMPLES_RECORD
        data = json.dumps(about, indent=1, ensure_ascii=False).encode()
        write_whole(path, data, temporary=path.with_name(f".{path.name}.partial"))

    def _video(self, step: int, number: int) -> Path:
        return self._folder_of(step) / f"{number}.mp4"

    def _folder_of(self, step: int) -> Path:
        return self._folder / f"step-{step:06d}"
