"""Exported weights of a training run: finding, checking, and loading them into a pipeline.

Loaders in diffusers ignore unknown names, so everything is checked here: trained weights must never
be ignored silently.
"""

import json
import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from safetensors import SafetensorError, safe_open

from cache_schema.checksummed_json import parse_json
from stages.clips.fingerprints import hash_parts
from stages.config import BaseModelConfig
from stages.files.checksums import checksums_from_json, describe_damage
from stages.files.text import read_object
from stages.files.weight_checks import load_model, read_config
from stages.files.yaml import read_yaml
from stages.students.hub import resolve_base_model
from stages.students.weights import hash_transformer, model_class_of

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

_ADAPTER = "run"
"""Name of the adapters in the pipeline."""

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


def newest_finished_run(runs_root: Path, model: BaseModelConfig) -> Path | None:
    """Return the run under `runs_root` that finished last, or None if there is none.

    Only runs trained from `model` count. Transformers are compared by their hash, or by path if the
    transformer is not on this machine.
    """
    finished = sorted(
        runs_root.glob("*/finished.json"), key=lambda file: (file.stat().st_mtime_ns, file)
    )
    try:
        base = hash_transformer(resolve_base_model(model, ("transformer",), download=False))
    except ValueError:
        base = None
    for file in reversed(finished):
        run_dir = file.parent
        same = _base_path(run_dir) == model.path if base is None else _base_hash(run_dir) == base
        if same:
            return run_dir
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
    """Whether a folder is that of a training run, or of an export."""
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
    _refuse_damage(folder)
    if transformer.is_dir():
        return Export(method="full", folder=folder, lora_shapes={})
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
    return Export(method="lora", folder=folder, lora_shapes=_shapes(lora))


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


def _refuse_damage(folder: Path) -> None:
    """Verify the checksums of an export's files; a folder from elsewhere has none."""
    record = folder / ABOUT
    if not record.is_file():
        return
    try:
        files = checksums_from_json(read_object(record, files=dict)["files"])
    except ValueError as error:
        raise ValueError(
            f"{record} has no checksums of the export's files ({error}); export the run again"
        ) from error
    for name, recorded in files.items():
        damage = describe_damage(folder / name, recorded)
        if damage is not None:
            raise ValueError(f"the export in {folder} is damaged: {damage}; export the run again")


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


def load_full_transformer(export: Export, base: Path, dtype: torch.dtype) -> Any:
    """Load a fully tuned transformer for the base pipeline in folder `base`.

    Raises:
        ValueError: Its architecture differs from the base's, or it is incomplete.
    """
    folder = export.folder / "transformer"
    _check_architecture(folder, base)
    try:
        return load_model(model_class_of("transformer", base), folder, dtype=dtype)
    except ValueError as error:
        raise ValueError(
            f"{folder} is not a complete transformer; export the run again: {error}"
        ) from error


def _check_architecture(folder: Path, base: Path) -> None:
    trained = read_config(folder / "config.json")
    expected = read_config(base / "transformer" / "config.json")
    differing = [
        f"{name} {trained[name]!r} instead of {expected[name]!r}"
        for name in sorted(trained.keys() & expected.keys())
        if not name.startswith("_") and trained[name] != expected[name]
    ]
    if differing:
        raise ValueError(
            f"{folder} was not trained from the base model {base}: {', '.join(differing)}; name "
            "the model it was trained from as model.path, or another run with --run"
        )


def add_lora(pipeline: Any, export: Export, *, scale: float = 1.0) -> None:
    """Load a run's adapters into a pipeline and check that all of them were loaded.

    Args:
        pipeline: A diffusers pipeline of the base model.
        export: The adapters.
        scale: Factor on their effect.

    Raises:
        ValueError: The adapters do not fit the transformer, or diffusers did not load all of them.
    """
    _check_adapters(pipeline.transformer, export)
    try:
        pipeline.load_lora_weights(
            export.folder,
            weight_name=LORA_FILE,
            adapter_name=_ADAPTER,
            use_safetensors=True,
            local_files_only=True,
        )
    except torch.OutOfMemoryError:
        raise
    except (TypeError, ValueError, KeyError, AttributeError, RuntimeError) as error:
        raise ValueError(
            f"diffusers and peft cannot load {export.folder / LORA_FILE} ({error}): its weights do "
            "not fit the settings in its metadata; export the run again"
        ) from error
    adapted = {_module_of(weight.removeprefix("transformer.")) for weight in export.lora_shapes}
    loaded = {
        name: weight
        for name, weight in pipeline.transformer.named_parameters()
        if f".{_ADAPTER}." in name
    }
    # diffusers gives the image's keys and values of a Wan adapters of zeros if the file has none.
    num_loaded = sum(_module_of(name) in adapted for name in loaded)
    added = [weight for name, weight in loaded.items() if _module_of(name) not in adapted]
    if num_loaded != len(export.lora_shapes) or any(weight.any() for weight in added):
        raise ValueError(
            f"{num_loaded} of {len(export.lora_shapes)} adapter weights in {export.folder} were "
            "loaded into the transformer; the run was not trained from this base model"
        )
    if scale != 1.0:
        pipeline.set_adapters([_ADAPTER], [scale])


def _module_of(weight: str) -> str:
    """The adapted module's name."""
    return weight.rpartition(".lora_")[0]


def _check_adapters(transformer: torch.nn.Module, export: Export) -> None:
    sizes = {
        name: (module.in_features, module.out_features)
        for name, module in transformer.named_modules()
        if isinstance(module, torch.nn.Linear)
    }
    for weight, shape in export.lora_shapes.items():
        module, _, side = weight.removeprefix("transformer.").rpartition(".lora_")
        found = sizes.get(module)
        if found is None:
            raise ValueError(
                f"{export.folder} adapts {module or weight}, which the base model does not have; "
                "name the model it was trained from as model.path, or another run with --run"
            )
        width = shape[1] if side.startswith("A") else shape[0]
        expected = found[0] if side.startswith("A") else found[1]
        if width != expected:
            raise ValueError(
                f"{export.folder}: {weight} has width {width}, the base model's {module} has "
                f"{expected}; name the model it was trained from as model.path, or another run "
                "with --run"
            )
