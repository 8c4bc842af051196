"""What the training step makes of a batch: its losses, their weights, and their sum."""

from dataclasses import fields, replace
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import torch.nn.functional as F  # noqa: N812

from stages.students.cogvideox.configs import CogVideoXConfigs
from stages.students.cogvideox.diffusion import cumulative_alphas
from stages.students.registry import read_configs
from stages.train_student.config import TrainConfig
from stages.train_student.data.dataset import Batch
from stages.train_student.model.student import Student
from stages.train_student.model.teacher import TeacherLayout
from stages.train_student.objectives.build import build_heads, build_objectives
from stages.train_student.step import TrainingStep
from tests.stages.local_gram_flow.reference import kl_by_loop, similarities_by_loop

WEIGHTS = (0.7, 0.3)
"""What each of the two parts weighs in the fused similarity."""
NATIVE, LENGTH, CHANNELS = (6, 6), 3, 5


def _random(seed, *shape):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def _fused(parts_THWC):
    return torch.cat(
        [w**0.5 * F.normalize(p, dim=-1) for w, p in zip(WEIGHTS, parts_THWC, strict=True)], dim=-1
    )


def _similarities_by_hand(parts_THWC, grid):
    """Mean of the parts' own similarities on the grid: each resampled alone, in float64."""
    total = 0.0
    for weight, part_THWC in zip(WEIGHTS, parts_THWC, strict=True):
        unit_TCHW = F.normalize(part_THWC.double(), dim=-1).permute(0, 3, 1, 2)
        resampled = F.interpolate(unit_TCHW, size=grid, mode="bilinear", antialias=True)
        values, inside = similarities_by_loop(resampled.permute(0, 2, 3, 1)[None].numpy(), 1)
        total = total + weight * values
    return total, inside


@pytest.fixture
def step(tiny, base_model):
    def make(layout=None, **settings):
        return TrainingStep(
            read_configs(base_model),
            build_objectives(TrainConfig(**settings)),
            layout=layout,
            device=torch.device("cpu"),
            dtype=torch.float32,
        )

    return make


def _batch(tiny, teacher_BTHWC, valid_BT):
    latents = torch.zeros(len(teacher_BTHWC), *tiny.LATENT)
    return Batch(
        keys=("a", "b"),
        clean_BFCHW=latents,
        noise_BFCHW=latents,
        timestep_B=torch.zeros(len(latents), dtype=torch.int64),
        text_BLD=torch.zeros(len(latents), *tiny.TEXT),
        image_BFCHW=None,
        teacher={"features": teacher_BTHWC},
        teacher_valid_BT=valid_BT,
        num_frames=tiny.FRAMES,
    )


def test_features_on_sam2s_own_grid_are_compared_on_the_students(tiny, step):
    """Against each direction resampled alone and averaged in Gram-flow space, in float64.

    The second clip's last frame holds zeros and is invalid.
    """
    parts = [
        [_random(10 * clip + part, LENGTH, *NATIVE, CHANNELS) for part in range(2)]
        for clip in range(2)
    ]
    teacher_BTHWC = torch.stack([_fused(clip) for clip in parts])
    teacher_BTHWC[1, -1] = 0.0
    valid_BT = torch.ones(2, LENGTH, dtype=torch.bool)
    valid_BT[1, -1] = False
    student_BTHWC = _random(99, 2, LENGTH, *tiny.GRID, 4)

    def student(inputs, *rest):
        return inputs["hidden_states"], {"lgf": student_BTHWC}

    made = step(TeacherLayout(native=True, parts=2), lgf={"radius": 1, "temperature": 0.2})
    found_B = made(student, _batch(tiny, teacher_BTHWC, valid_BT), 0).auxiliary_B["lgf"]
    student_loop, _ = similarities_by_loop(student_BTHWC.double().numpy(), 1)
    expected = []
    for clip, pairs in enumerate((LENGTH - 1, LENGTH - 2)):
        teacher_loop, inside = _similarities_by_hand(parts[clip], tiny.GRID)
        flows = [a[:, :pairs] for a in (student_loop[clip : clip + 1], teacher_loop, inside)]
        expected.append(kl_by_loop(*flows, 0.2))
    np.testing.assert_allclose(found_B.tolist(), expected, rtol=1e-4)


def test_features_on_the_students_grid_are_not_touched(tiny, step):
    features_BTHWC = _random(0, 2, LENGTH, *tiny.GRID, 4)
    valid_BT = torch.ones(2, LENGTH, dtype=torch.bool)

    def student(inputs, *rest):
        return inputs["hidden_states"], {"lgf": features_BTHWC}

    losses = step(lgf={"radius": 1})(student, _batch(tiny, features_BTHWC.half(), valid_BT), 0)
    assert losses.auxiliary_B["lgf"].max() < 1e-5


