"""The best checkpoint of a run by one of its curves, which is kept besides the newest.

It follows from what the run has recorded: the held-out losses, the scores of the samples, and the
complete checkpoints. So a resumed run finds it again, whenever the run was interrupted.
"""

import math
from collections.abc import Callable
from itertools import groupby
from operator import attrgetter
from pathlib import Path
from typing import Literal

from stages.progress import Progress
from stages.train_student.checkpoints.best import BestCheckpoint, read_best, write_best
from stages.train_student.checkpoints.records import (
    checkpoint_folder,
    checkpoints_of,
    complete_checkpoints,
    why_incomplete,
)
from stages.train_student.config import TrainConfig
from stages.train_student.logging.rows import ValidationRow, iter_records
from stages.train_student.report.records import VALIDATION_FILE, read_samples
from stages.video_scores.figures import NoFigureError, kind_in_prompt
from stages.video_scores.groups import FRAME_SCORES, NETWORK_SCORES, SCORES

Better = Literal["higher", "lower"]

_LOSSES = "validation/"
_SCORES = "samples/"


def check_keep_best(config: TrainConfig) -> Better | None:
    """Check `train.keep_best`, and return which way is better; None if it is not set.

    Raises:
        ValueError: the curve does not exist, has no better direction, or has values at steps
            without a checkpoint.
    """
    curve = config.keep_best
    if curve is None:
        return None
    losses = [_LOSSES + name for name in ("diffusion", *config.objectives)]
    if curve in losses:
        if not config.validation.clips:
            raise ValueError(
                f"train.keep_best is {curve}, but no clips are held out; set "
                "train.validation.clips, 32 is usual"
            )
        _check_steps(config, "train.validation.every", config.validation.every)
        return "lower"
    better = _direction_of_score(config, losses)
    _check_steps(config, "train.samples.every", config.samples.every)
    return better


def _direction_of_score(config: TrainConfig, losses: list[str]) -> Better:
    curve, computed = config.keep_best, config.samples.scores
    scores = {_SCORES + s.name: (s, group) for group, of in SCORES.items() for s in of}
    directed = [
        name
        for name, (s, group) in scores.items()
        if s.better and group in FRAME_SCORES and s.name not in NETWORK_SCORES
    ]
    choices = f"choose one of {', '.join([*losses, *directed])}"
    if curve not in scores:
        raise ValueError(f"train.keep_best is {curve}, which is no curve of this run; {choices}")
    score, group = scores[curve]
    if score.better is None:
        raise ValueError(
            f"train.keep_best is {curve}, of which neither higher nor lower is better; {choices}"
        )
    if group not in FRAME_SCORES or score.name in NETWORK_SCORES:
        needed = "a network of VBench" if score.name in NETWORK_SCORES else "SAM2"
        raise ValueError(
            f"train.keep_best is {curve}, which needs {needed} and is computed only by "
            f"sam2vx-pipeline evaluate; {choices}"
        )
    if not config.samples.prompts:
        raise ValueError(
            f"train.keep_best is {curve}, but there are no samples; set train.samples.prompts"
        )
    if group not in computed:
        raise ValueError(
            f"train.keep_best is {curve}, which is not computed: add {group} to "
            f"train.samples.scores, now [{', '.join(computed)}]"
        )
    if group == "figures":
        for prompt in config.samples.prompts:
            try:
                kind_in_prompt(prompt)
            except NoFigureError as error:
                raise ValueError(
                    f"train.keep_best is {curve}, which not every sample can have: {error}; "
                    "change train.samples.prompts"
                ) from error
    return score.better


def _check_steps(config: TrainConfig, setting: str, every: int) -> None:
    if every % config.checkpoint_every:
        raise ValueError(
            f"train.keep_best is {config.keep_best}, computed at steps without a checkpoint: "
            f"{setting} is {every}, train.checkpoint_every {config.checkpoint_every}; make the "
            f"first a multiple of the second, such as train.checkpoint_every={every}"
        )


