"""Loading of VBench's networks: DINO against its equations, and what is refused before any work."""

import json
import math
import shutil
import sys

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from scipy.special import erf

from stages.video_scores.vbench.config import VBenchConfig
from stages.video_scores.vbench.networks import VBenchModels
from stages.video_scores.vbench.preprocess import clip_input, dino_input, dinov2_input

CPU = torch.device("cpu")


def load(**paths):
    config = VBenchConfig(**{name: str(path) for name, path in paths.items()})
    return VBenchModels(config, CPU).load()


def frames_of(count, height, width):
    generator = torch.Generator().manual_seed(0)
    return torch.randint(0, 256, (count, 3, height, width), generator=generator).float()


class TestDino:
    """The class token after the last norm, as in facebookresearch/dino at 7c446df."""

    def positions(self, table_1ND, rows, columns):
        """Bicubic (a = -0.75) onto a grid with 0.1 patches more than there are."""
        side = math.isqrt(len(table_1ND) - 1)
        grid = table_1ND[1:].reshape(side, side, -1)
        for axis, length in enumerate((rows, columns)):
            weights = np.zeros((length, side))
            for target in range(length):
                centre = (target + 0.5) * side / (length + 0.1) - 0.5
                for tap in range(math.floor(centre) - 1, math.floor(centre) + 3):
                    x = abs(tap - centre)
                    inner = 1.25 * x**3 - 2.25 * x**2 + 1
                    outer = -0.75 * (x**3 - 5 * x**2 + 8 * x - 4)
                    weight = inner if x <= 1 else outer
                    weights[target, min(max(tap, 0), side - 1)] += weight
            grid = np.moveaxis(np.tensordot(weights, grid, (1, axis)), 0, axis)
        return np.concatenate([table_1ND[:1], grid.reshape(rows * columns, -1)])

    def feature(self, weights, pixels_CHW, *, patch, heads, square):
        """float64, one image."""

        def of(prefix, *names):
            (value,) = (
                value
                for key, value in weights.items()
                if key.startswith(prefix) and key.endswith(names)
            )
            return value

        def norm(x, key):
            x = (x - x.mean(-1, keepdims=True)) / np.sqrt(x.var(-1, keepdims=True) + 1e-6)
            return x * weights[f"{key}.weight"] + weights[f"{key}.bias"]

        def linear(x, prefix, *names):
            weight, bias = (
                of(prefix, *(f"{n}.{kind}" for n in names)) for kind in ("weight", "bias")
            )
            return x @ weight.T + bias

        _, height, width = pixels_CHW.shape
        rows, columns = height // patch, width // patch
        kernel = weights["embeddings.patch_embeddings.projection.weight"]
        tokens = [weights["embeddings.cls_token"][0, 0]]
        for row in range(rows):
            for column in range(columns):
                y, x = patch * row, patch * column
                piece = pixels_CHW[:, y : y + patch, x : x + patch]
                bias = weights["embeddings.patch_embeddings.projection.bias"]
                tokens.append(np.tensordot(kernel, piece, 3) + bias)
        table = weights["embeddings.position_embeddings"][0]
        x = np.array(tokens) + (table if square else self.positions(table, rows, columns))
        for layer in range(2):
            key = next(k for k in weights if f".{layer}." in k).partition(f".{layer}.")[0]
            key = f"{key}.{layer}."
            y = norm(x, f"{key}layernorm_before")
            width_of_head = x.shape[1] // heads
            query, keys, value = (
                linear(y, key, *names).reshape(len(x), heads, width_of_head)
                for names in (("query", "q_proj"), ("key", "k_proj"), ("value", "v_proj"))
            )
            scores = np.einsum("nhd,mhd->hnm", query, keys) / math.sqrt(width_of_head)
            scores = np.exp(scores - scores.max(-1, keepdims=True))
            scores /= scores.sum(-1, keepdims=True)
            mixed = np.einsum("hnm,mhd->nhd", scores, value).reshape(len(x), -1)
            x = x + linear(mixed, key, "attention.output.dense", "o_proj")
            y = linear(norm(x, f"{key}layernorm_after"), key, "intermediate.dense", "fc1")
            y = y * (1 + erf(y / math.sqrt(2))) / 2
            x = x + linear(
                y,
                f"{key}output" if f"{key}output.dense.weight" in weights else key,
                "output.dense",
                "fc2",
            )
        return norm(x, "layernorm")[0]

    @pytest.mark.parametrize(("height", "width"), [(160, 240), (230, 224), (200, 200)])
    def test_features_are_those_of_dinos_own_code(self, vision_folders, height, width):
        frames_BCHW = frames_of(2, height, width)
        found_BD = load(dino=vision_folders["dino"]).dino(frames_BCHW)
        weights = {
            key: value.double().numpy()
            for key, value in load_file(vision_folders["dino"] / "model.safetensors").items()
        }
        for found_D, pixels_CHW in zip(found_BD, dino_input(frames_BCHW), strict=True):
            expected = self.feature(
                weights, pixels_CHW.double().numpy(), patch=16, heads=2, square=height == width
            )
            np.testing.assert_allclose(found_D.numpy(), expected, atol=2e-4)


