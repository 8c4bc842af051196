"""A checkpoint decides on its library; what cannot be opened says what to do."""

import json
import subprocess
import sys
from pathlib import Path
from typing import Any
from unittest.mock import MagicMock

import pytest
import torch
from huggingface_hub.errors import GatedRepoError, LocalEntryNotFoundError

import stages.sam2_tracking
from stages.sam2_tracking.opening import (
    build_tracker,
    check_tracker,
    config_source,
    find_checkpoint,
    hash_of_checkpoint,
    pixels_per_token,
)
from stages.sam2_tracking.transformers_files import check_transformers_tracker
from tests.stages.sam2_tracking.transformers_families import tiny_edgetam, tiny_sam3, whole_sam3
from tests.stages.sam2_tracking.transformers_weights import to_transformers


@pytest.fixture(scope="module")
def folders(
    wide_sam2: Any, tmp_path_factory: pytest.TempPathFactory
) -> dict[str, tuple[Path, Any]]:
    """Checkpoints in transformers' format, with the models that they are of."""
    models = {
        "sam2_video": to_transformers(wide_sam2),
        "edgetam_video": tiny_edgetam(),
        "sam3_tracker_video": tiny_sam3(),
        "sam3_video": whole_sam3(),
    }
    saved = {}
    for name, model in models.items():
        folder = tmp_path_factory.mktemp(name)
        model.save_pretrained(folder)
        saved[name] = (folder, model)
    return saved


def written(folder: Path, document: dict[str, Any]) -> Path:
    (folder / "config.json").write_text(json.dumps(document))
    return folder


CLASSES = {
    "sam2_video": "Sam2VideoModel",
    "edgetam_video": "EdgeTamVideoModel",
    "sam3_tracker_video": "Sam3TrackerVideoModel",
    "sam3_video": "Sam3TrackerVideoModel",
}


@pytest.mark.parametrize("kind", CLASSES)
def test_a_folder_in_transformers_format_is_opened_with_transformers(
    kind: str, folders: dict[str, tuple[Path, Any]]
) -> None:
    folder, saved = folders[kind]
    size = 112 if kind.startswith("sam3") else 128
    assert find_checkpoint(str(folder)) == folder
    spec = check_tracker(None, folder, image_size=size)
    assert spec.library == f"transformers.{CLASSES[kind]}"
    assert (spec.hidden_dim, spec.mem_dim) == (128, 64)
    assert spec.stride == (14 if kind.startswith("sam3") else 16)
    assert pixels_per_token(str(folder), image_size=size) == spec.stride
    built = build_tracker(None, folder, image_size=size)
    assert type(built).__name__ == CLASSES[kind]
    assert not built.training
    assert not any(weight.requires_grad for weight in built.parameters())
    if kind != "sam3_video":
        theirs = saved.state_dict()
        assert all(torch.equal(value, theirs[name]) for name, value in built.state_dict().items())


def test_the_tracker_of_a_whole_sam3_sees_what_sam3_sees(
    folders: dict[str, tuple[Path, Any]],
) -> None:
    folder, whole = folders["sam3_video"]
    tracker = build_tracker(None, folder)
    images = torch.randn(1, 3, 112, 112, generator=torch.Generator().manual_seed(0))
    with torch.inference_mode():
        seen = whole.detector_model.vision_encoder(images)
        levels, positions = whole.get_vision_features_for_tracker(seen)
        ours = tracker.get_image_features(images)
    for value, expected in zip(ours.fpn_hidden_states, levels, strict=True):
        torch.testing.assert_close(value, expected)
    torch.testing.assert_close(ours.fpn_position_encoding[-1], positions[-1])


def test_the_hash_is_of_the_weights(folders: dict[str, tuple[Path, Any]], tmp_path: Path) -> None:
    folder, _ = folders["sam3_tracker_video"]
    for name in ("config.json", "model.safetensors"):
        (tmp_path / name).write_bytes((folder / name).read_bytes())
    (tmp_path / "README.md").write_text("about it")
    assert hash_of_checkpoint(tmp_path) == hash_of_checkpoint(folder)
    weights = tmp_path / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-1] + b"\x01")
    assert hash_of_checkpoint(tmp_path) != hash_of_checkpoint(folder)


