"""CREPA, iREPA and VideoREPA with an encoder's features, against loops of what they published."""

import math
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import torch.nn.functional as F  # noqa: N812
from hypothesis import given, settings
from hypothesis import strategies as st

from cache_schema import ArraySpec, StoreSettings
from stages.local_gram_flow import time_weights
from stages.train_student.config import TrainConfig
from stages.train_student.model.published_projectors import Convolution, PublishedProjector, mlp
from stages.train_student.model.teacher import Teacher, TeacherLayout
from stages.train_student.objectives.build import build_heads, build_objectives, kinds_needed
from stages.train_student.objectives.repa import cosine_loss, spatially_normalised

VISUAL = TeacherLayout(visual=True)


def random(seed, *shape):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).double()


def cosine(one, other):
    return one @ other / (np.linalg.norm(one) * np.linalg.norm(other))


def objective(**config):
    (made,) = build_objectives(TrainConfig(**config))
    return made


def teacher_of(features, *, num_frames, layout=VISUAL, grid=None):
    return Teacher(
        arrays={"features": features},
        valid_BT=torch.ones(features.shape[:2], dtype=torch.bool),
        num_frames=num_frames,
        token_grid=grid or tuple(features.shape[2:4]),
        layout=layout,
    )


@settings(max_examples=25)
@given(
    seed=st.integers(0, 2**31),
    distance=st.integers(0, 5),
    decay=st.sampled_from([0.5, 1.0, 3.0]),
    valid=st.lists(st.booleans(), min_size=4, max_size=4),
)
def test_crepa_equals_its_formula_in_a_float64_loop(seed, distance, decay, valid):
    """Over frames f, sim(y_f, h_f) and exp(-|k - f| / tau) sim(y_k, h_f) of neighbours k."""
    student, teacher = random(seed, 1, 4, 2, 3, 5), random(seed + 1, 1, 4, 2, 3, 5)
    total, frames = 0.0, [f for f in range(4) if valid[f]]
    for f in frames:
        for k in frames:
            if abs(k - f) > distance:
                continue
            distances = [
                1 - cosine(student[0, f, y, x].numpy(), teacher[0, k, y, x].numpy())
                for y, x in np.ndindex(2, 3)
            ]
            total += math.exp(-abs(k - f) / decay) * np.mean(distances)
    found_B = cosine_loss(student, teacher, torch.tensor([valid]), distance=distance, decay=decay)
    assert found_B.item() == pytest.approx(total / max(1, len(frames)), abs=1e-12)


def test_invalid_neighbours_touch_neither_crepas_loss_nor_its_gradient():
    valid_BT = torch.tensor([[True, False, True]])
    student = random(0, 1, 3, 2, 2, 4)
    teacher = random(1, 1, 3, 2, 2, 4)
    teacher[:, 1], student[:, 1] = math.nan, math.inf
    student.requires_grad_()
    loss = cosine_loss(student, teacher, valid_BT, distance=2)
    loss.sum().backward()
    assert loss.isfinite().all() and student.grad.isfinite().all()
    assert not student.grad[:, 1].any()


def test_the_spatial_norm_equals_a_loop():
    features, gamma = random(0, 2, 3, 4, 5, 6), 0.6
    expected = np.zeros(features.shape)
    for b, t, c in np.ndindex(2, 3, 6):
        tokens = features[b, t, :, :, c].numpy()
        mean = tokens.sum() / tokens.size
        std = math.sqrt(((tokens - mean) ** 2).sum() / (tokens.size - 1))
        expected[b, t, :, :, c] = (tokens - gamma * mean) / (std + 1e-6)
    assert spatially_normalised(features, gamma).numpy() == pytest.approx(expected, abs=1e-12)


