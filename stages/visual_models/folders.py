"""Folders of encoders in transformers' format: found, downloaded, checked and hashed.

A folder holds config.json, weights as safetensors, and a preprocessor's configuration. Nothing in
it is run: models of other families are refused by their `model_type`.
"""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from stages.files.hashes import sha256_of_files
from stages.files.hub import download_command, hub_files
from stages.files.weight_checks import read_config, read_json

PROCESSORS = ("video_preprocessor_config.json", "preprocessor_config.json")
"""Files with the size and the values of input frames; the first that exists is read."""

_WEIGHTS = ("model.safetensors", "model.safetensors.index.json", "model-*.safetensors")

STORED_VALUES = ("size", "crop_size", "resample", "rescale_factor", "image_mean", "image_std")
"""Values of a preprocessor's configuration that are used."""
_STEPS = ("do_resize", "do_center_crop", "do_rescale", "do_normalize")


def find_folder(
    name: str, revision: str | None, *, setting: str, remedy: str, weights: bool = True
) -> Path:
    """Return the folder of a model; a hub id is downloaded.

    Args:
        name: Folder, or hub id.
        revision: Commit, tag or branch on the hub; None for the default branch.
        setting: Name of the setting with the model, for messages.
        remedy: What to set it to, for messages.
        weights: Also download the weights, not only the configurations.

    Raises:
        ValueError: It is no folder and cannot be downloaded; for a gated model, says where to
            accept its terms.
    """
    local = Path(name).expanduser()
    if local.is_dir():
        return local
    return hub_files(
        name,
        ["config.json", *PROCESSORS, *(_WEIGHTS if weights else ())],
        named=f"{setting}={name}",
        remedy=f"{remedy}, or download one first: {download_command(name)}",
        revision=revision,
    )


def has_weights(folder: Path) -> bool:
    """Whether the folder holds any weights, not only configurations."""
    return any(any(folder.glob(pattern)) for pattern in _WEIGHTS)


def model_class(folder: Path, classes: Mapping[str, Sequence[str]], *, remedy: str) -> Any:
    """Return the class of transformers that a folder's weights belong to.

    Args:
        folder: Its config.json is read.
        classes: Names of the accepted classes, by model type.
        remedy: What to set instead, for messages.

    Raises:
        ValueError: It is a model of another family or class, or config.json would run code.
    """
    import transformers

    file = folder / "config.json"
    # Before the checks of `read_config`: a model with code of its own is of another family.
    kind = str(read_json(file).get("model_type"))
    if kind not in classes:
        raise ValueError(
            f"{folder} holds a model of type {kind!r}; supported are {', '.join(classes)}; {remedy}"
        )
    names = read_config(file).get("architectures") or [None]
    if names[0] not in classes[kind]:
        raise ValueError(
            f"{file}: architectures is {names}, expected one of "
            f"{', '.join(classes[kind])}; {remedy}"
        )
    return getattr(transformers, names[0])


def processor_file(folder: Path) -> Path:
    """Return the file with the values of input frames.

    Raises:
        ValueError: There is none.
    """
    for name in PROCESSORS:
        if (folder / name).is_file():
            return folder / name
    raise ValueError(f"{folder} has no {' or '.join(PROCESSORS)}; download the model again")


def processor_values(file: Path, *, remedy: str, steps: Sequence[str] = _STEPS) -> dict[str, Any]:
    """Read those of `STORED_VALUES` that a preprocessor's configuration has.

    Args:
        file: From `processor_file`.
        remedy: What to set instead, for messages.
        steps: Steps that must not be switched off.

    Raises:
        ValueError: The file is damaged, or switches a step off.
    """
    stored = read_config(file)
    if off := [name for name in steps if not stored.get(name, True)]:
        raise ValueError(f"{file}: {off[0]} is false, which is not supported; {remedy}")
    values = {name: stored[name] for name in STORED_VALUES if stored.get(name) is not None}
    if not isinstance(values.get("resample", 2), int):
        raise ValueError(
            f"{file} is not supported (resample is {values['resample']!r}, not one of PIL's "
            f"numbers); {remedy}"
        )
    return values


def hash_of(folder: Path, processor: Path) -> str:
    """SHA-256 of the names and bytes of the files that are loaded."""
    names = {file.name for pattern in _WEIGHTS for file in folder.glob(pattern)}
    return sha256_of_files(folder, {*names, "config.json", processor.name})
