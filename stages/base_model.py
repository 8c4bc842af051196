"""Finds the base pipeline's folder, on this machine or from the hub; every stage that loads a part
of CogVideoX asks here.
"""

from collections.abc import Sequence
from pathlib import Path

from stages.config import BaseModelConfig

ALWAYS_PRESENT = "model_index.json"
"""The file by which a diffusers pipeline folder is recognised."""


def resolve_base_model(
    config: BaseModelConfig, subfolders: Sequence[str], *, download: bool = True
) -> Path:
    """Return the folder of the pipeline, downloading only what is asked for when it is a hub id.

    Args:
        config: The base model: a folder (used as it is) or a hub id.
        subfolders: Parts that must be there, such as `vae` or `text_encoder`; a file such as
            `transformer/config.json` is a part too.
        download: Fetch what the hub's cache on this machine lacks.

    Returns:
        A folder that holds `model_index.json` and every part.

    Raises:
        ValueError: The folder lacks a part, or the hub id cannot be downloaded.
    """
    if config.is_local:
        folder = Path(config.path).expanduser()
    else:
        folder = _download(config, subfolders, local_files_only=not download)
    missing = [part for part in (ALWAYS_PRESENT, *subfolders) if not (folder / part).exists()]
    if missing:
        raise ValueError(
            f"the base model {config.path} has no {', '.join(missing)}; model.path must be a "
            "diffusers pipeline folder of CogVideoX (model_index.json, tokenizer/, text_encoder/, "
            "vae/, transformer/, scheduler/) or its hub id, such as zai-org/CogVideoX-5b"
        )
    return folder


def _download(
    config: BaseModelConfig, subfolders: Sequence[str], *, local_files_only: bool
) -> Path:
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError

    patterns = [ALWAYS_PRESENT]
    for part in subfolders:
        patterns += [part, f"{part}/*"]
    try:
        return Path(
            snapshot_download(
                config.path,
                revision=config.revision,
                allow_patterns=patterns,
                local_files_only=local_files_only,
            )
        )
    except (HfHubHTTPError, HFValidationError, LocalEntryNotFoundError, OSError) as error:
        raise ValueError(
            f"the base model {config.path!r} is not a folder here, and it could not be downloaded "
            f"as a hub id ({error}); set model.path to a diffusers pipeline folder, or fetch one "
            f"first: hf download {config.path} --local-dir checkpoints/{Path(config.path).name}"
        ) from error
