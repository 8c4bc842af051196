"""What the text encoder says of the prompts."""

from types import SimpleNamespace

import diffusers
import pytest
import torch

from stages.config import BaseModelConfig
from stages.progress import SilentProgress
from stages.students.registry import read_configs
from stages.train_student.config import TrainConfig
from stages.train_student.parallel.process_group import World
from stages.train_student.validation.samples import embed_prompts

WORLD = World(rank=0, local_rank=0, size=1, device=torch.device("cpu"))


def encode(base, run_dir, prompts=("a cat",)):
    run = SimpleNamespace(
        config=TrainConfig(run_dir=run_dir, samples={"prompts": prompts}),
        model=BaseModelConfig(path=str(base)),
        configs=read_configs(base),
        dtype=torch.float32,
        world=WORLD,
        progress=SilentProgress(),
    )
    return embed_prompts(run)


def test_prompts_are_encoded_as_the_pipeline_does(whole_base, tmp_path):
    before = torch.get_rng_state()
    found = encode(whole_base, tmp_path)
    assert torch.equal(before, torch.get_rng_state())
    pipeline = diffusers.CogVideoXPipeline.from_pretrained(whole_base)
    with torch.no_grad():
        expected, negative = pipeline.encode_prompt("a cat", max_sequence_length=32)
    assert torch.equal(found["a cat"], expected)
    assert torch.equal(found[""], negative)
    assert not found["a cat"].requires_grad


def test_a_second_start_loads_no_encoder(whole_base, monkeypatch, tmp_path):
    kept = tmp_path / "samples" / "prompts.safetensors"
    first = encode(whole_base, tmp_path)

    def never(*args, **kwargs):
        raise AssertionError("the encoder was loaded")

    with monkeypatch.context() as patch:
        patch.setattr(diffusers.CogVideoXPipeline, "from_pretrained", never)
        again = encode(whole_base, tmp_path)
        assert all(torch.equal(first[prompt], again[prompt]) for prompt in first)
        with pytest.raises(ValueError, match="was loaded"):
            encode(whole_base, tmp_path, prompts=("a dog",))
    kept.write_bytes(kept.read_bytes()[:100])
    again = encode(whole_base, tmp_path)
    assert torch.equal(first["a cat"], again["a cat"])
