"""Finds, checks and runs Grounding DINO; `GroundingSource` asks it for boxes."""

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import torch

from stages.extract_features.config import GroundingConfig
from stages.extract_features.content_hash import sha256_of_file
from stages.weight_checks import check_weights, load_model, read_config

# Legend: H W pixels, Q query (a box that may be there), N token of the text.

_REQUIRED = ("config.json", "preprocessor_config.json")
_TOKENIZER = ("tokenizer.json", "vocab.txt", "tokenizer_config.json", "special_tokens_map.json")
_WEIGHTS = ("model.safetensors", "model.safetensors.index.json", "model-*.safetensors")
_MODEL_TYPE = "grounding-dino"


@dataclass(frozen=True, kw_only=True, slots=True)
class Detection:
    """The best box that Grounding DINO has for a phrase."""

    phrase: str
    label: str
    """The words of the text that the box goes with."""
    score: float
    box_xyxy: tuple[float, float, float, float]
    """In pixels of the frame, inside it."""


def find_grounding_dino(config: GroundingConfig) -> Path:
    """The model's folder, downloaded when `config.model` is a hub id; its weights are not read.

    Raises:
        ValueError: It cannot be downloaded, lacks a file, or is not a Grounding DINO whose weights
            fit its configuration.
    """
    local = Path(config.model).expanduser()
    folder = local if local.is_dir() else _download(config)
    missing = [name for name in _REQUIRED if not (folder / name).is_file()]
    missing += [
        " or ".join(names[:2])
        for names in (_TOKENIZER, _WEIGHTS)
        if not any((folder / name).is_file() for name in names[:2])
    ]
    if missing:
        raise ValueError(
            f"the Grounding DINO {config.model} has no {', '.join(missing)}; "
            "extract.teacher.grounding.model must be a folder in transformers' format, or a hub id "
            "such as IDEA-Research/grounding-dino-tiny"
        )
    _check_model_type(folder)
    for name in ("preprocessor_config.json", "tokenizer_config.json"):
        if (folder / name).is_file():
            read_config(folder / name)
    check_weights(_model_class(), folder)
    return folder


def hash_of_grounding_dino(folder: Path) -> str:
    """SHA-256 over the names and bytes of the files that are loaded.

    Others, such as the README of a clone, do not count: the hub id and the clone are one model.
    """
    names = {
        file.name
        for pattern in (*_REQUIRED, *_TOKENIZER, *_WEIGHTS)
        for file in folder.glob(pattern)
    }
    whole = hashlib.sha256()
    for name in sorted(names):
        whole.update(f"{sha256_of_file(folder / name)}  {name}\n".encode())
    return whole.hexdigest()


class GroundingDino:
    """Grounding DINO in float32 with its processor.

    Args:
        folder: What `find_grounding_dino` returned.
        device: Where it runs.
    """

    def __init__(self, folder: Path, device: torch.device) -> None:
        from transformers import (
            BertTokenizer,
            GroundingDinoImageProcessorPil,
            GroundingDinoProcessor,
        )

        self._device = device
        model = load_model(_model_class(), folder, dtype=torch.float32)
        self._model = model.requires_grad_(False).eval().to(device)
        self._tokenizer = BertTokenizer.from_pretrained(folder, local_files_only=True)
        # The processor on PIL: it needs no torchvision, and gives the same on every machine.
        images = GroundingDinoImageProcessorPil.from_pretrained(folder, local_files_only=True)
        self._processor = GroundingDinoProcessor(images, self._tokenizer)

    @torch.inference_mode()
    def detect(
        self, image_HW3: np.ndarray, phrases: Sequence[str], *, text_threshold: float
    ) -> list[Detection]:
        """The best box of each phrase, however low its score; all phrases in one pass.

        Args:
            image_HW3: uint8 RGB.
            phrases: Lower case, without full stops where there are several.
            text_threshold: Score below which a word does not belong to a box's label.

        Returns:
            One detection per phrase, in order. A phrase beyond the model's text length, or whose
            box lies outside the frame, has none.
        """
        text = ". ".join(phrases) + "."
        limits = {"truncation": True, "max_length": self._model.config.max_text_len}
        inputs = self._processor(images=image_HW3, text=text, return_tensors="pt", **limits)
        outputs = self._model(**inputs.to(self._device))
        spans_N2 = self._tokenizer(text, return_offsets_mapping=True, **limits)["offset_mapping"]
        found: list[Detection] = []
        start = 0
        for phrase in phrases:
            end = start + len(phrase)
            # One phrase has every token to itself, as the model's own post-processing has it.
            tokens = [
                token
                for token, (first, last) in enumerate(spans_N2)
                if len(phrases) == 1 or start <= first < last <= end
            ]
            start = end + len(". ")
            detection = self._best(outputs, inputs, phrase, tokens, image_HW3, text_threshold)
            if detection is not None:
                found.append(detection)
        return found

    def _best(
        self,
        outputs: Any,
        inputs: Any,
        phrase: str,
        tokens: list[int],
        image_HW3: np.ndarray,
        text_threshold: float,
    ) -> Detection | None:
        """The box with the highest score on these tokens of the text."""
        height, width, _ = image_HW3.shape
        logits_1QN = torch.full_like(outputs.logits, -torch.inf)
        logits_1QN[..., tokens] = outputs.logits[..., tokens]
        [result] = self._processor.post_process_grounded_object_detection(
            SimpleNamespace(logits=logits_1QN, pred_boxes=outputs.pred_boxes),
            inputs["input_ids"],
            threshold=0.0,
            text_threshold=text_threshold,
            target_sizes=[(height, width)],
        )
        if len(result["scores"]) == 0:
            return None
        best = int(result["scores"].argmax())
        box_22 = result["boxes"][best].double().cpu().reshape(2, 2).numpy()
        (x0, y0), (x1, y1) = np.clip(box_22, 0, (width, height)).tolist()
        if not (x0 < x1 and y0 < y1):
            return None
        return Detection(
            phrase=phrase,
            label=result["text_labels"][best],
            score=float(result["scores"][best]),
            box_xyxy=(x0, y0, x1, y1),
        )


def _model_class() -> Any:
    from transformers import GroundingDinoForObjectDetection

    return GroundingDinoForObjectDetection


def _check_model_type(folder: Path) -> None:
    found = read_config(folder / "config.json").get("model_type")
    if found != _MODEL_TYPE:
        raise ValueError(
            f"{folder} holds a model of type {found!r}, not {_MODEL_TYPE!r}; set "
            "extract.teacher.grounding.model to one such as IDEA-Research/grounding-dino-tiny"
        )


def _download(config: GroundingConfig) -> Path:
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError

    try:
        return Path(
            snapshot_download(
                config.model,
                revision=config.revision,
                allow_patterns=[*_REQUIRED, *_TOKENIZER, *_WEIGHTS],
            )
        )
    except (HfHubHTTPError, HFValidationError, LocalEntryNotFoundError, OSError) as error:
        raise ValueError(
            f"the Grounding DINO {config.model!r} is not a folder here, and it could not be "
            f"downloaded as a hub id ({error}); set extract.teacher.grounding.model to a folder in "
            f"transformers' format, or fetch one first: hf download {config.model} "
            f"--local-dir checkpoints/{Path(config.model).name}"
        ) from error
