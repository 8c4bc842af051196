"""Sample videos generated during training, with the current weights of the student.

    <run_dir>/samples/
        prompts.safetensors      text embeddings of the prompts, so that a resume loads no encoder
        step-000500/0.mp4 ...    a video per prompt
        step-000500/samples.json prompts, scores and settings; written last, marks the samples as
                                 complete

The diffusers pipeline denoises and decodes, with the student in place of its transformer. Every
forward pass thus goes through the module that the engine wraps, and ZeRO 3 gathers the weights one
block at a time, as in training.

The prompts are split over the ranks. All ranks generate the same number of videos, as ZeRO 3
requires: a rank without a prompt repeats one and discards the result.
"""

import hashlib
import json
import math
import shutil
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from cache_schema.atomic_io import write_atomic
from stages.clips import write_video
from stages.files.tensor_files import save_tensors
from stages.files.text import read_object
from stages.students.hub import resolve_base_model
from stages.students.registry import image_parts
from stages.students.sampler import first_frame, generate_video, to_frames
from stages.train_student.model.live_pipeline import encode_prompts, live_pipeline
from stages.train_student.model.student import Student, eval_mode
from stages.train_student.parallel.process_group import gather, on_first_rank
from stages.train_student.report.records import SAMPLES_RECORD, mean_scores
from stages.train_student.setup import Run
from stages.video_scores.groups import frame_scores

