"""A diffusers pipeline that draws with the student as it is, in the midst of its training.

The pipeline's own code denoises and decodes; where it asks its transformer, the student answers.
So every pass goes through the module that the engine watches, and ZeRO 3 gathers the weights of one
block after the other, as in training.
"""

from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from stages.base_weights import model_class_of
from stages.sample_videos.drawing import build_pipeline
from stages.train_student.student import Student
from stages.weight_checks import load_model


class _LiveTransformer:
    """What a pipeline needs of a `CogVideoXTransformer3DModel`; no module, so it is never moved."""

    def __init__(self, student: Student) -> None:
        self._student = student
        self.config = student.transformer.config

    def cache_context(self, name: str) -> Any:
        """Nothing is cached between passes."""
        return nullcontext()

    def __call__(
        self,
        *,
        hidden_states: Tensor,
        encoder_hidden_states: Tensor,
        timestep: Tensor,
        ofs: Tensor | None = None,
        image_rotary_emb: tuple[Tensor, Tensor] | None = None,
        attention_kwargs: dict[str, Any] | None = None,
        return_dict: bool = False,
    ) -> tuple[Tensor]:
        """The student's velocity."""
        if attention_kwargs is not None or return_dict:
            raise ValueError("the pipeline asks its transformer for more than training gives")
        no_heads = (0, 0, 0)
        velocity_BFCHW, _ = self._student(
            hidden_states, encoder_hidden_states, timestep, no_heads, image_rotary_emb, ofs
        )
        return (velocity_BFCHW,)


@contextmanager
def live_pipeline(
    student: Student, base: Path, *, dtype: torch.dtype, device: torch.device
) -> Iterator[Any]:
    """The base's pipeline around the student, without tokenizer and text encoder.

    The VAE is loaded for the length of the block; on a GPU it decodes in tiles, since the training
    needs most of the memory. The student's heads are set aside meanwhile.

    Args:
        base: the pipeline's folder, with vae/ and scheduler/.
        dtype: arithmetic of the VAE: that of the student.
    """
    vae = load_model(model_class_of("vae"), base / "vae", dtype=dtype)
    vae.requires_grad_(False).eval().to(device)
    if device.type == "cuda":
        vae.enable_slicing()
        vae.enable_tiling()
    pipeline = build_pipeline(base, tokenizer=None, text_encoder=None, transformer=None, vae=vae)
    pipeline.transformer = _LiveTransformer(student)
    pipeline.set_progress_bar_config(disable=True)
    heads, student.heads = student.heads, nn.ModuleDict()
    try:
        yield pipeline
    finally:
        student.heads = heads
        del pipeline, vae
        if device.type == "cuda":
            torch.cuda.empty_cache()
