"""Costs from shapes alone, against real models and closed forms."""

from pathlib import Path

import numpy as np
import pytest
import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from stages.clips import ClipsConfig
from stages.dry_run.extract_costs import (
    latents_cost,
    text_cost,
    tracker_cost,
)
from stages.extract_features.config import LatentsConfig, TeacherConfig, TextConfig
from stages.sam2_tracking.build import (
    HUB_CHECKPOINTS,
    build_sam2,
    official_configs,
)
from stages.sam2_tracking.inputs import Sam2Prompt
from stages.sam2_tracking.tracker import Tracker, TrackRequest
from stages.students.registry import read_configs

CLIPS = ClipsConfig(path=Path("clips"), num_frames=17, height=64, width=96)


@pytest.fixture
def configs(tiny_base):
    return read_configs(Path(tiny_base.path))


@pytest.fixture
def image_facts(tiny_image_base):
    return read_configs(Path(tiny_image_base.path))


def test_the_text_encoder_costs_what_its_layers_do(configs):
    cost = text_cost(TextConfig(), configs)
    length, width, inner, heads = 32, 32, 4 * 8, 4
    per_layer = 4 * width * inner + 3 * width * 2 * width  # query, key, value, output; gated MLP
    scores = 2 * heads * length * length * 8
    assert cost.flops_per_clip == 2 * 2 * (length * per_layer + scores)


def test_half_the_precision_is_half_the_weights(configs):
    full = text_cost(TextConfig(), configs)
    half = text_cost(TextConfig(precision="bf16"), configs)
    assert half.weight_bytes == full.weight_bytes / 2
    assert half.flops_per_clip == full.flops_per_clip


def test_the_vae_costs_on_shapes_what_it_costs_on_values(configs):
    from diffusers import AutoencoderKLCogVideoX

    vae = AutoencoderKLCogVideoX.from_pretrained(configs.folder / "vae").eval()
    with FlopCounterMode(display=False) as counter, torch.inference_mode():
        vae.encode(torch.zeros(1, 3, 17, 64, 96))
    cost = latents_cost(LatentsConfig(), CLIPS, configs)
    assert cost.flops_per_clip == counter.get_total_flops()
    assert cost.weight_bytes == sum(p.numel() * 4 for p in vae.parameters())


def test_image_to_video_encodes_every_draw_of_the_first_frame(configs, image_facts):
    one = CLIPS.model_copy(update={"num_frames": 1})
    video = latents_cost(LatentsConfig(), CLIPS, configs).flops_per_clip
    image = latents_cost(LatentsConfig(), one, configs).flops_per_clip
    both = latents_cost(LatentsConfig(image_draws=3), CLIPS, image_facts).flops_per_clip
    assert both == video + 3 * image


@pytest.fixture(scope="module")
def tracker_config(tiny_sam2):
    path, checkpoint = tiny_sam2
    return TeacherConfig(checkpoint=str(checkpoint), config=str(path), image_size=128)


@pytest.fixture(scope="module")
def single(tracker_config):
    return tracker_cost(tracker_config, CLIPS, tracker_config.config)[0]


@pytest.fixture
def changed(tracker_config):
    def cost(**changes):
        config = tracker_config.model_copy(update=changes)
        return tracker_cost(config, CLIPS, config.config)[0]

    return cost


def test_the_tracker_costs_on_shapes_what_it_costs_on_values(tracker_config, single):
    tracker = Tracker(build_sam2(tracker_config.config, None, image_size=128), precision="fp32")
    box = Sam2Prompt(
        points_1P2=torch.tensor([[[20.0, 20.0], [90.0, 90.0]]]),
        point_labels_1P=torch.tensor([[2, 3]], dtype=torch.int32),
    )
    frames = np.random.default_rng(0).integers(0, 255, (17, 128, 128, 3), dtype=np.uint8)
    # The counter knows products of matrices, but not the CPU's fused attention.
    with sdpa_kernel(SDPBackend.MATH):
        with FlopCounterMode(display=False) as encoding:
            encoded = tracker.encode(frames)
        request = TrackRequest(encoded=encoded, prompt=box, order=range(17))
        with FlopCounterMode(display=False) as tracking:
            list(tracker.track([request], features=["memory_attention"]))
    assert single.clip_flops == pytest.approx(encoding.get_total_flops(), rel=1e-6)
    # Pointers beyond the first memories are left out: at 64 positions a frame they weigh most.
    assert single.subject_flops == pytest.approx(2 * tracking.get_total_flops(), rel=0.03)


@pytest.mark.parametrize(
    ("features", "channels"),
    [("memory_attention", 32), ("memory_encoder", 16), ("image_encoder", 32)],
)
def test_each_kind_of_feature_has_its_channels(tracker_config, features, channels):
    config = tracker_config.model_copy(update={"features": features})
    assert tracker_cost(config, CLIPS, config.config)[1] == channels


def test_batches_change_the_memory_and_not_the_work(single, changed):
    batched = changed(clips_per_batch=3, frames_per_batch=4)
    # A little work is shared by the clips of a batch.
    assert batched.subject_flops == pytest.approx(single.subject_flops, rel=1e-3)
    assert batched.clip_flops == pytest.approx(single.clip_flops)
    assert batched.waiting_bytes == 3 * single.waiting_bytes
    assert batched.working_bytes > single.working_bytes


def test_the_forward_pass_alone_is_half_and_frames_may_wait_elsewhere(single, changed):
    forward = changed(fusion="forward", keep_encoded="disk")
    assert forward.subject_flops == single.subject_flops / 2
    assert forward.waiting_bytes == 0 < single.waiting_bytes


def test_clips_with_more_subjects_pass_more_often(single):
    assert single.flops(3, 3) == pytest.approx(3 * single.flops_per_clip)
    assert single.flops(3, 5) - single.flops(3, 3) == pytest.approx(2 * single.subject_flops)


def test_official_hub_ids_name_their_configurations():
    from sam2.build_sam import HF_MODEL_ID_TO_FILENAMES

    for hub_id, (config, _) in HF_MODEL_ID_TO_FILENAMES.items():
        name, _ = HUB_CHECKPOINTS[hub_id]
        assert name in official_configs()
        assert config.endswith(f"/{name}.yaml")
    assert "facebook/sam2-hiera-huge" not in HUB_CHECKPOINTS
    assert "checkpoints/sam2.1_hiera_large.pt" not in HUB_CHECKPOINTS