NEGATIVE_PROMPT = ""
"""Negative prompt of classifier-free guidance; the pipelines' default."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Samples:
    """The samples of one step."""

    videos: list[Path]
    """In the order of the prompts."""
    nonfinite: float
    """Largest fraction of NaN or infinite values in one video; they are clipped, NaN to black."""
    scores: list[dict[str, float]]
    """Scores of each video by name; NaN where a video does not allow one."""


class TrainingSamples:
    """Callable that generates a video of each prompt with the student."""

    def __init__(self, run: Run, embeds: dict[str, Tensor]) -> None:
        """Load the first frames, if any; no model weights.

        Args:
            run: has at least one prompt; videos have its first clip size.
            embeds: from `embed_prompts`.
        """
        self._run = run
        self._config = run.config.samples
        self._clips = run.clips.sizes[0]
        self._embeds = embeds
        self._fps = self._clips.fps or run.configs.DEFAULT_FPS
        self._images = [first_frame(image, self._clips) for image in self._config.images]
        self._world = run.world

    def is_complete(self, step: int) -> bool:
        """Whether the samples of that step are complete."""
        return (self._step_folder(step) / SAMPLES_RECORD).is_file()

    def delete_after(self, step: int) -> None:
        """Delete samples that an interrupted run generated after `step` steps."""
        for folder in _folder_of(self._run).glob("step-*"):
            if int(folder.name.removeprefix("step-")) > step:
                shutil.rmtree(folder)

    def __call__(self, student: Student, step: int, note: Callable[[str], None]) -> Samples:
        """Generate the samples after `step` steps; every rank must call this.

        Args:
            note: called with a progress text.
        """
        started = time.monotonic()
        config, world = self._config, self._world
        of_image = image_parts(self._run.configs.folder)
        base = resolve_base_model(self._run.model, ("vae", "scheduler", *of_image))
        passes = -(-len(config.prompts) // world.size)
        nonfinite = 0.0
        scores: dict[int, dict[str, float]] = {}
        done = 0

        def on_step() -> None:
            nonlocal done
            done += 1
            note(f"sampling {done}/{passes * config.steps}")

        with (
            eval_mode(student, world.device),
            live_pipeline(student, base, dtype=self._run.dtype, device=world.device) as pipeline,
        ):
            for pass_index in range(passes):
                number = pass_index * world.size + world.rank
                video_THWC = self._draw(pipeline, number % len(config.prompts), on_step)
                if number < len(config.prompts):
                    nonfinite = max(nonfinite, 1.0 - float(np.isfinite(video_THWC).mean()))
                    frames_THWC = to_frames(np.nan_to_num(video_THWC, posinf=1.0, neginf=0.0))
                    write_video(self._video(step, number), frames_THWC, self._fps)
                    scores[number], _ = frame_scores(
                        frames_THWC,
                        config.scores,
                        prompt=config.prompts[number],
                        fps=self._fps,
                    )
        # Also a barrier: all ranks have written their videos.
        gathered = gather(world, (nonfinite, scores))
        for _, of_rank in gathered:
            scores |= of_rank
        numbers = range(len(config.prompts))
        samples = Samples(
            videos=[self._video(step, number) for number in numbers],
            nonfinite=max(nonfinite for nonfinite, _ in gathered),
            scores=[scores[number] for number in numbers],
        )
        on_first_rank(world, lambda: self._record(step, samples, time.monotonic() - started))
        return samples

    def scores_before_training(self) -> dict[str, float]:
        """Mean scores of the samples of step 0; empty if there are none."""
        record = self._step_folder(0) / SAMPLES_RECORD
        if not record.is_file():
            return {}
        scores = read_object(record).get("scores")
        return mean_scores(scores) if isinstance(scores, list) else {}

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

    def _record(self, step: int, samples: Samples, seconds: float) -> None:
        scores = [
            {name: None if math.isnan(value) else value for name, value in of_video.items()}
            for of_video in samples.scores
        ]
        record = {
            "step": step,
            **self._config.as_recorded(),
            "fps": self._fps,
            "scores": scores,
            "seconds": round(seconds, 3),
        }
        path = self._step_folder(step) / SAMPLES_RECORD
        data = json.dumps(record, indent=1, ensure_ascii=False).encode()
        write_atomic(path, data)

    def _video(self, step: int, number: int) -> Path:
        return self._step_folder(step) / f"{number}.mp4"

    def _step_folder(self, step: int) -> Path:
        return _folder_of(self._run) / f"step-{step:06d}"


def _folder_of(run: Run) -> Path:
    return run.config.run_dir / "samples"


_ENCODING_TIME = timedelta(hours=12)
"""How long the other ranks wait for rank 0, which may have to download the encoder."""


def embed_prompts(run: Run) -> dict[str, Tensor]:
    """Embed the sample prompts: [1, length, width] on the CPU; call before loading the transformer.

    Every rank must call this. Rank 0 loads the text encoder, unless the embeddings are cached.

    Raises:
        ValueError: the pipeline has no text encoder.
    """
    config = run.config.samples
    if not config.prompts:
        return {}
    negative = (NEGATIVE_PROMPT,) if config.guidance > 1.0 else ()
    prompts = tuple(dict.fromkeys((*config.prompts, *negative)))
    cache_file = _folder_of(run) / "prompts.safetensors"

    def on_first() -> dict[str, Tensor]:
        base = resolve_base_model(run.model, ("tokenizer", "text_encoder"))
        length, _ = run.configs.text_shape
        key = _key(prompts, base, length, run.dtype)
        found = _read(cache_file, key, prompts)
        if found is None:
            with run.progress.task("encode the prompts", len(prompts), unit="prompts") as task:
                found = encode_prompts(
                    prompts, base, length, run.dtype, run.world.device, task.advance
                )
            _write(cache_file, key, [found[prompt] for prompt in prompts])
        return found

    return on_first_rank(run.world, on_first, timeout=_ENCODING_TIME)


def _key(prompts: Sequence[str], base: Path, length: int, dtype: torch.dtype) -> str:
    """Hash of the prompts and of the encoder's file names, sizes and times."""
    files = sorted(
        path for part in ("tokenizer", "text_encoder") for path in (base / part).rglob("*")
    )
    content = {
        "prompts": list(prompts),
        "length": length,
        "dtype": str(dtype),
        "files": [
            [str(path.relative_to(base)), path.stat().st_size, path.stat().st_mtime_ns]
            for path in files
            if path.is_file()
        ],
    }
    return hashlib.sha256(json.dumps(content).encode()).hexdigest()


def _read(cache_file: Path, key: str, prompts: Sequence[str]) -> dict[str, Tensor] | None:
    if not cache_file.is_file():
        return None
    try:
        with safe_open(cache_file, framework="pt") as file:
            if (file.metadata() or {}).get("key") != key:
                return None
            return {prompt: file.get_tensor(str(n)) for n, prompt in enumerate(prompts)}
    except SafetensorError:
        return None  # written incompletely; encode again


def _write(cache_file: Path, key: str, embeds: Sequence[Tensor]) -> None:
    cache_file.parent.mkdir(parents=True, exist_ok=True)
    temporary = cache_file.with_name(f".{cache_file.name}.partial")
    tensors = {str(number): tensor.contiguous() for number, tensor in enumerate(embeds)}
    save_tensors(tensors, temporary, metadata={"key": key})
    temporary.rename(cache_file)
