"""Packaged official configurations against those in the hub cache."""

import json
import shutil

import pytest

from stages.config import BaseModelConfig
from stages.students.cogvideox.official_models import FOLDER, NAMES
from stages.students.official_models import configs_for_estimate, official_configs

HUB_IDS = {
    "zai-org/CogVideoX-2b": "cogvideox-2b",
    "zai-org/CogVideoX-5b": "cogvideox-5b",
    "zai-org/CogVideoX-5b-I2V": "cogvideox-5b-i2v",
    "zai-org/CogVideoX1.5-5B": "cogvideox1.5-5b",
    "zai-org/CogVideoX1.5-5B-I2V": "cogvideox1.5-5b-i2v",
    "THUDM/CogVideoX-5b": "cogvideox-5b",
}


def put_in_cache(cache, name, **changes):
    """A snapshot of the configurations as the hub's client keeps them; returns its folder."""
    repository = cache / f"models--zai-org--{name}"
    snapshot = repository / "snapshots" / "abc"
    shutil.copytree(FOLDER / name.lower(), snapshot)
    shutil.copytree(FOLDER / "text_encoder", snapshot / "text_encoder")
    (repository / "refs").mkdir()
    (repository / "refs" / "main").write_text("abc")
    for part, change in changes.items():
        file = next((snapshot / part).glob("*.json"))
        file.write_text(json.dumps(json.loads(file.read_text()) | change))
    return snapshot


@pytest.mark.parametrize(("hub_id", "name"), HUB_IDS.items())
def test_an_official_model_is_known_by_its_hub_id(no_hub, hub_id, name):
    configs, (note,) = configs_for_estimate(BaseModelConfig(path=hub_id), text_encoder=True)
    assert configs == official_configs(name)
    assert configs.text_encoder["d_model"] == configs.transformer["text_embed_dim"]
    assert f"{hub_id} is not on this machine yet" in note
    assert set(HUB_IDS.values()) == set(NAMES)


def test_files_in_the_hubs_cache_decide(no_hub):
    folder = put_in_cache(no_hub, "CogVideoX-5b")
    configs, notes = configs_for_estimate(BaseModelConfig(path="zai-org/CogVideoX-5b"))
    assert configs.folder == folder
    assert notes == ()


def test_a_value_that_differs_from_the_copy_is_told_and_used(no_hub):
    put_in_cache(no_hub, "CogVideoX-5b", vae={"scaling_factor": 0.9}, text_encoder={"d_kv": 32})
    configs, notes = configs_for_estimate(BaseModelConfig(path="zai-org/CogVideoX-5b"))
    assert configs.latent_scale == 0.9
    assert "vae" in notes[0] and "scaling_factor = 0.9 instead of 0.7" in notes[0]
    assert "d_kv = 32 instead of 64" in notes[1]
    assert len(notes) == 2


@pytest.mark.parametrize(
    "model",
    [
        BaseModelConfig(path="zai-org/CogVideoX-5b", revision="main"),
        BaseModelConfig(path="someone/CogVideoX-5b"),
    ],
)
def test_another_revision_or_owner_is_asked_for_at_the_hub(no_hub, model):
    with pytest.raises(ValueError, match="could not be downloaded"):
        configs_for_estimate(model)
