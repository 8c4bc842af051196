"""Exported weights of a training run: finding and checking them.

A model with two transformers (Wan 2.2 A14B) has a run for each. A folder that holds them, named
high-noise and low-noise, stands for both wherever a run is named.
"""

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, get_args

import torch
from safetensors import SafetensorError, safe_open

from cache_schema.checksummed_json import parse_json
from stages.clips.fingerprints import hash_parts
from stages.config import BaseModelConfig, Expert
from stages.files.checksums import checksums_from_json, describe_damage
from stages.files.text import read_object
from stages.files.yaml import read_yaml
from stages.students.hub import resolve_base_model
from stages.students.registry import has_two_transformers
from stages.students.student import transformer_part
from stages.students.weights import Part, hash_transformer

LoraFormat = Literal["diffusers", "comfyui", "kohya"]
"""Key formats of exported adapters; this project reads only diffusers."""

LORA_FILES: Mapping[LoraFormat, str] = {
    "diffusers": "pytorch_lora_weights.safetensors",
    "comfyui": "comfyui_lora.safetensors",
    "kohya": "kohya_lora.safetensors",
}
LORA_FILE = LORA_FILES["diffusers"]
ABOUT = "export.json"
"""Record of an export: its step, and the checksums of its files."""
_METADATA_KEY = "lora_adapter_metadata"
"""Safetensors metadata key of diffusers for alpha and rank, whose names start with `_PREFIX`."""
_PREFIX = "transformer."

BASE_SETTING = "model.weights"
"""Name in run.json's settings of the base transformer's hash."""

EXPERT_SETTING = "model.expert"
"""Name in run.json's settings of the expert of a model with two transformers; else absent."""

TRANSFORMER_CLASS = "transformer_class"
"""Name in run.json of the transformer's class; runs without it trained CogVideoX."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Export:
    """Exported weights of a run."""

    method: Literal["lora", "full"]
    folder: Path
    """Contains pytorch_lora_weights.safetensors, or transformer/."""
    lora_shapes: dict[str, tuple[int, ...]]
    """Adapter weight name in the file -> shape; empty for full tuning."""
    expert: Expert | None
    """Which of two transformers was trained; None if the base model has one, or unknown."""


def newest_finished_run(runs_root: Path, model: BaseModelConfig) -> Path | None:
    """Return the run under `runs_root` that finished last, or None if there is none.

    Only runs trained from `model` count. Transformers are compared by their hash, or by path if the
    transformer is not on this machine. If the run is one of two experts that are finished, the
    folder of both is returned.
    """
    finished = sorted(
        runs_root.glob("*/finished.json"), key=lambda file: (file.stat().st_mtime_ns, file)
    )
    bases = _base_hashes(model)
    for file in reversed(finished):
        run_dir = file.parent
        same = _base_path(run_dir) == model.path if bases is None else _base_hash(run_dir) in bases
        if same:
            both = [runs_root / name for name in get_args(Expert)]
            if run_dir in both and all((one / "finished.json").is_file() for one in both):
                return runs_root
            return run_dir
    return None


def _base_hashes(model: BaseModelConfig) -> set[str] | None:
    """Hashes of a base model's transformers; None if they are not on this machine."""
    try:
        base = resolve_base_model(model, ("transformer",), download=False)
        parts: list[Part] = ["transformer"]
        if has_two_transformers(base):
            parts.append("transformer_2")
            base = resolve_base_model(model, parts, download=False)
        return {hash_transformer(base, part) for part in parts}
    except ValueError:
        return None


def _base_path(run_dir: Path) -> str | None:
    try:
        settings = read_yaml(run_dir / "config.yaml")
        return str(settings["model"]["path"])
    except (OSError, ValueError, KeyError, TypeError):
        return None  # not a run, or unreadable: --run can still name it


def _base_hash(run_dir: Path) -> str | None:
    try:
        record = read_object(run_dir / "run.json")
        return str(record["settings"][BASE_SETTING])
    except (OSError, ValueError, KeyError, TypeError):
        return None


def is_run(folder: Path) -> bool:
    """Whether a folder is that of a training run or of an export, or holds those of two experts."""
    return any(_is_single_run(one) for one in runs_in(folder))


def runs_in(folder: Path) -> list[Path]:
    """The folder itself, or the runs or exports of the experts of one model that it holds."""
    experts = [folder / name for name in get_args(Expert)]
    found = [one for one in experts if _is_single_run(one)]
    return [folder] if _is_single_run(folder) or not found else found


def _is_single_run(folder: Path) -> bool:
    return (folder / "run.json").is_file() or _is_export(folder)


def find_export(run_dir: Path) -> Export:
    """Find the exported weights of a run and verify their checksums.

    Args:
        run_dir: A run's folder, or one that `sam2vx-pipeline export` wrote.

    Raises:
        ValueError: No such run, a run without export, or a damaged one.
    """
    if not run_dir.is_dir():
        raise ValueError(f"there is no run at {run_dir}; train one, or name another with --run")
    folder = run_dir if _is_export(run_dir) else run_dir / "export"
    lora, transformer = folder / LORA_FILE, folder / "transformer"
    if lora.is_file() and transformer.is_dir():
        raise ValueError(f"{folder} holds both adapters and a transformer; delete the stale one")
    expert = _read_about(folder)
    if transformer.is_dir():
        return Export(method="full", folder=folder, lora_shapes={}, expert=expert)
    for form, name in LORA_FILES.items():
        if form != "diffusers" and (run_dir / name).is_file():
            raise ValueError(
                f"{run_dir} holds adapters in the {form} format, which cannot be read here; export "
                "them for diffusers: sam2vx-pipeline export without --format"
            )
    if not lora.is_file():
        raise ValueError(
            f"the run {run_dir} has no export/ yet; finish it with sam2vx-pipeline train, or "
            f"export its newest checkpoint: sam2vx-pipeline export --run {run_dir}"
        )
    return Export(method="lora", folder=folder, lora_shapes=_shapes(lora), expert=expert)


