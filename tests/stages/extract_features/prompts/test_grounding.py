"""Boxes from text, against transformers' own calls on a tiny Grounding DINO."""

import json
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import huggingface_hub
import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file

from stages.clips import Clip, ClipSkipped
from stages.extract_features.config import GroundingConfig
from stages.extract_features.prompts.grounding import (
    GroundingDino,
    GroundingSource,
    find_grounding_dino,
    hash_of_grounding_dino,
    phrases_of,
)
from stages.extract_features.prompts.prompt import ChosenPrompt
from tests.stages.extract_features.prompts.noise_clip import make_clip

CPU = torch.device("cpu")
NOT_NEEDED: Any = None


@contextmanager
def loaded(config: GroundingConfig) -> Iterator[GroundingSource]:
    source = GroundingSource(config)
    with source.loaded(CPU):
        yield source


def find(config: GroundingConfig, clip: Clip) -> ChosenPrompt:
    with loaded(config) as source:
        return source.find(clip, NOT_NEEDED, NOT_NEEDED)


class Reference:
    """Grounding DINO as transformers' documentation runs it."""

    def __init__(self, folder: Path) -> None:
        from transformers import (
            AutoTokenizer,
            GroundingDinoForObjectDetection,
            GroundingDinoImageProcessorPil,
            GroundingDinoProcessor,
        )

        self.model = GroundingDinoForObjectDetection.from_pretrained(folder).eval()
        self.processor = GroundingDinoProcessor(
            GroundingDinoImageProcessorPil.from_pretrained(folder),
            AutoTokenizer.from_pretrained(folder),
        )

    @torch.no_grad()
    def run(self, image_HW3: np.ndarray, text: str) -> tuple[Any, Any]:
        image = Image.fromarray(image_HW3)
        inputs = self.processor(images=image, text=text, return_tensors="pt")
        return inputs, self.model(**inputs)

    def best(self, image_HW3: np.ndarray, text: str) -> tuple[float, list[float], str]:
        """Score, box and label of the best detection."""
        inputs, outputs = self.run(image_HW3, text)
        [result] = self.processor.post_process_grounded_object_detection(
            outputs,
            inputs.input_ids,
            threshold=0.0,
            text_threshold=0.25,
            target_sizes=[image_HW3.shape[:2]],
        )
        best = int(result["scores"].argmax())
        box = result["boxes"][best].tolist()
        return float(result["scores"][best]), box, result["text_labels"][best]


@pytest.fixture(scope="module")
def reference(tiny_grounding: Path) -> Reference:
    return Reference(tiny_grounding)


def clipped(box: list[float], height: int, width: int) -> list[float]:
    return np.clip(box, 0, [width, height, width, height]).tolist()


@pytest.mark.parametrize("text", ["a red ball", "the dog runs over the grass. a cat"])
def test_a_caption_gives_the_best_box_that_transformers_finds(
    text: str, tiny_grounding: Path, reference: Reference
) -> None:
    clip = make_clip(caption=f"  {text.upper()}. ")
    config = GroundingConfig(model=str(tiny_grounding), box_threshold=0.0)
    chosen = find(config, clip)
    score, box, label = reference.best(clip.frames_THWC[0], f"{text}.")
    assert (chosen.source, chosen.frame) == ("grounding", 0)
    assert chosen.confidence == pytest.approx(score, abs=1e-6)
    [subject] = chosen.subjects
    assert subject.box_xyxy == pytest.approx(clipped(box, 48, 64), abs=1e-3)
    assert chosen.detail["phrase"] == f"{text}."
    boxes: Any = chosen.detail["boxes"]
    assert [detail["label"] for detail in boxes] == [label]


def test_every_phrase_gets_its_own_best_box(tiny_grounding: Path, reference: Reference) -> None:
    image_HW3 = make_clip().frames_THWC[0]
    found = GroundingDino(tiny_grounding, CPU).detect(
        image_HW3, ["a dog", "the red ball"], text_threshold=0.25
    )
    inputs, outputs = reference.run(image_HW3, "a dog. the red ball.")
    assert inputs.input_ids[0].tolist() == [2, 7, 9, 5, 8, 11, 12, 5, 3]
    scores_QN = outputs.logits[0].sigmoid()
    for detection, phrase, tokens in zip(
        found, ["a dog", "the red ball"], [[1, 2], [4, 5, 6]], strict=True
    ):
        best = int(scores_QN[:, tokens].amax(1).argmax())
        x, y, width, height = outputs.pred_boxes[0, best].tolist()
        corners = [x - width / 2, y - height / 2, x + width / 2, y + height / 2]
        assert detection.phrase == phrase
        assert detection.score == pytest.approx(float(scores_QN[best, tokens].max()), abs=1e-6)
        expected = clipped(list(np.multiply(corners, [64, 48, 64, 48])), 48, 64)
        assert detection.box_xyxy == pytest.approx(expected, abs=1e-3)
        assert all(word in phrase.split() for word in detection.label.split())


