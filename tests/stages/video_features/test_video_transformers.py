"""VideoMAE and V-JEPA 2: features by PIL, numpy and the model alone; folders that are refused."""

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file
from transformers import VideoMAEModel, VJEPA2Model

from stages.video_features.config import FeaturesConfig
from stages.video_features.opening import open_network
from stages.video_features.video_transformers import VideoTransformer

CPU = torch.device("cpu")
MEAN, STD = [0.485, 0.456, 0.406], [0.229, 0.224, 0.225]


def by_hand(frames_THWC: np.ndarray, *, edge: int, crop: int) -> torch.Tensor:
    """Pixel values [1, T, C, H, W]: shortest edge by PIL, centre crop, normalised in float64."""
    values = []
    for frame in frames_THWC:
        height, width, _ = frame.shape
        short = min(height, width)
        size = (width * edge // short, height * edge // short)
        image = np.asarray(Image.fromarray(frame).resize(size, Image.Resampling.BILINEAR))
        top, left = (image.shape[0] - crop) // 2, (image.shape[1] - crop) // 2
        image = image[top : top + crop, left : left + crop] / 255.0
        values.append(((image - MEAN) / STD).transpose(2, 0, 1))
    return torch.from_numpy(np.stack(values)[None]).float()


def edit(folder: Path, name: str, **values: object) -> None:
    file = folder / name
    file.write_text(json.dumps({**json.loads(file.read_text()), **values}))


@pytest.fixture
def frames() -> np.ndarray:
    return np.random.default_rng(3).integers(0, 256, (8, 48, 64, 3), dtype=np.uint8)


def open_folder(folder, clips, **settings):
    return VideoTransformer(FeaturesConfig(network=str(folder), **settings), clips)


@pytest.mark.parametrize(
    "name", ["VideoMAEModel", "VideoMAEForPreTraining", "VideoMAEForVideoClassification"]
)
def test_videomae_is_the_mean_of_the_last_tokens(name, tiny_videomae, clips, frames):
    folder = tiny_videomae(name)
    network = open_folder(folder, clips)
    assert network.protocol.clips.num_frames == 4
    found = network.load(CPU)(frames[:4])
    with torch.no_grad():
        tokens = VideoMAEModel.from_pretrained(folder).eval()(by_hand(frames[:4], edge=32, crop=32))
    expected = tokens.last_hidden_state[0].double().mean(dim=0).numpy()
    assert found.dtype == np.float32
    assert found == pytest.approx(expected, rel=1e-4, abs=1e-5)


@pytest.mark.parametrize("name", ["VJEPA2Model", "VJEPA2ForVideoClassification"])
@pytest.mark.parametrize("num_frames", [None, 4])
def test_vjepa2_is_the_mean_of_the_encoders_tokens(name, num_frames, tiny_vjepa2, clips, frames):
    folder = tiny_vjepa2(name)
    network = open_folder(folder, clips, num_frames=num_frames)
    count = num_frames or 8
    assert network.protocol.clips.num_frames == count
    found = network.load(CPU)(frames[:count])
    model = VJEPA2Model.from_pretrained(folder).eval()
    with torch.no_grad():
        tokens = model.get_vision_features(by_hand(frames[:count], edge=36, crop=32))
    assert found == pytest.approx(tokens[0].double().mean(dim=0).numpy(), rel=1e-4, abs=1e-5)


def test_protocol_names_everything(tiny_vjepa2, clips):
    text = open_folder(tiny_vjepa2(), clips).protocol.text
    for part in ("tiny-vjepa2", "SHA-256", "8 frames", "8 fps", "48x64", "edge to 36", "32x32"):
        assert part in text


class TestRefused:
    def test_another_model(self, tiny_videomae, clips):
        folder = tiny_videomae()
        edit(folder, "config.json", model_type="vit")
        with pytest.raises(
            ValueError, match="model of type 'vit'; supported are videomae, vjepa2; set"
        ):
            open_folder(folder, clips)

    def test_another_class(self, tiny_vjepa2, clips):
        folder = tiny_vjepa2()
        edit(folder, "config.json", architectures=["VJEPA2Other"])
        with pytest.raises(ValueError, match="expected one of VJEPA2Model"):
            open_folder(folder, clips)

    def test_a_folder_without_its_processor(self, tiny_vjepa2, clips):
        folder = tiny_vjepa2()
        (folder / "video_preprocessor_config.json").unlink()
        with pytest.raises(ValueError, match=r"has no video_preprocessor_config\.json or"):
            open_folder(folder, clips)

    def test_another_crop_than_the_models(self, tiny_videomae, clips):
        folder = tiny_videomae()
        edit(folder, "preprocessor_config.json", crop_size={"height": 24, "width": 24})
        with pytest.raises(ValueError, match="cropped to 24x24, but the model takes 32x32"):
            open_folder(folder, clips)

    def test_a_crop_larger_than_the_resized_frames(self, tiny_videomae, clips):
        folder = tiny_videomae()
        edit(folder, "preprocessor_config.json", size={"shortest_edge": 16})
        with pytest.raises(ValueError, match="resized to 16 and cropped to 32x32"):
            open_folder(folder, clips)

    def test_a_processor_without_a_step(self, tiny_videomae, clips):
        folder = tiny_videomae()
        edit(folder, "preprocessor_config.json", do_center_crop=False)
        with pytest.raises(ValueError, match="do_center_crop is false"):
            open_folder(folder, clips)

    @pytest.mark.parametrize(
        "values", [{"image_mean": [0.5, 0.5]}, {"resample": "fine"}, {"size": {"edge": 32}}]
    )
    def test_values_that_cannot_be_used(self, values, tiny_videomae, clips):
        folder = tiny_videomae()
        edit(folder, "preprocessor_config.json", **values)
        with pytest.raises(ValueError, match=r"preprocessor_config\.json"):
            open_folder(folder, clips)

    def test_missing_weights(self, tiny_videomae, clips):
        folder = tiny_videomae()
        tensors = load_file(folder / "model.safetensors")
        tensors.pop(next(name for name in tensors if "encoder" in name))
        save_file(tensors, folder / "model.safetensors", {"format": "pt"})
        with pytest.raises(ValueError, match=r"do not match its config\.json"):
            open_folder(folder, clips)

    def test_pickled_weights(self, tiny_videomae, clips):
        folder = tiny_videomae()
        tensors = load_file(folder / "model.safetensors")
        torch.save(tensors, folder / "pytorch_model.bin")
        (folder / "model.safetensors").unlink()
        with pytest.raises(ValueError, match="only from safetensors"):
            open_folder(folder, clips)

    def test_frames_that_the_model_cannot_process(self, tiny_videomae, tiny_vjepa2, clips):
        with pytest.raises(ValueError, match="takes 4 frames, no more and no fewer"):
            open_folder(tiny_videomae(), clips, num_frames=8)
        with pytest.raises(ValueError, match="takes multiples of 2; 8 is its own"):
            open_folder(tiny_vjepa2(), clips, num_frames=5)

    def test_a_name_that_is_neither_file_nor_folder_nor_on_the_hub(self, no_hub, clips):
        with pytest.raises(ValueError, match=r"nobody/nothing is not a local folder"):
            open_network(FeaturesConfig(network="nobody/nothing"), clips)


def test_the_hash_covers_what_is_loaded(tiny_videomae, clips, tmp_path):
    folder = tiny_videomae()
    before = open_folder(folder, clips).protocol
    moved = tmp_path / "moved"
    shutil.copytree(folder, moved)
    (moved / "README.md").write_text("other files do not matter")
    assert open_folder(moved, clips).protocol.digest == before.digest
    for name, values in (
        ("preprocessor_config.json", {"image_mean": [0.5, 0.5, 0.5]}),
        ("config.json", {"layer_norm_eps": 1e-6}),
    ):
        edit(moved, name, **values)
        after = open_folder(moved, clips).protocol
        assert after.digest != before.digest
        before = after


def test_without_a_network_there_is_none(clips):
    assert open_network(FeaturesConfig(), clips) is None


def test_files_are_torchscript_and_folders_are_not(tiny_i3d, tiny_videomae, clips, tmp_path):
    for network in (tiny_i3d[0], tiny_videomae()):
        found = open_network(FeaturesConfig(network=str(network)), clips)
        assert found is not None and found.protocol.network == network.name
    with pytest.raises(ValueError, match="there is no file"):
        open_network(FeaturesConfig(network=str(tmp_path / "gone.pt")), clips)
