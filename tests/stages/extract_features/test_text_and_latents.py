"""Text embeddings against CogVideoXPipeline, latents against the VAE, image noise on its own."""

import logging
import math
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from diffusers import AutoencoderKLCogVideoX, CogVideoXPipeline

from stages.clips import ClipRecord, ClipsConfig, ClipSkipped, encode_video, load_clip
from stages.config import BaseModelConfig
from stages.extract_features.config import Kind, LatentsConfig, TextConfig
from stages.extract_features.extraction import Extracted, Outcome
from stages.extract_features.latents import (
    LatentsExtraction,
    pixels_for_vae,
)
from stages.extract_features.text import TextExtraction
from stages.students.cogvideox.first_frames import image_noise_draws
from stages.students.hub import resolve_base_model
from stages.students.registry import read_configs
from stages.students.student import StudentConfigs

CPU = torch.device("cpu")
LONG = " ".join(["an ellipse drifts over a grey texture to the right"] * 8)


def configs(base: BaseModelConfig) -> StudentConfigs:
    return read_configs(Path(base.path))


def only(kind: Kind, outcomes: Sequence[Outcome]) -> Extracted:
    """What was extracted of the only clip."""
    (outcome,) = outcomes
    assert not isinstance(outcome, ClipSkipped), outcome
    return outcome[kind]


@pytest.mark.parametrize("caption", ["a red ellipse drifts to the right", "", LONG])
def test_text_equals_the_pipelines_prompt_encoding(
    caption: str, tiny_base: BaseModelConfig
) -> None:
    extraction = TextExtraction(TextConfig(), configs(tiny_base))
    with extraction.load_model(CPU) as extract:
        extracted = only("text", extract([caption]))
    pipeline = CogVideoXPipeline.from_pretrained(tiny_base.path)
    length = pipeline.transformer.config.max_text_seq_length
    with torch.no_grad():
        expected, _ = pipeline.encode_prompt(
            caption, do_classifier_free_guidance=False, max_sequence_length=length
        )
    np.testing.assert_array_equal(extracted.arrays["embeds"], expected[0].half().numpy())
    tokens = len(pipeline.tokenizer(caption).input_ids)
    assert extracted.attributes == {"caption": caption, "tokens_cut": max(0, tokens - length)}
    assert (caption == LONG) == (tokens > length)


def test_a_clip_without_caption_is_skipped(tiny_base: BaseModelConfig) -> None:
    record = ClipRecord(key="a", video=b"")
    with pytest.raises(ClipSkipped, match="no_caption"):
        TextExtraction(TextConfig(), configs(tiny_base)).prepare(record)


@pytest.fixture
def record(draw_frames, two_shards: ClipsConfig) -> ClipRecord:
    frames_THWC = draw_frames(two_shards.num_frames, two_shards.height, two_shards.width)
    return ClipRecord(key="walk/1", video=encode_video(frames_THWC, 8.0), caption="")


def test_latents_are_the_vaes_posterior(
    record: ClipRecord, two_shards: ClipsConfig, tiny_base: BaseModelConfig
) -> None:
    extraction = LatentsExtraction(LatentsConfig(), two_shards, configs(tiny_base), seed=0)
    with extraction.load_model(CPU) as extract:
        arrays = only("latents", extract([extraction.prepare(record)])).arrays
    vae = AutoencoderKLCogVideoX.from_pretrained(tiny_base.path, subfolder="vae")
    frames_THWC = load_clip(record, two_shards).frames_THWC
    pixels = torch.from_numpy(frames_THWC / 255.0).float().mul(2).sub(1)
    with torch.no_grad():
        posterior = vae.encode(pixels.permute(3, 0, 1, 2)[None]).latent_dist
    assert sorted(arrays) == ["mean", "std"]
    for name, expected in (("mean", posterior.mean), ("std", posterior.std)):
        expected_FCHW = expected[0].permute(1, 0, 2, 3).numpy()
        assert (
            arrays[name].shape
            == expected_FCHW.shape
            == extraction.settings["latents"].arrays[name].shape
        )
        np.testing.assert_allclose(arrays[name], expected_FCHW, atol=1e-5, rtol=2e-3)


