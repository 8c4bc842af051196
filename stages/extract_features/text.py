"""Extraction of the text store: text encoder states of each caption."""

# Legend: L text token, D width of the text encoder.

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch

from cache_schema import JSON, ArraySpec, StoreSettings
from stages.clips import ClipRecord, ClipsConfig, ClipSkipped
from stages.extract_features.config import Kind, TextConfig
from stages.extract_features.extraction import Extracted, Outcome
from stages.files.hashes import sha256_of_folder
from stages.files.weight_checks import load_model
from stages.precision import DTYPES
from stages.students.latents import to_float16
from stages.students.student import StudentConfigs
from stages.students.weights import load_tokenizer

TOKENS_CUT = "tokens_cut"
"""Clip attribute: number of caption tokens beyond the text encoder's length."""


class TextExtraction:
    """Encodes captions as the base model's pipeline does.

    Args:
        config: Precision.
        base: Configuration of the base pipeline.

    Raises:
        ValueError: The folder holds no tokenizer or text encoder.
    """

    clips_per_batch = 1
    size: ClipsConfig | None = None

    def __init__(self, config: TextConfig, base: StudentConfigs) -> None:
        self._config = config
        self._base = base
        self._length, width = base.text_shape
        values: dict[str, JSON] = {
            "base": {
                "tokenizer_sha256": sha256_of_folder(base.folder / "tokenizer"),
                "text_encoder_sha256": sha256_of_folder(base.folder / "text_encoder"),
                "width": width,
                "length": self._length,
                **base.text_settings(),
            },
            "precision": config.precision,
        }
        self.settings: Mapping[Kind, StoreSettings] = {
            "text": StoreSettings(kind="text", arrays=text_arrays(base), values=values)
        }

    def prepare(self, record: ClipRecord) -> str:
        """Return the caption.

        Raises:
            ClipSkipped: no_caption.
        """
        if record.caption is None:
            raise ClipSkipped("no_caption", "the dataset gives no caption for this clip")
        return record.caption

    @contextmanager
    def load_model(
        self, device: torch.device
    ) -> Iterator[Callable[[Sequence[str]], Sequence[Outcome]]]:
        """Load the tokenizer and the text encoder."""
        tokenizer = load_tokenizer(self._base.folder)
        encoder = load_model(
            self._base.model_class("text_encoder"),
            self._base.folder / "text_encoder",
            dtype=DTYPES[self._config.precision],
        )
        encoder.requires_grad_(False).eval().to(device)
        yield lambda captions: [
            {"text": self._extract(tokenizer, encoder, caption)} for caption in captions
        ]

    @torch.inference_mode()
    def _extract(self, tokenizer: Any, encoder: Any, caption: str) -> Extracted:
        embeds_LD, num_tokens = self._base.embed_caption(tokenizer, encoder, caption)
        return Extracted(
            arrays={"embeds": to_float16(embeds_LD)},
            attributes={
                "caption": caption,
                TOKENS_CUT: max(0, num_tokens - self._length),
            },
        )


def text_arrays(base: StudentConfigs) -> dict[str, ArraySpec]:
    """Return the array specs of a clip."""
    spec = ArraySpec(dtype="float16", shape=base.text_shape, dimension_names=("l", "d"))
    return {"embeds": spec}