class BestKeeper:
    """Chooses and records the best checkpoint of a run; on rank 0 only."""

    def __init__(
        self,
        config: TrainConfig,
        better: Better,
        *,
        held_out: int,
        check: Callable[[], None],
        progress: Progress,
    ) -> None:
        """Store the arguments.

        Args:
            config: has a valid `keep_best`.
            better: from `check_keep_best`.
            held_out: number of held-out clips.
            check: called before each change; raises if another process may own the run's folder.
        """
        assert config.keep_best is not None
        self._config = config
        self._curve = config.keep_best
        self._better = better
        self._held_out = held_out
        self._check = check
        self._progress = progress

    def start(self, done: int) -> None:
        """Choose among the checkpoints of a run that starts or resumes after `done` steps.

        Logs a warning if the recorded one can no longer be chosen.
        """
        values = self._values()
        try:
            before = read_best(self._config.run_dir)
        except ValueError as error:
            self._progress.log(f"warning: {error}")
            before = None
        found = self._choose(done, values)
        self._write(found)
        if before is None or before == found:
            return
        why = self._why_not(before, done, values)
        if why is not None:
            now = "there is none now" if found is None else f"it is {_describe(found)} now"
            self._progress.log(
                f"warning: the best checkpoint was {_describe(before)}, but {why}; {now}"
            )

    def after_step(self, step: int) -> None:
        """Choose again, if the curve has a value at this step; logs the result."""
        values = self._values()
        if step not in values or step == 0:
            return
        before, found = read_best(self._config.run_dir), self._choose(step, values)
        self._write(found)
        value = values[step]
        if isinstance(value, str):
            self._progress.log(f"step {step} cannot be the best checkpoint: {value}")
        elif found is not None:
            others = {} if before is None else {f"step {before.step}": before.value}
            others |= {f"step {step}": value}
            others.pop(f"step {found.step}", None)
            if found.before_training is not None:
                others["base model"] = found.before_training
            listed = ", ".join(f"{name}: {other:.4g}" for name, other in others.items())
            self._progress.log(
                f"best checkpoint{'' if found.step == step else ' still'}: {_describe(found)}"
                + (f" ({listed})" if listed else "")
            )

    def _values(self) -> dict[int, float | str]:
        """Value of the curve at each step, or why it cannot be compared with others."""
        if self._curve.startswith(_LOSSES):
            return self._losses(self._curve.removeprefix(_LOSSES))
        return self._scores(self._curve.removeprefix(_SCORES))

    def _losses(self, name: str) -> dict[int, float | str]:
        values: dict[int, float | str] = {}
        for row in iter_records(self._config.run_dir / VALIDATION_FILE, ValidationRow):
            value = row.diffusion if name == "diffusion" else row.auxiliary.get(name)
            if row.clips != self._held_out:
                values[row.step] = (
                    f"{self._curve} is of {row.clips} held-out clips, not of {self._held_out}"
                )
            elif row.by_timestep["timestep"] != list(self._config.validation.timesteps):
                values[row.step] = f"{self._curve} is of other train.validation.timesteps"
            else:
                values[row.step] = f"{self._curve} is NaN or infinite" if value is None else value
        return values

    def _scores(self, name: str) -> dict[int, float | str]:
        values: dict[int, float | str] = {}
        asked = self._config.samples.as_recorded()
        for step, group in groupby(read_samples(self._config.run_dir), attrgetter("step")):
            samples = list(group)
            recorded = samples[0].settings | {"prompts": [sample.prompt for sample in samples]}
            known = [v for s in samples if (v := s.scores.get(name)) is not None]
            if any(recorded.get(key) != value for key, value in asked.items()):
                values[step] = "its samples were made with other train.samples"
            elif len(known) < len(samples):
                missing = len(samples) - len(known)
                values[step] = f"{self._curve} is missing for {missing} of {len(samples)} videos"
            else:
                values[step] = math.fsum(known) / len(known)
        return values

    def _choose(self, done: int, values: dict[int, float | str]) -> BestCheckpoint | None:
        """The best of the complete checkpoints up to `done`; the earliest of equal ones."""
        complete = {found.step for found in complete_checkpoints(self._root)}
        known = {step: value for step, value in values.items() if isinstance(value, float)}
        candidates = [step for step in sorted(known) if step in complete and 0 < step <= done]
        if not candidates:
            return None
        choose = max if self._better == "higher" else min
        step = choose(candidates, key=known.__getitem__)
        return BestCheckpoint(
            step=step, curve=self._curve, value=known[step], before_training=known.get(0)
        )

    def _why_not(
        self, before: BestCheckpoint, done: int, values: dict[int, float | str]
    ) -> str | None:
        """Why the recorded checkpoint cannot be chosen; None if it only is not the best now."""
        if before.curve != self._curve:
            return f"train.keep_best is {self._curve} now"
        if before.step > done:
            return f"the run resumes after step {done}"
        folder = checkpoint_folder(self._root, before.step)
        if not folder.exists():
            return f"{folder} is gone"
        if (why := why_incomplete(folder)) is not None:
            return f"{folder} cannot be used: {why}"
        value = values.get(before.step, "its value is no longer recorded")
        return value if isinstance(value, str) else None

    def _write(self, best: BestCheckpoint | None) -> None:
        self._check()
        write_best(self._config.run_dir, best)

    @property
    def _root(self) -> Path:
        return checkpoints_of(self._config.run_dir)


def _describe(best: BestCheckpoint) -> str:
    return f"step {best.step}, {best.curve} {best.value:.4g}"
