"""Checked loading of diffusers and transformers models: no tensor may stay randomly initialised.

`check_weights` reads only configurations and safetensors headers, so that a damaged download is
reported before any work starts; `load_model` also checks the keys that the library reports.
"""

import math
from collections.abc import Collection, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open

from cache_schema.shown_text import first_few
from stages.files.text import read_object

_LFS_PREFIX = b"version https://git-lfs"
_MAX_LFS_POINTER_BYTES = 1024
"""git-lfs pointers are always smaller."""

_MAX_NAMES = 3
"""Names listed in an error message for each kind of mismatch; the rest are only counted."""

_MAX_INTEGER = 1 << 40
_UNBOUNDED_FIELDS = ("model_max_length",)
"""Fields where transformers writes 10^30 for "unlimited"."""
_MAX_LAYERS = 1000
"""CogVideoX-5B has 42 layers, T5-XXL 24; the libraries set no limit of their own."""
_MAX_TIMESTEPS = 100_000
"""1,000 are usual; a scheduler stores several values per timestep."""

_ATTENTION_IMPLEMENTATIONS = (None, "eager", "sdpa")
"""Other implementations make transformers import packages or download kernels from the hub."""

_TIMM = "timm_wrapper"
"""Model type of transformers' wrapper of models of the timm package."""

_PEFT_FILE = "adapter_config.json"
"""If present, transformers loads the base model it names instead of the one in its folder."""


@dataclass(frozen=True, kw_only=True, slots=True)
class StoredTensor:
    """File, name and shape of a stored tensor."""

    file: Path
    name: str
    shape: tuple[int, ...]


def refuse_lfs_pointer(file: Path) -> None:
    """Raise `ValueError` if the file is a git-lfs pointer instead of the actual file."""
    if file.stat().st_size > _MAX_LFS_POINTER_BYTES:
        return
    if file.read_bytes().startswith(_LFS_PREFIX):
        raise ValueError(
            f"{file} is a git-lfs pointer, not the file itself: run git lfs pull in its "
            "repository, or download the model with hf download"
        )


def read_json(file: Path) -> dict[str, Any]:
    """Read a model's configuration file.

    Raises:
        ValueError: It is missing, a git-lfs pointer, or not a JSON object.
    """
    if not file.is_file():
        raise ValueError(f"{file} is missing; download the model again")
    refuse_lfs_pointer(file)
    try:
        return read_object(file)
    except ValueError as error:
        raise ValueError(f"{error}; download the model again") from error


def read_config(file: Path, *, timm_backbones: Collection[str] = ()) -> dict[str, Any]:
    """Read a configuration that a library builds a model, tokenizer or pipeline from.

    Args:
        file: The configuration.
        timm_backbones: Architectures of the timm package that it may name.

    Raises:
        ValueError: As `read_json`; or a field would make the library run or download code, or
            allocate without limit.
    """
    config = read_json(file)
    pending: list[tuple[str, Any]] = [("", config)]
    while pending:
        parent, value = pending.pop()
        items: Iterable[tuple[Any, Any]] = ()
        if isinstance(value, dict):
            items = value.items()
            if value.get("model_type") == _TIMM and value.get("architecture") in timm_backbones:
                items = ((name, item) for name, item in value.items() if name != "model_type")
        elif isinstance(value, list):
            items = ((parent, item) for item in value)
        for name, item in items:
            reason = _field_error(name, item)
            if reason is not None:
                raise ValueError(f"{file}: {name} {reason}; use the model's official files")
            pending.append((name, item))
    return config


def _field_error(name: str, value: Any) -> str | None:
    """The reason why a configuration field is rejected; None if it is accepted."""
    if isinstance(value, int) and name not in _UNBOUNDED_FIELDS:
        bound = _MAX_INTEGER
        if "layers" in name or name == "depths":
            bound = _MAX_LAYERS
        elif name == "num_train_timesteps":
            bound = _MAX_TIMESTEPS
        if abs(value) > bound:
            return f"is {value:.6g}; the limit is {bound:,}"
    if isinstance(value, float) and not math.isfinite(value):
        return f"is {value}, not a finite number"
    if name in ("auto_map", "custom_pipeline", "custom_pipelines") and value:
        return "refers to code in the model's folder, which is not run"
    if name == "quantization_config" and value:
        return "requires a quantization package, which is not supported; use plain weights"
    if name in ("attn_implementation", "_attn_implementation") and (
        isinstance(value, dict) or value not in _ATTENTION_IMPLEMENTATIONS
    ):
        return f"is {value!r}, which may download code; only eager and sdpa are supported"
    if name in ("use_timm_backbone", "use_pretrained_backbone") and value:
        return "requires a backbone from another package or model, which is not loaded"
    if name == "model_type" and str(value).startswith("timm"):
        return f"is {value!r}, a model of another package, which is not imported"
    return None


