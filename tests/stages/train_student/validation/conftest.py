"""Whole tiny pipelines, with text encoder and VAE, and stores that fit them."""

import pytest

from stages.demo.tiny_cogvideox import build_tiny_cogvideox
from stages.students.registry import read_configs

PROMPTS = ["a person walks to the right", "a cat", "a dog"]


@pytest.fixture(scope="session", params=["t2v"])
def whole_base(request, tiny, tmp_path_factory):
    """The folder of a pipeline that can be sampled from."""
    folder = tmp_path_factory.mktemp("whole") / request.param
    build_tiny_cogvideox(
        folder,
        height=tiny.HEIGHT,
        width=tiny.WIDTH,
        num_frames=tiny.FRAMES,
        captions=PROMPTS,
        seed=0,
        image_to_video=request.param == "i2v",
        num_layers=2,
        num_heads=2,
        head_width=16,
    )
    return folder


@pytest.fixture(scope="session")
def whole_cache(tiny, whole_base, tmp_path_factory):
    """Stores for `whole_base`."""
    configs = read_configs(whole_base)
    frames, _, height, width = tiny.LATENT
    latent = (frames, configs.latent_channels, height, width)
    root = tmp_path_factory.mktemp("cache")
    text = (configs.transformer["max_text_seq_length"], configs.transformer["text_embed_dim"])
    tiny.write_store(root, "text", {"embeds": text})
    shapes = {"mean": latent, "std": latent}
    if configs.image_to_video:
        shapes |= dict.fromkeys(("image_mean", "image_std"), (tiny.DRAWS, *latent[1:]))
    tiny.write_store(root, "latents", shapes, values=tiny.IMAGE_VALUES)
    tiny.write_teacher(root)
    return root


@pytest.fixture
def train_whole(train, whole_base, whole_cache):
    """Train on them: train_whole(run_dir, **changed settings) -> TrainSummary."""

    def run(run_dir, **changes):
        return train(run_dir, base=whole_base, cache_root=whole_cache, **changes)

    return run
