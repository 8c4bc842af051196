"""Extraction of the text store: text encoder states of each caption."""

# Legend: L text token, D width of the text encoder.

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch

from cache_schema import JSON, ArraySpec, StoreSettings
from stages.clips import ClipRecord, ClipsConfig, ClipSkipped
from stages.cogvideox.configs import CogVideoXConfigs
from stages.cogvideox.weights import load_tokenizer, model_class_of
from stages.extract_features.config import Kind, TextConfig
from stages.extract_features.extraction import Extracted, Outcome, to_float16
from stages.files.hashes import sha256_of_folder
from stages.files.weight_checks import load_model
from stages.precision import DTYPES

TOKENS_CUT = "tokens_cut"
"""Clip attribute: number of caption tokens beyond the text encoder's length."""


class TextExtraction:
    """Encodes captions like CogVideoXPipeline: padded to the full length, no attention mask.

    Args:
        config: Precision.
        base: Configuration of the base pipeline.

    Raises:
        ValueError: The folder holds no tokenizer or text encoder.
    """

    clips_per_batch = 1
    size: ClipsConfig | None = None

    def __init__(self, config: TextConfig, base: CogVideoXConfigs) -> None:
        self._config = config
        self._folder = base.folder
        self._length = int(base.transformer["max_text_seq_length"])
        width = int(base.transformer["text_embed_dim"])
        values: dict[str, JSON] = {
            "base": {
                "tokenizer_sha256": sha256_of_folder(base.folder / "tokenizer"),
                "text_encoder_sha256": sha256_of_folder(base.folder / "text_encoder"),
                "width": width,
                "length": self._length,
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
        tokenizer = load_tokenizer(self._folder)
        encoder = load_model(
            model_class_of("text_encoder"),
            self._folder / "text_encoder",
            dtype=DTYPES[self._config.precision],
        )
        encoder.requires_grad_(False).eval().to(device)
        yield lambda captions: [
            {"text": self._extract(tokenizer, encoder, caption)} for caption in captions
        ]

    @torch.inference_mode()
    def _extract(self, tokenizer: Any, encoder: Any, caption: str) -> Extracted:
        tokens = tokenizer(
            [caption],
            padding="max_length",
            max_length=self._length,
            truncation=True,
            add_special_tokens=True,
            return_tensors="pt",
        )
        whole = tokenizer([caption], add_special_tokens=True).input_ids[0]
        embeds_LD = encoder(tokens.input_ids.to(encoder.device))[0][0]
        return Extracted(
            arrays={"embeds": to_float16(embeds_LD)},
            attributes={
                "caption": caption,
                TOKENS_CUT: max(0, len(whole) - self._length),
            },
        )


def text_arrays(base: CogVideoXConfigs) -> dict[str, ArraySpec]:
    """Return the array specs of a clip."""
    shape = (int(base.transformer["max_text_seq_length"]), int(base.transformer["text_embed_dim"]))
    return {"embeds": ArraySpec(dtype="float16", shape=shape, dimension_names=("l", "d"))}
