from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import (
    AutoencoderKLCogVideoX,
    CogVideoXImageToVideoPipeline,
    CogVideoXPipeline,
    DiffusionPipeline,
)
from peft import LoraConfig
from PIL import Image

from stages.demo import draw_clip
from stages.demo.pretraining import fit_tiny_vae
from stages.demo.tiny_cogvideox import build_tiny_cogvideox, build_tiny_vae
from stages.demo.tiny_sam2 import build_tiny_sam2

_CAPTIONS = ("A biped walks to the left over sand.", "A quadruped trots to the right.")
_SIZE = {"height": 32, "width": 48, "num_frames": 9}


@pytest.fixture(scope="module", params=[False, True], ids=["t2v", "i2v"])
def pipeline(request, tmp_path_factory) -> DiffusionPipeline:
    folder = tmp_path_factory.mktemp("pipeline")
    build_tiny_cogvideox(
        folder, captions=_CAPTIONS, seed=0, image_to_video=request.param, num_layers=2, **_SIZE
    )
    modes = {file.stat().st_mode & 0o777 for file in folder.rglob("*") if file.is_file()}
    assert len(modes) == 1, "the weights have the mode of the other files"
    loaded = DiffusionPipeline.from_pretrained(folder)
    expected = CogVideoXImageToVideoPipeline if request.param else CogVideoXPipeline
    assert type(loaded) is expected
    loaded.set_progress_bar_config(disable=True)
    return loaded


def test_the_saved_pipeline_samples(pipeline):
    takes_image = isinstance(pipeline, CogVideoXImageToVideoPipeline)
    image = {"image": Image.new("RGB", (48, 32))} if takes_image else {}
    video = pipeline(
        prompt="a biped walks",
        num_inference_steps=2,
        max_sequence_length=pipeline.transformer.config.max_text_seq_length,
        generator=torch.Generator().manual_seed(0),
        output_type="np",
        **_SIZE,
        **image,
    ).frames[0]
    assert video.shape == (9, 32, 48, 3) and np.isfinite(video).all() and video.std() > 0


def test_the_transformer_takes_adapters_where_the_official_one_does(pipeline):
    adapter = LoraConfig(r=2, target_modules=["to_q", "to_k", "to_v", "to_out.0"])
    pipeline.transformer.add_adapter(adapter)
    trained = [name for name, weight in pipeline.transformer.named_parameters() if "lora" in name]
    assert len(trained) == 2 * 4 * 2  # blocks, modules, A and B
    pipeline.transformer.delete_adapters(["default"])


def test_the_tokenizer_knows_its_words_and_spells_others(pipeline):
    tokenizer = pipeline.tokenizer
    known = tokenizer.convert_ids_to_tokens(tokenizer("quadruped walks left").input_ids)
    assert known == ["▁quadruped", "▁walks", "▁left", "</s>"]
    unknown = tokenizer("zebra").input_ids
    assert tokenizer.unk_token_id not in unknown and len(unknown) > 3


def test_vae_compresses_as_the_official_one():
    vae = build_tiny_vae(0)
    pixels = torch.zeros(2, 3, 9, 32, 48)
    with torch.no_grad():
        latents = vae.encode(pixels).latent_dist.mean
        assert latents.shape == (2, 8, 3, 4, 6)
        assert vae.decode(latents).sample.shape == pixels.shape


def test_fitting_lowers_the_error_and_sets_the_scale():
    clips = np.stack(
        [draw_clip(s, num_frames=9, height=32, width=48).frames_THWC for s in range(2)]
    )
    errors: list[float] = []

    class Task:
        def advance(self, amount: int = 1) -> None:
            pass

        def note(self, text: str) -> None:
            errors.append(float(text.removeprefix("error ")))

    def fitted() -> AutoencoderKLCogVideoX:
        vae = build_tiny_vae(0)
        task: Any = Task()
        fit_tiny_vae(vae, clips, steps=8, seed=0, task=task)
        return vae

    first, second = fitted(), fitted()
    assert len(errors) == 16 and errors[7] < 0.8 * errors[0]
    for one, other in zip(first.parameters(), second.parameters(), strict=True):
        assert torch.equal(one, other)
    pixels = torch.from_numpy(clips).permute(0, 4, 1, 2, 3).float() / 127.5 - 1
    with torch.no_grad():
        latents = first.encode(pixels).latent_dist.sample(torch.Generator().manual_seed(0))
    assert (latents * first.config.scaling_factor).std().item() == pytest.approx(1, rel=0.05)


def test_the_tiny_sam2_loads_as_a_checkpoint_in_the_official_format(tmp_path):
    from stages.sam2_tracking.build import build_sam2

    build_tiny_sam2(tmp_path, seed=0)
    content = torch.load(tmp_path / "tiny.pt", weights_only=True)
    assert set(content) == {"model"}
    model = build_sam2(tmp_path / "tiny.yaml", tmp_path / "tiny.pt")
    assert model.image_size == 128
    with torch.no_grad():
        features = model.forward_image(torch.randn(1, 3, 128, 128))["backbone_fpn"]
    assert features[-1].shape == (1, 64, 8, 8) and features[-1].std() > 0.01


def test_a_seed_makes_the_same_models(tmp_path):
    state = torch.get_rng_state()
    for name in ("a", "b"):
        build_tiny_sam2(tmp_path / name, seed=3)
    one, other = (torch.load(tmp_path / n / "tiny.pt")["model"] for n in ("a", "b"))
    assert all(torch.equal(one[key], other[key]) for key in one)
    assert torch.equal(torch.get_rng_state(), state), "the caller's random state is its own"
    assert Path(tmp_path / "a" / "tiny.yaml").read_text() == (tmp_path / "b/tiny.yaml").read_text()
