"""Loads models only when every tensor of theirs is there: nothing is left at random values.

`check_weights` reads headers and configurations alone, so that a run, and a dry run, can refuse a
damaged download before any work; `load_model` checks again what the library made of it.
"""

import math
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open

from stages.files.text import read_object

_LFS_MARK = b"version https://git-lfs"
_LFS_SIZE = 1024
"""No pointer is larger."""

_NAMED = 3
"""So many tensors of each kind of fault are named; the others are counted."""

_LARGEST_INTEGER = 1 << 40
_NO_SIZE = ("model_max_length",)
"""Fields in which transformers writes 10^30 for "without bound"."""
_MOST_LAYERS = 1000
"""CogVideoX-5B has 42 layers, T5-XXL 24; a library builds as many as it is told."""
_MOST_TIMESTEPS = 100_000
"""1,000 are usual; a scheduler keeps several numbers of each."""

_ATTENTIONS = (None, "eager", "sdpa")
"""transformers fetches other kinds of attention as kernels from the hub, or imports them."""

_PEFT_FILE = "adapter_config.json"
"""transformers loads the model that it names in place of the one beside it."""


@dataclass(frozen=True, kw_only=True, slots=True)
class StoredTensor:
    """Where a tensor lies, and its shape."""

    file: Path
    name: str
    shape: tuple[int, ...]


def refuse_lfs_pointer(file: Path) -> None:
    """Refuse a file that git left in place of the real one (`ValueError`)."""
    if file.stat().st_size > _LFS_SIZE:
        return
    if file.read_bytes().startswith(_LFS_MARK):
        raise ValueError(
            f"{file} is a git-lfs pointer, not the file itself: run git lfs pull in its "
            "repository, or download the model with hf download"
        )


def read_json(file: Path) -> dict[str, Any]:
    """Read a model's configuration file.

    Raises:
        ValueError: It is missing, a git-lfs pointer, or no JSON object.
    """
    if not file.is_file():
        raise ValueError(f"{file} is missing; download the model again")
    refuse_lfs_pointer(file)
    try:
        return read_object(file)
    except ValueError as error:
        raise ValueError(f"{error}; download the model again") from error


def read_config(file: Path) -> dict[str, Any]:
    """Read a configuration that a library builds a model, tokenizer or pipeline from.

    Raises:
        ValueError: As `read_json`; or a field would make the library run or fetch other code, or
            build without end.
    """
    config = read_json(file)
    places: list[tuple[str, Any]] = [("", config)]
    while places:
        where, value = places.pop()
        items: Iterable[tuple[Any, Any]] = ()
        if isinstance(value, dict):
            items = value.items()
        elif isinstance(value, list):
            items = ((where, item) for item in value)
        for name, item in items:
            fault = _fault_of_field(name, item)
            if fault is not None:
                raise ValueError(f"{file}: {name} {fault}; use the model's official files")
            places.append((name, item))
    return config


def _fault_of_field(name: str, value: Any) -> str | None:
    """Why a field of a configuration is refused, if it is."""
    if isinstance(value, int) and name not in _NO_SIZE:
        bound = _LARGEST_INTEGER
        if "layers" in name or name == "depths":
            bound = _MOST_LAYERS
        elif name == "num_train_timesteps":
            bound = _MOST_TIMESTEPS
        if abs(value) > bound:
            return f"is {value:.6g}, at most {bound:,} is taken"
    if isinstance(value, float) and not math.isfinite(value):
        return f"is {value}, not a finite number"
    if name in ("auto_map", "custom_pipeline", "custom_pipelines") and value:
        return "names code of the model's folder, which is not run"
    if name == "quantization_config" and value:
        return "names a package for quantized weights, which is not imported; use plain weights"
    if name in ("attn_implementation", "_attn_implementation") and (
        isinstance(value, dict) or value not in _ATTENTIONS
    ):
        return f"is {value!r}, which may be code to fetch; only eager and sdpa are used"
    if name in ("use_timm_backbone", "use_pretrained_backbone") and value:
        return "names a backbone of another package or model, which is not loaded"
    if name == "model_type" and str(value).startswith("timm"):
        return f"is {value!r}, a model of another package, which is not imported"
    return None


