"""The student of a training run: its Gram flow of a clip, beside the teacher's, at a timestep.

The run's newest checkpoint, its EMA if there is one, is loaded when it is first asked for; base
model and weights are checked as everywhere.
"""

# Legend: B clip (one), T map, P pair of maps, H W token grid, K neighbour.

import threading
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from stages.clips import ClipsConfig
from stages.config import BaseModelConfig
from stages.explore.flow_view import FlowView
from stages.files.text import read_object
from stages.inspect_cache.clip_view import frames_of_moments
from stages.sample_videos.runs import BASE_SETTING
from stages.students.experts import CONFIGURATIONS, trained_configs
from stages.students.hub import resolve_base_model
from stages.students.weights import hash_transformer
from stages.train_student.checkpoints.export import Which, newest_weights
from stages.train_student.config import TrainConfig
from stages.train_student.data.checks import check_stores
from stages.train_student.data.dataset import CachedSamples
from stages.train_student.data.stores import join_buckets
from stages.train_student.model.loading import build_student
from stages.train_student.model.student import Student, eval_mode
from stages.train_student.model.teacher import TeacherLayout
from stages.train_student.objectives.build import build_heads, build_objectives, kinds_needed
from stages.train_student.objectives.lgf import LocalGramFlow
from stages.train_student.parallel.deepspeed import weights_dtype
from stages.train_student.parallel.process_group import World
from stages.train_student.step import TrainingStep


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class StudentView:
    """A student's Gram flow of a clip, and its loss against the teacher."""

    flow: FlowView
    loss: float
    """The Local Gram Flow loss, unweighted; NaN or infinite if the student is."""
    step: int
    """Steps that the student was trained for."""
    weights: Which
    """The EMA of its weights if the run keeps one, as for samples and exports; else the last."""


@dataclass(frozen=True, slots=True)
class _Opened:
    student: Student
    samples: CachedSamples
    training_step: TrainingStep
    lgf: LocalGramFlow
    step: int
    weights: Which
    device: torch.device
    trained: range
    """Timesteps that it was trained at."""


class RunStudent:
    """The student of a run, loaded on the first call of `view`."""

    def __init__(
        self,
        run_dir: Path,
        *,
        config: TrainConfig,
        clips: ClipsConfig,
        model: BaseModelConfig,
        cache: Path | str,
    ) -> None:
        """Remember what to load; reads nothing.

        Args:
            run_dir: Folder of the run.
            config: The run's settings.
            clips: The dataset's settings.
            model: The base model.
            cache: Folder of the stores, or its URL.
        """
        self.run_dir = run_dir
        self.timesteps = config.validation.timesteps or (500,)
        self._config = config
        self._clips = clips
        self._model = model
        self._cache = cache
        self._lock = threading.Lock()
        self._opened: _Opened | None = None

    def view(self, key: str, timestep: int) -> StudentView:
        """The student's Gram flow of a clip, always with the same noise.

        Raises:
            ValueError: The run, its checkpoint or its base model cannot be used.
            CacheError: A store lacks the clip, or is damaged.
        """
        with self._lock:
            if self._opened is None:
                self._opened = self._open()
            return self._compare(self._opened, key, timestep)

    def _open(self) -> _Opened:
        config = self._config
        if "lgf" not in config.objectives:
            raise ValueError(
                f"{self.run_dir} was trained without the Local Gram Flow loss, whose projector "
                "makes the student's tokens comparable"
            )
        device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
        world = World(rank=0, local_rank=0, size=1, device=device)
        configs = trained_configs(self._model)
        part = configs.transformer_part
        resolve_base_model(self._model, (*CONFIGURATIONS, part))
        recorded = read_object(self.run_dir / "run.json", settings=dict)["settings"]
        if recorded.get(BASE_SETTING) != hash_transformer(configs.folder, part):
            raise ValueError(
                f"{self._model.path} is not the base model that {self.run_dir} was trained from; "
                "set model.path to that"
            )
        stores = join_buckets(
            self._cache,
            self._clips.sizes,
            config.stores,
            kinds=kinds_needed(config),
            student=configs,
        )
        for size, joined in zip(self._clips.sizes, stores.stores, strict=True):
            check_stores(joined, configs, size, radius=config.lgf.radius)
        teacher = stores.teacher
        assert teacher is not None, "the Local Gram Flow loss reads a teacher"
        dtype = weights_dtype(config.deepspeed)
        visual = None if stores.visual is None else stores.visual.settings
        heads = build_heads(
            config, configs, teacher.settings, frame_rate=stores.frame_rate, visual=visual
        )
        student = build_student(
            config, configs, dtype, heads=lambda: heads, world=world, zero_init=False
        )
        with newest_weights(self.run_dir) as (weights, step, which):
            state = {name: weights.read(name) for name in weights.shapes}
        _load(student, state, self.run_dir)
        objectives = build_objectives(config)
        (lgf,) = (one for one in objectives if isinstance(one, LocalGramFlow))
        return _Opened(
            student.to(device),
            CachedSamples(stores.stores, configs, seed=config.seed, batch_size=config.batch_size),
            TrainingStep(
                configs,
                objectives,
                layout=TeacherLayout.of(teacher.settings),
                visual_layout=None if visual is None else TeacherLayout.of(visual),
                device=device,
                dtype=dtype,
            ),
            lgf,
            step,
            which,
            device,
            configs.trained_timesteps,
        )

    def _compare(self, opened: _Opened, key: str, timestep: int) -> StudentView:
        if timestep not in opened.trained:
            raise ValueError(
                f"{self.run_dir} was trained at timesteps {opened.trained.start} to "
                f"{opened.trained.stop - 1} alone, not at {timestep}; set "
                "train.validation.timesteps to some of these"
            )
        (batch,) = opened.samples.fixed_batches(key, (timestep,))
        batch = batch.to(opened.device)
        with eval_mode(opened.student, opened.device):
            _, features = opened.student(*opened.training_step.inputs(batch))
            teacher = opened.training_step.teacher(batch)
            tokens_BTHWC = features["lgf"]
            flows = opened.lgf.flows(tokens_BTHWC, teacher)
            (loss,) = opened.lgf(tokens_BTHWC, teacher).tolist()
        assert batch.teacher_valid_BT is not None
        valid_M = batch.teacher_valid_BT[0].cpu().numpy()
        flow = FlowView(
            by_direction={
                direction: student_BPHWK[0].float().cpu()
                for direction, (student_BPHWK, _) in flows.items()
            },
            moments=tuple(frames_of_moments(len(valid_M), batch.num_frames)),
            valid_M=valid_M,
        )
        return StudentView(flow=flow, loss=loss, step=opened.step, weights=opened.weights)


def _load(student: Student, state: Mapping[str, Any], run_dir: Path) -> None:
    """Load trained weights, which must be all that the run trained, and no others."""
    trained = {name for name, weight in student.named_parameters() if weight.requires_grad}
    missing = sorted(trained - state.keys())
    _, unexpected = student.load_state_dict(dict(state), strict=False)
    if wrong := [*missing, *unexpected]:
        raise ValueError(
            f"the newest checkpoint of {run_dir} does not fit the student that its settings "
            f"describe: {len(wrong)} weights differ, such as {wrong[0]}"
        )