@pytest.mark.parametrize(
    ("kind", "size", "multiple"),
    [("sam2_video", 144, 32), ("edgetam_video", 96, 64), ("sam3_tracker_video", 1024, 14)],
)
def test_a_size_that_does_not_suit_the_model_is_refused(
    kind: str, size: int, multiple: int, folders: dict[str, tuple[Path, Any]]
) -> None:
    with pytest.raises(ValueError, match=rf"image_size={size} .* multiple of {multiple}; "):
        check_tracker(None, folders[kind][0], image_size=size)


def test_the_image_size_reaches_every_part(folders: dict[str, tuple[Path, Any]]) -> None:
    model = build_tracker(None, folders["sam2_video"][0], image_size=192)
    assert model.image_size == 192
    assert model.prompt_encoder.image_embedding_size == (12, 12)
    assert len(model.memory_attention.position_ids) == 144
    with torch.inference_mode():
        levels = model.get_image_features(torch.zeros(1, 3, 192, 192)).fpn_hidden_states
    assert [len(level) for level in levels] == [48**2, 24**2, 12**2]


def test_another_kind_of_model_is_named_with_what_is_supported(tmp_path: Path) -> None:
    folder = written(tmp_path, {"model_type": "sam2", "architectures": ["Sam2Model"]})
    message = r"of type 'sam2', .*sam2_video .*edgetam_video .*sam3_tracker_video .*sam2 package"
    with pytest.raises(ValueError, match=message):
        check_tracker(None, find_checkpoint(str(folder)))


def test_weights_of_another_configuration_are_refused(
    folders: dict[str, tuple[Path, Any]], tmp_path: Path
) -> None:
    folder, _ = folders["sam2_video"]
    document = json.loads((folder / "config.json").read_text())
    document["memory_attention_num_layers"] = 2
    (tmp_path / "model.safetensors").write_bytes((folder / "model.safetensors").read_bytes())
    with pytest.raises(ValueError, match=r"missing: \d+ \(memory_attention\.layers\.1"):
        check_tracker(None, written(tmp_path, document), image_size=128)


def test_a_sam2_configuration_is_not_for_such_a_folder(
    folders: dict[str, tuple[Path, Any]],
) -> None:
    with pytest.raises(ValueError, match=r"config=sam2\.1_hiera_l is for .* leave it out"):
        check_tracker("sam2.1_hiera_l", folders["sam2_video"][0])


def timm(**fields: Any) -> dict[str, Any]:
    backbone = {"model_type": "timm_wrapper", "architecture": "repvit_m1", **fields}
    return {"model_type": "edgetam_video", "vision_config": {"backbone_config": backbone}}


