import numpy as np
import pytest
import torch
from diffusers import (
    CogVideoXImageToVideoPipeline,
    CogVideoXPipeline,
    DiffusionPipeline,
)
from peft import LoraConfig
from PIL import Image

from stages.demo.tiny_cogvideox import build_tiny_cogvideox, build_tiny_vae
from stages.demo.tiny_sam2 import build_tiny_sam2, write_tiny_config
from stages.demo.training.vae import NORM_GROUPS, WIDTHS

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


@pytest.mark.parametrize(
    ("sizes", "channels"),
    [({}, 8), ({"widths": WIDTHS, "latent_channels": 16, "norm_groups": NORM_GROUPS}, 16)],
    ids=["packaged", "training"],
)
def test_vae_compresses_as_the_official_one(sizes, channels):
    vae = build_tiny_vae(0, **sizes)
    pixels = torch.zeros(2, 3, 9, 32, 48)
    with torch.no_grad():
        latents = vae.encode(pixels).latent_dist.mean
        assert latents.shape == (2, channels, 3, 4, 6)
        assert vae.decode(latents).sample.shape == pixels.shape


def test_the_packaged_tiny_sam2_has_the_configuration_that_training_writes(packaged_sam2, tmp_path):
    from stages.sam2_tracking.build import build_sam2

    write_tiny_config(tmp_path / "tiny.yaml")
    packaged = packaged_sam2 / "tiny.yaml"
    assert packaged.read_bytes() == (tmp_path / "tiny.yaml").read_bytes()
    model = build_sam2(packaged, packaged_sam2 / "tiny.safetensors")
    assert model.image_size == 128
    with torch.no_grad():
        features = model.forward_image(torch.randn(1, 3, 128, 128))["backbone_fpn"]
    assert features[-1].shape == (1, 64, 8, 8) and features[-1].std() > 0.01


def test_a_seed_makes_the_same_sam2(tmp_path):
    write_tiny_config(tmp_path / "tiny.yaml")
    state = torch.get_rng_state()
    one, other = (build_tiny_sam2(tmp_path / "tiny.yaml", seed=3).state_dict() for _ in range(2))
    assert all(torch.equal(one[key], other[key]) for key in one)
    assert torch.equal(torch.get_rng_state(), state), "the caller's random state is its own"