def stored_tensors(folder: Path, stem: str) -> dict[str, StoredTensor]:
    """List the tensors stored in a model folder, by name; reads only the file headers.

    Args:
        folder: Model folder in the format of diffusers or transformers.
        stem: Weight file name without suffix: `diffusion_pytorch_model` for diffusers, `model` for
            transformers.

    Raises:
        ValueError: A weight file is missing, damaged or a git-lfs pointer.
    """
    stored = {}
    for file in _weight_files(folder, stem):
        refuse_lfs_pointer(file)
        try:
            with safe_open(file, framework="pt") as opened:
                for name in opened.keys():  # noqa: SIM118 (not a mapping)
                    shape = tuple(opened.get_slice(name).get_shape())
                    stored[name] = StoredTensor(file=file, name=name, shape=shape)
        except SafetensorError as error:
            raise ValueError(
                f"{file} is damaged or cut short ({error}); download the model again"
            ) from error
    return stored


def _weight_files(folder: Path, stem: str) -> list[Path]:
    """The weight files of a model: a single file, or those listed in the index."""
    single, index = folder / f"{stem}.safetensors", folder / f"{stem}.safetensors.index.json"
    if single.is_file() and index.is_file():
        raise ValueError(
            f"{folder} holds both {single.name} and {index.name}; delete the one that is stale"
        )
    if single.is_file():
        return [single]
    if not index.is_file():
        raise ValueError(f"{folder} has no {single.name}{_describe_alternatives(folder, stem)}")
    names = indexed_files(index)
    missing = [name for name in names if not (folder / name).is_file()]
    if missing:
        raise ValueError(
            f"{folder} lacks {len(missing)} of the {len(names)} weight files listed in "
            f"{index.name}: {first_few(missing, _MAX_NAMES)}; download the model again"
        )
    return [folder / name for name in names]


def indexed_files(index: Path) -> list[str]:
    """The distinct file names listed in a weight index, sorted.

    Raises:
        ValueError: The index is damaged, or a name points outside its folder.
    """
    shards = read_json(index).get("weight_map")
    if not isinstance(shards, dict) or not shards:
        raise ValueError(f"{index} lists no files; download the model again")
    for name in shards.values():
        if not isinstance(name, str) or not name or Path(name).name != name:
            raise ValueError(f"{index}: weight_map contains {name!r}, which is not a file name")
    return sorted(set(shards.values()))


def _describe_alternatives(folder: Path, stem: str) -> str:
    """What the folder contains instead of the expected weights, and what to do about it."""
    names = sorted(file.name for file in folder.glob("*")) if folder.is_dir() else []
    variants = [n for n in names if n.startswith(f"{stem}.") and ".safetensors" in n]
    if variants:
        return (
            f", only a variant of the weights ({variants[0]}); download the default weights, or "
            "rename the variant's files if its precision is sufficient"
        )
    pickles = [name for name in names if Path(name).suffix in (".bin", ".pt", ".pth", ".ckpt")]
    if pickles:
        return (
            f", only {pickles[0]}: weights are read only from safetensors; download those, or "
            "convert the file with save_pretrained"
        )
    return "; download the model again"


def check_weights(
    model_class: Any,
    folder: Path,
    *,
    stored_as: Any = None,
    timm_backbones: Collection[str] = (),
    **options: Any,
) -> dict[str, StoredTensor]:
    """Check that a folder's weights match its config.json; reads no tensor values.

    Args:
        model_class: A model class of diffusers or transformers.
        folder: Folder with config.json and safetensors.
        stored_as: Class that config.json names, if the model is a part of it; None if it is not.
        timm_backbones: See `read_config`.
        options: For `from_pretrained` of transformers: what changes the model's tensors.

    Returns:
        The stored tensors by name.

    Raises:
        ValueError: A file is missing or damaged, or tensors are missing, unexpected or of a
            different shape; the message names them.
    """
    config = read_config(folder / "config.json", timm_backbones=timm_backbones)
    _check_class(model_class if stored_as is None else stored_as, config, folder)
    if _is_diffusers(model_class):  # no tied weights: each tensor is stored under its own name
        stored = stored_tensors(folder, "diffusion_pytorch_model")
        try:
            with torch.device("meta"):
                empty = model_class.from_config(config)
        except Exception as error:  # the library barely validates configurations
            raise ValueError(
                f"{folder / 'config.json'} does not describe a {model_class.__name__} "
                f"({type(error).__name__}: {error}); download the model again"
            ) from error
        expected = {name: tuple(value.shape) for name, value in empty.state_dict().items()}
        refuse_other_tensors(folder, expected, {name: one.shape for name, one in stored.items()})
        return stored
    stored = stored_tensors(folder, "model")
    # Only transformers knows which names may be missing because they are tied to others.
    _from_pretrained(model_class, folder, **{**options, "device_map": "meta"})
    return stored