@pytest.mark.parametrize(
    ("document", "message"),
    [
        (timm(), r"\(repvit_m1\), which is not installed: pip install .sam2videox\[edgetam\]"),
        (timm(architecture="hf-hub:someone/model"), "a model of another package"),
        (timm(model_args={"checkpoint_path": "x"}), "model_args of the backbone may have"),
    ],
)
def test_only_the_backbone_of_edgetam_is_taken_from_timm(
    document: dict[str, Any], message: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("stages.sam2_tracking.transformers_files.find_spec", lambda name: None)
    with pytest.raises(ValueError, match=message):
        check_transformers_tracker(written(tmp_path, document))


def refuse_with(error: Exception) -> Any:
    def download(*_: Any, **__: Any) -> None:
        raise error

    return download


def test_a_gated_checkpoint_says_what_to_accept_and_where(monkeypatch: pytest.MonkeyPatch) -> None:
    gated = GatedRepoError("gated", response=MagicMock())
    monkeypatch.setattr("huggingface_hub.snapshot_download", refuse_with(gated))
    message = r"facebook/sam3 is gated: .*huggingface\.co/facebook/sam3 .*hf auth login"
    for find in (find_checkpoint, lambda name: config_source(name, None)):
        with pytest.raises(ValueError, match=message):
            find("facebook/sam3")


def test_a_failed_download_says_how_to_get_the_folder(monkeypatch: pytest.MonkeyPatch) -> None:
    missing = LocalEntryNotFoundError("no route")
    monkeypatch.setattr("huggingface_hub.snapshot_download", refuse_with(missing))
    message = r"could not be downloaded .*\(no route\); .*--local-dir checkpoints/EdgeTAM-hf"
    with pytest.raises(ValueError, match=message):
        find_checkpoint("yonigozlan/EdgeTAM-hf")
    with pytest.raises(ValueError, match="downloads are disabled"):
        find_checkpoint("yonigozlan/EdgeTAM-hf", download=False)


def test_a_download_is_of_what_is_loaded_alone(
    folders: dict[str, tuple[Path, Any]], monkeypatch: pytest.MonkeyPatch
) -> None:
    folder, _ = folders["edgetam_video"]
    asked: list[Any] = []

    def snapshot(hub_id: str, *, allow_patterns: list[str], **options: Any) -> str:
        asked.append((hub_id, allow_patterns, options["local_files_only"]))
        return str(folder)

    monkeypatch.setattr("huggingface_hub.snapshot_download", snapshot)
    assert config_source("yonigozlan/EdgeTAM-hf", None) == folder
    assert asked == [("yonigozlan/EdgeTAM-hf", ["config.json"], False)]
    assert find_checkpoint("yonigozlan/EdgeTAM-hf") == folder
    [*_, (hub_id, patterns, local)] = asked
    assert (hub_id, local) == ("yonigozlan/EdgeTAM-hf", False)
    assert "config.json" in patterns and not any(".pt" in pattern for pattern in patterns)


WITHOUT_SAM2 = """
import sys
from pathlib import Path
sys.modules["sam2"] = None  # an import of it fails from here on
import numpy as np
import torch
import stages.extract_features.teacher.extraction
from stages.sam2_tracking.inputs import Sam2Prompt
from stages.sam2_tracking.opening import build_tracker, check_tracker, find_checkpoint
from stages.sam2_tracking.tracker import Tracker, TrackRequest
folder = find_checkpoint(sys.argv[1])
tracker = Tracker(build_tracker(None, folder, image_size=128), precision="fp32")
encoded = tracker.encode(np.zeros((2, 128, 128, 3), np.uint8))
prompt = Sam2Prompt(mask_11SS=torch.ones(1, 1, 128, 128))
request = TrackRequest(encoded=encoded, prompt=prompt, order=[0, 1])
print(len(list(tracker.track([request]))), "frames")
try:
    check_tracker(None, Path(sys.argv[2]))
except ValueError as error:
    print(error)
"""


def test_the_sam2_package_is_needed_for_its_own_checkpoints_alone(
    folders: dict[str, tuple[Path, Any]],
    tiny_sam2: tuple[Path, Path],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setitem(sys.modules, "sam2", None)  # an import of it fails
    monkeypatch.delitem(sys.modules, "stages.sam2_tracking.build", raising=False)
    monkeypatch.delattr(stages.sam2_tracking, "build", raising=False)
    build_tracker(None, find_checkpoint(str(folders["sam2_video"][0])), image_size=128)
    message = r"needs the sam2 package, .*; or .* hf download .* --include config\.json"
    with pytest.raises(ValueError, match=message):
        check_tracker(None, find_checkpoint(str(tiny_sam2[1])))
    with pytest.raises(ValueError, match=message):
        find_checkpoint("facebook/sam2.1-hiera-large")


@pytest.mark.slow
def test_no_module_of_extraction_imports_the_sam2_package(
    folders: dict[str, tuple[Path, Any]], tiny_sam2: tuple[Path, Path]
) -> None:
    arguments = [str(folders["sam2_video"][0]), str(tiny_sam2[1])]
    done = subprocess.run(
        [sys.executable, "-c", WITHOUT_SAM2, *arguments],
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert "2 frames" in done.stdout
    assert "needs the sam2 package" in done.stdout
    assert "hf download facebook/sam2.1-hiera-large --include config.json" in done.stdout
