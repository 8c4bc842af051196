"""The base pipeline during training: around the student, or with its text encoder alone."""

import gc
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from stages.files.weight_checks import load_model
from stages.students.registry import image_parts, student_at
from stages.students.sampler import build_pipeline
from stages.students.weights import latents_parts, load_tokenizer, model_class_of
from stages.train_student.model.student import Student


class _LiveTransformer:
    """Student with the interface of its transformer that the pipeline uses.

    Not an `nn.Module`, so the pipeline does not move it between devices.
    """

    def __init__(self, student: Student, dtype: torch.dtype) -> None:
        self._student = student
        self.config = student.transformer.config
        self.dtype = dtype

    def cache_context(self, name: str, **about: Any) -> Any:
        """Do nothing: nothing is cached between passes."""
        return nullcontext()

    def __call__(
        self,
        *,
        attention_kwargs: dict[str, Any] | None = None,
        return_dict: bool = False,
        **inputs: Any,
    ) -> tuple[Tensor]:
        """Return the prediction."""
        if attention_kwargs is not None or return_dict:
            raise ValueError(
                "attention_kwargs and return_dict=True are not supported during training"
            )
        no_heads = (0, 0, 0)
        output, _ = self._student(inputs, no_heads)
        return (output,)


@contextmanager
def live_pipeline(
    student: Student, base: Path, *, dtype: torch.dtype, device: torch.device
) -> Iterator[Any]:
    """Context manager: the base pipeline around the student, without tokenizer and text encoder.

    The VAE is loaded for the duration of the block; on a GPU it decodes in tiles, since training
    needs most of the memory. The student's heads are removed meanwhile.

    Args:
        base: the pipeline's folder, with vae/ and scheduler/.
        dtype: dtype of the VAE and the student.
    """
    alone = student_at(base).FLOAT32_PARTS
    parts = {
        part: load_model(
            model_class_of(part, base), base / part, dtype=torch.float32 if part in alone else dtype
        )
        for part in latents_parts(base)
    }
    for model in parts.values():
        model.requires_grad_(False).eval().to(device)
    vae = parts["vae"]
    if device.type == "cuda":
        vae.enable_slicing()
        vae.enable_tiling()
    pipeline = build_pipeline(base, tokenizer=None, text_encoder=None, transformer=None, **parts)
    pipeline.transformer = _LiveTransformer(student, dtype)
    pipeline.set_progress_bar_config(disable=True)
    heads, student.heads = student.heads, nn.ModuleDict()
    try:
        yield pipeline
    finally:
        student.heads = heads
        del pipeline, parts, vae, model
        if device.type == "cuda":
            torch.cuda.empty_cache()


def encode_prompts(
    prompts: Sequence[str],
    base: Path,
    length: int,
    dtype: torch.dtype,
    device: torch.device,
    advance: Callable[[], None],
) -> dict[str, Tensor]:
    """Encode the prompts one by one with the pipeline's own method, and free the encoder again.

    Args:
        base: the pipeline's folder, with tokenizer/ and text_encoder/.
        length: number of tokens that every prompt is padded to.
        dtype: dtype of the encoder, the same as in `sample`.
        advance: called after each prompt.

    Returns:
        Embedding [1, length, width] of each prompt, on the CPU.

    Raises:
        ValueError: the pipeline has no text encoder.
    """
    devices = [device] if device.type == "cuda" else []
    with torch.random.fork_rng(devices=devices), torch.no_grad():
        pipeline = build_pipeline(
            base,
            tokenizer=load_tokenizer(base),
            text_encoder=load_model(
                model_class_of("text_encoder", base), base / "text_encoder", dtype=dtype
            ),
            transformer=None,
            vae=None,
            **dict.fromkeys(image_parts(base)),
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
