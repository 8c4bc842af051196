"""What the text encoder says of the prompts."""

import diffusers
import pytest
import torch

from stages.config import BaseModelConfig
from stages.progress import SilentProgress
from stages.train_student.parallel.process_group import World
from stages.train_student.validation.text import encode_prompts

WORLD = World(rank=0, local_rank=0, size=1, device=torch.device("cpu"))


def encode(base, kept, prompts=("a cat", "")):
    return encode_prompts(
        prompts,
        BaseModelConfig(path=str(base)),
        length=32,
        dtype=torch.float32,
        cache_file=kept,
        world=WORLD,
        progress=SilentProgress(),
    )


def test_prompts_are_encoded_as_the_pipeline_does(whole_base, tmp_path):
    before = torch.get_rng_state()
    found = encode(whole_base, tmp_path / "prompts.safetensors")
    assert torch.equal(before, torch.get_rng_state())
    pipeline = diffusers.CogVideoXPipeline.from_pretrained(whole_base)
    with torch.no_grad():
        expected, negative = pipeline.encode_prompt("a cat", max_sequence_length=32)
    assert torch.equal(found["a cat"], expected)
    assert torch.equal(found[""], negative)
    assert not found["a cat"].requires_grad


def test_a_second_start_loads_no_encoder(whole_base, monkeypatch, tmp_path):
    kept = tmp_path / "prompts.safetensors"
    first = encode(whole_base, kept)

    def never(*args, **kwargs):
        raise AssertionError("the encoder was loaded")

    with monkeypatch.context() as patch:
        patch.setattr(diffusers.CogVideoXPipeline, "from_pretrained", never)
        again = encode(whole_base, kept)
        assert all(torch.equal(first[prompt], again[prompt]) for prompt in first)
        with pytest.raises(ValueError, match="was loaded"):
            encode(whole_base, kept, prompts=("a dog",))
    kept.write_bytes(kept.read_bytes()[:100])
    again = encode(whole_base, kept)
    assert torch.equal(first["a cat"], again["a cat"])