def test_image_to_video_adds_the_first_frames_posterior(
    record: ClipRecord, two_shards: ClipsConfig, tiny_image_base: BaseModelConfig
) -> None:
    extraction = LatentsExtraction(LatentsConfig(), two_shards, configs(tiny_image_base), seed=3)
    with extraction.load_model(CPU) as extract:
        arrays, again = (
            only("latents", extract([extraction.prepare(record)])).arrays for _ in range(2)
        )
    assert sorted(arrays) == sorted(extraction.settings["latents"].arrays)
    vae = AutoencoderKLCogVideoX.from_pretrained(tiny_image_base.path, subfolder="vae")
    image = pixels_for_vae(load_clip(record, two_shards).frames_THWC)[:, :, :1]
    assert arrays["image_mean"].shape == (8, *arrays["mean"].shape[1:])
    for draw, noisy in enumerate(image_noise_draws(image, record.key, 3, 8)):
        with torch.no_grad():
            posterior = vae.encode(noisy).latent_dist
        for name, expected in (("image_mean", posterior.mean), ("image_std", posterior.std)):
            np.testing.assert_allclose(arrays[name][draw], expected[0, :, 0], atol=1e-5, rtol=2e-3)
    np.testing.assert_array_equal(arrays["image_mean"], again["image_mean"])
    other = LatentsExtraction(LatentsConfig(), two_shards, configs(tiny_image_base), seed=4)
    assert other.settings["latents"].hash != extraction.settings["latents"].hash


def test_the_seed_is_no_setting_where_nothing_is_drawn(
    two_shards: ClipsConfig, tiny_base: BaseModelConfig
) -> None:
    hashes = {
        LatentsExtraction(LatentsConfig(), two_shards, configs(tiny_base), seed=seed)
        .settings["latents"]
        .hash
        for seed in (0, 1)
    }
    assert len(hashes) == 1


def test_a_vae_of_another_compression_is_refused(
    two_shards: ClipsConfig, tiny_base: BaseModelConfig
) -> None:
    base = configs(tiny_base)
    shallow = replace(base, vae={**base.vae, "block_out_channels": [8, 8]})
    with pytest.raises(ValueError, match=r"compresses time and space by \(4, 2\)"):
        LatentsExtraction(LatentsConfig(), two_shards, shallow, seed=0)


@pytest.mark.parametrize(("clips", "draws"), [(400, 1), (50, 8)])
def test_image_noise_has_the_published_spread(clips: int, draws: int) -> None:
    flat = torch.zeros(1, 3, 1, 32, 32)
    noises = [n for clip in range(clips) for n in image_noise_draws(flat, f"{clip}", 0, draws)]
    logs = torch.stack([noise.std().log() for noise in noises])
    assert logs.mean().item() == pytest.approx(-3.0, abs=4 * 0.5 / math.sqrt(400))
    assert logs.std().item() == pytest.approx(0.5, rel=0.15)


def test_the_draws_of_one_clip_have_the_published_spread() -> None:
    flat = torch.zeros(1, 3, 1, 32, 32)
    logs = torch.stack([n.std().log() for n in image_noise_draws(flat, "clip", 0, 8)])
    edges = -3.0 + 0.5 * torch.special.ndtri(torch.arange(1, 8) / 8)
    # Noise of 3072 values tells its sigma to 1 / sqrt(2 * 3072) = 1.3%.
    assert (logs[:-1] <= edges + 0.06).all() and (logs[1:] >= edges - 0.06).all()


def test_image_noise_depends_on_the_clip_and_the_seed_alone() -> None:
    flat = torch.zeros(1, 3, 1, 8, 8)
    first, again, key, seed = (
        torch.cat([*image_noise_draws(flat, key, seed, 4)])
        for key, seed in (("a", 0), ("a", 0), ("b", 0), ("a", 1))
    )
    assert torch.equal(first, again)
    assert not torch.equal(first, key) and not torch.equal(first, seed)
    assert len({float(draw.sum()) for draw in first}) == 4