def test_the_first_frame_with_a_find_is_taken(tiny_grounding: Path, reference: Reference) -> None:
    clip = make_clip(phrase="a dog")
    frames_THWC = clip.frames_THWC
    scores = [reference.best(frame, "a dog.")[0] for frame in frames_THWC]
    order = np.argsort(scores)
    # Frames 0 and 4 below the threshold, 8 above, and the best of all where nobody looks.
    arranged = frames_THWC[order]
    arranged[[7, 8]] = arranged[[8, 7]]
    threshold = (scores[order[6]] + scores[order[7]]) / 2
    config = GroundingConfig(model=str(tiny_grounding), box_threshold=threshold, frame_step=4)
    chosen = find(config, make_clip(phrase="a dog", frames_THWC=arranged))
    assert chosen.frame == 8
    assert chosen.confidence == pytest.approx(scores[order[7]], abs=1e-6)


def test_finding_nothing_is_a_skip_that_tells_the_best_score(tiny_grounding: Path) -> None:
    config = GroundingConfig(model=str(tiny_grounding), box_threshold=1.0)
    with pytest.raises(ClipSkipped, match=r"no 'a dog' on 3 frames from 0 to 8: best score 0\.\d"):
        find(config, make_clip(phrase="a dog"))


def test_two_phrases_for_one_box_are_one_subject(
    tiny_grounding: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = GroundingConfig(model=str(tiny_grounding), box_threshold=0.0)
    clip = make_clip(phrase="a dog. the red ball")
    monkeypatch.setattr("stages.extract_features.prompts.grounding._SAME_BOX", 1.1)
    both = find(config, clip)
    assert len(both.subjects) == 2
    monkeypatch.setattr("stages.extract_features.prompts.grounding._SAME_BOX", 0.0)
    one = find(config, clip)
    boxes: Any = both.detail["boxes"]
    scores = [box["score"] for box in boxes]
    assert both.confidence == pytest.approx(min(scores), abs=1e-4)
    assert len(one.subjects) == 1
    assert one.confidence == pytest.approx(max(scores), abs=1e-4)


def test_a_caption_beyond_the_models_length_is_cut(tiny_grounding: Path) -> None:
    config = GroundingConfig(model=str(tiny_grounding), box_threshold=0.0)
    assert len(find(config, make_clip(caption="the dog runs " * 50)).subjects) == 1


@pytest.mark.parametrize(
    ("configured", "phrase", "caption", "expected"),
    [
        ("A Dog. the  cat.", "a ball", "x", ("a dog", "the cat")),
        (None, "A ball", "x", ("a ball",)),
        (None, None, " A dog runs. It is red. ", ("a dog runs. it is red",)),
        (None, " . ", "a dog", ("a dog",)),
        (None, "a dog. A dog.", None, ("a dog",)),
        (None, None, " ... ", ()),
        (None, None, None, ()),
    ],
)
def test_words_come_from_the_configuration_then_the_clip_then_its_caption(
    configured: str | None, phrase: str | None, caption: str | None, expected: tuple[str, ...]
) -> None:
    clip = make_clip(phrase=phrase, caption=caption)
    assert phrases_of(GroundingConfig(phrase=configured), clip) == expected


def test_the_hash_is_of_the_files_that_are_loaded(tiny_grounding: Path, tmp_path: Path) -> None:
    clone = tmp_path / "clone"
    shutil.copytree(tiny_grounding, clone)
    (clone / "README.md").write_text("a clone has more files")
    assert hash_of_grounding_dino(clone) == hash_of_grounding_dino(tiny_grounding)
    weights = clone / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-1] + b"\0")
    assert hash_of_grounding_dino(clone) != hash_of_grounding_dino(tiny_grounding)


def test_another_model_is_refused(tiny_grounding: Path, tmp_path: Path) -> None:
    folder = tmp_path / "other"
    shutil.copytree(tiny_grounding, folder)
    content = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**content, "model_type": "owlvit"}))
    with pytest.raises(ValueError, match="type 'owlvit', not 'grounding-dino'"):
        GroundingSource(GroundingConfig(model=str(folder)))


