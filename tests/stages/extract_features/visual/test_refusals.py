"""What is refused before any clip is read, what a store's hash covers, and official sizes."""

import json
import shutil
from pathlib import Path
from types import SimpleNamespace

import pytest
from huggingface_hub.errors import GatedRepoError

from stages.clips import ClipsConfig
from stages.dry_run.extract_costs import visual_cost
from stages.dry_run.extract_stores import bytes_of, planned_passes
from stages.extract_features.config import ExtractConfig, VisualConfig
from stages.extract_features.visual.encoder import layout_of
from stages.extract_features.visual.extraction import VisualExtraction, visual_settings


def opened(folder, clips, **settings):
    return VisualExtraction(VisualConfig(checkpoint=str(folder), **settings), clips)


@pytest.fixture
def copied(encoder, tmp_path):
    """Returns a function that copies a tiny encoder and edits one of its JSON files."""

    def copy(family, name="config.json", drop=(), **values):
        folder = tmp_path / family
        shutil.copytree(encoder(family), folder)
        content = json.loads((folder / name).read_text()) | values
        for key in drop:
            del content[key]
        (folder / name).write_text(json.dumps(content))
        return folder

    return copy


@pytest.mark.parametrize(
    ("family", "settings", "told"),
    [
        ("dinov2", {"layer": 3}, "visual.layer=3, but .* has 2 blocks"),
        ("dinov2", {"image_size": (40, 56)}, r"multiples of 14 pixels, such as \[42, 56\]"),
        ("vjepa2", {"image_size": (32, 48)}, r"V-JEPA 2 takes squares.*\[32, 32\] is its own"),
        ("videomae", {"window": 3}, "visual.window=3, but .* multiples of 2 frames"),
    ],
)
def test_settings_that_do_not_fit_the_encoder(family, settings, told, encoder, clips):
    with pytest.raises(ValueError, match=told):
        opened(encoder(family), clips, **settings)


def test_another_family_is_named_with_those_that_are_supported(copied, clips):
    folder = copied("dinov2", model_type="VideoMAEv2_Base", auto_map={"AutoModel": "code.Model"})
    with pytest.raises(
        ValueError, match=r"type 'VideoMAEv2_Base'; supported are dinov2, .*videomae; set extract"
    ):
        opened(folder, clips)


def test_a_damaged_configuration(copied, clips):
    with pytest.raises(ValueError, match=r"config\.json does not describe a Dinov2Model"):
        opened(copied("dinov2", hidden_size="wide"), clips)


def test_tubelets_that_lie_in_two_latent_frames(copied, clips):
    with pytest.raises(ValueError, match="tubelets of 3 frames, which lie in two latent frames"):
        opened(copied("vjepa2", tubelet_size=3), clips)


def test_a_preprocessor_without_a_value_is_not_guessed(copied, clips):
    folder = copied("dinov2", "preprocessor_config.json", drop=("image_mean",))
    with pytest.raises(ValueError, match=r"preprocessor_config\.json has no image_mean"):
        opened(folder, clips)


def test_missing_weights(copied, clips):
    folder = copied("dinov2")
    (folder / "model.safetensors").unlink()
    with pytest.raises(ValueError, match=r"has no model\.safetensors"):
        opened(folder, clips)


def test_a_gated_checkpoint_says_where_to_accept_its_terms(clips, monkeypatch):
    name = "facebook/dinov3-vitb16-pretrain-lvd1689m"

    def refuse(*_, **__):
        raise GatedRepoError("gated", response=SimpleNamespace(headers={}, request=None))

    monkeypatch.setattr("huggingface_hub.snapshot_download", refuse)
    with pytest.raises(
        ValueError,
        match=rf"gated: accept its terms at https://huggingface.co/{name} .*auth login",
    ):
        opened(name, clips)


def test_a_name_that_cannot_be_downloaded_fails_a_run_and_is_noted_by_an_estimate(no_hub, clips):
    with pytest.raises(ValueError, match=r"nobody/nothing is not a local folder"):
        opened("nobody/nothing", clips)
    config = ExtractConfig(kinds=("visual",), visual=VisualConfig(checkpoint="nobody/nothing"))
    (planned,) = planned_passes(config, clips, None)
    assert planned.arrays is None
    assert "nobody/nothing is not a local folder" in planned.notes[0]


def test_the_hash_covers_all_that_changes_a_value(encoder, copied, clips):
    base = opened(encoder("dinov2"), clips).settings["visual"]
    changes = (
        {"image_size": (28, 28)},
        {"layer": 1},
        {"time_rate": "latent"},
        {"grid": "native"},
        {"dtype": "int8"},
        {"precision": "bf16"},
    )
    hashes = {opened(encoder("dinov2"), clips, **one).settings["visual"].hash for one in changes}
    values = copied("dinov2", "preprocessor_config.json", image_mean=[0.5, 0.5, 0.5])
    hashes |= {base.hash, opened(values, clips).settings["visual"].hash}
    assert len(hashes) == len(changes) + 2
    same = opened(encoder("dinov2"), clips, frames_per_batch=7).settings["visual"]
    assert same.hash == base.hash


OFFICIAL = {
    "dinov2": ("Dinov2Model", {"patch_size": 14, "image_size": 518, "hidden_size": 768}),
    "dinov3_vit": ("DINOv3ViTModel", {"hidden_size": 768, "num_hidden_layers": 12}),
    "vjepa2": ("VJEPA2Model", {}),
    "videomae": ("VideoMAEForPreTraining", {"use_mean_pooling": False}),
}


@pytest.mark.parametrize(
    ("family", "settings", "shape", "megabytes"),
    [
        ("dinov2", {}, (49, 30, 45, 768), 101.6),
        ("dinov2", {"time_rate": "latent", "dtype": "int8"}, (13, 30, 45, 768), 13.5),
        ("dinov3_vit", {"time_rate": "latent"}, (13, 30, 45, 768), 27.0),
        ("vjepa2", {"grid": "native"}, (24, 16, 16, 1024), 12.6),
        ("videomae", {"image_size": (160, 240), "grid": "native"}, (24, 10, 15, 768), 5.5),
    ],
)
def test_official_sizes_in_shapes_and_bytes(family, settings, shape, megabytes, tmp_path):
    """The table of docs/teachers.md."""
    name, values = OFFICIAL[family]
    content = {"model_type": family, "architectures": [name], **values}
    (tmp_path / "config.json").write_text(json.dumps(content))
    clips = ClipsConfig(path=Path("unused"))
    config = VisualConfig(checkpoint=str(tmp_path), **settings)
    layout = layout_of(config, clips, tmp_path)
    arrays = visual_settings(config, clips, layout, checkpoint_sha256="").arrays
    assert arrays["features"].shape == shape
    assert bytes_of(arrays) / 1e6 == pytest.approx(megabytes, abs=0.06)


def test_an_estimate_counts_every_frame_from_shapes_alone(encoder, clips):
    folder = encoder("dinov2")
    one, nine = (VisualConfig(checkpoint=str(folder), frames_per_batch=n) for n in (1, 9))
    layout = layout_of(one, clips, folder)
    found = visual_cost(one, clips, layout)
    assert found.clip_flops == pytest.approx(visual_cost(nine, clips, layout).clip_flops)
    tokens, width, blocks = 13, 24, 2
    linear = 2 * tokens * width * width * 12  # queries, keys, values, output, and an MLP of 4
    attention = 4 * tokens * tokens * width
    patches = 2 * 12 * width * 3 * 14 * 14
    assert found.clip_flops == pytest.approx(9 * (blocks * (linear + attention) + patches), rel=0.1)
