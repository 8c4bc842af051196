"""Every official SAM2 and SAM2.1 is known, told apart from the others, and tracked like stock."""

from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from sam2.build_sam import build_sam2_video_predictor

from stages.sam2_tracking.build import (
    HUB_CHECKPOINTS,
    build_sam2,
    check_sam2,
    official_configs,
)
from stages.sam2_tracking.inputs import Sam2Prompt
from stages.sam2_tracking.tracker import Tracker, TrackRequest

OFFICIAL = [
    f"{version}_hiera_{size}" for version in ("sam2", "sam2.1") for size in ("t", "s", "b+", "l")
]
CONFUSED = [
    ("sam2_hiera_t", "sam2.1_hiera_t"),
    ("sam2.1_hiera_s", "sam2.1_hiera_t"),
    ("sam2.1_hiera_l", "sam2.1_hiera_b+"),
    ("sam2.1_hiera_l", "sam2_hiera_l"),
]
SMALL = 128


@cache
def shapes(name: str, image_size: int = 1024) -> dict[str, torch.Size]:
    """Of the tensors in an official checkpoint."""
    model = build_sam2(name, None, image_size=image_size, device="meta")
    return {key: value.shape for key, value in model.state_dict().items()}


@pytest.fixture
def checkpoint_of(tmp_path: Path) -> Callable[[str], Path]:
    """Writes a checkpoint that has an official one's tensors, each one zero seen many times."""

    def write(name: str) -> Path:
        file = tmp_path / f"{name}.pt"
        weights = {key: torch.zeros(()).expand(shape) for key, shape in shapes(name).items()}
        torch.save({"model": weights}, file)
        return file

    return write


@pytest.mark.parametrize("name", OFFICIAL)
def test_an_official_checkpoint_finds_its_configuration(
    name: str, checkpoint_of: Callable[[str], Path]
) -> None:
    checkpoint = checkpoint_of(name)
    assert checkpoint.stat().st_size < 1e6
    facts = check_sam2(None, checkpoint, image_size=1024)
    assert facts.config_name == name
    assert (facts.hidden_dim, facts.mem_dim) == (256, 64)
    assert facts.config["image_size"] == 1024
    facts = check_sam2(name, checkpoint, image_size=512)
    assert facts.config["memory_attention"]["layer"]["self_attention"]["feat_sizes"] == [32, 32]


@pytest.mark.parametrize(("checkpoint", "config"), CONFUSED)
def test_a_wrong_checkpoint_is_refused_with_the_configuration_it_fits(
    checkpoint: str, config: str, checkpoint_of: Callable[[str], Path]
) -> None:
    with pytest.raises(ValueError, match=f"set extract.teacher.config={checkpoint}$"):
        check_sam2(config, checkpoint_of(checkpoint))


def test_no_two_official_checkpoints_have_the_same_tensors() -> None:
    """So that each of the 56 wrong pairs is refused."""
    distinct = {tuple(sorted(shapes(name).items())) for name in OFFICIAL}
    assert len(distinct) == len(OFFICIAL)


def test_every_checkpoint_on_the_hub_names_an_official_configuration() -> None:
    from sam2.build_sam import HF_MODEL_ID_TO_FILENAMES

    assert sorted(config for config, _ in HUB_CHECKPOINTS.values()) == sorted(OFFICIAL)
    for hub_id, (config, file) in HUB_CHECKPOINTS.items():
        stock_config, stock_file = HF_MODEL_ID_TO_FILENAMES[hub_id]
        assert official_configs()[config].match(stock_config)
        assert file == stock_file


def prompt() -> Sam2Prompt:
    return Sam2Prompt(
        points_1P2=torch.tensor([[[20.0, 32.0], [70.0, 98.0]]]),
        point_labels_1P=torch.tensor([[2, 3]], dtype=torch.int32),
    )


@pytest.mark.slow
@pytest.mark.parametrize("name", OFFICIAL)
def test_every_official_size_tracks_like_the_stock_predictor(
    name: str,
    draw_frames: Callable[..., np.ndarray],
    stock_runner: Callable[..., Any],
) -> None:
    """Random weights at 128 pixels: the widths and depths are the official ones."""
    torch.manual_seed(0)
    model = build_sam2(name, None, image_size=SMALL)
    for key, weight in model.named_parameters():
        if key.endswith("gamma"):
            weight.normal_(std=0.1)
        elif "pos_embed" in key or (key.endswith("bias") and not weight.any()):
            weight.normal_(std=0.02)
    model.sam_mask_decoder.pred_obj_score_head.layers[-1].bias.fill_(3.0)
    frames_TSS3 = draw_frames(3, SMALL, SMALL)

    tracker = Tracker(model, precision="fp32")
    encoded = tracker.encode(frames_TSS3)
    request = TrackRequest(encoded=encoded, prompt=prompt(), order=range(3))
    ours = [frame for (frame,) in tracker.track([request])]

    file = official_configs()[name]
    predictor = build_sam2_video_predictor(
        f"configs/{file.parent.name}/{file.name}",
        device="cpu",
        hydra_overrides_extra=[f"++model.image_size={SMALL}"],
    )
    predictor.fill_hole_area = 0
    predictor.load_state_dict(model.state_dict())
    theirs = stock_runner(predictor)(
        frames_TSS3,
        lambda p, state: p.add_new_points_or_box(state, 0, 1, box=[20.0, 32.0, 70.0, 98.0]),
    )
    for step, frame in enumerate(ours):
        for value, expected in (
            (frame.features["memory_attention"], theirs.attended[step]),
            (frame.features["memory_encoder"], theirs.memories[step]),
            (frame.features["image_encoder"], theirs.encoded[step]),
            (frame.mask_logits_HW, theirs.logits[step]),
            (frame.object_score, theirs.scores[step]),
        ):
            torch.testing.assert_close(value, expected, atol=5e-6, rtol=1e-5)