def test_repa_with_irepas_norm_and_crepas_neighbours_combines_both():
    features, student = random(0, 1, 3, 2, 3, 4), random(1, 1, 3, 2, 3, 4)
    made = objective(
        objectives=["repa"],
        repa={
            "teacher": "visual",
            "spatial_norm": 0.6,
            "neighbour_distance": 1,
            "neighbour_decay": 2.0,
        },
    )
    found_B = made(student, teacher_of(features, num_frames=3))
    normalised = spatially_normalised(features, 0.6)
    valid_BT = torch.ones(1, 3, dtype=torch.bool)
    expected_B = cosine_loss(student, normalised, valid_BT, distance=1, decay=2.0)
    torch.testing.assert_close(found_B, expected_B)
    assert not torch.allclose(expected_B, cosine_loss(student, features, valid_BT))


def test_the_convolution_is_torchs_with_zero_padding():
    torch.manual_seed(0)
    made, official = Convolution(5, 3).double(), torch.nn.Conv2d(5, 3, 3, padding=1).double()
    taps = official.weight.detach().permute(2, 3, 0, 1)  # row, column, out, in
    made.taps.weight.data = taps.reshape(27, 5)
    made.bias.data = official.bias.detach()
    tokens = random(1, 2, 3, 4, 6, 5)
    expected = official(tokens.flatten(0, 1).permute(0, 3, 1, 2)).permute(0, 2, 3, 1)
    torch.testing.assert_close(made(tokens).flatten(0, 1), expected)


def test_a_convolution_starts_as_wide_as_torchs():
    torch.manual_seed(0)
    bound = torch.nn.Conv2d(64, 32, 3).weight.abs().max().item()
    assert Convolution(64, 32).taps.weight.abs().max().item() == pytest.approx(bound, rel=0.01)


def visual_settings(maps, grid, channels, **values):
    shape = (maps, *grid, channels)
    spec = ArraySpec(dtype="float16", shape=shape, dimension_names=("t", "h", "w", "c"))
    return StoreSettings(kind="visual", arrays={"features": spec}, values=values)


BASE = SimpleNamespace(width=8, patch_size_t=1)


TUBELETS = {"time_rate": "tubelet", "frames_per_map": 2, "grid_source": "native"}


def test_videorepas_road_from_tokens_to_loss_is_the_published_one():
    """Tokens of 3 latent frames of 6x9 against 4 tubelets of 2x3, in the published order.

    aHapBean/VideoREPA@8002687, cogvideox_t2v_align/lora_trainer.py: projector, first latent frame
    dropped, trilinear to the tubelets' rate, a convolution of 3 with stride 3, similarities of all
    tokens.
    """
    config = TrainConfig(
        objectives=["token-relation"],
        token_relation={
            "teacher": "visual",
            "projector": "mlp",
            "projector_widths": (12, 12, 7),
            "downsampler": "learned",
            "pool": 3,
            "skip_first_latent": True,
        },
    )
    assert kinds_needed(config) == ("visual",)
    store = visual_settings(4, (2, 3), 7, **TUBELETS)
    torch.manual_seed(0)
    head = build_heads(config, BASE, None, visual=store)["token-relation"].double()
    assert isinstance(head, PublishedProjector)
    made = objective(**config.model_dump(include={"objectives", "token_relation"}))
    tokens, features = random(2, 1, 3, 6, 9, 8), random(3, 1, 4, 2, 3, 7)
    weights = time_weights(made.num_maps(4, 9), 9, frames_per_map=2).double()
    teacher = teacher_of(features, num_frames=9, layout=TeacherLayout.of(store), grid=(6, 9))
    found_B = made(head(tokens, weights), teacher)

    first, second, third = (head.layers[i] for i in (0, 2, 4))
    align = third(F.silu(second(F.silu(first(tokens)))))[:, 1:].permute(0, 4, 1, 2, 3)
    align = F.interpolate(align, scale_factor=(2.0, 1.0, 1.0), mode="trilinear")
    kernel = head.downsampler.linear.weight.unflatten(1, (3, 3, 7)).permute(0, 3, 1, 2)
    align = F.conv2d(align[0].transpose(0, 1), kernel, head.downsampler.linear.bias, stride=3)
    rows = F.normalize(align.permute(0, 2, 3, 1).reshape(-1, 7), dim=-1)
    target = F.normalize(features.reshape(-1, 7), dim=-1)
    expected = F.relu((rows @ rows.T - target @ target.T).abs() - 0.1).mean()
    assert rows.shape == (24, 7)
    torch.testing.assert_close(found_B, expected[None])