def test_clip_gives_the_projected_image_feature(vision_folders):
    from transformers import CLIPModel

    frames_BCHW = frames_of(3, 150, 200)
    model = CLIPModel.from_pretrained(vision_folders["clip"]).eval()
    pooled_BD = model.vision_model(clip_input(frames_BCHW)).pooler_output
    expected = pooled_BD @ model.visual_projection.weight.T
    found = load(clip=vision_folders["clip"]).clip(frames_BCHW)
    np.testing.assert_allclose(found.numpy(), expected.detach().numpy(), atol=1e-5)


def test_dinov2_moves_positions_as_its_own_code_does(vision_folders):
    """Without the tenth of a patch it is transformers' feature, and that is another one."""
    from transformers import Dinov2Model

    frames_BCHW = frames_of(2, 150, 200)
    model = Dinov2Model.from_pretrained(vision_folders["dinov2"]).eval()
    pixels_BCHW = dinov2_input(frames_BCHW)
    unmoved = model(pixels_BCHW).pooler_output.detach().numpy()
    table_ND = model.embeddings.position_embeddings[0].double().detach().numpy()
    moved = torch.from_numpy(TestDino().positions(table_ND, 16, 16)).float()[None]
    model.embeddings.interpolate_pos_encoding = lambda *_: moved
    expected = model(pixels_BCHW).pooler_output.detach().numpy()
    found = load(dinov2=vision_folders["dinov2"]).dinov2(frames_BCHW).numpy()
    np.testing.assert_allclose(found, expected, atol=1e-4)
    assert np.abs(found - unmoved).max() > 1e-3


def test_batches_do_not_change_features(vision_folders):
    frames_BCHW = frames_of(3, 150, 200)
    networks = load(**vision_folders)
    for encode in (networks.dino, networks.clip, networks.dinov2):
        single = torch.cat([encode(frame_CHW[None]) for frame_CHW in frames_BCHW])
        np.testing.assert_allclose(encode(frames_BCHW).numpy(), single.numpy(), atol=1e-4)


def test_amt_is_asked_for_the_middle_of_two_frames(amt_file):
    first, second = frames_of(2, 128, 144)[:, None]
    middle = load(amt=amt_file).interpolate(first, second)
    np.testing.assert_allclose(middle.numpy(), ((first + second) / 510).numpy(), atol=1e-6)


def test_raft_sees_colours_from_minus_1_to_1_and_updates_20_times(raft_file):
    first, second = frames_of(2, 128, 136)[:, None]
    flow = load(raft=raft_file).flow(first, second)
    expected = 20 * 2 * (second - first)[:, :2] / 255
    np.testing.assert_allclose(flow.numpy(), expected.numpy(), atol=1e-4)


