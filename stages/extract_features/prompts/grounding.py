"""Grounding DINO prompts: boxes from text, on the first frame with a detection."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import torch

from cache_schema import JSON
from stages.clips import Clip, ClipRecord, ClipSkipped, SubjectPrompt
from stages.extract_features.config import GroundingConfig
from stages.extract_features.extraction import release_memory
from stages.extract_features.prompts.prompt import ChosenPrompt
from stages.files.hashes import sha256_of_files
from stages.files.hub import download_command, hub_files
from stages.files.weight_checks import check_weights, load_model, read_config
from stages.sam2_tracking.encoder import EncodedFrames
from stages.sam2_tracking.tracker import Tracker

# Legend: H W pixels, Q query (a box that may be there), N token of the text.

_REQUIRED = ("config.json", "preprocessor_config.json")
_TOKENIZER = ("tokenizer.json", "vocab.txt", "tokenizer_config.json", "special_tokens_map.json")
_WEIGHTS = ("model.safetensors", "model.safetensors.index.json", "model-*.safetensors")
_MODEL_TYPE = "grounding-dino"


@dataclass(frozen=True, kw_only=True, slots=True)
class Detection:
    """Grounding DINO's best box for a phrase."""

    phrase: str
    label: str
    """Words of the text that the box matches."""
    score: float
    box_xyxy: tuple[float, float, float, float]
    """In pixels, clipped to the frame."""


