import os

import pytest
import torch
from diffusers import CogVideoXTransformer3DModel
from peft import LoraConfig, get_peft_model_state_dict

from stages.clips import ClipsConfig
from stages.config import BaseModelConfig
from stages.demo.tiny_cogvideox import build_tiny_cogvideox
from stages.sample_videos.config import SampleConfig

HEIGHT, WIDTH, FRAMES = 32, 48, 9


@pytest.fixture(scope="session")
def bases(tmp_path_factory):
    """A text-to-video and an image-to-video pipeline with random weights, at 9 x 32 x 48."""
    root = tmp_path_factory.mktemp("bases")
    for name in ("t2v", "i2v"):
        build_tiny_cogvideox(
            root / name,
            height=HEIGHT,
            width=WIDTH,
            num_frames=FRAMES,
            captions=["a person walks to the right"],
            seed=0,
            image_to_video=name == "i2v",
            num_layers=2,
            num_heads=2,
            head_width=16,
        )
    return root


@pytest.fixture
def base(bases):
    return BaseModelConfig(path=str(bases / "t2v"))


@pytest.fixture
def clips(tmp_path):
    return ClipsConfig(path=tmp_path, num_frames=FRAMES, height=HEIGHT, width=WIDTH)


@pytest.fixture
def config():
    return SampleConfig(steps=2, guidance=3.0, precision="fp32", device="cpu")


@pytest.fixture
def lora_run(bases, tmp_path):
    """Write a run's export with adapters, saved by diffusers and peft alone."""

    def write(name="lora", *, alpha=4.0, rank=2, strength=0.5, modules=("to_q", "to_v"), **kinds):
        from diffusers import CogVideoXPipeline

        torch.manual_seed(0)
        transformer = CogVideoXTransformer3DModel.from_pretrained(bases / "t2v" / "transformer")
        settings = LoraConfig(r=rank, lora_alpha=alpha, target_modules=list(modules), **kinds)
        transformer.add_adapter(settings)
        for parameter_name, parameter in transformer.named_parameters():
            if "lora_B" in parameter_name:
                torch.nn.init.normal_(parameter, std=strength)
        run = tmp_path / "runs" / name
        CogVideoXPipeline.save_lora_weights(
            run / "export",
            transformer_lora_layers=get_peft_model_state_dict(transformer),
            transformer_lora_adapter_metadata=transformer.peft_config["default"].to_dict(),
        )
        return run

    return write


@pytest.fixture
def full_run(bases, tmp_path):
    """Write a run's export with a whole transformer."""

    def write(name="full", **changes):
        transformer = CogVideoXTransformer3DModel.from_pretrained(bases / "t2v" / "transformer")
        torch.manual_seed(1)
        if changes:
            transformer = CogVideoXTransformer3DModel(**(dict(transformer.config) | changes))
        torch.nn.init.normal_(transformer.proj_out.weight, std=0.5)
        run = tmp_path / "runs" / name
        transformer.save_pretrained(run / "export" / "transformer")
        return run

    return write


@pytest.fixture
def finish():
    def mark(run, when, model="base"):
        run.mkdir(parents=True, exist_ok=True)
        (run / "config.yaml").write_text(f"model:\n  path: {model}\n  revision: null\n")
        (run / "finished.json").write_text("{}")
        os.utime(run / "finished.json", (when, when))
        return run

    return mark
