"""Finding a base model: a local folder, or components of a hub id."""

from collections.abc import Sequence
from pathlib import Path

from stages.config import BaseModelConfig
from stages.files.hub import download_command, hub_files
from stages.students.registry import STUDENTS

ALWAYS_PRESENT = "model_index.json"
"""The file by which a diffusers pipeline folder is recognised."""


def resolve_base_model(
    config: BaseModelConfig, subfolders: Sequence[str], *, download: bool = True
) -> Path:
    """Return the pipeline's folder; for a hub id, download only the requested components.

    Args:
        config: The base model: a folder (used as is) or a hub id.
        subfolders: Required components, such as `vae` or `text_encoder`, or single files, such as
            `transformer/config.json`.
        download: Download files that are missing from the local hub cache.

    Returns:
        A folder with `model_index.json` and every requested component.

    Raises:
        ValueError: A component is missing, or the hub id cannot be downloaded.
    """
    if config.is_local:
        folder = Path(config.path).expanduser()
    else:
        folder = _download(config, subfolders, local_files_only=not download)
    missing = [part for part in (ALWAYS_PRESENT, *subfolders) if not (folder / part).exists()]
    if missing:
        families = " or ".join(student.FAMILY for student in STUDENTS)
        examples = " or ".join(student.HUB_EXAMPLE for student in STUDENTS)
        # Without a network, the hub's client returns what it has, however little.
        where = "" if config.is_local else f" in {folder}; is the download complete?"
        raise ValueError(
            f"the base model {config.path} has no {', '.join(missing)}{where}; model.path must be "
            f"a diffusers pipeline folder of {families} (model_index.json, tokenizer/, "
            f"text_encoder/, vae/, transformer/, scheduler/) or its hub id, such as {examples}"
        )
    return folder


def _download(
    config: BaseModelConfig, subfolders: Sequence[str], *, local_files_only: bool
) -> Path:
    patterns = [ALWAYS_PRESENT]
    for part in subfolders:
        patterns += [part, f"{part}/*"]
    return hub_files(
        config.path,
        patterns,
        named=f"the base model {config.path!r}",
        remedy="set model.path to a diffusers pipeline folder, or download one first: "
        + download_command(config.path),
        revision=config.revision,
        local_files_only=local_files_only,
    )
