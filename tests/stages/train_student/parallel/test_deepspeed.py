from pathlib import Path

import pytest

from stages.train_student.config import DeepSpeedConfig, OptimizerConfig, TrainConfig
from stages.train_student.parallel.deepspeed import (
    check_engine_settings,
    deepspeed_settings,
    describe_batch,
)
from stages.train_student.parallel.optimizers import learning_rate_factor


def test_warm_up_is_linear_and_ends_at_the_peak():
    config = OptimizerConfig(warmup_steps=4)
    factors = [learning_rate_factor(step, config, 10) for step in range(6)]
    assert factors == [0.25, 0.5, 0.75, 1.0, 1.0, 1.0]
    assert learning_rate_factor(0, OptimizerConfig(warmup_steps=0), 10) == 1.0


def test_cosine_falls_to_zero_over_the_remaining_steps():
    config = OptimizerConfig(warmup_steps=2, schedule="cosine")
    factors = [learning_rate_factor(step, config, 12) for step in range(2, 13)]
    assert factors == sorted(factors, reverse=True)
    assert factors[0] == 1.0
    assert factors[5] == pytest.approx(0.5)
    assert factors[-1] == pytest.approx(0.0)


BF16, FP32 = {"precision": "bf16"}, {"precision": "fp32"}
NVME = {"zero_stage": 3, "offload_optimizer": "nvme"}


@pytest.mark.parametrize(
    ("deepspeed", "told"),
    [
        (BF16 | {"zero_stage": 0}, "zero_stage 0 keeps no float32 copy"),
        (FP32 | {"zero_stage": 0, "offload_optimizer": "cpu"}, "offload_optimizer needs .* got 0"),
        ({"zero_stage": 2, "offload_parameters": "cpu"}, "offload_parameters needs zero_stage 3"),
        (NVME | {"zero_stage": 2}, "nvme needs zero_stage 3.* got 2; set it to cpu"),
        (NVME, "nvme_path must name a folder.* got null"),
        (NVME | {"nvme_path": "/not/there"}, "/not/there is not a folder"),
    ],
)
def test_combinations_no_engine_can_do_are_refused(deepspeed, told):
    config = TrainConfig(deepspeed=DeepSpeedConfig(**deepspeed))
    with pytest.raises(ValueError, match=told):
        check_engine_settings(config)


def test_a_disk_is_refused_where_its_operator_cannot_be_built(monkeypatch, tmp_path):
    monkeypatch.setattr(
        "stages.train_student.parallel.deepspeed.why_no_nvme", lambda: "libaio is missing"
    )
    config = TrainConfig(deepspeed=DeepSpeedConfig(**NVME, nvme_path=tmp_path))
    with pytest.raises(ValueError, match="offloads to nvme, but libaio is missing; or set it to"):
        check_engine_settings(config)


def test_8_bit_moments_are_refused_without_their_package_and_on_a_disk(monkeypatch, tmp_path):
    optimizer = OptimizerConfig(name="adamw8bit")
    on_disk = DeepSpeedConfig(**NVME, nvme_path=tmp_path)
    with pytest.raises(ValueError, match="cannot be offloaded to nvme"):
        check_engine_settings(TrainConfig(optimizer=optimizer, deepspeed=on_disk))
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(ValueError, match=r"pip install 'sam2videox\[adamw8bit\]'"):
        check_engine_settings(TrainConfig(optimizer=optimizer))


def test_the_batch_is_told_with_what_makes_it():
    config = TrainConfig(batch_size=32)
    assert describe_batch(config, 8) == (
        "batch 32 = 1 clip x 8 processes x 4 passes; learning rate 0.0001 whatever the number of "
        "processes"
    )
    config = TrainConfig(batch_size=2, micro_batch_size=2)
    assert describe_batch(config, 1).startswith("batch 2 = 2 clips x 1 process x 1 pass;")


def test_runs_that_share_a_disk_do_not_share_its_files(tmp_path):
    def folder(run_dir):
        disk = DeepSpeedConfig(**NVME, nvme_path=tmp_path)
        settings = deepspeed_settings(TrainConfig(run_dir=run_dir, deepspeed=disk), 1)
        return settings["zero_optimization"]["offload_optimizer"]["nvme_path"]

    assert folder("runs/a") == folder(Path("runs/a").absolute())
    assert folder("runs/a") != folder("runs/b")
