"""A training run of a fixed number of steps that can be resumed, and its progress bar."""

import json
import math
import re
import time
from collections.abc import Iterator
from contextlib import contextmanager
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.progress import (
    MofNCompleteColumn,
    Progress,
    ProgressColumn,
    TaskID,
    TextColumn,
    TimeRemainingColumn,
)
from rich.progress import Task as RichTask
from rich.text import Text
from torch import Tensor, nn

from cache_schema.checksummed_json import parse_json
from stages.progress import Task

_CHECKPOINT = "training.pt"
_CHECKPOINT_EVERY = 100
_FINAL_RATE = 0.02
_LINE_INTERVAL_S = 30.0
_LIBRARIES = ("torch", "numpy", "sam2", "diffusers")


class TrainingRun:
    """Steps of AdamW, with a checkpoint in the run's folder.

    Everything else that a step needs must depend on its number alone; then a resumed run gives the
    same weights as one that was never stopped.

    Args:
        folder: Folder of the checkpoint.
        modules: Modules by name, restored from the checkpoint; weights with gradients are trained.
        steps: Number of steps.
        recipe: Settings of the run; a checkpoint made with others is refused.
        weight_decay: AdamW's.
        betas: AdamW's.

    Raises:
        ValueError: The folder has a checkpoint of another recipe.
    """

    def __init__(
        self,
        folder: Path,
        modules: dict[str, nn.Module],
        *,
        steps: int,
        recipe: dict[str, Any],
        weight_decay: float,
        betas: tuple[float, float],
    ) -> None:
        self.steps = steps
        self.done = 0
        self._modules = modules
        self._recipe = recipe | {"steps": steps}
        self._file = folder / _CHECKPOINT
        self._weights = [
            weight
            for module in modules.values()
            for weight in module.parameters()
            if weight.requires_grad
        ]
        self._optimizer = torch.optim.AdamW(self._weights, betas=betas, weight_decay=weight_decay)
        folder.mkdir(parents=True, exist_ok=True)
        if self._file.exists():
            self._restore()

    def remaining_steps(self) -> Iterator[int]:
        """Yield the number of each step left; a checkpoint is written after every hundredth."""
        while self.done < self.steps:
            yield self.done
            self.done += 1
            if self.done % _CHECKPOINT_EVERY == 0 or self.done == self.steps:
                self._save()

    def update(self, loss: Tensor, *, rate: float) -> None:
        """Make a step down the loss's gradient, whose norm is clipped to 1.

        Raises:
            ValueError: The loss is NaN or infinite.
        """
        if not torch.isfinite(loss):
            raise ValueError(f"the loss is {loss.item()} at step {self.done}")
        self._optimizer.param_groups[0]["lr"] = rate
        self._optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(self._weights, 1.0)
        self._optimizer.step()

    def _save(self) -> None:
        partial = self._file.with_name(f".{_CHECKPOINT}.partial")
        torch.save(
            {
                "recipe": self._recipe,
                "step": self.done,
                "modules": {name: module.state_dict() for name, module in self._modules.items()},
                "optimizer": self._optimizer.state_dict(),
            },
            partial,
        )
        partial.rename(self._file)

    def _restore(self) -> None:
        content = torch.load(self._file, weights_only=True)
        if content["recipe"] != self._recipe:
            raise ValueError(
                f"{self._file} is of a run with {content['recipe']}, not {self._recipe}; "
                "give the same settings to resume it, or another folder"
            )
        for name, module in self._modules.items():
            module.load_state_dict(content["modules"][name])
        self._optimizer.load_state_dict(content["optimizer"])
        self.done = content["step"]


def cosine_schedule(step: int, steps: int, *, warmup_steps: int) -> float:
    """Learning rate relative to the highest: linear warm-up, then cosine decay to 2%."""
    decay = (1 + math.cos(math.pi * step / steps)) / 2
    return min(1.0, (step + 1) / warmup_steps) * (_FINAL_RATE + (1 - _FINAL_RATE) * decay)


def drop_load_paths(folder: Path) -> None:
    """Remove from JSON files the path that diffusers records each part was loaded from."""
    for file in folder.rglob("*.json"):
        content = parse_json(file.read_text(encoding="utf-8"))
        if content.pop("_name_or_path", None) is not None:
            file.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")


def write_record(file: Path, **settings: Any) -> None:
    """Write how weights were made, with the versions of the libraries, as JSON."""
    versions = {name: version(name) for name in _LIBRARIES}
    text = json.dumps(settings | {"versions": versions}, indent=1)
    # Lists of numbers on one line each.
    text = re.sub(r"\[[^][{}]*\]", lambda found: " ".join(found[0].split()), text)
    file.write_text(text + "\n", encoding="utf-8")


class _Bar:
    """A `stages.progress.Task` drawn by rich, or as lines if stderr is not a terminal."""

    def __init__(self, bars: Progress, bar: TaskID) -> None:
        self._bars, self._bar = bars, bar
        self._printed_at = time.monotonic()

    def advance(self, amount: int = 1) -> None:
        self._bars.advance(self._bar, amount)
        now = time.monotonic()
        if not self._bars.console.is_terminal and now - self._printed_at >= _LINE_INTERVAL_S:
            self._printed_at = now
            self._bars.console.print(self._bars.get_renderable(), soft_wrap=True)

    def expect(self, total: int) -> None:
        self._bars.update(self._bar, total=total)

    def note(self, text: str) -> None:
        self._bars.update(self._bar, note=text)


class _Rate(ProgressColumn):
    def render(self, task: RichTask) -> Text:
        return Text(f"{task.speed:.2f} steps/s" if task.speed else "")


@contextmanager
def progress_bar(description: str, total: int, *, completed: int = 0) -> Iterator[Task]:
    """Show steps, rate and time left on stderr."""
    columns = (
        TextColumn("{task.description}"),
        MofNCompleteColumn(),
        _Rate(),
        TimeRemainingColumn(elapsed_when_finished=True),
        TextColumn("{task.fields[note]}", markup=False),
    )
    with Progress(*columns, console=Console(stderr=True)) as bars:
        yield _Bar(bars, bars.add_task(description, total=total, completed=completed, note=""))