def stored_tensors(folder: Path, stem: str) -> dict[str, StoredTensor]:
    """Where each tensor in a folder lies, by its name; reads headers alone.

    Args:
        folder: of one model, in the format of diffusers or transformers.
        stem: `diffusion_pytorch_model` for the one, `model` for the other.

    Raises:
        ValueError: The weights are missing, or a file of theirs is missing, damaged or a git-lfs
            pointer.
    """
    stored = {}
    for file in _weight_files(folder, stem):
        refuse_lfs_pointer(file)
        try:
            with safe_open(file, framework="pt") as opened:
                for name in opened.keys():  # noqa: SIM118 (it is no mapping)
                    shape = tuple(opened.get_slice(name).get_shape())
                    stored[name] = StoredTensor(file=file, name=name, shape=shape)
        except SafetensorError as error:
            raise ValueError(
                f"{file} is damaged or cut short ({error}); download the model again"
            ) from error
    return stored


def _weight_files(folder: Path, stem: str) -> list[Path]:
    """The files that hold the weights: one, or as many as the index names."""
    single, index = folder / f"{stem}.safetensors", folder / f"{stem}.safetensors.index.json"
    if single.is_file() and index.is_file():
        raise ValueError(
            f"{folder} holds both {single.name} and {index.name}; delete the one that is stale"
        )
    if single.is_file():
        return [single]
    if not index.is_file():
        raise ValueError(f"{folder} has no {single.name}{_what_is_there(folder, stem)}")
    names = indexed_files(index)
    missing = [name for name in names if not (folder / name).is_file()]
    if missing:
        raise ValueError(
            f"{folder} lacks {len(missing)} of the {len(names)} files of weights that {index.name} "
            f"names: {_some(missing)}; download the model again"
        )
    return [folder / name for name in names]


def indexed_files(index: Path) -> list[str]:
    """The names of the files that an index of weights lists, each once.

    Raises:
        ValueError: It is damaged, or a name leads out of its folder.
    """
    shards = read_json(index).get("weight_map")
    if not isinstance(shards, dict) or not shards:
        raise ValueError(f"{index} names no files; download the model again")
    for name in shards.values():
        if not isinstance(name, str) or not name or Path(name).name != name:
            raise ValueError(f"{index}: weight_map holds {name!r}, which is no file name")
    return sorted(set(shards.values()))


def _what_is_there(folder: Path, stem: str) -> str:
    """What a folder holds in place of its weights, and what to do."""
    names = sorted(file.name for file in folder.glob("*")) if folder.is_dir() else []
    variants = [n for n in names if n.startswith(f"{stem}.") and ".safetensors" in n]
    if variants:
        return (
            f", only a variant of the weights ({variants[0]}); download the weights themselves, or "
            "rename the variant's files if its precision is enough"
        )
    pickles = [name for name in names if Path(name).suffix in (".bin", ".pt", ".pth", ".ckpt")]
    if pickles:
        return (
            f", only {pickles[0]}: weights are read from safetensors alone; download those, or "
            "convert it with save_pretrained"
        )
    return "; download the model again"


def check_weights(model_class: Any, folder: Path) -> dict[str, StoredTensor]:
    """Check that a folder's weights are those of its config.json; reads no values.

    Args:
        model_class: of diffusers or transformers.
        folder: with config.json and safetensors.

    Returns:
        Where each stored tensor lies.

    Raises:
        ValueError: A file is missing or damaged, or tensors are missing, unknown or of another
            shape; the message names them.
    """
    config = read_config(folder / "config.json")
    _refuse_other_class(model_class, config, folder)
    if _is_of_diffusers(model_class):  # every tensor has a name of its own
        stored = stored_tensors(folder, "diffusion_pytorch_model")
        try:
            with torch.device("meta"):
                empty = model_class.from_config(config)
        except Exception as error:  # the library checks little of what a configuration says
            raise ValueError(
                f"{folder / 'config.json'} makes no {model_class.__name__} "
                f"({type(error).__name__}: {error}); download the model again"
            ) from error
        expected = {name: tuple(value.shape) for name, value in empty.state_dict().items()}
        refuse_other_tensors(folder, expected, {name: one.shape for name, one in stored.items()})
        return stored
    stored = stored_tensors(folder, "model")
    # Which names may be left out, because they are tied to others, transformers knows.
    _from_pretrained(model_class, folder, device_map="meta")
    return stored


