"""The estimate of a probe against the FLOPs that torch counts in one, and what it refuses."""

from pathlib import Path

import pytest
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from cache_schema import StoreReader
from stages.config import BaseModelConfig
from stages.probe_blocks import blockwise
from stages.probe_blocks.config import ProbeConfig
from stages.probe_blocks.estimate import estimate_probe
from stages.probe_blocks.probe import probe_blocks
from stages.progress import SilentProgress
from stages.train_student.config import TrainConfig
from tests.stages.probe_blocks.test_probe import SETTINGS, TRAIN
from tests.stages.train_student import conftest as tiny


@pytest.fixture(scope="module")
def arguments(tmp_path_factory):
    """Arguments of a probe of a text-to-video model of three blocks."""
    folder = tmp_path_factory.mktemp("estimated")
    base = tiny.save_pipeline(folder, transformer=tiny.tiny_transformer(num_layers=3))
    cache = tiny.write_cache(folder / "cache")
    return TrainConfig(**TRAIN), tiny.CLIPS, BaseModelConfig(path=str(base)), cache


def test_operations_are_those_of_the_probe(arguments, tmp_path, monkeypatch):
    monkeypatch.setattr("stages.probe_blocks.probe.draw_heat_map", lambda results: b"picture")
    config = ProbeConfig(**SETTINGS | {"blocks": (0, 1)})
    found = estimate_probe(config, *arguments)
    # Attention as matrix products: the fused kernel of a CPU is not counted.
    with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
        probe_blocks(config, *arguments, tmp_path, provenance={}, progress=SilentProgress())
    assert found.flops == pytest.approx(counter.get_total_flops(), rel=0.05)
    assert (found.blocks, found.num_blocks, found.num_blocks_passed) == ((0, 1), 3, 2)
    assert found.seconds > 0


def test_bytes_are_those_of_the_clips_and_of_their_tokens(arguments):
    found = estimate_probe(ProbeConfig(**SETTINGS), *arguments)
    cache = arguments[-1]
    wanted = SETTINGS["clips"] + SETTINGS["held_out"]
    assert (found.clips + found.held_out, found.blocks) == (wanted, (0, 1, 2))
    # All clips of the made-up stores are of one size.
    of_one = sum(StoreReader(store).num_bytes / len(tiny.KEYS) for store in cache.iterdir())
    assert found.read_bytes == pytest.approx(wanted * of_one, rel=0.01)
    frames, _, height, width = tiny.LATENT
    tokens = frames * (height // 2) * (width // 2) + tiny.TEXT[0]
    passes = wanted * len(SETTINGS["timesteps"])
    assert found.token_bytes == passes * tokens * 32 * 4
    block = tiny.tiny_transformer(num_layers=1).transformer_blocks
    assert found.block_bytes == sum(4 * weight.numel() for weight in block.parameters())


def test_no_weight_is_loaded(arguments, monkeypatch):
    def load(*arguments, **named):
        raise AssertionError("a weight was loaded")

    monkeypatch.setattr(blockwise, "safe_open", load)
    estimate_probe(ProbeConfig(**SETTINGS), *arguments)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"blocks": (3,)}, "probe.blocks must be of 0 to 2"),
        ({"timesteps": (1000,)}, "probe.timesteps must be"),
        ({"clips": 1000}, "lower them, or extract more clips"),
    ],
)
def test_a_bad_setting_is_found(arguments, changes, message):
    with pytest.raises(ValueError, match=message):
        estimate_probe(ProbeConfig(**SETTINGS | changes), *arguments)


def test_a_base_model_without_weights_is_found(arguments, tmp_path):
    train, clips, _, cache = arguments
    base = tiny.save_pipeline(tmp_path)
    for file in Path(base).glob("transformer/*.safetensors"):
        file.unlink()
    with pytest.raises(ValueError, match="transformer"):
        estimate_probe(
            ProbeConfig(**SETTINGS), train, clips, BaseModelConfig(path=str(base)), cache
        )
