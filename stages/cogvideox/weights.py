"""Whether the parts of a base pipeline are whole, and which they are, before any is loaded."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal

from cache_schema.checksummed_json import parse_json
from stages.clips.fingerprints import hash_parts
from stages.config import BaseModelConfig
from stages.files.weight_checks import (
    check_weights,
    indexed_files,
    read_config,
    read_json,
    refuse_lfs_pointer,
    stored_tensors,
)

Part = Literal["tokenizer", "text_encoder", "vae", "transformer"]
"""Folders of a pipeline that hold more than a configuration."""

_VOCABULARIES = ("tokenizer.json", "spiece.model")
"""A tokenizer needs one of them; without, transformers makes one that knows four tokens."""

_SAMPLE_BYTES = 4096
"""So much of each tensor is hashed; training changes every part of those that it changes."""


_MAX_HEADER_BYTES = 100_000_000
"""Of a safetensors file, as the library has it."""


def hash_transformer(folder: Path) -> str:
    """16 digits for a pipeline's transformer: its tensors' names, formats, shapes and samples.

    From the middle of each tensor 4 KiB are read, a few MB of CogVideoX-5B. Where the folder lies
    and which files hold the tensors does not matter. One changed value may go unseen.

    Raises:
        ValueError: The weights are missing or damaged.
    """
    stored = stored_tensors(folder / "transformer", "diffusion_pytorch_model")
    samples = {}
    for file in {tensor.file for tensor in stored.values()}:
        with file.open("rb") as stream:
            length = int.from_bytes(stream.read(8), "little")
            if length > _MAX_HEADER_BYTES:
                raise ValueError(f"{file} is damaged: a header of {length:,} bytes")
            header = parse_json(stream.read(length))
            header.pop("__metadata__", None)
            for name, about in header.items():
                start, stop = about["data_offsets"]
                stream.seek(8 + length + max(start, (start + stop - _SAMPLE_BYTES) // 2))
                sample = stream.read(min(_SAMPLE_BYTES, stop - start))
                samples[name] = (name, about["dtype"], str(about["shape"]), sample)
    return hash_parts(part for name in sorted(samples) for part in samples[name])


def check_base_weights(folder: Path, parts: Sequence[Part]) -> None:
    """Check that the parts' files are whole and fit their configurations; reads no weights.

    Args:
        folder: of a CogVideoX pipeline, downloaded.
        parts: which of it are going to be loaded; a tokenizer goes with its text encoder.

    Raises:
        ValueError: One is not; the message names the tensors or the file.
    """
    for part in parts:
        if part == "tokenizer":
            load_tokenizer(folder)
        else:
            check_weights(model_class_of(part), folder / part)


def model_class_of(part: Part) -> Any:
    """The class that a part with weights is loaded by."""
    if part == "text_encoder":
        from transformers import T5EncoderModel

        return T5EncoderModel
    from diffusers import AutoencoderKLCogVideoX, CogVideoXTransformer3DModel

    return AutoencoderKLCogVideoX if part == "vae" else CogVideoXTransformer3DModel


def parts_are_here(model: BaseModelConfig, folder: Path, parts: Sequence[Part]) -> bool:
    """Whether parts of the base model are on this machine, whole; a hub id may lack some yet.

    Args:
        model: The base model.
        folder: What was resolved of it, or its configurations alone.
        parts: Which.

    Raises:
        ValueError: They are damaged; or, in a folder, which no download completes, missing.
    """
    if not model.is_local and not all(_is_downloaded(folder / part) for part in parts):
        return False
    check_base_weights(folder, parts)
    return True


def _is_downloaded(folder: Path) -> bool:
    """Whether all files of a part are there; says nothing of what is in them."""
    if folder.name == "tokenizer":
        return any((folder / name).is_file() for name in _VOCABULARIES)
    for index in folder.glob("*.safetensors.index.json"):
        return all((folder / name).is_file() for name in indexed_files(index))
    return any(folder.glob("*.safetensors"))


def load_tokenizer(folder: Path) -> Any:
    """The pipeline's tokenizer, whose numbers the text encoder knows.

    Raises:
        ValueError: A file is missing or damaged, or the vocabulary is larger than the encoder's.
    """
    from transformers import T5Tokenizer

    tokenizer_folder = folder / "tokenizer"
    _check_tokenizer_files(tokenizer_folder)
    try:
        tokenizer = T5Tokenizer.from_pretrained(tokenizer_folder, local_files_only=True)
    except Exception as error:  # the library checks little of what the files say
        raise ValueError(
            f"the tokenizer in {tokenizer_folder} cannot be loaded: {type(error).__name__}: "
            f"{error}; download it again"
        ) from error
    config = folder / "text_encoder" / "config.json"
    known = read_config(config).get("vocab_size")
    if type(known) is not int:
        raise ValueError(f"{config}: vocab_size is {known!r}, no integer; download the model again")
    if len(tokenizer) > known:
        raise ValueError(
            f"the tokenizer in {tokenizer_folder} has {len(tokenizer)} tokens, the text encoder "
            f"beside it knows {known}; they are of different models: download both again"
        )
    # A caption that is too long is cut before it is encoded; transformers would foretell "indexing
    # errors" where its tokens are only counted. diffusers' own warning of the cut stays.
    tokenizer.deprecation_warnings["sequence-length-is-longer-than-the-specified-maximum"] = True
    return tokenizer


def _check_tokenizer_files(folder: Path) -> None:
    read_config(folder / "tokenizer_config.json")
    files = [folder / name for name in _VOCABULARIES if (folder / name).is_file()]
    if not files:
        raise ValueError(
            f"{folder} has no vocabulary ({' or '.join(_VOCABULARIES)}); download the model again"
        )
    for file in files:
        if file.suffix == ".json":
            read_json(file)
        refuse_lfs_pointer(file)
        if file.stat().st_size == 0:
            raise ValueError(f"{file} is empty; download the model again")