def test_dreamsim_sees_colours_from_0_to_1(dreamsim_file):
    (feature,) = load(dreamsim=dreamsim_file).dreamsim(torch.full((1, 3, 130, 140), 51.0))
    np.testing.assert_allclose(feature.numpy(), [0.2, 0.2, 0.2], atol=1e-6)


def test_without_settings_there_are_no_networks():
    networks = load()
    assert networks.dino is networks.clip is networks.dinov2 is networks.dreamsim is None
    assert networks.flow is networks.interpolate is None


class TestRefused:
    """Each before a video is read; the message names the setting and what to do."""

    def check(self, message, **paths):
        config = VBenchConfig(**{name: str(path) for name, path in paths.items()})
        with pytest.raises(ValueError, match=message) as raised:
            VBenchModels(config, CPU)
        (name,) = paths
        assert f"evaluate.vbench.{name}" in str(raised.value)

    @pytest.mark.parametrize("name", ["dino", "clip", "dinov2"])
    def test_another_model(self, vision_folders, name):
        other = "dino" if name == "clip" else "clip"
        self.check("architectures is", **{name: vision_folders[other]})

    @pytest.mark.parametrize("name", ["dino", "clip", "dinov2"])
    def test_another_size_of_patches(self, vision_folders, tmp_path, name):
        folder = shutil.copytree(vision_folders[name], tmp_path / "model")
        config = json.loads((folder / "config.json").read_text())
        config.get("vision_config", config)["patch_size"] = 8
        weights = load_file(folder / "model.safetensors")
        (kernel,) = (key for key, value in weights.items() if value.ndim == 4)
        weights[kernel] = weights[kernel][..., :8, :8].contiguous()
        config.get("vision_config", config)["image_size"] = {
            "dino": 112,
            "clip": 56,
            "dinov2": 296,
        }[name]
        save_file(weights, folder / "model.safetensors", {"format": "pt"})
        (folder / "config.json").write_text(json.dumps(config))
        self.check("patches of 8 pixels", **{name: folder})

    def test_a_dino_with_missing_weights(self, vision_folders, tmp_path):
        folder = shutil.copytree(vision_folders["dino"], tmp_path / "model")
        weights = load_file(folder / "model.safetensors")
        del weights["layernorm.weight"]
        save_file(weights, folder / "model.safetensors", {"format": "pt"})
        self.check("missing: 1", dino=folder)

    def test_a_name_that_is_no_folder_and_no_hub_id(self):
        self.check("is not a local folder", dino="no/such/folder")

    @pytest.mark.parametrize("name", ["raft", "amt", "dreamsim"])
    def test_a_missing_file(self, tmp_path, name):
        self.check("there is no file", **{name: tmp_path / "missing"})

    def test_raft_without_torchvision(self, raft_file, monkeypatch):
        monkeypatch.setitem(sys.modules, "torchvision.models.optical_flow", None)
        self.check("needs torchvision", raft=raft_file)

    @pytest.mark.parametrize("content", [{"module.fnet.conv1.weight": torch.zeros(1)}, b"damaged"])
    def test_other_weights_than_torchvisions(self, raft_file, content):
        if isinstance(content, bytes):
            raft_file.write_bytes(content)
        else:
            torch.save(content, raft_file)
        self.check("does not hold torchvision's weights", raft=raft_file)

    def test_torchscript_of_another_network(self, amt_file, dreamsim_file):
        self.check("cannot be run", amt=dreamsim_file)
        self.check("cannot be run", dreamsim=amt_file)

    def test_an_interpolation_of_another_shape(self, tmp_path):
        trace = torch.jit.trace(
            lambda a, b, t: (a + b * t)[:, :1], (*torch.rand(2, 1, 3, 8, 8), torch.ones(1, 1, 1, 1))
        )
        trace.save(str(tmp_path / "grey.pt"))
        self.check(r"gives \(1, 1, 128, 128\)", amt=tmp_path / "grey.pt")
