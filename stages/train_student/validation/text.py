"""Text embeddings of the sample prompts.

Rank 0 loads the text encoder once, before the transformer, and frees it again. The embeddings are
cached in <run_dir>/samples/prompts.safetensors, so that a resume does not load the encoder.
"""

import gc
import hashlib
import json
from collections.abc import Sequence
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from stages.cogvideox.configs import resolve_base_model
from stages.cogvideox.sampler import build_pipeline
from stages.cogvideox.weights import load_tokenizer, model_class_of
from stages.config import BaseModelConfig
from stages.files.tensor_files import save_tensors
from stages.files.weight_checks import load_model
from stages.progress import Progress
from stages.train_student.parallel.process_group import World, on_first_rank

_ENCODING_TIME = timedelta(hours=12)
"""How long the other ranks wait for rank 0, which may have to download the encoder."""


def encode_prompts(
    prompts: Sequence[str],
    model: BaseModelConfig,
    *,
    length: int,
    dtype: torch.dtype,
    cache_file: Path,
    world: World,
    progress: Progress,
) -> dict[str, Tensor]:
    """Embed each prompt: [1, length, width] on the CPU, on every rank.

    Args:
        prompts: unique prompts.
        model: the base pipeline.
        length: number of tokens that every prompt is padded to.
        dtype: dtype of the encoder, the same as in `sample`.
        cache_file: where the embeddings are cached.

    Raises:
        ValueError: the pipeline has no text encoder.
    """

    def on_first() -> dict[str, Tensor]:
        base = resolve_base_model(model, ("tokenizer", "text_encoder"))
        key = _key(prompts, base, length, dtype)
        found = _read(cache_file, key, prompts)
        if found is None:
            with progress.task("encode the prompts", len(prompts), unit="prompts") as task:
                found = _encode(prompts, base, length, dtype, world.device, task.advance)
            _write(cache_file, key, [found[prompt] for prompt in prompts])
        return found

    return on_first_rank(world, on_first, timeout=_ENCODING_TIME)


def _encode(
    prompts: Sequence[str],
    base: Path,
    length: int,
    dtype: torch.dtype,
    device: torch.device,
    advance: Any,
) -> dict[str, Tensor]:
    """Encode the prompts one by one with the pipeline's own method."""
    devices = [device] if device.type == "cuda" else []
    with torch.random.fork_rng(devices=devices), torch.no_grad():
        pipeline = build_pipeline(
            base,
            tokenizer=load_tokenizer(base),
            text_encoder=load_model(
                model_class_of("text_encoder"), base / "text_encoder", dtype=dtype
            ),
            transformer=None,
            vae=None,
        )
        pipeline.text_encoder.to(device)
        found = {}
        for prompt in prompts:
            embeds_1LD, _ = pipeline.encode_prompt(
                prompt, do_classifier_free_guidance=False, max_sequence_length=length, device=device
            )
            found[prompt] = embeds_1LD.cpu()
            advance()
    del pipeline
    gc.collect()
    if device.type == "cuda":
        torch.cuda.empty_cache()
    return found


def _key(prompts: Sequence[str], base: Path, length: int, dtype: torch.dtype) -> str:
    """Hash of the prompts and of the encoder's file names, sizes and times."""
    files = sorted(
        path for part in ("tokenizer", "text_encoder") for path in (base / part).rglob("*")
    )
    content = {
        "prompts": list(prompts),
        "length": length,
        "dtype": str(dtype),
        "files": [
            [str(path.relative_to(base)), path.stat().st_size, path.stat().st_mtime_ns]
            for path in files
            if path.is_file()
        ],
    }
    return hashlib.sha256(json.dumps(content).encode()).hexdigest()


def _read(cache_file: Path, key: str, prompts: Sequence[str]) -> dict[str, Tensor] | None:
    if not cache_file.is_file():
        return None
    try:
        with safe_open(cache_file, framework="pt") as file:
            if (file.metadata() or {}).get("key") != key:
                return None
            return {prompt: file.get_tensor(str(n)) for n, prompt in enumerate(prompts)}
    except SafetensorError:
        return None  # written incompletely; encode again


def _write(cache_file: Path, key: str, embeds: Sequence[Tensor]) -> None:
    cache_file.parent.mkdir(parents=True, exist_ok=True)
    temporary = cache_file.with_name(f".{cache_file.name}.partial")
    tensors = {str(number): tensor.contiguous() for number, tensor in enumerate(embeds)}
    save_tensors(tensors, temporary, metadata={"key": key})
    temporary.rename(cache_file)