def by_transformer(exports: Sequence[Export], base: Path) -> dict[Part, Export]:
    """Exported weights by the folder, in the base pipeline, of the transformer that they are of.

    Raises:
        ValueError: They are of the same transformer, or it is not known which one they are of.
    """
    two = has_two_transformers(base)
    found: dict[Part, Export] = {}
    for export in exports:
        if two and export.expert is None:
            raise ValueError(
                f"{export.folder / ABOUT} does not say which of the two transformers of {base} was "
                "trained; name the model it was trained from as model.path, or a folder that "
                "sam2vx-pipeline export wrote"
            )
        if export.expert is not None and not two:
            raise ValueError(
                f"{export.folder} holds the {export.expert} transformer of a model with two, but "
                f"{base} has one; name the model it was trained from as model.path, or another run "
                "with --run"
            )
        part = transformer_part(export.expert)
        if part in found:
            raise ValueError(
                f"{found[part].folder} and {export.folder} both hold the {export.expert} "
                f"transformer of {base}; name one of them with --run"
            )
        found[part] = export
    return found


def export_hash(export: Export) -> str:
    """16-digit hash of the exported weights: of the adapters, or as `hash_transformer`.

    Adapters are hashed with their metadata, whose order in a file is random.
    """
    if export.method == "full":
        return hash_transformer(export.folder)
    with safe_open(export.folder / LORA_FILE, framework="pt") as weights:
        parts: list[str | bytes] = [json.dumps(weights.metadata(), sort_keys=True)]
        for name in sorted(weights.keys()):
            tensor = weights.get_tensor(name)
            values = tensor.contiguous().reshape(-1).view(torch.uint8).numpy().tobytes()
            parts += [name, str(tensor.dtype), str(tuple(tensor.shape)), values]
    return hash_parts(parts)


def _is_export(folder: Path) -> bool:
    return (folder / LORA_FILE).is_file() or (folder / "transformer").is_dir()


def _read_about(folder: Path) -> Expert | None:
    """Verify the checksums of an export's files, and return the expert that was trained.

    A folder from elsewhere has neither.
    """
    record = folder / ABOUT
    if not record.is_file():
        return None
    try:
        about = read_object(record, files=dict)
        files = checksums_from_json(about["files"])
    except ValueError as error:
        raise ValueError(
            f"{record} has no checksums of the export's files ({error}); export the run again"
        ) from error
    for name, recorded in files.items():
        damage = describe_damage(folder / name, recorded)
        if damage is not None:
            raise ValueError(f"the export in {folder} is damaged: {damage}; export the run again")
    expert: Any = about.get("expert")
    if expert is not None and expert not in get_args(Expert):
        raise ValueError(
            f"{record}: expert is {expert!r}, not one of {', '.join(get_args(Expert))}; export the "
            "run again"
        )
    checked: Expert | None = expert
    return checked


def _shapes(file: Path) -> dict[str, tuple[int, ...]]:
    try:
        with safe_open(file, framework="pt") as weights:
            metadata = weights.metadata() or {}
            shapes = {name: tuple(weights.get_slice(name).get_shape()) for name in weights.keys()}  # noqa: SIM118
    except SafetensorError as error:
        raise ValueError(f"{file} is damaged ({error}); export the run again") from error
    if not shapes:
        raise ValueError(f"{file} holds no adapter weights; export the run again")
    _check_strength(file, metadata.get(_METADATA_KEY))
    return shapes


def _check_strength(file: Path, stored: str | None) -> None:
    """Check that the metadata have the adapters' alpha and rank (`ValueError`).

    Args:
        stored: adapter settings as diffusers and peft write them, in JSON.
    """
    try:
        metadata = parse_json(stored or "{}")
    except ValueError as error:
        raise ValueError(
            f"{file}: {_METADATA_KEY} in its metadata is not JSON ({error}); export the run again"
        ) from error
    if not isinstance(metadata, dict):
        raise ValueError(
            f"{file}: {_METADATA_KEY} in its metadata must be an object of settings, got a "
            f"{type(metadata).__name__}; export the run again"
        )
    if _PREFIX + "lora_alpha" not in metadata:
        raise ValueError(
            f"{file} has no alpha ({_METADATA_KEY} in its metadata), so the scale of the adapters "
            "is unknown; export the run again"
        )
    if metadata.get(_PREFIX + "megatron_config"):
        raise ValueError(
            f"{file}: {_PREFIX}megatron_config in {_METADATA_KEY} of its metadata would make peft "
            "import the package that megatron_core names; export the run again"
        )
    for name in ("lora_alpha", "r"):
        value: Any = metadata.get(_PREFIX + name)
        if type(value) not in (int, float) or not 0 < value < math.inf:
            raise ValueError(
                f"{file}: {_PREFIX}{name} in {_METADATA_KEY} of its metadata must be a positive "
                f"number, got {value!r}; export the run again"
            )
