"""Tokens of each family against its official class and the formulas of what published them."""

import copy
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image
from transformers import BitImageProcessorPil, VideoMAEModel

from stages.extract_features.config import VisualConfig
from stages.extract_features.visual.encoder import VisualEncoder, layout_of
from stages.extract_features.visual.extraction import VisualExtraction, make_processor
from stages.files.weight_checks import load_model
from stages.visual_models.folders import processor_file

IMAGE, VIDEO = ("dinov2", "dinov2_with_registers", "dinov3_vit"), ("vjepa2", "videomae")
PREFIX = {"dinov2": 1, "dinov2_with_registers": 4, "dinov3_vit": 4}
MEAN, STD = np.array([0.4, 0.5, 0.6]), np.array([0.2, 0.3, 0.25])


@pytest.fixture(scope="module")
def frames():
    return np.random.default_rng(3).integers(0, 256, (9, 48, 64, 3), dtype=np.uint8)


def resized(frames_THWC, height, width):
    """Whole frames, bicubic by PIL, normalised in float64."""
    values = [
        (np.asarray(Image.fromarray(f).resize((width, height), Image.Resampling.BICUBIC)) / 255.0)
        for f in frames_THWC
    ]
    return torch.from_numpy(((np.stack(values) - MEAN) / STD).transpose(0, 3, 1, 2)).float()


def opened(folder, clips, **settings):
    config = VisualConfig(checkpoint=str(folder), **settings)
    layout = layout_of(config, clips, folder)
    return config, layout, load_model(layout.model_class, folder).eval()


def tokens(folder, clips, pixels, **settings):
    config, layout, whole = opened(folder, clips, **settings)
    return VisualEncoder(whole, layout, config)(pixels)


def close(found, expected):
    torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("family", IMAGE)
def test_an_image_encoder_gives_its_patch_tokens_of_every_frame(family, encoder, clips, frames):
    folder = encoder(family)
    _, layout, whole = opened(folder, clips)
    patch = layout.own.patch_size
    pixels = resized(frames, 3 * patch, 4 * patch)  # one token for each of the student's 3x4
    with torch.no_grad():
        expected = whole(pixels).last_hidden_state[:, PREFIX[family] :].unflatten(1, (3, 4))
    for batch in (1, 4):
        close(tokens(folder, clips, pixels, frames_per_batch=batch), expected)


@pytest.mark.parametrize("family", VIDEO)
def test_a_video_encoder_sees_the_frames_after_the_first_in_windows(family, encoder, clips, frames):
    folder = encoder(family)
    pixels = resized(frames, 32, 32)
    _, _, whole = opened(folder, clips)
    model = whole if family == "vjepa2" else whole.videomae
    options = {"skip_predictor": True} if family == "vjepa2" else {}
    with torch.no_grad():
        windows = [
            model(pixels[None, start : start + 4], **options).last_hidden_state[0]
            for start in (1, 5)
        ]
    found = tokens(folder, clips, pixels)
    assert found.shape == (4, 4, 4, 24)  # tubelets of frames 1-2, 3-4, 5-6 and 7-8
    close(found.flatten(0, 2), torch.cat(windows))


def test_a_last_window_overlaps_and_keeps_only_new_tubelets(encoder, clips, frames):
    folder, pixels = encoder("vjepa2"), resized(frames, 32, 32)
    _, _, whole = opened(folder, clips)
    with torch.no_grad():
        first, last = (
            whole(pixels[None, start : start + 6], skip_predictor=True).last_hidden_state[0]
            for start in (1, 3)
        )
    found = tokens(folder, clips, pixels, window=6)
    close(found.flatten(0, 2), torch.cat([first, last[-16:]]))


def test_videomae_takes_other_sizes_as_videorepa_does(encoder, clips, frames):
    """Table of 2 tubelets of 4x4 tokens -> 4 of 3x6: bicubic in space, then linear in time."""
    folder, pixels = encoder("videomae"), resized(frames, 24, 48)
    _, _, whole = opened(folder, clips)
    table = whole.videomae.embeddings.position_embeddings[0].reshape(2, 4, 4, 24)
    space = torch.stack(
        [
            torch.nn.functional.interpolate(one.permute(2, 0, 1)[None], (3, 6), mode="bicubic")[0]
            for one in table
        ]
    ).numpy()
    position = np.clip((np.arange(4) + 0.5) / 2 - 0.5, 0, 1)[:, None, None, None]
    stretched = (1 - position) * space[:1] + position * space[1:]
    config = copy.deepcopy(whole.config)
    config.image_size, config.num_frames = [24, 48], 8
    larger = VideoMAEModel(config).eval()
    larger.load_state_dict(whole.videomae.state_dict())
    larger.embeddings.position_embeddings = torch.from_numpy(
        stretched.transpose(0, 2, 3, 1).reshape(1, -1, 24)
    ).float()
    with torch.no_grad():
        expected = larger(pixels[None, 1:]).last_hidden_state[0].reshape(4, 3, 6, 24)
    close(tokens(folder, clips, pixels, image_size=(24, 48), window=8), expected)


