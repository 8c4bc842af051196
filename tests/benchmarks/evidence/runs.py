"""One run of an arm: features, training, videos of the first frames, their scores.

OUT/
    cache/                stores of all teachers
    runs/NAME/            the training run
    evaluations/NAME/     videos, tracks, scores
    rows/NAME.json        the result; a run with a row is not made again
"""

import json
import statistics
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final, Literal

from cache_schema.atomic_io import make_directories, write_atomic
from pipeline.commands import evaluate, extract, train
from pipeline.config.load import RunConfig, load_config
from pipeline.environment import provenance
from stages.progress import SilentProgress
from tests.benchmarks.evidence.arms import Arm
from tests.benchmarks.evidence.limb_features import write_limb_features
from tests.benchmarks.evidence.sizes import Size

Part = Literal["tuning", "test"]
BASE: Final = "base"
"""Name of the rows of the model before training."""
RECONSTRUCTION: Final = "reconstruction"
"""Name of the row of the real test clips, encoded and decoded by the VAE."""
_CONFIG = Path(__file__).with_name("config.yaml")


@dataclass(frozen=True, kw_only=True, slots=True)
class Run:
    """A run to make; picklable, since it is made in a process of its own."""

    arm: Arm | Literal["base", "reconstruction"]
    """An arm, or what is only scored."""
    seed: int = 0
    weight: float | None = None
    part: Part = "test"
    """Clips whose first frames are continued."""
    steps: int = 0
    """Training steps; a run with fewer steps of the same arm and seed goes on from there."""

    @property
    def training(self) -> str:
        """Name of the training run."""
        if isinstance(self.arm, str):
            return self.arm
        weight = "" if self.weight is None else f"-w{self.weight:g}"
        return f"{self.arm.name}{weight}-s{self.seed}"

    @property
    def name(self) -> str:
        """Name of the row."""
        if isinstance(self.arm, str):
            return f"{self.arm}-{self.part}"
        return f"{self.training}-{self.steps}-{self.part}"


def rows_of(out: Path) -> dict[str, dict[str, Any]]:
    """The results that are there, by name."""
    return {
        file.stem: json.loads(file.read_text(encoding="utf-8"))
        for file in sorted((out / "rows").glob("*.json"))
    }


def take_rows(out: Path, results: Path) -> None:
    """Take the results of another machine for the runs that have none here.

    Args:
        out: Folder of the comparison.
        results: results.jsonl of the same size.
    """
    make_directories(out / "rows")
    there = rows_of(out)
    for line in results.read_text(encoding="utf-8").splitlines():
        name = json.loads(line)["name"]
        if name not in there:
            write_atomic(out / "rows" / f"{name}.json", (line + "\n").encode())


def overrides(run: Run, out: Path, size: Size, *, scoring: bool = False) -> list[str]:
    """All settings in which a run differs from config.yaml; the paths are absolute.

    Args:
        run: The run.
        out: Folder of the comparison.
        size: Its lengths.
        scoring: Leave out how the arm is taught: all videos are scored with the same tracker,
            features, window and temperature, whatever the arm was trained with.
    """
    out = out.resolve()
    arm = None if isinstance(run.arm, str) else run.arm
    group = None if arm is None else arm.group
    scratch = group == "scratch"
    full = "-full" if group == "full" else ""
    model = f"scratch-{run.seed}" if scratch else "base"
    taught = None if scoring else arm
    tracker = "tiny" if taught is None else taught.tracker
    settings = [
        f"cache={out / f'cache{full}'}",
        f"outputs={out / 'outputs'}",
        f"data.path={out / 'clips' / f'train{full}'}",
        f"data.height={size.height}",
        f"data.width={size.width}",
        f"model.path={out / 'models' / model}",
        f"extract.teacher.checkpoint={out / 'models' / 'sam2' / f'{tracker}.safetensors'}",
        f"extract.teacher.config={out / 'models' / 'sam2' / 'tiny.yaml'}",
        *([] if taught is None else taught.teacher),
        f"train.run_dir={out / 'runs' / run.training}",
        f"train.seed={run.seed}",
        f"train.steps={max(run.steps, 1)}",
        f"train.checkpoint_every={max(run.steps // 3, 1)}",
        f"train.validation.clips={size.validation_clips}",
        f"train.validation.every={max(run.steps, 1)}",
        f"sample.steps={size.denoising_steps}",
        *([] if taught is None else taught.train),
        *size.overrides,
    ]
    if size.models is not None:
        settings.append(f"extract.teacher.image_size={size.models.image_size}")
    if scratch or full:
        settings.append("train.method=full")
    if taught is not None and taught.weight is not None:
        settings.append(f"{taught.weight}={run.weight}")
    return settings


