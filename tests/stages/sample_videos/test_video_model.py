"""Facts about a model known before it is loaded: video size and settings."""

import json
import shutil
from pathlib import Path

import pytest
from PIL import Image
from safetensors.torch import load_file, save_file

from stages.config import BaseModelConfig
from stages.sample_videos.requests import VideoRequest
from stages.sample_videos.sample import open_video_model
from stages.students.registry import read_configs


def test_learned_positions_fit_one_size(base, clips, tmp_path):
    """CogVideoX-5b-I2V; diffusers refuses other sizes only after everything is loaded."""
    copy = shutil.copytree(base.path, tmp_path / "copy")
    file = copy / "transformer" / "config.json"
    settings = json.loads(file.read_text()) | {"use_learned_positional_embeddings": True}
    file.write_text(json.dumps(settings))
    read_configs(copy).check_video_size(clips)
    with pytest.raises(ValueError, match=r"learned positions for 32x48 .* got 32x64"):
        read_configs(copy).check_video_size(clips.model_copy(update={"width": 64}))
    read_configs(Path(base.path)).check_video_size(clips.model_copy(update={"width": 64}))


def test_what_changes_the_pixels_is_part_of_the_settings(config, base, clips, lora_run, full_run):
    """Equal settings mean that a video need not be made again."""

    def settings(run_dir=None, **update):
        changed = config.model_copy(update=update)
        return open_video_model(changed, base, clips, run_dir=run_dir).settings

    changes = [
        {"steps": 3},
        {"guidance": 2.0},
        {"dynamic_cfg": True},
        {"scheduler": "dpm"},
        {"num_frames": 17},
        {"height": 48},
        {"fps": 9.0},
        {"precision": "bf16"},
        {"tiling": True},
    ]
    weak, strong = lora_run("weak", strength=0.1), lora_run("strong")
    found = [
        settings(),
        *(settings(**one) for one in changes),
        settings(weak),
        settings(strong),
        settings(strong, lora_scale=0.5),
        settings(full_run()),
    ]
    assert all(one != other for n, one in enumerate(found) for other in found[:n])
    assert settings(lora_scale=0.5, device="cuda", seed=3) == settings()
    moved = strong.rename(strong.with_name("moved"))
    assert settings(moved) == found[-3]


@pytest.mark.parametrize(
    ("part", "file"),
    [
        ("vae", "diffusion_pytorch_model.safetensors"),
        ("text_encoder", "model.safetensors"),
        ("transformer", "diffusion_pytorch_model.safetensors"),
    ],
)
def test_another_base_model_gives_other_settings(config, base, clips, tmp_path, part, file):
    copy = shutil.copytree(base.path, tmp_path / "copy")
    moved = BaseModelConfig(path=str(copy))
    found = open_video_model(config, base, clips, run_dir=None).settings
    assert open_video_model(config, moved, clips, run_dir=None).settings == found
    weights = load_file(copy / part / file)
    name = max(weights, key=lambda name: weights[name].numel())
    save_file(weights | {name: weights[name] + 1}, copy / part / file, {"format": "pt"})
    assert open_video_model(config, moved, clips, run_dir=None).settings != found


def test_another_noise_schedule_gives_other_settings(config, base, clips, tmp_path):
    copy = shutil.copytree(base.path, tmp_path / "copy")
    file = copy / "scheduler" / "scheduler_config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"beta_end": 0.013}))
    found = [
        open_video_model(config, one, clips, run_dir=None).settings
        for one in (base, BaseModelConfig(path=str(copy)))
    ]
    assert found[0] != found[1]


def test_the_image_is_part_of_what_a_video_is_made_from(config, bases, clips, tmp_path):
    model = open_video_model(config, BaseModelConfig(path=str(bases / "i2v")), clips, run_dir=None)
    image = tmp_path / "image.png"
    found = []
    for value in (0, 255):
        Image.new("L", (48, 32), value).save(image)
        found.append(model.made_from(VideoRequest(prompt="a", seed=0, image=image)))
    assert found[0] != found[1]
    assert found[0].keys() == found[1].keys() >= model.settings.keys()
