"""Weight checks of the base pipeline's components, its tokenizer, and the transformer's hash."""

import json
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
from stages.students.registry import has_two_transformers, image_parts, read_model_index

Part = Literal["tokenizer", "text_encoder", "vae", "transformer", "transformer_2", "image_encoder"]
"""Pipeline components with weights or vocabularies."""

_TOKENIZER_JSON = "tokenizer.json"
_VOCABULARIES = (_TOKENIZER_JSON, "spiece.model")
"""A tokenizer needs one of them; without any, transformers silently makes one of four tokens."""

_T5_UNKNOWN = 2
"""Token of unknown characters in transformers' T5Tokenizer, whatever the vocabulary says."""

_SAMPLE_BYTES = 4096
"""Bytes hashed per tensor; training changes a tensor everywhere if at all."""


_MAX_HEADER_BYTES = 100_000_000
"""Largest header of a safetensors file, the library's own limit."""


def hash_transformer(folder: Path, part: Part = "transformer") -> str:
    """16-digit hash of a transformer: names, dtypes, shapes and a sample of every tensor.

    Reads 4 KiB from the middle of each tensor, a few MB for CogVideoX-5B. Independent of the
    folder and of the sharding into files. A single changed value may go undetected.

    Args:
        folder: A pipeline.
        part: The folder of the transformer.

    Raises:
        ValueError: The weights are missing or damaged.
    """
    return _hash_tensors(folder / part, "diffusion_pytorch_model")


def hash_pipeline(folder: Path, parts: Sequence[Part]) -> str:
    """16-digit hash of what a pipeline computes with: weights as `hash_transformer`, and scheduler.

    Args:
        folder: A pipeline.
        parts: The components with weights that are used; the tokenizer is not hashed.

    Raises:
        ValueError: Weights or the scheduler's configuration are missing or damaged.
    """
    scheduler = read_config(folder / "scheduler" / "scheduler_config.json")
    hashes = [
        _hash_tensors(
            folder / part, "model" if part.endswith("_encoder") else "diffusion_pytorch_model"
        )
        for part in parts
        if part != "tokenizer"
    ]
    return hash_parts([*parts, *hashes, json.dumps(scheduler, sort_keys=True)])


def _hash_tensors(folder: Path, stem: str) -> str:
    stored = stored_tensors(folder, stem)
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
    """Check that components are complete and match their configurations, without loading weights.

    Args:
        folder: a downloaded pipeline.
        parts: components to check; a tokenizer is checked against the text encoder's config.

    Raises:
        ValueError: a component is incomplete or damaged; names the tensors or the file.
    """
    for part in parts:
        if part == "tokenizer":
            load_tokenizer(folder)
        else:
            check_weights(model_class_of(part, folder), folder / part)


def model_class_of(part: Part, folder: Path) -> Any:
    """The diffusers or transformers class of a component of the pipeline in a folder.

    Raises:
        ValueError: As `read_model_index`.
    """
    index, student = read_model_index(folder)
    named = index.get(part)
    return student.model_class(part, None if named is None else named[1])


def sampling_parts(folder: Path) -> tuple[Part, ...]:
    """Components with weights or vocabularies that the pipeline in a folder samples with."""
    _, *of_image = latents_parts(folder)
    second: tuple[Part, ...] = ("transformer_2",) if has_two_transformers(folder) else ()
    return ("tokenizer", "text_encoder", "vae", "transformer", *second, *of_image)


def latents_parts(folder: Path) -> tuple[Part, ...]:
    """Components with weights that encode a clip and its first frame."""
    return ("vae", "image_encoder") if image_parts(folder) else ("vae",)


def parts_are_here(model: BaseModelConfig, folder: Path, parts: Sequence[Part]) -> bool:
    """Whether components are on this machine; False if a hub model is not fully downloaded.

    Args:
        model: The base model.
        folder: Its resolved folder, which may hold only the configurations.
        parts: Components to look for.

    Raises:
        ValueError: A component is damaged, or missing from a local folder.
    """
    if not model.is_local and not all(_is_downloaded(folder / part) for part in parts):
        return False
    check_base_weights(folder, parts)
    return True


def _is_downloaded(folder: Path) -> bool:
    """Whether all files of a component exist; does not check their contents."""
    if folder.name == "tokenizer":
        return any((folder / name).is_file() for name in _VOCABULARIES)
    for index in folder.glob("*.safetensors.index.json"):
        return all((folder / name).is_file() for name in indexed_files(index))
    return any(folder.glob("*.safetensors"))


def load_tokenizer(folder: Path) -> Any:
    """Load the pipeline's tokenizer and check its vocabulary against the text encoder's.

    A tokenizer.json is used as it is. T5Tokenizer would take only its vocabulary and build a T5's
    around it, in which unknown characters are token 2: <unk> in T5, but <s> in Wan's UMT5.

    Raises:
        ValueError: A file is missing or damaged, the vocabulary is larger than the encoder's, or
            its unknown token is not T5's and there is no tokenizer.json.
    """
    from transformers import PreTrainedTokenizerFast, T5Tokenizer

    tokenizer_folder = folder / "tokenizer"
    _check_tokenizer_files(tokenizer_folder)
    described = (tokenizer_folder / _TOKENIZER_JSON).is_file()
    tokenizer_class = PreTrainedTokenizerFast if described else T5Tokenizer
    try:
        tokenizer = tokenizer_class.from_pretrained(tokenizer_folder, local_files_only=True)
    except Exception as error:  # transformers hardly validates the files
        raise ValueError(
            f"the tokenizer in {tokenizer_folder} cannot be loaded: {type(error).__name__}: "
            f"{error}; download it again"
        ) from error
    config = folder / "text_encoder" / "config.json"
    vocab_size = read_config(config).get("vocab_size")
    if type(vocab_size) is not int:
        raise ValueError(
            f"{config}: vocab_size is {vocab_size!r}, not an integer; download the model again"
        )
    if len(tokenizer) > vocab_size:
        raise ValueError(
            f"the tokenizer in {tokenizer_folder} has {len(tokenizer)} tokens, but the text "
            f"encoder's vocab_size is {vocab_size}; they belong to different models: download both "
            "again"
        )
    if not described and tokenizer.unk_token_id != _T5_UNKNOWN:
        raise ValueError(
            f"the tokenizer in {tokenizer_folder} has {tokenizer.unk_token} as token "
            f"{tokenizer.unk_token_id}, where T5 has it as {_T5_UNKNOWN}, and no "
            f"{_TOKENIZER_JSON}, without which unknown characters would be encoded wrongly; "
            "download it again"
        )
    # Captions are truncated before encoding, so transformers' warning of "indexing errors", also
    # given when tokens are only counted, is wrong. diffusers' warning of the truncation stays.
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
