"""The folder of a run: its settings, its lock, and whether it is finished.

<run_dir>/
    config.yaml            the resolved configuration
    run.json               settings that may not change on resume, provenance, processes, stores,
                           excluded and held-out clips
    clips/                 the clips at the start of the run (data/splits.py)
    losses.jsonl           one line per step; further logs are in logging/run_log.py
    tensorboard/, wandb/   as set by train.report_to
    checkpoints/           (checkpoints/__init__.py)
    best.json              step of the best checkpoint, if train.keep_best names a curve, and its
                           value (checkpoints/best.py)
    heads.safetensors      the objectives' projectors, for further training
    export/                the trained weights in diffusers format (checkpoints/export.py)
    finished.json          written last
"""

import io
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from ruamel.yaml import YAML

from cache_schema import LockLost, ShardBusy, SortedText
from cache_schema.atomic_io import FileLock, make_directories, write_atomic
from cache_schema.schema import flatten
from cache_schema.shown_text import redacted
from stages.clips.config import ClipsConfig
from stages.files.text import read_object
from stages.sample_videos.runs import BASE_SETTING, EXPERT_SETTING
from stages.students.student import StudentConfigs
from stages.train_student.checkpoints.records import checkpoints_of
from stages.train_student.config import TrainConfig
from stages.train_student.data.splits import compare_clips, digest, write_clips
from stages.train_student.data.stores import Buckets
from stages.train_student.logging.rows import CONFIG_FILE

FREE_SETTINGS = (
    "run_dir",
    "steps",
    "micro_batch_size",
    "gradient_checkpointing",
    "log_every",
    "loader_workers",
    "loader_start",
    "checkpoint_every",
    "checkpoints_kept",
    "keep_best",
    "max_damaged",
    "max_skipped_steps",
    "report_to",
    "wandb_project",
    "samples",
    "validation",
    "deepspeed.offload_optimizer",
    "deepspeed.offload_parameters",
    "deepspeed.nvme_path",
    "stores",
    "leave_out",
)
"""Settings, including nested ones, that may change when a run is resumed, as may the number of
processes. They change how the work is done and reported, not what is learnt. `stores`, `leave_out`
and `validation.clips` are compared by their effect: the settings of the stores, and the clips to
train on, which may become fewer."""


def fixed_settings(
    config: TrainConfig,
    clips: ClipsConfig,
    configs: StudentConfigs,
    stores: Buckets,
    *,
    base_weights: str,
) -> dict[str, Any]:
    """Settings that determine a run's weights, by dotted name; they may not change on resume.

    Args:
        base_weights: hash of the transformer's weights; their path may change.
    """
    nested = {
        "train": config.model_dump(mode="json"),
        "data": {"sizes": [size.size_name for size in clips.sizes]},
        BASE_SETTING: base_weights,
        **_of_expert(configs),
        "transformer": {k: v for k, v in configs.transformer.items() if not k.startswith("_")},
        "scheduler": {k: v for k, v in configs.scheduler.items() if not k.startswith("_")},
        "stores": {kind: reader.settings.hash for kind, reader in stores.readers.items()},
    }
    # Through JSON, so that the values compare equal to those read from run.json.
    flat = flatten(json.loads(json.dumps(nested)))
    return {name: value for name, value in flat.items() if value != {} and not _is_free(name)}


def _of_expert(configs: StudentConfigs) -> dict[str, Any]:
    """Which of two transformers is trained, and where the other's timesteps begin."""
    if configs.expert is None:
        return {}
    return {EXPERT_SETTING: configs.expert, "model.boundary_ratio": configs.boundary_ratio}


def held_out_clips(run_dir: Path) -> tuple[str, ...]:
    """Keys of the clips that a run did not train on; empty if it holds out none.

    Raises:
        ValueError: The folder is not that of a run, or run.json is damaged.
        OSError: It cannot be read.
    """
    file = run_dir / "run.json"
    if not file.is_file():
        raise ValueError(f"{run_dir} is not the folder of a training run: it has no run.json")
    return tuple(_read_run(file)["held_out"])


def store_of(run_dir: Path, kind: str) -> str | None:
    """Folder of the store of a kind that a run was started with; None if it is not recorded."""
    stores = read_object(run_dir / "run.json").get("stores")
    recorded = stores.get(kind) if isinstance(stores, dict) else None
    return str(recorded["folder"]) if isinstance(recorded, dict) else None


def held_out_before(run_dir: Path, count: int) -> tuple[str, ...] | None:
    """Keys of the clips that the run in this folder holds out, present in the cache or not.

    They are fixed for the whole run, so that no clip is used for both training and validation.
    None if there is no run yet, or if it does not hold out exactly `count` clips.
    """
    file = run_dir / "run.json"
    if not file.is_file():
        return None
    found = _read_run(file)["held_out"]
    return tuple(found) if len(found) == count else None