def _check_class(model_class: Any, config: Mapping[str, Any], folder: Path) -> None:
    """Raise `ValueError` if the configuration is that of a different model class."""
    name = model_class.__name__
    if _is_diffusers(model_class):
        expected: dict[str, Any] = {"_class_name": name}
    else:
        expected = {"architectures": [name], "model_type": model_class.config_class.model_type}
        if (folder / _PEFT_FILE).exists():
            raise ValueError(
                f"{folder} contains {_PEFT_FILE}, so transformers would load the base model named "
                "there instead; merge the adapter into the weights, or remove the file"
            )
    for field, value in expected.items():
        if config.get(field, value) != value:
            raise ValueError(
                f"{folder / 'config.json'}: {field} is {config[field]!r}, expected {value!r}; "
                "download a model of that class"
            )


def load_model(
    model_class: Any,
    folder: Path,
    *,
    stored_as: Any = None,
    timm_backbones: Collection[str] = (),
    **options: Any,
) -> Any:
    """Call `model_class.from_pretrained(folder, **options)` and require every tensor to be loaded.

    Args:
        model_class, folder, stored_as, timm_backbones: See `check_weights`.
        options: For `from_pretrained`.

    Raises:
        ValueError: As `check_weights`; or the model cannot be loaded.
    """
    check_weights(
        model_class, folder, stored_as=stored_as, timm_backbones=timm_backbones, **options
    )
    return _from_pretrained(model_class, folder, **options)


def _is_diffusers(model_class: Any) -> bool:
    return hasattr(model_class, "load_config")


def _from_pretrained(model_class: Any, folder: Path, **options: Any) -> Any:
    if not _is_diffusers(model_class):
        options["ignore_mismatched_sizes"] = True  # rejected below, with their names
    try:
        with _quiet_libraries():
            model, loading = model_class.from_pretrained(
                folder,
                local_files_only=True,
                use_safetensors=True,
                output_loading_info=True,
                **options,
            )
    except torch.OutOfMemoryError:
        raise
    except Exception as error:  # the library barely validates configurations
        raise ValueError(
            f"the weights in {folder} cannot be loaded: {type(error).__name__}: {error}"
        ) from error
    _raise_if_any(
        folder,
        missing=loading["missing_keys"],
        unknown=loading["unexpected_keys"],
        misshapen=[key if isinstance(key, str) else key[0] for key in loading["mismatched_keys"]],
    )
    return model


@contextmanager
def _quiet_libraries() -> Iterator[None]:
    """Disable progress bars, and the table of mismatched keys that transformers prints."""
    import diffusers
    from transformers.utils import logging

    diffusers.utils.logging.disable_progress_bar()
    logging.disable_progress_bar()
    verbosity = logging.get_verbosity()
    logging.set_verbosity_error()
    try:
        yield
    finally:
        logging.set_verbosity(verbosity)


def refuse_other_tensors(
    folder: Path,
    expected: Mapping[str, tuple[int, ...]],
    found: Mapping[str, tuple[int, ...]],
) -> None:
    """Raise `ValueError` naming the stored tensors that differ from those the model expects."""
    _raise_if_any(
        folder,
        missing=expected.keys() - found.keys(),
        unknown=found.keys() - expected.keys(),
        misshapen=[
            f"{name} is {list(found[name])}, expected {list(expected[name])}"
            for name in sorted(expected.keys() & found.keys())
            if tuple(found[name]) != tuple(expected[name])
        ],
    )


def _raise_if_any(
    folder: Path, *, missing: Iterable[str], unknown: Iterable[str], misshapen: Iterable[str]
) -> None:
    faults = [
        f"{what}: {len(names)} ({first_few(names, _MAX_NAMES)})"
        for what, names in (
            ("missing", sorted(missing)),
            ("unknown", sorted(unknown)),
            ("of another shape", sorted(misshapen)),
        )
        if names
    ]
    if faults:
        raise ValueError(
            f"the weights in {folder} do not match its config.json: tensors "
            f"{', '.join(faults)}; download the model again"
        )