def find_grounding_dino(config: GroundingConfig) -> Path:
    """Return the model's folder, downloaded if `config.model` is a hub id; does not load weights.

    Raises:
        ValueError: The download fails, a file is missing, or it is not a Grounding DINO whose
            weights match its configuration.
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
    """Return the SHA-256 of the names and bytes of the files that are loaded.

    Other files, such as the README of a clone, are ignored, so that a hub id and its clone agree.
    """
    names = {
        file.name
        for pattern in (*_REQUIRED, *_TOKENIZER, *_WEIGHTS)
        for file in folder.glob(pattern)
    }
    return sha256_of_files(folder, names)


class GroundingDino:
    """Grounding DINO in float32 with its processor.

    Args:
        folder: Folder from `find_grounding_dino`.
        device: Device to run on.
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
        # The PIL processor needs no torchvision and gives the same results on every machine.
        images = GroundingDinoImageProcessorPil.from_pretrained(folder, local_files_only=True)
        self._processor = GroundingDinoProcessor(images, self._tokenizer)

    @torch.inference_mode()
    def detect(
        self, image_HW3: np.ndarray, phrases: Sequence[str], *, text_threshold: float
    ) -> list[Detection]:
        """Return the best box of each phrase, with any score; all phrases in one pass.

        Args:
            image_HW3: uint8 RGB.
            phrases: Lower case; without full stops if there are several.
            text_threshold: Minimum score of a word in a box's label.

        Returns:
            One detection per phrase, in order, except for phrases beyond the model's text length
            or whose box is outside the frame.
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
            # A single phrase uses every token, as in the model's own post-processing.
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
        """Return the box with the highest score on these tokens of the text."""
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
    return hub_files(
        config.model,
        [*_REQUIRED, *_TOKENIZER, *_WEIGHTS],
        named=f"the Grounding DINO {config.model!r}",
        remedy="set extract.teacher.grounding.model to a folder in transformers' format, or "
        f"download one first: {download_command(config.model)}",
        revision=config.revision,
    )


_SAME_BOX = 0.8
"""IoU from which boxes of two phrases are considered the same subject."""


def phrases_of(config: GroundingConfig, clip: Clip | ClipRecord) -> tuple[str, ...]:
    """Return the phrases to detect: the configured one, or the clip's own, or its caption.

    Full stops separate a phrase into several subjects. A caption is kept whole, since its sentences
    usually describe one subject. Lower case, as in Grounding DINO's training. Empty if there is no
    text.
    """
    for text in (config.phrase, clip.phrase):
        phrases = [" ".join(part.lower().split()) for part in (text or "").split(".")]
        if any(phrases):
            return tuple(dict.fromkeys(phrase for phrase in phrases if phrase))
    caption = " ".join((clip.caption or "").lower().split()).strip(" .")
    return (caption,) if caption else ()


class GroundingSource:
    """Grounding DINO, run on successive frames until something is found.

    Args:
        config: Model, phrase and thresholds.

    Raises:
        ValueError: The model is missing or is another model.
    """

    def __init__(self, config: GroundingConfig) -> None:
        self._config = config
        self._folder: Path = find_grounding_dino(config)
        self._model: GroundingDino | None = None
        self.settings: dict[str, JSON] = {
            "model_sha256": hash_of_grounding_dino(self._folder),
            "phrase": config.phrase,
            "box_threshold": config.box_threshold,
            "text_threshold": config.text_threshold,
            "frame_step": config.frame_step,
        }

    @contextmanager
    def loaded(self, device: torch.device) -> Iterator[None]:
        """Load Grounding DINO; free it on exit."""
        self._model = GroundingDino(self._folder, device)
        try:
            yield
        finally:
            self._model = None
            release_memory()

    def find(self, clip: Clip, tracker: Tracker, encoded: EncodedFrames) -> ChosenPrompt:
        """Return the best box of each phrase, on the first examined frame with any.

        Raises:
            ClipSkipped: nothing_found.
        """
        assert self._model is not None, "choose a prompt inside PromptChooser.load_models"
        config = self._config
        phrases = phrases_of(config, clip)
        highest = 0.0
        looked_at = range(0, len(clip.frames_THWC), config.frame_step)
        for frame in looked_at:
            best = self._model.detect(
                clip.frames_THWC[frame], phrases, text_threshold=config.text_threshold
            )
            found = _distinct([d for d in best if d.score > config.box_threshold])
            if found:
                return _chosen(found, frame, phrases)
            highest = max([highest, *(detection.score for detection in best)])
        raise ClipSkipped(
            "nothing_found",
            f"Grounding DINO finds no {'. '.join(phrases)!r} on {len(looked_at)} frames from 0 to "
            f"{looked_at[-1]}: best score {highest:.2f}, box_threshold {config.box_threshold:g}",
        )


def _chosen(found: list[Detection], frame: int, phrases: tuple[str, ...]) -> ChosenPrompt:
    boxes: list[JSON] = [
        {
            "phrase": detection.phrase,
            "label": detection.label,
            "score": round(detection.score, 4),
            "box_xyxy": [round(edge, 2) for edge in detection.box_xyxy],
        }
        for detection in found
    ]
    return ChosenPrompt(
        source="grounding",
        frame=frame,
        subjects=tuple(SubjectPrompt(box_xyxy=detection.box_xyxy) for detection in found),
        confidence=min(detection.score for detection in found),
        detail={"phrase": ". ".join(phrases) + ".", "boxes": boxes},
    )


def _distinct(detections: list[Detection]) -> list[Detection]:
    """Drop boxes that overlap a box with a higher score; keep the order."""
    kept: list[Detection] = []
    for detection in sorted(detections, key=lambda d: -d.score):
        if all(_overlap(detection.box_xyxy, other.box_xyxy) < _SAME_BOX for other in kept):
            kept.append(detection)
    return [detection for detection in detections if detection in kept]


_Box = tuple[float, float, float, float]


def _overlap(a: _Box, b: _Box) -> float:
    """Return the IoU of two boxes."""
    width = min(a[2], b[2]) - max(a[0], b[0])
    height = min(a[3], b[3]) - max(a[1], b[1])
    shared = max(width, 0.0) * max(height, 0.0)
    return shared / (_area(a) + _area(b) - shared)


def _area(box: _Box) -> float:
    return (box[2] - box[0]) * (box[3] - box[1])