def open_run(
    run_dir: Path,
    settings: dict[str, Any],
    resolved_config: dict[str, Any],
    about: dict[str, Any],
    *,
    clips: Mapping[str, SortedText],
    held_out: Sequence[str],
    leave_out: Path | None,
) -> str | None:
    """Create the folder, or check that it holds a run with the same settings.

    Credentials in URLs are neither written nor compared.

    Args:
        settings: from `fixed_settings`.
        resolved_config: written as config.yaml.
        about: further metadata for run.json, such as provenance; not compared.
        clips: keys of the training clips, by size.
        held_out: keys of the validation clips.
        leave_out: manifest of excluded clips.

    Returns:
        A warning if the run resumes with fewer clips than it started with.

    Raises:
        ValueError: the folder holds another run, or run.json is damaged.
    """
    settings, resolved_config, about = map(redacted, (settings, resolved_config, about))
    warning = None
    file = run_dir / "run.json"
    if file.is_file():
        known = _read_run(file)
        found = redacted(known["settings"])
        missing = object()
        names = found.keys() | settings.keys()
        differing = sorted(
            name for name in names if found.get(name, missing) != settings.get(name, missing)
        )
        if differing:
            changes = "; ".join(
                f"{name} was {found.get(name)!r}, is {settings.get(name)!r}" for name in differing
            )
            raise ValueError(
                f"{run_dir} holds a run with different settings: {changes}. Choose another "
                "train.run_dir, or restore the settings that the run was started with"
            )
        warning = compare_clips(
            run_dir,
            known["clip_digests"],
            clips,
            held_out_before=known["held_out"],
            held_out=held_out,
            leave_out=leave_out,
        )
    make_directories(run_dir)
    text = io.StringIO()
    YAML().dump(resolved_config, text)
    _write(run_dir / CONFIG_FILE, text.getvalue())
    if not file.is_file():
        write_clips(run_dir, clips)
        digests = {size: digest(keys) for size, keys in clips.items()}
        clip_records = {"clip_digests": digests, "held_out": list(held_out)}
        _write(file, json.dumps({"settings": settings, **about, **clip_records}, indent=1))
    make_directories(checkpoints_of(run_dir))
    return warning


def finished_steps(run_dir: Path) -> int | None:
    """Number of steps of the finished run in this folder; None if it is not finished."""
    file = run_dir / "finished.json"
    if not file.is_file():
        return None
    return int(read_object(file, steps=int)["steps"])


def mark_finished(run_dir: Path, steps: int, export: Path) -> None:
    """Write finished.json, once everything else is written."""
    content = {"steps": steps, "export": export.relative_to(run_dir).as_posix()}
    _write(run_dir / "finished.json", json.dumps(content, indent=1))


class RunLock:
    """Context manager: locks the folder against a second training; released with the process."""

    def __init__(self, run_dir: Path) -> None:
        """Prepare the lock; no file is touched before `__enter__`."""
        self._run_dir = run_dir
        self._file = run_dir / ".lock"
        self._lock = FileLock(self._file, wait=False, what=f"the run {run_dir}")

    def __enter__(self) -> None:
        """Acquire the lock.

        Raises:
            ValueError: another process is training here.
            LockUnsupported: the file system does not support locks.
        """
        make_directories(self._run_dir)
        try:
            self._lock.__enter__()
        except ShardBusy:
            raise ValueError(
                f"another process is training in {self._run_dir}; wait for it, or choose another "
                "train.run_dir"
            ) from None

    def check(self) -> None:
        """Raise `LockLost` if another process may be training here; call before any change."""
        try:
            self._lock.check()
        except LockLost:
            raise LockLost(
                f"training in {self._run_dir} stops here and leaves the folder unchanged: its lock "
                f"{self._file} was deleted or taken over, so another process may be training "
                "there. Stop any other training in that folder, or wait for it; then the same "
                "command resumes from the last checkpoint"
            ) from None

    def __exit__(self, *exception: Any) -> None:
        self._lock.__exit__(*exception)


def _read_run(file: Path) -> dict[str, Any]:
    found = read_object(file, settings=dict, clip_digests=dict, held_out=list)
    if not all(isinstance(key, str) for key in found["held_out"]):
        raise ValueError(f"{file} is damaged: held_out must be a list of clip keys; restore it")
    return found


def _is_free(name: str) -> bool:
    return f"{name}.".startswith(tuple(f"train.{free}." for free in FREE_SETTINGS))


def _write(path: Path, text: str) -> None:
    write_atomic(path, text.encode("utf-8"))