def test_a_folder_without_weights_is_refused(tiny_grounding: Path, tmp_path: Path) -> None:
    folder = tmp_path / "bare"
    shutil.copytree(tiny_grounding, folder, ignore=shutil.ignore_patterns("*.safetensors"))
    with pytest.raises(ValueError, match=r"has no model\.safetensors"):
        GroundingSource(GroundingConfig(model=str(folder)))


@pytest.mark.parametrize("change", [{"d_model": 64}, {"decoder_layers": 3}])
def test_weights_of_another_architecture_are_refused(
    change: dict[str, int], tiny_grounding: Path, tmp_path: Path
) -> None:
    folder = tmp_path / "misfit"
    shutil.copytree(tiny_grounding, folder)
    content = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**content, **change}))
    with pytest.raises(ValueError, match="misfit"):
        GroundingSource(GroundingConfig(model=str(folder)))


@pytest.mark.parametrize("fault", ["missing", "unknown", "of another shape"])
def test_tensors_that_are_not_the_models_are_named(
    fault: str, tiny_grounding: Path, tmp_path: Path
) -> None:
    folder = tmp_path / "model"
    shutil.copytree(tiny_grounding, folder)
    tensors = load_file(folder / "model.safetensors")
    name = "model.level_embed"
    if fault == "missing":
        del tensors[name]
    else:
        name = name if fault == "of another shape" else "extra"
        tensors[name] = torch.zeros(2)
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    with pytest.raises(ValueError, match=rf"tensors {fault}: 1 \({name}\); download"):
        GroundingSource(GroundingConfig(model=str(folder)))


def test_a_hub_id_is_downloaded_without_pickles(
    tiny_grounding: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: dict[str, Any] = {}

    def download(name: str, **arguments: Any) -> str:
        asked.update(arguments, name=name)
        return str(tiny_grounding)

    monkeypatch.setattr(huggingface_hub, "snapshot_download", download)
    config = GroundingConfig(model="IDEA-Research/grounding-dino-tiny", revision="abc")
    assert find_grounding_dino(config) == tiny_grounding
    assert (asked["name"], asked["revision"]) == ("IDEA-Research/grounding-dino-tiny", "abc")
    assert not any(pattern.endswith(("*", ".bin")) for pattern in asked["allow_patterns"])


def test_a_download_that_fails_says_what_to_do(monkeypatch: pytest.MonkeyPatch) -> None:
    def download(name: str, **arguments: Any) -> str:
        raise OSError("no network")

    monkeypatch.setattr(huggingface_hub, "snapshot_download", download)
    with pytest.raises(ValueError, match=r"no network.*hf download some/model --local-dir"):
        GroundingSource(GroundingConfig(model="some/model"))


@pytest.mark.parametrize(
    ("file", "field", "value"),
    [
        ("config.json", "auto_map", {"AutoModel": "evil.Model"}),
        ("config.json", "text_config", {"model_type": "bert", "auto_map": {"AutoModel": "e.M"}}),
        ("config.json", "backbone_config", {"model_type": "timm_backbone", "backbone": "resnet"}),
        ("tokenizer_config.json", "auto_map", {"AutoTokenizer": ["evil.Tokenizer", None]}),
        ("preprocessor_config.json", "auto_map", {"AutoImageProcessor": "evil.Processor"}),
    ],
)
def test_code_that_a_folder_names_is_refused(
    tiny_grounding: Path, tmp_path: Path, file: str, field: str, value: Any
) -> None:
    folder = Path(shutil.copytree(tiny_grounding, tmp_path / "model"))
    content = json.loads((folder / file).read_text()) | {field: value}
    (folder / file).write_text(json.dumps(content))
    with pytest.raises(ValueError, match=rf"{file}: (auto_map|model_type) .*official files"):
        find_grounding_dino(GroundingConfig(model=str(folder)))


def test_the_tokenizer_is_not_of_the_class_that_a_folder_names(
    tiny_grounding: Path, tmp_path: Path
) -> None:
    folder = Path(shutil.copytree(tiny_grounding, tmp_path / "model"))
    file = folder / "tokenizer_config.json"
    file.write_text(json.dumps({"tokenizer_class": "RagTokenizer"}))
    from transformers import BertTokenizer

    assert type(GroundingDino(folder, CPU)._tokenizer) is BertTokenizer
