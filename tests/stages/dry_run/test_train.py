"""Estimated memory of a step against the allocator in a real step, and against sums by hand."""

from pathlib import Path

import pytest
import torch
from torch.profiler import ProfilerActivity, profile

from stages.clips.config import ClipsConfig
from stages.compute_cost.gpus import Gpu
from stages.dry_run import train as module
from stages.dry_run.train import SizedStores, estimate
from stages.dry_run.train_memory import ParameterCounts, checkpoint_bytes, memory
from stages.students.cogvideox.configs import CogVideoXConfigs
from stages.train_student.config import TrainConfig
from stages.train_student.data.dataset import Batch
from stages.train_student.step import TrainingStep
from stages.train_student.step_costs import (
    StepCost,
    meta_batch,
    meta_student,
    step_cost,
)
from tests.stages.train_student.conftest import tiny_scheduler, tiny_transformer, tiny_vae

SIZE = ClipsConfig(path=Path("unused"), num_frames=17, height=128, width=192)
COUNTS = ParameterCounts(transformer=1000, adapters=200, heads=40, trained=240)


@pytest.fixture
def configs(tmp_path):
    transformer = tiny_transformer(
        num_layers=6, num_attention_heads=4, attention_head_dim=32, max_text_seq_length=32
    )
    scheduler = tiny_scheduler()
    return CogVideoXConfigs(
        folder=tmp_path,
        transformer=dict(transformer.config),
        vae=dict(tiny_vae().config),
        scheduler=dict(scheduler.config),
    )


def allocated_at_most(work):
    """Bytes that torch's allocator had given out at the fullest moment of `work`."""
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as found:
        work()
    events = found.profiler.kineto_results.events()
    changes = sorted(
        (event.start_ns(), event.nbytes()) for event in events if event.name() == "[memory]"
    )
    total = most = 0
    for _, change in changes:
        total += change
        most = max(most, total)
    return most


@pytest.mark.parametrize("checkpointing", [True, False])
def test_activations_are_what_a_real_step_allocates(configs, checkpointing):
    config = TrainConfig(
        objectives=(),
        gradient_checkpointing=checkpointing,
        micro_batch_size=2,
        lora={"rank": 4},
        deepspeed={"precision": "fp32"},
    )
    told = step_cost(config, configs, SIZE).activation_bytes
    student = meta_student(config, configs).to_empty(device="cpu")
    for parameter in student.parameters():
        torch.nn.init.normal_(parameter, std=0.02)
    shapes = meta_batch(config, configs, SIZE, None, None)
    batch = Batch(
        keys=("a", "b"),
        clean_BFCHW=torch.randn(shapes.clean_BFCHW.shape),
        noise_BFCHW=torch.randn(shapes.clean_BFCHW.shape),
        timestep_B=torch.tensor([5, 500]),
        text_BLD=torch.randn(shapes.text_BLD.shape).half(),
        image_BFCHW=None,
        teacher=None,
        teacher_valid_BT=None,
        num_frames=SIZE.num_frames,
    )
    step = TrainingStep(configs, (), device=torch.device("cpu"), dtype=torch.float32)
    measured = allocated_at_most(lambda: step(student, batch, 0).total.backward())
    assert told == pytest.approx(measured, rel=0.15)


@pytest.mark.parametrize("stage", [1, 2, 3])
def test_states_are_shared_and_weights_only_by_zero_3(stage):
    config = TrainConfig(batch_size=4, deepspeed={"zero_stage": stage})
    found = memory(config, COUNTS, processes=4, activation_bytes=10**9, batch_bytes=7).gpu
    assert found["weights"] == 2 * 1240 // (4 if stage == 3 else 1)
    assert found["float32 weights"] == 4 * 240 // 4
    assert found["moments"] == 8 * 240 // 4
    assert found["gradients"] == (6 * 240 if stage == 1 else 4 * 240 // 4)
    assert found["batch"] == 7
    assert ("gathered weights" in found) == (stage == 3)


def test_what_is_offloaded_is_on_the_host():
    config = TrainConfig(
        batch_size=4,
        ema={"decay": 0.99},
        deepspeed={"zero_stage": 3, "offload_optimizer": "cpu", "offload_parameters": "cpu"},
    )
    found = memory(config, COUNTS, processes=4, activation_bytes=0, batch_bytes=0)
    assert not {"weights", "moments", "float32 weights", "gradients", "average"} & set(found.gpu)
    of_each = {"weights": 2 * 310, "float32 weights": 240, "moments": 480}
    assert found.host == of_each | {"gradients": 240, "average": 240}


def test_eight_bit_moments_take_a_quarter():
    config = TrainConfig(optimizer={"name": "adamw8bit"})
    found = memory(config, COUNTS, processes=1, activation_bytes=0, batch_bytes=0)
    assert found.gpu["moments"] == pytest.approx(8 * 240 / 4, rel=0.02)


def test_a_checkpoint_of_adapters_leaves_the_model_out():
    assert checkpoint_bytes(TrainConfig(), COUNTS) == 240 * (2 + 4 + 8)
    full = ParameterCounts(transformer=1000, adapters=0, heads=40, trained=1040)
    config = TrainConfig(method="full", ema={"decay": 0.99})
    assert checkpoint_bytes(config, full) == 1040 * (2 + 4 + 8 + 4)


def reckon(config, configs, gigabytes, gpus=1):
    gpu = Gpu(name="a GPU", memory_bytes=int(gigabytes * 1e9), bf16_flops=1e15, fp32_flops=1e14)
    stores = [SizedStores(size=SIZE, teacher=None, masks=None)]
    return estimate(config, configs, stores, gpu=gpu, gpus=gpus)


def test_what_fits_is_told_with_its_time(configs):
    found = reckon(TrainConfig(objectives=(), steps=10), configs, 80, gpus=4)
    assert (found.fits, found.remedy, found.passes) == (True, None, 8)
    flops = 32 * found.costs[0].flops_per_clip
    assert found.seconds_per_step == pytest.approx(flops / (4 * 1e15 * 0.4))


def _cost(config, *args, **kwargs):
    kept = (10 if config.gradient_checkpointing else 60) * config.micro_batch_size
    return StepCost(
        flops_per_clip=1e15,
        model_flops_per_clip=1e15,
        activation_bytes=kept * 10**9,
        batch_bytes=10**7,
    )


@pytest.mark.parametrize(
    ("changes", "gigabytes", "settings"),
    [
        ({"gradient_checkpointing": False}, 20, {"gradient_checkpointing": True}),
        ({"micro_batch_size": 4}, 20, {"micro_batch_size": 1}),
        (
            {"gradient_checkpointing": False, "micro_batch_size": 4},
            20,
            {"gradient_checkpointing": True, "micro_batch_size": 1},
        ),
    ],
)
def test_what_does_not_fit_is_answered_with_the_first_settings_that_would(
    configs, monkeypatch, changes, gigabytes, settings
):
    monkeypatch.setattr(module, "step_cost", _cost)
    found = reckon(TrainConfig(objectives=(), **changes), configs, gigabytes)
    assert found.fits is False
    assert found.remedy.settings == settings
    assert found.remedy.gpu_bytes <= gigabytes * 1e9 < found.gpu_bytes


def test_what_no_settings_would_fit_is_said(configs, monkeypatch):
    monkeypatch.setattr(module, "step_cost", _cost)
    found = reckon(TrainConfig(objectives=()), configs, 5)
    assert (found.fits, found.remedy) == (False, None)