def test_the_number_of_image_draws_is_a_setting_where_images_are_drawn(
    two_shards: ClipsConfig, tiny_base: BaseModelConfig, tiny_image_base: BaseModelConfig
) -> None:
    for base, stores in ((tiny_base, 1), (tiny_image_base, 2)):
        hashes = {
            LatentsExtraction(LatentsConfig(image_draws=draws), two_shards, configs(base), seed=0)
            .settings["latents"]
            .hash
            for draws in (1, 8)
        }
        assert len(hashes) == stores


def test_tiling_and_precision_name_other_stores(
    two_shards: ClipsConfig, tiny_base: BaseModelConfig
) -> None:
    base = configs(tiny_base)
    hashes = {
        LatentsExtraction(config, two_shards, base, seed=0).settings["latents"].hash
        for config in (LatentsConfig(), LatentsConfig(tiling=True), LatentsConfig(precision="bf16"))
    }
    assert len(hashes) == 3


def test_other_weights_name_another_store_and_another_place_does_not(
    tiny_base: BaseModelConfig, tmp_path: Path
) -> None:
    import shutil

    copy = tmp_path / "copy"
    shutil.copytree(tiny_base.path, copy)
    (copy / "tokenizer" / ".cache").mkdir()
    (copy / "tokenizer" / ".cache" / "download.lock").touch()

    def settings_hash(base: StudentConfigs) -> str:
        return TextExtraction(TextConfig(), base).settings["text"].hash

    original = settings_hash(configs(tiny_base))
    assert settings_hash(read_configs(copy)) == original
    weights = copy / "text_encoder" / "model.safetensors"
    changed = bytearray(weights.read_bytes())
    changed[-1] ^= 1
    weights.write_bytes(changed)
    assert settings_hash(read_configs(copy)) != original


def test_a_base_model_without_its_parts_says_what_is_missing(
    tiny_base: BaseModelConfig, tmp_path: Path
) -> None:
    assert resolve_base_model(tiny_base, ("vae", "transformer/config.json")) == Path(tiny_base.path)
    (tmp_path / "model_index.json").touch()
    with pytest.raises(ValueError, match=r"has no vae; model.path must be a diffusers pipeline"):
        resolve_base_model(BaseModelConfig(path=str(tmp_path)), ("vae",))


def test_only_the_parts_asked_for_are_downloaded(
    monkeypatch: pytest.MonkeyPatch, tiny_base: BaseModelConfig
) -> None:
    asked: dict[str, object] = {}

    def snapshot_download(repo_id: str, **arguments: object) -> str:
        asked.update(arguments, repo_id=repo_id)
        return tiny_base.path

    monkeypatch.setattr("huggingface_hub.snapshot_download", snapshot_download)
    hub = BaseModelConfig(path="zai-org/CogVideoX-5b", revision="abc")
    assert resolve_base_model(hub, ("vae", "transformer/config.json")) == Path(tiny_base.path)
    assert asked["repo_id"] == "zai-org/CogVideoX-5b"
    assert asked["revision"] == "abc"
    patterns = asked["allow_patterns"]
    assert isinstance(patterns, list)
    assert {"model_index.json", "vae/*", "transformer/config.json"} <= set(patterns)
    assert not any(pattern in ("*", "transformer/*", "transformer") for pattern in patterns)


def test_a_base_model_that_is_nowhere_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    with pytest.raises(ValueError, match="is not a local folder, and it could not be downloaded"):
        resolve_base_model(BaseModelConfig(path="not//an id"), ("vae",))


def test_a_caption_that_is_too_long_is_counted_without_a_warning_of_indexing_errors(
    tiny_base: BaseModelConfig, caplog: pytest.LogCaptureFixture
) -> None:
    of_library = logging.getLogger("transformers")
    of_library.addHandler(caplog.handler)
    try:
        extraction = TextExtraction(TextConfig(), configs(tiny_base))
        with extraction.load_model(CPU) as extract:
            extracted = only("text", extract([LONG]))
    finally:
        of_library.removeHandler(caplog.handler)
    tokens_cut = extracted.attributes["tokens_cut"]
    assert isinstance(tokens_cut, int) and tokens_cut > 0
    assert not caplog.records
