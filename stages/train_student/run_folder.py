"""The folder of a run: its settings, its lock, and whether it is finished.

    <run_dir>/
        config.yaml            the resolved configuration
        run.json               what may not change between resumes, provenance, processes, stores,
                               clips left out, clips held out
        clips/                 the clips that it began with (data/clip_lists.py)
        losses.jsonl           one line per step; and further files of lines (logging/run_log.py)
        tensorboard/, wandb/   as train.report_to says
        checkpoints/           (checkpoints)
        heads.safetensors      the objectives' projectors, kept for more training
        export/                the trained weights in diffusers' format (checkpoints/export.py)
        finished.json          written last

The training loop uses it; sampling looks for finished.json and export/.
"""

import io
import json
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any

from ruamel.yaml import YAML

from cache_schema import LockLost, ShardBusy, SortedText
from cache_schema.atomic_io import FileLock, make_directories, write_whole
from cache_schema.shown_text import redacted
from stages.clips.config import ClipsConfig
from stages.cogvideox.configs import BaseFacts
from stages.files.text import read_object
from stages.sample_videos.runs import BASE_SETTING
from stages.train_student.config import TrainConfig
from stages.train_student.data.buckets import Buckets
from stages.train_student.data.clip_lists import compare_clips, digest, write_clips
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
"""Settings of a run, with all below them, that a resume may change, as may the number of processes.
They say how the work is done and what is shown of it, not what is learnt: `stores`, `leave_out` and
`validation.clips` are compared by what comes of them, what the stores hold and which clips are
left to train on, which may become fewer."""


def fixed_settings(
    config: TrainConfig,
    clips: ClipsConfig,
    facts: BaseFacts,
    stores: Buckets,
    *,
    base_weights: str,
) -> dict[str, Any]:
    """What decides a run's weights, by dotted name; two runs with equal ones are the same run.

    Args:
        base_weights: hash of the transformer's weights; where they lie may change.
    """
    nested = {
        "train": config.model_dump(mode="json"),
        "data": {"sizes": [size.size_name for size in clips.sizes]},
        BASE_SETTING: base_weights,
        "transformer": {k: v for k, v in facts.transformer.items() if not k.startswith("_")},
        "scheduler": {k: v for k, v in facts.scheduler.items() if not k.startswith("_")},
        "stores": {kind: reader.settings.hash for kind, reader in stores.readers.items()},
    }
    # Through JSON, so that what was just computed equals what a run read back.
    flat = _flat(json.loads(json.dumps(nested)), "")
    return {name: value for name, value in flat if not _is_free(name)}


def held_out_before(run_dir: Path, count: int) -> tuple[str, ...] | None:
    """The clips that the run in this folder holds out, present or not.

    They stay the same for the whole of a run: a clip that was trained on is not validated with.
    None where there is no run yet, or one that holds out another number than `count`.
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
    """Make the folder, or check that it holds a run of the same settings.

    Credentials in URLs are neither written nor compared.

    Args:
        settings: `fixed_settings`.
        resolved_config: written as config.yaml.
        about: further facts for run.json, such as provenance; not compared.
        clips: keys of the clips to train on, by size.
        held_out: keys of the clips for validation.
        leave_out: manifest of clips that are left out.

    Returns:
        What to tell of a run that goes on with fewer clips than it began with.

    Raises:
        ValueError: the folder holds another run, or something else.
    """
    settings, resolved_config, about = map(redacted, (settings, resolved_config, about))
    told = None
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
                f"{run_dir} holds a run with other settings: {changes}. Choose another "
                "train.run_dir, or the settings it was started with"
            )
        told = compare_clips(
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
        of_clips = {"clip_digests": digests, "held_out": list(held_out)}
        _write(file, json.dumps({"settings": settings, **about, **of_clips}, indent=1))
    make_directories(run_dir / "checkpoints")
    return told


def finished_steps(run_dir: Path) -> int | None:
    """How many steps the finished run in this folder made; None while it is not finished."""
    file = run_dir / "finished.json"
    if not file.is_file():
        return None
    return int(read_object(file, steps=int)["steps"])


def mark_finished(run_dir: Path, steps: int, export: Path) -> None:
    """Say that everything is written."""
    content = {"steps": steps, "export": export.relative_to(run_dir).as_posix()}
    _write(run_dir / "finished.json", json.dumps(content, indent=1))


class RunLock:
    """Context manager: holds the folder against a second training; it dies with the process."""

    def __init__(self, run_dir: Path) -> None:
        """Touches no file before `__enter__`."""
        self._run_dir = run_dir
        self._file = run_dir / ".lock"
        self._lock = FileLock(self._file, wait=False, what=f"the run {run_dir}")

    def __enter__(self) -> None:
        """Take the folder.

        Raises:
            ValueError: another process trains here.
            LockUnsupported: the file system keeps no locks.
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
        """Raise `LockLost` if another process may be training here; before anything is changed."""
        try:
            self._lock.check()
        except LockLost:
            raise LockLost(
                f"training in {self._run_dir} stops here, and what lies there is left as it is: "
                f"its lock {self._file} was deleted or taken over, so another process may be "
                "training there. End every other training in that folder, or wait for it; then "
                "the same command resumes from the last checkpoint"
            ) from None

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self._lock.__exit__(kind, error, traceback)


def _read_run(file: Path) -> dict[str, Any]:
    found = read_object(file, settings=dict, clip_digests=dict, held_out=list)
    if not all(isinstance(key, str) for key in found["held_out"]):
        raise ValueError(f"{file} is damaged: held_out holds what is no key; restore it")
    return found


def _is_free(name: str) -> bool:
    return f"{name}.".startswith(tuple(f"train.{free}." for free in FREE_SETTINGS))


def _flat(value: Any, name: str) -> Iterator[tuple[str, Any]]:
    if isinstance(value, dict):
        for key, item in value.items():
            yield from _flat(item, f"{name}.{key}" if name else key)
    else:
        yield name, value


def _write(path: Path, text: str) -> None:
    write_whole(path, text.encode("utf-8"), temporary=path.with_name(f".{path.name}.partial"))
