"""Stage one with Wan: text, latents and first frames, chosen by the base model alone."""

from collections.abc import Mapping
from pathlib import Path

import numpy as np
import pytest
import torch
from diffusers import AutoencoderKLWan

from stages.clips import ClipRecord, ClipsConfig, load_clip, open_dataset
from stages.config import BaseModelConfig
from stages.demo.tiny_wan import build_tiny_wan
from stages.extract_features.config import ExtractConfig
from stages.extract_features.extraction import Extracted
from stages.extract_features.kinds import make_extractions
from stages.extract_features.latents import pixels_for_vae
from stages.students.registry import read_configs

CPU = torch.device("cpu")


@pytest.fixture(scope="module", params=[False, True], ids=["t2v", "i2v"])
def base(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("wan") / "base"
    build_tiny_wan(folder, captions=["a red ellipse"], seed=0, image_to_video=request.param)
    return folder


@pytest.fixture(scope="module")
def record(two_shards: ClipsConfig) -> ClipRecord:
    found = next(iter(open_dataset(two_shards).shards[0].records()))
    assert isinstance(found, ClipRecord)
    return found


@pytest.fixture(scope="module")
def entries(base: Path, two_shards: ClipsConfig, record: ClipRecord) -> Mapping[str, Extracted]:
    config = ExtractConfig(kinds=("text", "latents"), device="cpu")
    found: dict[str, Extracted] = {}
    for extraction in make_extractions(config, [two_shards], BaseModelConfig(path=str(base))):
        with extraction.load_model(CPU) as extract:
            (outcome,) = extract([extraction.prepare(record)])
        assert isinstance(outcome, Mapping)
        for kind, entry in outcome.items():
            specs = extraction.settings[kind].arrays
            shapes = {name: array.shape for name, array in entry.arrays.items()}
            assert shapes == {name: spec.shape for name, spec in specs.items()}
            found[kind] = entry
    return found


def test_latents_are_the_vaes_posterior(
    base: Path, two_shards: ClipsConfig, record: ClipRecord, entries: Mapping[str, Extracted]
) -> None:
    vae = AutoencoderKLWan.from_pretrained(base / "vae")
    pixels_BCTHW = pixels_for_vae(load_clip(record, two_shards).frames_THWC)
    with torch.no_grad():
        posterior = vae.encode(pixels_BCTHW).latent_dist
    arrays = entries["latents"].arrays
    for name, expected_BCFHW in (("mean", posterior.mean), ("std", posterior.std)):
        found = torch.from_numpy(arrays[name])
        assert torch.equal(found, expected_BCFHW[0].transpose(0, 1).half())


def test_text_is_zero_after_the_caption(entries: Mapping[str, Extracted]) -> None:
    embeds_LD = entries["text"].arrays["embeds"]
    assert embeds_LD.shape == (512, 16)
    length = int(np.flatnonzero(embeds_LD.any(axis=1)).max()) + 1
    assert 3 < length < 100
    assert entries["text"].attributes["tokens_cut"] == 0


def test_first_frames_are_of_image_to_video_alone(
    base: Path, entries: Mapping[str, Extracted]
) -> None:
    names = entries["latents"].arrays.keys()
    of_image = {"image_latents", "image_embeds"}
    assert names & of_image == (of_image if read_configs(base).image_to_video else set())
