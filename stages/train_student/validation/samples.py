"""Sample videos drawn while a model is trained.

    <run_dir>/samples/
        prompts.safetensors      (prompts.py)
        step-000500/0.mp4 ...    a video per prompt
        step-000500/samples.json what was drawn and how; written last, so that without it the
                                 drawing is not complete

The ranks share the prompts, and all of them draw the same number of videos, which ZeRO 3 needs: a
rank with no prompt left draws one again and throws it away.
"""

import json
import shutil
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from cache_schema.durable import write_whole
from stages.base_model import resolve_base_model
from stages.clips import ClipsConfig, write_video
from stages.config import BaseModelConfig
from stages.run_report.records import SAMPLES_RECORD
from stages.sample_videos.drawing import draw, first_frame, fps_of, to_frames
from stages.train_student.config import TrainingSamplesConfig
from stages.train_student.distributed import World, gather, on_first_rank
from stages.train_student.student import Student
from stages.train_student.validation.live_pipeline import live_pipeline
from stages.train_student.validation.undisturbed import undisturbed

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