ALL = ("lgf", "repa", "token-relation", "mask")
TAUGHT = {
    "lgf": {"radius": 1, "weight": 0.5, "warmup_steps": 4, "projector_widths": (8, 8, 6)},
    "repa": {"weight": 0.3, "timesteps": (0, 500), "projector_widths": (8, 8)},
    "token_relation": {"timestep_weighting": "signal", "projector_widths": (8, 8, 6)},
    "mask": {"schedule": "linear", "final_weight": 0.02, "projector_widths": (8, 4)},
    "steps": 10,
    "block": 1,
}


def _full_batch(tiny, frames=9, *, maps=None, size=(4, 6), device="cpu", dtype="float16", pad=0):
    """Two clips with everything that any objective reads."""
    generator = torch.Generator().manual_seed(frames)
    latents = ((frames - 1) // 4 + 1 + pad, tiny.LATENT[1], *size)
    grid = (size[0] // 2, size[1] // 2)
    maps = maps or frames

    def random(*shape):
        return torch.randn(2, *shape, generator=generator).to(device)

    features = torch.nn.functional.normalize(random(maps, *grid, tiny.TEACHER_WIDTH), dim=-1)
    arrays = {"features": features.half()}
    if dtype == "int8":
        scale = features.abs().amax(-1) / 127
        arrays = {"features": (features / scale[..., None]).round().to(torch.int8)}
        arrays["scale"] = scale.half()
    mask = torch.zeros(2, frames, 2 * size[0], 2 * size[1], dtype=torch.uint8, device=device)
    mask[:, :, :, : size[1]] = 255  # the left half of the picture
    valid = torch.ones(2, frames, dtype=torch.uint8, device=device)
    valid[1, -1] = 0
    return Batch(
        keys=("a", "b"),
        clean_BFCHW=random(*latents),
        noise_BFCHW=random(*latents),
        timestep_B=torch.tensor([300, 700], device=device),
        text_BLD=random(*tiny.TEXT),
        image_BFCHW=None,
        teacher=arrays,
        teacher_valid_BT=torch.ones(2, maps, dtype=torch.bool, device=device),
        masks={"forward": mask, "backward": mask, "valid": valid},
        num_frames=frames,
    )


def _student(tiny, config, *, frame_rate=True, **changes):
    transformer = tiny.tiny_transformer(**changes)
    torch.manual_seed(1)
    configs = CogVideoXConfigs(
        folder=Path(), transformer=dict(transformer.config), vae={}, scheduler={}
    )
    features = SimpleNamespace(shape=tiny.teacher_shapes()["features"])
    teacher = SimpleNamespace(arrays={"features": features})
    heads = build_heads(config, configs, teacher, frame_rate=frame_rate)
    return Student(transformer, heads, 1)


def test_the_total_is_the_sum_of_the_weighted_means(tiny, step, base_model):
    config = TrainConfig(objectives=ALL, **TAUGHT)
    student, batch = _student(tiny, config), _full_batch(tiny)
    made = step(objectives=ALL, **TAUGHT)
    abar_B = cumulative_alphas(read_configs(base_model).scheduler)[[300, 700]].numpy()
    by_noise = {
        "lgf": np.ones(2),
        "repa": np.array([1.0, 0.0]),
        "token-relation": abar_B,
        "mask": np.ones(2),
    }
    by_step = {
        0: {"lgf": 0.0, "repa": 0.3, "token-relation": 0.5, "mask": 0.1},
        1: {"lgf": 0.125, "repa": 0.3, "token-relation": 0.5, "mask": 0.1 - 0.08 / 9},
        9: {"lgf": 0.5, "repa": 0.3, "token-relation": 0.5, "mask": 0.02},
    }
    seen = []
    for number, weights in by_step.items():
        losses = made(student, batch, number)
        assert losses.auxiliary_B.keys() == set(ALL)
        assert not losses.diffusion_B.requires_grad
        parts = {name: loss_B.double().numpy() for name, loss_B in losses.auxiliary_B.items()}
        expected = losses.diffusion_B.double().mean().item() + sum(
            weights[name] * (by_noise[name] * parts[name]).mean() for name in ALL
        )
        assert losses.total.item() == pytest.approx(expected, rel=1e-5)
        assert all(part.min() > 0 for part in parts.values())
        seen.append(parts)
    for name in ALL:  # what is told is before weighting: no step and no noise changes it
        np.testing.assert_array_equal(seen[0][name], seen[1][name])


def test_the_gradient_is_that_of_the_clips_one_by_one(tiny, step):
    """Micro-batches change nothing, though the second clip has fewer valid maps and frames."""
    config = TrainConfig(objectives=ALL, **TAUGHT)
    made, batch = step(objectives=ALL, **TAUGHT), _full_batch(tiny)
    batch.teacher_valid_BT[1, 5:] = False
    gradients = []
    for pieces in ([slice(0, 2)], [slice(0, 1), slice(1, 2)]):
        student = _student(tiny, config)
        for piece in pieces:
            losses = made(student, _piece(batch, piece), 5)
            (losses.total / len(pieces)).backward()
        gradients.append({name: p.grad for name, p in student.named_parameters()})
    for name, whole in gradients[0].items():
        assert whole is not None, name
        torch.testing.assert_close(whole, gradients[1][name], rtol=1e-4, atol=1e-6)


def _piece(batch, piece):
    def cut(value):
        if isinstance(value, torch.Tensor):
            return value[piece]
        return {n: v[piece] for n, v in value.items()} if isinstance(value, dict) else value

    return replace(batch, **{f.name: cut(getattr(batch, f.name)) for f in fields(batch)})


@pytest.mark.parametrize("dtype", ["float16", "int8"])
@pytest.mark.parametrize("rate", ["frame", "latent"])
@pytest.mark.parametrize("patch_size_t", [None, 2])
def test_every_rate_and_model_gives_every_loss_at_every_size(
    tiny, tmp_path, rate, patch_size_t, dtype
):
    """One step for batches of several sizes, as buckets give them; 1.5 patches time by two."""
    changes = {} if patch_size_t is None else {"patch_size_t": 2, "patch_bias": False}
    config = TrainConfig(objectives=ALL, **TAUGHT)
    student = _student(tiny, config, frame_rate=rate == "frame", **changes)
    configs = read_configs(tiny.save_pipeline(tmp_path, transformer=student.transformer))
    made = TrainingStep(
        configs, build_objectives(config), device=torch.device("cpu"), dtype=torch.float32
    )
    first = {}
    for frames, size in ((9, (4, 6)), (17, (4, 4)), (9, (4, 6))):
        latents = (frames - 1) // 4 + 1
        batch = _full_batch(
            tiny,
            frames,
            maps=frames if rate == "frame" else latents,
            size=size,
            dtype=dtype,
            pad=configs.padding(latents),
        )
        losses = made(student, batch, 5)
        assert losses.total.isfinite()
        found = torch.stack([losses.diffusion_B, *losses.auxiliary_B.values()])
        assert found.shape == (1 + len(ALL), 2)
        assert torch.equal(first.setdefault((frames, size), found), found)


def test_shapes_alone_go_through_the_meta_device(tiny, base_model):
    config = TrainConfig(
        objectives=ALL,
        **TAUGHT
        | {
            "lgf": TAUGHT["lgf"]
            | {"directions": "averaged", "pairs": "both", "foreground_weight": 3.0}
        },
    )
    student = _student(tiny, config).to("meta")
    meta = torch.device("meta")
    made = TrainingStep(
        read_configs(base_model),
        build_objectives(config),
        layout=TeacherLayout(native=True, parts=2, forward_weight=0.5),
        device=meta,
        dtype=torch.float32,
    )
    losses = made(student, _full_batch(tiny).to(meta), 5)
    losses.total.backward()
    assert losses.total.device.type == "meta"
    assert {name: loss_B.shape for name, loss_B in losses.auxiliary_B.items()} == dict.fromkeys(
        ALL, (2,)
    )
    assert all(parameter.grad is not None for parameter in student.parameters())


def test_masks_alone_need_no_teacher(tiny, step):
    config = TrainConfig(objectives=["mask"], **TAUGHT)
    student = _student(tiny, config)
    batch = replace(_full_batch(tiny), teacher=None, teacher_valid_BT=None)
    losses = step(objectives=["mask"], **TAUGHT)(student, batch, 0)
    assert losses.auxiliary_B.keys() == {"mask"}
    assert losses.auxiliary_B["mask"].min() > 0


@pytest.mark.parametrize("name", ALL)
def test_each_can_be_learnt(tiny, step, name):
    """The same batch again and again, by its auxiliary loss alone."""
    settings = TAUGHT | {name.replace("-", "_"): {"projector_widths": (16, 16, 12)}}
    if name in ("repa", "mask"):
        settings[name] = {"projector_widths": (16, 16)}
    config = TrainConfig(objectives=[name], **settings)
    student, batch = _student(tiny, config), _full_batch(tiny)
    made = step(objectives=[name], **settings)
    optimizer = torch.optim.AdamW(student.parameters(), lr=5e-3)
    losses = []
    for _ in range(25):
        optimizer.zero_grad()
        found = made(student, batch, 0)
        (found.total - found.diffusion_B.mean()).backward()
        optimizer.step()
        losses.append(found.auxiliary_B[name].mean().item())
    assert losses[-1] < 0.7 * losses[0]
