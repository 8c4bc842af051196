"""Loads models only when every tensor of theirs is there: nothing is left at random values.

`check_weights` reads headers and configurations alone, so that a run, and a dry run, can refuse a
damaged download before any work; `load_model` checks again what the library made of it.
"""

from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open

from cache_schema.sealed_json import parse_json

_LFS_MARK = b"version https://git-lfs"
_LFS_SIZE = 1024
"""No pointer is larger."""

_NAMED = 3
"""So many tensors of each kind of fault are named; the others are counted."""


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
        content = parse_json(file.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{file} is not JSON ({error}); download the model again") from error
    if not isinstance(content, dict):
        raise ValueError(f"{file} holds no JSON object; download the model again")
    return content


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
    shards = read_json(index).get("weight_map")
    if not isinstance(shards, dict) or not shards:
        raise ValueError(f"{index} names no files; download the model again")
    names = sorted(set(shards.values()))
    missing = [name for name in names if not (folder / name).is_file()]
    if missing:
        raise ValueError(
            f"{folder} lacks {len(missing)} of the {len(names)} files of weights that {index.name} "
            f"names: {_some(missing)}; download the model again"
        )
    return [folder / name for name in names]


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
    config = read_json(folder / "config.json")
    if _is_of_diffusers(model_class):  # every tensor has a name of its own
        stored = stored_tensors(folder, "diffusion_pytorch_model")
        with torch.device("meta"):
            empty = model_class.from_config(config)
        expected = {name: tuple(value.shape) for name, value in empty.state_dict().items()}
        refuse_other_tensors(folder, expected, {name: one.shape for name, one in stored.items()})
        return stored
    stored = stored_tensors(folder, "model")
    # Which names may be left out, because they are tied to others, transformers knows.
    _from_pretrained(model_class, folder, device_map="meta")
    return stored


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
    except (OSError, RuntimeError, ValueError, SafetensorError) as error:
        raise ValueError(f"the weights in {folder} cannot be loaded: {error}") from error
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