@pytest.mark.parametrize("downsampler", ["mean", "learned"])
def test_features_on_the_encoders_grid_are_compared_square_by_square(downsampler):
    """An own grid that is not the squares' is resampled to them once."""
    features, pool = random(0, 1, 3, 5, 5, 4), 2
    made = objective(
        objectives=["token-relation"],
        token_relation={"teacher": "visual", "pool": pool, "downsampler": downsampler},
    )
    student = random(1, 1, 3, 4, 6, 4)
    pooled = student.unflatten(2, (2, 2)).unflatten(4, (3, 2)).mean((3, 5))
    layout = TeacherLayout(visual=True, native=True)
    given_tokens = student if downsampler == "mean" else pooled
    found_B = made(given_tokens, teacher_of(features, num_frames=9, layout=layout, grid=(4, 6)))
    target = F.interpolate(
        features[0].permute(0, 3, 1, 2), (2, 3), mode="bilinear", antialias=True
    ).permute(0, 2, 3, 1)
    matrices = [
        (unit := F.normalize(one.reshape(-1, 4), dim=-1)) @ unit.T for one in (pooled[0], target)
    ]
    expected = F.relu((matrices[0] - matrices[1]).abs() - 0.1).mean()
    torch.testing.assert_close(found_B, expected[None])


def test_an_encoders_tokens_are_resampled_as_they_are():
    features = random(0, 1, 2, 4, 4, 3) * 7
    layout = TeacherLayout(visual=True, native=True)
    found = teacher_of(features, num_frames=2, layout=layout, grid=(2, 2)).features_BTHWG
    expected = F.interpolate(
        features[0].permute(0, 3, 1, 2), (2, 2), mode="bilinear", antialias=True
    ).permute(0, 2, 3, 1)
    torch.testing.assert_close(found[0], expected)


@pytest.mark.parametrize(
    ("changes", "kinds"),
    [
        ({"objectives": ["repa"], "repa": {"teacher": "visual"}}, ("visual",)),
        ({"objectives": ["lgf", "repa"], "repa": {"teacher": "visual"}}, ("teacher", "visual")),
        (
            {
                "objectives": ["lgf", "token-relation", "mask"],
                "teacher_form": "gram_flow",
                "token_relation": {"teacher": "visual"},
            },
            ("gram_flow", "visual", "masks"),
        ),
        ({"repa": {"teacher": "visual"}}, ("teacher",)),
    ],
)
def test_the_visual_store_is_read_where_a_loss_compares_with_it(changes, kinds):
    assert kinds_needed(TrainConfig(**changes)) == kinds


@pytest.mark.parametrize(
    ("rate", "smoothed"), [("frame", True), ("tubelet", True), ("latent", False)]
)
def test_heads_of_a_visual_store_have_its_width_and_smooth_what_is_interpolated(rate, smoothed):
    store = visual_settings(9, (2, 3), 24, time_rate=rate)
    config = TrainConfig(objectives=["repa"], repa={"teacher": "visual"})
    head = build_heads(config, BASE, None, frame_rate=False, visual=store)["repa"]
    assert (head.skip.out_features, head.smooth is not None) == (24, smoothed)


def test_repas_projector_is_linear_layers_with_silu_between():
    layers = mlp((4, 6, 6, 3))
    assert [type(layer).__name__ for layer in layers] == [
        *("Linear", "SiLU", "Linear", "SiLU", "Linear")
    ]