def _refuse_other_class(model_class: Any, config: Mapping[str, Any], folder: Path) -> None:
    """Refuse a configuration of another class than the one that loads it (`ValueError`)."""
    name = model_class.__name__
    if _is_of_diffusers(model_class):
        expected: dict[str, Any] = {"_class_name": name}
    else:
        expected = {"architectures": [name], "model_type": model_class.config_class.model_type}
        if (folder / _PEFT_FILE).exists():
            raise ValueError(
                f"{folder} holds {_PEFT_FILE}, so that transformers would load the model that it "
                "names; merge the adapter into the weights, or remove it"
            )
    for field, value in expected.items():
        if config.get(field, value) != value:
            raise ValueError(
                f"{folder / 'config.json'}: {field} is {config[field]!r}, and this model is loaded "
                f"as {value!r} alone; download a model of that class"
            )


def load_model(model_class: Any, folder: Path, **options: Any) -> Any:
    """`model_class.from_pretrained(folder, **options)`, with every tensor from its files.

    Raises:
        ValueError: As `check_weights`; or the model cannot be loaded.
    """
    check_weights(model_class, folder)
    return _from_pretrained(model_class, folder, **options)


def _is_of_diffusers(model_class: Any) -> bool:
    return hasattr(model_class, "load_config")


def _from_pretrained(model_class: Any, folder: Path, **options: Any) -> Any:
    if not _is_of_diffusers(model_class):
        options["ignore_mismatched_sizes"] = True  # they are refused below, by their names
    try:
        with _quiet():
            model, loading = model_class.from_pretrained(
                folder,
                local_files_only=True,
                use_safetensors=True,
                output_loading_info=True,
                **options,
            )
    except torch.OutOfMemoryError:
        raise
    except Exception as error:  # the library checks little of what a configuration says
        raise ValueError(
            f"the weights in {folder} cannot be loaded: {type(error).__name__}: {error}"
        ) from error
    _refuse(
        folder,
        missing=loading["missing_keys"],
        unknown=loading["unexpected_keys"],
        misshapen=[key if isinstance(key, str) else key[0] for key in loading["mismatched_keys"]],
    )
    return model


@contextmanager
def _quiet() -> Iterator[None]:
    """Without progress bars, and without the table that transformers prints of what is refused."""
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
    """Refuse stored tensors that are not exactly a model's, naming them (`ValueError`)."""
    _refuse(
        folder,
        missing=expected.keys() - found.keys(),
        unknown=found.keys() - expected.keys(),
        misshapen=[
            f"{name} is {list(found[name])}, expected {list(expected[name])}"
            for name in sorted(expected.keys() & found.keys())
            if tuple(found[name]) != tuple(expected[name])
        ],
    )


def _refuse(
    folder: Path, *, missing: Iterable[str], unknown: Iterable[str], misshapen: Iterable[str]
) -> None:
    faults = [
        f"{what}: {len(names)} ({_some(names)})"
        for what, names in (
            ("missing", sorted(missing)),
            ("unknown", sorted(unknown)),
            ("of another shape", sorted(misshapen)),
        )
        if names
    ]
    if faults:
        raise ValueError(
            f"the weights in {folder} are not those of its config.json: tensors "
            f"{', '.join(faults)}; download the model again"
        )


def _some(names: list[str]) -> str:
    return ", ".join(names[:_NAMED]) + (", …" if len(names) > _NAMED else "")