def perform(run: Run, out: Path, size: Size) -> str:
    """Make a run, or finish a stopped one, and write its row; returns the name.

    Raises:
        ValueError: A setting or a file is wrong.
        CacheError: A store is damaged.
    """
    config = load_config(str(_CONFIG), overrides(run, out, size))
    row: dict[str, Any] = {
        "name": run.name,
        "arm": run.arm if isinstance(run.arm, str) else run.arm.name,
        "part": run.part,
        "seed": run.seed,
        "weight": run.weight,
        "steps": run.steps,
        "made_with": provenance(),
    }
    if not isinstance(run.arm, str):
        stores = write_stores(config)
        if run.arm.limbs:
            stores["teacher"] = str(write_limb_features(Path(stores["teacher"]), size))
        named = [f"train.stores.{kind}={Path(store).name}" for kind, store in stores.items()]
        config = load_config(str(_CONFIG), [*overrides(run, out, size), *named])
        row |= _train(config)
    row |= _score(run, load_config(str(_CONFIG), overrides(run, out, size, scoring=True)), out)
    make_directories(out / "rows")
    write_atomic(out / "rows" / f"{run.name}.json", (json.dumps(row) + "\n").encode())
    return run.name


def write_stores(config: RunConfig) -> dict[str, str]:
    """Stage one; returns the store of each kind. Clips that are there are not computed again."""
    done = extract.run(config, SilentProgress())
    if done.exit_code:
        raise ValueError(f"stage one skipped clips: {done.notes}")
    return {kind: done.data[kind]["store"] for kind in config.extract.kinds}


def _train(config: RunConfig) -> dict[str, Any]:
    train.run(config, SilentProgress())
    losses, steps = (
        [
            json.loads(line)
            for line in (config.train.run_dir / name).read_text(encoding="utf-8").splitlines()
        ]
        for name in ("validation.jsonl", "performance.jsonl")
    )
    return {
        "seconds_per_step": statistics.median(step["seconds"] for step in steps),
        "validation": losses[-1],
    }


def _score(run: Run, config: RunConfig, out: Path) -> dict[str, Any]:
    clips = out / "clips" / run.part
    folder = out / "evaluations" / run.name
    # Real clips are tracked once, with the base model's videos, if these were made here.
    tracks = folder / "tracks"
    make_directories(tracks)
    shared = tracks / f"reference-{run.part}"
    tracked = out / "evaluations" / f"{BASE}-{run.part}" / "tracks" / shared.name
    if run.arm != BASE and tracked.exists() and not shared.exists():
        shared.symlink_to(tracked.resolve())
    if run.arm == RECONSTRUCTION:
        options = evaluate.EvaluateOptions(
            videos=out / "reconstructions", reference=clips, out=folder
        )
    else:
        options = evaluate.EvaluateOptions(
            run=BASE if run.arm == BASE else str(config.train.run_dir),
            prompt_file=out / "first-frames" / run.part / "prompts.jsonl",
            reference=clips,
            out=folder,
        )
    found = evaluate.run(config, SilentProgress(), options).data
    values: dict[str, dict[str, float | None]] = {}
    for line in (folder / "scores.jsonl").read_text(encoding="utf-8").splitlines():
        score = json.loads(line)
        value = score["value"]
        of_video = values.setdefault(f"{score['seed']:04d}", {})
        of_video[score["score"]] = None if value is None else float(f"{value:.6g}")
    distances: Mapping[str, Any] = found["reference"]["distances"]
    return {
        "videos": values,
        "motion_distance": distances["motion (MMD^2)"][0],
        "not_sampled": found["not_sampled"],
    }