def test_vjepa2_takes_other_squares(encoder, clips, frames):
    folder, pixels = encoder("vjepa2"), resized(frames, 48, 48)
    config = VisualConfig(checkpoint=str(folder), image_size=(48, 48))
    layout = layout_of(config, clips, folder)
    whole = load_model(layout.model_class, folder, crop_size=48).eval()
    with torch.no_grad():
        expected = whole(pixels[None, 1:5], skip_predictor=True).last_hidden_state[0]
    found = VisualEncoder(whole, layout, config)(pixels)
    assert found.shape == (4, 6, 6, 24)
    close(found[:2].flatten(0, 2), expected)


@pytest.mark.parametrize("layer", [1, pytest.param(2, id="the last, before the final norm")])
@pytest.mark.parametrize("family", [*IMAGE, *VIDEO])
def test_a_layer_is_the_output_of_that_block(family, layer, encoder, clips, frames):
    folder = encoder(family)
    _, layout, whole = opened(folder, clips)
    pixels = resized(frames, *layout.image_size)
    blocks = next(
        module
        for module in whole.modules()
        if isinstance(module, torch.nn.ModuleList) and len(module) == 2
    )
    seen = []
    hook = blocks[layer - 1].register_forward_hook(
        lambda _, __, out: seen.append(out[0] if isinstance(out, tuple) else out)
    )
    config = VisualConfig(checkpoint=str(folder), layer=layer, frames_per_batch=9)
    found = VisualEncoder(whole, layout, config)(pixels)
    hook.remove()
    expected = torch.cat([one[:, PREFIX.get(family, 0) :].flatten(0, 1) for one in seen])
    close(found.flatten(0, 2), expected)


def test_frames_are_resized_whole_as_the_models_own_processor_would(encoder, clips, frames):
    folder = encoder("dinov2")
    _, layout, _ = opened(folder, clips)
    made = make_processor(processor_file(folder), layout)
    found = made(list(frames), input_data_format="channels_last", return_tensors="pt")
    official = BitImageProcessorPil(
        size={"height": 42, "width": 56},
        do_center_crop=False,
        resample=3,
        image_mean=list(MEAN),
        image_std=list(STD),
    )
    expected = official(list(frames), input_data_format="channels_last", return_tensors="pt")
    assert torch.equal(found["pixel_values"][0], expected["pixel_values"])
    close(found["pixel_values"][0], resized(frames, 42, 56))


def test_the_store_holds_tokens_at_the_rate_and_grid_of_the_settings(encoder, clips, frames):
    clip = SimpleNamespace(
        frames_THWC=frames, geometry=SimpleNamespace(as_dict=lambda: {}), key="a"
    )

    def extract(family, **settings):
        config = VisualConfig(checkpoint=str(encoder(family)), **settings)
        extraction = VisualExtraction(config, clips)
        stored = extraction.settings["visual"]
        with extraction.load_model(torch.device("cpu")) as compute:
            arrays = compute([clip])[0]["visual"].arrays
        assert {name: spec.shape for name, spec in stored.arrays.items()} == {
            name: values.shape for name, values in arrays.items()
        }
        return stored.values, arrays["features"].astype(np.float64), arrays["valid"].tolist()

    values, per_frame, valid = extract("dinov2", grid="native")
    assert (values["time_rate"], values["frames_per_map"], valid) == ("frame", None, [1] * 9)
    values, per_latent, valid = extract("dinov2", grid="native", time_rate="latent")
    assert (values["time_rate"], valid) == ("latent", [1] * 3)
    means = [per_frame[[0]].mean(0), per_frame[1:5].mean(0), per_frame[5:].mean(0)]
    assert per_latent == pytest.approx(np.stack(means), abs=2e-3)

    values, tubelets, valid = extract("vjepa2", grid="native")
    assert (values["time_rate"], values["frames_per_map"], values["first_frame"]) == (
        "tubelet",
        2,
        1,
    )
    assert valid == [1] * 4
    values, per_latent, valid = extract("vjepa2", grid="native", time_rate="latent")
    assert (values["frames_per_map"], valid) == (None, [0, 1, 1])
    assert per_latent[1:] == pytest.approx(tubelets.reshape(2, 2, 4, 4, 24).mean(1), abs=2e-3)
    _, regridded, _ = extract("vjepa2")
    expected = torch.nn.functional.interpolate(
        torch.from_numpy(tubelets).permute(0, 3, 1, 2), (3, 4), mode="bilinear", antialias=True
    )
    assert regridded == pytest.approx(expected.permute(0, 2, 3, 1).numpy(), abs=2e-3)
